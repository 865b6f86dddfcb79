"""How loops over rows are compiled: by numba on first use, once for few rows and once for many, kept on disk.

Nothing is contracted or reordered, so that a row's bits are its own on every processor and for every number of threads.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

Loop = Callable[..., Any]
inline = numba.njit(inline="always", error_model="numpy")

_SERIAL_VALUES = 32_768
"""Fewer values are not worth waking other threads for."""


def _compiled(loop: Loop, many: bool) -> Loop:
    try:
        return numba.njit(parallel=many, cache=True, error_model="numpy")(loop)
    except RuntimeError:  # no folder of this user's can be written: it is compiled in every process
        return numba.njit(parallel=many, error_model="numpy")(loop)


def both(loop: Loop) -> tuple[Loop, Loop]:
    """Return `loop` for few rows and for many."""
    return _compiled(loop, False), _compiled(loop, True)


def _nothing(x: Any) -> None:
    for i in numba.prange(x.size):
        x[i] = 0


_NOTHING = _compiled(_nothing, True)


@functools.cache
def _threads() -> int:
    """Return the threads numba may use: those of OpenMP, as several threads may call it at once; without it, one."""
    config: Any = numba.config
    if config.THREADING_LAYER == "default":
        config.THREADING_LAYER = "omp"
    try:
        _NOTHING(np.ones(1, np.float32))
    except ValueError:  # of numba: no threading layer could be loaded
        return 1
    return numba.get_num_threads()


def run(loops: tuple[Loop, Loop], size: int, *arguments: Any) -> None:
    """Call one of `loops` of `both`, for `size` values in all."""
    if size < _SERIAL_VALUES or (threads := min(torch.get_num_threads(), _threads())) == 1:
        loops[0](*arguments)
    else:
        numba.set_num_threads(threads)
        loops[1](*arguments)
