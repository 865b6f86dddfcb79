"""What waiting prompts have in common, as a tree, so that each shared beginning is computed once.

Pure Python: knows token ids, no tensor. Sharing never shows in an answer: attention sums in the same order whether a
token's keys were computed beside it or before it (see k2model/decoder/step.py).

Source: the radix tree of SGLang, arXiv 2312.07104, built over all that waits instead of over what came before, as
BatchLLM does, arXiv 2412.03594.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is computed again: its keys and values would be copied in every layer."""


@dataclass(eq=False, slots=True)
class Segment:
    """Consecutive tokens that several prompts have in common, behind those of `parent`."""

    token_ids: tuple[int, ...]
    parent: "Segment | None" = None
    kv: Any = None
    """Their keys and values, once computed."""
    end: int = field(init=False)
    """Tokens up to and with its last one."""

    def __post_init__(self) -> None:
        self.end = len(self.token_ids) + (self.parent.end if self.parent else 0)

    def chain(self) -> tuple["Segment", ...]:
        """Return the segments from the first token on, itself last."""
        return (*(self.parent.chain() if self.parent else ()), self)


def share(prompts: Sequence[tuple[int, ...]], root: Segment | None) -> list[Segment | None]:
    """Return for each prompt the segment it continues: the deepest one that is worth computing apart.

    At least one token of each prompt is left to it, since its answer is read there.

    Args:
        prompts: all begin with the tokens of `root`.
        root: what they are known to share already.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    found: list[Segment | None] = [root] * len(prompts)
    common = [_common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    todo = [(0, len(order), root)]
    while todo:
        first, stop, segment = todo.pop()
        if stop - first < 2:
            continue
        depth = min(common[first : stop - 1])
        begin = segment.end if segment else 0
        if depth - begin >= MIN_SHARED_TOKENS:
            segment = Segment(prompts[order[first]][begin:depth], segment)
            for place in range(first, stop):
                found[order[place]] = segment
        cuts = [place + 1 for place in range(first, stop - 1) if common[place] == depth]
        todo += [(a, b, segment) for a, b in itertools.pairwise([first, *cuts, stop])]
    return found


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return how many first tokens `a` and `b` share, the last of the shorter one left out."""
    low, high = 0, min(len(a), len(b)) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
