"""The cache of decoding sequences: whoever comes, grows and leaves, each keeps its own keys."""

import random

import torch

from k2model.decoder.step import DECODE_TILE, KeyValues, Slots
from k2model.engine.kv_cache import KvCache


def allocate(rows: int, num_tiles: int) -> Slots:
    return Slots(torch.full((2, 1, rows, 1, num_tiles * DECODE_TILE, 1), float("nan")))


def parts(owner: int, *lengths: int) -> list[KeyValues]:
    """Return keys that name their owner and their slot."""
    made, start = [], 0
    for length in lengths:
        values = owner * 1000.0 + torch.arange(start, start + length).view(1, 1, -1, 1)
        made.append(KeyValues(torch.stack([values, -values]), start))
        start += length
    return made


def test_everyone_keeps_its_own_keys() -> None:
    rng = random.Random(3)
    cache: KvCache[str] = KvCache(allocate)
    lengths: dict[str, int] = {}
    for turn in range(400):
        if turn % 7 == 0:
            name, sizes = str(turn), (rng.randint(1, 150), rng.randint(1, 40))
            cache.add(name, parts(turn, *sizes))
            lengths[name] = sum(sizes)
        for block in cache.blocks.values():
            group = block.group(range(len(block.owners)))
            for row, owner in enumerate(block.owners):
                length = lengths[owner]
                assert int(group.lengths[row]) == length
                assert length // DECODE_TILE + 1 == group.slots.num_tiles
                expected = int(owner) * 1000.0 + torch.arange(length)
                assert torch.equal(group.slots.layers[0][0, row, 0, :length, 0], expected)
                assert torch.equal(group.slots.layers[1][0, row, 0, :length, 0], -expected)
                assert group.slots.layers[:, 0, row].isfinite().all()
                for sign, layer in zip((1, -1), group.slots.layers, strict=True):
                    layer[0, row, 0, length, 0] = sign * (int(owner) * 1000.0 + length)
        every = [owner for block in cache.blocks.values() for owner in block.owners]
        leaving = set(rng.sample(every, k=min(len(every), rng.randint(0, 1)))) if turn % 5 == 0 else set()
        cache.advance({owner: 1 for owner in every if owner not in leaving})
        lengths = {owner: length + 1 for owner, length in lengths.items() if owner not in leaving}
        assert len(cache) == len(lengths)
    assert len(cache.blocks) > 3


def test_some_rows_are_a_view_of_the_block() -> None:
    cache: KvCache[str] = KvCache(allocate)
    for owner in "abcde":
        cache.add(owner, parts(ord(owner), 10))
    group = cache.blocks[1].group(range(2, 4))
    assert group.slots.layers[0][0, :, 0, 3, 0].tolist() == [ord("c") * 1000 + 3, ord("d") * 1000 + 3]
    group.slots.layers[0][0, 0, 0, 10, 0] = 5
    assert cache.blocks[1].slots.layers[0][0, 2, 0, 10, 0] == 5


def test_an_empty_block_is_given_back() -> None:
    cache: KvCache[str] = KvCache(allocate)
    cache.add("a", parts(1, DECODE_TILE - 1))
    cache.advance({"a": 1})
    assert list(cache.blocks) == [2]
    cache.advance({})
    assert len(cache) == 0
    assert not cache.blocks
