"""Tiny random checkpoints of every family in the Hugging Face layout, with a byte tokenizer: real files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2model.config import ModelConfig
from k2model.formats.compressed_tensors import pack_int4, quantization_config
from k2model.formats.export import hub_name
from k2model.parameters import Parameter, parameters

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 257,
}

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 1}
_LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": False},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "partial_rotary_factor": 1.0,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {**_YARN, "truncate": False},
        "tie_word_embeddings": False,
    },
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "kimi_k2": {**_LATENT, "n_group": 1, "topk_group": 1},
}
"""What each family's tiny config.json has of its own."""


def config_json(family: str = "llama", **options: Any) -> dict[str, Any]:
    """Return a tiny config.json of `family`; `options` replace its keys."""
    return {**CONFIG, **FAMILIES[family], "model_type": family, **options}


def write_checkpoint(folder: Path, seed: int = 0, outlier: float = 1.0, family: str = "llama", **options: Any) -> Path:
    """Write a checkpoint into `folder` and return it; `outlier` scales one channel of every layer's norms."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = config_json(family, **options)
    tensors = random_tensors(raw, seed, outlier)
    save_file({hub_name(name, family): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder)
    return folder


def pack_experts(folder: Path, group_size: int = 32) -> Path:
    """Store the routed experts of a checkpoint as INT4, as Kimi-K2-Thinking does; return the folder."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        weight, linear = tensors.pop(name), name.removesuffix(".weight")
        grouped = weight.unflatten(1, (-1, group_size))
        scale = (grouped.abs().amax(dim=-1) / 7).bfloat16()
        int4 = torch.round(grouped / scale.float()[..., None]).clamp(-8, 7).flatten(1).to(torch.int8)
        tensors |= {f"{linear}.weight_packed": pack_int4(int4), f"{linear}.weight_scale": scale}
        tensors[f"{linear}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors")
    section = quantization_config(["re:.*\\.experts\\..*"], group_size, all_int4=True)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": section}))
    return folder


def random_tensors(raw: dict[str, Any], seed: int = 0, outlier: float = 1.0) -> dict[str, Tensor]:
    """Return weights for config.json `raw`, under the model's own names."""
    config = ModelConfig.from_dict(raw, "test")
    generator = torch.Generator().manual_seed(seed)
    stored = (p for p in parameters(config) if p.role != "head" or not config.tie_word_embeddings)
    return {parameter.name: _draw(parameter, generator, outlier) for parameter in stored}


def _draw(parameter: Parameter, generator: torch.Generator, outlier: float) -> Tensor:
    """Return values at which every part of a model of unit variance shows in its logits."""
    name, shape = parameter.name, parameter.shape
    if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")):
        norm = torch.ones(shape)
        norm[5] = 1.0 if name == "model.norm.weight" else outlier
        return norm
    values: Tensor = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 0.75 + values.sigmoid() / 2
    if parameter.role == "vector":
        return values * (1.0 if name.endswith("sinks") else 0.1)
    values *= (4 if parameter.role == "embedding" else 1) / shape[-1] ** 0.5
    return values


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: ids 0-255 are bytes, 256 to 258 control tokens."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": 256 + i, "content": text, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i, text in enumerate(control)
    ]  # fmt: skip
    model = {
        "type": "BPE",
        "vocab": {c: i for i, c in enumerate(alphabet)} | {t["content"]: t["id"] for t in added},
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
