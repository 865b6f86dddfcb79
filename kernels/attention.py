"""Attention of many queries: packed causal sequences, and a prefix that every query sees.

Rows of a tile are (token, head) pairs that read one key-value head, so that keys are read once for all of its heads and
few tokens still fill the 64 rows of Hopper's wgmma. Blocks of queries and keys are counted from a sequence's own first
token, and tiles are chosen by the model's sizes alone: a row's bits are a function of its own sequence.

Legend: T tokens, H heads, G key-value heads, D key size, Dv value size, S prefix keys, B sequences.
Source: FlashAttention-2, arXiv 2307.08691. Twins in kernels/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import attention_tile, capability
from kernels.cpu import ShapeError
from kernels.language import dot, to_dtype
from kernels.softmax import LOG2E, LOWEST, head_blocks, softmax_end, softmax_step


@triton.jit
def _attend(
    q,
    q_rest,
    top,
    total,
    acc,
    k_ptr,
    v_ptr,
    stride_kt: tl.constexpr,
    stride_vt: tl.constexpr,
    scale,
    positions,
    begin,
    end,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Return (top, total, acc) after the keys from `begin` to `end`; unless MASKED, whole blocks that all rows see."""
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    rest = BLOCK_D + tl.arange(0, BLOCK_REST if BLOCK_REST else 16)
    value_columns = tl.arange(0, BLOCK_DV)
    k_offsets = offsets[:, None] * stride_kt
    v_offsets = offsets[:, None] * stride_vt + value_columns[None, :]
    for start in tl.range(begin, end, BLOCK_N):
        k_start = k_ptr + tl.cast(start, tl.int64) * stride_kt
        v_start = v_ptr + tl.cast(start, tl.int64) * stride_vt
        inside = (start + offsets < end)[:, None]
        if MASKED:
            k = tl.load(k_start + k_offsets + columns[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(k_start + k_offsets + columns[None, :])
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        if BLOCK_REST:
            k_rest = tl.load(k_start + k_offsets + rest[None, :], mask=inside & (rest < D)[None, :], other=0.0)
            scores = dot(q_rest, tl.trans(k_rest), scores)
        if MASKED:
            keys = (start + offsets)[None, :]
            visible = keys <= positions[:, None] if CAUSAL else keys < end
            if WINDOW:
                visible &= keys > positions[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        weights, top, total, acc = softmax_step(scores, scale, top, total, acc)
        if MASKED or BLOCK_DV != DV:
            v = tl.load(v_start + v_offsets, mask=inside & (value_columns < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_start + v_offsets)
        acc = dot(to_dtype(weights, v_ptr.dtype.element_ty), v, acc)
    return top, total, acc


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    stride_qt: tl.constexpr,
    stride_qh: tl.constexpr,
    stride_kt: tl.constexpr,
    stride_kg: tl.constexpr,
    stride_vt: tl.constexpr,
    stride_vg: tl.constexpr,
    T,
    S,
    scale,
    blocks_per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # The last queries of a sequence see the most keys, so they go first.
    block = blocks_per_sequence - 1 - tl.program_id(0) % blocks_per_sequence
    kv_head = tl.program_id(1)
    first_token = tl.cast(0, tl.int64)
    num_queries = T
    num_keys = S
    if CAUSAL:
        sequence = tl.program_id(0) // blocks_per_sequence
        first_token = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        num_queries = (tl.load(cu_seqlens_ptr + sequence + 1) - first_token).to(tl.int32)
        num_keys = num_queries
    if block * BLOCK_M >= num_queries * GROUP:
        return

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = rows // GROUP
    in_queries = positions < num_queries
    first_position = block * BLOCK_M // GROUP
    # Addresses within a tile fit in int32: in int64, those of `out` alone spilled.
    block_start = first_token + first_position
    q_ptr += block_start * stride_qt + kv_head * GROUP * stride_qh
    q_offsets = (positions - first_position)[:, None] * stride_qt + (rows % GROUP)[:, None] * stride_qh
    q = tl.load(q_ptr + q_offsets + tl.arange(0, BLOCK_D)[None, :], mask=in_queries[:, None], other=0.0)
    q_rest = q
    if BLOCK_REST:
        rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        q_rest = tl.load(q_ptr + q_offsets + rest[None, :], mask=in_queries[:, None] & (rest < D)[None, :], other=0.0)
    k_ptr += first_token * stride_kt + kv_head * stride_kg
    v_ptr += first_token * stride_vt + kv_head * stride_vg

    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    begin = 0
    end = num_keys
    all_visible = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
        all_visible = first_position + 1
        if WINDOW:
            begin = tl.maximum(0, first_position + 1 - WINDOW) // BLOCK_N * BLOCK_N
            all_visible = begin
    full_end = all_visible // BLOCK_N * BLOCK_N
    if not WINDOW:
        top, total, acc = _attend(
            q, q_rest, top, total, acc, k_ptr, v_ptr, stride_kt, stride_vt, scale, positions, begin, full_end,
            D, DV, CAUSAL, WINDOW, False, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
        )  # fmt: skip
    top, total, acc = _attend(
        q, q_rest, top, total, acc, k_ptr, v_ptr, stride_kt, stride_vt, scale, positions, full_end, end,
        D, DV, CAUSAL, WINDOW, True, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
    )  # fmt: skip

    out, lse = softmax_end(top, total, acc)
    value_columns = tl.arange(0, BLOCK_DV)
    inside = in_queries[:, None] & (value_columns < DV)[None, :]
    first_row = block_start * H + kv_head * GROUP
    out_rows = (positions - first_position) * H + rows % GROUP
    out_offsets = out_rows[:, None] * DV + value_columns[None, :]
    tl.store(out_ptr + first_row * DV + out_offsets, to_dtype(out, out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + first_row + out_rows, lse, mask=in_queries)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_queries: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse): causal within each sequence of `cu_seqlens`, or of all keys where that is None."""
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    group = heads // kv_heads
    out = torch.empty((tokens, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    block_d, block_rest = head_blocks(head_dim)
    block_dv = max(16, triton.next_power_of_2(value_dim))
    tile = attention_tile(capability(q.device), max(head_dim, block_dv), q.dtype)
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    blocks = triton.cdiv(max_queries * group, tile.block_m)
    if blocks * sequences:
        _attention_kernel[(blocks * sequences, kv_heads)](
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            tokens,
            len(k),
            scale * LOG2E.value,
            blocks,
            H=heads,
            GROUP=group,
            D=head_dim,
            DV=value_dim,
            CAUSAL=cu_seqlens is not None,
            WINDOW=window or 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=block_d,
            BLOCK_REST=block_rest,
            BLOCK_DV=block_dv,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, lse


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the state (out [T, H, Dv] as q, lse [T, H] float32 in base 2) of queries that see every key.

    With `merge_states` and the state over a row's own keys, this is attention with a shared prefix, read once for all
    queries. Source: cascade inference, arXiv 2501.01005.

    Args:
        q: [T, H, D]; query head h reads key-value head h // (H / G).
        k: [S, G, D] of q's dtype; S may be 0.
        v: [S, G, Dv].
        scale: multiplies the scores; positive.

    Raises: ShapeError if they do not fit.
    """
    _check("prefix_attention", q, k, v, scale)
    return _launch(q, k, v, None, len(q), scale, None)


def packed_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the state (out [T, H, Dv] as q, lse [T, H] float32 in base 2) of causal attention within each sequence.

    Args:
        q: [T, H, D], the sequences one after the other; query head h reads key-value head h // (H / G).
        k: [T, G, D] of q's dtype.
        v: [T, G, Dv].
        cu_seqlens: [B + 1] int32, where each sequence starts, and T.
        max_seqlen: at least the longest sequence; rows past it would not be written.
        scale: multiplies the scores; positive.
        window: how many keys a query sees, its own among them.

    Raises: ShapeError if they do not fit.
    """
    _check("packed_prefill", q, k, v, scale)
    if len(q) != len(k) or cu_seqlens.dim() != 1 or not len(cu_seqlens) or (window is not None and window < 1):
        shapes = f"{tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(cu_seqlens.shape)=}, {window=}"
        raise ShapeError(f"packed_prefill: {shapes}; q and k have T rows, cu_seqlens B + 1, window is positive")
    return _launch(q, k, v, cu_seqlens, max_seqlen, scale, window)


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raise ShapeError unless q [*, H, D], k [S, G, D] and v [S, G, Dv] fit."""
    fits = q.dim() == k.dim() == v.dim() == 3 and q.shape[2] == k.shape[2] and k.shape[:2] == v.shape[:2]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] < 16 or scale <= 0:
        shapes = f"{tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}, {scale=}"
        raise ShapeError(f"{name}: {shapes}; D is equal and at least 16, G divides H, scale is positive")
    if not q.dtype == k.dtype == v.dtype or not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        dtypes = f"{q.dtype=}, {k.dtype=}, {v.dtype=}, {q.stride()=}, {k.stride()=}, {v.stride()=}"
        raise ShapeError(f"{name}: {dtypes}; one dtype, and the last axis has stride 1")
