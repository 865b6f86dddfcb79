"""Multi-head latent attention, arXiv 2405.04434: the cache holds one latent and one rotated key per token.

Prefill expands latents into every head's keys and values; decoding absorbs the expansion into the query and the output
instead, and attends to the latents themselves, as one key-value head of width rank + rope.

Legend: T tokens of the step, D hidden_size, H heads, R kv_lora_rank, B sequences of a group, L their tokens in this
step, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.decoder.linear import Linear, LinearReader, Quantized, normed
from k2model.decoder.rope import deinterleaved
from k2model.decoder.step import Group, with_past
from kernels import cpu


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The attention of one layer."""

    config: LatentAttentionConfig
    layer: int
    qkv_a_proj: Linear
    """q_a_proj (or q_proj) and kv_a_proj_with_mqa: one product over the same input."""
    q_a_layernorm: Tensor | None
    q_b_proj: Linear | None
    kv_a_layernorm: Tensor
    kv_b_proj: Linear
    absorbed_k: Tensor
    """[H, nope, R] float32: the rows of kv_b_proj that make keys."""
    absorbed_v: Tensor
    """[H, R, v] float32: those that make values."""
    o_proj: Linear

    @property
    def first(self) -> Linear:
        """The layer that takes the input."""
        return self.qkv_a_proj

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
        nope, heads = config.qk_nope_head_dim, config.num_attention_heads
        q, latent, k_rope = self.qkv_a_proj(x).split(self._widths(), dim=-1)
        if self.q_b_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(normed(self.q_b_proj, q, self.q_a_layernorm, config.latent_norm_eps))
        q = q.reshape(-1, heads, nope + config.qk_rope_head_dim)
        q = torch.cat([q[..., :nope], cpu.apply_rope(q[..., nope:], *rope)], dim=-1)
        latent = cpu.rms_norm(latent, self.kv_a_layernorm, config.latent_norm_eps)
        kept = torch.cat([latent, cpu.apply_rope(k_rope[:, None], *rope)[:, 0]], dim=-1).to(kv_dtype)
        out = torch.empty(q.shape[0], heads * config.v_head_dim)
        start = 0
        for group, mask in zip(groups, visible, strict=True):
            tokens = slice(start, start + group.count * group.length)
            own_q = q[tokens].view(group.count, group.length, heads, -1).transpose(1, 2)
            own = kept[tokens].view(group.count, 1, group.length, -1)
            if group.is_decode:
                attended = self._absorbed(own_q, with_past(own, group, self.layer), mask)
            else:
                attended = self._expanded(own_q, own, group, mask)
            out[tokens] = attended.transpose(1, 2).reshape(-1, heads * config.v_head_dim)
            start = tokens.stop
        return self.o_proj(out)

    def _widths(self) -> list[int]:
        config = self.config
        q = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return [config.q_lora_rank or q, config.kv_lora_rank, config.qk_rope_head_dim]

    def _expanded(self, q: Tensor, own: Tensor, group: Group, visible: Tensor) -> Tensor:
        """Return [B, H, L, v] over keys and values of every head; a shared prefix is expanded once."""
        k, v = self._keys_values(own)
        if group.prefix is not None:
            past = self._keys_values(group.prefix.layers[self.layer][:, :, : group.prefix.length])
            k, v = (
                torch.cat([old.expand(group.count, -1, -1, -1), new], dim=2)
                for old, new in zip(past, (k, v), strict=True)
            )
        with_past(own, group, self.layer)
        return cpu.attention(q, k, v, visible, self.config.softmax_scale)

    def _keys_values(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [B, H, S, nope + rope] and values [B, H, S, v] of what is kept [B, 1, S, R + rope]."""
        config = self.config
        rank, nope, heads = config.kv_lora_rank, config.qk_nope_head_dim, config.num_attention_heads
        batch, _, keys, _ = kept.shape
        expanded = self.kv_b_proj(kept[..., :rank].reshape(-1, rank).float())
        expanded = expanded.view(batch, keys, heads, -1).transpose(1, 2).to(kept.dtype)
        k_rope = kept[..., rank:].expand(-1, heads, -1, -1)
        return torch.cat([expanded[..., :nope], k_rope], dim=-1), expanded[..., nope:]

    def _absorbed(self, q: Tensor, kept: Tensor, visible: Tensor) -> Tensor:
        """Return [B, H, 1, v] for queries [B, H, 1, nope + rope] over what is kept [B, 1, S, R + rope]."""
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        by_head = q[:, :, 0].transpose(0, 1)  # [H, B, nope + rope]
        latent_q = torch.cat([cpu.row_matmul(by_head[..., :nope], self.absorbed_k), by_head[..., nope:]], dim=-1)
        q = latent_q.transpose(0, 1)[:, :, None]
        out = cpu.attention(q, kept, kept[..., :rank], visible, self.config.softmax_scale)
        return cpu.row_matmul(out[:, :, 0].transpose(0, 1), self.absorbed_v).transpose(0, 1)[:, :, None]


def read_latent_attention(config: ModelConfig, index: int, reader: LinearReader) -> LatentAttention:
    """Return the latent attention of layer `index`. Raises: CheckpointError."""
    attention, d, name = config.attention, config.hidden_size, f"model.layers.{index}.self_attn"
    assert isinstance(attention, LatentAttentionConfig)
    heads, rank, rope = attention.num_attention_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
    nope, v = attention.qk_nope_head_dim, attention.v_head_dim
    q = heads * (nope + rope)
    halves = deinterleaved(rope) if config.rope.interleaved else torch.arange(rope)
    q_rows = (torch.arange(heads)[:, None] * (nope + rope) + torch.cat([torch.arange(nope), nope + halves])).view(-1)
    kv_rows = torch.cat([torch.arange(rank), rank + halves])
    q_rank = attention.q_lora_rank
    first = (f"{name}.q_a_proj", q_rank) if q_rank else (f"{name}.q_proj", q)
    first_rows = torch.arange(q_rank) if q_rank else q_rows
    kv_a_proj = (f"{name}.kv_a_proj_with_mqa", rank + rope)
    weights, kv_b_size = reader.weights, heads * (nope + v)
    expanded = weights.float_weight(f"{name}.kv_b_proj", kv_b_size, rank).float().view(heads, nope + v, rank)
    return LatentAttention(
        config=attention,
        layer=index,
        qkv_a_proj=reader.read(
            [first, kv_a_proj],
            d,
            bias=[attention.bias and q_rank is not None, attention.bias],
            rows=torch.cat([first_rows, first[1] + kv_rows]),
        ),
        q_a_layernorm=weights.vector(f"{name}.q_a_layernorm.weight", q_rank) if q_rank else None,
        q_b_proj=reader.read([(f"{name}.q_b_proj", q)], q_rank, rows=q_rows) if q_rank else None,
        kv_a_layernorm=weights.vector(f"{name}.kv_a_layernorm.weight", rank),
        kv_b_proj=reader.read([(f"{name}.kv_b_proj", kv_b_size)], rank),
        absorbed_k=expanded[:, :nope].contiguous(),
        absorbed_v=expanded[:, nope:].transpose(1, 2).contiguous(),
        o_proj=reader.read([(f"{name}.o_proj", d)], heads * v, bias=attention.bias),
    )
