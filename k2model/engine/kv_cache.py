"""Keys and values of sequences that decode.

Sequences of as many tiles stand side by side in one block of memory, so that attention reads them where they are: a
product's shape is then a function of the sequence's own length. One that outgrows its tiles moves to the next block,
once in `TILE` tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from k2model.decoder.step import TILE, DecodeGroup, KeyValues, Slots

T = TypeVar("T")


@dataclass(slots=True)
class Block(Generic[T]):
    """Sequences of `num_tiles` tiles, in the first rows of `slots`."""

    slots: Slots
    owners: list[T] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Filled slots of each; the next token's is the same number."""

    def group(self, rows: range) -> DecodeGroup:
        """Return what a step needs to add a token to each of `rows`."""
        view = Slots([layer[rows.start : rows.stop] for layer in self.slots.layers])
        return DecodeGroup(view, torch.tensor(self.lengths[rows.start : rows.stop]))


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
        block, row = self._room(length // TILE + 1)
        block.slots.fill(row, parts)
        block.owners.append(owner)
        block.lengths.append(length)

    def advance(self, owners: set[int]) -> None:
        """Count the token that the step added to each sequence but those in `owners` (ids), which leave."""
        for num_tiles, block in sorted(self.blocks.items(), reverse=True):  # into a block already counted
            for row in reversed(range(len(block.owners))):
                if id(block.owners[row]) in owners:
                    self._drop(block, row)
                    continue
                block.lengths[row] += 1
                if block.lengths[row] == num_tiles * TILE:
                    self._grow(block, row)
        self.blocks = {tiles: block for tiles, block in self.blocks.items() if block.owners}

    def clear(self) -> None:
        """Forget every sequence."""
        self.blocks.clear()

    def _room(self, num_tiles: int) -> tuple[Block[T], int]:
        """Return the block of `num_tiles` tiles with a free row, and that row."""
        block = self.blocks.get(num_tiles)
        if block is None:
            block = self.blocks[num_tiles] = Block(self.allocate(4, num_tiles))
        row, capacity = len(block.owners), block.slots.layers[0].shape[0]
        if row == capacity:
            wider = self.allocate(2 * capacity, num_tiles)
            for layer, old in zip(wider.layers, block.slots.layers, strict=True):
                layer[:capacity] = old
            block.slots = wider
        return block, row

    def _grow(self, block: Block[T], row: int) -> None:
        """Move the sequence in `row` to the block with one more tile."""
        other, free = self._room(block.slots.num_tiles + 1)
        filled = block.lengths[row]
        for layer, old in zip(other.slots.layers, block.slots.layers, strict=True):
            layer[free, :, :filled] = old[row]
        other.owners.append(block.owners[row])
        other.lengths.append(filled)
        self._drop(block, row)

    def _drop(self, block: Block[T], row: int) -> None:
        """Free `row`: the last one takes its place."""
        last = len(block.owners) - 1
        if row < last:
            for layer in block.slots.layers:
                layer[row] = layer[last]
            block.owners[row], block.lengths[row] = block.owners[last], block.lengths[last]
        block.owners.pop()
        block.lengths.pop()
