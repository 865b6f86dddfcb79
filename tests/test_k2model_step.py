"""A step's layout: every token in its slot, and seeing exactly what it may."""

import pytest
import torch
from torch import Tensor

from k2model.decoder.branches import Branches
from k2model.decoder.step import DECODE_TILE, TILE, DecodeGroup, KeyValues, PrefillGroup, Slots, Span, Step
from kernels import attention_rows

TREE = Branches((7, 8, 9), (0, 0, 1), (frozenset({0}), frozenset({1}), frozenset({1, 2})))
"""Two children of the prompt's end, and a child of the second."""

LENGTHS = [DECODE_TILE, DECODE_TILE + 6, 2 * DECODE_TILE - 1]


def past(*lengths: int) -> tuple[KeyValues, ...]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(KeyValues(torch.zeros(1, 1, 1, n, 4), start) for n, start in zip(lengths, starts, strict=True))


def sees(span: Span, query: int, key: int, window: int | None) -> bool:
    """Return whether slot `query` of `span` sees slot `key`, by the words of the definition."""

    def position(slot: int) -> int:
        return slot if slot < span.end else span.end + span.branches.depths[slot - span.end]

    if query < span.end:
        seen = key <= query
    else:
        seen = key < span.end or key - span.end in span.branches.ancestors[query - span.end]
    return seen and (window is None or position(query) - position(key) < window)


def bias_of_row(group: PrefillGroup, row: int, slot: int, window: int | None) -> Tensor:
    """Return what is added to the scores of all keys [(tile + 1) * TILE] of `slot`."""
    tile = group.tiles(window)[slot // TILE - group.first_tile]
    begin, end = tile.rows[row].tolist()
    assert begin <= slot % TILE < end
    bias = tile.bias[row if len(tile.bias) > 1 else 0, slot % TILE]
    return torch.cat([torch.zeros((slot // TILE + 1) * TILE - len(bias)), bias])


@pytest.mark.parametrize("window", [None, 1, 2, 5, 70, 1000])
def test_each_token_sees_its_past_itself_and_its_ancestors(window: int | None) -> None:
    spans = [
        Span((1,) * 5),
        Span((1,) * 130, branches=TREE),
        Span((1,) * 3, past(4), TREE),
        Span((1,) * 3, past(60), TREE),  # its branches stand in two tiles
        Span((1,), past(63, 1)),
        Span((1,) * 70, past(100, 40), TREE),
    ]
    step = Step(spans)
    seen = 0
    for group in step.prefill:
        for row, span in enumerate(group.spans):
            for slot in range(span.start, span.start + span.size):
                bias = bias_of_row(group, row, slot, window)
                expected = [0.0 if sees(span, slot, key, window) else float("-inf") for key in range(len(bias))]
                assert bias.tolist() == expected, (span.start, slot)
                seen += 1
    assert seen == sum(span.size for span in spans) == len(step.token_ids)


def test_slots_without_a_token_see_something() -> None:
    for window in (None, 1, 3):
        for group in Step([Span((1,) * 3, past(2), TREE), Span((1,) * 80)]).prefill:
            for tile in group.tiles(window):
                assert (tile.bias == 0).any(dim=-1).all()


def test_tokens_are_packed_without_padding_and_found_again() -> None:
    spans = [Span(tuple(range(i, i + n)), past(start) if start else (), TREE if n % 2 else Branches())
             for i, (n, start) in enumerate([(3, 0), (200, 0), (64, 64), (1, 63), (90, 10), (65, 0)])]  # fmt: skip
    step = Step(spans, [(DecodeGroup(Slots(torch.zeros(1, 1, 2, 1, DECODE_TILE, 4)), torch.tensor([5, 9])), [77, 78])])
    for span, rows in zip(spans, step.rows, strict=True):
        assert step.token_ids[rows].tolist() == [*span.token_ids, *span.branches.token_ids]
        depths = [span.end + depth for depth in span.branches.depths]
        assert step.positions[rows].tolist() == [*range(span.start, span.end), *depths]
    assert step.token_ids[step.decode[0].tokens].tolist() == [77, 78]
    assert step.positions[step.decode[0].tokens].tolist() == [5, 9]
    assert sum(span.size for span in spans) + 2 == len(step.token_ids)
    given = step.in_given_order(step.token_ids)
    assert given.tolist() == [i for span in spans for i in (*span.token_ids, *span.branches.token_ids)]


def test_spreading_and_collecting_are_inverse_and_padding_is_bounded() -> None:
    spans = [Span((1,) * n) for n in (1, 63, 64, 65, 200, 1000)]
    step = Step(spans)
    x = torch.randn(len(step.token_ids), 3, 2)
    for group in step.prefill:
        own = x[group.tokens]
        padded = group.spread_queries(x.flatten(1), 3, 2, torch.float32)
        assert padded.abs().sum() == pytest.approx(own.abs().sum().item(), rel=1e-5)
        back = torch.full((len(own), 6), float("nan"))
        attention_rows.collect(padded.flatten(0, 1), group.query_block, group.query_slot, back)
        assert torch.equal(back, own.flatten(1))
        for row, span in enumerate(group.spans):
            by_slot = padded[:, row].transpose(1, 2).flatten(0, 1)  # [slots, heads, width]
            first = span.start - group.first_tile * TILE
            assert torch.equal(by_slot[first : first + span.size], own[group.owner == row])
        longest, shortest = group.spans[0].tiles[1] + 1, group.spans[-1].tiles[1] + 1
        assert longest <= max(2 * shortest, 4)


def test_what_neighbours_share_is_given_once() -> None:
    shared = past(10)[0]
    (group,) = Step([Span((1,), (shared,)), Span((2,)), Span((3,), (shared,))]).prefill
    assert [(kv is shared, rows.stop - rows.start) for kv, rows in group.shared_past()] == [(True, 2)]


def test_a_decoding_token_sees_what_is_filled() -> None:
    group = DecodeGroup(Slots(torch.zeros(1, 1, 3, 1, 2 * DECODE_TILE, 4)), torch.tensor(LENGTHS))
    bias = group.bias(None)
    assert bias.shape == (3, 1, DECODE_TILE)
    assert [(row == 0).sum().item() for row in bias] == [1, 7, DECODE_TILE]
    assert [(row == 0).sum().item() for row in group.bias(5)] == [5, 5, 5]
    assert [(row == 0).sum().item() for row in group.bias(1000)] == [length + 1 for length in LENGTHS]


@pytest.mark.parametrize("length", [DECODE_TILE - 1, 2 * DECODE_TILE])
def test_a_decoding_sequence_in_slots_that_are_not_its_own_is_refused(length: int) -> None:
    group = DecodeGroup(Slots(torch.zeros(1, 1, 2, 1, 2 * DECODE_TILE, 4)), torch.tensor([DECODE_TILE, length]))
    with pytest.raises(ValueError, match="num_tiles=2"):
        Step([], [(group, [77, 78])])
