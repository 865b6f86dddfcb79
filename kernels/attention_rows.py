"""What attention does beside its products: rotation, placing rows in their slots and back, softmax. Compiled by numba.

Values are computed in float32, in the order written; those in memory are float32 or bfloat16.

Legend: T rows, H heads, D head size, R slots of a block, S keys.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.compiled import both, inline, memory, narrow, run, widen
from kernels.rowwise import FARTHEST, exp_parts

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_UNIT = np.float32(2**30)
"""What 1 is in the integers that weights are summed as: S of them are off by S / 2**31 at most."""
_BLOCKS = 4
"""Heads of sequences that share what they are computed in: where each has one row, to allocate it takes as long."""

_SIGN_SHIFT, _NO_SIGN, _INFINITE = np.int32(31), np.int32(0x7FFFFFFF), np.int32(0x7F800000)


@inline
def _softmax(row: Any, bias: Any, scale: Any, sink: Any, powers: Any) -> None:
    """Write softmax(row * scale + bias of the last keys) over float32 `row` [S]; `sink` is one more score, if finite.

    `powers` [S] int32 is room to compute in.
    """
    bits, factor, first = row.view(np.int32), powers.view(np.float32), row.size - bias.size
    for i in range(first):
        row[i] = row[i] * scale
    for i in range(bias.size):
        row[first + i] = row[first + i] * scale + bias[i]
    factor[0] = sink
    most = powers[0] ^ ((powers[0] >> _SIGN_SHIFT) & _NO_SIGN)
    farthest = np.int32(0)
    for i in range(row.size):  # as integers, which compilers may compare in any order
        most = max(most, bits[i] ^ ((bits[i] >> _SIGN_SHIFT) & _NO_SIGN))
        farthest = max(farthest, bits[i] & _NO_SIGN)
    powers[0] = most ^ ((most >> _SIGN_SHIFT) & _NO_SIGN)
    # One score that is NaN, of either sign, makes the row NaN: by a sum of 0, as no score is near it.
    top = factor[0] if farthest <= _INFINITE else np.float32(np.nan)
    for i in range(row.size):
        x = row[i] - top
        part, powers[i] = exp_parts(max(x, -FARTHEST))
        row[i] = part if x >= -FARTHEST else _ZERO
    for i in range(row.size):
        row[i] *= factor[i]
    whole = np.int64(0)
    for i in range(row.size):  # each at most 1; a sum of integers may be taken in any order
        whole += np.int64(np.int32(row[i] * _UNIT + _HALF))
    total = np.float32(whole) / _UNIT
    if sink - top >= -FARTHEST:
        part, powers[0] = exp_parts(sink - top)
        total += part * factor[0]
    share = _ONE / total
    for i in range(row.size):
        row[i] *= share


def _softmax_float32(scores: Any, bias: Any, rows: Any, sinks: Any, scale: Any) -> None:
    heads = scores.shape[1]
    blocks = scores.shape[0] * heads
    for first in numba.prange((blocks + _BLOCKS - 1) // _BLOCKS):
        powers = np.empty(scores.shape[3], np.int32)
        for block in range(first * _BLOCKS, min((first + 1) * _BLOCKS, blocks)):
            b, h = block // heads, block % heads
            for r in range(rows[b, 0], rows[b, 1]):
                _softmax(scores[b, h, r], bias[b % bias.shape[0], r], scale, sinks[h], powers)


def _softmax_bfloat16(scores: Any, bias: Any, rows: Any, sinks: Any, scale: Any) -> None:
    heads = scores.shape[1]
    blocks = scores.shape[0] * heads
    for first in numba.prange((blocks + _BLOCKS - 1) // _BLOCKS):
        powers, wide = np.empty(scores.shape[3], np.int32), np.empty(scores.shape[3], np.float32)
        for block in range(first * _BLOCKS, min((first + 1) * _BLOCKS, blocks)):
            b, h = block // heads, block % heads
            for r in range(rows[b, 0], rows[b, 1]):
                widen(scores[b, h, r], wide)
                _softmax(wide, bias[b % bias.shape[0], r], scale, sinks[h], powers)
                narrow(wide, scores[b, h, r])


@inline
def rotate_row(row: Any, cos: Any, sin: Any, heads: Any) -> None:
    """Rotate the first `heads` heads of float32 `row` in place; cos, sin [D / 2]."""
    half = cos.size
    for h in range(heads):
        low, high = h * 2 * half, (h * 2 + 1) * half
        for i in range(half):
            first, second = row[low + i], row[high + i]
            row[low + i] = first * cos[i] - second * sin[i]
            row[high + i] = second * cos[i] + first * sin[i]


def _rotate(x: Any, cos: Any, sin: Any, heads: Any) -> None:
    for t in numba.prange(x.shape[0]):
        rotate_row(x[t], cos[t], sin[t], heads)


def _spread_float32(x: Any, first: Any, block: Any, slot: Any, out: Any) -> None:
    d = out.shape[3]
    for t in numba.prange(x.shape[0]):
        for h in range(out.shape[1]):
            begin = first + h * d
            for i in range(d):
                out[block[t], h, slot[t], i] = x[t, begin + i]


def _spread_bfloat16(x: Any, first: Any, block: Any, slot: Any, out: Any) -> None:
    d = out.shape[3]
    for t in numba.prange(x.shape[0]):
        for h in range(out.shape[1]):
            begin = first + h * d
            narrow(x[t, begin : begin + d], out[block[t], h, slot[t]])


def _collect_float32(x: Any, block: Any, slot: Any, out: Any) -> None:
    d = x.shape[3]
    for t in numba.prange(out.shape[0]):
        for h in range(x.shape[1]):
            for i in range(d):
                out[t, h * d + i] = x[block[t], h, slot[t], i]


def _collect_bfloat16(x: Any, block: Any, slot: Any, out: Any) -> None:
    d = x.shape[3]
    for t in numba.prange(out.shape[0]):
        for h in range(x.shape[1]):
            widen(x[block[t], h, slot[t]], out[t, h * d : (h + 1) * d])


_SOFTMAX = {torch.float32: both(_softmax_float32), torch.bfloat16: both(_softmax_bfloat16)}
_SPREAD = {torch.float32: both(_spread_float32), torch.bfloat16: both(_spread_bfloat16)}
_COLLECT = {torch.float32: both(_collect_float32), torch.bfloat16: both(_collect_bfloat16)}
_ROTATE = both(_rotate)


def softmax_(scores: Tensor, bias: Tensor, rows: Tensor, sinks: Tensor | None, scale: float) -> None:
    """Overwrite `scores` with softmax(scores * scale + bias) over the keys.

    Args:
        scores: [B, H, L, S] float32 or bfloat16, contiguous.
        bias: [B or 1, L, W] float32, for the last W keys; each query that counts sees at least one key.
        rows: [B, 2] int64, the queries that count, from the first to before the second; others are left as they are.
        sinks: [H], one more score per head, which takes its share.
        scale: multiplies the scores.
    """
    each = torch.full((scores.shape[1],), float("-inf")) if sinks is None else sinks
    run(
        _SOFTMAX[scores.dtype],
        scores.numel(),
        memory(scores),
        memory(bias.contiguous()),
        rows.numpy(),
        memory(each),
        np.float32(scale),
    )


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotate the first `heads` heads of `x` [T, *] float32, each [D], by position; cos, sin [T, D / 2].

    As `apply_rope` of kernels/cpu.py, to the bit. Source: arXiv 2104.09864.
    """
    run(_ROTATE, len(x) * heads * 2 * cos.shape[1], memory(x), memory(cos), memory(sin), heads)


def spread(x: Tensor, first: int, block: Tensor, slot: Tensor, out: Tensor) -> None:
    """Write heads of `x` into their slots: out[block[t], h, slot[t]] = x[t, first + h * D :][:D], rounded to `out`.

    Args:
        x: [T, *] float32, contiguous.
        first: the column where its heads begin.
        block: [T] int64.
        slot: [T] int64.
        out: [*, H, R, D] float32, bfloat16 or float16, contiguous; other slots stay as they are.
    """
    size = len(x) * out.shape[1] * out.shape[3]
    if out.dtype == torch.float16:  # numba does not know it
        heads = x[:, first : first + out.shape[1] * out.shape[3]].unflatten(1, (out.shape[1], out.shape[3]))
        out[block, :, slot] = heads.to(torch.float16)
        return
    run(_SPREAD[out.dtype], size, memory(x), first, block.numpy(), slot.numpy(), memory(out))


def collect(x: Tensor, block: Tensor, slot: Tensor, out: Tensor) -> None:
    """Undo `spread`: write x[block[t], h, slot[t]] of [*, H, R, D] as out[t, h * D :][:D], `out` [T, H * D] float32."""
    run(_COLLECT[x.dtype], out.numel(), memory(x), block.numpy(), slot.numpy(), memory(out))
