"""Attention of many queries over pages, against its twin: behind what is shared, in windows, with sinks, in trees."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import aot, reference_paged
from kernels.attention_tiles import ATTENTION_TILES
from kernels.cpu import ShapeError
from kernels.paged_prefill import Trees, paged_prefill, visible_words
from kernels.softmax import head_blocks
from tests.kernel_cases import (
    DEVICE,
    assert_attention_code,
    matmul_row_by_row,
    poisoned_outputs,
    quick_interpreter,
    random,
)

TOLERANCE = {torch.float32: 2**-16, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}
"""As in test_kernels_attention.py."""

STARTS = [0, 5, 0, 33, 58]
COUNTS = [1, 12, 40, 7, 8]

ANCESTORS = [[], [{0}, {1}, {1, 2}], [], [{0}, {1}, {2}], [{0}, {1}, {0, 2}, {0, 2, 3}]]
"""Of the last tokens of each sequence; the last tree stands in two words and two pages."""


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def table(page: int, seed: int = 0) -> tuple[int, Tensor]:
    """Return how many blocks there are, and each sequence's, scattered; block 0 is nobody's."""
    needed = [-(-(start + count) // page) for start, count in zip(STARTS, COUNTS, strict=True)]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)).to(torch.int32) + 1
    made = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    for row, (start, end) in enumerate(pairwise(torch.tensor([0, *needed]).cumsum(0).tolist())):
        made[row, : end - start] = order[start:end]
    return sum(needed) + 1, made.to(DEVICE)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_interpreter():
        yield


class Case:
    """Five sequences in pages: a lone token, one behind five keys, two pages and more, a long past, a longer one."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, value_dim: int, page: int, dtype: torch.dtype = torch.float32
    ) -> None:
        blocks, self.block_table = table(page)
        self.key_cache = random(blocks, kv_heads, page, head_dim, seed=1, dtype=dtype)
        self.value_cache = random(blocks, kv_heads, page, value_dim, seed=2, dtype=dtype)
        for cache in (self.key_cache, self.value_cache):
            cache[0] = torch.nan
            for row, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
                if (start + count) % page:
                    cache[self.block_table[row, (start + count) // page].long(), :, (start + count) % page :] = (
                        torch.nan
                    )
        self.q = random(sum(COUNTS), heads, head_dim, dtype=dtype)
        self.cu_seqlens = int32(torch.tensor([0, *COUNTS]).cumsum(0).tolist())
        self.starts = int32(STARTS)
        self.scale = head_dim**-0.5
        self.sinks = random(heads, seed=3)
        self.ends = int32([s + n - len(a) for s, n, a in zip(STARTS, COUNTS, ANCESTORS, strict=True)])

    def positions(self) -> Tensor:
        """Return the position of every token; a branch's is the prompt's length and its depth."""
        found: list[int] = []
        for start, count, ancestors in zip(STARTS, COUNTS, ANCESTORS, strict=True):
            end = start + count - len(ancestors)
            found += [*range(start, end), *(end + len(seen) - 1 for seen in ancestors)]
        return int32(found)

    def trees(self, window: int | None) -> Trees:
        words = torch.zeros(5, 4, 2, dtype=torch.int32)
        for tree, ancestors in enumerate(ANCESTORS):
            if not ancestors:
                continue
            visible = torch.zeros(len(ancestors), len(ancestors), dtype=torch.bool)
            for branch, seen in enumerate(ancestors):
                for other in seen:
                    visible[branch, other] = window is None or len(seen) - len(ancestors[other]) < window
            made = visible_words(visible, int(self.ends[tree]))
            words[tree, : made.shape[0], : made.shape[1]] = made
        return Trees(int32([0, 1, 2, 3, 4]), self.positions(), words.to(DEVICE))

    def found(self, window: int | None, sinks: bool, branched: bool) -> Tensor:
        with poisoned_outputs():
            return paged_prefill(
                self.q, self.key_cache, self.value_cache, self.block_table, self.cu_seqlens, self.starts, max(COUNTS),
                self.scale, window=window, sinks=self.sinks if sinks else None,
                ends=self.ends if branched else None, trees=self.trees(window) if branched else None,
            )  # fmt: skip

    def right(self, window: int | None, sinks: bool, branched: bool) -> Tensor:
        return reference_paged.paged_prefill(
            self.q.cpu(), self.key_cache.cpu(), self.value_cache.cpu(), self.block_table.cpu(), self.cu_seqlens.cpu(),
            self.starts.cpu(), self.scale, window=window,
            sinks=self.sinks.cpu() if sinks else None, ends=self.ends.cpu() if branched else None,
            positions=self.positions().cpu() if branched else None, ancestors=ANCESTORS if branched else None,
        )  # fmt: skip

    def check(self, window: int | None, sinks: bool, branched: bool) -> None:
        found, right = self.found(window, sinks, branched), self.right(window, sinks, branched)
        largest = float(self.value_cache.float().nan_to_num().abs().max())
        torch.testing.assert_close(found.float().cpu(), right, atol=TOLERANCE[found.dtype] * largest, rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "page", "dtype"),
    [
        (4, 2, 64, 64, 16, torch.float32),
        (3, 1, 80, 48, 64, torch.bfloat16),
        (2, 2, 192, 128, 32, torch.float16),
        (2, 1, 32, 32, 128, torch.bfloat16),
    ],
)
def test_each_query_sees_the_keys_up_to_its_own(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, page: int, dtype: torch.dtype
) -> None:
    Case(heads, kv_heads, head_dim, value_dim, page, dtype).check(None, False, False)


@pytest.mark.parametrize(
    ("window", "sinks", "branched"),
    [(None, False, True), (3, True, True), (1, False, True), (40, True, False), (None, True, False)],
)
def test_windows_sinks_and_branches(window: int | None, sinks: bool, branched: bool) -> None:
    Case(4, 2, 32, 32, 16).check(window, sinks, branched)


def test_bits_are_the_same_however_a_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequence 2, forty tokens from slot 0 on, against its last 17 behind the 23 before, alone."""
    # Let the interpreter multiply without BLAS, where a row's bits depend on its place.
    monkeypatch.setattr(np, "matmul", matmul_row_by_row)
    case = Case(4, 2, 32, 32, 16)
    whole = case.found(None, False, False)[13:53]
    cut = paged_prefill(
        case.q[36:53], case.key_cache, case.value_cache, case.block_table[2:3], int32([0, 17]), int32([23]), 17,
        case.scale,
    )  # fmt: skip
    assert torch.equal(whole[23:], cut)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(4, 2, 32, 32, 16)

    def call(**changed: Tensor) -> None:
        q, key_cache, value_cache, block_table, cu_seqlens, starts = (
            changed.get(name, getattr(case, name))
            for name in ("q", "key_cache", "value_cache", "block_table", "cu_seqlens", "starts")
        )
        paged_prefill(q, key_cache, value_cache, block_table, cu_seqlens, starts, 40, 0.1)

    call()
    for wrong in (
        {"q": case.q[:, :3]}, {"q": case.q[..., :16]}, {"q": case.q.half()}, {"value_cache": case.value_cache[:2]},
        {"starts": case.starts[:2]}, {"cu_seqlens": case.cu_seqlens[:3]},
        {"key_cache": case.key_cache[:, :, :8], "value_cache": case.value_cache[:, :, :8]},
    ):  # fmt: skip
        with pytest.raises(ShapeError, match="paged_prefill"):
            call(**wrong)


def machine_case(card: int, width: int, *, window: int = 0, trees: bool = False, group: int = 4) -> aot.Case:
    tile, page = ATTENTION_TILES[card, width], 64
    value_dim, kv_heads = 128 if width == 192 else width, 8
    block_d, block_rest = head_blocks(width)
    pointers = dict.fromkeys(("q_ptr", "key_ptr", "value_ptr", "out_ptr"), "*bf16")
    pointers |= dict.fromkeys(("table_ptr", "cu_seqlens_ptr", "starts_ptr"), "*i32")
    absent: dict[str, None] = {"sinks_ptr": None}
    if trees:
        pointers |= {"ends_ptr": "*i32", "trees_ptr": "*i32", "positions_ptr": "*i32", "visible_ptr": "*i32"}
    else:
        absent |= dict.fromkeys(("ends_ptr", "trees_ptr", "positions_ptr", "visible_ptr"))
    return aot.Case(
        kernel="kernels.paged_prefill:_paged_prefill_kernel",
        types=pointers
        | dict.fromkeys(("blocks_per_sequence", "stride_table", "N", "WORDS"), "i32")
        | {"scale": "fp32"},
        constants={
            **absent,
            "stride_qt": kv_heads * group * width,
            "stride_qh": width,
            "stride_kb": kv_heads * page * (width + value_dim),
            "stride_kg": page * (width + value_dim),
            "stride_kp": width + value_dim,
            "stride_vb": kv_heads * page * (width + value_dim),
            "stride_vg": page * (width + value_dim),
            "stride_vp": width + value_dim,
            "H": kv_heads * group,
            "GROUP": group,
            "D": width,
            "DV": value_dim,
            "PAGE": page,
            "WINDOW": window,
            "TREES": trees,
            "SINKS": False,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": min(tile.block_n, page, 64),
            "BLOCK_D": block_d,
            "BLOCK_REST": block_rest,
            "BLOCK_DV": value_dim,
        },
        aligned=list(pointers),
        capability=card,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def test_machine_code_of_common_tiles() -> None:
    assert_attention_code([machine_case(90, 64), machine_case(90, 64, trees=True), machine_case(80, 128)])


@pytest.mark.slow
def test_machine_code_of_every_tile_with_windows_and_trees() -> None:
    cases = [machine_case(card, width) for card, width in ATTENTION_TILES]
    cases += [machine_case(card, width, trees=True) for card, width in ATTENTION_TILES]
    cases += [machine_case(card, 64, window=128, trees=trees, group=8) for card in (90, 80) for trees in (False, True)]
    assert_attention_code(cases)
