"""Routing: which experts a token visits, with what weights, and in which blocks of slots the experts are computed.

Legend: T tokens, E experts, A experts per token, S slots = T * A: a slot is one visit, numbered token * A + place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ShapeError

MAX_EXPERTS = 512
"""Of a router: its row is held by one warp, 16 values a thread."""

SCORINGS = ("sigmoid", "softmax", "softmax_topk")

_CHUNK = 128
"""Slots ranked at once, each against each: 128² comparisons are 64 a thread of 8 warps, 256² would spill."""

_CHUNKS_AT_ONCE = 1024


@triton.jit
def _within_best_groups(
    choice, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_G, BLOCK_P, KEPT: tl.constexpr
):
    """Return `choice` [BLOCK_G * BLOCK_P] with -inf outside the KEPT groups whose two best sum highest."""
    grouped = tl.reshape(choice, (BLOCK_G, BLOCK_P))
    score, first = tl.max(grouped, 1, return_indices=True)
    if GROUP_SIZE > 1:
        others = tl.where(tl.arange(0, BLOCK_P)[None, :] == first[:, None], float("-inf"), grouped)
        score += tl.max(others, 1)
    group = tl.arange(0, BLOCK_G)
    kept = group < 0
    for _ in range(KEPT):
        best = tl.argmax(score, 0)
        kept |= group == best
        score = tl.where(group == best, float("-inf"), score)
    return tl.reshape(tl.where(kept[:, None], grouped, float("-inf")), (BLOCK_G * BLOCK_P,))


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    counts_ptr,
    stride_lt,
    threshold,
    factor,
    A: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALIZED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    DROPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    # A group's experts lie in BLOCK_P lanes of their own, so lanes ascend as experts do and the first lane is the
    # lower expert: of equals argmax takes it, and a running count over lanes sorts the chosen.
    lane = tl.arange(0, BLOCK_G * BLOCK_P)
    expert = lane // BLOCK_P * GROUP_SIZE + lane % BLOCK_P
    exists = (lane % BLOCK_P < GROUP_SIZE) & (lane // BLOCK_P < NUM_GROUPS)
    token = tl.program_id(0).to(tl.int64)
    scores = tl.load(logits_ptr + token * stride_lt + expert, mask=exists, other=float("-inf")).to(tl.float32)
    if SCORING == "sigmoid":
        scores = 1 / (1 + tl.exp(-scores))
    elif SCORING == "softmax":
        scores = tl.exp(scores - tl.max(scores, 0))
        scores = scores / tl.sum(scores, 0)

    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=exists, other=0).to(tl.float32)
    choice = tl.where(exists, choice, float("-inf"))
    if KEPT_GROUPS < NUM_GROUPS:
        choice = _within_best_groups(choice, NUM_GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_P, KEPT_GROUPS)
    chosen = lane < 0
    for _ in range(A):
        best = tl.argmax(choice, 0)
        chosen |= lane == best
        choice = tl.where(lane == best, float("-inf"), choice)
    # Only a row of NaN or -inf could have chosen a lane without expert, or one twice; those slots are dropped.
    chosen &= exists

    if SCORING == "softmax_topk":
        scores = tl.exp(scores - tl.max(tl.where(chosen, scores, float("-inf")), 0))
    weights = tl.where(chosen, scores, 0.0)
    total = tl.sum(weights, 0)
    kept = chosen
    if DROPS:
        # What is chosen before each, by descending weight; of equals, the lower expert is first.
        reached = 0.0
        before = weights * 0
        left = tl.where(chosen, scores, -1.0)
        strongest = tl.argmax(left, 0)
        for _ in range(A):
            best = tl.argmax(left, 0)
            before = tl.where(lane == best, reached, before)
            reached += tl.max(left, 0)
            left = tl.where(lane == best, -1.0, left)
        kept &= (before < threshold * total) | (lane == strongest)
    if NORMALIZED:
        weights = weights / (total + 1e-20)

    row = token * A
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(ids_ptr + row + place, expert, mask=kept)
    tl.store(weights_ptr + row + place, weights * factor, mask=kept)
    count = tl.sum(kept.to(tl.int32), 0)
    tl.store(counts_ptr + token, count)
    place = tl.arange(0, BLOCK_A)
    dropped = (place >= count) & (place < A)
    tl.store(ids_ptr + row + place, NUM_GROUPS * GROUP_SIZE, mask=dropped)
    tl.store(weights_ptr + row + place, 0.0, mask=dropped)


def route(
    logits: Tensor,
    correction_bias: Tensor | None,
    num_experts_per_tok: int,
    scoring: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the experts of each token [T, A] int32, their weights [T, A] float32, and how many are kept [T] int32.

    The arguments, and what is kept, as `kernels.ops.route` tells; E is at most MAX_EXPERTS.

    Raises: ShapeError.
    """
    tokens, experts = logits.shape
    bias_fits = correction_bias is None or correction_bias.shape == (experts,)
    if experts > MAX_EXPERTS or experts % n_group or not bias_fits or logits.stride(1) != 1:
        raise ShapeError(
            f"route: {tuple(logits.shape)=} {logits.stride()=}, {n_group=}, correction_bias "
            f"{None if correction_bias is None else tuple(correction_bias.shape)}: rows of at most {MAX_EXPERTS} "
            "neighbouring logits, equal groups, one bias an expert"
        )
    size = experts // n_group
    if scoring not in SCORINGS or not 0 < topk_group <= n_group or not 0 < num_experts_per_tok <= topk_group * size:
        raise ShapeError(
            f"route: {scoring=} of {SCORINGS}, {num_experts_per_tok=} of {topk_group=} groups of {n_group} of {size}"
        )
    ids = torch.empty(tokens, num_experts_per_tok, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, num_experts_per_tok, dtype=torch.float32, device=logits.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=logits.device)
    if tokens:
        # One warp: its reductions are shuffles, without a barrier.
        _route_kernel[(tokens,)](
            logits,
            correction_bias,
            ids,
            weights,
            counts,
            logits.stride(0),
            float(threshold),
            float(routed_scaling_factor),
            A=num_experts_per_tok,
            SCORING=scoring,
            NORMALIZED=norm_topk_prob or scoring == "softmax_topk",
            NUM_GROUPS=n_group,
            KEPT_GROUPS=topk_group,
            DROPS=threshold < 1,
            GROUP_SIZE=size,
            BLOCK_G=triton.next_power_of_2(n_group),
            BLOCK_P=triton.next_power_of_2(size),
            BLOCK_A=triton.next_power_of_2(num_experts_per_tok),
            num_warps=1,
        )
    return ids, weights, counts


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, S, E, num_chunks, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Count each expert's slots in each chunk of slots: counts [E, num_chunks]."""
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, mask=slot < S, other=E)
    expert = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + expert * num_chunks + chunk, tl.histogram(ids, BLOCK_E), mask=expert < E)


@triton.jit
def _scan_kernel(counts_ptr, totals_ptr, num_chunks, BLOCK: tl.constexpr):
    """Turn an expert's counts into how many of its slots lie in earlier chunks; totals [E]."""
    expert = tl.program_id(0)
    total = 0
    for start in range(0, num_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        at = counts_ptr + expert * num_chunks + chunk
        counts = tl.load(at, mask=chunk < num_chunks, other=0)
        tl.store(at, total + tl.cumsum(counts, 0) - counts, mask=chunk < num_chunks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit
def _lay_out_kernel(
    totals_ptr,
    starts_ptr,
    slot_ids_ptr,
    block_experts_ptr,
    num_padded_ptr,
    S,
    E,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Give an expert its blocks, after those of lower experts, and fill what its slots leave of the last one."""
    expert = tl.program_id(0)
    lower = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + lower, mask=lower < expert, other=0)
    start = tl.sum(tl.cdiv(totals, BLOCK_SIZE), 0) * BLOCK_SIZE
    total = tl.load(totals_ptr + expert)
    end = start + tl.cdiv(total, BLOCK_SIZE) * BLOCK_SIZE
    tl.store(starts_ptr + expert, start)
    padding = start + total + tl.arange(0, BLOCK_SIZE)
    tl.store(slot_ids_ptr + padding, S, mask=padding < end)
    for block in range(start // BLOCK_SIZE, end // BLOCK_SIZE):
        tl.store(block_experts_ptr + block, expert)
    if expert == E - 1:
        tl.store(num_padded_ptr, end)


@triton.jit
def _place_kernel(ids_ptr, counts_ptr, starts_ptr, slot_ids_ptr, S, E, num_chunks, CHUNK: tl.constexpr):
    """Write each slot behind those of its expert that have lower numbers."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    slot = chunk * CHUNK + lane
    ids = tl.load(ids_ptr + slot, mask=slot < S, other=E)
    kept = ids < E
    # Summed along axis 0, which lies in a thread's registers: along axis 1 it takes 128 warp reductions.
    rank = tl.sum(((ids[:, None] == ids[None, :]) & (lane[:, None] < lane[None, :])).to(tl.int32), 0)
    earlier = tl.load(counts_ptr + ids * num_chunks + chunk, mask=kept, other=0)
    start = tl.load(starts_ptr + ids, mask=kept, other=0)
    tl.store(slot_ids_ptr + start + earlier + rank, slot, mask=kept)


def align_tokens(expert_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots sorted by expert and padded to whole blocks, each block's expert, and how many entries there are.

    Slots of an expert ascend; what fills its last block is S; slots with expert E, dropped ones, do not occur.
    A counting sort in four small kernels, without atomics on memory, so it gives one answer. torch's stable sort alone
    is as many launches, before the dozen that turn its order into blocks. Nothing waits for the device: buffers have
    the largest size that any routing of S slots can need, and what lies past the last entry is undefined.

    Args:
        expert_ids: [T, A] int32, by `route`.
        num_experts: E.
        block_size: a power of 2.

    Returns: slot_ids [blocks * block_size] int32, block_experts [blocks] int32, num_padded [1] int32.
    Raises: ShapeError.
    """
    if expert_ids.dtype != torch.int32 or not expert_ids.is_contiguous() or block_size & (block_size - 1):
        raise ShapeError(
            f"align_tokens: {tuple(expert_ids.shape)=} {expert_ids.dtype} {expert_ids.stride()=}, {block_size=}: "
            "contiguous int32, blocks of a power of 2"
        )
    slots, device = expert_ids.numel(), expert_ids.device
    visited = min(num_experts, slots)
    # Every visited expert has one block that may be short of slots; all others are full.
    max_blocks = visited + (slots - visited) // block_size

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    slot_ids, block_experts = make(max_blocks * block_size), make(max_blocks)
    if not slots:
        return slot_ids, block_experts, torch.zeros(1, dtype=torch.int32, device=device)
    num_chunks = triton.cdiv(slots, _CHUNK)
    counts, totals, starts = make(num_experts, num_chunks), make(num_experts), make(num_experts)
    num_padded = make(1)
    block_e = triton.next_power_of_2(num_experts + 1)
    _count_kernel[(num_chunks,)](
        expert_ids, counts, slots, num_experts, num_chunks, CHUNK=_CHUNK, BLOCK_E=block_e, num_warps=4
    )
    _scan_kernel[(num_experts,)](counts, totals, num_chunks, BLOCK=_CHUNKS_AT_ONCE, num_warps=4)
    _lay_out_kernel[(num_experts,)](
        totals,
        starts,
        slot_ids,
        block_experts,
        num_padded,
        slots,
        num_experts,
        BLOCK_SIZE=block_size,
        BLOCK_E=block_e,
        num_warps=4,
    )
    _place_kernel[(num_chunks,)](
        expert_ids, counts, starts, slot_ids, slots, num_experts, num_chunks, CHUNK=_CHUNK, num_warps=8
    )
    return slot_ids, block_experts, num_padded
