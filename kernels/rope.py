"""Rotary positions, and keys and values into the paged cache, in one launch.

Legend: T tokens, H heads, G key-value heads, D head size, HALF of it, Dv that of values; PAGE tokens in a page, which
holds them head by head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ShapeError
from kernels.language import NO_FUSION, to_dtype


@triton.jit
def _rotate(source, target, heads, inside, cos, sin, stride_target, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Write `heads` of one token from `source` to `target`, rotated by cos and sin [1, BLOCK]."""
    d = tl.arange(0, BLOCK)
    source += heads[:, None] * (2 * HALF) + d[None, :]
    target += heads[:, None] * stride_target + d[None, :]
    mask = inside[:, None] & (d < HALF)[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target, to_dtype(first * cos - second * sin, dtype), mask=mask)
    tl.store(target + HALF, to_dtype(second * cos + first * sin, dtype), mask=mask)


@triton.jit
def _rope_and_store_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, q_out_ptr,
    stride_qt, stride_kt, stride_vt, H: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr,
    Dv: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + t * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + t * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    QUERY_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    block = tl.program_id(1)
    if block < QUERY_BLOCKS:
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        q_out_ptr += t * (H * 2 * HALF)
        _rotate(q_ptr + t * stride_qt, q_out_ptr, h, h < H, cos, sin, 2 * HALF, HALF, BLOCK_HALF)
    else:
        slot = tl.load(slots_ptr + t).to(tl.int64)
        if slot >= 0:
            g = (block - QUERY_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
            row = slot // PAGE * (G * PAGE) + slot % PAGE
            key_cache_ptr += row * (2 * HALF)
            _rotate(k_ptr + t * stride_kt, key_cache_ptr, g, g < G, cos, sin, PAGE * 2 * HALF, HALF, BLOCK_HALF)
            dv = tl.arange(0, BLOCK_DV)
            mask = (g < G)[:, None] & (dv < Dv)[None, :]
            v = tl.load(v_ptr + t * stride_vt + g[:, None] * Dv + dv[None, :], mask=mask, other=0.0).to(tl.float32)
            values = value_cache_ptr + row * Dv + g[:, None] * (PAGE * Dv) + dv[None, :]
            tl.store(values, to_dtype(v, value_cache_ptr.dtype.element_ty), mask=mask)


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> Tensor:
    """Return q [T, H, D] rotated by position; k, rotated too, and v are written into their pages.

    Half-split layout: column d turns with column d + D / 2, in float32. Bits are those of the twin. Tokens with a
    negative slot, the padding of a captured step, leave the caches alone.

    Args:
        q: [T, H, D]; heads of a token lie next to each other, so q, k and v may be columns of one projection.
        k: [T, G, D].
        v: [T, G, Dv].
        cos: [T, D / 2] of each token's own position.
        sin: as cos.
        key_cache: [blocks, G, page, D], contiguous.
        value_cache: [blocks, G, page, Dv], contiguous.
        slots: [T] int64, block * page + offset; those that are not negative are within the caches, and distinct.

    Raises: ShapeError if shapes differ, D is odd, or a tensor is laid out otherwise.
    Source: RoFormer, arXiv 2104.09864; paged caches, arXiv 2309.06180.
    """
    _check(q, k, v, cos, sin, key_cache, value_cache, slots)
    tokens, heads, head_dim = q.shape
    groups, value_dim = v.shape[1:]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_h, block_half = tile(max(heads, groups), head_dim // 2)
    if tokens:
        grid = (tokens, triton.cdiv(heads, block_h) + triton.cdiv(groups, block_h))
        _rope_and_store_kernel[grid](
            q, k, v, cos, sin, key_cache, value_cache, slots, q_out, q.stride(0), k.stride(0), v.stride(0),
            H=heads, G=groups, PAGE=key_cache.shape[2], HALF=head_dim // 2, Dv=value_dim,
            BLOCK_H=block_h, BLOCK_HALF=block_half, BLOCK_DV=triton.next_power_of_2(value_dim), **NO_FUSION,
        )  # fmt: skip
    return q_out


def tile(heads: int, half: int) -> tuple[int, int]:
    """Return BLOCK_H and BLOCK_HALF: 1024 pairs of columns a program, 8 a thread, which bfloat16 loads in 16 bytes."""
    block_half = triton.next_power_of_2(half)
    return max(1, min(triton.next_power_of_2(heads), 1024 // block_half)), block_half


def _check(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Raise ShapeError unless the tensors of `rope_and_store` fit each other and lie as it reads them."""
    tokens, _, head_dim = q.shape
    blocks, groups, page, value_dim = value_cache.shape
    expected = {
        "k": (k, (tokens, groups, head_dim)),
        "v": (v, (tokens, groups, value_dim)),
        "cos": (cos, (tokens, head_dim // 2)),
        "sin": (sin, (tokens, head_dim // 2)),
        "key_cache": (key_cache, (blocks, groups, page, head_dim)),
        "slots": (slots, (tokens,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ShapeError(
                f"rope_and_store: {name} {list(tensor.shape)} must be {list(shape)}, "
                f"by q {list(q.shape)} and value_cache {list(value_cache.shape)}"
            )
    if head_dim % 2:
        raise ShapeError(f"rope_and_store: the head size {head_dim} of q is odd")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.stride()[1:] != (tensor.shape[2], 1):
            raise ShapeError(f"rope_and_store: heads of {name} lie apart, strides {tensor.stride()}")
    for name, tensor in {"cos": cos, "sin": sin, "key_cache": key_cache, "value_cache": value_cache}.items():
        if not tensor.is_contiguous():
            raise ShapeError(f"rope_and_store: {name} must be contiguous, its strides are {tensor.stride()}")
