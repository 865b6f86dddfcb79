"""What training does to rows between products and the engine does not: gradients, and bfloat16 kept in memory.

In one pass over memory, compiled by numba; the bits are the same for every number of threads.

Legend: T rows, D columns, F half the columns of a gated unit, N heads of 2 W values.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.compiled import both, inline, memory, narrow, run, widen
from kernels.rowwise import FARTHEST, exp, gate_row, rotate_row, sum_by_halves

_ROWS = 16
"""Rows that share what they are computed in."""

_SUMMED_ROWS = 64
"""Rows whose shares of a weight's gradient are added up one after another."""

_ONE, _ZERO = np.float32(1), np.float32(0)


def _rms_norm_gradient(x: Any, weight: Any, eps: Any, grad: Any, of_x: Any, of_weight: Any) -> None:
    count = np.float32(x.shape[1])
    for block in numba.prange(of_weight.shape[0]):
        parts = np.empty(x.shape[1], np.float32)
        of_weight[block] = _ZERO
        for t in range(block * _SUMMED_ROWS, min((block + 1) * _SUMMED_ROWS, x.shape[0])):
            for i in range(x.shape[1]):
                parts[i] = x[t, i] * x[t, i]
            share = _ONE / np.sqrt(sum_by_halves(parts) / count + eps)
            for i in range(x.shape[1]):
                parts[i] = (grad[t, i] * weight[i]) * (x[t, i] * share)
            mean = sum_by_halves(parts) / count
            for i in range(x.shape[1]):
                normed = x[t, i] * share
                of_x[t, i] = (grad[t, i] * weight[i] - normed * mean) * share
                of_weight[block, i] += grad[t, i] * normed


def _swiglu(gate_up: Any, out: Any) -> None:
    half = out.shape[1]
    for block in numba.prange((out.shape[0] + _ROWS - 1) // _ROWS):
        row, gated = np.empty(2 * half, np.float32), np.empty(half, np.float32)
        for t in range(block * _ROWS, min((block + 1) * _ROWS, out.shape[0])):
            widen(gate_up[t], row)
            gate_row(row, _ONE, _ZERO, gated)
            narrow(gated, out[t])


@inline
def _gate_gradient(gate_up: Any, grad: Any) -> None:
    """Overwrite float32 `gate_up` [2 F] with the gradient."""
    half = grad.size
    for i in range(half):
        share = _ONE / (_ONE + exp(min(max(-gate_up[i], -FARTHEST), FARTHEST)))
        silu, up = gate_up[i] * share, gate_up[half + i]
        gate_up[i] = (grad[i] * up) * (share + silu * (_ONE - share))
        gate_up[half + i] = grad[i] * silu


def _swiglu_gradient_float32(gate_up: Any, grad: Any, out: Any) -> None:
    half = grad.shape[1]
    for block in numba.prange((grad.shape[0] + _ROWS - 1) // _ROWS):
        for t in range(block * _ROWS, min((block + 1) * _ROWS, grad.shape[0])):
            for i in range(2 * half):
                out[t, i] = gate_up[t, i]
            _gate_gradient(out[t], grad[t])


def _swiglu_gradient_bfloat16(gate_up: Any, grad: Any, out: Any) -> None:
    half = grad.shape[1]
    for block in numba.prange((grad.shape[0] + _ROWS - 1) // _ROWS):
        row, wide = np.empty(2 * half, np.float32), np.empty(half, np.float32)
        for t in range(block * _ROWS, min((block + 1) * _ROWS, grad.shape[0])):
            widen(gate_up[t], row)
            widen(grad[t], wide)
            _gate_gradient(row, wide)
            narrow(row, out[t])


def _rotated(x: Any, cos: Any, sin: Any, heads: Any, out: Any) -> None:
    for t in numba.prange(x.shape[0]):
        row = np.empty(x.shape[1], np.float32)
        widen(x[t], row)
        rotate_row(row, cos[t], sin[t], heads)
        narrow(row, out[t])


_RMS_NORM_GRADIENT, _SWIGLU, _ROTATED = both(_rms_norm_gradient), both(_swiglu), both(_rotated)
_SWIGLU_GRADIENT = {
    torch.float32: both(_swiglu_gradient_float32),
    torch.bfloat16: both(_swiglu_gradient_bfloat16),
}


def rms_norm_gradient(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `grad` [*, D] of rms_norm(x [*, D]) is by x and by weight [D], all float32."""
    rows, of_rows = x.reshape(-1, x.shape[-1]).contiguous(), grad.reshape(-1, x.shape[-1]).contiguous()
    of_x = torch.empty_like(rows)
    of_weight = torch.empty((len(rows) + _SUMMED_ROWS - 1) // _SUMMED_ROWS, rows.shape[1])
    args = memory(rows), memory(weight), np.float32(eps), memory(of_rows), memory(of_x), memory(of_weight)
    run(_RMS_NORM_GRADIENT, rows.numel(), *args)
    return of_x.view(x.shape), of_weight.sum(dim=0)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of gate_up [T, 2 F], as [T, F], both bfloat16; float32 is rowwise's."""
    gate_up = gate_up.contiguous()
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=torch.bfloat16)
    run(_SWIGLU, gate_up.numel(), memory(gate_up), memory(out))
    return out


def swiglu_gradient(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return what `grad` [T, F] of swiglu(gate_up [T, 2 F]) is by gate_up, all float32 or all bfloat16."""
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    out = torch.empty_like(gate_up)
    run(_SWIGLU_GRADIENT[gate_up.dtype], gate_up.numel(), memory(gate_up), memory(grad), memory(out))
    return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return `x` [T, N * 2 W] bfloat16, its first `heads` heads rotated by position; cos, sin [T, W] float32.

    With -sin it is undone, which is its gradient. Source: arXiv 2104.09864.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    run(_ROTATED, x.numel(), memory(x), memory(cos.contiguous()), memory(sin.contiguous()), heads, memory(out))
    return out
