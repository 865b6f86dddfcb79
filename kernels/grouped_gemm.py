"""The experts' products: each slot's row of x times the weights of its own expert, and the sum over a token's slots.

Programs work on blocks of slots with one expert, as `routing.align_tokens` lays them out; results are written where the
slot's number says, so nothing here depends on how slots were gathered. Dropped slots are in no block: their rows are
never written, and `combine` never reads them.

Legend: T tokens, A experts per token, S slots = T * A, R rows of x (T, or S), E experts, N out features, K in features,
D hidden_size; BLOCK_M slots, BLOCK_N out features and BLOCK_K in features of one program (kernels/tiles.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cpu import MAX_IN_FEATURES, ShapeError
from kernels.language import NO_FUSION, to_dtype
from kernels.tiles import Tile, compute_capability

_COMBINE_BLOCK = 1024
"""Features summed by a program: 8 a thread, loads of 16 bytes."""


@triton.jit
def locate_block(
    slot_ids_ptr,
    block_experts_ptr,
    S,
    num_blocks,
    N,
    SLOTS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Return this program's expert, its slots, their rows of x, and its first out feature."""
    # Blocks of one expert are neighbours: within a group they find its weights in L2.
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    block, tile_n = tl.swizzle2d(program // tiles_n, program % tiles_n, num_blocks, tiles_n, GROUP_M)
    slot = tl.load(slot_ids_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    # Padding multiplies row 0, which costs no mask in the loop, and is not stored.
    row = (tl.where(slot < S, slot, 0) // SLOTS_PER_ROW).to(tl.int64)
    return tl.load(block_experts_ptr + block), slot, row, tile_n * BLOCK_N


@triton.jit
def store_slots(out_ptr, out, slot, feature, S, N):
    """Write float32 `out` [BLOCK_M, BLOCK_N] to the rows of out [S, N] that the slots' numbers say."""
    inside = (slot < S)[:, None] & (feature < N)[None, :]
    out_ptrs = out_ptr + slot.to(tl.int64)[:, None] * N + feature[None, :]
    tl.store(out_ptrs, to_dtype(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expert_linear_kernel(
    x_ptr,
    weight,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    slot_ids_ptr,
    block_experts_ptr,
    num_padded_ptr,
    S,
    N,
    K,
    stride_xr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    SLOTS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_blocks = tl.load(num_padded_ptr) // BLOCK_M
    if tl.program_id(0) >= num_blocks * tl.cdiv(N, BLOCK_N):
        return
    expert, slot, row, first_n = locate_block(
        slot_ids_ptr, block_experts_ptr, S, num_blocks, N, SLOTS_PER_ROW, BLOCK_M, BLOCK_N, GROUP_M
    )
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * stride_xr + k[None, :]
    # Past the last out feature it is multiplied again and not stored; TMA reads on into the next expert instead.
    weight_row = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.int32)
    for first_k in range(0, K, BLOCK_K):
        inside = (k < K - first_k)[None, :]
        x_tile = tl.load(x_ptrs + first_k) if EVEN_K else tl.load(x_ptrs + first_k, mask=inside, other=0)
        if TMA:
            weight_tile = weight.load([expert * N + first_n, first_k])
        else:
            weight_ptrs = weight + weight_row[:, None] * K + first_k + k[None, :]
            weight_tile = tl.load(weight_ptrs) if EVEN_K else tl.load(weight_ptrs, mask=inside, other=0)
        if SWAPPED:
            acc = tl.dot(weight_tile, x_tile.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x_tile, weight_tile.T, acc, out_dtype=tl.int32)
    if SWAPPED:
        acc = acc.T
    scale_at = expert.to(tl.int64) * N + n
    x_scale = tl.load(x_scale_ptr + row)
    weight_scale = tl.load(weight_scale_ptr + scale_at, mask=n < N, other=0.0)
    out = acc.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + scale_at, mask=n < N, other=0.0)[None, :]
    store_slots(out_ptr, out, slot, n, S, N)


def expert_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    slot_ids: Tensor,
    block_experts: Tensor,
    num_padded: Tensor,
    *,
    slots_per_row: int,
    out_dtype: torch.dtype,
    tile: Tile,
    bias: Tensor | None = None,
) -> Tensor:
    """Return each slot's row of x times the weights of its expert, + bias, as [S, N], accumulated exactly in int32.

    A slot's bits depend on its row and its expert alone. Rows of dropped slots hold whatever was in memory.

    Args:
        x_int8: [R, K] int8, row-quantized activations; slot s reads row s // slots_per_row.
        x_scale: [R] float32.
        weight: [E, N, K] int8, contiguous.
        weight_scale: [E, N] float32.
        slot_ids: by `routing.align_tokens` with blocks of tile.block_m.
        block_experts: likewise.
        num_padded: likewise.
        slots_per_row: A where x holds tokens, 1 where it holds slots.
        out_dtype: bfloat16, float16 or float32, rounded to nearest even from float32.
        tile: by `tiles.grouped_tile`.
        bias: [E, N] float32.

    Raises: ShapeError if the tensors do not fit each other or K could overflow int32.
    """
    (rows, k), (experts, n, _) = x_int8.shape, weight.shape
    scales = [weight_scale] if bias is None else [weight_scale, bias]
    check_blocks("expert_linear", x_int8, x_scale, slot_ids, block_experts, tile)
    if weight.shape[2] != k or k > MAX_IN_FEATURES or not all(is_laid_out(t, experts, n) for t in scales):
        shapes = [tuple(t.shape) for t in (x_int8, weight, *scales)]
        raise ShapeError(f"expert_linear: {shapes=}; must be [R, K], [E, N, K], [E, N], K at most {MAX_IN_FEATURES}")
    if not weight.is_contiguous():
        raise ShapeError(f"expert_linear: {weight.stride()=} of {tuple(weight.shape)=}; must be contiguous")
    slots = rows * slots_per_row
    out = torch.empty((slots, n), dtype=out_dtype, device=x_int8.device)
    if out.numel():
        tma = _has_tma(weight.device) and weight.data_ptr() % 16 == 0 and k % 16 == 0
        flat = weight.view(experts * n, k)
        _expert_linear_kernel[(len(block_experts) * triton.cdiv(n, tile.block_n),)](
            x_int8,
            TensorDescriptor.from_tensor(flat, [tile.block_n, tile.block_k]) if tma else flat,
            x_scale,
            weight_scale,
            bias,
            out,
            slot_ids,
            block_experts,
            num_padded,
            slots,
            n,
            k,
            x_int8.stride(0),
            HAS_BIAS=bias is not None,
            TMA=tma,
            EVEN_K=k % tile.block_k == 0,
            SWAPPED=tile.swapped,
            SLOTS_PER_ROW=slots_per_row,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **NO_FUSION,
        )
    return out


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    counts_ptr,
    shared_ptr,
    out_ptr,
    D,
    stride_sharedt,
    A: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(counts_ptr + token)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for place in tl.static_range(A):
        # Of a dropped slot nothing is loaded: 0 * 0 is added in its place, and -0.0 cannot be the sum so far.
        width = tl.where(count > place, D, 0)
        slot = token * A + place
        y = tl.load(y_ptr + slot * D + d, mask=d < width, other=0.0).to(tl.float32)
        acc += y * tl.load(weights_ptr + slot)
    if HAS_SHARED:
        acc += tl.load(shared_ptr + token * stride_sharedt + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + d, to_dtype(acc, out_ptr.dtype.element_ty), mask=d < D)


def combine(y: Tensor, expert_weights: Tensor, counts: Tensor, shared: Tensor | None = None) -> Tensor:
    """Return each token's weighted sum over its slots, + shared, as [T, D] in the dtype of `y`.

    Summed in float32 in the order of slots, experts ascending, the shared expert last. Dropped slots are not read.

    Args:
        y: [S, D], by `expert_linear`.
        expert_weights: [T, A] float32, by `routing.route`; 0 for dropped slots.
        counts: [T] int32, by `routing.route`: the first counts[t] slots of a token were kept.
        shared: [T, D], the shared expert's output.

    Raises: ShapeError.
    """
    tokens, per_token = expert_weights.shape
    d = y.shape[1]
    shared_fits = shared is None or (shared.shape == (tokens, d) and shared.stride(1) == 1)
    contiguous = y.is_contiguous() and expert_weights.is_contiguous() and counts.is_contiguous()
    if y.shape[0] != tokens * per_token or counts.shape != (tokens,) or not shared_fits or not contiguous:
        shapes = [tuple(t.shape) for t in (y, expert_weights, counts, *([] if shared is None else [shared]))]
        raise ShapeError(f"combine: {shapes=}; must be [T * A, D], [T, A], [T], [T, D], contiguous")
    out = torch.empty((tokens, d), dtype=y.dtype, device=y.device)
    if out.numel():
        _combine_kernel[(tokens, triton.cdiv(d, _COMBINE_BLOCK))](
            y,
            expert_weights,
            counts,
            shared,
            out,
            d,
            0 if shared is None else shared.stride(0),
            A=per_token,
            HAS_SHARED=shared is not None,
            BLOCK_D=_COMBINE_BLOCK,
            num_warps=4,
            **NO_FUSION,
        )
    return out


def check_blocks(
    name: str, x_int8: Tensor, x_scale: Tensor, slot_ids: Tensor, block_experts: Tensor, tile: Tile
) -> None:
    """Raise ShapeError unless x has rows with scales, and slots are in blocks of the tile's size."""
    if x_int8.stride(-1) != 1 or not is_laid_out(x_scale, x_int8.shape[0]):
        raise ShapeError(
            f"{name}: {tuple(x_int8.shape)=} {x_int8.stride()=}, {tuple(x_scale.shape)=}; must be [R, K], [R]"
        )
    if len(slot_ids) != len(block_experts) * tile.block_m:
        raise ShapeError(f"{name}: {len(slot_ids)=} in {len(block_experts)} blocks; must be of {tile.block_m=}")


def is_laid_out(tensor: Tensor, *shape: int) -> bool:
    """Return whether `tensor` is of this shape, contiguous."""
    return tensor.shape == shape and tensor.is_contiguous()


def _has_tma(device: torch.device) -> bool:
    """Return whether the card has TMA; the interpreter plays one that has."""
    return compute_capability(device) >= 90
