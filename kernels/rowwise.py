"""What is done to one row after another beside the products, in one pass over memory: compiled by numba on first use.

Every operation is one of IEEE 754 in the order written here: nothing is contracted or reordered, and a sum is kept in
`_LANES` parts. So a row's bits are its own, on every processor and for every number of threads.

Legend: T rows, D and N columns, F half the columns of a gated unit.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LANES = 16
"""Parts of a sum, which fill a vector register of any processor."""

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
_FARTHEST = np.float32(87)
"""Of exp's argument, where it is still a normal number: a gate below -87 gives 1e-36 of itself in place of less."""
_NO_SIGN, _EXPONENT_BIAS, _EXPONENT_SHIFT = np.int32(0x7FFFFFFF), np.int32(127), np.int32(23)

_SERIAL_VALUES = 32_768
"""Fewer values are not worth waking other threads for."""

_Compiled = Callable[..., Any]
_inline = numba.njit(inline="always", error_model="numpy")


@_inline
def _quantize(row: Any, out: Any) -> Any:
    """Write float32 `row` [N] into `out` as int8; return its scale."""
    bits, largest = row.view(np.int32), np.zeros(1, np.int32)
    most = np.int32(0)
    for i in range(row.size):
        most = max(most, bits[i] & _NO_SIGN)  # without a sign floats are in the order of their bits
    largest[0] = most
    scale = largest.view(np.float32)[0] * _SHARE
    if scale == _ZERO:
        scale = _ONE  # a row of zeros stays one, and 0/0 out
    for i in range(row.size):
        # A subnormal absmax loses digits in its scale, so the quotient can pass 127.
        out[i] = np.int8(min(max((row[i] / scale + _ROUNDER) - _ROUNDER, -_LARGEST), _LARGEST))
    return scale


@_inline
def _gate(gate: Any, up: Any, out: Any, gain: Any) -> None:
    """Write gate * sigmoid(gain * gate) * up, each [F] float32."""
    powers = np.empty(gate.size, np.int32)
    scale = powers.view(np.float32)
    for i in range(gate.size):
        x = min(max(-gain * gate[i], -_FARTHEST), _FARTHEST)
        whole = (x * _LOG2_E + _ROUNDER) - _ROUNDER
        r = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
        poly = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        out[i] = (poly * (r * r) + r) + _ONE
        powers[i] = (np.int32(whole) + _EXPONENT_BIAS) << _EXPONENT_SHIFT
    for i in range(gate.size):
        out[i] = (gate[i] / (_ONE + out[i] * scale[i])) * up[i]


@_inline
def _gate_row(row: Any, gain: Any, limit: Any, out: Any) -> None:
    """Write the gated unit of `row` [2 F] into `out` [F], clamped where `limit` is above 0."""
    half = out.size
    if limit > _ZERO:
        gate, up = np.empty(half, np.float32), np.empty(half, np.float32)
        for i in range(half):
            gate[i] = min(row[i], limit)
            up[i] = min(max(row[half + i], -limit), limit) + _ONE
        _gate(gate, up, out, gain)
    else:
        _gate(row[:half], row[half:], out, gain)


@_inline
def _norm(row: Any, weight: Any, eps: Any, out: Any) -> None:
    """Write `row` [D] over the root of its mean square, times `weight`; D in whole lanes, then the rest."""
    parts = np.zeros(_LANES, np.float32)
    end = row.size // _LANES * _LANES
    for start in range(0, end, _LANES):
        for lane in range(_LANES):
            parts[lane] += row[start + lane] * row[start + lane]
    for i in range(end, row.size):
        parts[i - end] += row[i] * row[i]
    total = _ZERO
    for lane in range(_LANES):
        total += parts[lane]
    share = _ONE / np.sqrt(total / np.float32(row.size) + eps)
    for i in range(row.size):
        out[i] = (row[i] * share) * weight[i]


def _quantize_rows(x: Any, out: Any, scales: Any) -> None:
    for t in numba.prange(x.shape[0]):
        scales[t] = _quantize(x[t], out[t])


def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for t in numba.prange(x.shape[0]):
        _norm(x[t], weight, eps, out[t])


def _rms_norm_quantize(x: Any, residual: Any, weight: Any, eps: Any, total: Any, out: Any, scales: Any) -> None:
    for t in numba.prange(x.shape[0]):
        normed = np.empty(x.shape[1], np.float32)
        if residual.shape[0]:
            for i in range(x.shape[1]):
                total[t, i] = x[t, i] + residual[t, i]
            _norm(total[t], weight, eps, normed)
        else:
            _norm(x[t], weight, eps, normed)
        scales[t] = _quantize(normed, out[t])


def _swiglu(gate_up: Any, gain: Any, limit: Any, out: Any) -> None:
    for t in numba.prange(gate_up.shape[0]):
        _gate_row(gate_up[t], gain, limit, out[t])


def _swiglu_quantize(gate_up: Any, gain: Any, limit: Any, out: Any, scales: Any) -> None:
    for t in numba.prange(gate_up.shape[0]):
        gated = np.empty(gate_up.shape[1] // 2, np.float32)
        _gate_row(gate_up[t], gain, limit, gated)
        scales[t] = _quantize(gated, out[t])


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


def _compiled(kernel: _Compiled, many: bool) -> _Compiled:
    try:
        return numba.njit(parallel=many, cache=True, error_model="numpy")(kernel)
    except RuntimeError:  # no folder of this user's can be written: it is compiled in every process
        return numba.njit(parallel=many, error_model="numpy")(kernel)


def _both(kernel: _Compiled) -> tuple[_Compiled, _Compiled]:
    """Return `kernel` for few rows and for many."""
    return _compiled(kernel, False), _compiled(kernel, True)


_QUANTIZE_ROWS, _RMS_NORM, _RMS_NORM_QUANTIZE = _both(_quantize_rows), _both(_rms_norm), _both(_rms_norm_quantize)
_SWIGLU, _SWIGLU_QUANTIZE, _SCALE = _both(_swiglu), _both(_swiglu_quantize), _both(_scale)

_NOTHING = np.empty(0, np.float32)
_NO_ROWS = np.empty((0, 0), np.float32)


@functools.cache
def _threads() -> int:
    """Return the threads numba may use: those of OpenMP, as several threads may call it at once; without it, one."""
    config: Any = numba.config
    if config.THREADING_LAYER == "default":
        config.THREADING_LAYER = "omp"
    try:
        _QUANTIZE_ROWS[1](np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int8), np.zeros(1, np.float32))
    except ValueError:  # of numba: no threading layer could be loaded
        return 1
    return numba.get_num_threads()


def _run(kernel: tuple[_Compiled, _Compiled], first: Tensor, *others: Any) -> None:
    if first.numel() < _SERIAL_VALUES or (threads := min(torch.get_num_threads(), _threads())) == 1:
        kernel[0](first.numpy(), *others)
    else:
        numba.set_num_threads(threads)
        kernel[1](first.numpy(), *others)


def _float32(x: Tensor) -> npt.NDArray[np.float32]:
    return x.contiguous().numpy()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [T, N] float32 as int8 in [-127, 127] and its row scales [T] float32.

    Source: LLM.int8(), arXiv 2208.07339, vector-wise scaling; absmax / 127, round to nearest even, as vLLM does.
    """
    x = x.contiguous()
    out, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    _run(_QUANTIZE_ROWS, x, out.numpy(), scales.numpy())
    return out, scales


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis [*, D] float32. Source: arXiv 1910.07467."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    _run(_RMS_NORM, rows, _float32(weight), np.float32(eps), out.numpy())
    return out.view(x.shape)


def rms_norm_quantize(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return rms_norm(x + residual [T, D]) as int8 and its scales [T], and the sum, or nothing without a residual."""
    x = x.contiguous()
    out, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    total = torch.empty_like(x) if residual is not None else x.new_empty(0, 0)
    added = _NO_ROWS if residual is None else _float32(residual)
    _run(_RMS_NORM_QUANTIZE, x, added, _float32(weight), np.float32(eps), total.numpy(), out.numpy(), scales.numpy())
    return out, scales, total if residual is not None else x.new_empty(0)


def _gain_and_limit(alpha: float | None, limit: float | None) -> tuple[np.float32, np.float32]:
    """Return them as kernels take them: no limit is 0."""
    return (_ONE, _ZERO) if alpha is None or limit is None else (np.float32(alpha), np.float32(limit))


def swiglu(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> Tensor:
    """Return silu(gate) * up of gate_up [T, 2 F], as [T, F]; with `alpha` and `limit` gpt-oss's clamped form.

    That is (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within ± `limit`.
    Sources: arXiv 2002.05202; openai/gpt-oss, `swiglu` of torch/model.py.
    """
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _run(_SWIGLU, gate_up, *_gain_and_limit(alpha, limit), out.numpy())
    return out


def swiglu_quantize(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return `swiglu` as int8 [T, F] and its scales [T]."""
    gate_up = gate_up.contiguous()
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=torch.int8)
    scales = torch.empty(len(gate_up))
    _run(_SWIGLU_QUANTIZE, gate_up, *_gain_and_limit(alpha, limit), out.numpy(), scales.numpy())
    return out, scales


def scaled(products: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return products [T, N] int32 or float32 times x_scale [T], times weight_scale [N], plus bias [N], as float32.

    In the memory of `products`, which hold nothing else afterwards.
    """
    products = products.contiguous()
    _run(_SCALE, products, _float32(x_scale), _float32(weight_scale), _NOTHING if bias is None else _float32(bias))
    return products.view(torch.float32)
