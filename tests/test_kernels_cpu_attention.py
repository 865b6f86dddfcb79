"""Attention in pages against its plain twin, on poisoned memory; and a query's bits are its sequence's own."""

import hashlib
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import cpu_attention, reference
from kernels.places import Places

DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")
SCALE = 0.3
NO_TREE = torch.zeros(1, 0, 0, dtype=torch.bool)


class Sequence(NamedTuple):
    """One sequence, whose queries stand in its last slots."""

    q: Tensor
    """[L, H, D]."""
    k: Tensor
    """[S, G, D]."""
    v: Tensor
    """[S, G, Dv]."""

    @property
    def start(self) -> int:
        return len(self.k) - len(self.q)


def sequences(lengths: list[tuple[int, int]], h: int, g: int, d: int, dv: int, dtype: torch.dtype) -> list[Sequence]:
    """Return one of each (slots before, queries), of values that `dtype` has."""
    made = []
    for number, (before, own) in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        shapes = (own, h, d), (before + own, g, d), (before + own, g, dv)
        made.append(Sequence(*(torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes)))
    return made


class Pages:
    """Pages of several sequences, in any order, full of NaN."""

    def __init__(self, of: list[Sequence], dtype: torch.dtype, page: int, seed: int = 0) -> None:
        self.of, self.page = of, page
        counts = [-(-len(one.k) // page) for one in of]
        self.sizes = of[0].k.shape[2], of[0].v.shape[2]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed))
        width = sum(cpu_attention.page_sizes(*self.sizes))
        self.memory = torch.full((len(order), of[0].k.shape[1], page, width), NAN, dtype=dtype)
        self.table, used = torch.zeros(len(of), max(counts), dtype=torch.int64), 0
        for row, count in zip(self.table, counts, strict=True):
            row[:count] = order[used : used + count]
            used += count

    def places(self, slots: list[range], ends: list[int] | None = None, positions: Tensor | None = None) -> Places:
        owners = torch.arange(len(slots)).repeat_interleave(torch.tensor([len(each) for each in slots]))
        every = torch.tensor([slot for each in slots for slot in each], dtype=torch.int64)
        stop = torch.tensor([len(one.k) for one in self.of] if ends is None else ends)
        return Places(self.table, owners, every, every if positions is None else positions, stop, self.page)

    def store(self, slots: list[range]) -> None:
        """Store these slots of each sequence; columns beside keys and values are NaN."""
        k = torch.cat([one.k[[*some]] for one, some in zip(self.of, slots, strict=True)]).flatten(1)
        v = torch.cat([one.v[[*some]] for one, some in zip(self.of, slots, strict=True)]).flatten(1)
        gap = torch.full((len(k), 3), NAN)
        columns = 3, 6 + k.shape[1]
        cpu_attention.store(torch.cat([gap, k, gap, v], dim=1), columns, self.sizes, self.places(slots), self.memory)

    def attend(
        self,
        queries: list[range] | None = None,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
        read: Tensor | None = None,
        ends: list[int] | None = None,
        positions: Tensor | None = None,
        trees: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return [T, H, Dv] of the queries in these slots, or of all; NaN where nothing is written."""
        slots = [range(one.start, len(one.k)) for one in self.of] if queries is None else queries
        own = [one.q[some.start - one.start : some.stop - one.start] for one, some in zip(self.of, slots, strict=True)]
        q = torch.cat(own)
        rows = torch.cat([q.flatten(1), torch.full((len(q), 2), NAN)], dim=1)
        out = torch.full((len(q), q.shape[1] * self.sizes[1]), NAN)
        cpu_attention.attend(
            rows, q.shape[1], self.memory, self.sizes, self.places(slots, ends, positions),
            (torch.zeros(len(self.of), dtype=torch.int64), NO_TREE) if trees is None else trees, SCALE, out,
            window=window, sinks=sinks, read=read,
        )  # fmt: skip
        return out.view(len(q), q.shape[1], -1)


def stored(of: list[Sequence], dtype: torch.dtype, page: int = 16, seed: int = 0) -> Pages:
    pages = Pages(of, dtype, page, seed)
    pages.store([range(len(one.k)) for one in of])
    return pages


def twin(one: Sequence, window: int | None = None, sinks: Tensor | None = None) -> Tensor:
    slots = torch.arange(len(one.k))
    visible = slots <= slots[one.start :, None]
    if window is not None:
        visible &= slots[one.start :, None] - slots < window
    q, k, v = (x.transpose(0, 1)[None] for x in one)
    return reference.attention(q, k, v, visible, SCALE, sinks)[0].transpose(0, 1)


def tolerance(dtype: torch.dtype, of: list[Sequence]) -> float:
    """Sums of up to 200 float32; in bfloat16 each weight is rounded, too, by 2**-9 of itself, and all are 1."""
    largest = max(float(one.v.abs().max()) for one in of)
    return 200 * 2**-24 * largest + (2**-9 * largest if dtype == torch.bfloat16 else 0)


LENGTHS = [(0, 1), (0, 40), (31, 7), (63, 2), (130, 66), (15, 1), (16, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(
    ("h", "g", "d", "dv"), [(1, 1, 1, 1), (9, 3, 64, 64), (4, 1, 9, 3), (30, 1, 24, 40), (4, 4, 80, 72)]
)
def test_it_is_its_twin(dtype: torch.dtype, page: int, h: int, g: int, d: int, dv: int) -> None:
    of = sequences(LENGTHS, h, g, d, dv, dtype)
    got, expected = stored(of, dtype, page).attend(), torch.cat([twin(one) for one in of])
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance(dtype, of))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 40, 1000])
def test_a_window_and_sinks_are_its_twins(dtype: torch.dtype, window: int) -> None:
    of, sinks = sequences(LENGTHS, 6, 2, 8, 8, dtype), torch.tensor([-50.0, 0.0, 3.0, 50.0, 1.0, -1.0])
    got = stored(of, dtype).attend(window=window, sinks=sinks)
    expected = torch.cat([twin(one, window, sinks) for one in of])
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance(dtype, of))
    assert got[:, 3].abs().max() < 1e-15  # its sink has all the weight


@pytest.mark.parametrize("window", [None, 3])
def test_branches_see_the_prompt_and_what_they_follow(window: int | None) -> None:
    """Two branches behind the prompt, a third behind the second: each is as if the rest were not there."""
    (one,) = sequences([(20, 5)], 4, 2, 8, 8, torch.float32)
    pages, end = stored([one], torch.float32), 22
    tree, positions = torch.eye(3, dtype=torch.bool)[None], torch.tensor([20, 21, 22, 22, 23])
    tree[0, 2, 1] = True
    trees = torch.zeros(1, dtype=torch.int64), tree
    got = pages.attend(ends=[end], positions=positions, trees=trees, window=window)
    for query, slots in ((0, range(21)), (2, range(23)), (3, [*range(22), 23]), (4, [*range(22), 23, 24])):
        alone = Sequence(one.q[query : query + 1], one.k[[*slots]], one.v[[*slots]])
        torch.testing.assert_close(got[query], twin(alone, window)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_are_a_querys_own(dtype: torch.dtype, threads: int) -> None:
    """Alone, among others, in other pages of another size, by any number of threads."""
    of, sinks = sequences(LENGTHS, 9, 3, 16, 16, dtype), torch.randn(9, generator=torch.Generator().manual_seed(1))
    whole = stored(of, dtype).attend(sinks=sinks, window=50).split([len(one.q) for one in of])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for page, seed in ((16, 1), (48, 2), (64, 3)):
            order = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed)).tolist()
            some = stored([of[n] for n in order], dtype, page, seed).attend(sinks=sinks, window=50)
            assert torch.equal(some, torch.cat([whole[n] for n in order]))
        for one, expected in zip(of, whole, strict=True):
            assert torch.equal(stored([one], dtype).attend(sinks=sinks, window=50), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2, 7])
def test_bits_do_not_depend_on_the_steps_a_sequence_is_cut_into(dtype: torch.dtype, step: int) -> None:
    of = sequences([(0, 37), (0, 52)], 4, 2, 8, 8, dtype)
    at_once, cut = stored(of, dtype).attend(), Pages(of, dtype, 16)
    found: list[list[Tensor]] = [[], []]
    for first in range(0, 52, step):
        slots = [range(min(first, len(one.k)), min(first + step, len(one.k))) for one in of]
        cut.store(slots)
        for each, part in zip(found, cut.attend(slots).split([len(some) for some in slots]), strict=True):
            each.append(part)
    assert torch.equal(torch.cat([*found[0], *found[1]]), at_once)


def test_slots_filled_again_leave_nothing_of_before() -> None:
    """As after a wrong guess, of any number of tokens from any slot on."""
    for dtype in DTYPES:
        (right,), (wrong,) = (sequences([(0, 40)], 2, 1, 8, 8, dtype) for _ in range(2))
        wrong = Sequence(wrong.q, wrong.k + 1, wrong.v * 1e4)
        for begin in (9, 10):
            pages = Pages([wrong], dtype, 16)
            pages.store([range(40)])
            pages.of = [right]
            pages.store([range(begin)])
            pages.store([range(begin, begin + 3)])
            assert torch.equal(pages.attend([range(begin + 3)]), stored([right], dtype).attend()[: begin + 3])


def test_only_what_is_read_is_written() -> None:
    of = sequences(LENGTHS, 4, 2, 8, 8, torch.bfloat16)
    pages = stored(of, torch.bfloat16)
    whole, read = pages.attend(), torch.tensor([90, 3, 0, 117, 41, 42, 3])
    got = pages.attend(read=read)
    assert torch.equal(got[read], whole[read])
    assert int(got[:, 0, 0].isnan().sum()) == len(whole) - 6
    assert pages.attend(read=torch.tensor([], dtype=torch.int64)).isnan().all()


def test_a_neighbours_nan_spoils_nobody_else() -> None:
    of = sequences([(0, 9), (0, 30), (7, 3)], 4, 2, 8, 8, torch.bfloat16)
    expected = stored(of, torch.bfloat16).attend()
    of[1] = Sequence(of[1].q, of[1].k * NAN, of[1].v * NAN)
    got = stored(of, torch.bfloat16).attend()
    assert got[9:39].isnan().all()
    assert torch.equal(got[:9], expected[:9])
    assert torch.equal(got[39:], expected[39:])


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000])  # of either sign: processors make the negative one
def test_a_score_that_is_none_spoils_its_query_and_none_before(bits: int) -> None:
    (one,) = sequences([(0, 6)], 1, 1, 4, 4, torch.float32)
    one.k[3, 0] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    got = stored([one], torch.float32).attend()
    assert got[3:].isnan().all()
    torch.testing.assert_close(got[:3], twin(one)[:3], rtol=0, atol=1e-5)


def test_weights_of_very_many_keys_sum_to_one() -> None:
    one = Sequence(torch.zeros(1, 1, 2), torch.zeros(50_000, 1, 2), torch.ones(50_000, 1, 1))
    # Of 50,000 float32 summed one after the other.
    assert stored([one], torch.float32, 64).attend().item() == pytest.approx(1, abs=50_000 * 2**-24)


def test_scores_far_apart_weigh_all_or_nothing() -> None:
    k = torch.tensor([-500.0, 30.0, 1e38, -1e38])[:, None, None]
    one = Sequence(torch.full((4, 1, 1), 1 / SCALE), k, torch.arange(4.0)[:, None, None])
    assert stored([one], torch.float32).attend().flatten().tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 9, 64])
def test_stored_keys_are_found_again_rounded_as_torch_does(dtype: torch.dtype, d: int) -> None:
    bits = torch.arange(0, 2**32, 2**32 // (63 * d), dtype=torch.int64)[: 32 * d] | 0x8000  # ties among them
    k = bits.to(torch.int32).view(torch.float32).view(32, 1, d)
    pages = torch.full((2, 1, 16, sum(cpu_attention.page_sizes(d, d))), NAN, dtype=dtype)
    cpu_attention.store(k.flatten(1), (0, 0), (d, d), Places.of_pages(2, 16), pages)
    got, expected = cpu_attention.stored_keys(pages, d), k[:, 0].to(dtype).float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])


@pytest.mark.parametrize("share", [1, 3, 50])
def test_every_query_is_in_one_item_and_an_item_is_of_one_sequence(share: int) -> None:
    pages = stored(sequences(LENGTHS, 1, 1, 2, 2, torch.float32), torch.float32)
    places = pages.places([range(one.start, len(one.k)) for one in pages.of])
    for read in (None, torch.tensor([90, 3, 0, 117])):
        tokens, starts, owners = places.items(share, read)
        assert tokens.sort()[0].tolist() == ([*range(118)] if read is None else [0, 3, 90, 117])
        sizes = starts[1:] - starts[:-1]
        assert 1 <= sizes.min()
        assert sizes.max() <= max(1, 24 // share)
        assert torch.equal(places.owners[tokens], owners.repeat_interleave(sizes))


def test_memory_with_gaps_is_refused() -> None:
    pages = stored(sequences([(0, 4)], 1, 1, 2, 2, torch.float32), torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        cpu_attention.store(torch.zeros(4, 9)[:, :4], (0, 2), (2, 2), pages.places([range(4)]), pages.memory)


def made() -> str:
    """Return the digest of what it makes of the same numbers."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        got = stored(sequences(LENGTHS, 6, 2, 32, 32, dtype), dtype).attend(window=60, sinks=torch.arange(6.0))
        digest.update(got.numpy().tobytes())
    return digest.hexdigest()


def test_bits_do_not_depend_on_the_processor() -> None:
    """Compiled for the oldest x86-64 there is, without wide registers or fused multiply-add, bits are the same."""
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    code = "from tests.test_kernels_cpu_attention import made; print(made())"
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True).stdout
    assert said.strip() == made()
