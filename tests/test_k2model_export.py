"""The converted checkpoint: whole, resumable, and the same to us, to transformers and to compressed-tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2model.compress import calibrate
from k2model.compress import convert as converting
from k2model.compress.convert import Int4, convert
from k2model.compress.quantize import quantize_weight
from k2model.decoder.linear import FloatLinear
from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.weights import TensorInfo, Weights
from k2model.parameters import parameters
from k2model.tokenizer import Tokenizer
from tests.checkpoints import FAMILIES, config_json, pack_experts, write_checkpoint
from tests.forward import float_decoder, packed_logits, stored_decoder

PROMPTS = [list(range(40, 70)), [5], list(range(200, 220))]
DENSE = ["llama", "qwen2", "qwen3"]
ROUTED = ["qwen3_moe", "mixtral", "deepseek_v3"]


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate over every tenth of the shipped texts: enough for what is asked here, in a tenth of the time."""
    some = calibrate.calibration_texts()[::10]
    monkeypatch.setattr(calibrate, "calibration_texts", lambda: some)


def converted(source: Path, name: str = "converted", int4: Int4 = "keep", **options: Any) -> Path:
    folder = source.with_name(name)
    folder.mkdir(exist_ok=True)
    convert(open_checkpoint(str(source)), folder, Tokenizer.open(source), int4=int4, **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def linears(folder: Path) -> list[tuple[str, int, int]]:
    """Return the layers' linears by the model's own names, with N and K."""
    found = [parameter for parameter in parameters(open_checkpoint(str(folder)).config()) if parameter.is_linear]
    return [(p.name.removesuffix(".weight"), p.shape[0], p.shape[1]) for p in found]


def quantized(folder: Path) -> dict[str, Tensor]:
    """Return every integer weight and scale of a folder, by the model's own names."""
    weights = open_checkpoint(str(folder)).weights()
    made = {}
    for name, n, k in linears(folder):
        made[f"{name}.weight"], made[f"{name}.weight_scale"] = weights.int8_weight(name, n, k)
    return made


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def from_transformers(folder: Path, **options: Any) -> Any:
    """Return what transformers opens, all of it found in the files."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True, **options}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.inference_mode()
def their_logits(model: Any) -> Tensor:
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS]).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts_and_opens_again(family: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", family=family, auto_map={"AutoConfig": "remote.Code"})
    folder = converted(source)
    opened = open_checkpoint(str(folder))
    weights: Weights = opened.weights()
    weights.check(parameters(opened.config()), tied=opened.config().tie_word_embeddings)
    assert {weights.storage(name) for name, *_ in linears(folder)} == {"int8"}
    assert {weights.infos[n].dtype for n in ("model.embed_tokens.weight", "model.norm.weight")} == {"BF16", "F32"}
    assert "auto_map" not in opened.config_json()
    before, after = packed_logits(float_decoder(source), PROMPTS), packed_logits(stored_decoder(folder), PROMPTS)
    assert (after - before).abs().mean() < 0.08 * before.std()  # a token that takes another route is far off
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored(folder).values())
    if family == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_scale" in index["weight_map"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_in_int8_is_half_a_step_off_at_most_and_converts_back(tied: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    folders = {}
    for embedding in ("bf16", "int8"):
        folders[embedding] = folder = tmp_path / embedding
        folder.mkdir()
        convert(open_checkpoint(str(source)), folder, None, embedding=embedding)
    name = "model.embed_tokens.weight"
    rows = open_checkpoint(str(source)).weights().read(name).float()
    opened = open_checkpoint(str(folders["int8"]))
    weights = opened.weights()
    weights.check(parameters(opened.config()), tied=tied)
    assert weights.infos[name] == TensorInfo("I8", tuple(rows.shape))
    table = weights.embedding(*rows.shape)
    assert table.dtype == torch.bfloat16
    half_a_step = rows.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((table.float() - rows).abs() <= half_a_step + rows.abs() * 2**-8).all()
    before, after = (packed_logits(stored_decoder(folder), PROMPTS) for folder in folders.values())
    assert 0 < (after - before).abs().mean() < 0.05 * before.std()
    again = tmp_path / "again"
    again.mkdir()
    convert(opened, again, None)
    assert torch.equal(open_checkpoint(str(again)).weights().read(name), table)


def test_the_config_of_a_conversion_is_the_sources_and_contradicts_nothing(tmp_path: Path) -> None:
    """Kimi-K2 goes under the name transformers knows; of two dtypes one is left."""
    source = write_checkpoint(tmp_path / "source", family="kimi_k2", dtype="float16", auto_map={"AutoConfig": "x.Y"})
    raw = open_checkpoint(str(converted(source))).config_json()
    changed = {
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "quantization_config": raw["quantization_config"],
    }
    assert raw == {**config_json("kimi_k2"), **changed}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_names_its_class_even_if_its_source_names_none_or_one_of_its_own(
    family: str, tmp_path: Path
) -> None:
    """A Qwen3 without a class is an embedding model to vLLM; GGUF names none."""
    known = config_json(family)["architectures"]
    for number, given in enumerate((None, ["KimiForeignCode"])):
        source = write_checkpoint(tmp_path / str(number) / "source", family=family, architectures=given)
        folder = source.with_name("converted")
        folder.mkdir()
        convert(open_checkpoint(str(source)), folder, None)
        assert json.loads((folder / "config.json").read_text())["architectures"] == known


class Killed(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(family: str, shards: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", family=family, num_hidden_layers=3)
    whole = contents(converted(source, "whole"))
    said: list[str] = []

    def dying(line: str) -> None:
        said.append(line)
        if len(said) == shards:
            raise Killed

    with pytest.raises(Killed):
        converted(source, "resumed", say=dying)
    folder = converted(source, "resumed", say=said.append)
    assert len(said) == 5, "what was there is not made again"
    assert contents(folder) == whole


@pytest.mark.parametrize("linear", [0, 5, 8, 16])
def test_a_conversion_killed_inside_a_shard_makes_that_shard_again(
    linear: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", num_hidden_layers=3)
    whole = contents(converted(source, "whole"))
    calls: list[int] = []

    def dying(weight: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) > linear:
            raise Killed
        return quantize_weight(weight)

    with monkeypatch.context() as patch:
        patch.setattr(converting, "quantize_weight", dying)
        with pytest.raises(Killed):
            converted(source, "resumed")
    assert not (tmp_path / "resumed/model.safetensors.index.json").exists()
    assert contents(converted(source, "resumed")) == whole


def test_int4_is_kept_to_the_bit_or_made_int8(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    source = pack_experts(write_checkpoint(tmp_path / "source", family="deepseek_v3", **sizes))
    kept, made = converted(source, "kept"), converted(source, "made", int4="int8")
    before, after = stored(source), stored(kept)
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 8 * 3 * 3
    assert all(torch.equal(after[name], before[name]) for name in experts)
    for folder, of_experts in ((kept, "int4"), (made, "int8")):
        weights = open_checkpoint(str(folder)).weights()
        for name, *_ in linears(folder):
            assert weights.storage(name) == (of_experts if ".experts." in name else "int8"), name
    reference = packed_logits(float_decoder(source), PROMPTS)
    errors = [(packed_logits(float_decoder(f), PROMPTS) - reference).abs().mean() for f in (kept, made)]
    assert errors[0] < errors[1] < 0.08 * reference.std()
    sizes_in_bytes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (kept, made)]
    assert sizes_in_bytes[0] < sizes_in_bytes[1]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("family", DENSE)
def test_transformers_expands_a_dense_conversion_to_our_weights(family: str, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    folder = converted(write_checkpoint(tmp_path / "source", family=family, outlier=20.0))
    model = from_transformers(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    theirs, ours = model.state_dict(), quantized(folder)
    for name, *_ in linears(folder):
        expected = ours[f"{name}.weight"].float() * ours[f"{name}.weight_scale"][:, None]
        assert torch.equal(theirs[f"{name}.weight"], expected), name
    torch.testing.assert_close(their_logits(model), packed_logits(float_decoder(folder), PROMPTS), rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", DENSE)
def test_transformers_runs_a_dense_conversion_with_quantized_activations(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own quantized forward, whose scales are absmax / 127.5, against ours with that divisor."""
    folder = converted(write_checkpoint(tmp_path / "source", family=family))
    theirs = their_logits(from_transformers(folder))
    decoder = float_decoder(folder)
    plain = packed_logits(decoder, PROMPTS)
    call = FloatLinear.__call__

    def fake_quantized(self: FloatLinear, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=1, keepdim=True) / 127.5
        return call(self, torch.round(x / scale).clamp(-128, 127) * scale)

    monkeypatch.setattr(FloatLinear, "__call__", fake_quantized)
    error = (packed_logits(decoder, PROMPTS) - theirs).abs()
    assert error.mean() <= 0.3 * (theirs - plain).abs().mean()
    assert (error.amax(dim=1) <= 0.05 * plain.std() / 1.5).float().mean() >= 0.9


@pytest.mark.parametrize("family", DENSE)
def test_what_transformers_saves_again_is_what_we_exported(family: str, tmp_path: Path) -> None:
    folder = converted(write_checkpoint(tmp_path / "source", family=family))
    from_transformers(folder).save_pretrained(tmp_path / "again")
    ours, again = quantized(folder), quantized(tmp_path / "again")
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        assert torch.equal(again[name], tensor), name
    before, after = (packed_logits(stored_decoder(f), PROMPTS) for f in (folder, tmp_path / "again"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ROUTED)
def test_compressed_tensors_expands_every_expert_and_transformers_runs_the_result(family: str, tmp_path: Path) -> None:
    """Transformers 5.23 cannot load W8A8 experts: they are no modules there, and only packed ones are expanded.

    So each module goes through compressed-tensors' own matching and expansion, and the floats through transformers.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    folder = converted(write_checkpoint(tmp_path / "source", family=family))
    raw = open_checkpoint(str(folder)).config_json()
    section = QuantizationConfig.model_validate(raw.pop("quantization_config"))
    (scheme,) = section.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(section.format)
    tensors = stored(folder)
    for linear in [name.removesuffix("_scale") for name in tensors if name.endswith("_scale")]:
        module = linear.removesuffix(".weight")
        assert is_match(module, torch.nn.Linear(1, 1), scheme.targets, section.ignore), module
        parts = {"weight": tensors[linear], "weight_scale": tensors.pop(f"{linear}_scale")}
        tensors[linear] = compressor.decompress(parts, scheme)["weight"]
    for module in ("lm_head", "model.layers.1.mlp.gate", "model.layers.1.block_sparse_moe.gate"):
        assert not is_match(module, torch.nn.Linear(1, 1), scheme.targets, section.ignore)
    expanded = tmp_path / "expanded"
    expanded.mkdir()
    save_file(tensors, expanded / "model.safetensors", metadata={"format": "pt"})
    (expanded / "config.json").write_text(json.dumps(raw))
    theirs = their_logits(from_transformers(expanded, experts_implementation="eager"))
    torch.testing.assert_close(theirs, packed_logits(float_decoder(folder), PROMPTS), rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("family", [*ROUTED, "kimi_k2"])
def test_transformers_opens_int4_experts_beside_int8_linears(family: str, tmp_path: Path) -> None:
    """The mixed export. Experts come out rounded to bfloat16: the library multiplies in the dtype of the scale."""
    from transformers import CompressedTensorsConfig

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    folder = converted(pack_experts(write_checkpoint(tmp_path / "source", family=family, **sizes)))
    model = from_transformers(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    weights = open_checkpoint(str(folder)).weights()
    theirs = model.state_dict()
    for name, n, k in linears(folder):
        expected = weights.float_weight(name, n, k)
        if ".experts." not in name:
            assert torch.equal(theirs[f"{name}.weight"], expected), name
            continue
        prefix, _, part = name.rpartition(".experts.")
        expert, kind = part.split(".")
        fused = theirs[f"{prefix}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"][int(expert)]
        found = {"gate_proj": fused[:n], "up_proj": fused[-n:], "down_proj": fused}[kind]
        assert torch.equal(found.float(), expected.bfloat16().float()), name
    ours = packed_logits(float_decoder(folder), PROMPTS)
    assert (their_logits(model) - ours).abs().mean() < 0.01 * ours.std()
