"""What the Triton kernels share beyond triton.language: rounding, and products that also hold under the interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels of this process run in numpy, TRITON_INTERPRET=1. It knows no bfloat16: sums and products of its raw
bits are silently wrong, and a store truncates. On a card every branch on this disappears when a kernel is compiled."""

NO_FUSION = {"enable_fp_fusion": False}
"""Launch options of kernels whose bits are compared: a fused multiply-add rounds once where the twin rounds twice."""


@triton.jit
def round_to_int8(x):
    """Return float32 `x` as int8 in [-127, 127], to nearest even.

    Adding 1.5 * 2**23 leaves no fraction bits, so the hardware's own rounding does it. Clamped, because the conversion
    of 128 wraps to -128.
    """
    rounded = (x + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def to_dtype(x, DTYPE: tl.constexpr):
    """Return float32 `x` as DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, FLOAT32: tl.constexpr = "ieee"):
    """Return acc + a @ b in float32, of floating-point tiles; a card may round float32 ones to "tf32" if told to."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=FLOAT32)


@triton.jit
def load_tile(
    source, first_row, first_k, rows, K, stride, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return ROWS x COLUMNS of `source`, a descriptor or a pointer, with zeros beyond its last row and column."""
    if TMA:
        return source.load([first_row, first_k])
    else:
        row = first_row + tl.arange(0, ROWS)
        k = first_k + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (k < K)[None, :]
        return tl.load(source + row[:, None].to(tl.int64) * stride + k[None, :], mask=inside, other=0)
