"""The config.json that a GGUF file's fields amount to, per architecture.

Source: llama.cpp's converters (conversion/*.py) for what they write, and its graphs (src/models/*.cpp) for what absent
fields mean. A field whose meaning is not computed here is refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2model.formats.gguf_file import GgufFile
from schemas.errors import CheckpointError

FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "deepseek2": "deepseek_v3",
    "gpt-oss": "gpt_oss",
}
"""`model_type` by GGUF architecture; llama with experts is Mixtral."""

_REMEDY = "use the safetensors checkpoint"

_NEUTRAL = {
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "nextn_predict_layers": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
"""Fields that change what is computed, with the value at which they do not."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of one architecture."""

    file: GgufFile
    arch: str

    @property
    def where(self) -> str:
        return f"{self.file.folder.where}: {self.file.file}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.fields.get(f"{self.arch}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{self.where}: field {self.arch}.{key} is {value!r}, expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.where}: field {self.arch}.{key} is {value!r}, expected a number")
        return float(value)

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}", remedy=_REMEDY)


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the file's config.json. Raises: CheckpointError for an architecture or a field that is not computed."""
    arch = file.fields.get("general.architecture")
    if arch not in FAMILIES:
        where = f"{file.folder.where}: {file.file}"
        known = ", ".join(FAMILIES)
        raise CheckpointError(f'{where}: GGUF architecture is "{arch}", and these open: {known}', remedy=_REMEDY)
    fields = _Fields(file, arch)
    _refuse_unknown(fields)
    config = _common(fields)
    if arch == "deepseek2":
        config |= _deepseek2(fields)
    else:
        config |= _grouped_query(fields) | _moe(fields)
    scaling = _rope_scaling(fields)
    return {**config, "rope_scaling": scaling} if scaling else config


def _refuse_unknown(fields: _Fields) -> None:
    for key, neutral in _NEUTRAL.items():
        if fields.get(key, neutral) != neutral:
            raise fields.refuse(f"field {fields.arch}.{key} = {fields.get(key)!r} is not computed here")
    if fields.file.fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{fields.where} is one of {fields.file.fields['split.count']} parts",
            remedy="join them: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    if fields.arch != "gpt-oss" and fields.get("attention.sliding_window") is not None:
        raise fields.refuse(f"field {fields.arch}.attention.sliding_window is not computed here")


def _common(fields: _Fields) -> dict[str, Any]:
    embedding = fields.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{fields.where}: tensor token_embd.weight is missing", remedy="download it again")
    tokens = fields.file.fields
    return {
        "model_type": "mixtral" if fields.arch == "llama" and fields.get("expert_count") else FAMILIES[fields.arch],
        "hidden_act": "silu",
        "hidden_size": fields.size("embedding_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": fields.size("attention.head_count"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in fields.file.tensors,
        "bos_token_id": tokens.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": tokens.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def _grouped_query(fields: _Fields) -> dict[str, Any]:
    heads = fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", fields.size("embedding_length") // max(heads, 1))
    if fields.size("attention.value_length", head_dim) != head_dim:
        raise fields.refuse("keys and values of different lengths are not computed here")
    if fields.size("rope.dimension_count", head_dim) != head_dim:
        raise fields.refuse("rope over a part of each head is not computed here")
    config: dict[str, Any] = {
        "head_dim": head_dim,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "intermediate_size": fields.size("feed_forward_length", fields.get("expert_feed_forward_length")),
    }
    names = fields.file.tensors
    if fields.arch in ("qwen3", "qwen3moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if fields.arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in names
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    if fields.arch == "gpt-oss":
        config["sliding_window"] = fields.size("attention.sliding_window")
    return config


def _moe(fields: _Fields) -> dict[str, Any]:
    if not fields.get("expert_count"):
        return {}
    experts = fields.size("expert_count")
    config: dict[str, Any] = {"num_experts_per_tok": fields.size("expert_used_count")}
    if fields.arch == "qwen3moe":
        width = fields.size("expert_feed_forward_length")
        # llama.cpp's graph for this architecture always divides by the sum, as the releases' config.json asks.
        norm = bool(fields.get("expert_weights_norm", True))
        return config | {"num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": norm}
    if fields.size("expert_feed_forward_length", fields.size("feed_forward_length")) != fields.size(
        "feed_forward_length"
    ):
        raise fields.refuse("experts of another width than feed_forward_length are not computed here")
    return config | {"num_local_experts": experts}


def _deepseek2(fields: _Fields) -> dict[str, Any]:
    rope_dim = fields.size("rope.dimension_count")
    if fields.get("expert_gating_func") != 2:
        raise fields.refuse("its router is not DeepSeek-V3's: expert_gating_func is not 2 (sigmoid)")
    config: dict[str, Any] = {
        "intermediate_size": fields.size("feed_forward_length"),
        "moe_intermediate_size": fields.size("expert_feed_forward_length"),
        "first_k_dense_replace": fields.size("leading_dense_block_count", 0),
        "n_routed_experts": fields.size("expert_count"),
        "num_experts_per_tok": fields.size("expert_used_count"),
        "n_shared_experts": fields.size("expert_shared_count", 0),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", False)),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": fields.get("attention.q_lora_rank"),
        "kv_lora_rank": fields.size("attention.kv_lora_rank"),
        "qk_nope_head_dim": fields.size("attention.key_length_mla", fields.get("attention.key_length")) - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": fields.size("attention.value_length_mla", fields.get("attention.value_length")),
    }
    if fields.get("expert_group_count") is None and not _is_kimi(fields):
        raise fields.refuse("field deepseek2.expert_group_count is missing: older files do not say how experts group")
    config["n_group"] = fields.size("expert_group_count", 1)
    config["topk_group"] = fields.size("expert_group_used_count", 1)
    return config


def _is_kimi(fields: _Fields) -> bool:
    """Return whether the tokenizer is that of the Kimi family, none of which groups its experts."""
    return fields.file.fields.get("tokenizer.ggml.pre") == "kimi-k2"


def _rope_scaling(fields: _Fields) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in fields.file.tensors:
        if kind != "none":
            raise fields.refuse(f'rope scaling "{kind}" together with rope_freqs.weight is not computed here')
        return _llama3_scaling(fields)
    if kind == "none" or (kind == "linear" and fields.number("rope.scaling.factor", 1.0) in (0.0, 1.0)):
        return None
    factor = fields.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise fields.refuse(f'rope scaling "{kind}" is not computed here')
    original = fields.size("rope.scaling.original_context_length")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key in ("beta_fast", "beta_slow"):
        if fields.get(f"rope.scaling.yarn_{key}") is not None:
            scaling[key] = fields.number(f"rope.scaling.yarn_{key}")
    if fields.arch == "gpt-oss":
        scaling["truncate"] = False  # of every release; llama.cpp has no field for it
    if fields.arch == "deepseek2":
        if _is_kimi(fields) and len(scaling) < 5:
            raise fields.refuse("yarn_beta_fast and yarn_beta_slow are missing, and differ among Kimi-K2 releases")
        mscale = round(10 * fields.number("rope.scaling.yarn_log_multiplier"), 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _llama3_scaling(fields: _Fields) -> dict[str, Any]:
    """Return the llama3 scaling whose divisors `rope_freqs.weight` holds.

    They depend on the original context over low_freq_factor, and on high over low, alone. Low is 1 in every release,
    high a small whole number and the context a power of two, so few sets are possible. One is taken only if it gives
    the tensor's every value; two that do compute the same.
    """
    divisors = fields.file.read("rope_freqs.weight").flatten()
    dim = 2 * divisors.numel()
    freqs = fields.number("rope.freq_base", 10000.0) ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factor = round(float(divisors.max()), 4)
    for high in (4.0, 2.0, 8.0, 16.0, 32.0):
        for original in (8192, *(2**power for power in range(4, 21))):
            if torch.allclose(_divisors(freqs, factor, high, original), divisors.double(), rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    raise fields.refuse("rope_freqs.weight is no llama3 rope scaling that is known here")


def _divisors(freqs: Tensor, factor: float, high: float, original: int) -> Tensor:
    """Return what llama3 scaling divides each frequency by, with a low_freq_factor of 1."""
    turns = original * freqs / (2 * math.pi)
    smooth = (turns - 1) / (high - 1)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(turns > high, 1.0, torch.where(turns < 1, factor, blended))
