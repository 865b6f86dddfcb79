"""How loops over rows are compiled: by numba on first use, kept on disk.

Values are computed in float32; in memory they may be bfloat16, which numba knows as their bits alone, uint16. Nothing
is contracted or reordered, so that a row's bits are its own on every processor and for every number of threads.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.extending import intrinsic
from torch import Tensor

from kernels.threads import in_thread_that_ends

Loop = Callable[..., Any]
inline = numba.njit(inline="always", error_model="numpy")


def _as_float32(_: Any, bits: Any) -> Any:
    """Return the float32 of int32 `bits`, for compiled loops."""

    def generate(context: Any, builder: Any, of: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(numba.float32))

    return numba.float32(numba.int32), generate


as_float32: Loop = intrinsic(_as_float32)


_SERIAL_VALUES = 32_768
"""Fewer values are not worth waking other threads for."""


_WORD, _HIGH, _LAST = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_INFINITY, _NAN, _POSITIVE = np.uint32(0x7F800000), np.uint32(0x7FC00000), np.uint32(0x7FFFFFFF)


@inline
def widen(row: Any, out: Any) -> None:
    """Write bfloat16 `row` as float32."""
    bits = out.view(np.uint32)
    for i in range(row.size):
        bits[i] = np.uint32(row[i]) << _WORD


@inline
def nearest(bits: Any) -> Any:
    """Return float32 `bits` as those of bfloat16, to nearest even, in the low half; NaN stays one."""
    rounded = bits + _HIGH + ((bits >> _WORD) & _LAST)
    return (_NAN if (bits & _POSITIVE) > _INFINITY else rounded) >> _WORD


@inline
def narrow(row: Any, out: Any) -> None:
    """Write float32 `row` as bfloat16, to nearest even."""
    bits = row.view(np.uint32)
    for i in range(row.size):
        out[i] = np.uint16(nearest(bits[i]))


def memory(x: Tensor) -> npt.NDArray[Any]:
    """Return the memory of contiguous `x`; bfloat16 as its bits."""
    if not x.is_contiguous():
        raise ValueError(f"{tuple(x.shape)=}, {x.stride()=}; rows of compiled loops are contiguous")
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@functools.cache
def digest_of(folder: Path) -> str:
    """Return a digest of the sources in `folder`: functions and constants of any may be compiled into a loop."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:8]


def _compiled(loop: Loop, shared: bool) -> Loop:
    # Under a name of its own: what numba keeps on disk is found by name and its own file's time alone. So it takes one
    # way for the other, and a loop for what it was before a file changed that parts of it come from.
    name = f"{loop.__name__}_{'shared' if shared else 'alone'}_{digest_of(Path(__file__).parent)}"
    loop = FunctionType(loop.__code__.replace(co_name=name, co_qualname=name), loop.__globals__)
    try:
        return numba.njit(parallel=shared, cache=True, error_model="numpy")(loop)
    except RuntimeError:  # no folder of this user's can be written: it is compiled in every process
        return numba.njit(parallel=shared, error_model="numpy")(loop)


def both(loop: Loop) -> tuple[Loop, Loop]:
    """Return `loop` for one thread where there is no OpenMP, and for any number."""
    return _compiled(loop, False), _compiled(loop, True)


def _nothing(x: Any) -> None:
    for i in numba.prange(x.size):
        x[i] = 0


_NOTHING = _compiled(_nothing, True)


@functools.cache
def _threads() -> int:
    """Return the threads numba may use: those of OpenMP, as several threads may call it at once; 0 without it."""
    config: Any = numba.config
    if config.THREADING_LAYER == "default":
        config.THREADING_LAYER = "omp"
    try:  # not in this thread: numba's first loop sets how many threads OpenMP, and so torch, has in the one that asks
        in_thread_that_ends(_NOTHING, np.ones(1, np.float32))
    except ValueError:  # of numba: no threading layer could be loaded
        return 0
    return numba.get_num_threads()


def run(loops: tuple[Loop, Loop], size: int, *arguments: Any) -> None:
    """Call one of `loops` of `both`, for `size` values in all."""
    most = _threads()
    if not most:
        loops[0](*arguments)
        return
    # On one thread, too: loops of numba's that may be shared out are faster than others there, or 1 us slower.
    numba.set_num_threads(1 if size < _SERIAL_VALUES else min(torch.get_num_threads(), most))
    loops[1](*arguments)
