"""Grouped-query attention: with or without biases, norms of query and key, sinks.

Legend: T tokens of the step, D hidden_size, H heads, G key-value heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.linear import Linear, LinearReader, Quantized
from k2model.decoder.paged import PagedStep
from k2model.decoder.step import Step
from kernels import cpu, ops


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
    ) -> Tensor:
        """Return [T, D] float32 for normed `x` [T, D]; stores keys and values where the step keeps them."""
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = self.qkv_proj(x).view(-1, heads + 2 * kv_heads, head_dim)
        rotated = cpu.apply_rope(self._normed(qkv[:, : heads + kv_heads]), *rope)
        q = rotated[:, :heads]
        kv = cpu.rounded(torch.cat([rotated[:, heads:], qkv[:, heads + kv_heads :]], dim=-1), kv_dtype)
        if isinstance(step, PagedStep):
            return self.o_proj(step.attend(q, kv, self.layer, window, config.softmax_scale, self.sinks))
        out = torch.empty(qkv.shape[0], heads * head_dim)
        for group in step.prefill:
            own = kv[group.tokens]
            keys_values = group.workspace(kv_heads, 2 * head_dim)
            for past, run in group.shared_past():
                keys_values[run, :, past.start : past.end] = past.layers[self.layer].float()
            keys_values[group.owner, :, group.slots] = own.float()
            group.keep(own, self.layer)
            k, v = keys_values.split(head_dim, dim=-1)
            tiles = [(tile.count, tile.bias) for tile in group.tiles(window)]
            attended = cpu.tiled_attention(group.spread(q[group.tokens]), k, v, tiles, config.softmax_scale, self.sinks)
            out[group.tokens] = group.collect(attended)
        for decoding in step.decode:
            k, v = decoding.append(kv[decoding.tokens], self.layer).float().split(head_dim, dim=-1)
            own_q = q[decoding.tokens, :, None]
            attended = cpu.attention(own_q, k, v, decoding.bias(window), config.softmax_scale, self.sinks)
            out[decoding.tokens] = attended.flatten(1)
        return self.o_proj(out)

    def _normed(self, qk: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        heads = self.config.num_attention_heads
        q, k = ops.rms_norm(qk[:, :heads], self.q_norm, self.eps), ops.rms_norm(qk[:, heads:], self.k_norm, self.eps)
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
