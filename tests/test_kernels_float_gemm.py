"""Products of floats whose rows have their own bits, the tokens read off them, and norms, against their twins."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import aot, float_gemm, norm, reference
from kernels.cpu import ShapeError
from tests.kernel_cases import DEVICE, matmul_row_by_row, poisoned_outputs, quick_interpreter, random

TILES = {"bf16": float_gemm.FLOAT_TILE, "fp32": float_gemm.FLOAT32_TILE}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hang over every edge with few values, where numpy computes."""
    if DEVICE == "cpu":
        for name in ("FLOAT_TILE", "FLOAT32_TILE"):
            tile = getattr(float_gemm, name) | {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
            monkeypatch.setattr(float_gemm, name, tile)
    with quick_interpreter():
        yield


def bound(x: Tensor, weight: Tensor) -> float:
    """Return what a float32 sum of K products may be off by: K roundings of 2**-24 of the largest sum of magnitudes."""
    return float((x.double().abs() @ weight.double().abs()).max()) * (x.shape[-1] + 1) * 2**-24


@pytest.mark.parametrize(("z", "m", "k", "n"), [(1, 1, 16, 1), (1, 37, 40, 70), (3, 5, 33, 20)])
def test_row_matmul_is_its_twin_in_any_layout(z: int, m: int, k: int, n: int) -> None:
    x, weight = random(z, m, k), random(z, n, k, seed=1).transpose(1, 2)
    for layout in (weight, weight.contiguous()):
        with poisoned_outputs():
            got = float_gemm.row_matmul(x, layout)
        torch.testing.assert_close(
            got.cpu(), reference.row_matmul(x.cpu(), weight.cpu()), rtol=0, atol=bound(x, weight)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_to_the_weights(dtype: torch.dtype) -> None:
    x, weight = random(19, 48, scale=300.0), random(33, 48, seed=1, dtype=dtype)
    x[0, 0] = 1e6  # past float16's largest number
    rounded = x.clamp(-65504, 65504).half() if dtype == torch.float16 else x.to(dtype)
    right = reference.row_matmul(rounded.float().cpu(), weight.float().t().cpu())
    got = float_gemm.float_linear(x, weight)
    torch.testing.assert_close(got.cpu(), right, rtol=0, atol=bound(rounded, weight.t()))


def test_a_row_keeps_its_bits_whatever_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Let the interpreter multiply without BLAS, where a row's bits depend on its place.
    monkeypatch.setattr(np, "matmul", matmul_row_by_row)
    x, weight = random(40, 48), random(33, 48, seed=1)
    whole = float_gemm.float_linear(x, weight)
    for rows in (slice(3, 4), slice(7, 29)):
        assert torch.equal(float_gemm.float_linear(x[rows], weight), whole[rows])


def test_the_likeliest_token_is_the_twins() -> None:
    hidden, head = random(9, 32), random(50, 32, seed=1)
    head[11] = head[40] = head[3]
    hidden[0] = 9 * head[3]  # a tie of three: the lowest id wins
    allowed = torch.rand(9, 50, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.2
    allowed[:, 7] = True
    for mask in (None, allowed):
        got = float_gemm.argmax_token(hidden, head, mask)
        assert (
            got.tolist()
            == reference.argmax_token(hidden.cpu(), head.cpu(), None if mask is None else mask.cpu()).tolist()
        )
    assert int(float_gemm.argmax_token(hidden, head)[0]) == 3
    ids = torch.tensor([5, 49, 0], device=DEVICE)
    right = reference.row_matmul(hidden.cpu(), head[ids].t().cpu())
    torch.testing.assert_close(
        float_gemm.token_logits(hidden, head, ids).cpu(), right, rtol=0, atol=bound(hidden, head.t())
    )


@pytest.mark.parametrize("shape", [(1, 16), (5, 3, 48), (7, 576)])
def test_rms_norm_is_its_twin(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(shape[-1], seed=1)
    with poisoned_outputs():
        got = norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got.cpu(), reference.rms_norm(x.cpu(), weight.cpu(), 1e-5), rtol=2e-6, atol=1e-6)
    strided = torch.stack([x, x], dim=-2)[..., 1, :]
    assert torch.equal(norm.rms_norm(strided, weight, 1e-5), got)


def test_nothing_is_nothing_and_what_does_not_fit_is_refused() -> None:
    x, weight = random(3, 32), random(5, 32)
    assert float_gemm.float_linear(x[:0], weight).shape == (0, 5)
    assert norm.rms_norm(x[:0], x[0], 1e-5).shape == (0, 32)
    for other in (weight[:, :16].t(), weight.half().t(), weight[None].transpose(1, 2)):
        with pytest.raises(ShapeError, match="row_matmul"):
            float_gemm.row_matmul(x, other)
    for wrong in (x[:, :24], x[:, :16]):
        with pytest.raises(ShapeError, match="rms_norm"):
            norm.rms_norm(wrong, x[0, : wrong.shape[1] + 8], 1e-5)


def machine_case(card: int, dtype: str, linear: bool = True) -> aot.Case:
    """Return how a layer's product is launched, [T, 4096] by [4096, 4096]; or one with rows of weight in features."""
    tile = dict(TILES[dtype])
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "out_ptr": "*fp32"}
    sizes = ["N", "K", "stride_xz", "stride_xm", "stride_wz", "stride_wn" if linear else "stride_wk"]
    return aot.Case(
        kernel="kernels.float_gemm:_matmul_kernel",
        types=pointers | dict.fromkeys([*sizes, "M"], "i32"),
        constants=tile | {"stride_wk" if linear else "stride_wn": 1},
        aligned=[*pointers, *sizes],
        capability=card,
        num_warps=num_warps,
        num_stages=num_stages,
    )


@pytest.mark.parametrize("card", [90, 80])
def test_machine_code(card: int) -> None:
    cases = [machine_case(card, "bf16"), machine_case(card, "fp32"), machine_case(card, "fp32", linear=False)]
    for case, code in zip(cases, aot.compile_cases(cases), strict=True):
        product = "FFMA" if case.types["x_ptr"] == "*fp32" else "HGMMA" if card == 90 else "HMMA"
        assert code.faults(card, product) == [], (case.types, code)
