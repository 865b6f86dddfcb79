"""Grouped-query attention: with or without biases, norms of query and key, sinks.

Legend: T tokens of the step, D hidden_size, H heads, G key-value heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.card_step import CardStep
from k2model.decoder.linear import Linear, LinearReader, Quantized, projected
from k2model.decoder.step import Step
from kernels import cpu, cpu_attention, ops, rowwise


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
        if isinstance(step, CardStep):
            return projected(self.o_proj, self._on_card(by_head, rope, step, window, kv_dtype), read)
        rowwise.rotate_(qkv, *rope, heads + kv_heads)
        q_width, kv_width = heads * head_dim, kv_heads * head_dim
        pages, passing, sizes = step.begun(self.layer), step.pool.passing, (head_dim, head_dim)
        if kv_dtype != pages.dtype:
            qkv[:, q_width:] = cpu.rounded(qkv[:, q_width:], kv_dtype)
        cpu_attention.store(qkv, (q_width, q_width + kv_width), sizes, step.places, pages, passing)
        out = torch.empty(len(qkv), q_width)
        cpu_attention.attend(
            qkv, heads, pages, sizes, step.places, step.trees(window), config.softmax_scale, out,
            passing=passing, window=window, sinks=self.sinks, read=read,
        )  # fmt: skip
        return projected(self.o_proj, out, read)

    def _on_card(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor], step: CardStep, window: int | None, kv_dtype: torch.dtype
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
