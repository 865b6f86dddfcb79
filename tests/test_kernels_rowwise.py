"""Rows between products: each is its plain twin, and its bits are its own whatever stands beside it."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import reference, rowwise

SHAPES = [(0, 16), (1, 1), (3, 7), (5, 576), (130, 1536), (301, 33)]


def drawn(t: int, n: int, scale: float = 1.0) -> Tensor:
    torch.manual_seed(t * 10_000 + n)
    return torch.randn(t, n) * scale


@pytest.mark.parametrize(("t", "n"), SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_quantizing_is_its_twin(t: int, n: int, scale: float) -> None:
    x = drawn(t, n, scale)
    x[1:2] = 0.0
    got, expected = rowwise.quantize_rows(x), reference.quantize_rows(x)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=2**-23, atol=0.0)  # times 1/127 for over 127


def test_the_largest_and_the_smallest_floats_quantize() -> None:
    x = torch.tensor([[3.4e38, -3.4e38, 1.0], [1e-45, 0.0, -1e-45], [-0.0, 0.0, -0.0]])
    values, scale = rowwise.quantize_rows(x)
    assert values[0].tolist() == [127, -127, 0]
    assert values.abs().max() <= 127
    assert scale[2] == 1.0
    assert rowwise.quantize_rows(torch.tensor([[float("nan"), 1.0]]))[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scales_and_bias_come_in_the_order_of_their_twin(dtype: torch.dtype, has_bias: bool) -> None:
    products = torch.randint(-(2**31), 2**31 - 1, (130, 321)).to(torch.int32).to(dtype)
    x_scale, weight_scale, bias = torch.rand(130), torch.rand(321), torch.randn(321)
    expected = products.float() * x_scale[:, None] * weight_scale
    got = rowwise.scaled(products.clone(), x_scale, weight_scale, bias if has_bias else None)
    assert torch.equal(got, expected + bias if has_bias else expected)


@pytest.mark.parametrize(("t", "f"), [(0, 8), (1, 1), (5, 33), (130, 1536)])
@pytest.mark.parametrize("clamped", [(None, None), (1.702, 7.0)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_scaled_and_gated_in_one_pass_to_the_bit(
    t: int, f: int, clamped: tuple[float | None, float | None], has_bias: bool
) -> None:
    products = torch.randint(-(2**20), 2**20, (t, 2 * f), dtype=torch.int32)
    x_scale, weight_scale, bias = torch.rand(t) * 1e-3, torch.rand(2 * f) * 1e-3, torch.randn(2 * f)
    own = bias if has_bias else None
    got = rowwise.scaled_swiglu_quantize(products, x_scale, weight_scale, own, *clamped)
    expected = rowwise.swiglu_quantize(rowwise.scaled(products.clone(), x_scale, weight_scale, own), *clamped)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("gate", [-1e30, -200.0, -87.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 87.5, 200.0, 1e30])
def test_the_gate_holds_at_its_ends(gate: float) -> None:
    exact = torch.nn.functional.silu(torch.tensor(gate, dtype=torch.float64)).item()
    got = rowwise.swiglu(torch.tensor([[gate, 1.0]])).item()
    assert got == pytest.approx(exact, rel=4e-7, abs=abs(gate) * 2e-38 if gate < -87 else 0)


def test_the_gates_error_is_a_few_roundings() -> None:
    gate = torch.linspace(-80, 80, 400_001)[:, None]
    got = rowwise.swiglu(torch.cat([gate, torch.ones_like(gate)], dim=1)).double()
    exact = torch.nn.functional.silu(gate.double())
    assert ((got - exact).abs() <= 4 * 2**-23 * exact.abs()).all()


CALLS: list[Callable[[Tensor], tuple[Tensor, ...]]] = [
    rowwise.quantize_rows,
    lambda x: (rowwise.rms_norm(x, torch.ones(x.shape[1]), 1e-5),),
    lambda x: rowwise.rms_norm_quantize(x, x.flip(1), torch.ones(x.shape[1]), 1e-5),
    lambda x: (rowwise.swiglu(x), rowwise.swiglu(x, 1.702, 7.0)),
    lambda x: rowwise.swiglu_quantize(x),
    lambda x: rowwise.swiglu_quantize(x, 1.702, 7.0),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_rows_bits_are_its_own(call: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """One row is computed by one thread, all of them by several."""
    x = drawn(97, 1152, 3.0)
    whole = call(x)
    for first, last in ((0, 1), (13, 14), (40, 97)):
        for all_rows, some in zip(whole, call(x[first:last]), strict=True):
            assert torch.equal(all_rows[first:last], some)


def test_bits_do_not_depend_on_the_processor() -> None:
    """Compiled for the oldest x86-64 there is, without wide registers or fused multiply-add, bits are the same."""
    code = (
        "import hashlib, torch; from kernels import rowwise; torch.manual_seed(0); x = torch.randn(40, 1152) * 3;"
        "w = torch.rand(1152); made = [*rowwise.quantize_rows(x), rowwise.rms_norm(x, w, 1e-5), rowwise.swiglu(x),"
        "*rowwise.rms_norm_quantize(x, None, w, 1e-5)[:2], *rowwise.swiglu_quantize(x, 1.702, 7.0)];"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in made)).hexdigest())"
    )
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    said = {
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for env in ({**os.environ}, plain)
    }
    assert len(said) == 1, said


@pytest.mark.parametrize(("t", "heads", "d"), [(1, 1, 2), (7, 3, 10), (300, 12, 64)])
def test_rotating_in_place_is_its_twin(t: int, heads: int, d: int) -> None:
    torch.manual_seed(2)
    x, angles = torch.randn(t, (heads + 2) * d), torch.randn(t, d // 2)
    expected = reference.apply_rope(x[:, : heads * d].view(t, heads, d), angles.cos(), angles.sin())
    got = x.clone()
    rowwise.rotate_(got, angles.cos(), angles.sin(), heads)
    torch.testing.assert_close(got[:, : heads * d].view(t, heads, d), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[:, heads * d :], x[:, heads * d :])
