"""Attention of many queries per sequence over keys and values in pages: prompts behind what they share, and trees.

A query reads its keys from the sequence's first one on, block by block, whoever computed them and when. So its bits are
the same whether its prompt was computed whole, behind a beginning that others share, or in pieces; `merge_states` of a
shared and an own part would round otherwise at every cut. Rows of a tile are (token, head) pairs that read one
key-value head, as in kernels/attention.py.

Behind a prompt may stand the branches of a tree, which see the prompt and, among branches, what a mask tells.

Legend: T tokens, B sequences, H heads, G key-value heads, D key size, Dv value size, N branches of the largest tree.
Source: FlashAttention-2, arXiv 2307.08691; paged caches, arXiv 2309.06180. Twin in kernels/reference_paged.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import attention_tile, capability
from kernels.cpu import ShapeError
from kernels.language import dot, to_dtype
from kernels.paged_attention import page_rows
from kernels.softmax import LOG2E, LOWEST, head_blocks, softmax_end, softmax_step


@dataclass(frozen=True, slots=True)
class Trees:
    """The branches of sequences that have some."""

    of: Tensor
    """[B] int32, the tree of each sequence; any number for one without branches."""
    positions: Tensor
    """[T] int32, of every token: a branch's is not its slot. Read where there is a window."""
    visible: Tensor
    """[trees, N, W] int32, by `visible_words`: what each branch sees of the others, within the window too."""


def visible_words(visible: Tensor, prompt_end: int) -> Tensor:
    """Return `visible` [N, N] bool, whether branch i sees branch j, as words of 32 slots each [N, W] int32.

    A word begins at a slot that is a multiple of 32, the first at or before `prompt_end`: so sequences may share words
    where their prompts end at the same place between two multiples.
    """
    count = len(visible)
    bits = torch.nn.functional.pad(visible, (prompt_end % 32, -(prompt_end + count) % 32)).view(count, -1, 32)
    return (bits.long() << torch.arange(32)).sum(dim=-1).to(torch.int32)


@triton.jit
def _among_branches(visible_ptr, slots, prompt_end, start, N, WORDS, BLOCK_N: tl.constexpr):
    """Return [BLOCK_M, BLOCK_N] bool: which of the keys from `start` on are branches that each row's branch sees.

    A word of 32 bits a row and 32 keys: a byte for each pair, loaded, takes two registers of address, and spilled.
    """
    branch = slots - prompt_end
    word = start // 32 - prompt_end // 32 + tl.zeros_like(branch)
    row = visible_ptr + branch * WORDS + word
    is_branch = (branch >= 0) & (branch < N)
    bits = tl.load(row, mask=is_branch & (word >= 0) & (word < WORDS), other=0)[:, None]
    columns = tl.arange(0, BLOCK_N)
    if BLOCK_N > 32:
        more = tl.load(row + 1, mask=is_branch & (word >= -1) & (word < WORDS - 1), other=0)[:, None]
        bits = tl.where((columns < 32)[None, :], bits, more)
    return ((bits >> ((start + columns) % 32)[None, :]) & 1) != 0


@triton.jit
def _attend_pages(
    q, q_rest, top, total, acc, key_ptr, value_ptr, table_ptr, visible_ptr, scale,
    slots, positions, prompt_end, begin, end, N, WORDS,
    stride_kb: tl.constexpr, stride_kp: tl.constexpr, stride_vb: tl.constexpr, stride_vp: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, TREES: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Return (top, total, acc) after the keys from `begin` to `end`; unless MASKED, whole blocks that all rows see."""
    columns = tl.arange(0, BLOCK_D)
    rest = BLOCK_D + tl.arange(0, BLOCK_REST if BLOCK_REST else 16)
    value_columns = tl.arange(0, BLOCK_DV)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        k_start = key_ptr + page_rows(table_ptr, start, inside, stride_kb, stride_kp, PAGE, BLOCK_N)[:, None]
        v_start = value_ptr + page_rows(table_ptr, start, inside, stride_vb, stride_vp, PAGE, BLOCK_N)[:, None]
        if MASKED:
            k = tl.load(k_start + columns[None, :], mask=inside[:, None], other=0.0)
        else:
            k = tl.load(k_start + columns[None, :])
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        if BLOCK_REST:
            k_rest = tl.load(k_start + rest[None, :], mask=inside[:, None] & (rest < D)[None, :], other=0.0)
            scores = dot(q_rest, tl.trans(k_rest), scores)
        if MASKED:
            seen = keys[None, :] <= slots[:, None]
            if WINDOW:
                seen &= keys[None, :] > positions[:, None] - WINDOW
            if TREES:
                seen = (seen & (keys[None, :] < prompt_end)) | _among_branches(
                    visible_ptr, slots, prompt_end, start, N, WORDS, BLOCK_N
                )
            scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        weights, top, total, acc = softmax_step(scores, scale, top, total, acc)
        if MASKED or BLOCK_DV != DV:
            v = tl.load(
                v_start + value_columns[None, :], mask=inside[:, None] & (value_columns < DV)[None, :], other=0.0
            )
        else:
            v = tl.load(v_start + value_columns[None, :])
        acc = dot(to_dtype(weights, value_ptr.dtype.element_ty), v, acc)
    return top, total, acc


@triton.jit
def _paged_prefill_kernel(
    q_ptr, key_ptr, value_ptr, out_ptr, table_ptr, cu_seqlens_ptr, starts_ptr, ends_ptr, trees_ptr, positions_ptr,
    visible_ptr, sinks_ptr, scale, blocks_per_sequence, stride_table, N, WORDS, stride_qt: tl.constexpr,
    stride_qh: tl.constexpr, stride_kb: tl.constexpr, stride_kg: tl.constexpr, stride_kp: tl.constexpr,
    stride_vb: tl.constexpr, stride_vg: tl.constexpr, stride_vp: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, TREES: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # The last queries of a sequence see the most keys, so they go first.
    block = blocks_per_sequence - 1 - tl.program_id(0) % blocks_per_sequence
    sequence = tl.program_id(0) // blocks_per_sequence
    kv_head = tl.program_id(1)
    first_token = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_ptr + sequence + 1) - first_token).to(tl.int32)
    if block * BLOCK_M >= num_queries * GROUP:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, first = rows // GROUP, block * BLOCK_M // GROUP
    in_queries = tokens < num_queries
    start = tl.load(starts_ptr + sequence)
    slots = start + tokens
    positions = slots
    end = start + tl.minimum(num_queries, (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    prompt_end = end
    if TREES:
        prompt_end = tl.load(ends_ptr + sequence)
        visible_ptr += tl.load(trees_ptr + sequence).to(tl.int64) * N * WORDS
        if WINDOW:
            positions = tl.load(positions_ptr + first_token + tokens, mask=in_queries, other=0)
    # Addresses within a tile fit in int32: in int64, those of `out` alone spilled.
    block_start = first_token + first
    q_ptr += block_start * stride_qt + kv_head * GROUP * stride_qh
    q_offsets = (tokens - first)[:, None] * stride_qt + (rows % GROUP)[:, None] * stride_qh
    q = tl.load(q_ptr + q_offsets + tl.arange(0, BLOCK_D)[None, :], mask=in_queries[:, None], other=0.0)
    q_rest = q
    if BLOCK_REST:
        rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        q_rest = tl.load(q_ptr + q_offsets + rest[None, :], mask=in_queries[:, None] & (rest < D)[None, :], other=0.0)
    key_ptr += kv_head * stride_kg
    value_ptr += kv_head * stride_vg
    table_ptr += sequence.to(tl.int64) * stride_table
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + kv_head * GROUP + rows % GROUP).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    # What every row sees: up to the first one's own key, or to the end of the prompt if that is a branch.
    all_visible = tl.minimum(start + first + 1, prompt_end)
    if WINDOW:
        masked_from = tl.maximum(0, all_visible - WINDOW) // BLOCK_N * BLOCK_N
    else:
        masked_from = all_visible // BLOCK_N * BLOCK_N
        top, total, acc = _attend_pages(
            q, q_rest, top, total, acc, key_ptr, value_ptr, table_ptr, visible_ptr, scale, slots, positions,
            prompt_end, 0, masked_from, N, WORDS, stride_kb, stride_kp, stride_vb, stride_vp,
            D, DV, PAGE, WINDOW, TREES, False, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
        )  # fmt: skip
    top, total, acc = _attend_pages(
        q, q_rest, top, total, acc, key_ptr, value_ptr, table_ptr, visible_ptr, scale, slots, positions,
        prompt_end, masked_from, end, N, WORDS, stride_kb, stride_kp, stride_vb, stride_vp,
        D, DV, PAGE, WINDOW, TREES, True, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
    )  # fmt: skip
    out, _ = softmax_end(top, total, acc)
    value_columns = tl.arange(0, BLOCK_DV)
    out_ptr += (block_start * H + kv_head * GROUP) * DV
    out_offsets = ((tokens - first) * H + rows % GROUP)[:, None] * DV + value_columns[None, :]
    inside = in_queries[:, None] & (value_columns < DV)[None, :]
    tl.store(out_ptr + out_offsets, to_dtype(out, out_ptr.dtype.element_ty), mask=inside)


def paged_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    ends: Tensor | None = None,
    trees: Trees | None = None,
) -> Tensor:
    """Return softmax(q kᵀ scale) v of each query over its sequence's keys up to its own, [T, H, Dv] as q.

    Args:
        q: [T, H, D], the sequences one after the other; query head h reads key-value head h // (H / G).
        key_cache: [blocks, G, page, D] of q's dtype; a power of two tokens a page, at least 16. The queries' own keys
            are in it.
        value_cache: [blocks, G, page, Dv].
        block_table: [B, max_blocks] int32, the pages of each sequence in order, from its first token on.
        cu_seqlens: [B + 1] int32, where each sequence's queries start, and T.
        starts: [B] int32, the slot of each one's first query: how many keys stand before it.
        max_seqlen: at least the most queries of a sequence; rows past it would not be written.
        scale: multiplies the scores; positive.
        window: how many positions a query sees, its own among them.
        sinks: [H], one more score per head, which takes its share of the softmax and adds nothing.
        ends: [B] int32, the slot behind each prompt, where branches begin; with `trees`.
        trees: what branches see of each other; None if there are none.

    Raises: ShapeError if they do not fit.
    """
    _check(q, key_cache, value_cache, block_table, cu_seqlens, starts, scale, window, sinks, ends, trees)
    tokens, heads, head_dim = q.shape
    _, kv_heads, page, value_dim = value_cache.shape
    group = heads // kv_heads
    out = torch.empty((tokens, heads, value_dim), dtype=q.dtype, device=q.device)
    block_d, block_rest = head_blocks(head_dim)
    block_dv = max(16, triton.next_power_of_2(value_dim))
    tile = attention_tile(capability(q.device), max(head_dim, block_dv), q.dtype)
    blocks = triton.cdiv(max_seqlen * group, tile.block_m)
    if blocks * len(starts):
        _paged_prefill_kernel[(blocks * len(starts), kv_heads)](
            q,
            key_cache,
            value_cache,
            out,
            block_table,
            cu_seqlens,
            starts,
            ends,
            trees and trees.of,
            trees and trees.positions,
            trees and trees.visible,
            sinks,
            scale * LOG2E.value,
            blocks,
            block_table.stride(0),
            trees.visible.shape[1] if trees else 0,
            trees.visible.shape[2] if trees else 0,
            *q.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            H=heads,
            GROUP=group,
            D=head_dim,
            DV=value_dim,
            PAGE=page,
            WINDOW=window or 0,
            TREES=trees is not None,
            SINKS=sinks is not None,
            BLOCK_M=tile.block_m,
            # Of one page, so one address: one per key spills; and two words of a tree.
            BLOCK_N=min(tile.block_n, page, 64),
            BLOCK_D=block_d,
            BLOCK_REST=block_rest,
            BLOCK_DV=block_dv,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    ends: Tensor | None,
    trees: Trees | None,
) -> None:
    """Raise ShapeError unless the arguments of `paged_prefill` fit."""
    tokens, heads, head_dim = q.shape
    blocks, kv_heads, page = key_cache.shape[:3]
    shapes = f"{tuple(q.shape)=}, {tuple(key_cache.shape)=}, {tuple(value_cache.shape)=}"
    if value_cache.shape[:3] != (blocks, kv_heads, page) or key_cache.shape[3] != head_dim or head_dim < 16:
        raise ShapeError(f"paged_prefill: {shapes}; [blocks, G, page] and D are equal, D at least 16")
    if heads % kv_heads or page < 16 or page & (page - 1) or scale <= 0 or (window is not None and window < 1):
        raise ShapeError(
            f"paged_prefill: {shapes}, {scale=}, {window=}; G divides H, page is a power of two from 16 on, scale and "
            "window are positive"
        )
    batch = len(starts)
    if block_table.dim() != 2 or len(block_table) != batch or cu_seqlens.shape != (batch + 1,):
        tables = f"{tuple(block_table.shape)=}, {tuple(cu_seqlens.shape)=}, {tuple(starts.shape)=}"
        raise ShapeError(f"paged_prefill: {tables}; a row each per B, and cu_seqlens one more")
    if not q.dtype == key_cache.dtype == value_cache.dtype:
        raise ShapeError(f"paged_prefill: {q.dtype=}, {key_cache.dtype=}, {value_cache.dtype=}; one dtype")
    if not q.stride(2) == key_cache.stride(3) == value_cache.stride(3) == block_table.stride(1) == 1:
        raise ShapeError(f"paged_prefill: {shapes}; the last axis of each has stride 1")
    if sinks is not None and sinks.shape != (heads,):
        raise ShapeError(f"paged_prefill: {shapes}, {tuple(sinks.shape)=}; one sink per head")
    if (ends is None) != (trees is None):
        raise ShapeError("paged_prefill: ends and trees come together or not at all")
    if trees and (trees.of.shape != (batch,) or trees.positions.shape != (tokens,) or trees.visible.dim() != 3):
        found = f"{tuple(trees.of.shape)=}, {tuple(trees.positions.shape)=}, {tuple(trees.visible.shape)=}"
        raise ShapeError(f"paged_prefill: {shapes}, {found}; must be [B], [T], [trees, N, W]")
