"""Keys and values in pages, and steps that read them there: how a decoder on a card computes attention.

A sequence's pages stand in a table, slot 0 first. Whole pages of a beginning that others share are theirs too; the page
in which a sequence parts from them is copied. Every kernel reads keys from slot 0 on, in blocks of the same slots, so
that a token's bits are a function of its slot and its own sequence, as in k2model/decoder/step.py. Padding there is
for products of one shape; here kernels mask, so nothing is padded.

Legend: T tokens of the step, B sequences, H heads, G key-value heads, D head size, R rank + rope of latents.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from k2model.decoder.branches import Branches
from k2model.decoder.step import DECODE_TILE, DecodeGroup, KeyValues, Slots, Span, Step
from kernels import cpu

PAGE = 64
"""Slots of a page: what a kernel reads at once, at most. A sequence copies half of one and leaves half empty, on
average."""

_FIRST_PAGES = 64


class PagePool:
    """The pages of a decoder. They grow in number as they are needed, which moves them in memory."""

    def __init__(
        self, num_layers: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device, page: int = PAGE
    ) -> None:
        self.page = page
        self.device = device
        self.layers = [torch.zeros(0, kv_heads, page, width, dtype=dtype, device=device) for _ in range(num_layers)]
        """Per layer [pages, G, page, width]: keys and values side by side, or the latent and the rotated key."""
        self._num_pages = 0
        self._free: list[int] = []

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    @property
    def slot_bytes(self) -> int:
        """Bytes that one slot takes in all layers."""
        return sum(layer.element_size() * layer.shape[1] * layer.shape[3] for layer in self.layers)

    def take(self, count: int) -> list[int]:
        """Return `count` pages. Raises: torch.OutOfMemoryError."""
        if len(self._free) < count:
            try:
                self._grow(max(2 * self._num_pages, self._num_pages + count, _FIRST_PAGES))
            except torch.OutOfMemoryError:
                self._grow(self._num_pages + count)
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        """Take pages back; any thread may say so."""
        self._free.extend(pages)

    def _grow(self, num_pages: int) -> None:
        for index, layer in enumerate(self.layers):
            if len(layer) < num_pages:  # more, if memory was not enough for all layers before
                self.layers[index] = layer.new_zeros(num_pages, *layer.shape[1:])
                self.layers[index][: self._num_pages] = layer[: self._num_pages]
        self._free.extend(range(self._num_pages, num_pages))
        self._num_pages = num_pages


class Pages:
    """The pages of one sequence from slot 0 on: whole ones of its past, then its own, given back when it is dropped."""

    def __init__(self, pool: PagePool, past: "Pages | None" = None, num_past_slots: int = 0) -> None:
        self.pool = pool
        self.past = past  # not given back while this one reads them
        self.ids: list[int] = past.ids[: num_past_slots // pool.page] if past else []
        self._num_shared = len(self.ids)

    def reach(self, num_slots: int) -> None:
        """Have room for so many slots."""
        missing = -(-num_slots // self.pool.page) - len(self.ids)
        if missing > 0:
            self.ids = self.ids + self.pool.take(missing)

    def __del__(self) -> None:
        self.pool.give(self.ids[self._num_shared :])


@dataclass(slots=True, eq=False)
class PagedKeyValues(KeyValues):
    """Consecutive tokens in pages, which the step that computes them takes."""

    count: int = 0
    pages: Pages | None = None
    """Of all slots from 0 to `end`."""

    @property
    def end(self) -> int:
        """The slot behind the last token."""
        return self.start + self.count


@dataclass(slots=True)
class PagedSlots(Slots):
    """Sequences that decode, each of up to `tiles` tiles."""

    tiles: int = 0
    tables: list[Pages | None] = field(default_factory=list)

    @property
    def num_tiles(self) -> int:
        """Tiles of each sequence."""
        return self.tiles

    @property
    def num_rows(self) -> int:
        """Sequences there is room for."""
        return len(self.tables)

    def part(self, rows: range) -> "PagedSlots":
        """Return the sequences of `rows`."""
        return PagedSlots(self.layers, self.tiles, self.tables[rows.start : rows.stop])

    def fill(self, row: int, parts: Iterable[KeyValues]) -> None:
        """Let the sequence whose last tokens are the last of `parts` have `row`."""
        *_, last = parts
        assert isinstance(last, PagedKeyValues)
        self.tables[row] = self._reaching(last.pages)

    def take(self, row: int, other: Slots, other_row: int, num_filled: int) -> None:
        """Let `row` have the sequence that stands in `other_row` of `other`."""
        assert isinstance(other, PagedSlots)
        self.tables[row] = self._reaching(other.tables[other_row])

    def leave(self, row: int) -> None:
        """Let go of the sequence in `row`."""
        self.tables[row] = None

    def _reaching(self, pages: Pages | None) -> Pages:
        assert pages is not None
        pages.reach(self.tiles * DECODE_TILE)
        return pages


class PagedStep(Step):
    """One forward pass over pages: packed tokens in the order given, prompts first, then what decoding ones add."""

    def __init__(
        self, pool: PagePool, spans: Sequence[Span], decoding: Sequence[tuple[DecodeGroup, Sequence[int]]] = ()
    ) -> None:
        """Give every token a slot in a page, and copy the pages in which sequences part from what they share."""
        self.pool = pool
        self.order = [*range(len(spans))]
        self.prefill = []
        self.decode = [group for group, _ in decoding]
        self._spans = spans
        self._held = [self._pages(span) for span in spans]
        sizes = [span.size for span in spans]
        bounds = [0, *accumulate(sizes)]
        self.rows = [slice(start, start + size) for start, size in zip(bounds, sizes, strict=False)]
        ids, places, own_slots = _packed(spans)
        tables, lengths = [pages.ids for pages in self._held], [torch.empty(0, dtype=torch.int64)]
        offset = self.num_prompt_tokens = bounds[-1]
        for group, token_ids in decoding:
            assert isinstance(group.slots, PagedSlots)
            group.tokens = slice(offset, offset + len(token_ids))
            offset = group.tokens.stop
            ids += token_ids
            lengths.append(group.lengths)
            rows = range(len(token_ids)) if group.rows is None else group.rows.tolist()
            found = [group.slots.tables[row] for row in rows]
            tables += [pages.ids for pages in found if pages is not None]
        filled = torch.cat(lengths)
        slots, positions = torch.cat([*own_slots, filled]), torch.cat([*places, filled])
        table = _table(tables)
        owners = torch.arange(len(tables)).repeat_interleave(torch.tensor([*sizes, *[1] * len(filled)]).long())
        self.token_ids = torch.tensor(ids).to(pool.device)
        self.positions = positions.to(pool.device)
        self._pages_of_tokens = table[owners, slots // pool.page].long().to(pool.device)
        self._offsets = (slots % pool.page).to(pool.device)
        self._table = table.to(pool.device)
        self._cu_seqlens = self._int32(bounds)
        self._starts = self._int32([span.start for span in spans])
        self._ends = self._int32([span.end for span in spans])
        self._max_seqlen = max(sizes, default=0)
        self._found_trees: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._lens = (filled + 1).to(torch.int32).to(pool.device)
        self._copy_pages()

    def attend(
        self, q: Tensor, kept: Tensor, layer: int, window: int | None, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Store keys and values; return each query's attention [T, H * D] float32.

        Args:
            q: [T, H, D] float32; rounded to the dtype of keys, which the kernels multiply it with.
            kept: [T, G, 2 D], keys and values side by side.
            layer: the layer's number.
            window: how many positions a query sees.
            scale: multiplies the scores.
            sinks: [H], one more score per head.
        """
        from kernels.paged_attention import paged_decode

        k, v = self.store(kept, layer).chunk(2, dim=-1)
        q = cpu.rounded(q, k.dtype)
        prompts, batch = self.num_prompt_tokens, len(self._spans)
        out = [self.prefilled(q[:prompts], k, v, self._table[:batch], window, scale, sinks)] if batch else []
        if len(self._lens):
            table = self._table[batch:]
            out.append(paged_decode(q[prompts:], k, v, table, self._lens, scale, window=window, sinks=sinks))
        return torch.cat(out).float().flatten(1)

    def store(self, kept: Tensor, layer: int) -> Tensor:
        """Store what is kept of the step's tokens [T, G, width] in layer `layer`, and return the layer's pages."""
        pages = self.pool.layers[layer]
        pages[self._pages_of_tokens, :, self._offsets] = kept
        return pages

    def prefilled(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: int | None, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Return attention of the prompts' queries [P, H, D] over k and v [pages, G, page, *], found by `table`."""
        from kernels.paged_prefill import Trees, paged_prefill

        of, visible = self._trees(window)
        return paged_prefill(
            q, k, v, table, self._cu_seqlens, self._starts, self._max_seqlen, scale, window=window, sinks=sinks,
            ends=self._ends, trees=Trees(of, self._positions32, visible),
        )  # fmt: skip

    @functools.cached_property
    def prompt_pages(self) -> tuple[Tensor, Tensor]:
        """The pages that prompts read [n] int64, each once, and where each stands among them [B, width] int32."""
        used, places = _table([pages.ids for pages in self._held]).unique(return_inverse=True)
        return used.long().to(self.pool.device), places.to(torch.int32).to(self.pool.device)

    def latent_decode(self, q: Tensor, latents: Tensor, scale: float, rank: int) -> Tensor:
        """Return attention of decoding queries [N, H, R] over latents [pages, 1, page, R], as [N, H, rank] float32."""
        from kernels.mla import mla_decode

        q, table = cpu.rounded(q, latents.dtype), self._table[len(self._spans) :]
        return mla_decode(q, latents[:, 0], table, self._lens, scale, rank=rank).float()

    def _pages(self, span: Span) -> Pages:
        past = span.past[-1] if span.past else None
        assert past is None or isinstance(past, PagedKeyValues)
        pages = Pages(self.pool, past.pages if past else None, span.start)
        pages.reach(span.start + span.size)
        if span.keep is not None:
            assert isinstance(span.keep, PagedKeyValues)
            span.keep.pages = pages
        return pages

    def _copy_pages(self) -> None:
        """Copy the pages in which prompts begin but not at their start, from those they continue."""
        pairs = [
            (pages.past.ids[span.start // self.pool.page], pages.ids[span.start // self.pool.page])
            for span, pages in zip(self._spans, self._held, strict=True)
            if pages.past is not None and span.start % self.pool.page
        ]
        if pairs:
            source, target = torch.tensor(pairs).to(self.pool.device).unbind(1)
            for layer in self.pool.layers:
                layer[target] = layer[source]

    @functools.cached_property
    def _positions32(self) -> Tensor:
        return self.positions[: self.num_prompt_tokens].to(torch.int32)

    def _trees(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return each span's tree [B] int32, and the trees as kernels/paged_prefill.py reads them."""
        if window not in self._found_trees:
            keys = [(span.branches, span.end % 32 if span.branches.token_ids else 0) for span in self._spans]
            trees = {key: number for number, key in enumerate(dict.fromkeys(keys))}
            words = [_words(branches, shift, window) for branches, shift in trees]
            height, width = (max(tree.shape[axis] for tree in words) for axis in (0, 1))
            visible = torch.zeros(len(words), height, width, dtype=torch.int32)
            for tree, into in zip(words, visible, strict=True):
                into[: tree.shape[0], : tree.shape[1]] = tree
            self._found_trees[window] = self._int32([trees[key] for key in keys]), visible.to(self.pool.device)
        return self._found_trees[window]

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.pool.device)


def _packed(spans: Sequence[Span]) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Return the spans' token ids, and each one's positions and slots."""
    ids: list[int] = []
    positions, slots = [], []
    for span in spans:
        ids += [*span.token_ids, *span.branches.token_ids]
        own = torch.arange(span.start, span.start + span.size)
        slots.append(own)
        depths = torch.tensor(span.branches.depths, dtype=torch.int64)
        positions.append(torch.cat([own[: len(span.token_ids)], span.end + depths]))
    return ids, positions, slots


def _table(rows: Sequence[list[int]]) -> Tensor:
    """Return `rows` side by side [B, longest] int32; page 0 where one ends, which nothing reads."""
    width = max(map(len, rows), default=1)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32).view(-1, width)


@functools.lru_cache(maxsize=1024)
def _words(branches: Branches, shift: int, window: int | None) -> Tensor:
    """Return what `branches` see of each other, behind a prompt that ends `shift` slots behind a multiple of 32."""
    from kernels.paged_prefill import visible_words

    count = len(branches.token_ids)
    visible = torch.zeros(count, count, dtype=torch.bool)
    for branch, ancestors in enumerate(branches.ancestors):
        visible[branch, list(ancestors)] = True
    if window is not None:
        depths = torch.tensor(branches.depths)
        visible &= depths[:, None] - depths < window
    return visible_words(visible, shift) if count else torch.zeros(1, 1, dtype=torch.int32)
