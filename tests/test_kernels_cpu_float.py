"""Float products on a CPU: values rounded to the weights' dtype, sums in float32, a row's bits its own."""

import pytest
import torch

from kernels import cpu
from tests.test_kernels_cpu import rows


@pytest.mark.parametrize("has_product", [True, False])
def test_bfloat16_products_are_the_twins_with_and_without_the_instruction(
    monkeypatch: pytest.MonkeyPatch, has_product: bool
) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16_product", lambda: has_product)
    x, weight = rows(130, 96), torch.randn(41, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.bfloat16().double() @ weight.double().t()
    got = cpu.float_linear(x, weight)
    # The product of bfloat16 values is exact in float32; the sum, or with the instruction the result, is rounded once.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-2)
    if not has_product:
        for some in (slice(3, 4), slice(60, 130), torch.randperm(130)):
            assert torch.equal(cpu.float_linear(x[some], weight), got[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_products_are_of_rounded_values_and_a_row_keeps_its_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1100, 576, generator=generator), torch.randn(301, 576, generator=generator).to(dtype)
    got = cpu.float_linear(x, weight)
    expected = x.to(dtype).double() @ weight.double().t()
    reach = x.to(dtype).double().abs() @ weight.double().abs().t()
    # Any order of summing in float32 is off by K roundings of the sum of magnitudes at most (Higham, section 3.1).
    assert ((got - expected).abs() <= 576 * 2**-24 * reach).all()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for some in (slice(3, 4), slice(60, 130), slice(0, 1023), torch.randperm(1100)):
                assert torch.equal(cpu.float_linear(x[some], weight), got[some])
    finally:
        torch.set_num_threads(before)


def test_what_passes_float16_is_its_largest_value() -> None:
    x, weight = torch.tensor([[1e6, -1e6, 1.0]]), torch.tensor([[1.0, 0.5, 2.0]]).half()
    assert cpu.float_linear(x, weight).tolist() == [[65504 - 32752 + 2.0]]
