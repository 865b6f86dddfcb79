"""Threads that compute: how many there are of them, and what each has for itself."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

MOST_LANES = 4
"""More would wait for Python's lock."""


def in_thread_that_ends(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return function(*args, **kwargs), called by a thread that ends then, and its team of OpenMP threads with it.

    Every thread that computes has such a team. Where these are more threads than there are cores, libgomp lets those
    that wait sleep at once: to begin an operation that is shared out takes 50 us in place of 10 (BENCHMARKS.md).
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args, **kwargs).result()


class Lanes:
    """The thread that makes it, and others, that compute side by side, each on its own share of the cores.

    An operation that is shared out waits for the last of its threads, and between two of them all but one are idle;
    lanes wait for each other once a step. SmolLM2-135M on two cores scores 38 tickets/s on one lane of two threads, and
    twice 26 on one core each (BENCHMARKS.md).
    """

    def __init__(self, num_threads: int, most: int = MOST_LANES) -> None:
        """Share `num_threads`, those torch has, out to as many lanes as divide them, at most `most`.

        The thread that calls it has its share from here on; threads that are no lanes compute on all, as before.
        """
        self.count = next(count for count in range(most, 0, -1) if num_threads % count == 0)
        share = num_threads // self.count
        self._others = [ThreadPoolExecutor(1, thread_name_prefix="k2batch-lane") for _ in range(self.count - 1)]
        for other in self._others:
            other.submit(_compute_on, share).result()
        _compute_on(share)
        # torch lets threads to come begin with what was set last.
        in_thread_that_ends(torch.set_num_threads, num_threads)

    def run(self, function: Callable[[A], T], parts: Sequence[A]) -> list[T | Exception]:
        """Return function(part) for each of at most `count` parts, one a lane, or what it raised."""
        futures = [other.submit(function, part) for other, part in zip(self._others, parts[1:], strict=False)]
        outcomes: list[T | Exception] = [_outcome(function, part) for part in parts[:1]]
        return outcomes + [_outcome(future.result) for future in futures]

    def close(self) -> None:
        """Let the threads go."""
        for other in self._others:
            other.shutdown()


def _compute_on(num_threads: int) -> None:
    """Let this thread compute on `num_threads`."""
    torch.get_num_threads()  # before it is asked for the first time, torch takes up its own number once more
    torch.set_num_threads(num_threads)


def _outcome(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Exception:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error
