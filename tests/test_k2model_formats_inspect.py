"""Inspection: the sizes of the real models from their configs, and nothing of a weight read, however far away."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from k2model.config import ModelConfig
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, open_checkpoint
from k2model.formats.inspect import KV_TOKENS, MACHINES, OVERHEAD, as_text, holders, inspect
from k2model.parameters import parameters
from schemas.errors import CheckpointError
from tests.checkpoints import CONFIG, write_checkpoint

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"

DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "vocab_size": 129280, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
}  # fmt: skip
KIMI_K2 = {**DEEPSEEK_V3, "model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384,
           "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": 163840}  # fmt: skip
MOONLIGHT = {**KIMI_K2, "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264,
             "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None,
             "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2}  # fmt: skip
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "vocab_size": 151936, "max_position_embeddings": 40960, "norm_topk_prob": True,
}  # fmt: skip
QWEN3_235B = {**QWEN3_30B, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
              "num_attention_heads": 64, "moe_intermediate_size": 1536}  # fmt: skip
MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
           "vocab_size": 32000, "max_position_embeddings": 32768}  # fmt: skip
GPT_OSS_120B = {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
                "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
                "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072}  # fmt: skip
GPT_OSS_20B = {**GPT_OSS_120B, "num_hidden_layers": 24, "num_local_experts": 32}
QWEN3_8B = {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
            "max_position_embeddings": 40960}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total", "active", "gigabytes", "kv_kilobytes"),
    [
        # Published sizes; bytes follow from them: INT8 linears are 1 byte a value, INT4 g32 4.5 bits, the rest 2 bytes.
        pytest.param(KIMI_K2, 1026, 31.7, (2053, 1029, 594, 585), 70, id="Kimi-K2"),
        pytest.param(DEEPSEEK_V3, 671, 36.6, (1342, 673, 402, 387), 70, id="DeepSeek-V3"),
        pytest.param(MOONLIGHT, 16.0, 2.6, (32, 16.6, 11.2, 10.3), 31, id="Moonlight"),
        pytest.param(QWEN3_30B, 30.5, 3.0, (61, 31, 19.4, 18.5), 98, id="Qwen3-30B-A3B"),
        pytest.param(QWEN3_235B, 235, 21.6, (470, 236, 144, 137), 193, id="Qwen3-235B-A22B"),
        pytest.param(MIXTRAL, 46.7, 12.8, (93, 47, 28.6, 27), 131, id="Mixtral-8x7B"),
        pytest.param(GPT_OSS_120B, 117, 5.1, (234, 118, 69, 68), 74, id="gpt-oss-120b"),
        pytest.param(GPT_OSS_20B, 20.9, 3.6, (42, 22, 14.3, 13.7), 49, id="gpt-oss-20b"),
        pytest.param(QWEN3_8B, 8.2, 7.6, (16.4, 9.4, 6.4, 6.4), 148, id="Qwen3-8B"),
    ],
)
def test_a_config_alone_tells_the_sizes_of_the_real_models(
    tmp_path: Path, config: dict[str, Any], total: float, active: float, gigabytes: tuple[float, ...], kv_kilobytes: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(str(tmp_path))
    assert found.total_parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    assert found.flops_per_token == 2 * found.active_parameters
    assert [size / 1e9 for size in found.memory_bytes.values()] == pytest.approx(gigabytes, rel=0.01)
    assert found.kv_bytes_per_token / 1e3 == pytest.approx(kv_kilobytes, rel=0.01)
    assert found.problems == [f"{tmp_path} holds no weights", f"{tmp_path}: no tokenizer.json, no tiktoken.model"]


def test_the_machines_that_hold_kimi_k2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KIMI_K2))
    machines = inspect(str(tmp_path)).machines
    assert [name for name in machines["int4"] if name != "this machine"] == ["8 x H100", "8 x H200", "8 x MI300X"]
    assert [name for name in machines["int8"] if name != "this machine"] == ["8 x H200", "8 x MI300X"]
    assert not set(machines["bf16"]) & set(MACHINES)


def test_a_machine_holds_weights_buffers_and_cache() -> None:
    size = int((24e9 - 1000 * KV_TOKENS) / OVERHEAD)
    assert "24 GB card" in holders(size, 1000)
    assert "24 GB card" not in holders(size + 1000, 1000)
    assert "48 GB card" in holders(size + 1000, 1000)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the reference checkpoints are not here")
@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("kimi_k2_int4", {"INT4 g32": 96, "BF16": 41, "F32": 2}),
        ("kimi_k2_fp8", {"FP8 32x32": 120, "BF16": 17, "F32": 2}),
        ("qwen3_moe_w8a8", {"INT8": 156, "BF16": 18}),
        ("gpt_oss", {"F32": 247}),
    ],
)
def test_the_formats_are_those_of_the_file(name: str, formats: dict[str, int]) -> None:
    found = inspect(str(FIXTURES / name))
    assert found.formats == formats
    weights = open_checkpoint(str(FIXTURES / name)).weights()
    assert found.memory_bytes["stored"] == sum(weights.read(tensor).nbytes for tensor in weights.infos)


def test_the_embedded_model_opens() -> None:
    found = inspect(DEFAULT_CHECKPOINT)
    assert found.problems == []
    assert found.formats == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert found.tokenizer == "GGUF gpt2, smollm"
    assert found.total_parameters == 134_515_008
    assert found.download_bytes - 3e6 < found.memory_bytes["stored"] < found.download_bytes


def test_it_becomes_json_and_text(tmp_path: Path) -> None:
    found = inspect(str(write_checkpoint(tmp_path)))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["hidden_size"] == 48
    text = as_text(found)
    for line in ("family", "llama", "53.23 k", "KV cache", "opens"):
        assert line in text
    assert "problem" in as_text(dataclasses.replace(found, problems=["it is broken"]))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickles"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "is not safetensors"),
        (lambda folder: save_file({"x": torch.ones(1)}, folder / "model.safetensors"), "norm.weight is missing"),
        (lambda folder: declare(folder, quantization_config={"quant_method": "gptq"}), '"gptq" is not read'),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_what_is_wrong_is_told_not_raised(tmp_path: Path, spoil: Any, problem: str) -> None:
    folder = write_checkpoint(tmp_path)
    spoil(folder)
    found = inspect(str(folder))
    assert problem in "; ".join(found.problems)
    assert found.total_parameters > 0
    assert problem in as_text(found)


def declare(folder: Path, **keys: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **keys}))


def test_what_is_no_model_is_raised(tmp_path: Path) -> None:
    declare(write_checkpoint(tmp_path), model_type="mamba")
    with pytest.raises(CheckpointError, match='model_type is "mamba"'):
        inspect(str(tmp_path))


@dataclasses.dataclass
class Meter:
    """What was asked of the memory store."""

    store: Any
    read: int = 0


@pytest.fixture
def meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """A memory store that counts the bytes asked of it, and serves no file of weights whole."""
    monkeypatch.setenv("K2BATCH_CACHE", str(tmp_path / "cache"))
    meter = Meter(fsspec.filesystem("memory"))
    whole = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        assert not path.endswith((".safetensors", ".gguf")) or (start is not None and end is not None)
        data = bytes(whole(self, path, start=start, end=end, **kwargs))
        meter.read += len(data)
        return data

    def get_file(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a file was downloaded")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    yield meter
    meter.store.rm("/far", recursive=True)
    assert not (tmp_path / "cache").exists()


def test_far_away_only_headers_are_read(tmp_path: Path, meter: Meter) -> None:
    big = {**CONFIG, "hidden_size": 480, "intermediate_size": 960, "num_attention_heads": 6, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(big))
    config = ModelConfig.from_dict(big, "here")
    tensors = {p.name: torch.zeros(p.shape) for p in parameters(config) if p.role != "head"}
    save_file(tensors, tmp_path / "model.safetensors")
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    for file in ("config.json", "model.safetensors"):
        meter.store.pipe_file(f"/far/{file}", (tmp_path / file).read_bytes())
    meter.store.pipe_file("/far/tokenizer.json", b"{}")
    found = inspect("memory://far")
    assert found.problems == []
    assert found.formats == {"F32": len(tensors)}
    assert found.download_bytes > 10_000_000
    assert meter.read < header + 3 * (tmp_path / "config.json").stat().st_size + 100


def test_far_away_a_gguf_is_read_to_the_end_of_its_header(meter: Meter) -> None:
    meter.store.pipe_file("/far/some.gguf", open_checkpoint(DEFAULT_CHECKPOINT).path.read_bytes())
    found = inspect("memory://far/some.gguf")
    assert found.problems == []
    assert found.num_hidden_layers == 30
    assert meter.read < 0.03 * found.download_bytes


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a server that speaks S3."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().call_s3("create_bucket", Bucket="models")
    yield "s3://models"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_on_s3_it_says_what_it_says_of_a_folder(tmp_path: Path, bucket: str) -> None:
    folder = write_checkpoint(tmp_path)
    fs = fsspec.filesystem("s3")
    for path in folder.iterdir():
        fs.put_file(str(path), f"{bucket}/tiny/{path.name}")
    fs.invalidate_cache()
    far, near = inspect(f"{bucket}/tiny"), inspect(str(folder))
    assert near.problems == []
    assert dataclasses.replace(far, name=near.name) == near
