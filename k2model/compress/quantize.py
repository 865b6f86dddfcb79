"""INT8 post-training quantization: outliers balanced between activations and weights, then one scale per channel.

After SmoothQuant (arXiv 2211.10438): a channel whose activations are strong is divided by s and its weight column
multiplied by s, with s = strength ** alpha / weight absmax ** (1 - alpha). Strength is the channel's root mean square
relative to its token (calibrate.py says why it is not the absmax). Every s of a Llama layer folds into what produces
the channel, so nothing is left to do at run time:

    q, k, v          input_layernorm                 gate, up    post_attention_layernorm
    o_proj           v_proj rows, one s for all query heads that read one key-value head
    down_proj        up_proj rows
"""

import torch
from torch import Tensor

from k2model.config import ModelConfig

ALPHA = 0.65
"""Share of the difficulty moved to the weights; the best of 0.5 to 0.85 (BENCHMARKS.md, `k2batch bench quality`)."""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` [N, K] as int8 and its scales [N, 1] float32: absmax / 127 per output channel."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight.float() / scale).clamp(-127, 127).to(torch.int8), scale


def smooth(
    tensors: dict[str, Tensor], strengths: list[dict[str, Tensor]], config: ModelConfig, alpha: float = ALPHA
) -> None:
    """Balance the outliers of every layer's linears, in place; the float model computes what it did.

    Args:
        tensors: float32 weights under their checkpoint names.
        strengths: per layer, the strength of every input channel, as `calibrate.channel_strength` returns.
        config: the model's sizes.
        alpha: share of the difficulty moved to the weights, 0 (none) to 1 (all).
    """
    for index, seen in enumerate(strengths):
        layer = f"model.layers.{index}."
        attention = [f"{layer}self_attn.{name}_proj.weight" for name in "qkv"]
        feed_forward = [f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up")]
        for norm, names, strength in (
            ("input_layernorm", attention, seen["qkv_proj"]),
            ("post_attention_layernorm", feed_forward, seen["gate_up_proj"]),
        ):
            s = _balance(strength, torch.cat([tensors[name] for name in names]), alpha)
            tensors[f"{layer}{norm}.weight"] /= s
            for name in names:
                tensors[name] *= s
        o_proj, v_proj = f"{layer}self_attn.o_proj.weight", f"{layer}self_attn.v_proj.weight"
        s_kv = _balance(_per_kv_head(seen["o_proj"], config), _per_kv_head_weight(tensors[o_proj], config), alpha)
        tensors[v_proj] /= s_kv[:, None]
        tensors[o_proj] *= _per_query_head(s_kv, config)
        up, down = f"{layer}mlp.up_proj.weight", f"{layer}mlp.down_proj.weight"
        s = _balance(seen["down_proj"], tensors[down], alpha)
        tensors[up] /= s[:, None]
        tensors[down] *= s


def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with every decoder linear as int8 `.weight` and float32 `.weight_scale` [N, 1]."""
    quantized = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            quantized[name], quantized[name.removesuffix("weight") + "weight_scale"] = quantize_weight(tensor)
        else:
            quantized[name] = tensor
    return quantized


def _balance(strength: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return s [K] for inputs of `strength` [K] into `weight` [N, K]; 1 where a channel is never used."""
    reach = weight.abs().amax(dim=0)
    s = strength.clamp_min(1e-5).pow(alpha) / reach.clamp_min(1e-5).pow(1 - alpha)
    return torch.where((strength == 0) | (reach == 0), torch.ones_like(s), s)


def _per_kv_head(x: Tensor, config: ModelConfig) -> Tensor:
    """Return the largest over query heads that share a key-value head: [H * head_dim] → [G * head_dim]."""
    shape = (config.num_key_value_heads, -1, config.head_dim)
    return x.view(shape).amax(dim=1).reshape(-1)


def _per_kv_head_weight(weight: Tensor, config: ModelConfig) -> Tensor:
    """Return [1, kv_heads * head_dim]: the column reach of o_proj [D, heads * head_dim], shared likewise."""
    return _per_kv_head(weight.abs().amax(dim=0), config)[None]


def _per_query_head(s: Tensor, config: ModelConfig) -> Tensor:
    """Return `s` [kv_heads * head_dim] repeated for every query head: [heads * head_dim]."""
    shared = config.num_attention_heads // config.num_key_value_heads
    return s.view(config.num_key_value_heads, 1, config.head_dim).expand(-1, shared, -1).reshape(-1)
