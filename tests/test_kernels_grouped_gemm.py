"""The experts' products beside their plain twins, and the layer made of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.aot import Case, MachineCode, compile_cases
from kernels.cpu import ShapeError
from kernels.grouped_gemm import combine, expert_linear
from kernels.routing import align_tokens
from kernels.tiles import GROUPED_SM80, GROUPED_SM90, Tile, grouped_tile
from tests.kernel_cases import DEVICE, poisoned_outputs, random, random_int8, route_on_card

SMALL = Tile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=3, swapped=True)


def routes(tokens: int, per_token: int, experts: int, seed: int = 0) -> Tensor:
    """Return distinct experts per token [T, A], ascending; here and there the last ones are dropped."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:per_token] for _ in range(tokens)]).sort(1).values
    dropped = torch.randint(0, per_token, (tokens, 1), generator=generator) * (torch.arange(tokens)[:, None] % 3 == 1)
    return ids.masked_fill(torch.arange(per_token) >= per_token - dropped, experts).int().to(DEVICE)


def run(
    x_int8: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, ids: Tensor, tile: Tile, **options: Any
) -> Tensor:
    """Return `expert_linear` on the slots of `ids`, every buffer poisoned first."""
    with poisoned_outputs():
        blocks = align_tokens(ids, len(weight), tile.block_m)
        slots_per_row = ids.numel() // max(1, len(x_int8))
        options = {"out_dtype": torch.float32} | options
        return expert_linear(
            x_int8, x_scale, weight, weight_scale, *blocks, slots_per_row=slots_per_row, tile=tile, **options
        )


def check(out: Tensor, expected: Tensor) -> None:
    """Slots that are not dropped equal the twin's bits; dropped ones are what they were."""
    assert torch.equal(out.cpu().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


def cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in tensors)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("tokens", "per_token", "experts", "n", "k"),
    [(37, 3, 5, 96, 80), (1, 2, 9, 33, 64), (19, 1, 2, 40, 50), (5, 4, 4, 1, 1)],
)
def test_slots_are_the_twins(tokens: int, per_token: int, experts: int, n: int, k: int, swapped: bool) -> None:
    ids = routes(tokens, per_token, experts)
    weight, weight_scale = random_int8(experts, n, k, seed=1), random(experts, n, seed=2).abs()
    bias = random(experts, n, seed=3)
    for rows in (tokens, tokens * per_token):
        x_int8, x_scale = random_int8(rows, k), random(rows, seed=4).abs()
        tile = replace(SMALL, swapped=swapped)
        out = run(x_int8, x_scale, weight, weight_scale, ids, tile, bias=bias)
        check(out, reference.expert_linear(*cpu(x_int8, x_scale, weight, weight_scale, ids), bias=bias.cpu()))
        assert out.isnan().any() == (ids == experts).any()


@pytest.mark.parametrize("tile", GROUPED_SM90.values(), ids=str)
def test_every_tile_gives_the_twins_bits(tile: Tile) -> None:
    ids = routes(40, 2, 3)
    x_int8, x_scale, weight = random_int8(40, 160), random(40).abs(), random_int8(3, 40, 160, seed=1)
    weight_scale = random(3, 40, seed=2, scale=1e-3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = reference.expert_linear(*cpu(x_int8, x_scale, weight, weight_scale, ids), out_dtype=dtype)
        check(run(x_int8, x_scale, weight, weight_scale, ids, tile, out_dtype=dtype), expected)


def test_sums_beyond_float32s_integers_are_exact() -> None:
    ids = routes(3, 1, 2)
    x_int8 = torch.full((3, 1200), 127, dtype=torch.int8, device=DEVICE)
    x_int8[1] = -128
    x_int8[2] = 0
    weight = torch.full((2, 16, 1200), -127, dtype=torch.int8, device=DEVICE)
    weight[:, 1] = -128
    weight[:, :, 7] = 3
    x_scale, weight_scale = torch.tensor([1.0, 1e30, 1e-30], device=DEVICE), torch.ones(2, 16, device=DEVICE)
    tile = replace(SMALL, block_k=128)
    check(
        run(x_int8, x_scale, weight, weight_scale, ids, tile),
        reference.expert_linear(*cpu(x_int8, x_scale, weight, weight_scale, ids)),
    )


def test_a_card_without_tma_reads_by_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.grouped_gemm._has_tma", lambda device: False)
    ids = routes(6, 2, 3)
    x_int8, x_scale, weight, scale = random_int8(6, 64), random(6), random_int8(3, 33, 64, seed=1), random(3, 33)
    expected = reference.expert_linear(*cpu(x_int8, x_scale, weight, scale, ids))
    check(run(x_int8, x_scale, weight, scale, ids, SMALL), expected)


def test_experts_without_tokens_and_tokens_without_experts() -> None:
    x_int8, x_scale, weight, scale = random_int8(4, 32), random(4), random_int8(3, 32, 32, seed=1), random(3, 32)
    for expert in (1, 3):
        ids = torch.full((4, 2), expert, dtype=torch.int32, device=DEVICE)
        expected = reference.expert_linear(*cpu(x_int8, x_scale, weight, scale, ids))
        check(run(x_int8, x_scale, weight, scale, ids, SMALL), expected)
    empty = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    with poisoned_outputs():
        blocks = align_tokens(empty, 3, 16)
        options: dict[str, Any] = {"slots_per_row": 2, "out_dtype": torch.float32, "tile": SMALL}
        assert expert_linear(x_int8[:0], x_scale[:0], weight, scale, *blocks, **options).shape == (0, 32)


@pytest.mark.parametrize("wrong", ["k", "scale", "weight_scale", "blocks", "weight stride", "x stride", "bias"])
def test_what_cannot_be_multiplied_is_said(wrong: str) -> None:
    ids = routes(4, 2, 3)
    x_int8, x_scale, weight, scale = random_int8(4, 32), random(4), random_int8(3, 32, 32, seed=1), random(3, 32)
    tile, bias = SMALL, random(3, 32)
    if wrong == "k":
        weight = weight[:, :, :16].contiguous()
    elif wrong == "scale":
        x_scale = x_scale[:3]
    elif wrong == "weight_scale":
        scale = random(3, 31)
    elif wrong == "weight stride":
        weight = weight.transpose(1, 2)
    elif wrong == "x stride":
        x_int8 = random_int8(32, 4).t()
    elif wrong == "bias":
        bias = random(2, 32)
    blocks = align_tokens(ids, 3, 32 if wrong == "blocks" else 16)
    with pytest.raises(ShapeError, match="expert_linear"):
        expert_linear(
            x_int8, x_scale, weight, scale, *blocks, slots_per_row=2, out_dtype=torch.float32, tile=tile, bias=bias
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "per_token", "d"), [(5, 3, 96), (1, 1, 1), (2, 8, 1100)])
def test_slots_are_combined_as_the_twin_does(tokens: int, per_token: int, d: int, dtype: torch.dtype) -> None:
    counts = (torch.arange(tokens) % per_token + 1).int().to(DEVICE)
    dropped = torch.arange(per_token, device=DEVICE) >= counts[:, None]
    y = random(tokens * per_token, d, dtype=dtype)
    y[dropped.flatten()] = float("nan")
    weights = random(tokens, per_token, seed=1).masked_fill(dropped, 0.0)
    for shared in (None, random(tokens, d, seed=2, dtype=dtype)):
        with poisoned_outputs():
            out = combine(y, weights, counts, shared)
        assert out.dtype == dtype
        expected = reference.combine(y.cpu(), weights.cpu(), counts.cpu(), None if shared is None else shared.cpu())
        assert torch.equal(out.cpu(), expected)


def test_nothing_combined_and_what_cannot_be() -> None:
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert combine(random(0, 8), random(0, 2), none).shape == (0, 8)
    y, weights, counts = random(6, 8), random(3, 2), torch.ones(3, dtype=torch.int32, device=DEVICE)
    for wrong in ((y[:5], weights, counts), (y, weights, counts[:2]), (y, weights, counts, random(3, 7))):
        with pytest.raises(ShapeError, match="combine"):
            combine(*wrong)


class Layer:
    """A mixture of experts as the engine will run it; the gated unit is the twin's."""

    def __init__(self, experts: int, d: int, f: int) -> None:
        self.up, self.down = random_int8(experts, 2 * f, d, seed=1), random_int8(experts, d, f, seed=2)
        self.up_scale, self.down_scale = random(experts, 2 * f, seed=3) / 500, random(experts, d, seed=4) / 500
        self.bias = random(experts, seed=5) / 10

    def __call__(self, x: Tensor, logits: Tensor, shared: Tensor, tile: Tile, twin: bool = False) -> Tensor:
        options: dict[str, Any] = {"scoring": "sigmoid", "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
        ids, weights, counts = (reference.route if twin else route_on_card)(
            logits, self.bias, 3, threshold=0.6, **options
        )
        x_int8, x_scale = reference.quantize_rows(x.float())
        if twin:
            y = reference.expert_linear(x_int8, x_scale, self.up, self.up_scale, ids, out_dtype=x.dtype)
        else:
            y = run(x_int8, x_scale, self.up, self.up_scale, ids, tile, out_dtype=x.dtype)
        h_int8, h_scale = reference.swiglu_quantize(y)
        if twin:
            y = reference.expert_linear(h_int8, h_scale, self.down, self.down_scale, ids, out_dtype=x.dtype)
            return reference.combine(y, weights, counts, shared)
        return combine(
            run(h_int8, h_scale, self.down, self.down_scale, ids, tile, out_dtype=x.dtype), weights, counts, shared
        )


def test_a_tokens_bits_are_its_own_through_the_layer() -> None:
    layer = Layer(experts=8, d=48, f=40)
    x, logits, shared = random(13, 48, dtype=torch.bfloat16), random(13, 8, seed=7), random(13, 48, seed=8)
    shared = shared.to(torch.bfloat16)
    whole = layer(x, logits, shared, SMALL)
    assert not whole.isnan().any()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    other = Tile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3)
    for rows, tile in ((order, SMALL), (order[:1], SMALL), (order[1:6], other), (order, other)):
        assert torch.equal(layer(x[rows], logits[rows], shared[rows], tile), whole[rows])


def test_the_layer_is_the_twins_layer() -> None:
    layer = Layer(experts=8, d=48, f=40)
    x, logits, shared = random(9, 48), random(9, 8, seed=7), random(9, 48, seed=8)
    # Everything but the weights of the router is equal to the bit, and those to 16 * 2**-23.
    torch.testing.assert_close(
        layer(x, logits, shared, SMALL),
        layer(x, logits, shared, SMALL, twin=True),
        rtol=0,
        atol=16 * 2**-23 * 3 * float(layer(x, logits, shared, SMALL).abs().max()),
    )


def test_the_tile_holds_a_mean_experts_slots() -> None:
    for capability, tiles in ((90, GROUPED_SM90), (80, GROUPED_SM80)):
        blocks = [grouped_tile(capability, slots, 384).block_m for slots in (0, 8, 384 * 16, 384 * 16 + 1, 10**6)]
        assert blocks == [16, 16, 16, 32, 128]
        assert all(tile.block_m == block for block, tile in tiles.items())


def case(capability: int, tile: Tile, *, tma: bool, ragged: bool = False, bias: bool = False) -> Case:
    types = {
        "x_ptr": "*i8",
        "weight": f"tensordesc<i8[{tile.block_n},{tile.block_k}]>" if tma else "*i8",
        "x_scale_ptr": "*fp32",
        "weight_scale_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "out_ptr": "*bf16",
        "slot_ids_ptr": "*i32",
        "block_experts_ptr": "*i32",
        "num_padded_ptr": "*i32",
        "S": "i32",
        "N": "i32",
        "K": "i32",
        "stride_xr": "i32",
    }
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
    switches = {"HAS_BIAS": bias, "TMA": tma, "EVEN_K": not ragged, "SWAPPED": tile.swapped, "SLOTS_PER_ROW": 8}
    return Case(
        kernel="kernels.grouped_gemm:_expert_linear_kernel",
        types=types,
        constants=blocks | switches,
        aligned=[name for name in types if name != "S" and not (tma and name == "weight")],
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={"enable_fp_fusion": False},
    )


def combine_case() -> Case:
    types = {"y_ptr": "*bf16", "weights_ptr": "*fp32", "counts_ptr": "*i32", "shared_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = {"D": "i32", "stride_sharedt": "i32"}
    return Case(
        kernel="kernels.grouped_gemm:_combine_kernel",
        types=types | sizes,
        constants={"A": 8, "HAS_SHARED": True, "BLOCK_D": 1024},
        aligned=[*types, *sizes],
        options={"enable_fp_fusion": False},
    )


def assert_sound(cases: list[Case]) -> list[MachineCode]:
    codes = compile_cases(cases)
    for compiled, code in zip(cases, codes, strict=True):
        weights = "UTMALDG" if compiled.constants["TMA"] else "LDGSTS"
        product = "IGMMA" if compiled.capability == 90 else "IMMA"
        assert code.faults(compiled.capability, product, weights, "LDGSTS") == [], (compiled, code)
    return codes


def test_machine_code_of_every_tile() -> None:
    hopper = [case(90, tile, tma=True) for tile in GROUPED_SM90.values()]
    ampere = [case(80, tile, tma=False) for tile in GROUPED_SM80.values()]
    codes = assert_sound(hopper + ampere)
    # Shared memory of two programs fits a multiprocessor, for all but the largest tile.
    assert all(2 * code.shared_bytes <= 232448 for code in codes[: len(hopper) - 1])
    [code] = compile_cases([combine_case()])
    assert code.faults(90) == []


@pytest.mark.slow
def test_machine_code_of_what_is_rare() -> None:
    tiles = [(90, tile) for tile in GROUPED_SM90.values()] + [(80, tile) for tile in GROUPED_SM80.values()]
    assert_sound([case(capability, tile, tma=False, ragged=True, bias=True) for capability, tile in tiles])
    assert_sound([case(90, tile, tma=True, ragged=True, bias=True) for tile in GROUPED_SM90.values()])
