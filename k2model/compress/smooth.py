"""Outliers balanced between activations and weights, at no cost when the model runs.

After SmoothQuant (arXiv 2211.10438): a channel whose activations are strong is divided by s and its weight column
multiplied by s, with s = strength ** alpha / weight absmax ** (1 - alpha). Strength is the channel's root mean square
relative to its token (calibrate.py says why it is not the absmax). Every s folds into what produces the channel:

    q, k, v; or q_a and kv_a            input_layernorm
    q_b, kv_b                           q_a_layernorm, kv_a_layernorm
    o_proj                              v_proj rows, one s for all query heads that read one key-value head;
                                        or the rows of kv_b_proj that make values
    gate, up, of all experts; router    post_attention_layernorm
    down                                up_proj rows, of each expert its own

A fold that would touch a weight which stays as it is stored (INT4 kept, INT8 already) is left out.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2model.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from k2model.parameters import layer_parameters

ALPHA = 0.65
"""Share of the difficulty moved to the weights; the best of 0.5 to 0.85 (BENCHMARKS.md, `k2batch bench quality`)."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What a layer's tensors are multiplied by before they are quantized; the float model computes what it did."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    """Linear to [K]."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Linear to [N]; of its bias too."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Norm's weight to [D]."""

    def weight(self, linear: str, weight: Tensor) -> Tensor:
        """Return the weight [N, K] of `linear`, balanced."""
        if linear in self.columns:
            weight = weight * self.columns[linear]
        return weight * self.rows[linear][:, None] if linear in self.rows else weight

    def vector(self, name: str, vector: Tensor) -> Tensor:
        """Return the norm's weight or the bias `name`, balanced."""
        if name in self.vectors:
            return vector * self.vectors[name]
        linear = name.removesuffix(".bias")
        return vector * self.rows[linear] if name.endswith(".bias") and linear in self.rows else vector


def balance(
    config: ModelConfig,
    index: int,
    strengths: Mapping[str, Tensor],
    reaches: Mapping[str, Tensor],
    kept: Set[str],
    alpha: float = ALPHA,
) -> Balance:
    """Return the balance of layer `index`.

    Args:
        config: the model's sizes.
        index: of the layer.
        strengths: linear to the strength of every input channel [K]; 0 where a channel, or the linear, was never used.
        reaches: linear to the largest |weight| of every column [K].
        kept: linears that stay as they are stored.
        alpha: share of the difficulty moved to the weights, 0 (none) to 1 (all).
    """
    made, layer = Balance(), f"model.layers.{index}"
    linears = [p.name.removesuffix(".weight") for p in layer_parameters(config, index) if p.is_linear]

    def after_norm(norm: str, consumers: list[str]) -> None:
        if not kept.isdisjoint(consumers):
            return
        reach = torch.stack([reaches[name] for name in consumers]).amax(dim=0)
        s = _factors(strengths[consumers[0]], reach, alpha)
        made.vectors[f"{norm}.weight"] = 1 / s
        made.columns.update(dict.fromkeys(consumers, s))

    attention = config.attention
    if isinstance(attention, LatentAttentionConfig):
        first = "q_proj" if attention.q_lora_rank is None else "q_a_proj"
        names = [f"{layer}.self_attn.{name}" for name in (first, "kv_a_proj_with_mqa")]
        after_norm(f"{layer}.input_layernorm", names)
        for which in ("kv",) if attention.q_lora_rank is None else ("q", "kv"):
            after_norm(f"{layer}.self_attn.{which}_a_layernorm", [f"{layer}.self_attn.{which}_b_proj"])
    else:
        after_norm(f"{layer}.input_layernorm", [f"{layer}.self_attn.{name}_proj" for name in "qkv"])
    _after_values(config, f"{layer}.self_attn", made, strengths, reaches, kept, alpha)
    inputs = [name for name in linears if ".mlp." in name and not name.endswith("down_proj")]
    after_norm(f"{layer}.post_attention_layernorm", inputs)
    if f"{layer}.post_attention_layernorm.weight" in made.vectors and config.is_moe[index]:
        made.columns[f"{layer}.mlp.gate"] = made.columns[inputs[0]]
    is_linear_in_up = not config.is_moe[index] or config.moe is None or config.moe.swiglu_limit is None
    for down in linears:
        up = down.removesuffix("down_proj") + "up_proj"
        if is_linear_in_up and down.endswith("down_proj") and not {up, down} & kept:
            s = _factors(strengths[down], reaches[down], alpha)
            made.rows[up], made.columns[down] = 1 / s, s
    return made


def _after_values(
    config: ModelConfig,
    name: str,
    made: Balance,
    strengths: Mapping[str, Tensor],
    reaches: Mapping[str, Tensor],
    kept: Set[str],
    alpha: float,
) -> None:
    """Add the fold of o_proj's input into what makes the values."""
    attention, o_proj = config.attention, f"{name}.o_proj"
    if isinstance(attention, AttentionConfig):
        if {o_proj, f"{name}.v_proj"} & kept:
            return
        shape = (attention.num_key_value_heads, -1, attention.head_dim)
        strength, reach = (x.view(shape).amax(dim=1).reshape(-1) for x in (strengths[o_proj], reaches[o_proj]))
        s = _factors(strength, reach, alpha)
        made.rows[f"{name}.v_proj"] = 1 / s
        shared = attention.num_attention_heads // attention.num_key_value_heads
        by_head = s.view(attention.num_key_value_heads, 1, attention.head_dim).expand(-1, shared, -1)
        made.columns[o_proj] = by_head.reshape(-1)
        return
    if {o_proj, f"{name}.kv_b_proj"} & kept:
        return
    s = _factors(strengths[o_proj], reaches[o_proj], alpha)
    heads, nope = attention.num_attention_heads, attention.qk_nope_head_dim
    rows = torch.ones(heads, nope + attention.v_head_dim)
    rows[:, nope:] = 1 / s.view(heads, attention.v_head_dim)
    made.rows[f"{name}.kv_b_proj"], made.columns[o_proj] = rows.reshape(-1), s


def _factors(strength: Tensor, reach: Tensor, alpha: float) -> Tensor:
    """Return s [K] for inputs of `strength` [K] into weights of `reach` [K]; 1 where a channel is never used."""
    s = strength.clamp_min(1e-5).pow(alpha) / reach.clamp_min(1e-5).pow(1 - alpha)
    return torch.where((strength == 0) | (reach == 0), torch.ones_like(s), s)
