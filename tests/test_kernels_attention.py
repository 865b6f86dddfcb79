"""Packed prefill, the shared prefix and the merge of states, against their twins."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import aot, reference
from kernels.attention import packed_prefill, prefix_attention
from kernels.attention_tiles import ATTENTION_TILES
from kernels.cpu import ShapeError
from kernels.softmax import head_blocks, merge_states
from tests.kernel_cases import DEVICE, assert_attention_code, poisoned_outputs, random

TOLERANCE = {
    # 24 bits, and sums of at most a few hundred terms whose order differs: 2**-24 * 2**8.
    torch.float32: 2**-16,
    # 11 and 8 bits: the weights are rounded once before their product with values, the result once more.
    torch.float16: 2 * 2**-11,
    torch.bfloat16: 2 * 2**-8,
}
"""Of a result, relative to the largest value, of which every output is a mean."""


def states(
    heads: int, kv_heads: int, tokens: int, keys: int, head_dim: int, value_dim: int, **options: Any
) -> list[Tensor]:
    shapes = ((tokens, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, value_dim))
    return [random(*shape, seed=seed, **options) for seed, shape in enumerate(shapes)]


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply without BLAS, where a row's bits depend on its place: 85 of 128 rows moved so."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b).astype(dtype))


def assert_state(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], largest: float) -> None:
    out, lse = found
    torch.testing.assert_close(out.float().cpu(), right[0].float(), atol=TOLERANCE[out.dtype] * largest, rtol=0)
    # Scores up to 2**7 in base 2, with 24 bits and sums of up to 2**8 of them.
    torch.testing.assert_close(lse.cpu(), right[1], atol=2**-12, rtol=2**-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"), [(4, 2, 64, 64), (3, 1, 80, 48), (2, 2, 192, 128)]
)
def test_packed_prefill_is_causal_within_each_sequence(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = states(heads, kv_heads, 53, 53, head_dim, value_dim, dtype=dtype)
    cu_seqlens = torch.tensor([0, 1, 1, 41, 53], dtype=torch.int32, device=DEVICE)
    with poisoned_outputs():
        found = packed_prefill(q, k, v, cu_seqlens, 40, head_dim**-0.5)
    right = reference.packed_prefill(q, k, v, cu_seqlens, 40, head_dim**-0.5)
    assert_state(found, right, v.float().abs().max().item())


@pytest.mark.parametrize("window", [1, 37, 100])
def test_a_window_hides_what_lies_further_back(window: int) -> None:
    q, k, v = states(2, 1, 90, 90, 32, 32)
    cu_seqlens = torch.tensor([0, 17, 90], dtype=torch.int32, device=DEVICE)
    with poisoned_outputs():
        found = packed_prefill(q, k, v, cu_seqlens, 73, 0.2, window=window)
    right = reference.packed_prefill(q, k, v, cu_seqlens, 73, 0.2, window=window)
    assert_state(found, right, v.abs().max().item())


@pytest.mark.parametrize("keys", [0, 1, 64, 83])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_query_sees_all_of_a_prefix(keys: int, dtype: torch.dtype) -> None:
    q, k, v = states(6, 2, 25, keys, 96, 80, dtype=dtype)
    with poisoned_outputs():
        found = prefix_attention(q, k, v, 0.1)
    assert_state(found, reference.prefix_attention(q, k, v, 0.1), max([1.0, *v.float().abs().flatten().tolist()]))


def test_a_prefix_and_the_rest_make_the_whole() -> None:
    q, k, v = states(4, 2, 90, 90, 64, 64)
    prefix, scale = 33, 0.125
    cu_seqlens = torch.tensor([0, 57], dtype=torch.int32, device=DEVICE)
    shared = prefix_attention(q[prefix:], k[:prefix], v[:prefix], scale)
    own = packed_prefill(q[prefix:], k[prefix:], v[prefix:], cu_seqlens, 57, scale)
    with poisoned_outputs():
        found = merge_states(*shared, *own)
    whole = reference.packed_prefill(q, k, v, torch.tensor([0, 90]), 90, scale)
    assert_state(found, (whole[0][prefix:], whole[1][prefix:]), v.abs().max().item())


def test_states_over_no_key_take_no_part() -> None:
    out = random(3, 2, 40)
    lse = torch.tensor([[0.0, 900.0], [-torch.inf, -torch.inf], [-900.0, -torch.inf]], device=DEVICE)
    none, no_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for first, second in (((out, lse), (none, no_lse)), ((none, no_lse), (out, lse))):
        found, found_lse = merge_states(*first, *second)
        assert torch.equal(found_lse, lse)
        assert torch.equal(found, torch.where(lse.isinf()[..., None], 0.0, out))


def test_states_merge_as_their_twin_does() -> None:
    out_a, out_b = (random(37, 3, 80, seed=seed) for seed in (0, 1))
    lse_a, lse_b = (random(37, 3, seed=seed, scale=4) for seed in (2, 3))
    with poisoned_outputs():
        found = merge_states(out_a, lse_a, out_b, lse_b)
    assert_state(found, reference.merge_states(*(x.cpu() for x in (out_a, lse_a, out_b, lse_b))), 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_a_sequence_has_the_same_bits_alone_and_among_others(
    row_by_row: None, window: int | None, dtype: torch.dtype
) -> None:
    q, k, v = states(4, 2, 70, 70, 64, 64, dtype=dtype)
    lens = [3, 40, 27]
    cu_seqlens = torch.tensor([0, 3, 43, 70], dtype=torch.int32, device=DEVICE)
    out, lse = packed_prefill(q, k, v, cu_seqlens, 40, 0.125, window=window)
    starts = cu_seqlens.tolist()
    for i, length in enumerate(lens):
        rows = slice(starts[i], starts[i + 1])
        alone = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
        own = packed_prefill(q[rows], k[rows], v[rows], alone, length + 9, 0.125, window=window)
        assert torch.equal(own[0], out[rows])
        assert torch.equal(own[1], lse[rows])


def test_a_query_has_the_same_bits_alone_and_shuffled_over_a_prefix(row_by_row: None) -> None:
    q, k, v = states(3, 1, 30, 45, 64, 64)
    out, lse = prefix_attention(q, k, v, 0.125)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = prefix_attention(q[order], k, v, 0.125)
    assert torch.equal(shuffled[0], out[order])
    assert torch.equal(shuffled[1], lse[order])
    alone = prefix_attention(q[23:24], k, v, 0.125)
    assert torch.equal(alone[0], out[23:24])


def test_a_neighbour_of_infinities_changes_nothing() -> None:
    q, k, v = states(2, 1, 40, 40, 32, 32)
    cu_seqlens = torch.tensor([0, 21], dtype=torch.int32, device=DEVICE)
    clean = packed_prefill(q, k, v, cu_seqlens, 21, 0.2)
    k[21:], v[21:] = torch.inf, torch.nan
    found = packed_prefill(q, k, v, cu_seqlens, 21, 0.2)
    assert torch.equal(found[0][:21], clean[0][:21])


def test_scores_far_apart_stay_finite() -> None:
    q, k, v = states(2, 1, 20, 20, 32, 32)
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    out, lse = packed_prefill(q * 1e15, k * 1e15, v, cu_seqlens, 20, 1.0)
    # The best key takes all, as in the twin; the scores are near 1e31.
    right, _ = reference.packed_prefill(q * 1e15, k * 1e15, v, cu_seqlens, 20, 1.0)
    torch.testing.assert_close(out.cpu(), right, atol=2**-16 * v.abs().max().item(), rtol=0)
    assert lse.isfinite().all()


def test_strides_are_those_of_a_fused_projection() -> None:
    fused = random(30, 4 + 2 + 2, 64)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    cu_seqlens = torch.tensor([0, 30], dtype=torch.int32, device=DEVICE)
    found = packed_prefill(q, k, v, cu_seqlens, 30, 0.125)
    right = packed_prefill(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, 30, 0.125)
    assert torch.equal(found[0], right[0])


def test_no_tokens_are_no_rows() -> None:
    q, k, v = states(4, 2, 0, 0, 64, 48)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, lse = packed_prefill(q, k, v, cu_seqlens, 0, 1.0)
    assert out.shape == (0, 4, 48)
    assert lse.shape == (0, 4)
    assert merge_states(out, lse, out, lse)[0].shape == (0, 4, 48)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = states(4, 2, 8, 8, 64, 64)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ShapeError, match="prefix_attention"):
        prefix_attention(q[:, :3], k, v, 1.0)
    with pytest.raises(ShapeError, match="prefix_attention"):
        prefix_attention(q, k[..., :32], v, 1.0)
    with pytest.raises(ShapeError, match="one dtype"):
        prefix_attention(q, k.half(), v, 1.0)
    with pytest.raises(ShapeError, match="packed_prefill"):
        packed_prefill(q[:5], k, v, cu_seqlens, 8, 1.0)
    with pytest.raises(ShapeError, match="merge_states"):
        merge_states(q, q[..., 0], q, q[:5, :, 0])


def machine_case(card: int, width: int, *, causal: bool = True, window: int = 0, group: int = 4) -> aot.Case:
    tile = ATTENTION_TILES[card, width]
    value_dim, kv_heads = 128 if width == 192 else width, 8
    block_d, block_rest = head_blocks(width)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    pointers |= {"lse_ptr": "*fp32", "cu_seqlens_ptr": "*i32"}
    return aot.Case(
        kernel="kernels.attention:_attention_kernel",
        types=pointers | {"T": "i32", "S": "i32", "scale": "fp32", "blocks_per_sequence": "i32"},
        constants={
            "stride_qt": kv_heads * group * width,
            "stride_qh": width,
            "stride_kt": kv_heads * width,
            "stride_kg": width,
            "stride_vt": kv_heads * value_dim,
            "stride_vg": value_dim,
            "H": kv_heads * group,
            "GROUP": group,
            "D": width,
            "DV": value_dim,
            "CAUSAL": causal,
            "WINDOW": window,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": block_d,
            "BLOCK_REST": block_rest,
            "BLOCK_DV": value_dim,
        },
        aligned=list(pointers),
        capability=card,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def test_machine_code_of_every_tile() -> None:
    assert_attention_code([machine_case(card, width) for card, width in ATTENTION_TILES if width < 256])


@pytest.mark.slow
def test_machine_code_of_wide_heads_windows_and_prefixes() -> None:
    cases = [machine_case(card, 256) for card in (90, 80)]
    cases += [machine_case(card, 128, window=128) for card in (90, 80)]
    cases += [machine_case(card, 128, causal=False, group=7) for card in (90, 80)]
    assert_attention_code(cases)
