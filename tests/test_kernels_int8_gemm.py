"""INT8 products: the twin's bits, whatever the tile, the split, the form of the loads and the neighbours."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import aot, int8_gemm, reference, tiles
from kernels.cpu import ShapeError
from kernels.int8_gemm import int8_linear
from kernels.language import NO_FUSION
from kernels.tiles import Tile, dense_tile
from tests.kernel_cases import DEVICE, poisoned_outputs, random, random_int8

# Small, so that ragged shapes have several tiles in each direction within the interpreter's patience.
DENSE = Tile(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=3, group_m=2)
DECODE = Tile(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3, swapped=True)
SMALL_TILES = {"dense": DENSE, "decode": DECODE, "split": replace(DECODE, split_k=4)}

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(m: int, n: int, k: int) -> Operands:
    x_scale, weight_scale = random(m, seed=3).abs() / 100, random(n, seed=4).abs() / 100
    return random_int8(m, k, seed=1), x_scale, random_int8(n, k, seed=2), weight_scale, random(n, seed=5)


def expected(x: Operands, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x_int8, x_scale, weight, weight_scale, bias = (tensor.cpu() for tensor in x)
    return reference.int8_linear(x_int8, x_scale, weight, weight_scale, bias, out_dtype)


@pytest.mark.parametrize("tile", SMALL_TILES.values(), ids=SMALL_TILES)
@pytest.mark.parametrize(("m", "n", "k"), [(37, 96, 80), (1, 65, 33), (40, 130, 144), (16, 64, 1)])
def test_every_path_equals_the_twin(tile: Tile, m: int, n: int, k: int) -> None:
    x = operands(m, n, k)
    with poisoned_outputs():
        # float32 shows the order of the scales' two roundings, which bfloat16 mostly hides.
        out = int8_linear(*x, out_dtype=torch.float32, tile=tile)
    assert torch.equal(out.cpu(), expected(x, torch.float32))


@pytest.mark.parametrize(("m", "n", "k"), [(7, 96, 2080), (65, 64, 48), (130, 129, 256)])
def test_the_tiles_of_the_table_equal_the_twin(m: int, n: int, k: int) -> None:
    x = operands(m, n, k)
    with poisoned_outputs():
        out = int8_linear(*x)
    assert torch.equal(out.cpu(), expected(x))


@pytest.mark.parametrize("capability", [90, 80])
def test_descriptors_and_pointers_give_the_same_bits(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = []
    real = int8_gemm._tma_reads

    def noted(*tensors: Tensor) -> bool:
        forms.append(real(*tensors))
        return forms[-1]

    monkeypatch.setattr(int8_gemm, "_tma_reads", noted)
    if capability == 80:
        monkeypatch.setattr(int8_gemm, "_card", lambda device: (80, 108))
    x = operands(37, 96, 80)
    for tile in SMALL_TILES.values():
        assert torch.equal(int8_linear(*x, tile=tile).cpu(), expected(x))
    # On a card older than Hopper there is nothing but pointers.
    hopper = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    assert forms == [capability == 90 and hopper] * len(SMALL_TILES)


def test_one_program_takes_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    capability, _ = int8_gemm._card(torch.empty(0, device=DEVICE).device)
    monkeypatch.setattr(int8_gemm, "_card", lambda device: (capability, 2))
    x = operands(70, 130, 80)
    with poisoned_outputs():
        out = int8_linear(*x, tile=DENSE)
    assert torch.equal(out.cpu(), expected(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", SMALL_TILES.values(), ids=SMALL_TILES)
def test_without_bias_in_every_dtype(tile: Tile, dtype: torch.dtype) -> None:
    x, x_scale, weight, weight_scale, _ = operands(5, 70, 80)
    with poisoned_outputs():
        out = int8_linear(x, x_scale, weight, weight_scale, out_dtype=dtype, tile=tile)
    assert out.dtype == dtype
    want = reference.int8_linear(x.cpu(), x_scale.cpu(), weight.cpu(), weight_scale.cpu(), out_dtype=dtype)
    assert torch.equal(out.cpu(), want)


@pytest.mark.parametrize("tile", SMALL_TILES.values(), ids=SMALL_TILES)
def test_sums_that_float32_cannot_hold_are_exact(tile: Tile) -> None:
    k = 4112  # of products near 112**2: three times 2**24
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(96, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (3, 64))
    x[1], x[2], weight[5] = -x[0], 0, -128
    ones = torch.ones(64)
    tile = replace(tile, block_k=512)
    x, weight, ones = x.to(DEVICE), weight.to(DEVICE), ones.to(DEVICE)
    out = int8_linear(x, ones[:3], weight, ones, out_dtype=torch.float32, tile=tile)
    exact = x.cpu().long() @ weight.cpu().long().t()
    assert int(exact.abs().max()) > 2**24
    assert torch.equal(out.cpu(), exact.to(torch.float32))


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-40])
def test_extreme_scales(value: float) -> None:
    x, x_scale, weight, weight_scale, bias = operands(4, 64, 48)
    extreme = x, torch.full_like(x_scale, value), weight, weight_scale, bias
    for tile in SMALL_TILES.values():
        assert torch.equal(int8_linear(*extreme, tile=tile).cpu(), expected(extreme))


def test_a_row_has_the_same_bits_in_any_company() -> None:
    x, x_scale, weight, weight_scale, bias = operands(70, 96, 272)

    def rows(chosen: slice | Tensor, tile: Tile | None = None) -> Tensor:
        return int8_linear(x[chosen], x_scale[chosen], weight, weight_scale, bias, tile=tile)

    among_others = rows(slice(None))
    assert dense_tile(90, 132, 70, 96, 272).block_m != dense_tile(90, 132, 1, 96, 272).block_m
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(rows(order), among_others[order])
    for row in (0, 69):
        one = slice(row, row + 1)
        for tile in (None, *SMALL_TILES.values()):
            assert torch.equal(rows(one, tile), among_others[one])


@pytest.mark.parametrize("start", [16, 3], ids=["aligned for TMA", "not aligned"])
def test_rows_may_be_strided(start: int) -> None:
    x, x_scale, weight, weight_scale, bias = operands(20, 64, 96)
    part = slice(start, start + 64)
    strided = x[:, part], x_scale, weight[:, part], weight_scale, bias
    assert torch.equal(int8_linear(*strided, tile=DENSE).cpu(), expected(strided))


def test_no_rows_make_no_rows() -> None:
    x = operands(0, 64, 48)
    assert int8_linear(*x).shape == (0, 64)


@pytest.mark.parametrize("broken", ["k", "x_scale", "weight_scale", "bias", "strides", "wide"])
def test_tensors_that_do_not_fit(broken: str) -> None:
    x, x_scale, weight, weight_scale, bias = operands(4, 64, 48)
    if broken == "k":
        weight = weight[:, :32]
    elif broken == "x_scale":
        x_scale = x_scale[:3]
    elif broken == "weight_scale":
        weight_scale = weight_scale[:1]
    elif broken == "bias":
        bias = bias[:1]
    elif broken == "strides":
        x = x.t().contiguous().t()
    else:
        x, weight = (torch.empty(t.shape[0], 133_153, dtype=torch.int8, device=DEVICE) for t in (x, weight))
    with pytest.raises(ShapeError, match="int8_linear"):
        int8_linear(x, x_scale, weight, weight_scale, bias)


@pytest.mark.parametrize(
    ("m", "n", "k", "rows", "features", "split_k"),
    [
        (1, 4096, 4096, 16, 64, 2),  # 64 tiles, 132 multiprocessors
        (17, 1024, 4096, 32, 64, 4),  # 16 tiles would take 8 programs each, but K has columns for 4
        (64, 14336, 4096, 64, 64, 1),
        (128, 4096, 4096, 64, 64, 1),  # 128 tiles, one each
        (512, 4096, 4096, 128, 128, 1),  # 128 tiles, one each, where 64 of 128 x 256 leave half the card idle
        (4096, 4096, 4096, 128, 256, 1),
    ],
)
def test_the_tile_of_a_shape(m: int, n: int, k: int, rows: int, features: int, split_k: int) -> None:
    tile = dense_tile(90, 132, m, n, k)
    assert (tile.block_m, tile.block_n, tile.split_k) == (rows, features, split_k)
    assert tile.swapped == (tile.block_m <= 64)


SCALES = dict.fromkeys(("x_scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32")
SIZES = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om"), "i32")


def product_case(tile: Tile, capability: int, tma: bool) -> aot.Case:
    """Return the kernel that `int8_linear` launches for `tile`, with the widest epilogue."""
    types = {
        "x": f"tensordesc<i8[{tile.block_m},{tile.block_k}]>" if tma else "*i8",
        "weight": f"tensordesc<i8[{tile.block_n},{tile.block_k}]>" if tma else "*i8",
        "out_ptr": "*i32" if tile.split_k > 1 else "*bf16",
        **SCALES,
        **SIZES,
    }
    constants: dict[str, Any] = {"HAS_BIAS": True, "TMA": tma}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    if tile.swapped:
        types["k_per_split"] = "i32"
        constants["SPLIT_K"] = tile.split_k
    else:
        constants["GROUP_M"] = tile.group_m
    return aot.Case(
        kernel="kernels.int8_gemm:" + ("_int8_decode_kernel" if tile.swapped else "_int8_linear_kernel"),
        types=types,
        constants=constants,
        aligned=sorted({*types} - {"M"} - ({"x", "weight"} if tma else set())),
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=NO_FUSION,
    )


def table(capability: int, tma: bool) -> dict[str, tuple[Tile, aot.Case]]:
    """Return every tile that a card can choose, and one of them split."""
    decode, dense = {
        90: (tiles.DECODE_SM90, tiles.DENSE_SM90),
        80: (tiles.DECODE_SM80, tiles.DENSE_SM80),
    }[capability]
    once = list(dict.fromkeys((*decode.values(), *dense)))
    form = "descriptors" if tma else "pointers"
    return {
        f"sm_{capability} {tile.block_m}x{tile.block_n}x{tile.block_k}/{tile.split_k} {form}": (
            tile,
            product_case(tile, capability, tma),
        )
        for tile in (*once, replace(once[0], split_k=2))
    }


SUM = "the sum of the splits"
SUM_CASE = aot.Case(
    kernel="kernels.int8_gemm:_sum_splits_kernel",
    types={"partial_ptr": "*i32", "out_ptr": "*bf16", "M": "i32", "N": "i32", "stride_om": "i32", **SCALES},
    constants={"HAS_BIAS": True, "SPLIT_K": 8, "BLOCK_N": int8_gemm._SUM_BLOCK},
    aligned=["partial_ptr", "out_ptr", "N", "stride_om", *SCALES],
    options=NO_FUSION,
)
CASES = table(90, tma=True) | table(80, tma=False)
FALLBACK_CASES = table(90, tma=False)
"""For weights whose rows do not start at multiples of 16 bytes, which no model of today has."""


@functools.cache
def machine_code(fallback: bool) -> dict[str, aot.MachineCode]:
    """Return what one group of cases compiles to."""
    cases = {name: case for name, (_, case) in (FALLBACK_CASES if fallback else CASES).items()}
    cases |= {} if fallback else {SUM: SUM_CASE}
    return dict(zip(cases, aot.compile_cases(list(cases.values())), strict=True))


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in FALLBACK_CASES)])
def test_machine_code(name: str) -> None:
    tile, case = (CASES | FALLBACK_CASES)[name]
    code = machine_code(name in FALLBACK_CASES)[name]
    multiply = "IGMMA" if case.capability == 90 else "IMMA"
    load = "UTMALDG" if case.constants["TMA"] else "LDGSTS"
    assert code.faults(case.capability, multiply, load) == []
    if case.capability == 80:
        assert code.shared_bytes <= 99 * 1024  # sm_86, sm_89 and sm_120 run these too
    # A multiprocessor has 65,536 registers and 228 KB, 1 KB of which goes to each program.
    assert tile.programs_per_sm * code.registers * tile.num_warps * 32 <= 65536
    assert tile.programs_per_sm * (code.shared_bytes + 1024) <= 228 * 1024


def test_machine_code_of_the_sum() -> None:
    code = machine_code(False)[SUM]
    assert code.faults(90, "LDG", "STG") == []
