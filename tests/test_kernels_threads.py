"""Lanes: threads that compute side by side, each on its share; and what others have meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels.threads import Lanes, in_thread_that_ends


@pytest.mark.parametrize(
    ("threads", "count"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (7, 1), (8, 4), (10, 2), (16, 4)]
)
def test_threads_are_shared_out_evenly(threads: int, count: int) -> None:
    before = torch.get_num_threads()

    def seen(part: int) -> tuple[int, int, int]:
        barrier.wait(60)  # all at once
        return part, torch.get_num_threads(), threading.get_ident()

    def of_lanes() -> tuple[list[tuple[int, int, int] | Exception], int]:
        lanes = Lanes(threads)
        try:
            with ThreadPoolExecutor(1) as other:
                return lanes.run(seen, range(count)), other.submit(torch.get_num_threads).result()
        finally:
            lanes.close()

    barrier = threading.Barrier(count)
    try:
        outcomes, others = in_thread_that_ends(of_lanes)
    finally:
        in_thread_that_ends(torch.set_num_threads, before)
    found = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert [part for part, _, _ in found] == list(range(count))
    assert {own for _, own, _ in found} == {threads // count}
    assert len({ident for _, _, ident in found}) == count
    assert others == threads
    assert torch.get_num_threads() == before


def test_what_one_part_raises_is_its_own_outcome() -> None:
    def inverse(x: int) -> float:
        return 1 / x

    def of_lanes() -> list[float | Exception]:
        lanes = Lanes(3)
        try:
            assert lanes.run(inverse, []) == []
            assert lanes.run(inverse, [2]) == [0.5]
            return lanes.run(inverse, [4, 0, 1])
        finally:
            lanes.close()

    before = torch.get_num_threads()
    try:
        first, second, third = in_thread_that_ends(of_lanes)
    finally:
        in_thread_that_ends(torch.set_num_threads, before)
    assert (first, third) == (0.25, 1.0)
    assert isinstance(second, ZeroDivisionError)
