"""Row kernels that end in int8: a token's activations are read once, normed or gated, and quantized by their own scale.

Legend: T tokens, K in features, D hidden_size, F intermediate_size; BLOCK columns held in registers at once.
All are bound by memory: one program a row, and a row of at most MAX_BLOCK columns is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ShapeError
from kernels.language import INTERPRETED, NO_FUSION, round_to_int8, to_dtype

MAX_BLOCK = 16384
"""The widest row held in registers: 32 float32 columns in each thread of 16 warps."""

_SWEPT_BLOCK = 4096
"""Columns of a step over a wider row, whose second sweep finds it in L2. 18,944 columns leave 7 % of the lanes idle,
where 8192 at once would leave 23 %, and spill."""


@triton.jit
def absolute_bits(x):
    """Return the bits of |x| as int32, which are ordered as |x| is, with NaN above infinity.

    So a maximum over them lets no NaN pass unseen, as one over floats does, and a warp takes it by one REDUX
    instruction instead of five shuffles.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits):
    """Return the scale of a row, absmax / 127, or 1 where that is 0, from the `absolute_bits` of its columns."""
    scale = tl.div_rn(tl.max(bits, axis=0).to(tl.float32, bitcast=True), 127.0)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def divide(x, scale):
    """Return x / scale rounded to nearest, as div.rn and torch round it, for |x / scale| <= 128.

    Triton's `/` is div.full: up to 2 units off in the last place, so that 4.6875 / 0.9375 is not 5 (triton #10661).
    div.rn is right, but in each column it has an FCHK, an MUFU and a branch to its slow path: 952 instructions where
    this kernel has 712, at 32 columns a thread on sm_90. One reciprocal a row and full-rate multiply-adds give the same
    bits: the first correction leaves the quotient within one unit, the second rounds it right, by Markstein's theorem
    (IBM Journal of R&D 34, 1990). Remainders must not underflow, so rows near the subnormal numbers are lifted first.
    """
    if INTERPRETED:
        return x / scale  # numpy's is exact, and the interpreter's fma rounds twice
    lift = tl.where(scale < 2.0**-100, 2.0**60, 1.0)
    x *= lift
    divisor = scale * lift
    reciprocal = tl.div_rn(1.0, divisor)
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def _quantize_rows_kernel(x_ptr, x_int8_ptr, x_scale_ptr, stride_xt, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_xt
    x_int8_ptr += t * K
    if K <= BLOCK:
        k = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        scale = scale_of(absolute_bits(x))
        tl.store(x_int8_ptr + k, round_to_int8(divide(x, scale)), mask=k < K)
    else:
        bits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            bits = tl.maximum(bits, absolute_bits(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)))
        scale = scale_of(bits)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            tl.store(x_int8_ptr + k, round_to_int8(divide(x, scale)), mask=k < K)
    tl.store(x_scale_ptr + t, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [T, K] as int8 in [-127, 127] and its row scales [T] float32, bit for bit as its twin does.

    A row with an infinity or a NaN has no scale either: it is infinite or NaN, and so is what is computed with it.

    Raises: ShapeError if x is no matrix of at least one column, each row contiguous.
    Source: LLM.int8(), arXiv 2208.07339, vector-wise scaling; absmax / 127, round to nearest even, as vLLM does.
    """
    if x.dim() != 2 or x.shape[1] == 0 or x.stride(1) != 1:
        raise ShapeError(f"quantize_rows: x {_layout(x)} must be [T, K] with K at least 1 and contiguous rows")
    x_int8, x_scale = _outputs(x, x.shape[1])
    if len(x):
        block, num_warps = tile(x.shape[1])
        _quantize_rows_kernel[(len(x),)](
            x, x_int8, x_scale, x.stride(0), K=x.shape[1], BLOCK=block, num_warps=num_warps, **NO_FUSION
        )
    return x_int8, x_scale


@triton.jit
def _rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, x_int8_ptr, x_scale_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        rounded = to_dtype(x, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + t * D + d, rounded, mask=d < D)
        x = rounded.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), D * 1.0)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    x = x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps)) * weight
    scale = scale_of(absolute_bits(x))
    tl.store(x_int8_ptr + t * D + d, round_to_int8(divide(x, scale)), mask=d < D)
    tl.store(x_scale_ptr + t, scale)


def rms_norm_quantize(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMSNorm(x + residual) as int8 [T, D], its row scales [T] float32, and the sum [T, D] in the dtype of x.

    What is normed is the rounded sum, as if the three steps ran by themselves; all between is float32. The twin norms
    in float64, so a scale may differ in its last places and a value near a tie may fall to its other side.

    Args:
        x: [T, D], contiguous; D a multiple of 16, so that each row is loaded, and its squares added, in the same order
            wherever it lies.
        residual: as x, or None: the sum is x itself then.
        weight: [D] of the norm.
        eps: added to the mean of squares.

    Raises: ShapeError if shapes differ, D is above 16,384 or no multiple of 16, or a tensor is not contiguous.
    Source: RMSNorm, arXiv 1910.07467; the fusion is vLLM's fused_add_rms_norm, with its quantization in the same pass.
    """
    tokens, width = x.shape
    if width % 16 or not 0 < width <= MAX_BLOCK or weight.shape != (width,) or not x.is_contiguous():
        raise ShapeError(
            f"rms_norm_quantize: x {_layout(x)} must be contiguous [T, D] with D a multiple of 16 up to {MAX_BLOCK}, "
            f"and weight {_layout(weight)} [D]"
        )
    if residual is not None and (residual.shape != x.shape or not residual.is_contiguous()):
        raise ShapeError(f"rms_norm_quantize: residual {_layout(residual)} must be contiguous and as x {_layout(x)}")
    total = x if residual is None else torch.empty_like(x)
    x_int8, x_scale = _outputs(x, width)
    if tokens:
        block, num_warps = tile(width)
        _rms_norm_quantize_kernel[(tokens,)](
            x, residual, weight, None if residual is None else total, x_int8, x_scale, eps,
            D=width, BLOCK=block, num_warps=num_warps, **NO_FUSION,
        )  # fmt: skip
    return x_int8, x_scale, total


@triton.jit
def _gated(gate_up_ptr, start, alpha, limit, F: tl.constexpr, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the gated unit of columns `start` and on, float32 [BLOCK]; zeros beyond F."""
    f = start + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + F + f, mask=f < F, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        return gate * sigmoid(gate * alpha) * (up + 1.0)
    return gate * sigmoid(gate) * up


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)); its division may be the fast one, since its input was rounded anyway."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu_quantize_kernel(
    gate_up_ptr, x_int8_ptr, x_scale_ptr, stride_xt, alpha, limit,
    F: tl.constexpr, CLAMPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    gate_up_ptr += t * stride_xt
    x_int8_ptr += t * F
    if F <= BLOCK:
        f = tl.arange(0, BLOCK)
        x = _gated(gate_up_ptr, 0, alpha, limit, F, CLAMPED, BLOCK)
        scale = scale_of(absolute_bits(x))
        tl.store(x_int8_ptr + f, round_to_int8(divide(x, scale)), mask=f < F)
    else:
        bits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, F, BLOCK):
            bits = tl.maximum(bits, absolute_bits(_gated(gate_up_ptr, start, alpha, limit, F, CLAMPED, BLOCK)))
        scale = scale_of(bits)
        for start in range(0, F, BLOCK):
            f = start + tl.arange(0, BLOCK)
            x = _gated(gate_up_ptr, start, alpha, limit, F, CLAMPED, BLOCK)
            tl.store(x_int8_ptr + f, round_to_int8(divide(x, scale)), mask=f < F)
    tl.store(x_scale_ptr + t, scale)


def swiglu_quantize(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return silu(gate) * up of `gate_up` [T, 2 F] as int8 [T, F] and its row scales [T] float32.

    With alpha and limit, gpt-oss's form: (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within
    ± `limit`. All in float32, the twin in float64: a value near a tie may fall to its other side.

    Raises:
        ShapeError: gate_up is no matrix of two halves with contiguous rows.
        ValueError: alpha without limit, or limit without alpha.

    Source: arXiv 2002.05202; openai/gpt-oss, `swiglu` of torch/model.py.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] == 0 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ShapeError(f"swiglu_quantize: gate_up {_layout(gate_up)} must be [T, 2 F] with contiguous rows")
    if (alpha is None) != (limit is None):
        raise ValueError(f"swiglu_quantize: {alpha=} and {limit=} come together or not at all")
    half = gate_up.shape[1] // 2
    x_int8, x_scale = _outputs(gate_up, half)
    if len(gate_up):
        block, num_warps = tile(half)
        _swiglu_quantize_kernel[(len(gate_up),)](
            gate_up, x_int8, x_scale, gate_up.stride(0), alpha or 0.0, limit or 0.0,
            F=half, CLAMPED=limit is not None, BLOCK=block, num_warps=num_warps, **NO_FUSION,
        )  # fmt: skip
    return x_int8, x_scale


def tile(columns: int) -> tuple[int, int]:
    """Return BLOCK and the warps for rows of so many columns; from nothing else, so that a row's sums keep their order.

    16 columns a thread: two loads of 16 bytes in flight for bfloat16, and registers for a full multiprocessor.
    """
    block = triton.next_power_of_2(columns) if columns <= MAX_BLOCK else _SWEPT_BLOCK
    return block, min(max(block // 512, 1), 16)


def _outputs(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return room for the int8 values and the scales of the rows of `x`."""
    x_int8 = torch.empty((len(x), columns), dtype=torch.int8, device=x.device)
    return x_int8, torch.empty(len(x), dtype=torch.float32, device=x.device)


def _layout(x: Tensor) -> str:
    """Return shape and strides, for messages."""
    return f"{list(x.shape)} with strides {list(x.stride())}"
