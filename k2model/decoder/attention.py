"""Grouped-query attention: with or without biases, norms of query and key, sinks.

Legend: T tokens of the step, D hidden_size, H heads, G key-value heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.linear import Linear, LinearReader, Quantized, projected
from k2model.decoder.paged import PagedStep
from k2model.decoder.step import Step
from kernels import attention_rows, cpu, ops


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
        step: Step,
        window: int | None,
        kv_dtype: torch.dtype,
        read: Tensor | None = None,
    ) -> Tensor:
        """Return [T, D] float32 for normed `x` [T, D], or its rows `read`; stores keys and values where steps do."""
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = self.qkv_proj(x)
        by_head = qkv.view(len(qkv), -1, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            by_head[:, :heads] = ops.rms_norm(by_head[:, :heads], self.q_norm, self.eps)
            by_head[:, heads : heads + kv_heads] = ops.rms_norm(by_head[:, heads:-kv_heads], self.k_norm, self.eps)
        if isinstance(step, PagedStep):
            return projected(self.o_proj, self._paged(by_head, rope, step, window, kv_dtype), read)
        attention_rows.rotate_(qkv, *rope, heads + kv_heads)
        dtype, q_width, kv_width = cpu.product_dtype(kv_dtype), heads * head_dim, kv_heads * head_dim
        kept = qkv[:, q_width:].unflatten(1, (2, kv_heads, head_dim))
        if dtype != kv_dtype:
            kept.copy_(cpu.rounded(kept, kv_dtype))
        out = torch.empty(len(qkv), q_width)
        for group in step.prefill:
            k, v = group.keys_values(kv_heads, (head_dim, head_dim), dtype)
            for past, run in group.shared_past():
                k[run, :, past.start : past.end], v[run, :, past.start : past.end] = past.layers[self.layer]
            group.spread_keys(qkv, q_width, k)
            group.spread_keys(qkv, q_width + kv_width, v)
            group.keep(kept[group.tokens], self.layer)
            q = group.spread_queries(qkv, heads, head_dim, dtype)
            group.attend(q, k, v, window, config.softmax_scale, self.sinks, out, read)
        for decoding in step.decode:
            k, v = decoding.append(qkv, (q_width, q_width + kv_width), self.layer).to(dtype)
            q = by_head[decoding.tokens, :heads].to(dtype).contiguous()[:, :, None]
            attended = cpu.attention(q, k, v, decoding.bias(window), config.softmax_scale, self.sinks)
            out[decoding.tokens] = attended.flatten(1)
        return projected(self.o_proj, out, read)

    def _paged(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor], step: PagedStep, window: int | None, kv_dtype: torch.dtype
    ) -> Tensor:
        """Return [T, H * head_dim] of `qkv` [T, H + 2 G, head_dim] on a card."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        rotated = cpu.apply_rope(qkv[:, : heads + kv_heads], *rope)
        kv = cpu.rounded(torch.cat([rotated[:, heads:], qkv[:, heads + kv_heads :]], dim=-1), kv_dtype)
        return step.attend(rotated[:, :heads], kv, self.layer, window, self.config.softmax_scale, self.sinks)


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
