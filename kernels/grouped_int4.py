"""The experts' products with INT4 weights as they are, int8 activations: W4A8, for Kimi-K2-Thinking.

Legend: as kernels/grouped_gemm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ShapeError
from kernels.grouped_gemm import check_blocks, is_laid_out, locate_block, store_slots
from kernels.language import INTERPRETED
from kernels.tiles import Tile

INT4_GROUP_SIZE = 32
"""In features that share a scale: as many int8 columns as wgmma and mma.sync multiply at a time."""


def pair_int4_groups(weight_packed: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return INT4 weights and scales in the order `expert_linear_int4` reads: two groups of 32 side by side.

    A byte holds column c of one group in its low half and column c of the next in its high half, so that halving bytes
    gives two tiles that tensor cores take as they are. In the order of the checkpoint, neighbours share a byte, and
    weaving them together again took 36 PRMT of 128 instructions a group. Scales are paired alike, each pair one word,
    which cp.async can copy where it cannot copy single bfloat16; they are divided by 16, because a nibble is
    multiplied where it stands, in the upper half of an int8.

    Args:
        weight_packed: [E, N, K / 8] int32 as in compressed-tensors, low nibble first, each value + 8; or the same
            memory as [E, N, K / 2] uint8.
        weight_scale: [E, N, K / 32] bfloat16, above 2**-122.

    Returns: [E, N, K / 2] uint8 and [E, K / 64, N] int32.
    Raises: ShapeError if groups are not of 32, or odd in number.
    """
    experts, n, groups = weight_scale.shape
    nibbles = weight_packed.contiguous().view(torch.uint8)
    if (
        nibbles.shape != (experts, n, groups * INT4_GROUP_SIZE // 2)
        or groups % 2
        or weight_scale.dtype != torch.bfloat16
    ):
        raise ShapeError(
            f"pair_int4_groups: {tuple(weight_packed.shape)=} {weight_packed.dtype}, {tuple(weight_scale.shape)=} "
            f"{weight_scale.dtype}; must be pairs of groups of {INT4_GROUP_SIZE}, scales bfloat16"
        )
    first, second = nibbles.unflatten(2, (groups // 2, 2, INT4_GROUP_SIZE // 2)).unbind(3)
    even, odd = first & 0x0F | second << 4, first >> 4 | second & 0xF0
    scales = (weight_scale / 16).transpose(1, 2).unflatten(1, (groups // 2, 2)).transpose(2, 3)
    return torch.stack([even, odd], dim=-1).reshape(nibbles.shape), scales.contiguous().view(torch.int32).squeeze(3)


@triton.jit
def _halve_bytes(packed):
    """Return 16 * (nibble - 8) of the low and of the high nibbles of uint8 `packed`, as int8.

    Three instructions for eight weights: Triton's own and, shift and xor go byte by byte, 22 PRMT a group more.
    """
    if INTERPRETED:
        return ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True), ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            """
            shl.b32 $0, $2, 4;
            lop3.b32 $0, $0, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
            """,
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def _expert_linear_int4_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    scale_pairs_ptr,
    out_ptr,
    slot_ids_ptr,
    block_experts_ptr,
    num_padded_ptr,
    S,
    N,
    K,
    stride_xr,
    SLOTS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    num_blocks = tl.load(num_padded_ptr) // BLOCK_M
    if tl.program_id(0) >= num_blocks * tl.cdiv(N, BLOCK_N):
        return
    expert, slot, row, first_n = locate_block(
        slot_ids_ptr, block_experts_ptr, S, num_blocks, N, SLOTS_PER_ROW, BLOCK_M, BLOCK_N, GROUP_M
    )
    n = first_n + tl.arange(0, BLOCK_N)
    # Past the last out feature it is multiplied again and not stored.
    weight_n = tl.minimum(n, N - 1).to(tl.int64)
    column = tl.arange(0, 32)[None, :]
    x_ptrs = x_ptr + row[:, None] * stride_xr + column
    # A row is pairs * 32 bytes: of K // 2 the compiler would know 8 for a divisor, and copy 8 bytes at a time.
    pairs = K // 64
    weight_ptrs = weight_ptr + (expert.to(tl.int64) * N + weight_n)[:, None] * (pairs * 32) + column
    pair_ptrs = scale_pairs_ptr + expert.to(tl.int64) * pairs * N + weight_n
    # Weights are the left side: wgmma takes that one from registers too, where the bytes were just halved.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Without its own num_stages the loop would prefetch operands of products only, not scales.
    for _ in tl.range(0, pairs, num_stages=STAGES):
        low, high = _halve_bytes(tl.load(weight_ptrs))
        first = tl.dot(low, tl.load(x_ptrs).T, out_dtype=tl.int32)
        second = tl.dot(high, tl.load(x_ptrs + 32).T, out_dtype=tl.int32)
        # bfloat16 is the upper half of a float32. Its 8 bits times the sum's 15 are exact in float32's 24: only the
        # addition rounds, so a fused multiply-add has the same bits.
        pair = tl.load(pair_ptrs)
        acc += first.to(tl.float32) * (pair << 16).to(tl.float32, bitcast=True)[:, None]
        acc += second.to(tl.float32) * (pair & -65536).to(tl.float32, bitcast=True)[:, None]
        x_ptrs += 64
        weight_ptrs += 32
        pair_ptrs += N
    store_slots(out_ptr, acc.T * tl.load(x_scale_ptr + row)[:, None], slot, n, S, N)


def expert_linear_int4(
    x_int8: Tensor,
    x_scale: Tensor,
    weight_pairs: Tensor,
    scale_pairs: Tensor,
    slot_ids: Tensor,
    block_experts: Tensor,
    num_padded: Tensor,
    *,
    slots_per_row: int,
    out_dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """Return each slot's row of x times the INT4 weights of its expert as [S, N]: W4A8, for Kimi-K2-Thinking as it is.

    Every group of 32 is summed exactly in int32, then scaled and added in float32, groups ascending: a slot's bits
    depend on its row and its expert alone. Rows of dropped slots hold whatever was in memory.

    For blocks of few slots. Scaling costs a conversion and a multiply-add for every 32 products. Per weight and slot,
    a multiprocessor's 64 and 128 a cycle make that 1/1365 of a cycle where the products are 1/4096. Reading a weight
    takes 1/36 of a cycle at 4.3 TB/s, so the reading hides it up to about 32 slots; beyond 64 `expert_linear` should be
    the faster one.

    Args:
        x_int8: [R, K] int8, row-quantized activations; slot s reads row s // slots_per_row.
        x_scale: [R] float32.
        weight_pairs: [E, N, K / 2] uint8, by `pair_int4_groups`.
        scale_pairs: [E, K / 64, N] int32, by `pair_int4_groups`.
        slot_ids: by `routing.align_tokens` with blocks of tile.block_m.
        block_experts: likewise.
        num_padded: likewise.
        slots_per_row: A where x holds tokens, 1 where it holds slots.
        out_dtype: bfloat16, float16 or float32, rounded to nearest even from float32.
        tile: by `tiles.grouped_int4_tile`.

    Raises: ShapeError if the tensors do not fit each other.
    """
    (rows, k), (experts, n, _) = x_int8.shape, weight_pairs.shape
    check_blocks("expert_linear_int4", x_int8, x_scale, slot_ids, block_experts, tile)
    if k % 64 or not is_laid_out(weight_pairs, experts, n, k // 2) or not is_laid_out(scale_pairs, experts, k // 64, n):
        shapes = [tuple(t.shape) for t in (x_int8, weight_pairs, scale_pairs)]
        raise ShapeError(f"expert_linear_int4: {shapes=}; must be [R, K], [E, N, K / 2], [E, K / 64, N], contiguous")
    slots = rows * slots_per_row
    out = torch.empty((slots, n), dtype=out_dtype, device=x_int8.device)
    if out.numel():
        _expert_linear_int4_kernel[(len(block_experts) * triton.cdiv(n, tile.block_n),)](
            x_int8,
            weight_pairs,
            x_scale,
            scale_pairs,
            out,
            slot_ids,
            block_experts,
            num_padded,
            slots,
            n,
            k,
            x_int8.stride(0),
            SLOTS_PER_ROW=slots_per_row,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            GROUP_M=tile.group_m,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return out
