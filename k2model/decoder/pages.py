"""Keys and values in pages: a sequence's stand in a table, slot 0 first.

Whole pages of a beginning that others share are theirs too; the page in which a sequence parts from them is copied.
What nobody reads after the step passes: in memory, one room serves all layers, one after the other, for those pages.

Legend: G key-value heads.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

PAGE = 64
"""Slots of a page: what a kernel reads at once, at most. A sequence copies half of one and leaves half empty, on
average."""

_FIRST_PAGES = 64


class PagePool:
    """The pages of a decoder. They grow in number as they are needed, which moves them in memory."""

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        page: int = PAGE,
        *,
        is_zeroed: bool = True,
    ) -> None:
        """Make a pool without pages.

        Args:
            num_layers: of the decoder.
            kv_heads: G.
            width: values of a slot and head.
            dtype: of these.
            device: where pages are.
            page: slots of each.
            is_zeroed: for kernels that multiply what nobody stored by 0; else memory is taken as pages are written.
        """
        self.page = page
        self.device = device
        self._is_zeroed = is_zeroed
        self.layers = [torch.zeros(0, kv_heads, page, width, dtype=dtype, device=device) for _ in range(num_layers)]
        """Per layer [pages, G, page, width]: keys and values side by side, or the latent and the rotated key."""
        self.passing = self.layers[0]
        """Pages that a layer leaves to the next one, numbered ~0, ~1, ... in tables; none on a card."""
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
            except RuntimeError:  # which torch.OutOfMemoryError is one of; in memory there is no such
                self._grow(self._num_pages + count)
        return [self._free.pop() for _ in range(count)]

    def pass_through(self, count: int) -> None:
        """Have so many passing pages; what they hold may be lost. Raises: torch.OutOfMemoryError."""
        if len(self.passing) < count:
            self.passing = self.passing.new_empty(count, *self.passing.shape[1:])

    def give(self, pages: list[int]) -> None:
        """Take pages back; any thread may say so."""
        self._free.extend(pages)

    def _grow(self, num_pages: int) -> None:
        for index, layer in enumerate(self.layers):
            if len(layer) < num_pages:  # more, if memory was not enough for all layers before
                make = layer.new_zeros if self._is_zeroed else layer.new_empty
                self.layers[index] = make(num_pages, *layer.shape[1:])
                self.layers[index][: self._num_pages] = layer[: self._num_pages]
        self._free.extend(range(self._num_pages, num_pages))
        self._num_pages = num_pages


class Pages:
    """The pages of one sequence from slot 0 on: whole ones of its past, then its own, given back when it is dropped."""

    def __init__(self, pool: PagePool, past: "Pages | None" = None, num_past_slots: int = 0) -> None:
        """Begin with those of `past` that its first `num_past_slots` fill."""
        self.pool = pool
        self.past = past  # not given back while this one reads them
        self.ids: list[int] = past.ids[: num_past_slots // pool.page] if past else []
        self._num_others = len(self.ids)

    def reach(self, num_slots: int) -> None:
        """Have room for so many slots."""
        missing = self._missing(num_slots)
        if missing > 0:
            self.ids = self.ids + self.pool.take(missing)

    def pass_through(self, num_slots: int, passing: Iterator[int]) -> None:
        """Have room for so many slots, in the next of the `passing` pages."""
        self.ids = self.ids + [~place for place in islice(passing, self._missing(num_slots))]
        self._num_others = len(self.ids)

    def _missing(self, num_slots: int) -> int:
        return -(-num_slots // self.pool.page) - len(self.ids)

    def __del__(self) -> None:
        self.pool.give(self.ids[self._num_others :])


def table_of(rows: Sequence[list[int]]) -> Tensor:
    """Return `rows` side by side [B, longest] int64; page 0 where one ends, which nothing reads."""
    width = max(map(len, rows), default=1)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).view(-1, width)
