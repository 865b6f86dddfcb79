"""Attention of a model that is trained, and the packing of its batches. Plain PyTorch.

In INT8 and float32 sums are in the engine's order (k2model/decoder/step.py). Rows are picked by index_select: the
gradient of x[index] adds up in the order its threads come.

Legend: T packed tokens, H heads, G key-value heads, B sequences of a group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from k2model.compress.examples import Batch, Forks
from k2model.config import AttentionConfig
from k2model.decoder.step import TILE, KeyValues, PrefillGroup, Span, Step
from kernels import cpu

_FEW = 12
"""Sequences whose attention is computed at once, where its order of sums is not the engine's."""

Tiles = list[tuple[Tensor, Tensor]]
"""Of each tile, the queries that count and the bias, as `cpu.tiled_attention` takes them."""


class _TiledAttention(torch.autograd.Function):
    """What `cpu.tiled_attention` computes; the gradient is that of torch's own operations in as many digits."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, stored: torch.dtype) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale, ctx.dtype = tiles, scale, cpu.product_dtype(stored)
        dtype = ctx.dtype
        k, v = (x.to(stored).to(dtype).contiguous() for x in (k, v))
        return cpu.tiled_attention(q.to(dtype).contiguous(), k, v, tiles, scale).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().to(ctx.dtype).requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            q, k, v = inputs
            y = _float_attended(q, k, v, ctx.tiles, ctx.scale)
        found = torch.autograd.grad(y, inputs, grads[0].to(ctx.dtype))
        return *(each.float() for each in found), None, None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, stored: torch.dtype) -> Tensor:
    """Return `cpu.tiled_attention` of float32 [tiles, B, H, TILE, D], [B, G, S, D] and [B, G, S, Dv]."""
    if q.device.type != "cpu" or q.dtype != torch.float32:  # torch's own operations come near enough
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
        scores = scores + functional.pad(bias.to(q.dtype), (end - bias.shape[-1], 0))[:, None, None]
        attended = torch.matmul(torch.softmax(scores, dim=-1), v[:count, :, None, :end]).flatten(1, 2)
        out.append(functional.pad(attended, (0, 0, 0, 0, 0, 0, 0, q.shape[1] - count)))
    return torch.stack(out)


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


class Group:
    """Sequences whose prompts begin in the same tile: where each of their tokens stands for attention."""

    def __init__(self, group: PrefillGroup, prefix: slice, num_tokens: int, device: torch.device) -> None:
        """Lay out `group`; `prefix` are the packed tokens that its sequences with a past begin with."""
        self._group, self._device, self._prefix = group, device, prefix
        self._few: tuple[list[tuple[Tensor, Tensor]], Tensor] | None = None
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
        """Return what `attend` does, in bfloat16: a few sequences at once, what they share never copied."""
        start, d = self._group.spans[0].start, config.head_dim
        if window is not None or any(span.start != start for span in self._group.spans):
            return self.attend(q.float(), kv.float(), config, window, torch.bfloat16).bfloat16()
        few_at_once, places = self._few_at_once(start)
        q, own_kv = q[self.tokens] * config.softmax_scale, kv[self.tokens]
        past = kv[self._prefix.start : self._prefix.start + start].transpose(0, 1)  # [G, start, 2 * head_dim]
        attended = [_few_attended(q, own_kv, past[..., :d], past[..., d:], few) for few in few_at_once]
        return torch.cat(attended).index_select(0, places)

    def _few_at_once(self, start: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return the sequences a few at a time, of like lengths: little is padded, and caches hold their scores.

        Of each few: the tokens that stand in its slots [few, own] and the bias [few, own, own]. Then where each token
        of the group stands in all of them.
        """
        if self._few is None:
            group = self._group
            sizes = torch.tensor([span.size for span in group.spans])
            firsts = sizes.cumsum(0) - sizes
            bias = self._own_bias(start, int(sizes.max()))
            found, places, end = [], torch.empty_like(group.owner), 0
            for few in sizes.argsort(stable=True).split(_FEW):
                own = int(sizes[few].max())
                slots = torch.arange(own).expand(len(few), own)
                tokens = firsts[few, None] + slots.minimum(sizes[few, None] - 1)  # behind its last token, that again
                stands = slots < sizes[few, None]
                places[tokens[stands]] = torch.arange(end, end + stands.numel()).view_as(stands)[stands]
                end += stands.numel()
                found.append((tokens.to(self._device), bias[few, :own, :own].to(self._device)))
            self._few = found, places.to(self._device)
        return self._few

    def _own_bias(self, start: int, own: int) -> Tensor:
        """Return what is added to the scores of `own` places of each sequence behind `start` [B, own, own] bfloat16."""
        group = self._group
        bias = torch.full((len(group.spans), group.num_slots, group.capacity), float("-inf"))
        for index, tile in enumerate(group.tiles(None)):
            end, width = (group.first_tile + index + 1) * TILE, tile.bias.shape[-1]
            query, count = slice(index * TILE, (index + 1) * TILE), len(tile.rows)
            bias[:count, query, : end - width] = 0.0
            bias[:count, query, end - width : end] = tile.bias
            bias[count:, query] = 0.0  # nothing stands there
        first = start - group.first_tile * TILE
        return bias[:, first : first + own, start : start + own].bfloat16()

    def _tiles_of(self, window: int | None) -> Tiles:
        if window not in self._tiles:
            tiles = self._group.tiles(window)
            self._tiles[window] = [(tile.rows, tile.bias.to(self._device)) for tile in tiles]
        return self._tiles[window]


def _few_attended(q: Tensor, kv: Tensor, past_k: Tensor, past_v: Tensor, few: tuple[Tensor, Tensor]) -> Tensor:
    """Return the attention of a few sequences [few * own, H * head_dim], of scaled queries, all bfloat16.

    Args:
        q: [tokens, H, head_dim].
        kv: [tokens, G, 2 * head_dim].
        past_k: [G, start, head_dim], what all of them read.
        past_v: as `past_k`.
        few: as `Group._few_at_once` has them.
    """
    (tokens, bias), (groups, start, d) = few, past_k.shape
    batch, own = tokens.shape
    queries, keys = (x.index_select(0, tokens.flatten()).view(batch, own, groups, -1, x.shape[2]) for x in (q, kv))
    queries = queries.permute(2, 0, 3, 1, 4).reshape(groups * batch, -1, d)  # [G * few, H / G * own, head_dim]
    own_k, own_v = keys.permute(2, 0, 3, 1, 4).reshape(groups * batch, own, -1).split(d, dim=-1)
    of_own = torch.bmm(queries, own_k.transpose(1, 2)).view(groups, batch, -1, own, own) + bias[:, None]
    of_past = torch.bmm(queries.view(groups, -1, d), past_k.transpose(1, 2))
    scores = torch.cat([of_past.view(*queries.shape[:2], start), of_own.view(*queries.shape[:2], own)], dim=-1)
    of_past, of_own = torch.softmax(scores, dim=-1).split([start, own], dim=-1)
    out = torch.bmm(of_own, own_v)
    if start:
        out = out + torch.bmm(of_past.reshape(groups, -1, start), past_v).view_as(out)
    return out.view(groups, batch, -1, own, d).permute(1, 3, 0, 2, 4).reshape(batch * own, -1)


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
