"""The row kernels against their plain twins on ragged and extreme rows; the same bits in any company; machine code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import aot, quantize, reference
from kernels.cpu import ShapeError
from tests.kernel_cases import DEVICE, poisoned_outputs, random

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = {torch.float32: (1e30, 1e-42), torch.bfloat16: (1e30, 1e-34), torch.float16: (1e4, 1e-6)}
"""Of a huge row and a tiny one, subnormal where the interpreter can: it reads subnormal bfloat16 as other numbers."""

# An infinity is what these tests are after, and numpy tells of each.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def rows(t: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return [t, k] activations with an outlier column and, with room, a zero, a huge, a tiny and a constant row."""
    x = random(t, k, seed=seed)
    x[:, k // 2] *= 60
    huge, tiny = SCALES[dtype]
    for row, value in ((1, 0.0), (2, huge / 300), (4, tiny)):
        if t > row:
            x[row] *= value
    if t > 5:
        x[5] = 3.0
    return x.to(dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep over rows wider than 64 columns, 32 at once, as if they were wider than 16,384."""
    monkeypatch.setattr(quantize, "MAX_BLOCK", 64)
    monkeypatch.setattr(quantize, "_SWEPT_BLOCK", 32)


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Compare values, but count a NaN as itself."""
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


def assert_within_a_tie(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float) -> None:
    """Compare scales to `rtol`, and let a value differ by one step where its row moves by as much.

    A quotient of up to 127 that moves by 127 * rtol crosses a tie with that probability; one value more is chance.
    """
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=rtol, atol=1e-44)
    difference = (got[0].cpu().int() - expected[0].int()).abs()
    assert difference.max() <= 1
    assert difference.sum() <= 1 + difference.numel() * 2 * 127 * rtol


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "k"), [(1, 1), (7, 37), (6, 64), (3, 80), (9, 96)])
def test_quantize_rows_is_its_twin(t: int, k: int, dtype: torch.dtype) -> None:
    x = rows(t, k, dtype)
    with poisoned_outputs():
        got = quantize.quantize_rows(x)
    # The twin on the processor: torch on a card divides by 127 as it multiplies by 1 / 127.
    assert_same_bits(got, reference.quantize_rows(x.cpu()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [65, 96, 100])
def test_a_row_wider_than_the_registers_is_swept_twice(k: int) -> None:
    x = rows(6, k, torch.float32)
    x[3, k - 1] = 1e4  # the absmax in the last, ragged step
    with poisoned_outputs():
        got = quantize.quantize_rows(x)
    assert_same_bits(got, reference.quantize_rows(x.cpu()))


def test_ties_go_to_the_even_neighbour() -> None:
    ties = torch.arange(-127, 127) + 0.5
    x = torch.cat([ties, torch.tensor([127.0])])[None].to(DEVICE)
    x_int8, x_scale = quantize.quantize_rows(x)
    assert x_scale.item() == 1
    assert torch.equal(x_int8[0, :-1].cpu(), torch.round(ties).to(torch.int8).clamp(-127, 127))


def test_a_quotient_above_127_does_not_wrap() -> None:
    """A subnormal absmax loses digits in its scale: 190 / 127 = 1.496 becomes 1, and the quotient 190."""
    x = torch.tensor([[190.0, -190.0, 63.0, 0.0]]).mul(2.0**-149).to(DEVICE)
    x_int8, x_scale = quantize.quantize_rows(x)
    assert x_scale.item() == 2.0**-149
    assert x_int8.tolist() == [[127, -127, 63, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_in_the_scale_and_in_its_row(value: float) -> None:
    x = random(3, 40)
    x[1, 7] = value
    x_int8, x_scale = quantize.quantize_rows(x)
    assert x_scale.isfinite().tolist() == [True, False, True]
    expected_int8, expected_scale = reference.quantize_rows(x.cpu())
    assert_same_bits((x_int8[::2], x_scale), (expected_int8[::2], expected_scale))


def test_rows_may_lie_apart() -> None:
    wide = random(5, 96)
    assert_same_bits(quantize.quantize_rows(wide[:, 16:53]), reference.quantize_rows(wide[:, 16:53].cpu()))


def test_division_by_the_reciprocal_is_division() -> None:
    """What `divide` does on a card, step by step in float64, where each product of two float32 is exact."""

    def rounded(x: Tensor) -> Tensor:
        return x.float().double()

    generator = torch.Generator().manual_seed(0)
    for exponent in (-149, -130, -101, -99, 0, 100, 120):
        absmax = (torch.rand(40_000, generator=generator) + 1) * 2.0**exponent * 127
        scale = (absmax / 127).clamp(min=2.0**-149)
        halves = torch.randint(-254, 255, scale.shape, generator=generator) / 2
        x = torch.where(torch.rand(scale.shape, generator=generator) < 0.5, scale * halves, absmax * torch.rand(1))
        lift = torch.where(scale < 2.0**-100, 2.0**60, 1.0).double()
        divisor, lifted = scale.double() * lift, x.double() * lift
        reciprocal = rounded(1 / divisor)
        quotient = rounded(lifted * reciprocal)
        for _ in range(2):
            remainder = rounded(lifted - quotient * divisor)
            quotient = rounded(remainder * reciprocal + quotient)
        expected = x / scale
        visible = expected.abs() > 0.25  # of less, nothing is left after rounding
        assert torch.equal(quotient[visible].float(), expected[visible])
        assert torch.equal(torch.round(quotient.float()), torch.round(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("t", "d"), [(1, 16), (7, 48), (6, 80), (3, 128)])
def test_rms_norm_quantize_is_its_twin(t: int, d: int, with_residual: bool, dtype: torch.dtype) -> None:
    # Squares above 1.8e19 overflow float32, on the processor's kernel too.
    x = rows(t, d, dtype).clamp(-1e4, 1e4)
    residual = random(t, d, seed=1, dtype=dtype) if with_residual else None
    weight = random(d, seed=2).sigmoid().to(dtype)
    with poisoned_outputs():
        x_int8, x_scale, total = quantize.rms_norm_quantize(x, residual, weight, 1e-5)
    on_processor = None if residual is None else residual.cpu()
    *expected, expected_sum = reference.rms_norm_quantize(x.cpu(), on_processor, weight.cpu(), 1e-5)
    assert torch.equal(total.cpu(), expected_sum)
    # A tree over d <= 128 squares rounds 7 times, then mean, eps, root, reciprocal, two products, absmax / 127.
    assert_within_a_tie((x_int8, x_scale), (expected[0], expected[1]), rtol=(7 + 7) * 2**-24)


def test_without_a_residual_the_stream_is_what_came() -> None:
    x = random(2, 32)
    assert quantize.rms_norm_quantize(x, None, x[0].contiguous(), 1e-6)[2] is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamped", [(), (1.702, 7.0), (1.0, 0.5)])
@pytest.mark.parametrize(("t", "f"), [(1, 1), (7, 37), (6, 96)])
def test_swiglu_quantize_is_its_twin(t: int, f: int, clamped: tuple[float, ...], dtype: torch.dtype) -> None:
    gate_up = random(t, 2 * f, seed=3, scale=6.0, dtype=dtype)
    if t > 5:
        gate_up[1] = 0
        gate_up[2, :2] = torch.tensor([-6e4, 6e4])  # the exponential overflows, and vanishes
        gate_up[3] *= 1e-4
    with poisoned_outputs():
        got = quantize.swiglu_quantize(gate_up, *clamped)
    # exp(-x) of |x| up to 30 * 1.7: 2 units for ex2, and the rounded exponent times 51; sum, quotient, products: 5.
    assert_within_a_tie(got, reference.swiglu_quantize(gate_up.cpu(), *clamped), rtol=(2 + 51 + 5) * 2**-23)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("clamped", [(), (1.702, 7.0)])
@pytest.mark.parametrize("f", [65, 100])
def test_a_gated_row_wider_than_the_registers_is_swept_twice(f: int, clamped: tuple[float, ...]) -> None:
    gate_up = random(4, 2 * f, scale=3.0)
    gate_up[2, f - 1], gate_up[2, -1] = 6.9, 6.9  # the absmax in the last, ragged step
    with poisoned_outputs():
        got = quantize.swiglu_quantize(gate_up, *clamped)
    assert_within_a_tie(got, reference.swiglu_quantize(gate_up.cpu(), *clamped), rtol=(2 + 51 + 5) * 2**-23)


def test_a_clamp_hides_no_nan() -> None:
    gate_up = random(3, 64)
    gate_up[0, 5], gate_up[1, 40] = float("nan"), float("nan")
    assert quantize.swiglu_quantize(gate_up, 1.702, 7.0)[1].isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_among_any_others(dtype: torch.dtype) -> None:
    x, residual = rows(11, 96, dtype).clamp(-1e4, 1e4), random(11, 96, seed=1, dtype=dtype)
    weight = random(96, seed=2)
    kernels: list[Callable[[Tensor], tuple[Tensor, ...]]] = [
        lambda some: quantize.quantize_rows(x[some]),
        lambda some: quantize.rms_norm_quantize(x[some], residual[some], weight, 1e-5),
        lambda some: quantize.swiglu_quantize(x[some]),
        lambda some: quantize.swiglu_quantize(x[some], 1.702, 7.0),
    ]
    for kernel in kernels:
        whole = kernel(torch.arange(11))
        for some in (
            torch.arange(1),
            torch.tensor([7]),
            torch.randperm(11, generator=torch.Generator().manual_seed(4)),
        ):
            for part, every in zip(kernel(some), whole, strict=True):
                assert torch.equal(part, every[some.to(every.device)])


def test_a_view_of_some_rows_has_the_same_bits() -> None:
    """Rows further on in memory, and whatever stride a single row claims."""
    x, weight = rows(9, 48, torch.bfloat16).clamp(-1e4, 1e4), random(48)
    whole = quantize.rms_norm_quantize(x, None, weight, 1e-5)
    for part, every in zip(quantize.rms_norm_quantize(x[7:8], None, weight, 1e-5), whole, strict=True):
        assert torch.equal(part, every[7:8])


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_the_tile_changes_no_bit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(6, 128, torch.float32)
    expected = quantize.quantize_rows(x), quantize.swiglu_quantize(x)
    monkeypatch.setattr(quantize, "tile", lambda columns: (block, 1))
    for got, want in zip((quantize.quantize_rows(x), quantize.swiglu_quantize(x)), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_no_rows_make_no_rows() -> None:
    empty, weight = torch.empty(0, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    shapes = [
        [list(part.shape) for part in parts]
        for parts in (
            quantize.quantize_rows(empty),
            quantize.rms_norm_quantize(empty, empty, weight, 1e-5),
            quantize.swiglu_quantize(empty),
        )
    ]
    assert shapes == [[[0, 32], [0]], [[0, 32], [0], [0, 32]], [[0, 16], [0]]]


def test_what_does_not_fit_is_refused() -> None:
    x = random(4, 32)
    refused: list[Callable[[], object]] = [
        lambda: quantize.quantize_rows(x[:, ::2]),
        lambda: quantize.quantize_rows(x[:, :0]),
        lambda: quantize.swiglu_quantize(x[:, :31]),
        lambda: quantize.rms_norm_quantize(x[:, :16], None, x[0, :16], 1e-5),
        lambda: quantize.rms_norm_quantize(x, x[:3], x[0], 1e-5),
        lambda: quantize.rms_norm_quantize(x, None, x[0, :16], 1e-5),
        lambda: quantize.rms_norm_quantize(random(2, 24), None, random(24), 1e-5),
        lambda: quantize.rms_norm_quantize(random(1, 16400), None, random(16400), 1e-5),
    ]
    for call in refused:
        with pytest.raises(ShapeError, match="quantize"):
            call()
    with pytest.raises(ValueError, match="limit"):
        quantize.swiglu_quantize(x, alpha=1.0)


POINTERS = {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32"}


def case(kernel: str, width: int, capability: int, dtype: str = "bf16") -> aot.Case:
    """Return how `kernel` is launched for rows of `width` columns."""
    block, num_warps = quantize.tile(width)
    activations = f"*{dtype}"
    types, constants = {
        "quantize_rows": ({"x_ptr": activations, "stride_xt": "i32"}, {"K": width}),
        "rms_norm_quantize": (
            dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "sum_ptr"), activations) | {"eps": "fp32"},
            {"D": width},
        ),
        "swiglu_quantize": (
            {"gate_up_ptr": activations, "stride_xt": "i32", "alpha": "fp32", "limit": "fp32"},
            {"F": width, "CLAMPED": True},
        ),
    }[kernel]
    return aot.Case(
        kernel=f"kernels.quantize:_{kernel}_kernel",
        types=types | POINTERS,
        constants=constants | {"BLOCK": block},
        aligned=[name for name in types | POINTERS if name.endswith("_ptr") or name == "stride_xt"],
        capability=capability,
        num_warps=num_warps,
        options={"enable_fp_fusion": False},
    )


KERNELS = ["quantize_rows", "rms_norm_quantize", "swiglu_quantize"]
CASES = {
    (kernel, width, capability): case(kernel, width, capability)
    for kernel, width, capability in [
        *((kernel, 4096, capability) for kernel in KERNELS for capability in (90, 80)),
        ("quantize_rows", 16384, 90),
        ("rms_norm_quantize", 16384, 90),
        ("swiglu_quantize", 18944, 90),
    ]
}


@pytest.fixture(scope="module")
def codes() -> dict[tuple[str, int, int], aot.MachineCode]:
    return dict(zip(CASES, aot.compile_cases(list(CASES.values())), strict=True))


@pytest.mark.parametrize("key", CASES, ids=str)
def test_the_machine_code_has_no_faults(
    key: tuple[str, int, int], codes: dict[tuple[str, int, int], aot.MachineCode]
) -> None:
    code = codes[key]
    assert code.faults(key[2], "REDUX") == []
    # Two thousand threads, a full multiprocessor, for all but the widest rows.
    assert code.registers <= (64 if key[1] == 4096 else 128)


@pytest.mark.parametrize(("kernel", "loads"), [("quantize_rows", 2), ("rms_norm_quantize", 6), ("swiglu_quantize", 4)])
def test_a_row_is_read_once(kernel: str, loads: int, codes: dict[tuple[str, int, int], aot.MachineCode]) -> None:
    """4096 columns on 8 warps are 16 a thread: two loads of 16 bytes from each bfloat16 tensor."""
    assert codes[kernel, 4096, 90].instructions["LDG"] == loads


def test_division_costs_no_call_a_column(codes: dict[tuple[str, int, int], aot.MachineCode]) -> None:
    """div.rn would bring an FCHK and an MUFU for each of 32 columns a thread, 33 and 34 in all."""
    instructions = codes["quantize_rows", 16384, 90].instructions
    assert instructions["FCHK"] <= 2
    assert instructions["MUFU"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
def test_the_machine_code_at_every_width_has_no_faults(capability: int) -> None:
    cases = [
        case(kernel, width, capability, dtype)
        for kernel in KERNELS
        for width in (16, 512, 1024, 2048, 7168, 16384, 18944)
        for dtype in ("bf16", "fp32")
        if (kernel, width) != ("rms_norm_quantize", 18944)
    ]
    for launched, code in zip(cases, aot.compile_cases(cases), strict=True):
        assert code.faults(capability) == [], launched
