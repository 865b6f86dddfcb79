"""Threads that compute, of which a process is to have one that does at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread_that_ends(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return function(*args, **kwargs), called by a thread that ends then, and its team of OpenMP threads with it.

    Every thread that computes has such a team. Two are more threads than there are cores, and then libgomp lets those
    that wait sleep at once: to begin an operation that is shared out takes 50 us in place of 10 (BENCHMARKS.md).
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args, **kwargs).result()
