"""The shape of a step: packed tokens, the sequences they belong to, and what earlier steps left of them.

A sequence's tokens stand in slots 0, 1, ... of its pages: its prompt, then either generated tokens or the branches of a
candidate tree. Attention reads them from slot 0 on, in that order, so that a token's bits are a function of its
sequence and its slot alone: not of the batch, nor of what the sequence shares with others, nor of the steps its prompt
was cut into.

Legend: T tokens of the step, B sequences.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise

import torch
from torch import Tensor

from k2model.decoder.branches import Branches
from k2model.decoder.pages import PagePool, Pages, table_of
from kernels import cpu_attention
from kernels.places import Places

_NO_BRANCHES = Branches()


@dataclass(slots=True, eq=False)
class KeyValues:
    """What attention keeps of a sequence's first tokens, read by it or by all that begin alike."""

    end: int
    """The slot behind the last token."""
    pages: Pages | None = None
    """Of slots 0 to `end`, which the step that computes the tokens takes."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one sequence in a step, and what they read and leave."""

    token_ids: tuple[int, ...]
    past: KeyValues | None = None
    """Of the tokens before."""
    branches: Branches = _NO_BRANCHES
    keep: KeyValues | None = None
    """Where keys and values of `token_ids` are to stay; branches leave none."""
    decodes: bool = False
    """The pages of `past` are its own, and are gone on with."""

    @property
    def start(self) -> int:
        """The first token's slot."""
        return self.past.end if self.past else 0

    @property
    def end(self) -> int:
        """The slot behind the prompt, where branches begin."""
        return self.start + len(self.token_ids)

    @property
    def size(self) -> int:
        """Tokens in this step."""
        return len(self.token_ids) + len(self.branches.token_ids)


class Step:
    """One forward pass over packed tokens: in the order of the spans, of each its tokens and then its branches."""

    _passes = True
    """Whether what no span keeps stands in passing pages."""

    def __init__(self, pool: PagePool, spans: Sequence[Span]) -> None:
        """Give every token a slot in a page.

        Raises: torch.OutOfMemoryError; ValueError if a span that decodes stands before one that does not.
        """
        if any(one.decodes and not other.decodes for one, other in pairwise(spans)):
            raise ValueError("spans that decode stand behind the others")
        self.pool, self.spans, passing = pool, spans, count()
        self.pages = [self._pages_of(span, passing) for span in spans]
        pool.pass_through(next(passing))
        self._copies = self._found_copies()
        sizes = [span.size for span in spans]
        bounds = [0, *accumulate(sizes)]
        self.rows = [slice(*bound) for bound in pairwise(bounds)]
        """Span to its tokens."""
        self.num_prompt_tokens = sum(span.size for span in spans if not span.decodes)
        """Those that do not decode, which stand first."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for span in spans:
            ids += [*span.token_ids, *span.branches.token_ids]
            positions += [*range(span.start, span.end), *(span.end + depth for depth in span.branches.depths)]
            slots += range(span.start, span.start + span.size)
        self.token_ids, self.positions = torch.tensor(ids).to(pool.device), torch.tensor(positions).to(pool.device)
        """[T] int64, both."""
        self.slots = torch.tensor(slots)
        """[T] int64, in memory."""
        self.owners = torch.arange(len(spans)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        """[T] int64, in memory: token to span."""
        self.table = table_of([pages.ids for pages in self.pages])
        """[B, most pages of one] int64, in memory."""
        self._trees: dict[int | None, tuple[Tensor, Tensor]] = {}

    def _pages_of(self, span: Span, passing: Iterator[int]) -> Pages:
        past = span.past.pages if span.past else None
        if span.decodes:
            assert past is not None
            pages = past
        else:
            pages = Pages(self.pool, past, span.start)
            if self._passes and span.keep is None:
                pages.pass_through(span.start + span.size, passing)
        pages.reach(span.start + span.size)
        if span.keep is not None:
            span.keep.pages = pages
        return pages

    def _found_copies(self) -> Tensor:
        """Return the pages in which spans begin but not at their start, and those they continue before [2, n] int64."""
        page = self.pool.page
        pairs = [
            (pages.past.ids[span.start // page], pages.ids[span.start // page])
            for span, pages in zip(self.spans, self.pages, strict=True)
            if not span.decodes and pages.past is not None and span.start % page
        ]
        return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous()

    def begun(self, layer: int) -> Tensor:
        """Return the pages of `layer`, once those in which sequences part from what they share are copied."""
        pages = self.pool.layers[layer]
        if self._copies.numel():
            self._copy(pages, *self._copies)
        return pages

    def _copy(self, pages: Tensor, sources: Tensor, targets: Tensor) -> None:
        cpu_attention.copy(pages, self.pool.passing, sources, targets)

    @functools.cached_property
    def places(self) -> Places:
        """Where its tokens stand."""
        return self._places(self.table, slice(0, len(self.slots)))

    @functools.cached_property
    def decoding_places(self) -> Places:
        """Where those that decode stand."""
        return self._places(self.table, slice(self.num_prompt_tokens, len(self.slots)))

    @functools.cached_property
    def prompt_pages(self) -> tuple[Tensor, Tensor, Places]:
        """The pages that prompts read, each once, and where prompt tokens stand in these, side by side.

        That is: pages [n] int64, which of their slots are filled [n, page] bool, and places.
        """
        page, filled = self.pool.page, dict[int, int]()
        prompts = [(span, pages.ids) for span, pages in zip(self.spans, self.pages, strict=True) if not span.decodes]
        for span, ids in prompts:
            for place, number in enumerate(ids):
                own = min(page, max(0, span.start + span.size - place * page))
                filled[number] = max(filled.get(number, 0), own)
        places = {number: place for place, number in enumerate(filled)}
        table = table_of([[places[number] for number in ids] for _, ids in prompts])
        has_token = torch.arange(page) < torch.tensor([*filled.values()])[:, None]
        return torch.tensor([*filled]), has_token, self._places(table, slice(0, self.num_prompt_tokens))

    def _places(self, table: Tensor, tokens: slice) -> Places:
        ends = torch.tensor([span.end for span in self.spans])
        return Places(table, self.owners[tokens], self.slots[tokens], self.positions[tokens], ends, self.pool.page)

    def trees(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return `trees_of` the spans."""
        if window not in self._trees:
            self._trees[window] = trees_of([span.branches for span in self.spans], window)
        return self._trees[window]


def trees_of(spans: Sequence[Branches], window: int | None) -> tuple[Tensor, Tensor]:
    """Return each span's tree [B] int64, and whether a branch of each tree sees another, and itself [trees, n, n] bool.

    Args:
        spans: the branches of each.
        window: how many positions a token sees; None for all.
    """
    numbers = {branches: number for number, branches in enumerate(dict.fromkeys(spans))}
    most = max(len(branches.token_ids) for branches in numbers)
    visible = torch.zeros(len(numbers), most, most, dtype=torch.bool)
    for branches, number in numbers.items():
        for branch, ancestors in enumerate(branches.ancestors):
            seen = [a for a in ancestors if window is None or branches.depths[branch] - branches.depths[a] < window]
            visible[number, branch, seen] = True
    return torch.tensor([numbers[branches] for branches in spans]), visible
