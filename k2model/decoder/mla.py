"""Multi-head latent attention, arXiv 2405.04434: the cache holds one latent and one rotated key per token.

Prefill expands latents into every head's keys and values; decoding absorbs the expansion into the query and the output
instead, and attends to the latents themselves, as one key-value head of width rank + rope. In memory a page holds a
latent twice, as the key and as the value that it is: products read them in different orders.

Legend: T tokens of the step, D hidden_size, H heads, R kv_lora_rank, B sequences of a group, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.decoder.card_step import CardStep
from k2model.decoder.linear import Linear, LinearReader, Quantized, normed, projected
from k2model.decoder.rope import deinterleaved
from k2model.decoder.step import Step
from kernels import cpu, cpu_attention, ops
from kernels.places import Places


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
        step: Step,
        window: int | None,
        kv_dtype: torch.dtype,
        read: Tensor | None = None,
    ) -> Tensor:
        """Return [T, D] float32 for normed `x` [T, D], or its rows `read`; stores latents and keys where steps do."""
        config = self.config
        nope, heads = config.qk_nope_head_dim, config.num_attention_heads
        q, latent, k_rope = self.qkv_a_proj(x).split(self._widths(), dim=-1)
        if self.q_b_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(normed(self.q_b_proj, q, self.q_a_layernorm, config.latent_norm_eps))
        q = q.reshape(-1, heads, nope + config.qk_rope_head_dim)
        q = torch.cat([q[..., :nope], cpu.apply_rope(q[..., nope:], *rope)], dim=-1)
        latent = ops.rms_norm(latent, self.kv_a_layernorm, config.latent_norm_eps)
        kept = cpu.rounded(torch.cat([latent, cpu.apply_rope(k_rope[:, None], *rope)[:, 0]], dim=-1), kv_dtype)
        if isinstance(step, CardStep):
            return projected(self.o_proj, self._on_card(q, kept, step), read)
        out = torch.empty(len(q), heads * config.v_head_dim)
        kept, pages, sizes = kept.float(), step.begun(self.layer), (kept.shape[1], config.kv_lora_rank)
        cpu_attention.store(kept, (0, 0), sizes, step.places, pages, step.pool.passing)
        prompts = step.num_prompt_tokens
        if prompts:
            self._expanded(q[:prompts], pages, step, window, out[:prompts], read)
        if prompts < len(q):
            self._absorbed(q[prompts:], pages, step, out[prompts:])
        return projected(self.o_proj, out, read)

    def _widths(self) -> list[int]:
        config = self.config
        q = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return [config.q_lora_rank or q, config.kv_lora_rank, config.qk_rope_head_dim]

    def _expanded(
        self, q: Tensor, pages: Tensor, step: Step, window: int | None, out: Tensor, read: Tensor | None
    ) -> None:
        """Write [P, H * v] over keys and values of every head into `out`; what prompts share is expanded once."""
        config = self.config
        heads, width = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        sizes = (width, config.v_head_dim)
        used, filled, places = step.prompt_pages
        own = cpu_attention.gathered(pages, step.pool.passing, used)
        latents = cpu_attention.stored_keys(own, config.kv_lora_rank + config.qk_rope_head_dim)
        latents[~filled.flatten()] = 0  # a slot behind an odd end is read with the one before, and weighs nothing
        k, v = self._keys_values(latents).split(sizes, dim=-1)
        k_v, at = torch.cat([k.flatten(1), v.flatten(1)], dim=1), (0, heads * width)
        of_heads = pages.new_zeros(len(used), heads, step.pool.page, sum(cpu_attention.page_sizes(*sizes)))
        cpu_attention.store(k_v, at, sizes, Places.of_pages(len(used), step.pool.page), of_heads)
        asked = None if read is None else read[read < len(q)]
        cpu_attention.attend(
            q.flatten(1), heads, of_heads, sizes, places, step.trees(window), config.softmax_scale, out,
            window=window, read=asked,
        )  # fmt: skip

    def _keys_values(self, kept: Tensor) -> Tensor:
        """Return keys and values of every head, side by side [S, H, nope + rope + v], of what is kept [S, R + rope]."""
        config = self.config
        rank, nope, heads = config.kv_lora_rank, config.qk_nope_head_dim, config.num_attention_heads
        kept = kept.float()
        expanded = self.kv_b_proj(kept[:, :rank]).view(len(kept), heads, -1)
        k_rope = kept[:, None, rank:].expand(-1, heads, -1)
        return torch.cat([expanded[..., :nope], k_rope, expanded[..., nope:]], dim=-1)

    def _absorbed(self, q: Tensor, pages: Tensor, step: Step, out: Tensor) -> None:
        """Write [N, H * v] for queries [N, H, nope + rope] of decoding tokens over the latents into `out`."""
        config = self.config
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        latent_q = self._latent_q(q).flatten(1)
        weighted = torch.empty(len(q), heads * rank)
        cpu_attention.attend(
            latent_q, heads, pages, (rank + config.qk_rope_head_dim, rank), step.decoding_places, step.trees(None),
            config.softmax_scale, weighted,
        )  # fmt: skip
        out.copy_(self._values(weighted.view(len(q), heads, rank)))

    def _latent_q(self, q: Tensor) -> Tensor:
        """Return queries [B, H, nope + rope] in the space of the latents [B, H, R + rope]."""
        nope = self.config.qk_nope_head_dim
        by_head = q.transpose(0, 1)
        latent_q = torch.cat([ops.row_matmul(by_head[..., :nope], self.absorbed_k), by_head[..., nope:]], dim=-1)
        return latent_q.transpose(0, 1)

    def _values(self, latents: Tensor) -> Tensor:
        """Return the values [B, H * v] of weighted latents [B, H, R]."""
        return ops.row_matmul(latents.transpose(0, 1), self.absorbed_v).transpose(0, 1).flatten(1)

    def _on_card(self, q: Tensor, kept: Tensor, step: CardStep) -> Tensor:
        """Return [T, H * v] over pages of latents; those that prompts read are expanded once, whoever shares them."""
        config, dtype = self.config, kept.dtype
        prompts, latents = step.num_prompt_tokens, step.store(kept[:, None], self.layer)
        out = []
        if prompts:
            pages, table = step.card_prompt_pages
            expanded = self._keys_values(latents[pages, 0].flatten(0, 1))
            keys_values = cpu.rounded(expanded, dtype).unflatten(0, (len(pages), -1)).transpose(1, 2)
            k, v = keys_values.split([q.shape[-1], config.v_head_dim], dim=-1)
            own = cpu.rounded(q[:prompts], dtype)
            out.append(step.prefilled(own, k, v, table, None, config.softmax_scale, None).float().flatten(1))
        if prompts < len(q):
            latent_q = self._latent_q(q[prompts:])
            attended = step.latent_decode(latent_q, latents, config.softmax_scale, config.kv_lora_rank)
            out.append(self._values(attended))
        return torch.cat(out)


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
