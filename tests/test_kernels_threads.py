"""Lanes: threads that compute side by side, each on its share; and what others have meanwhile."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.threads import Lanes, in_thread_that_ends
from tests.checkpoints import write_checkpoint


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


_THREADS_THAT_RUN = """
import os, sys
import torch
from k2model.engine.engine import Engine
from k2model.engine.request import Candidate, Request
def switches():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/status") as file:
            found[thread] = sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
    return found
opened = Engine.open(sys.argv[1])
candidates = tuple(Candidate((i,), 1) for i in range(9))
requests = [Request(prompt_ids=(*range(100), i), candidates=candidates) for i in range(90)]
for turn in range(20):
    opened.submit(requests).result()
    if turn == 1:  # what is done once is done
        before = switches()
    requests = requests[::-1]
print(sum(count > before.get(thread, 0) + 2 for thread, count in switches().items()))
opened.close()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists() or torch.get_num_threads() < 2, reason="counts threads")
def test_no_thread_but_the_lanes_computes(tmp_path: Path) -> None:
    """Where each lane has one core, whatever is compiled: of more threads than cores some would wait for the others.

    What numba keeps on disk of a loop once was the one that is shared out, in place of the one that was asked for.
    """
    done = subprocess.run(
        [sys.executable, "-c", _THREADS_THAT_RUN, str(write_checkpoint(tmp_path / "source"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "2", "K2BATCH_CACHE": str(tmp_path / "cache")},
    )
    assert int(done.stdout) <= 2 + 2  # the lanes, the thread that asks, and the one that fills masks
