"""Decoding over paged keys and values, and over paged latents, against their twins."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import aot, mla, paged_attention, reference
from kernels.attention_tiles import DECODE_TILES, LATENT_TILES
from kernels.cpu import ShapeError
from kernels.mla import mla_decode
from kernels.paged_attention import paged_decode
from kernels.softmax import head_blocks
from tests.kernel_cases import DEVICE, poisoned_outputs, random

LENS = [0, 1, 64, 77, 150]
"""No key, one, a full split, a ragged last page, three splits."""

TOLERANCE = {torch.float32: 2**-16, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}
"""As in test_kernels_attention.py."""


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (paged_attention, mla):
        monkeypatch.setattr(module, "KEYS_PER_SPLIT", 64)


def pages(lens: list[int], page: int, seed: int = 0) -> tuple[int, Tensor]:
    """Return how many blocks there are, and each sequence's, scattered; what lies past a sequence's end is block 0."""
    width = max(1, max(-(-length // page) for length in lens))
    needed = [-(-length // page) for length in lens]
    blocks = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)).to(torch.int32) + 1
    table = torch.zeros(len(lens), width, dtype=torch.int32)
    ends = torch.tensor([0, *needed]).cumsum(0).tolist()
    for row, (start, end) in enumerate(pairwise(ends)):
        table[row, : end - start] = blocks[start:end]
    return sum(needed) + 1, table.to(DEVICE)


def caches(num_blocks: int, kv_heads: int, page: int, *widths: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return caches whose block 0, which no sequence owns, is NaN."""
    made = [random(num_blocks, kv_heads, page, width, seed=seed, dtype=dtype) for seed, width in enumerate(widths)]
    for cache in made:
        cache[0] = torch.nan
    return made


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "page"),
    [(4, 2, 64, 64, 16), (7, 1, 80, 48, 64), (2, 2, 32, 32, 24), (18, 1, 96, 128, 16)],
)
def test_each_sequence_sees_its_own_pages(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, page: int, dtype: torch.dtype
) -> None:
    num_blocks, table = pages(LENS, page)
    key_cache, value_cache = caches(num_blocks, kv_heads, page, head_dim, value_dim, dtype=dtype)
    q = random(len(LENS), heads, head_dim, seed=7, dtype=dtype)
    with poisoned_outputs():
        found = paged_decode(q, key_cache, value_cache, table, int32(LENS), head_dim**-0.5)
    right = reference.paged_decode(q, key_cache, value_cache, table, int32(LENS), head_dim**-0.5)
    largest = value_cache[1:].float().abs().max().item()
    torch.testing.assert_close(found.float().cpu(), right, atol=TOLERANCE[dtype] * largest, rtol=0)
    assert not found[0].any()


@pytest.mark.parametrize("window", [None, 1, 60, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_and_sinks(window: int | None, with_sinks: bool) -> None:
    num_blocks, table = pages(LENS, 16)
    key_cache, value_cache = caches(num_blocks, 1, 16, 32, 32)
    q = random(len(LENS), 3, 32, seed=7)
    sinks = random(3, seed=8, scale=3.0) if with_sinks else None
    arguments = (q, key_cache, value_cache, table, int32(LENS), 0.2)
    with poisoned_outputs():
        found = paged_decode(*arguments, window=window, sinks=sinks)
    right = reference.paged_decode(*arguments, window=window, sinks=sinks)
    largest = value_cache[1:].abs().max().item()
    torch.testing.assert_close(found.cpu(), right, atol=TOLERANCE[torch.float32] * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "rank", "rope", "page"), [(5, 64, 16, 16), (18, 32, 24, 64)])
def test_latents_are_keys_and_values(heads: int, rank: int, rope: int, page: int, dtype: torch.dtype) -> None:
    num_blocks, table = pages(LENS, page)
    latent_cache = caches(num_blocks, 1, page, rank + rope, dtype=dtype)[0][:, 0]
    q = random(len(LENS), heads, rank + rope, seed=7, dtype=dtype)
    with poisoned_outputs():
        found = mla_decode(q, latent_cache, table, int32(LENS), 0.1, rank=rank)
    right = reference.mla_decode(q, latent_cache, table, int32(LENS), 0.1, rank=rank)
    largest = latent_cache[1:].float().abs().max().item()
    torch.testing.assert_close(found.float().cpu(), right, atol=TOLERANCE[dtype] * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 90])
def test_a_sequence_has_the_same_bits_alone_and_among_others(window: int | None, dtype: torch.dtype) -> None:
    num_blocks, table = pages(LENS, 16)
    key_cache, value_cache = caches(num_blocks, 2, 16, 64, 64, dtype=dtype)
    latent_cache = key_cache[:, 0]
    q = random(len(LENS), 4, 64, seed=7, dtype=dtype)
    lens = int32(LENS)
    together = paged_decode(q, key_cache, value_cache, table, lens, 0.125, window=window)
    latent_together = mla_decode(q, latent_cache, table, lens, 0.125, rank=32)
    for rows in ([4], [1, 3], [3, 0, 4, 2, 1]):
        # A table no wider than these sequences need, so that other grids and other numbers of splits are tried.
        width = max(1, max(-(-LENS[row] // 16) for row in rows))
        own = (table[rows, :width].contiguous(), lens[rows], 0.125)
        assert torch.equal(paged_decode(q[rows], key_cache, value_cache, *own, window=window), together[rows])
        assert torch.equal(mla_decode(q[rows], latent_cache, *own, rank=32), latent_together[rows])


def test_where_the_pages_lie_changes_no_bit() -> None:
    num_blocks, table = pages([150], 16)
    key_cache, value_cache = caches(num_blocks, 1, 16, 32, 32)
    q = random(1, 2, 32, seed=7)
    found = paged_decode(q, key_cache, value_cache, table, int32([150]), 0.2)
    keys, values = (torch.cat([torch.full_like(cache, torch.nan), cache]) for cache in (key_cache, value_cache))
    assert torch.equal(paged_decode(q, keys, values, table + num_blocks, int32([150]), 0.2), found)


def test_no_sequence_is_no_row() -> None:
    key_cache, value_cache = caches(2, 1, 16, 32, 32)
    table, lens = torch.zeros(0, 3, dtype=torch.int32, device=DEVICE), int32([])
    assert paged_decode(random(0, 2, 32), key_cache, value_cache, table, lens, 1.0).shape == (0, 2, 32)
    assert mla_decode(random(0, 2, 32), key_cache[:, 0], table, lens, 1.0, rank=16).shape == (0, 2, 16)


def test_what_does_not_fit_is_refused() -> None:
    key_cache, value_cache = caches(2, 2, 16, 32, 32)
    table, lens, q = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), int32([3]), random(1, 4, 32)
    with pytest.raises(ShapeError, match="G divides H"):
        paged_decode(q[:, :3], key_cache, value_cache, table, lens, 1.0)
    with pytest.raises(ShapeError, match="D are equal"):
        paged_decode(q, key_cache[..., :16], value_cache, table, lens, 1.0)
    with pytest.raises(ShapeError, match="one row each per B"):
        paged_decode(q, key_cache, value_cache, table, int32([3, 4]), 1.0)
    with pytest.raises(ShapeError, match="one dtype"):
        paged_decode(q.half(), key_cache, value_cache, table, lens, 1.0)
    with pytest.raises(ShapeError, match="one sink per head"):
        paged_decode(q, key_cache, value_cache, table, lens, 1.0, sinks=random(3))
    with pytest.raises(ShapeError, match="power of two"):
        mla_decode(q, key_cache[:, 0], table, lens, 1.0, rank=24)
    with pytest.raises(ShapeError, match="one dtype"):
        mla_decode(q.half(), key_cache[:, 0], table, lens, 1.0, rank=16)


def decode_case(card: int, group: int, *, width: int = 128, page: int = 64) -> aot.Case:
    tile = DECODE_TILES[card, group]
    block_d, block_rest = head_blocks(width)
    pointers = dict.fromkeys(("q_ptr", "key_ptr", "value_ptr"), "*bf16")
    pointers |= {"block_table_ptr": "*i32", "lens_ptr": "*i32", "parts_ptr": "*fp32", "parts_lse_ptr": "*fp32"}
    strides = {
        f"stride_{cache}{axis}": size for cache in "kv" for axis, size in zip("bgp", (8 * page, page, 1), strict=True)
    }
    return aot.Case(
        kernel="kernels.paged_attention:_paged_decode_kernel",
        types=pointers | {"scale": "fp32", "num_splits": "i32", "stride_table": "i32"},
        constants={name: rows * width for name, rows in strides.items()}
        | {
            "stride_qb": 8 * group * width,
            "stride_qh": width,
            "H": 8 * group,
            "GROUP": group,
            "D": width,
            "DV": width,
            "PAGE": page,
            "WINDOW": 0,
            "SPLIT": 1024,
            "BLOCK_H": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": block_d,
            "BLOCK_REST": block_rest,
            "BLOCK_DV": width,
        },
        aligned=list(pointers),
        capability=card,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def latent_case(card: int, heads: int, *, page: int = 64) -> aot.Case:
    tile = LATENT_TILES[card, heads]
    pointers = {"q_ptr": "*bf16", "latent_ptr": "*bf16", "block_table_ptr": "*i32", "lens_ptr": "*i32"}
    pointers |= {"parts_ptr": "*fp32", "parts_lse_ptr": "*fp32"}
    return aot.Case(
        kernel="kernels.mla:_mla_decode_kernel",
        types=pointers | {"scale": "fp32", "num_splits": "i32", "stride_table": "i32"},
        constants={
            "stride_qb": heads * 576,
            "stride_qh": 576,
            "stride_lb": page * 576,
            "stride_lp": 576,
            "H": heads,
            "RANK": 512,
            "ROPE": 64,
            "PAGE": page,
            "SPLIT": 2048,
            "BLOCK_H": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_ROPE": 64,
        },
        aligned=list(pointers),
        capability=card,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@pytest.mark.parametrize("card", [90, 80])
def test_machine_code_of_merging(card: int) -> None:
    constants = {"H": 32, "DV": 128, "SPLIT": 1024, "BLOCK_DV": 128}
    pointers = {"parts_ptr": "*fp32", "parts_lse_ptr": "*fp32", "lens_ptr": "*i32", "sinks_ptr": "*bf16"}
    pointers |= {"out_ptr": "*bf16"}
    splits = [
        aot.Case(
            kernel="kernels.softmax:_merge_splits_kernel",
            types=pointers | {"num_splits": "i32"},
            constants=constants | {"WINDOW": window, "SINKS": window > 0},
            aligned=list(pointers),
            capability=card,
            num_warps=1,
        )
        for window in (0, 128)
    ]
    pointers = {"out_a_ptr": "*bf16", "out_b_ptr": "*bf16", "out_ptr": "*bf16"}
    pointers |= dict.fromkeys(("lse_a_ptr", "lse_b_ptr", "lse_ptr"), "*fp32")
    states = aot.Case(
        kernel="kernels.softmax:_merge_states_kernel",
        types=pointers | {"R": "i32"},
        constants={"DV": 128, "BLOCK_DV": 128, "BLOCK_R": 16},
        aligned=list(pointers),
        capability=card,
    )
    for code in aot.compile_cases([*splits, states]):
        assert code.faults(card) == []


def test_machine_code_of_every_tile() -> None:
    cases = [decode_case(card, group, page=page) for card, group in DECODE_TILES for page in (64, 16)]
    cases += [decode_case(card, 16, width=256) for card in (90, 80)]
    cases += [latent_case(card, heads, page=page) for card, heads in LATENT_TILES for page in (64, 16)]
    for case, code in zip(cases, aot.compile_cases(cases), strict=True):
        hopper = case.capability == 90 and (case.constants["BLOCK_H"] == 64 or "mla" in case.kernel)
        assert code.faults(case.capability, "HGMMA" if hopper else "HMMA") == [], (case, code)
