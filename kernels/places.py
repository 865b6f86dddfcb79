"""Where tokens of a step stand in pages, and which queries are computed at once.

Legend: T tokens of a step, B sequences, N queries asked for, I items.
"""

import functools

import torch
from torch import Tensor

_QUERIES_AT_ONCE = 24
"""Rows, heads that share keys times tokens, that read a page while it is in the cache."""

_ALONE, BY_ITS_NEIGHBOUR = -1, -2


class Places:
    """Where tokens of a step stand: each in a slot of its sequence, whose pages stand in a table.

    Args:
        table: [B, most pages of one] int64, slot 0 first.
        owners: [T] int64, token to sequence. Those of one sequence stand side by side, in the order of their slots.
        slots: [T] int64.
        positions: [T] int64: the slot; of a branch, how far it is behind the prompt's start.
        ends: [B] int64: the slot behind the prompt, where branches begin.
        page: slots of a page.
    """

    def __init__(
        self, table: Tensor, owners: Tensor, slots: Tensor, positions: Tensor, ends: Tensor, page: int
    ) -> None:
        self.table, self.owners, self.slots, self.positions = table, owners, slots, positions
        self.ends, self.page = ends, page
        self.pages, self.offsets = table[owners, slots // page], slots % page
        """[T] int64, both: each token's page and its slot there."""
        self._items: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of_pages(cls, count: int, page: int) -> "Places":
        """Return where tokens stand that fill `count` pages, as one sequence."""
        slots, table = torch.arange(count * page), torch.arange(count)[None]
        return cls(table, torch.zeros_like(slots), slots, slots, torch.tensor([len(slots)]), page)

    @functools.cached_property
    def beside(self) -> Tensor:
        """[T] int64: the token in the next slot of the same pair, _ALONE, or BY_ITS_NEIGHBOUR for one that is it."""
        slots = self.pages * self.page + self.offsets
        ordered, order = slots.sort()
        follows = (ordered[1:] == ordered[:-1] + 1) & (ordered[:-1] % 2 == 0)
        beside = torch.full_like(slots, _ALONE)
        beside[order[:-1][follows]] = order[1:][follows]
        beside[order[1:][follows]] = BY_ITS_NEIGHBOUR
        return beside

    def items(self, share: int, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries of the tokens `read`, or of all, a few of one sequence at a time.

        That is: tokens [N], where each item's begin and the last one's end [I + 1], and sequences [I]. A thread takes
        neighbours, so each gets items of much work and of little.

        Args:
            share: heads that share keys.
            read: [N] int64.
        """
        if read is None and share in self._items:
            return self._items[share]
        tokens = torch.arange(len(self.slots)) if read is None else read.unique()
        owners, at_once = self.owners[tokens], max(1, _QUERIES_AT_ONCE // share)
        starts = torch.ones(len(tokens), dtype=torch.bool)
        starts[1:] = owners[1:] != owners[:-1]
        firsts = starts.nonzero()[:, 0]
        place = torch.arange(len(tokens)) - firsts[starts.cumsum(0) - 1]
        bounds = torch.cat([(place % at_once == 0).nonzero()[:, 0], torch.tensor([len(tokens)])])
        work = (self.slots[tokens[bounds[1:] - 1]] + 1) * (bounds[1:] - bounds[:-1])
        order = work.argsort(descending=True, stable=True)
        threads = torch.get_num_threads()
        order = torch.cat([order[thread::threads] for thread in range(threads)])
        sizes = (bounds[1:] - bounds[:-1])[order]
        begin = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        within = torch.arange(len(tokens)) - begin[:-1].repeat_interleave(sizes)
        made = tokens[bounds[:-1][order].repeat_interleave(sizes) + within], begin, owners[bounds[:-1][order]]
        if read is None:
            self._items[share] = made
        return made
