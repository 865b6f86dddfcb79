"""One Llama decoder layer, and the shape of a step.

Legend: T tokens of the step, D hidden_size, H heads, G key-value heads, B sequences of a group, L their tokens in this
step, P prefix tokens, S = P + cached + L keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import ModelConfig
from k2model.decoder.linear import Linear
from kernels import cpu


@dataclass(slots=True)
class KeyValues:
    """Keys and values of every layer for sequences of one length: the shared prefix, or a group that decodes."""

    keys: list[Tensor]
    """Per layer [B, G, capacity, head_dim]."""
    values: list[Tensor]
    length: int
    """Positions filled."""


@dataclass(slots=True)
class Group:
    """Sequences of one shape that stand back to back in a packed step, sequence by sequence."""

    count: int
    """B: sequences."""
    length: int
    """L: tokens of each in this step."""
    visible: Tensor
    """[L, S] bool: the keys each token sees."""
    prefix: KeyValues | None = None
    """Read before the group's own keys, the same for all its sequences."""
    cache: KeyValues | None = None
    """Keys of earlier steps; the step's own are appended. When there is one, it holds the prefix already."""


@dataclass(slots=True)
class Step:
    """One forward pass: packed tokens without padding."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and feed-forward, pre-norm, with residuals."""

    index: int
    input_layernorm: Tensor
    qkv_proj: Linear
    o_proj: Linear
    post_attention_layernorm: Tensor
    gate_up_proj: Linear
    down_proj: Linear

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], groups: list[Group], config: ModelConfig, kv_dtype: torch.dtype
    ) -> Tensor:
        """Return the layer's output [T, D] float32 for `x` [T, D]; appends to each group's cache."""
        h = cpu.rms_norm(x, self.input_layernorm, config.rms_norm_eps)
        x = x + self.o_proj(self._attend(self.qkv_proj(h), rope, groups, config, kv_dtype))
        h = cpu.rms_norm(x, self.post_attention_layernorm, config.rms_norm_eps)
        return x + self.down_proj(cpu.swiglu(self.gate_up_proj(h)))

    def _attend(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor], groups: list[Group], config: ModelConfig, kv_dtype: torch.dtype
    ) -> Tensor:
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = qkv.view(-1, heads + 2 * kv_heads, head_dim)
        rotated = cpu.apply_rope(qkv[:, : heads + kv_heads], *rope)
        out = torch.empty(qkv.shape[0], heads, head_dim)
        start = 0
        for group in groups:
            tokens = slice(start, start + group.count * group.length)
            shape = (group.count, group.length, -1, head_dim)
            q = rotated[tokens, :heads].view(shape).transpose(1, 2)
            k = rotated[tokens, heads:].view(shape).transpose(1, 2).to(kv_dtype)
            v = qkv[tokens, heads + kv_heads :].view(shape).transpose(1, 2).to(kv_dtype)
            k, v = self._with_past(k, v, group)
            attended = cpu.attention(q, k, v, group.visible, head_dim**-0.5)
            out[tokens] = attended.transpose(1, 2).reshape(-1, heads, head_dim)
            start = tokens.stop
        return out.view(-1, heads * head_dim)

    def _with_past(self, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Return `k` and `v` [B, G, L, head_dim] behind what the group's sequences already hold."""
        if group.prefix is not None:
            past = (group.prefix.keys[self.index], group.prefix.values[self.index])
            k, v = (
                torch.cat([p.expand(group.count, -1, -1, -1), new], dim=2) for p, new in zip(past, (k, v), strict=True)
            )
        if group.cache is None:
            return k, v
        keys, values = group.cache.keys[self.index], group.cache.values[self.index]
        end = group.cache.length + k.shape[2]
        keys[:, :, group.cache.length : end] = k
        values[:, :, group.cache.length : end] = v
        return keys[:, :, :end], values[:, :, :end]
