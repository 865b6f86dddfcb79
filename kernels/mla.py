"""Absorbed multi-head latent attention of one new query per sequence: keys and values are one latent per token.

Absorbed: the up-projections of keys and values are folded into the query and the output, so that all heads read one
cached row [rank + rope] per token, whose first `rank` columns are the values too. Each is loaded once for both. The
output stands as [rank, heads]: wgmma wants 64 rows on the left, and heads may be 16. Scores of 64 keys at once would
reach wgmma too, but spill (984 bytes at 64 heads), so 32 go through mma.sync.

Legend: B sequences, H heads, R rank + rope.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Twin in kernels/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import capability, latent_tile
from kernels.cpu import ShapeError
from kernels.language import dot, to_dtype
from kernels.paged_attention import page_rows
from kernels.softmax import LOG2E, LOWEST, merge_splits

KEYS_PER_SPLIT = 2048
"""A part costs 8 rank + 8 bytes of traffic per head, its keys 2 R per sequence: 22 % at 128 heads."""


@triton.jit
def _mla_decode_kernel(
    q_ptr,
    latent_ptr,
    block_table_ptr,
    lens_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale,
    num_splits,
    stride_table,
    stride_qb: tl.constexpr,
    stride_qh: tl.constexpr,
    stride_lb: tl.constexpr,
    stride_lp: tl.constexpr,
    H: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(lens_ptr + sequence))
    if begin >= end:
        return

    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = heads < H
    columns = tl.arange(0, RANK)
    rope = tl.arange(0, BLOCK_ROPE)
    q_start = q_ptr + sequence * stride_qb + heads[:, None] * stride_qh
    q = tl.load(q_start + columns[None, :], mask=in_heads[:, None], other=0.0)
    q_rope = tl.load(q_start + RANK + rope[None, :], mask=in_heads[:, None] & (rope < ROPE)[None, :], other=0.0)
    block_table_ptr += sequence * stride_table

    top = tl.full((BLOCK_H,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((RANK, BLOCK_H), tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N) < end
        row = latent_ptr + page_rows(block_table_ptr, start, inside, stride_lb, stride_lp, PAGE, BLOCK_N)[:, None]
        latent = tl.load(row + columns[None, :], mask=inside[:, None], other=0.0)
        k_rope = tl.load(row + RANK + rope[None, :], mask=inside[:, None] & (rope < ROPE)[None, :], other=0.0)
        scores = dot(latent, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_H), tl.float32))
        scores = dot(k_rope, tl.trans(q_rope), scores)
        scores = tl.where(inside[:, None], scores, float("-inf"))
        top_new = tl.maximum(top, tl.max(scores, 0) * scale)
        weights = tl.exp2(scores * scale - top_new[None, :])
        decay = tl.exp2(top - top_new)
        total = total * decay + tl.sum(weights, 0)
        acc = dot(tl.trans(latent), to_dtype(weights, latent_ptr.dtype.element_ty), acc * decay[None, :])
        top = top_new

    parts = (sequence * H + heads) * num_splits + split
    tl.store(parts_ptr + parts[None, :] * RANK + columns[:, None], acc / total[None, :], mask=in_heads[None, :])
    tl.store(parts_lse_ptr + parts, top + tl.log2(total), mask=in_heads)


def mla_decode(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, lens: Tensor, scale: float, *, rank: int = 512
) -> Tensor:
    """Return softmax(q · latent * scale) over each sequence's latents, times their first `rank`, [B, H, rank] as q.

    Args:
        q: [B, H, rank + rope], absorbed: in the space of the latents.
        latent_cache: [blocks, page, rank + rope] of q's dtype.
        block_table: [B, max_blocks] int32, the pages of each sequence in order; it bounds the grid, as in paged_decode.
        lens: [B] int32 keys of each sequence, at most max_blocks * page; 0 gives zeros.
        scale: multiplies the scores; positive.
        rank: columns that are values, a power of two; the rest is rope.

    Raises: ShapeError if they do not fit.
    """
    _check(q, latent_cache, block_table, lens, scale, rank)
    batch, heads, width = q.shape
    page = latent_cache.shape[1]
    splits = triton.cdiv(block_table.shape[1] * page, KEYS_PER_SPLIT)
    out = torch.empty((batch, heads, rank), dtype=q.dtype, device=q.device)
    parts = torch.empty((batch, heads, splits, rank), dtype=torch.float32, device=q.device)
    parts_lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    if not batch:
        return out
    tile = latent_tile(capability(q.device), heads, q.dtype)
    if splits:
        _mla_decode_kernel[(triton.cdiv(heads, tile.block_m), splits, batch)](
            q,
            latent_cache,
            block_table,
            lens,
            parts,
            parts_lse,
            scale * LOG2E.value,
            splits,
            block_table.stride(0),
            *q.stride()[:2],
            *latent_cache.stride()[:2],
            H=heads,
            RANK=rank,
            ROPE=width - rank,
            PAGE=page,
            SPLIT=KEYS_PER_SPLIT,
            BLOCK_H=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_ROPE=max(16, triton.next_power_of_2(width - rank)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return merge_splits(parts, parts_lse, lens, out, KEYS_PER_SPLIT, None, None)


def _check(q: Tensor, latent_cache: Tensor, block_table: Tensor, lens: Tensor, scale: float, rank: int) -> None:
    """Raise ShapeError unless the arguments of `mla_decode` fit."""
    batch, _, width = q.shape
    shapes = f"{tuple(q.shape)=}, {tuple(latent_cache.shape)=}, {rank=}"
    if latent_cache.shape[2] != width or not 16 <= rank < width or rank & (rank - 1) or scale <= 0:
        raise ShapeError(f"mla_decode: {shapes}, {scale=}; rank + rope is equal, rank a power of two, scale positive")
    if block_table.dim() != 2 or len(block_table) != batch or lens.shape != (batch,):
        raise ShapeError(f"mla_decode: {shapes}, {tuple(block_table.shape)=}, {tuple(lens.shape)=}; one row each per B")
    if q.dtype != latent_cache.dtype or not q.stride(2) == latent_cache.stride(2) == block_table.stride(1) == 1:
        raise ShapeError(f"mla_decode: {shapes}, {q.dtype=}, {latent_cache.dtype=}; one dtype, last axes of stride 1")
