"""The layers of a model that is trained, and the packing of its batches. Plain PyTorch; names are the checkpoint's.

Sums are in the engine's order (k2model/decoder/step.py), so that with INT8 products a forward pass gives the bits that
the engine will give. Rows are picked by index_select: the gradient of x[index] adds up in the order its threads come.

Legend: T packed tokens, D hidden_size, H heads, G key-value heads, B sequences of a group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from k2model.compress.examples import Batch, Forks
from k2model.compress.quantize import quantize_weight
from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.step import TILE, KeyValues, PrefillGroup, Span, Step
from kernels import cpu, ops, rowwise

Product = Callable[[Tensor, Sequence[nn.Linear]], Tensor]
"""Returns x [T, K] times each of several linears that share it, outputs side by side [T, sum of N] float32."""

Tiles = list[tuple[Tensor, Tensor]]
"""Of each tile, the queries that count and the bias, as `cpu.tiled_attention` takes them."""


def float32_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Return the product in float32."""
    return functional.linear(x, *_joined(linears))


def bfloat16_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Return the product of bfloat16 values; weights stay float32 where they are learned."""
    weight, bias = _joined(linears)
    y = functional.linear(x.bfloat16(), weight.bfloat16()).float()
    return y if bias is None else y + bias


def int8_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Return the product as an INT8 checkpoint's engine computes it, to the bit; gradients pass the rounding."""
    return _applied(_Int8Product, x, *_joined(linears))


class _Int8Product(torch.autograd.Function):
    """W8A8 as k2model/decoder/linear.py; backward is that of the float product of the rounded values.

    Source: straight-through estimator, arXiv 1308.3432. Scales are absmax, so nothing is clipped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_int8, x_scale = ops.quantize_rows(x)
        weight_int8, weight_scale = quantize_weight(weight)
        ctx.save_for_backward(x_int8, x_scale, weight_int8, weight_scale)
        return ops.int8_linear(x_int8, x_scale, weight_int8, weight_scale.squeeze(1), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_int8, x_scale, weight_int8, weight_scale = ctx.saved_tensors
        (grad,) = grads
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ (weight_int8.float() * weight_scale) if needs_x else None,
            grad.t() @ (x_int8.float() * x_scale[:, None]) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


class _Bfloat16(torch.autograd.Function):
    """Values rounded to bfloat16, which an INT8 checkpoint's embeddings are; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _is_the_engines(x: Tensor) -> bool:
    """Return whether `x` is what kernels/rowwise.py computes: elsewhere torch's own operations come near enough."""
    return x.device.type == "cpu" and x.dtype == torch.float32


class _RmsNorm(torch.autograd.Function):
    """RMSNorm as the engine computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        if _is_the_engines(x):
            return rowwise.rms_norm(x, weight, eps)
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        share = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + ctx.eps)
        normed, grad = x * share, grads[0] * weight
        of_weight = (grads[0] * normed).flatten(0, -2).sum(dim=0)
        return (grad - normed * (grad * normed).mean(dim=-1, keepdim=True)) * share, of_weight, None


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up as the engine computes it, with what it takes in alone kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if _is_the_engines(gate_up):
            return rowwise.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        share = cpu.sigmoid(gate)
        silu = share * gate
        return torch.cat([grads[0] * up * (share + silu * (1 - share)), grads[0] * silu], dim=-1)


class _TiledAttention(torch.autograd.Function):
    """What `cpu.tiled_attention` computes; the gradient is that of float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, stored: torch.dtype) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale = tiles, scale
        dtype = cpu.product_dtype(stored)
        k, v = (x.to(stored).to(dtype).contiguous() for x in (k, v))
        return cpu.tiled_attention(q.to(dtype).contiguous(), k, v, tiles, scale).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            q, k, v = inputs
            y = _float_attended(q, k, v, ctx.tiles, ctx.scale)
        return *torch.autograd.grad(y, inputs, grads[0]), None, None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, stored: torch.dtype) -> Tensor:
    """Return `cpu.tiled_attention` of float32 [tiles, B, H, TILE, D], [B, G, S, D] and [B, G, S, Dv]."""
    if not _is_the_engines(q):
        return _float_attended(q, k, v, tiles, scale)
    y: Tensor = _TiledAttention.apply(q, k, v, tiles, scale, stored)  # type: ignore[no-untyped-call]
    return y


def _float_attended(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> Tensor:
    """Return the same by torch's own operations; zero where no sequence reaches."""
    out = []
    for index, (rows, bias) in enumerate(tiles):
        count, end = len(rows), k.shape[2] - (len(tiles) - 1 - index) * TILE
        own = q[index, :count].unflatten(1, (k.shape[1], -1))  # [count, G, H / G, TILE, D]
        scores = torch.matmul(own, k[:count, :, None, :end].transpose(-1, -2)) * scale
        scores = scores + functional.pad(bias, (end - bias.shape[-1], 0))[:, None, None]
        attended = torch.matmul(torch.softmax(scores, dim=-1), v[:count, :, None, :end]).flatten(1, 2)
        out.append(functional.pad(attended, (0, 0, 0, 0, 0, 0, 0, q.shape[1] - count)))
    return torch.stack(out)


def rows_of(table: Tensor, token_ids: Tensor, product: Product) -> Tensor:
    """Return rows [T, D] of an embedding, rounded as the checkpoint that `product` is for stores them."""
    rows = functional.embedding(token_ids, table)
    return _applied(_Bfloat16, rows) if product is int8_product else rows


def _applied(function: Any, *inputs: Tensor | float | None) -> Tensor:
    y: Tensor = function.apply(*inputs)
    return y


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


class Group:
    """Sequences whose prompts begin in the same tile: where each of their tokens stands for attention."""

    def __init__(self, group: PrefillGroup, prefix: slice, num_tokens: int, device: torch.device) -> None:
        """Lay out `group`; `prefix` are the packed tokens that its sequences with a past begin with."""
        self._group, self._device, self._prefix = group, device, prefix
        self._at_once: tuple[Tensor, Tensor, Tensor] | None = None
        self.tokens = group.tokens
        self._tiles: dict[int | None, Tiles] = {}
        query_rows = group.owner * group.num_slots + group.slots - group.first_tile * TILE
        self._query_rows = query_rows.to(device)
        queries = torch.full((len(group.spans) * group.num_slots,), len(group.owner))
        queries[query_rows] = torch.arange(len(group.owner))
        self._queries = queries.to(device)
        keys = torch.full((len(group.spans), group.capacity), num_tokens)
        for row, span in enumerate(group.spans):
            keys[row, : span.start] = torch.arange(prefix.start, prefix.start + span.start)
        keys[group.owner, group.slots] = torch.arange(group.tokens.start, group.tokens.stop)
        self._keys = keys.flatten().to(device)

    def attend(self, q: Tensor, kv: Tensor, config: AttentionConfig, window: int | None, stored: torch.dtype) -> Tensor:
        """Return [tokens of the group, H * head_dim] as the engine computes it of keys and values kept as `stored`.

        Args:
            q: [T, H, head_dim].
            kv: [T, G, 2 * head_dim].
            config: the layer's.
            window: how far back a token sees.
            stored: dtype of keys and values.
        """
        batch = len(self._group.spans)
        spread = _with_zero_row(q[self.tokens]).index_select(0, self._queries)
        keys_values = _with_zero_row(kv).index_select(0, self._keys).view(batch, self._group.capacity, *kv.shape[1:])
        k, v = keys_values.transpose(1, 2).split(config.head_dim, dim=-1)
        by_tile = spread.view(batch, -1, TILE, *q.shape[1:]).permute(1, 0, 3, 2, 4)  # [tiles, B, H, TILE, head_dim]
        attended = _attended(by_tile, k, v, self._tiles_of(window), config.softmax_scale, stored)
        return attended.permute(1, 0, 3, 2, 4).flatten(0, 2).index_select(0, self._query_rows).flatten(1)

    def attend_at_once(self, q: Tensor, kv: Tensor, config: AttentionConfig, window: int | None) -> Tensor:
        """Return what `attend` does to bfloat16's precision: all tiles at once, what is shared never copied."""
        start, batch, d = self._group.spans[0].start, len(self._group.spans), config.head_dim
        if window is not None or any(span.start != start for span in self._group.spans):
            return self.attend(q, kv, config, window, torch.bfloat16)
        groups, own = kv.shape[1], max(span.size for span in self._group.spans)
        size = q.shape[1] // groups * own  # queries of a sequence that read one key-value head
        place, rows, bias = self._own(start, own)
        queries, own_kv = (
            _with_zero_row(x[self.tokens].bfloat16()).index_select(0, place).view(batch, own, groups, -1, x.shape[2])
            for x in (q, kv)
        )
        queries = queries.permute(2, 0, 3, 1, 4).reshape(groups, -1, d)  # [G, B * H / G * own, head_dim]
        own_k, own_v = own_kv.permute(2, 0, 3, 1, 4).reshape(groups * batch, own, -1).split(d, dim=-1)
        past = kv[self._prefix.start : self._prefix.start + start].bfloat16().transpose(0, 1)
        past_k, past_v = past.split(d, dim=-1)  # [G, start, head_dim]
        of_own = torch.matmul(queries.view(groups * batch, size, d), own_k.transpose(1, 2))
        of_own = (of_own.view(groups, batch, -1, own, own) + bias[:, None]).view(groups * batch, size, own)
        of_past = torch.matmul(queries, past_k.transpose(1, 2)).view(groups * batch, size, start)
        scores = torch.cat([of_past, of_own], dim=-1).float() * config.softmax_scale
        of_past, of_own = torch.softmax(scores, dim=-1).bfloat16().split([start, own], dim=-1)
        out = torch.matmul(of_own, own_v)
        if start:
            out = out + torch.matmul(of_past.reshape(groups, -1, start), past_v).view_as(out)
        spread = out.view(groups, batch, -1, own, d).permute(1, 3, 0, 2, 4).reshape(batch * own, -1)
        return spread.index_select(0, rows).float()

    def _own(self, start: int, own: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for `own` places of each sequence behind `start`: what stands there, each token's place, the bias."""
        if self._at_once is None:
            group, batch = self._group, len(self._group.spans)
            rows = group.owner * own + group.slots - start
            place = torch.full((batch * own,), len(group.owner))
            place[rows] = torch.arange(len(group.owner))
            bias = torch.full((batch, group.num_slots, group.capacity), float("-inf"))
            for index, tile in enumerate(group.tiles(None)):
                end, width = (group.first_tile + index + 1) * TILE, tile.bias.shape[-1]
                query = slice(index * TILE, (index + 1) * TILE)
                count = len(tile.rows)
                bias[:count, query, : end - width] = 0.0
                bias[:count, query, end - width : end] = tile.bias
                bias[count:, query] = 0.0  # nothing stands there
            first = start - group.first_tile * TILE
            bias = bias[:, first : first + own, start : start + own].bfloat16()
            self._at_once = place.to(self._device), rows.to(self._device), bias.to(self._device)
        return self._at_once

    def _tiles_of(self, window: int | None) -> Tiles:
        if window not in self._tiles:
            tiles = self._group.tiles(window)
            self._tiles[window] = [(tile.rows, tile.bias.to(self._device)) for tile in tiles]
        return self._tiles[window]


class Packed:
    """A batch as one pass: the instructions once, then each example's own tokens and branches, without padding."""

    def __init__(self, batch: Batch, forks: Sequence[Forks], device: torch.device) -> None:
        """Pack `batch`, each example with the branches of its `forks`."""
        prefix = batch.prefix_ids
        past = (KeyValues(torch.empty(1, 1, 1, len(prefix), 0), 0),) if prefix else ()
        spans = [Span(prefix)] if prefix else []
        for example, asked in zip(batch.examples, forks, strict=True):
            spans.append(Span(example.prompt_ids[len(prefix) :], past, asked.branches))
        step = Step(spans)
        self.token_ids, self.positions = step.token_ids.to(device), step.positions.to(device)
        self.groups = [Group(group, step.rows[0], len(step.token_ids), device) for group in step.prefill]
        own = zip(step.rows[len(spans) - len(forks) :], spans[len(spans) - len(forks) :], strict=True)
        self.ends = torch.tensor([rows.start + len(span.token_ids) for rows, span in own])
        """[examples] the packed place behind each prompt, where its branches begin."""


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [*, size], normed."""
        return _applied(_RmsNorm, x, self.weight, self._eps)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: AttentionConfig, d: int, eps: float) -> None:
        super().__init__()
        self._config = config
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, d, bias=config.o_bias)
        self.q_norm = Norm(config.head_dim, eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, eps) if config.qk_norm else None

    def forward(
        self, h: Tensor, rope: tuple[Tensor, Tensor], packed: Packed, window: int | None, product: Product
    ) -> Tensor:
        """Return [T, D] for normed `h` [T, D]."""
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = product(h, [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = qkv.view(len(h), -1, config.head_dim).split([heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, kv = _rotated(q, *rope), torch.cat([_rotated(k, *rope), v], dim=-1)
        stored = torch.bfloat16 if product is int8_product else torch.float32
        attended = [
            group.attend_at_once(q, kv, config, window)
            if product is bfloat16_product
            else group.attend(q, kv, config, window, stored)
            for group in packed.groups
        ]
        return product(torch.cat(attended), [self.o_proj])


class FeedForward(nn.Module):
    """The gated feed-forward."""

    def __init__(self, d: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, h: Tensor, product: Product) -> Tensor:
        """Return [T, D] for normed `h` [T, D]."""
        return product(_applied(_Swiglu, product(h, [self.gate_proj, self.up_proj])), [self.down_proj])


class Layer(nn.Module):
    """Attention and feed-forward, pre-norm, with residuals."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.attention, AttentionConfig)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(d, eps)
        self.self_attn = Attention(config.attention, d, eps)
        self.post_attention_layernorm = Norm(d, eps)
        self.mlp = FeedForward(d, config.intermediate_size, config.mlp_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], packed: Packed, window: int | None, product: Product
    ) -> Tensor:
        """Return the layer's output [T, D] for `x` [T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, packed, window, product)
        hidden: Tensor = x + self.mlp(self.post_attention_layernorm(x), product)
        return hidden


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what cpu.apply_rope does, which writes in place and so has no gradient."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
