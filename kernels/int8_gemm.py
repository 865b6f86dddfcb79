"""The dense INT8 product on tensor cores: x @ weight.T, summed exactly in int32, scaled once at the end.

Integers make every order of summation right, so the two kernels here, any tile and any split of K give the same bits.

Legend: M tokens, N out features, K in features; BLOCK_* what one program holds of each (kernels/tiles.py).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cpu import MAX_IN_FEATURES, ShapeError
from kernels.language import NO_FUSION, load_tile, to_dtype
from kernels.tiles import Tile, compute_capability, dense_tile, is_hopper

_SUM_BLOCK = 1024
"""Columns that one program of `_sum_splits_kernel` adds: 8 per thread, two 16-byte loads of each split."""


@triton.jit
def _dequantize(acc, x_scale, weight_scale, bias):
    """Return int32 `acc` as float32. Every path ends in these operations, in this order: hence the same bits."""
    return acc.to(tl.float32) * x_scale * weight_scale + bias


@triton.jit
def _int8_linear_kernel(
    x,
    weight,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_om,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Flattened, both loops become one, and the next tile's first loads fly while this one is scaled and stored.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in range(0, K, BLOCK_K):
            x_tile = load_tile(x, first_m, k, M, K, stride_xm, TMA, BLOCK_M, BLOCK_K)
            weight_tile = load_tile(weight, first_n, k, N, K, stride_wn, TMA, BLOCK_N, BLOCK_K)
            acc = tl.dot(x_tile, weight_tile.T, acc, out_dtype=tl.int32)
        m = first_m + tl.arange(0, BLOCK_M)
        n = first_n + tl.arange(0, BLOCK_N)
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :] if HAS_BIAS else 0.0
        out = _dequantize(acc, x_scale[:, None], weight_scale[None, :], bias)
        out_ptrs = out_ptr + m[:, None].to(tl.int64) * stride_om + n[None, :]
        tl.store(out_ptrs, to_dtype(out, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Write the product of many rows: tiles of `out` dealt to programs in turn, as many as the card runs at once."""
    (m, k), n = x_int8.shape, weight.shape[0]
    tma = _tma_reads(x_int8, weight)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    # Without TMA the hardware deals out the tiles: on sm_80 a loop over tiles gains nothing, its loads do not overlap.
    programs = min(tiles, _card(out.device)[1] * tile.programs_per_sm) if tma else tiles
    _int8_linear_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_int8, [tile.block_m, tile.block_k]) if tma else x_int8,
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]) if tma else weight,
        x_scale,
        weight_scale,
        bias,
        out,
        m,
        n,
        k,
        x_int8.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        TMA=tma,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **NO_FUSION,
    )


@triton.jit
def _int8_decode_kernel(
    x,
    weight,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_om,
    k_per_split,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_m = tl.program_id(0) * BLOCK_M
    first_n = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    first_k = split * k_per_split
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(first_k, tl.minimum(first_k + k_per_split, K), BLOCK_K):
        weight_tile = load_tile(weight, first_n, k, N, K, stride_wn, TMA, BLOCK_N, BLOCK_K)
        x_tile = load_tile(x, first_m, k, M, K, stride_xm, TMA, BLOCK_M, BLOCK_K)
        acc = tl.dot(weight_tile, x_tile.T, acc, out_dtype=tl.int32)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < M)[None, :]
    out_ptrs = out_ptr + m[None, :].to(tl.int64) * stride_om + n[:, None]
    if SPLIT_K > 1:
        tl.store(out_ptrs + split.to(tl.int64) * M * stride_om, acc, mask=inside)
    else:
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None] if HAS_BIAS else 0.0
        out = _dequantize(acc, x_scale[None, :], weight_scale[:, None], bias)
        tl.store(out_ptrs, to_dtype(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_om,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.int32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + (split * M + m) * N + n, mask=n < N, other=0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0) if HAS_BIAS else 0.0
    out = _dequantize(acc, tl.load(x_scale_ptr + m), weight_scale, bias)
    tl.store(out_ptr + m * stride_om + n, to_dtype(out, out_ptr.dtype.element_ty), mask=n < N)


def _decode(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Write the product of few rows: weight on the left of wgmma, K split where the tiles are fewer than the SMs.

    Each split stores its own int32 sums and a second kernel adds them. The order of the stream is the whole proof, also
    inside a CUDA graph, and there is nothing to zero. The alternative, the last program to arrive adds up, needs a
    release that covers the other threads' stores: Triton emits that barrier only since its #10816 (July 2026), not in
    the 3.6 that cards of today run.
    """
    (m, k), n = x_int8.shape, weight.shape[0]
    tma, split_k = _tma_reads(x_int8, weight), tile.split_k
    target = out if split_k == 1 else torch.empty((split_k, m, n), dtype=torch.int32, device=out.device)
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n), split_k)
    _int8_decode_kernel[grid](
        TensorDescriptor.from_tensor(x_int8, [tile.block_m, tile.block_k]) if tma else x_int8,
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]) if tma else weight,
        x_scale,
        weight_scale,
        bias,
        target,
        m,
        n,
        k,
        x_int8.stride(0),
        weight.stride(0),
        target.stride(-2),
        triton.cdiv(k, split_k * tile.block_k) * tile.block_k,
        HAS_BIAS=bias is not None,
        TMA=tma,
        SPLIT_K=split_k,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **NO_FUSION,
    )
    if split_k > 1:
        _sum_splits_kernel[(m, triton.cdiv(n, _SUM_BLOCK))](
            target,
            x_scale,
            weight_scale,
            bias,
            out,
            m,
            n,
            out.stride(0),
            HAS_BIAS=bias is not None,
            SPLIT_K=split_k,
            BLOCK_N=_SUM_BLOCK,
            num_warps=4,
            **NO_FUSION,
        )


def int8_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> Tensor:
    """Return x @ weight.T + bias as [T, N], accumulated exactly in int32.

    A row's bits depend on nothing but the row: not on its neighbours, their number, or the tile.

    Args:
        x_int8: [T, K] int8, row-quantized activations.
        x_scale: [T] float32; x ≈ x_int8 * x_scale[:, None].
        weight: [N, K] int8.
        weight_scale: [N] float32.
        bias: [N] float32.
        out_dtype: bfloat16, float16 or float32, rounded to nearest even from float32.
        tile: to measure another than `tiles.dense_tile` chooses.

    Raises: ShapeError if the tensors do not fit each other, their rows are not contiguous, or K could overflow int32.
    Source: LLM.int8(), arXiv 2208.07339, vector-wise scaling.
    """
    _check(x_int8, x_scale, weight, weight_scale, bias)
    (m, k), n = x_int8.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x_int8.device)
    if out.numel():
        tile = tile or dense_tile(*_card(out.device), m, n, k)
        (_decode if tile.swapped else _linear)(x_int8, x_scale, weight, weight_scale, bias, out, tile)
    return out


def _check(x_int8: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise ShapeError unless `int8_linear` can multiply these."""
    (m, k), n = x_int8.shape, weight.shape[0]
    columns = [weight_scale] if bias is None else [weight_scale, bias]
    fits = weight.shape == (n, k) and x_scale.shape == (m,) and all(column.shape == (n,) for column in columns)
    contiguous = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (x_int8, weight, x_scale, *columns))
    if not fits or not contiguous or not 1 <= k <= MAX_IN_FEATURES:
        shapes = [tuple(tensor.shape) for tensor in (x_int8, x_scale, weight, *columns)]
        raise ShapeError(
            f"int8_linear: {shapes=} must be [T, K], [T], [N, K], [N], [N]; "
            f"the last axes contiguous, K from 1 to {MAX_IN_FEATURES}"
        )


@functools.cache
def _card(device: torch.device) -> tuple[int, int]:
    """Return a device's compute capability and multiprocessors; under the interpreter, those of an H100."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return compute_capability(device), num_sms


def _tma_reads(*tensors: Tensor) -> bool:
    """Return whether the card has TMA and it can read these: it wants rows that start at multiples of 16 bytes."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.stride(0) > 0 for t in tensors)
    return aligned and is_hopper(_card(tensors[0].device)[0])
