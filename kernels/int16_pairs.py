"""INT8 products of processors without an instruction for them: exactly, through pairs of int16.

Both sides are widened for each product; then the sums of a tile stay in registers.

Legend: T rows, K in features, N out features.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels import dot_tiles
from kernels.compiled import both, inline, run
from kernels.dot_tiles import INT_ROWS, LANES, VECTORS

_PANEL = VECTORS * LANES
"""Columns of a tile."""

_ROWS_AT_ONCE = 64
"""Rows that a thread multiplies by one panel after another while they are in the cache."""

_LOW, _HIGH_HALF = np.int32(0xFFFF), np.int32(16)

_tile = dot_tiles.tile(VECTORS, anew=True)


@inline
def _pair(row: Any, n: Any) -> Any:
    """Return values 2 n and 2 n + 1 of int8 `row` as a pair of int16; 0 behind its end."""
    second = np.int32(row[2 * n + 1]) if 2 * n + 1 < row.size else np.int32(0)
    return (np.int32(row[2 * n]) & _LOW) | (second << _HIGH_HALF)


def _matmul(x: Any, weight: Any, a: Any, b: Any, out: Any) -> None:
    rows, terms, width = a.shape[0], a.shape[1], out.shape[1]
    n, k = weight.shape
    flat, a_words, b_words, sums = weight.reshape(-1), a.reshape(-1), b.reshape(-1), out.reshape(-1)
    for t in numba.prange(rows):
        for i in range(terms):
            a[t, i] = _pair(x[t], i) if t < x.shape[0] else 0
    for block in numba.prange(width // LANES):
        first, to, done = block * LANES, block * LANES * terms, 0
        if first + LANES <= n:
            done = k // LANES * LANES
            for i in range(0, done, LANES):
                dot_tiles.interleave(flat, first * k + i, k, b_words, to + i // 2 * LANES)
        for i in range(done // 2, terms):
            for j in range(LANES):
                b_words[to + i * LANES + j] = _pair(weight[first + j], i) if first + j < n else 0
    panels, blocks = width // _PANEL, (rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE
    for item in numba.prange(panels * blocks):
        panel, first = item % panels, item // panels * _ROWS_AT_ONCE
        at, column, apart = panel * _PANEL * terms, panel * _PANEL, LANES * terms
        for t in range(first, min(first + _ROWS_AT_ONCE, rows), INT_ROWS):
            _tile(a_words, t * terms, terms, b_words, at, apart, LANES, sums, t * width + column, width, terms)


_MATMUL = both(_matmul)


def matmul(x_int8: Tensor, weight: Tensor) -> Tensor:
    """Return x_int8 [T, K] @ weight [N, K].T, exact, as int32 [T, N]; K at least 1."""
    (count, k), n = x_int8.shape, len(weight)
    rows, terms, width = -(-count // INT_ROWS) * INT_ROWS, -(-k // 2), -(-n // _PANEL) * _PANEL
    a, b, out = (np.empty(shape, np.int32) for shape in ((rows, terms), (width, terms), (rows, width)))
    run(_MATMUL, n * k, x_int8.contiguous().numpy(), weight.contiguous().numpy(), a, b, out)
    return torch.from_numpy(out)[:count, :n].contiguous()
