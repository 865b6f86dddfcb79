"""A batch in parts, one a lane: everything once, about as many tokens each, guesses with their sequence."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2model.decoder.step import DECODE_TILE, Slots
from k2model.engine.kv_cache import Block
from k2model.engine.request import Request
from k2model.engine.runner import Batch, Runner
from k2model.engine.scheduler import Sequence


class Decoding:
    """A sequence that decodes."""

    def unfed(self, num_filled: int) -> list[int]:
        return [7]


def runner_of(rows: dict[int, int]) -> Runner:
    """Return one where so many sequences of so many tiles decode, with a token to feed each."""
    decoder: Any = SimpleNamespace(allocate_slots=None)
    runner = Runner(decoder, decoder)
    for tiles, count in rows.items():
        owners: list[Any] = [Decoding() for _ in range(count)]
        slots = Slots(torch.empty(1, 1, count, 1, tiles * DECODE_TILE, 1))
        runner.cache.blocks[tiles] = Block(slots, owners, [tiles * DECODE_TILE - 3] * count)
    return runner


def sequence(size: int) -> Sequence:
    return Sequence(Request(prompt_ids=tuple(range(size)), max_tokens=1), None)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [{}, {1: 1, 2: 64, 5: 7}, {3: 130}])
def test_parts_are_the_batch_in_about_equal_shares(count: int, rows: dict[int, int]) -> None:
    rng, runner = random.Random(count), runner_of(rows)
    items = [sequence(rng.randint(20, 60)) for _ in range(30)]
    guesses: Any = {
        owner: [1] * rng.randint(1, 4)
        for block in runner.cache.blocks.values()
        for owner in block.owners
        if rng.random() < 0.3
    }
    batch = Batch([*items], {tiles: range(n) for tiles, n in rows.items()}, guesses)
    parts = runner.parts(batch, count)
    assert len(parts) == count
    assert sorted(items.index(item) for part in parts for item in part.items) == list(range(len(items)))  # type: ignore[arg-type]
    for part in parts:
        places = [items.index(item) for item in part.items]  # type: ignore[arg-type]
        assert places == sorted(places)  # in the scheduler's order
    for tiles, n in rows.items():
        had = sorted(row for part in parts for row in part.rows.get(tiles, ()))
        assert had == list(range(n))
    tokens = []
    for part in parts:
        owned = [runner.cache.blocks[tiles].owners[row] for tiles, own in part.rows.items() for row in own]
        assert part.guesses == {owner: guesses[owner] for owner in owned if owner in guesses}
        tokens.append(
            sum(item.num_prefill_tokens for item in part.items if isinstance(item, Sequence))
            + len(owned)
            + sum(map(len, part.guesses.values()))
        )
    assert max(tokens) - min(tokens) <= 60  # the longest item


def test_a_small_batch_is_one_part_and_no_part_is_empty() -> None:
    runner = runner_of({2: 5})
    small = Batch([], {2: range(5)})
    assert runner.parts(small, 4) == [small]
    long = Batch([sequence(500)], {})
    assert [part.items for part in runner.parts(long, 4)] == [long.items]
