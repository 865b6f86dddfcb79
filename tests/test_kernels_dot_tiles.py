"""Tiles of products: sums in the order of their terms, bits their own, the same with the processor's instruction."""

import os
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import dot_tiles
from kernels.dot_tiles import INT_ROWS, LANES, ROWS

_anew, _more = dot_tiles.tile(1, anew=True), dot_tiles.tile(1, anew=False)
_anew_wide = dot_tiles.tile(dot_tiles.VECTORS, anew=True)


@numba.njit
def products(a: Any, b: Any, c: Any, wide: bool, anew: bool, rows: int = ROWS) -> None:
    """Write a [rows, N] @ b [N, vectors, LANES] as c [rows, vectors, LANES], or add it."""
    n, vectors, row = b.shape[0], b.shape[1], a.shape[1]
    step = dot_tiles.VECTORS if wide else 1
    for r in range(0, a.shape[0], rows):
        for j in range(0, vectors, step):
            at, to = j * LANES, r * vectors * LANES + j * LANES
            x, y, z = a.reshape(-1), b.reshape(-1), c.reshape(-1)
            if not anew:
                _more(x, r * row, row, y, at, LANES, vectors * LANES, z, to, vectors * LANES, n)
            elif wide:
                _anew_wide(x, r * row, row, y, at, LANES, vectors * LANES, z, to, vectors * LANES, n)
            else:
                _anew(x, r * row, row, y, at, LANES, vectors * LANES, z, to, vectors * LANES, n)


def words(x: Tensor) -> Any:
    """Return bfloat16 or int16 [*, 2 N] as pairs [*, N], float32 as it is."""
    words_of = {torch.bfloat16: torch.uint32, torch.int16: torch.int32}
    return x.view(words_of.get(x.dtype, x.dtype)).numpy()


def as_rows(a: Tensor) -> Any:
    """Return `a` as a tile takes its rows."""
    widened = a.dtype == torch.bfloat16 and dot_tiles.PAIRED is np.float32
    return a.float().numpy() if widened else words(a)


def case(dtype: torch.dtype, rows: int, n: int, vectors: int) -> tuple[Tensor, Tensor]:
    """Return a [rows, terms] and b [vectors * LANES, terms]; a term is a pair where they are bfloat16."""
    generator = torch.Generator().manual_seed(n)
    terms = 2 * n if dtype == torch.bfloat16 else n
    spread = torch.randn(terms, generator=generator) * 3
    a = torch.randn(rows, terms, generator=generator) * spread.exp()
    return a.to(dtype), torch.randn(vectors * LANES, terms, generator=generator).to(dtype)


def as_tile_reads(b: Tensor) -> Any:
    return np.ascontiguousarray(words(b).reshape(-1, LANES, words(b).shape[1]).transpose(2, 0, 1))


def one_after_the_other(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """Return the sums, of pairs the second term first, each product fused with its sum: exact in float64, then rounded.

    A product of two bfloat16 has 16 digits and of two float32 48, and float64 53: the sum is rounded to 53 digits
    before it is to 24, which shows in one of 2**28 or so.
    """
    order = torch.arange(a.shape[1])
    if a.dtype == torch.bfloat16:
        order = order.view(-1, 2).flip(1).flatten()
    for k in order.tolist():
        total = (total.double() + a[:, None, k].double() * b[None, :, k].double()).float()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 37])
@pytest.mark.parametrize("wide", [False, True])
def test_sums_are_those_of_terms_one_after_the_other(dtype: torch.dtype, n: int, wide: bool) -> None:
    a, b = case(dtype, 2 * ROWS, n, 4)
    c = np.full((2 * ROWS, 4, LANES), np.nan, np.float32)
    products(as_rows(a), as_tile_reads(b), c, wide, True)
    expected = one_after_the_other(a, b, torch.zeros(2 * ROWS, 4 * LANES))
    assert torch.equal(torch.from_numpy(c).view(2 * ROWS, -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_goes_on_where_it_was(dtype: torch.dtype) -> None:
    a, b = case(dtype, ROWS, 24, 1)
    whole, parts = np.full((ROWS, 1, LANES), np.nan, np.float32), np.zeros((ROWS, 1, LANES), np.float32)
    products(as_rows(a), as_tile_reads(b), whole, False, True)
    cut = a.shape[1] // 3
    for some in (slice(0, cut), slice(cut, None)):
        products(as_rows(a[:, some].contiguous()), as_tile_reads(b[:, some].contiguous()), parts, False, False)
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("n", [1, 2, 37])
@pytest.mark.parametrize("wide", [False, True])
def test_sums_of_int16_are_exact_and_go_on(n: int, wide: bool) -> None:
    a, b = int16_case(2 * INT_ROWS, n, 4)
    c = np.full((2 * INT_ROWS, 4, LANES), 123, np.int32)
    products(words(a), as_tile_reads(b), c, wide, True, INT_ROWS)
    exact = (a.long() @ b.long().t()).view(len(a), 4, LANES)
    assert np.array_equal(c, exact)
    products(words(a), as_tile_reads(b), c, False, False, INT_ROWS)
    assert np.array_equal(c, 2 * exact)


def int16_case(rows: int, n: int, vectors: int) -> tuple[Tensor, Tensor]:
    """Return what `case` does, of int8's values; the first row and vector are of the largest."""
    generator = torch.Generator().manual_seed(n)
    shapes = (rows, 2 * n), (vectors * LANES, 2 * n)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int16, generator=generator) for shape in shapes)
    a[0], b[:LANES] = -127, -127
    return a, b


@pytest.mark.parametrize("row", [LANES, 37])
def test_rows_of_int8_are_interleaved_as_pairs(row: int) -> None:
    x = torch.arange(2 + LANES * row).mul(37).to(torch.int8)
    out = np.full(2 + LANES * LANES // 2, 123, np.int32)
    interleaved(x.numpy(), row, out)
    expected = words(x[2:].view(LANES, row)[:, :LANES].to(torch.int16).contiguous()).T
    assert np.array_equal(out[1:-1].reshape(LANES // 2, LANES), expected)
    assert out[0] == out[-1] == 123


@numba.njit
def interleaved(x: Any, row: int, out: Any) -> None:
    dot_tiles.interleave(x, 2, row, out, 1)


def digest() -> str:
    made = []
    for a, b in (case(torch.bfloat16, ROWS, 64, 4), int16_case(INT_ROWS, 64, 4)):
        c = np.empty((len(a), 4, LANES), np.int32 if a.dtype == torch.int16 else np.float32)
        products(as_rows(a), as_tile_reads(b), c, True, True, len(a))
        made.append(c.tobytes().hex())
    return " ".join(made)


@pytest.mark.parametrize("features", ["", "+avx2,+fma"])
def test_bits_do_not_depend_on_the_processor(features: str) -> None:
    """Without the instruction for pairs, without wide registers, without fused multiply-add even."""
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    code = "from tests.test_kernels_dot_tiles import digest; print(digest())"
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True).stdout
    assert said.strip() == digest()
