"""Keys and values of sequences that decode.

Sequences of as many tiles stand side by side in one block of memory, so that attention reads them where they are: a
product's shape is then a function of the sequence's own length. One that outgrows its tiles moves to the next block,
once in `DECODE_TILE` tokens.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from k2model.decoder.step import DECODE_TILE, DecodeGroup, KeyValues, Slots

T = TypeVar("T", bound=Hashable)

_FIRST_ROWS = 8
"""Room of a block at first; it doubles."""


@dataclass(slots=True)
class Block(Generic[T]):
    """Sequences of `num_tiles` tiles, in the first rows of `slots`."""

    slots: Slots
    owners: list[T] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Filled slots of each; the next token's is the same number."""

    @property
    def num_slots(self) -> int:
        """Slots of each sequence."""
        return self.slots.num_tiles * DECODE_TILE

    def group(self, rows: range) -> DecodeGroup:
        """Return what a step needs to add a token to each of `rows`."""
        return DecodeGroup(self.slots.part(rows), torch.tensor(self.lengths[rows.start : rows.stop]))

    def behind(self, rows: range, counts: Sequence[int]) -> Iterator[DecodeGroup]:
        """Yield what a step needs to add so many tokens to each of `rows` behind the one of `group`, in this order.

        Attention copies all that a token sees, so groups are as large as the block, or of 8 tokens.
        """
        more = [(row, self.lengths[row] + 1 + i) for row, count in zip(rows, counts, strict=True) for i in range(count)]
        size = max(8, len(self.owners))
        for start in range(0, len(more), size):
            owners, lengths = zip(*more[start : start + size], strict=True)
            yield DecodeGroup(self.slots, torch.tensor(lengths), torch.tensor(owners))


@dataclass(slots=True)
class KvCache(Generic[T]):
    """All sequences that decode, by their number of tiles."""

    allocate: Callable[[int, int], Slots]
    """Room for so many rows of so many tiles."""
    blocks: dict[int, Block[T]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(block.owners) for block in self.blocks.values())

    def add(self, owner: T, parts: Sequence[KeyValues]) -> None:
        """Take in a sequence whose tokens so far are `parts`, in order from slot 0 on."""
        length = parts[-1].end
        block, row = self._room(length // DECODE_TILE + 1)
        block.slots.fill(row, parts)
        block.owners.append(owner)
        block.lengths.append(length)

    def advance(self, added: Mapping[T, int]) -> None:
        """Count the slots that a step filled of each sequence; one that is not named leaves.

        Slots filled beyond those counted, by wrong guesses, are hidden from attention until they are filled again.
        """
        for _, block in sorted(self.blocks.items(), reverse=True):  # into a block already counted
            for row in reversed(range(len(block.owners))):
                if block.owners[row] not in added:
                    self._drop(block, row)
                    continue
                block.lengths[row] += added[block.owners[row]]
                if block.lengths[row] == block.num_slots:
                    self._grow(block, row)
        self.blocks = {tiles: block for tiles, block in self.blocks.items() if block.owners}

    def clear(self) -> None:
        """Forget every sequence."""
        self.blocks.clear()

    def _room(self, num_tiles: int) -> tuple[Block[T], int]:
        """Return the block of `num_tiles` tiles with a free row, and that row."""
        block = self.blocks.get(num_tiles)
        if block is None:
            block = self.blocks[num_tiles] = Block(self.allocate(_FIRST_ROWS, num_tiles))
        row, capacity = len(block.owners), block.slots.num_rows
        if row == capacity:
            wider = self.allocate(2 * capacity, num_tiles)
            for old, filled in enumerate(block.lengths):
                wider.take(old, block.slots, old, filled)
            block.slots = wider
        return block, row

    def _grow(self, block: Block[T], row: int) -> None:
        """Move the sequence in `row` to the block with one more tile."""
        other, free = self._room(block.slots.num_tiles + 1)
        filled = block.lengths[row]
        other.slots.take(free, block.slots, row, filled)
        other.owners.append(block.owners[row])
        other.lengths.append(filled)
        self._drop(block, row)

    def _drop(self, block: Block[T], row: int) -> None:
        """Free `row`: the last one takes its place."""
        last = len(block.owners) - 1
        if row < last:
            block.slots.take(row, block.slots, last, block.num_slots)  # all: what fails may have left NaN
            block.owners[row], block.lengths[row] = block.owners[last], block.lengths[last]
        block.slots.leave(last)
        block.owners.pop()
        block.lengths.pop()
