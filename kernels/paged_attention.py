"""Attention of one new query per sequence over keys and values in pages.

Decoding reads every key once and multiplies it by few rows, so it is as fast as memory is. Each program reads one
split of a sequence's keys for all query heads of one key-value head; splits lie at fixed positions of the sequence, not
at a fraction of it, so that neither batch nor table width moves a bit. A second kernel merges them in their order.

Legend: B sequences, H heads, G key-value heads, D key size, Dv value size.
Source: FlashDecoding (Dao et al. 2023); paged cache, arXiv 2309.06180. Twins in kernels/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import capability, decode_tile
from kernels.cpu import ShapeError
from kernels.language import dot, to_dtype
from kernels.softmax import LOG2E, LOWEST, head_blocks, merge_splits, softmax_end, softmax_step

KEYS_PER_SPLIT = 1024
"""A part costs 8 Dv + 8 bytes of traffic per head, its keys 4 D per key-value head: 1.6 % at 8 heads to one."""


@triton.jit
def page_rows(
    block_table_ptr,
    start,
    inside,
    stride_block: tl.constexpr,
    stride_row: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return int64 offsets of the rows of BLOCK_N keys from `start`, a multiple of BLOCK_N.

    Where BLOCK_N divides PAGE they have one page and one address; a lookup each costs enough registers to spill.
    """
    slots = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        page = tl.load(block_table_ptr + start // PAGE).to(tl.int64)
        return page * stride_block + start % PAGE * stride_row + slots * stride_row
    keys = start + slots
    pages = tl.load(block_table_ptr + keys // PAGE, mask=inside, other=0).to(tl.int64)
    return pages * stride_block + keys % PAGE * stride_row


@triton.jit
def _paged_decode_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    lens_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale,
    num_splits,
    stride_table,
    stride_qb: tl.constexpr,
    stride_qh: tl.constexpr,
    stride_kb: tl.constexpr,
    stride_kg: tl.constexpr,
    stride_kp: tl.constexpr,
    stride_vb: tl.constexpr,
    stride_vg: tl.constexpr,
    stride_vp: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row_blocks: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + sequence)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    first_visible = 0
    if WINDOW:
        first_visible = tl.maximum(0, length - WINDOW)
        begin = tl.maximum(begin, first_visible // BLOCK_N * BLOCK_N)
    if begin >= end:
        return

    rows = tl.program_id(0) % row_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_group = rows < GROUP
    heads = kv_head * GROUP + rows
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    q_start = q_ptr + sequence * stride_qb + heads[:, None] * stride_qh
    q = tl.load(q_start + columns[None, :], mask=in_group[:, None], other=0.0)
    q_rest = q
    rest = BLOCK_D + tl.arange(0, BLOCK_REST if BLOCK_REST else 16)
    if BLOCK_REST:
        q_rest = tl.load(q_start + rest[None, :], mask=in_group[:, None] & (rest < D)[None, :], other=0.0)
    key_ptr += kv_head * stride_kg
    value_ptr += kv_head * stride_vg
    block_table_ptr += sequence * stride_table

    top = tl.full((BLOCK_H,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_DV), tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        k_start = key_ptr + page_rows(block_table_ptr, start, inside, stride_kb, stride_kp, PAGE, BLOCK_N)[:, None]
        v_start = value_ptr + page_rows(block_table_ptr, start, inside, stride_vb, stride_vp, PAGE, BLOCK_N)[:, None]
        k = tl.load(k_start + columns[None, :], mask=inside[:, None], other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_H, BLOCK_N), tl.float32))
        if BLOCK_REST:
            k_rest = tl.load(k_start + rest[None, :], mask=inside[:, None] & (rest < D)[None, :], other=0.0)
            scores = dot(q_rest, tl.trans(k_rest), scores)
        visible = inside & (keys >= first_visible) if WINDOW else inside
        scores = tl.where(visible[None, :], scores, float("-inf"))
        weights, top, total, acc = softmax_step(scores, scale, top, total, acc)
        in_values = inside[:, None] & (value_columns < DV)[None, :]
        v = tl.load(v_start + value_columns[None, :], mask=in_values, other=0.0)
        acc = dot(to_dtype(weights, value_ptr.dtype.element_ty), v, acc)

    out, lse = softmax_end(top, total, acc)
    parts = (sequence * H + heads) * num_splits + split
    in_out = in_group[:, None] & (value_columns < DV)[None, :]
    tl.store(parts_ptr + parts[:, None] * DV + value_columns[None, :], out, mask=in_out)
    tl.store(parts_lse_ptr + parts, lse, mask=in_group)


def paged_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(q kᵀ scale) v over the pages of each sequence, [B, H, Dv] as q; zeros where `lens` is 0.

    Args:
        q: [B, H, D]; query head h reads key-value head h // (H / G).
        key_cache: [blocks, G, page, D] of q's dtype.
        value_cache: [blocks, G, page, Dv].
        block_table: [B, max_blocks] int32, the pages of each sequence in order. It bounds the grid: pass no wider one
            than the longest sequence of the batch needs.
        lens: [B] int32 keys of each sequence, at most max_blocks * page.
        scale: multiplies the scores; positive.
        window: how many of the last keys are visible.
        sinks: [H], one more score per head, which takes its share of the softmax and adds nothing.

    Raises: ShapeError if they do not fit.
    """
    _check(q, key_cache, value_cache, block_table, lens, scale, window, sinks)
    batch, heads, head_dim = q.shape
    _, kv_heads, page, value_dim = value_cache.shape
    group = heads // kv_heads
    splits = triton.cdiv(block_table.shape[1] * page, KEYS_PER_SPLIT)
    out = torch.empty((batch, heads, value_dim), dtype=q.dtype, device=q.device)
    parts = torch.empty((batch, heads, splits, value_dim), dtype=torch.float32, device=q.device)
    parts_lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    if not batch:
        return out
    tile = decode_tile(capability(q.device), group, q.dtype)
    block_d, block_rest = head_blocks(head_dim)
    if splits:
        _paged_decode_kernel[(kv_heads * triton.cdiv(group, tile.block_m), splits, batch)](
            q,
            key_cache,
            value_cache,
            block_table,
            lens,
            parts,
            parts_lse,
            scale * LOG2E.value,
            splits,
            block_table.stride(0),
            *q.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            H=heads,
            GROUP=group,
            D=head_dim,
            DV=value_dim,
            PAGE=page,
            WINDOW=window or 0,
            SPLIT=KEYS_PER_SPLIT,
            BLOCK_H=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=block_d,
            BLOCK_REST=block_rest,
            BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return merge_splits(parts, parts_lse, lens, out, KEYS_PER_SPLIT, window, sinks)


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    """Raise ShapeError unless the arguments of `paged_decode` fit."""
    batch, heads, head_dim = q.shape
    shapes = f"{tuple(q.shape)=}, {tuple(key_cache.shape)=}, {tuple(value_cache.shape)=}"
    if key_cache.shape[:3] != value_cache.shape[:3] or key_cache.shape[3] != head_dim or head_dim < 16:
        raise ShapeError(f"paged_decode: {shapes}; [blocks, G, page] and D are equal, D at least 16")
    if heads % key_cache.shape[1] or scale <= 0 or (window is not None and window < 1):
        raise ShapeError(f"paged_decode: {shapes}, {scale=}, {window=}; G divides H, scale and window are positive")
    if block_table.dim() != 2 or len(block_table) != batch or lens.shape != (batch,):
        raise ShapeError(
            f"paged_decode: {shapes}, {tuple(block_table.shape)=}, {tuple(lens.shape)=}; one row each per B"
        )
    if not q.dtype == key_cache.dtype == value_cache.dtype:
        raise ShapeError(f"paged_decode: {q.dtype=}, {key_cache.dtype=}, {value_cache.dtype=}; one dtype")
    if not q.stride(2) == key_cache.stride(3) == value_cache.stride(3) == block_table.stride(1) == lens.stride(0) == 1:
        raise ShapeError(f"paged_decode: {shapes}; the last axis of each has stride 1")
    if sinks is not None and sinks.shape != (heads,):
        raise ShapeError(f"paged_decode: {shapes}, {tuple(sinks.shape)=}; one sink per head")
