"""What training does to rows between products: gradients are their twins' in float64, bfloat16 is float32 rounded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import rowwise, training
from kernels.compiled import memory

SHAPES = [(0, 8), (1, 1), (3, 7), (63, 576), (64, 33), (65, 16), (301, 96)]
ROUNDING = 2.0**-24


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is not written be seen."""
    like, empty = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda x: like(x).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def drawn(t: int, n: int, scale: float = 1.0) -> Tensor:
    torch.manual_seed(t * 10_000 + n)
    return torch.randn(t, n) * scale


@pytest.mark.parametrize(("t", "d"), SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradient_of_a_norm_is_its_twin(t: int, d: int, scale: float) -> None:
    x, weight, grad = drawn(t, d, scale), drawn(1, d)[0] + 2, drawn(t, d) - 0.5
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    normed = exact_x * torch.rsqrt(exact_x.square().mean(dim=-1, keepdim=True) + 1e-5)
    (normed * exact_weight).backward(grad.double())
    of_x, of_weight = training.rms_norm_gradient(x, weight, 1e-5, grad)
    assert exact_x.grad is not None
    assert exact_weight.grad is not None
    # Of x: a difference of two terms, each of some ten roundings. Of the weight: as many, and a sum of t.
    share = torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + 1e-5)
    size = (grad * weight).double().norm(dim=-1, keepdim=True)
    assert ((of_x - exact_x.grad).abs() <= 16 * ROUNDING * share * size * (1 + normed.detach().abs())).all()
    assert ((of_weight - exact_weight.grad).abs() <= (16 + t) * ROUNDING * (grad * normed).abs().sum(dim=0)).all()


@pytest.mark.parametrize(("t", "f"), SHAPES)
@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])
def test_gradient_of_a_gate_is_its_twin(t: int, f: int, scale: float) -> None:
    gate_up, grad = drawn(t, 2 * f, scale), drawn(t, f)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    (functional.silu(gate) * up).backward(grad.double())
    found = training.swiglu_gradient(gate_up, grad)
    assert exact.grad is not None
    # A dozen roundings; those of 1 - share are times silu. A gate below -87 counts as -87.
    gate, up = gate_up.abs().chunk(2, dim=-1)
    size = grad.abs().repeat(1, 2) * torch.cat([up * (1 + gate), gate], dim=-1)
    assert ((found - exact.grad).abs() <= 16 * ROUNDING * size + 1e-34).all()


@pytest.mark.parametrize(("t", "f"), SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0, 1e30])
def test_in_bfloat16_values_are_those_of_float32_rounded_once(t: int, f: int, scale: float) -> None:
    gate_up, grad = drawn(t, 2 * f, scale).bfloat16(), drawn(t, f).bfloat16()
    assert torch.equal(training.swiglu(gate_up), rowwise.swiglu(gate_up.float()).bfloat16())
    expected = training.swiglu_gradient(gate_up.float(), grad.float()).bfloat16()
    torch.testing.assert_close(training.swiglu_gradient(gate_up, grad), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("t", "heads", "others", "half"), [(0, 1, 0, 4), (1, 1, 0, 1), (5, 3, 2, 4), (65, 12, 3, 32)])
def test_rotated_is_rotation_in_float32_rounded_once(t: int, heads: int, others: int, half: int) -> None:
    x = drawn(t, (heads + others) * 2 * half).bfloat16()
    angles = drawn(t, half, 3.0)
    cos, sin = angles.cos(), angles.sin()
    expected = x.float()
    rowwise.rotate_(expected, cos, sin, heads)
    assert torch.equal(training.rotated(x, cos, sin, heads), expected.bfloat16())
    back = training.rotated(training.rotated(x, cos, sin, heads), cos, -sin, heads)
    torch.testing.assert_close(back.float(), x.float(), rtol=0, atol=3 * 2**-8 * float(x.abs().max()) if t else 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: training.rms_norm_gradient(x, x[0], 1e-5, x.flip(0))[0],
        lambda x: training.rms_norm_gradient(x, x[0], 1e-5, x.flip(0))[1],
        lambda x: training.swiglu_gradient(x, x[:, ::2]),
        lambda x: training.swiglu_gradient(x.bfloat16(), x[:, ::2].bfloat16()),
        lambda x: training.swiglu(x.bfloat16()),
        lambda x: training.rotated(x.bfloat16(), x[:, :8], x[:, 8:16], 3),
    ],
)
def test_bits_do_not_depend_on_the_number_of_threads(call: Callable[[Tensor], Tensor]) -> None:
    x, threads = drawn(301, 576), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call(x)
        torch.set_num_threads(2)
        assert torch.equal(call(x), alone)
    finally:
        torch.set_num_threads(threads)


def test_rows_that_are_not_beside_each_other_are_refused_not_misread() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        memory(drawn(4, 6).t())
