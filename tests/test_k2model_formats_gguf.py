"""GGUF: the same model whichever way it was written, and no number taken that the file does not give."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.folder import local_folder
from k2model.formats.gguf_file import READ_TYPES, read_gguf
from k2model.parameters import parameters
from k2model.rope import Llama3Scaling, YarnScaling
from schemas.errors import CheckpointError

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "llama_gguf"

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_MOE = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 32, "norm_topk_prob": True}  # fmt: skip
GPT_OSS = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
           "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16,
                            "truncate": False}}  # fmt: skip
DEEPSEEK = {
    **LLAMA, "model_type": "deepseek_v3", "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.827,
    "norm_topk_prob": True,
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_group": 4, "topk_group": 2,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16, "beta_fast": 1.0,
                     "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
ARCHS = {
    "llama": LLAMA,
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3moe": QWEN3_MOE,
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt-oss": GPT_OSS,
    "deepseek2": DEEPSEEK,
}


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kept = [p for p in parameters(config) if p.role != "head" or not config.tie_word_embeddings]
    return {p.name: torch.randn(p.shape, generator=generator) for p in kept}


def fields_of(arch: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields llama.cpp's converter writes."""
    fields: dict[str, Any] = {
        "context_length": raw["max_position_embeddings"], "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"], "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"], "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw["head_dim"], "attention.value_length": raw["head_dim"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"], "rope.freq_base": raw["rope_theta"],
        "expert_count": raw.get("num_experts") or raw.get("num_local_experts") or raw.get("n_routed_experts"),
        "expert_used_count": raw.get("num_experts_per_tok"), "attention.sliding_window": raw.get("sliding_window"),
        "expert_feed_forward_length": raw.get("moe_intermediate_size"),
    }  # fmt: skip
    if scaling := raw.get("rope_scaling"):
        fields |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
        fields["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if arch == "deepseek2":
        fields |= {
            "attention.head_count_kv": 1, "attention.q_lora_rank": raw["q_lora_rank"], "attention.kv_lora_rank": 32,
            "attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 24,
            "attention.value_length_mla": 12, "rope.dimension_count": 8, "leading_dense_block_count": 1,
            "expert_shared_count": 2, "expert_weights_scale": 2.827, "expert_weights_norm": True,
            "expert_gating_func": 2, "expert_group_count": 4, "expert_group_used_count": 2,
            "rope.scaling.yarn_log_multiplier": 0.1, "rope.scaling.yarn_beta_fast": 1.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        }  # fmt: skip
    return {key: value for key, value in fields.items() if value is not None}


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "mlp.gate": "ffn_gate_inp",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in ("q", "k", "v", "q_a", "q_b", "kv_b")},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in ("q", "k")},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")},
}  # fmt: skip


def permuted(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k of a llama (LlamaModel.permute)."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(arch: str, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as llama.cpp's converters name, stack, split and permute them."""
    made: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", name)
        assert found is not None
        block = f"blk.{found[1]}." if found[1] else ""
        kind, ending = found[2], found[3]
        if expert := re.fullmatch(r"mlp\.experts\.\d+\.(\w+)_proj", kind):
            stacks.setdefault(f"{block}ffn_{expert[1]}_exps.{ending}", []).append(tensor)
        elif kind == "self_attn.kv_b_proj" and isinstance(config.attention, LatentAttentionConfig):
            heads = tensor.unflatten(0, (config.attention.num_attention_heads, -1))
            nope = config.attention.qk_nope_head_dim
            made[f"{block}attn_k_b.weight"] = heads[:, :nope].transpose(1, 2).contiguous()
            made[f"{block}attn_v_b.weight"] = heads[:, nope:].contiguous()
        elif kind == "self_attn.sinks":
            made[f"{block}attn_sinks.weight"] = tensor
        elif kind == "mlp.gate.e_score_correction_bias":
            made[f"{block}exp_probs_b.bias"] = tensor
        elif arch == "llama" and kind in ("self_attn.q_proj", "self_attn.k_proj"):
            heads_of = 4 if kind == "self_attn.q_proj" else 2
            made[f"{block}{NAMES[kind]}.{ending}"] = permuted(tensor, heads_of)
        else:
            post = arch == "gpt-oss" and kind == "post_attention_layernorm"
            made[f"{block}{'post_attention_norm' if post else NAMES[kind]}.{ending}"] = tensor
    return made | {name: torch.stack(stack) for name, stack in stacks.items()}


def write(path: Path, arch: str, fields: dict[str, Any], tensors: dict[str, Tensor], kind: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        key = key if key.startswith(("tokenizer.", "split.", "general.")) else f"{arch}.{key}"
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, tensor in tensors.items():
        raw = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(folder: Path, arch: str, fields: dict[str, Any] | None = None, kind: str = "F32", **more: Tensor) -> Path:
    """A GGUF file of the architecture's model above, with some fields changed (None: left out) and tensors added."""
    raw = ARCHS[arch]
    config = ModelConfig.from_dict(raw, "here")
    name = "llama" if arch == "mixtral" else arch
    written = {key: value for key, value in {**fields_of(name, raw), **(fields or {})}.items() if value is not None}
    tensors = gguf_tensors(name, config, tensors_of(config))
    tensors |= {key.replace("__", "."): tensor for key, tensor in more.items()}
    return write(folder / f"{arch}.gguf", name, written, tensors, kind)


@pytest.mark.parametrize("arch", list(ARCHS))
def test_a_converted_model_is_the_model_it_was(tmp_path: Path, arch: str) -> None:
    expected = ModelConfig.from_dict(ARCHS[arch], "here")
    checkpoint = open_checkpoint(str(converted(tmp_path, arch)))
    assert checkpoint.config() == expected
    weights = checkpoint.weights()
    weights.check(parameters(expected), tied=expected.tie_word_embeddings)
    tensors = tensors_of(expected)
    assert weights.infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert weights.read(name).equal(tensor), name


def test_kv_b_proj_may_be_whole(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(DEEPSEEK, "here")
    tensors = tensors_of(config)
    names = gguf_tensors("deepseek2", config, tensors)
    for layer in range(2):
        names[f"blk.{layer}.attn_kv_b.weight"] = tensors[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
    path = write(tmp_path / "whole.gguf", "deepseek2", fields_of("deepseek2", DEEPSEEK), names)
    weights = open_checkpoint(str(path)).weights()
    weights.check(parameters(config), tied=False)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert weights.read(name).equal(tensors[name])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_block_types_expand_as_their_definition_says(tmp_path: Path, kind: str) -> None:
    tensors = tensors_of(ModelConfig.from_dict(QWEN3_MOE, "here"))
    weights = open_checkpoint(str(converted(tmp_path, "qwen3moe", kind=kind))).weights()
    raw = gguf.GGMLQuantizationType[kind]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.experts.3.down_proj.weight"):
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name].numpy(), raw), raw)
        assert np.array_equal(weights.read(name).numpy(), expected)
        assert weights.infos[name].dtype == kind


def test_every_type_that_is_offered_can_be_expanded() -> None:
    for name in READ_TYPES:
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the reference files are not here")
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.gguf")), ids=lambda path: path.stem)
def test_every_reference_file_opens_whole_and_as_gguf_py_reads_it(path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    config = checkpoint.config()
    checkpoint.weights().check(parameters(config), tied=config.tie_word_embeddings)
    assert config.rms_norm_eps == 1e-5, "the decimal that was meant, not the float32 that was stored"
    ours = read_gguf(local_folder(path.parent, "here"), path.name)
    theirs = gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.read(tensor.name).numpy(), expected)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF.") and not isinstance(field.contents(), float):
            assert ours.fields[key] == field.contents()


def llama3_divisors(factor: float, low: float, high: float, original: int, theta: float, dim: int) -> Tensor:
    """As llama.cpp's converter computes rope_freqs.weight, value by value."""
    made = []
    for freq in 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * torch.pi / freq
        if wavelength < original / high:
            made.append(torch.tensor(1.0))
        elif wavelength > original / low:
            made.append(torch.tensor(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return torch.stack(made)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 64), (16.0, 4096)])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_llama3_rope_scaling_is_found_again(tmp_path: Path, factor: float, original: int, dim: int) -> None:
    divisors = llama3_divisors(factor, 1.0, 4.0, original, 500000.0, dim)
    path = converted(tmp_path, "llama", {"attention.key_length": dim, "attention.value_length": dim},
                     rope_freqs__weight=divisors)  # fmt: skip
    scaling = open_checkpoint(str(path)).config().rope.scaling
    assert isinstance(scaling, Llama3Scaling)
    again = llama3_divisors(
        scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor,
        scaling.original_max_position_embeddings, 500000.0, dim,
    )  # fmt: skip
    torch.testing.assert_close(again, divisors, rtol=1e-5, atol=0)


def test_divisors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    path = converted(tmp_path, "llama", rope_freqs__weight=torch.linspace(1, 9, 8))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is no llama3 rope scaling"):
        open_checkpoint(str(path)).config()


def test_yarn_keeps_the_files_own_numbers(tmp_path: Path) -> None:
    fields = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
              "rope.scaling.yarn_beta_fast": 16.0}  # fmt: skip
    scaling = open_checkpoint(str(converted(tmp_path, "qwen2", fields))).config().rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert (scaling.factor, scaling.original_max_position_embeddings) == (4.0, 128)
    assert (scaling.beta_fast, scaling.beta_slow) == (16.0, 1.0)


KIMI = {"tokenizer.ggml.pre": "kimi-k2"}


@pytest.mark.parametrize(
    ("arch", "fields", "message"),
    [
        ("llama", {"block_count": None}, "llama.block_count is None, expected a whole number"),
        ("llama", {"attention.head_count": "four"}, "head_count is 'four', expected a whole number"),
        ("llama", {"rope.dimension_count": 8}, "rope over a part of each head"),
        ("llama", {"attention.value_length": 8}, "keys and values of different lengths"),
        ("llama", {"attention.sliding_window": 128}, "attention.sliding_window is not computed"),
        ("llama", {"logit_scale": 0.5}, "llama.logit_scale = 0.5 is not computed here"),
        ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, 'rope scaling "longrope"'),
        ("qwen2", {"rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor = 1.2 is not computed here"),
        ("llama", {"split.count": 3}, "is one of 3 parts"),
        ("deepseek2", {"expert_gating_func": 1}, "expert_gating_func is not 2"),
        ("deepseek2", {"expert_gating_func": None}, "expert_gating_func is not 2"),
        ("deepseek2", {"expert_group_count": None}, "expert_group_count is missing"),
        ("deepseek2", {**KIMI, "rope.scaling.yarn_beta_fast": None}, "differ among Kimi-K2 releases"),
        ("deepseek2", {"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is None, expected a number"),
        ("deepseek2", {"nextn_predict_layers": 1}, "nextn_predict_layers = 1 is not computed here"),
    ],
)
def test_what_a_field_means_is_never_guessed(tmp_path: Path, arch: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(converted(tmp_path, arch, fields))).config()


def test_kimi_groups_no_experts_where_an_older_file_does_not_say(tmp_path: Path) -> None:
    fields = {**KIMI, "expert_group_count": None, "expert_group_used_count": None}
    moe = open_checkpoint(str(converted(tmp_path, "deepseek2", fields))).config().moe
    assert moe is not None
    assert (moe.n_group, moe.topk_group) == (1, 1)


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    path = converted(tmp_path, "qwen2", blk__0__ssm_conv1d__weight=torch.ones(4, 4))
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ssm_conv1d\.weight is not known for architecture qwen2"):
        open_checkpoint(str(path)).weights()


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": torch.ones(4, 32)})
    with pytest.raises(CheckpointError, match='GGUF architecture is "mamba", and these open: llama, qwen2'):
        open_checkpoint(str(path)).config()


def test_a_file_cut_anywhere_is_named_as_cut(tmp_path: Path) -> None:
    whole = converted(tmp_path, "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (5, 20, 30, 300, 1000, 3000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is shorter than it says"):
            open_checkpoint(str(cut)).weights()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "not a readable GGUF file"),
        (0, b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (4, b"\1\0\0\0", "version 1, and versions 2 and 3"),
        (4, b"\0\0\0\3", "big-endian, and versions 2 and 3"),
        (8, b"\xff" * 8, "shorter than it says"),
        (16, b"\xff" * 8, "shorter than it says"),
        (24, b"\xff" * 8, "shorter than it says"),
        (32, b"\xff", "not a readable GGUF file"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    path = converted(tmp_path, "llama")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(path)).config()


def test_a_type_that_is_not_expanded_is_named(tmp_path: Path) -> None:
    path = converted(tmp_path, "llama", kind="F32", blk__0__attn_norm__weight=torch.ones(64))
    data = path.read_bytes()
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert data[at : at + 4] == b"\0\0\0\0"
    for number, shown in ((24, "I8"), (15, "Q8_K"), (200, "number 200")):
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(CheckpointError, match=f"tensor token_embd.weight has type {shown}, which is not read"):
            open_checkpoint(str(path)).config()


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    path = converted(tmp_path, "qwen2", blk__0__post_attention_norm__weight=torch.ones(64))
    with pytest.raises(CheckpointError, match=r"two tensors are both model\.layers\.0\.post_attention_layernorm"):
        open_checkpoint(str(path)).weights()


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = converted(tmp_path, "llama")
    data = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4
    offset = int.from_bytes(data[at : at + 8], "little")
    data[at : at + 8] = (offset - 32).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q\.weight begins inside another tensor"):
        open_checkpoint(str(path)).weights()
