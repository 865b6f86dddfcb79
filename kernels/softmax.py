"""The running softmax that every attention kernel shares, and the merge of states: in base 2, in float32.

A state is what attention over some of the keys leaves: `out`, normalized over those keys, and `lse`, the base-2
logarithm of the sum of their exponentials; zeros and -inf where no key is visible. Two states over different keys
merge into the state over both, in one fixed order. Source: arXiv 2307.08691; of merging, arXiv 2501.01005.

Legend: T tokens, H heads, Dv value size, R = T * H rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ShapeError
from kernels.language import to_dtype

LOG2E = tl.constexpr(math.log2(math.e))
"""Scores times this are exponents of 2, which the hardware has an instruction for."""

LOWEST = tl.constexpr(-(2.0**126))
"""Where a running maximum starts: from -inf, a row whose first keys are all hidden would get -inf - -inf = NaN; from
the lowest number there is, the first difference would overflow."""

_MERGE_ROWS = 16


@triton.jit
def softmax_step(scores, scale, top, total, acc):
    """Return the weights of one block of keys, and (top, total, acc) as if it had been there from the start.

    `scale` holds log2(e) and is positive. `top` counts in scaled scores, so that one fused multiply-add serves each.
    """
    top_new = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - top_new[:, None])
    decay = tl.exp2(top - top_new)
    return weights, top_new, total * decay + tl.sum(weights, 1), acc * decay[:, None]


@triton.jit
def softmax_end(top, total, acc):
    """Return (out, lse) of rows [M, Dv]; a row that saw no key is zeros, with -inf."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    return acc / total[:, None], tl.where(empty, float("-inf"), top + tl.log2(total))


@triton.jit
def _merge_states_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    R,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_DV)
    offsets = rows[:, None] * DV + columns[None, :]
    inside = (rows < R)[:, None] & (columns < DV)[None, :]
    lse_a = tl.load(lse_a_ptr + rows, mask=rows < R, other=0.0)
    lse_b = tl.load(lse_b_ptr + rows, mask=rows < R, other=0.0)
    top = tl.maximum(tl.maximum(lse_a, lse_b), LOWEST)
    weight_a = tl.exp2(lse_a - top)
    weight_b = tl.exp2(lse_b - top)
    acc = tl.load(out_a_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * weight_a[:, None]
    acc += tl.load(out_b_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * weight_b[:, None]
    out, lse = softmax_end(top, weight_a + weight_b, acc)
    tl.store(out_ptr + offsets, to_dtype(out, out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + rows, lse, mask=rows < R)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state (out, lse) of attention over the keys of both states, summed in float32.

    Args:
        out_a: [T, H, Dv], over some keys; gives the result's dtype.
        lse_a: [T, H] float32, base 2.
        out_b: [T, H, Dv], over other keys.
        lse_b: [T, H] float32.

    Raises: ShapeError if they do not fit.
    """
    if out_a.shape != out_b.shape or lse_a.shape != out_a.shape[:2] or lse_b.shape != out_a.shape[:2]:
        shapes = f"{tuple(out_a.shape)=}, {tuple(lse_a.shape)=}, {tuple(out_b.shape)=}, {tuple(lse_b.shape)=}"
        raise ShapeError(f"merge_states: {shapes}; both out are [T, H, Dv] and both lse [T, H]")
    out_a, lse_a, out_b, lse_b = (state.contiguous() for state in (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    rows, value_dim = lse.numel(), out.shape[2]
    if rows:
        _merge_states_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
            out_a,
            lse_a,
            out_b,
            lse_b,
            out,
            lse,
            rows,
            DV=value_dim,
            BLOCK_DV=triton.next_power_of_2(value_dim),
            BLOCK_R=_MERGE_ROWS,
        )
    return out, lse


def head_blocks(head_dim: int) -> tuple[int, int]:
    """Return the powers of two that cover a head: the largest within it, and one for the rest or 0.

    192 is 128 + 64 and 576 is 512 + 64, where one power of two would multiply zeros for a third or nearly half.
    """
    main = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - main
    return main, max(16, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def _merge_splits_kernel(
    parts_ptr,
    parts_lse_ptr,
    lens_ptr,
    sinks_ptr,
    out_ptr,
    num_splits,
    H: tl.constexpr,
    DV: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_DV)
    length = tl.load(lens_ptr + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(0, length - WINDOW) // SPLIT
    top = tl.cast(LOWEST, tl.float32)
    total = 0.0
    if SINKS:
        top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = 1.0
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    row = (sequence.to(tl.int64) * H + head) * num_splits
    for split in tl.range(first, tl.cdiv(length, SPLIT)):
        lse = tl.load(parts_lse_ptr + row + split)
        part = tl.load(parts_ptr + (row + split) * DV + columns, mask=columns < DV, other=0.0)
        top_new = tl.maximum(top, lse)
        weight = tl.exp2(lse - top_new)
        decay = tl.exp2(top - top_new)
        total = total * decay + weight
        acc = acc * decay + weight * part
        top = top_new
    out = to_dtype(acc / tl.where(total == 0, 1.0, total), out_ptr.dtype.element_ty)
    tl.store(out_ptr + (sequence.to(tl.int64) * H + head) * DV + columns, out, mask=columns < DV)


def merge_splits(
    parts: Tensor, parts_lse: Tensor, lens: Tensor, out: Tensor, split: int, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Return `out` [B, H, Dv], filled from the states over each `split` keys of a sequence, the first keys first.

    Args:
        parts: [B, H, splits, Dv] float32; those that hold no visible key are not read.
        parts_lse: [B, H, splits] float32.
        lens: [B] int32 keys of each sequence; a sequence of none gives zeros.
        out: [B, H, Dv], contiguous.
        split: keys per part.
        window: how many of the last keys are visible.
        sinks: [H], one more score per head, which takes its share of the softmax and adds nothing.
    """
    batch, heads, value_dim = out.shape
    _merge_splits_kernel[(batch, heads)](
        parts,
        parts_lse,
        lens,
        sinks,
        out,
        parts.shape[2],
        H=heads,
        DV=value_dim,
        WINDOW=window or 0,
        SINKS=sinks is not None,
        SPLIT=split,
        BLOCK_DV=triton.next_power_of_2(value_dim),
        num_warps=4 if value_dim > 256 else 1,
    )
    return out
