"""INT8 products through pairs of int16 against their plain twin: exact on ragged and extreme shapes, on any threads."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import cpu, int16_pairs, reference

SHAPES = [(1, 1, 1), (1, 576, 960), (3, 15, 16), (4, 16, 15), (5, 17, 33), (65, 64, 48), (131, 1537, 65), (2, 4096, 7)]


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_is_its_twin(t: int, k: int, n: int, threads: int) -> None:
    x, weight = int8(t, k), int8(n, k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = int16_pairs.matmul(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, reference.int8_matmul(x, weight))
    assert got.is_contiguous()


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_int32_are_exact(sign: int) -> None:
    x = torch.full((5, cpu.MAX_IN_FEATURES), 127, dtype=torch.int8)
    weight = torch.full((17, cpu.MAX_IN_FEATURES), sign * 127, dtype=torch.int8)
    assert (int16_pairs.matmul(x, weight) == sign * 127**2 * cpu.MAX_IN_FEATURES).all()


def test_columns_of_wider_rows_are_read_as_such() -> None:
    x, weight = int8(9, 80)[:, 3:67], int8(40, 80)[:, 5:69]
    assert torch.equal(int16_pairs.matmul(x, weight), reference.int8_matmul(x, weight))


@pytest.mark.parametrize(("t", "n"), [(0, 24), (3, 0)])
def test_no_rows_and_no_columns_have_no_products(t: int, n: int) -> None:
    assert int16_pairs.matmul(int8(t, 32), int8(n, 32)).shape == (t, n)


def digest() -> str:
    return int16_pairs.matmul(int8(7, 200), int8(50, 200)).numpy().tobytes().hex()


def test_it_is_exact_without_the_instruction() -> None:
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    code = "from tests.test_kernels_int16_pairs import digest; print(digest())"
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True).stdout
    assert said.strip() == digest()
