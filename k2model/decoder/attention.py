"""Grouped-query attention: with or without biases, norms of query and key, sinks.

Legend: T tokens of the step, D hidden_size, H heads, G key-value heads, B sequences of a group, L their tokens in this
step, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.linear import Linear, LinearReader, Quantized
from k2model.decoder.step import Group, with_past
from kernels import cpu


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one layer."""

    config: AttentionConfig
    layer: int
    qkv_proj: Linear
    o_proj: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks: Tensor | None
    eps: float

    @property
    def first(self) -> Linear:
        """The layer that takes the input."""
        return self.qkv_proj

    def forward(
        self,
        x: Tensor | Quantized,
        rope: tuple[Tensor, Tensor],
        groups: list[Group],
        visible: list[Tensor],
        kv_dtype: torch.dtype,
    ) -> Tensor:
        """Return [T, D] float32 for normed `x` [T, D]; appends to each group's cache."""
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = self.qkv_proj(x).view(-1, heads + 2 * kv_heads, head_dim)
        rotated = cpu.apply_rope(self._normed(qkv[:, : heads + kv_heads]), *rope)
        out = torch.empty(qkv.shape[0], heads, head_dim)
        start = 0
        for group, mask in zip(groups, visible, strict=True):
            tokens = slice(start, start + group.count * group.length)
            shape = (group.count, group.length, -1, head_dim)
            q = rotated[tokens, :heads].view(shape).transpose(1, 2)
            k = rotated[tokens, heads:].view(shape).transpose(1, 2)
            v = qkv[tokens, heads + kv_heads :].view(shape).transpose(1, 2)
            kv = with_past(torch.cat([k, v], dim=-1).to(kv_dtype), group, self.layer)
            attended = cpu.attention(q, kv[..., :head_dim], kv[..., head_dim:], mask, config.softmax_scale, self.sinks)
            out[tokens] = attended.transpose(1, 2).reshape(-1, heads, head_dim)
            start = tokens.stop
        return self.o_proj(out.view(-1, heads * head_dim))

    def _normed(self, qk: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        heads = self.config.num_attention_heads
        q, k = cpu.rms_norm(qk[:, :heads], self.q_norm, self.eps), cpu.rms_norm(qk[:, heads:], self.k_norm, self.eps)
        return torch.cat([q, k], dim=1)


def read_attention(config: ModelConfig, index: int, reader: LinearReader) -> Attention:
    """Return the grouped-query attention of layer `index`. Raises: CheckpointError."""
    attention, d, name = config.attention, config.hidden_size, f"model.layers.{index}.self_attn"
    assert isinstance(attention, AttentionConfig)
    head_dim = attention.head_dim
    q, kv = attention.num_attention_heads * head_dim, attention.num_key_value_heads * head_dim
    vector = reader.weights.vector
    norms = [vector(f"{name}.{which}_norm.weight", head_dim) if attention.qk_norm else None for which in "qk"]
    return Attention(
        config=attention,
        layer=index,
        qkv_proj=reader.read(
            [(f"{name}.{which}_proj", n) for which, n in (("q", q), ("k", kv), ("v", kv))], d, bias=attention.qkv_bias
        ),
        o_proj=reader.read([(f"{name}.o_proj", d)], q, bias=attention.o_bias),
        q_norm=norms[0],
        k_norm=norms[1],
        sinks=vector(f"{name}.sinks", attention.num_attention_heads) if attention.sinks else None,
        eps=config.rms_norm_eps,
    )
