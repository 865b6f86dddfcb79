"""What is done to one row after another beside the products, in one pass over memory: compiled by numba on first use.

Every operation is one of IEEE 754 in the order written here: nothing is contracted or reordered, and a sum is taken by
halves. So a row's bits are its own, on every processor and for every number of threads.

Legend: T rows, D and N columns, F half the columns of a gated unit.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.compiled import as_float32, both, inline, memory, run

_ROWS = 16
"""Rows that share what they are computed in: to allocate it takes a third as long as to norm a row of 576."""

_FEW = 16
"""Values that are summed one after another."""

_ROUNDER = np.float32(1.5 * 2**23)
"""Added to a float32 below 2**22 in size and taken off again, it leaves no digit behind the point: to nearest even."""

_LOG2_E = np.float32(1.44269504)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""ln 2 in two parts, the first of few digits, so that its multiples are exact. Source: Cephes, `expf`."""
_P0, _P1, _P2, _P3, _P4, _P5 = (
    np.float32(value)
    for value in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
"""(exp(r) - 1 - r) / r² for |r| <= ln 2 / 2, to 2e-7. Source: Cephes, `expf`."""

_ONE, _ZERO, _LARGEST, _SHARE = np.float32(1), np.float32(0), np.float32(127), np.float32(1 / 127)
FARTHEST = np.float32(87)
"""Of exp's argument, where it is still a normal number: a gate below -87 gives 1e-36 of itself in place of less."""
_NO_SIGN, _EXPONENT_BIAS, _EXPONENT_SHIFT = np.int32(0x7FFFFFFF), np.int32(127), np.int32(23)


@inline
def _quantize(row: Any, out: Any, scale: Any) -> None:
    """Write float32 `row` [N] into `out` as int8, and its scale into `scale` [1]."""
    bits = row.view(np.int32)
    most = np.int32(0)
    for i in range(row.size):
        most = max(most, bits[i] & _NO_SIGN)  # without a sign floats are in the order of their bits
    scale.view(np.int32)[0] = most
    scale[0] *= _SHARE
    if scale[0] == _ZERO:
        scale[0] = _ONE  # a row of zeros stays one, and 0/0 out
    by = scale[0]
    for i in range(row.size):
        # A subnormal absmax loses digits in its scale, so the quotient can pass 127.
        out[i] = np.int8(min(max((row[i] / by + _ROUNDER) - _ROUNDER, -_LARGEST), _LARGEST))


@inline
def exp(x: Any) -> Any:
    """Return e to the power of float32 `x` in [-87, 87]."""
    whole = (x * _LOG2_E + _ROUNDER) - _ROUNDER
    r = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    poly = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power: Any = as_float32((np.int32(whole) + _EXPONENT_BIAS) << _EXPONENT_SHIFT)
    return ((poly * (r * r) + r) + _ONE) * power


@inline
def gate_row(row: Any, gain: Any, limit: Any, out: Any) -> None:
    """Write gate * sigmoid(gain * gate) * up of `row` [2 F] into `out` [F].

    `row` is clamped in place where `limit` is above 0.
    """
    half = out.size
    if limit > _ZERO:
        for i in range(half):
            row[i] = min(row[i], limit)
            row[half + i] = min(max(row[half + i], -limit), limit) + _ONE
    for i in range(half):
        away = exp(min(max(-gain * row[i], -FARTHEST), FARTHEST))
        out[i] = (row[i] / (_ONE + away)) * row[half + i]


@inline
def sum_by_halves(values: Any) -> Any:
    """Return the sum of `values`, which hold parts of it afterwards."""
    left = values.size
    while left > _FEW:
        half = (left + 1) // 2
        for i in range(left - half):
            values[i] += values[half + i]
        left = half
    total = _ZERO
    for i in range(left):
        total += values[i]
    return total


@inline
def _norm(row: Any, weight: Any, eps: Any, out: Any) -> None:
    """Write `row` [D] over the root of its mean square, times `weight`."""
    for i in range(row.size):
        out[i] = row[i] * row[i]
    share = _ONE / np.sqrt(sum_by_halves(out) / np.float32(row.size) + eps)
    for i in range(row.size):
        out[i] = (row[i] * share) * weight[i]


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


def _quantize_rows(x: Any, out: Any, scales: Any) -> None:
    for t in numba.prange(x.shape[0]):
        _quantize(x[t], out[t], scales[t : t + 1])


def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for t in numba.prange(x.shape[0]):
        _norm(x[t], weight, eps, out[t])


def _rms_norm_quantize(x: Any, residual: Any, weight: Any, eps: Any, total: Any, out: Any, scales: Any) -> None:
    for block in numba.prange((x.shape[0] + _ROWS - 1) // _ROWS):
        normed = np.empty(x.shape[1], np.float32)
        for t in range(block * _ROWS, min((block + 1) * _ROWS, x.shape[0])):
            if residual.shape[0]:
                for i in range(x.shape[1]):
                    total[t, i] = x[t, i] + residual[t, i]
                _norm(total[t], weight, eps, normed)
            else:
                _norm(x[t], weight, eps, normed)
            _quantize(normed, out[t], scales[t : t + 1])


def _swiglu(gate_up: Any, gain: Any, limit: Any, out: Any) -> None:
    for block in numba.prange((gate_up.shape[0] + _ROWS - 1) // _ROWS):
        row = np.empty(gate_up.shape[1], np.float32)
        for t in range(block * _ROWS, min((block + 1) * _ROWS, gate_up.shape[0])):
            for i in range(gate_up.shape[1]):
                row[i] = gate_up[t, i]
            gate_row(row, gain, limit, out[t])


def _swiglu_quantize(gate_up: Any, gain: Any, limit: Any, out: Any, scales: Any) -> None:
    half = out.shape[1]
    for block in numba.prange((gate_up.shape[0] + _ROWS - 1) // _ROWS):
        row, gated = np.empty(2 * half, np.float32), np.empty(half, np.float32)
        for t in range(block * _ROWS, min((block + 1) * _ROWS, gate_up.shape[0])):
            for i in range(gate_up.shape[1]):
                row[i] = gate_up[t, i]
            gate_row(row, gain, limit, gated)
            _quantize(gated, out[t], scales[t : t + 1])


def _scaled_swiglu_quantize(
    products: Any, x_scale: Any, weight_scale: Any, bias: Any, gain: Any, limit: Any, out: Any, scales: Any
) -> None:
    half = out.shape[1]
    for block in numba.prange((products.shape[0] + _ROWS - 1) // _ROWS):
        row, gated = np.empty(2 * half, np.float32), np.empty(half, np.float32)
        for t in range(block * _ROWS, min((block + 1) * _ROWS, products.shape[0])):
            scale = x_scale[t]
            for i in range(2 * half):
                row[i] = (np.float32(products[t, i]) * scale) * weight_scale[i]
            for i in range(bias.size):
                row[i] += bias[i]
            gate_row(row, gain, limit, gated)
            _quantize(gated, out[t], scales[t : t + 1])


def _scale(products: Any, x_scale: Any, weight_scale: Any, bias: Any) -> None:
    out = products.view(np.float32)
    for t in numba.prange(products.shape[0]):
        scale = x_scale[t]
        if bias.size:
            for i in range(products.shape[1]):
                out[t, i] = (np.float32(products[t, i]) * scale) * weight_scale[i] + bias[i]
        else:
            for i in range(products.shape[1]):
                out[t, i] = (np.float32(products[t, i]) * scale) * weight_scale[i]


_QUANTIZE_ROWS, _RMS_NORM, _RMS_NORM_QUANTIZE = both(_quantize_rows), both(_rms_norm), both(_rms_norm_quantize)
_SWIGLU, _SWIGLU_QUANTIZE, _SCALE = both(_swiglu), both(_swiglu_quantize), both(_scale)
_ROTATE = both(_rotate)
_SCALED_SWIGLU_QUANTIZE = both(_scaled_swiglu_quantize)

_NOTHING = np.empty(0, np.float32)
_NO_ROWS = np.empty((0, 0), np.float32)


def _float32(x: Tensor) -> npt.NDArray[np.float32]:
    return x.contiguous().numpy()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [T, N] float32 as int8 in [-127, 127] and its row scales [T] float32.

    Source: LLM.int8(), arXiv 2208.07339, vector-wise scaling; absmax / 127, round to nearest even, as vLLM does.
    """
    x = x.contiguous()
    out, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    run(_QUANTIZE_ROWS, x.numel(), x.numpy(), out.numpy(), scales.numpy())
    return out, scales


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis [*, D] float32. Source: arXiv 1910.07467."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    run(_RMS_NORM, rows.numel(), rows.numpy(), _float32(weight), np.float32(eps), out.numpy())
    return out.view(x.shape)


def rms_norm_quantize(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return rms_norm(x + residual [T, D]) as int8 and its scales [T], and the sum, or nothing without a residual."""
    x = x.contiguous()
    out, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    total = torch.empty_like(x) if residual is not None else x.new_empty(0, 0)
    added = _NO_ROWS if residual is None else _float32(residual)
    run(
        _RMS_NORM_QUANTIZE,
        x.numel(),
        x.numpy(),
        added,
        _float32(weight),
        np.float32(eps),
        total.numpy(),
        out.numpy(),
        scales.numpy(),
    )
    return out, scales, total if residual is not None else x.new_empty(0)


def _gain_and_limit(alpha: float | None, limit: float | None) -> tuple[np.float32, np.float32]:
    """Return them as kernels take them: no limit is 0."""
    return (_ONE, _ZERO) if alpha is None or limit is None else (np.float32(alpha), np.float32(limit))


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotate the first `heads` heads of `x` [T, *] float32, each [D], by position; cos, sin [T, D / 2].

    As `apply_rope` of kernels/cpu.py, to the bit. Source: arXiv 2104.09864.
    """
    run(_ROTATE, len(x) * heads * 2 * cos.shape[1], memory(x), memory(cos), memory(sin), heads)


def swiglu(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> Tensor:
    """Return silu(gate) * up of gate_up [T, 2 F], as [T, F]; with `alpha` and `limit` gpt-oss's clamped form.

    That is (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within ± `limit`.
    Sources: arXiv 2002.05202; openai/gpt-oss, `swiglu` of torch/model.py.
    """
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    run(_SWIGLU, gate_up.numel(), gate_up.numpy(), *_gain_and_limit(alpha, limit), out.numpy())
    return out


def swiglu_quantize(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return `swiglu` as int8 [T, F] and its scales [T]."""
    gate_up = gate_up.contiguous()
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=torch.int8)
    scales = torch.empty(len(gate_up))
    run(_SWIGLU_QUANTIZE, gate_up.numel(), gate_up.numpy(), *_gain_and_limit(alpha, limit), out.numpy(), scales.numpy())
    return out, scales


def scaled_swiglu_quantize(
    products: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    alpha: float | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return swiglu_quantize(scaled(products)) as int8 [T, F] and its scales [T], to the bit, in one pass."""
    products = products.contiguous()
    out = torch.empty(len(products), products.shape[1] // 2, dtype=torch.int8)
    scales = torch.empty(len(products))
    run(
        _SCALED_SWIGLU_QUANTIZE,
        products.numel(),
        products.numpy(),
        _float32(x_scale),
        _float32(weight_scale),
        _NOTHING if bias is None else _float32(bias),
        *_gain_and_limit(alpha, limit),
        out.numpy(),
        scales.numpy(),
    )
    return out, scales


def scaled(products: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return products [T, N] int32 or float32 times x_scale [T], times weight_scale [N], plus bias [N], as float32.

    In the memory of `products`, which hold nothing else afterwards.
    """
    products = products.contiguous()
    run(
        _SCALE,
        products.numel(),
        products.numpy(),
        _float32(x_scale),
        _float32(weight_scale),
        _NOTHING if bias is None else _float32(bias),
    )
    return products.view(torch.float32)
