"""Keeps freed memory in the process, because a step's tensors come back at every step."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks rather than return them to the system and fault them in anew.

    Without it a fifth of a step is page faults (BENCHMARKS.md, 2026-11-23). Elsewhere than on glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
        mallopt(_M_ARENA_MAX, 1)
