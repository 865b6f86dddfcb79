"""The shape of a step: packed tokens, the sequences they belong to, and what earlier steps left of them.

A sequence's tokens stand in slots 0, 1, ...: its prompt, then either generated tokens or the branches of a candidate
tree. Attention reads keys in whole tiles of `TILE` slots, counted from slot 0, and computes queries tile by tile, so
that the order of every sum is a function of a token's slot alone: not of the batch, nor of what the sequence shares
with others, nor of the steps its prompt was cut into.

Legend: T tokens of the step, B sequences of a group, N tokens that a group of decoding ones adds, G key-value heads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2model.decoder.branches import Branches
from kernels import attention_rows, cpu

TILE = 64 if cpu.has_bfloat16_product() else 32
"""Slots of one product. SmolLM2, 14 prompts of 63 tokens behind 150, attention of a step: in bfloat16 by oneDNN 165 ms
with 16, 120 with 32, 80 with 64, 87 with 128 (two cores, Zen 5); in float32 0.75 s with 16, 0.92 with 32, 1.41 with 64,
1.74 with 128, and of one prompt of 1,500 tokens 1.86, 1.81, 1.89, 2.28 (one core, AVX2)."""

DECODE_TILE = 32
"""The same where one token is computed at a time: slots behind it are read for nothing."""

_NO_BRANCHES = Branches()


@dataclass(slots=True)
class KeyValues:
    """What attention keeps of consecutive tokens, read by one sequence or by all that begin alike."""

    layers: Tensor
    """[layers, 2, G, length, head_dim], keys and values; or [layers, 1, 1, length, width], latents and rotated keys."""
    start: int
    """The first token's slot."""

    @property
    def end(self) -> int:
        """The slot behind the last token."""
        return self.start + self.layers.shape[3]


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one sequence in a step, and what they read and leave."""

    token_ids: tuple[int, ...]
    past: tuple[KeyValues, ...] = ()
    """Of the tokens before, in order, from slot 0 on."""
    branches: Branches = _NO_BRANCHES
    keep: KeyValues | None = None
    """Where keys and values of `token_ids` are to stay; branches leave none."""

    @property
    def start(self) -> int:
        """The first token's slot."""
        return self.past[-1].end if self.past else 0

    @property
    def end(self) -> int:
        """The slot behind the prompt, where branches begin."""
        return self.start + len(self.token_ids)

    @property
    def size(self) -> int:
        """Tokens in this step."""
        return len(self.token_ids) + len(self.branches.token_ids)

    @property
    def tiles(self) -> tuple[int, int]:
        """The first and the last tile that hold its tokens."""
        return self.start // TILE, (self.start + self.size - 1) // TILE


@dataclass(slots=True)
class Tile:
    """The queries of one tile: those of the first sequences of a group."""

    rows: Tensor
    """[sequences, 2] int64: where each one's tokens begin and end in the tile."""
    bias: Tensor
    """[sequences or 1, TILE, W] float32: 0 or -inf, added to the scores of the last W keys; those before are all
    seen."""


class PrefillGroup:
    """Sequences whose prompts begin in the same tile, padded to whole tiles for attention alone."""

    def __init__(self, spans: Sequence[Span], offset: int) -> None:
        """Lay out `spans`, longest last tile first, whose packed tokens begin at `offset`."""
        self.spans = spans
        self.first_tile = spans[0].tiles[0]
        last = spans[0].tiles[1]
        self.capacity = (last + 1) * TILE
        """Key slots of each sequence."""
        self.num_slots = self.capacity - self.first_tile * TILE
        """Query slots of each sequence."""
        self.tokens = slice(offset, offset + sum(span.size for span in spans))
        self.owner = torch.tensor([b for b, span in enumerate(spans) for _ in range(span.size)])
        """Token to sequence."""
        self.slots = torch.cat([torch.arange(span.start, span.start + span.size) for span in spans])
        query_slots = self.slots - self.first_tile * TILE
        self.query_block = query_slots // TILE * len(spans) + self.owner
        """Token to its tile of its sequence, where queries stand: [tiles, B]."""
        self.query_slot = query_slots % TILE
        """Token to its slot there."""
        self._tiles: dict[int | None, list[Tile]] = {}
        self._rooms: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def tiles(self, window: int | None) -> list[Tile]:
        """Return the tiles from the first on, when a token sees no further back than `window` positions."""
        if window not in self._tiles:
            count = range(self.first_tile, self.capacity // TILE)
            self._tiles[window] = [_tile(self.spans, index, window) for index in count]
        return self._tiles[window]

    def spread_queries(self, x: Tensor, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return the first `heads` heads of `x` [T, *] float32 in their slots [tiles, B, heads, TILE, width].

        Slots without a token are zero.
        """
        out = self._room("queries", (self.num_slots // TILE, len(self.spans), heads, TILE, width), dtype)
        attention_rows.spread(x[self.tokens], 0, self.query_block, self.query_slot, out.flatten(0, 1))
        return out

    def spread_keys(self, x: Tensor, first: int, out: Tensor) -> None:
        """Write heads of `x` [T, *] float32, from column `first` on, in their slots of `out`, one of `keys_values`."""
        attention_rows.spread(x[self.tokens], first, self.owner, self.slots, out)

    def keys_values(self, heads: int, widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return room for every key and every value [B, heads, capacity, width], one for all layers; always finite."""
        shape = (len(self.spans), heads, self.capacity)
        return self._room("keys", (*shape, widths[0]), dtype), self._room("values", (*shape, widths[1]), dtype)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float,
        sinks: Tensor | None,
        out: Tensor,
        read: Tensor | None,
    ) -> None:
        """Write attention of `q`, of `spread_queries`, over `k` and `v`, of `keys_values`, into `out` [T, H * Dv].

        For tokens beside those that are `read` [N], places in the step, what is written is undefined; None for all.
        """
        tiles = [(tile.rows, tile.bias) for tile in self.tiles(window)]
        if read is not None:
            rows = self._rows_of(read)
            tiles = [(own[: len(every)], bias) for own, (every, bias) in zip(rows, tiles, strict=True)]
        attended = self._room("attended", (*q.shape[:4], v.shape[3]), q.dtype)
        cpu.tiled_attention(q, k, v, tiles, scale, sinks, attended)
        attention_rows.collect(attended.flatten(0, 1), self.query_block, self.query_slot, out[self.tokens])

    def _rows_of(self, read: Tensor) -> Tensor:
        """Return from where to where the tokens `read` stand in each tile of each sequence [tiles, B, 2]."""
        own = read[(read >= self.tokens.start) & (read < self.tokens.stop)] - self.tokens.start
        blocks, slots = self.query_block[own], self.query_slot[own]
        count = self.num_slots // TILE * len(self.spans)
        begins = torch.full((count,), TILE).scatter_reduce(0, blocks, slots, "amin")
        ends = torch.zeros(count, dtype=torch.int64).scatter_reduce(0, blocks, slots + 1, "amax")
        return torch.stack([begins.minimum(ends), ends], dim=1).view(-1, len(self.spans), 2)

    def _room(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros of that shape, or what a layer before left in them."""
        if (use, shape) not in self._rooms:
            self._rooms[use, shape] = torch.zeros(shape, dtype=dtype)
        return self._rooms[use, shape]

    def keep(self, kept: Tensor, layer: int) -> None:
        """Store what spans are to keep of `kept` [tokens, parts, G, width] in layer `layer`."""
        start = 0
        for span in self.spans:
            if span.keep is not None:
                span.keep.layers[layer].copy_(kept[start : start + len(span.token_ids)].permute(1, 2, 0, 3))
            start += span.size

    def shared_past(self) -> Iterable[tuple[KeyValues, slice]]:
        """Yield every `KeyValues` that sequences read, with the run of neighbours that read it."""
        depth = max(len(span.past) for span in self.spans)
        for level in range(depth):
            first = 0
            while first < len(self.spans):
                stop, past = first + 1, _past(self.spans[first], level)
                while stop < len(self.spans) and _past(self.spans[stop], level) is past:
                    stop += 1
                if past is not None:
                    yield past, slice(first, stop)
                first = stop


def _past(span: Span, level: int) -> KeyValues | None:
    return span.past[level] if level < len(span.past) else None


@dataclass(slots=True)
class Slots:
    """Keys and values of sequences that decode, each of up to the same whole number of tiles."""

    layers: Tensor
    """[layers, parts, rows, G, tiles * DECODE_TILE, width], parts as of `KeyValues`; sequences fill the first rows.
    What is behind their tokens is finite."""

    @property
    def num_tiles(self) -> int:
        """Tiles of each sequence."""
        return self.layers.shape[4] // DECODE_TILE

    @property
    def num_rows(self) -> int:
        """Sequences there is room for."""
        return self.layers.shape[2]

    def part(self, rows: range) -> "Slots":
        """Return a view of `rows`."""
        return Slots(self.layers[:, :, rows.start : rows.stop])

    def fill(self, row: int, parts: Iterable[KeyValues]) -> None:
        """Copy `parts`, in order from slot 0 on, into `row`."""
        end = 0
        for part in parts:
            end = part.end
            self.layers[:, :, row, :, part.start : end] = part.layers
        self.layers[:, :, row, :, end:] = 0

    def take(self, row: int, other: "Slots", other_row: int, num_filled: int) -> None:
        """Let `row` hold what fills `other_row` of `other`, which may have fewer tiles."""
        self.layers[:, :, row, :, :num_filled] = other.layers[:, :, other_row, :, :num_filled]
        self.layers[:, :, row, :, num_filled:] = 0

    def leave(self, row: int) -> None:
        """Say that `row` is not read any more."""


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of as many tiles that each add one token; or tokens that some of them add behind that one.

    Attention computes every token as a sequence of its own: its products have one shape, however many are added with
    it, so its bits are those it would have alone.
    """

    slots: Slots
    lengths: Tensor
    """[N] int64: filled slots before each new token, which is also its slot and its position."""
    rows: Tensor | None = None
    """[N] int64: the row of `slots` that each belongs to; None for one token of every row."""
    tokens: slice = field(default_factory=lambda: slice(0, 0))
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    def append(self, x: Tensor, columns: Sequence[int], layer: int) -> Tensor:
        """Store what is kept of each new token in layer `layer`; return what each sees [parts, N, G, slots, width].

        Args:
            x: [T, *] float32, rows of the whole step.
            columns: where each part's heads begin in a row.
            layer: the layer's number.
        """
        stored = self.slots.layers[layer]
        rows = torch.arange(len(self.lengths)) if self.rows is None else self.rows
        for part, first in zip(stored, columns, strict=True):
            attention_rows.spread(x[self.tokens], first, rows, self.lengths, part)
        return stored if self.rows is None else stored[:, self.rows]

    def bias(self, window: int | None) -> Tensor:
        """Return [N, 1, W] float32 for the last W keys, as `Tile.bias`."""
        if window not in self._biases:
            end = self.slots.num_tiles * DECODE_TILE
            keys = torch.arange(end - DECODE_TILE if window is None else 0, end)
            hidden = keys > self.lengths[:, None]
            if window is not None:
                hidden |= self.lengths[:, None] - keys >= window
            self._biases[window] = _bias(hidden)[:, None]
        return self._biases[window]


class Step:
    """One forward pass: packed tokens without padding, prompts first, then what decoding sequences add."""

    def __init__(self, spans: Sequence[Span], decoding: Sequence[tuple[DecodeGroup, Sequence[int]]] = ()) -> None:
        """Pack `spans` and the new tokens of `decoding` groups, each behind the group with the tokens before.

        Raises: ValueError if a decoding sequence's new token is not in the last tile of its group's slots.
        """
        self.order = sorted(
            range(len(spans)), key=lambda i: (spans[i].tiles[0], -spans[i].tiles[1], _identity(spans[i]))
        )
        """The spans in packed order."""
        ids: list[int] = []
        positions: list[int] = []
        offset = 0
        self.rows = [slice(0)] * len(spans)
        """Span to its packed tokens."""
        for index in self.order:
            span = spans[index]
            self.rows[index] = slice(offset, offset + span.size)
            ids += [*span.token_ids, *span.branches.token_ids]
            positions += [*range(span.start, span.end), *(span.end + depth for depth in span.branches.depths)]
            offset += span.size
        self.prefill = list(_groups([spans[index] for index in self.order]))
        self.decode = []
        for group, token_ids in decoding:
            # `bias` hides slots of the last tile alone.
            if (group.lengths // DECODE_TILE + 1 != group.slots.num_tiles).any():
                raise ValueError(
                    f"{group.slots.num_tiles=} is not what sequences of {group.lengths.tolist()} tokens fill"
                )
            group.tokens = slice(offset, offset + len(token_ids))
            offset = group.tokens.stop
            ids += token_ids
            positions += group.lengths.tolist()
            self.decode.append(group)
        self.token_ids = torch.tensor(ids)
        """[T] int64."""
        self.positions = torch.tensor(positions)
        """[T] int64."""

    def in_given_order(self, x: Tensor) -> Tensor:
        """Return `x` [T, *] with the spans' tokens as the spans were given, and nothing of what decodes."""
        return torch.cat([x[rows] for rows in self.rows])


def _identity(span: Span) -> tuple[int, ...]:
    """Return what brings sequences with the same past together."""
    return tuple(id(past) for past in span.past)


def _groups(spans: Sequence[Span]) -> Iterable[PrefillGroup]:
    """Cut sorted `spans` where the first tile changes, or where padding would double the longest one's slots."""
    begin = offset = 0
    for index in range(1, len(spans) + 1):
        head = spans[begin]
        if index < len(spans) and spans[index].tiles[0] == head.tiles[0]:
            longest, own = (span.tiles[1] - span.tiles[0] + 1 for span in (head, spans[index]))
            if longest <= max(2 * own, 4):
                continue
        group = PrefillGroup(spans[begin:index], offset)
        yield group
        begin, offset = index, group.tokens.stop


def _tile(spans: Sequence[Span], index: int, window: int | None) -> Tile:
    """Return tile `index` of `spans`, of which the first reach it."""
    members = [span for span in spans if span.tiles[1] >= index]
    begin = index * TILE
    rows = torch.tensor([[max(span.start - begin, 0), min(span.start + span.size - begin, TILE)] for span in members])
    branched = [b for b, span in enumerate(members) if span.branches.token_ids and span.end < begin + TILE]
    first_key = min([begin, *(members[b].end // TILE * TILE for b in branched)])
    if window is not None:
        first_key = 0
    queries, keys = torch.arange(begin, begin + TILE), torch.arange(first_key, begin + TILE)
    hidden = keys > queries[:, None]
    if window is None and not branched:
        return Tile(rows, _bias(hidden)[None])
    hidden = hidden.repeat(len(members), 1, 1)
    for b in branched:
        _hide_branches(hidden[b], members[b], index, first_key)
    if window is not None:
        for b, span in enumerate(members):
            places = torch.arange(begin + TILE)
            depths = span.branches.depths[: max(0, len(places) - span.end)]
            places[span.end : span.end + len(depths)] = span.end + torch.tensor(depths, dtype=torch.int64)
            hidden[b] |= places[queries, None] - places[keys] >= window
    # Slots that hold no token must see something where others compute them too (`Group.attend`): else they are NaN.
    hidden[torch.arange(len(members))[:, None], torch.arange(TILE), queries - first_key] = False
    return Tile(rows, _bias(hidden))


def _hide_branches(hidden: Tensor, span: Span, index: int, first_key: int) -> None:
    """Let each branch of `span` in the tile see its prompt and its ancestors, in `hidden` [TILE, keys]."""
    first = max(0, index * TILE - span.end)
    for branch, ancestors in enumerate(span.branches.ancestors[first : (index + 1) * TILE - span.end], first):
        row = hidden[span.end + branch - index * TILE]
        row[span.end - first_key :] = True
        row[[span.end + ancestor - first_key for ancestor in ancestors]] = False


def _bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
