"""The experts' products with INT4 weights beside their plain twin."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.aot import Case, compile_cases
from kernels.cpu import ShapeError
from kernels.grouped_int4 import expert_linear_int4, pair_int4_groups
from kernels.routing import align_tokens
from kernels.tiles import GROUPED_INT4_SM80, GROUPED_INT4_SM90, Tile, grouped_int4_tile
from tests.kernel_cases import DEVICE, poisoned_outputs, random, random_int8
from tests.test_kernels_grouped_gemm import check, cpu, routes

SMALL = Tile(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=3, swapped=True)


def random_int4(experts: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights [E, N, K] in [-8, 7], the same as a checkpoint packs them [E, N, K / 8], and their scales."""
    weight = torch.randint(-8, 8, (experts, n, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    words = ((weight.long() + 8).unflatten(2, (-1, 8)) << torch.arange(0, 32, 4)).sum(dim=3)
    scale = (random(experts, n, k // 32, seed=2).cpu() / 50).to(torch.bfloat16)
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    return weight.to(DEVICE), packed.to(DEVICE), scale.to(DEVICE)


def run(
    x_int8: Tensor, x_scale: Tensor, pairs: tuple[Tensor, Tensor], ids: Tensor, tile: Tile, **options: Any
) -> Tensor:
    with poisoned_outputs():
        blocks = align_tokens(ids, len(pairs[0]), tile.block_m)
        common: dict[str, Any] = {"slots_per_row": ids.numel() // len(x_int8), "tile": tile}
        return expert_linear_int4(x_int8, x_scale, *pairs, *blocks, **{"out_dtype": torch.float32} | common | options)


@pytest.mark.parametrize(
    ("tokens", "per_token", "experts", "n", "k"), [(21, 3, 5, 48, 128), (1, 2, 4, 33, 64), (18, 1, 2, 70, 192)]
)
def test_slots_are_the_twins(tokens: int, per_token: int, experts: int, n: int, k: int) -> None:
    ids = routes(tokens, per_token, experts)
    weight, packed, scale = random_int4(experts, n, k)
    pairs = pair_int4_groups(packed, scale)
    for rows in (tokens, tokens * per_token):
        x_int8, x_scale = random_int8(rows, k), random(rows, seed=4).abs()
        # Equal to the bit: products of sums and scales are exact, and groups are added in the same order.
        expected = reference.expert_linear_int4(*cpu(x_int8, x_scale, weight, scale, ids))
        check(run(x_int8, x_scale, pairs, ids, SMALL), expected)


@pytest.mark.parametrize("tile", GROUPED_INT4_SM90.values(), ids=str)
def test_every_tile_gives_the_twins_bits(tile: Tile) -> None:
    ids = routes(20, 2, 3)
    weight, packed, scale = random_int4(3, 40, 128)
    x_int8, x_scale = random_int8(20, 128), random(20).abs()
    expected = reference.expert_linear_int4(*cpu(x_int8, x_scale, weight, scale, ids))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(run(x_int8, x_scale, pair_int4_groups(packed, scale), ids, tile, out_dtype=dtype), expected.to(dtype))


def test_extremes_and_both_storages() -> None:
    weight = torch.full((1, 16, 64), -8, dtype=torch.int8)
    weight[:, 1] = 7
    weight[:, 2, ::2] = 7
    words = ((weight.long() + 8).unflatten(2, (-1, 8)) << torch.arange(0, 32, 4)).sum(dim=3)
    packed = torch.where(words >= 2**31, words - 2**32, words).int().to(DEVICE)
    scale = torch.tensor([[1e-30, 1e30]]).repeat(16, 1)[None].to(torch.bfloat16).to(DEVICE)
    x_int8 = torch.full((3, 64), -128, dtype=torch.int8, device=DEVICE)
    x_int8[1] = 127
    x_int8[2] = 0
    ids, x_scale = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE), torch.ones(3, device=DEVICE)
    expected = reference.expert_linear_int4(*cpu(x_int8, x_scale, weight, scale, ids))
    for storage in (packed, packed.view(torch.uint8)):
        check(run(x_int8, x_scale, pair_int4_groups(storage, scale), ids, SMALL), expected)


def test_a_slots_bits_are_its_own() -> None:
    ids = routes(20, 2, 3)
    _, packed, scale = random_int4(3, 40, 128)
    pairs = pair_int4_groups(packed, scale)
    x_int8, x_scale = random_int8(20, 128), random(20).abs()
    whole = run(x_int8, x_scale, pairs, ids, SMALL).view(20, 2, 40)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for rows, tile in ((order, SMALL), (order[:1], SMALL), (order[:9], GROUPED_INT4_SM90[64])):
        part = run(x_int8[rows], x_scale[rows], pairs, ids[rows], tile)
        check(part, whole[rows].reshape(part.shape).cpu())


@pytest.mark.parametrize("wrong", ["odd groups", "float scales", "scales", "words"])
def test_what_cannot_be_paired_is_said(wrong: str) -> None:
    _, packed, scale = random_int4(2, 16, 96 if wrong == "odd groups" else 128)
    if wrong == "float scales":
        scale = scale.float()
    elif wrong == "scales":
        scale = scale[:, :, :2]
    elif wrong == "words":
        packed = packed[:, :15]
    with pytest.raises(ShapeError, match="pair_int4_groups"):
        pair_int4_groups(packed, scale)


@pytest.mark.parametrize("wrong", ["k", "scales", "x_scale"])
def test_what_cannot_be_multiplied_is_said(wrong: str) -> None:
    _, packed, scale = random_int4(2, 16, 128)
    weight_pairs, scale_pairs = pair_int4_groups(packed, scale)
    x_int8, x_scale, ids = random_int8(4, 64 if wrong == "k" else 128), random(4), routes(4, 1, 2)
    if wrong == "scales":
        scale_pairs = scale_pairs[:, :1]
    elif wrong == "x_scale":
        x_scale = x_scale[:2]
    with pytest.raises(ShapeError, match="expert_linear_int4"):
        run(x_int8, x_scale, (weight_pairs, scale_pairs), ids, SMALL)


def test_no_slots_make_no_rows() -> None:
    _, packed, scale = random_int4(2, 16, 64)
    blocks = align_tokens(torch.empty(0, 2, dtype=torch.int32, device=DEVICE), 2, 16)
    options: dict[str, Any] = {"slots_per_row": 2, "out_dtype": torch.bfloat16, "tile": SMALL}
    pairs = pair_int4_groups(packed, scale)
    assert expert_linear_int4(random_int8(0, 64), random(0), *pairs, *blocks, **options).shape == (0, 16)


def test_the_tile_holds_a_mean_experts_slots() -> None:
    for capability in (90, 80):
        blocks = [grouped_int4_tile(capability, slots, 384).block_m for slots in (8, 384 * 32, 10**6)]
        assert blocks == [16, 32, 64]


def test_machine_code_of_every_tile() -> None:
    types = {"x_ptr": "*i8", "weight_ptr": "*u8", "x_scale_ptr": "*fp32", "scale_pairs_ptr": "*i32", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("slot_ids_ptr", "block_experts_ptr", "num_padded_ptr"), "*i32")
    types |= dict.fromkeys(("S", "N", "K", "stride_xr"), "i32")
    cases = [
        Case(
            kernel="kernels.grouped_int4:_expert_linear_int4_kernel",
            types=types,
            constants={
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "GROUP_M": tile.group_m,
                "SLOTS_PER_ROW": 8,
                "STAGES": tile.num_stages,
            },
            aligned=[name for name in types if name != "S"],
            capability=capability,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            options={"enable_fp_fusion": True},
        )
        for capability, tiles in ((90, GROUPED_INT4_SM90), (80, GROUPED_INT4_SM80))
        for tile in tiles.values()
    ]
    for case, code in zip(cases, compile_cases(cases), strict=True):
        product = "IGMMA" if case.capability == 90 else "IMMA"
        assert code.faults(case.capability, product, "LDGSTS") == [], (case, code)
        # Halved in whole registers: with Triton's own bytewise operations there are dozens of PRMT.
        assert case.capability == 80 or not code.instructions.get("PRMT"), code
        # Every stage copies x twice, scale pairs, and weights, 16 bytes a thread at a time: scales are prefetched too.
        threads, weight_bytes = 32 * case.num_warps, 32 * case.constants["BLOCK_N"]
        copies = 3 + -(-weight_bytes // (16 * threads))
        assert code.instructions["LDGSTS"] == copies * case.num_stages, code
