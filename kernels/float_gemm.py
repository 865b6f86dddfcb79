"""Products of floats on a card whose every row has its own bits, as cuBLAS's have not: it cuts K by the rows there are.

One tile for each dtype, whatever the shapes, and K from its first column on: a row's sums have one order.

Legend: Z matrices side by side, M rows, K in features, N out features; BLOCK_* what one program holds of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ARGMAX_SHORTLIST, ShapeError, rounded
from kernels.label_score import label_logits
from kernels.language import dot

FLOAT_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
"""Of 16-bit operands. Not measured: chosen by machine code, which must not spill."""

FLOAT32_TILE = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
"""Of float32, which is multiplied in full: routers, absorbed latents, and the reference precision."""


@triton.jit
def _matmul_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, K, stride_xz, stride_xm, stride_wz, stride_wk, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, GROUP_M)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + z * stride_xz + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    weight_ptrs = weight_ptr + z * stride_wz + n.to(tl.int64)[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        inside = k < K - first_k
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(x, weight, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_wk
    out_ptrs = out_ptr + (z * M + m.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc, mask=(m < M)[:, None] & (n < N)[None, :])


def row_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight as float32, [M, N] or [Z, M, N], so that a row's bits are its own.

    Args:
        x: [M, K], or [Z, M, K].
        weight: [K, N] or [Z, K, N] of x's dtype, in any layout.

    Raises: ShapeError if they do not fit.
    """
    if x.shape[:-2] != weight.shape[:-2] or x.shape[-1] != weight.shape[-2] or x.dtype != weight.dtype:
        shapes = f"{tuple(x.shape)=} {x.dtype}, {tuple(weight.shape)=} {weight.dtype}"
        raise ShapeError(f"row_matmul: {shapes}; must be [M, K], [K, N] or [Z, M, K], [Z, K, N], of one dtype")
    (m, k), n = x.shape[-2:], weight.shape[-1]
    rows, columns = (x, weight) if x.dim() == 3 else (x[None], weight[None])
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    out = torch.empty((len(rows), m, n), dtype=torch.float32, device=x.device)
    if out.numel():
        tile = FLOAT32_TILE if x.dtype == torch.float32 else FLOAT_TILE
        grid = (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]), len(rows))
        _matmul_kernel[grid](rows, columns, out, m, n, k, *rows.stride()[:2], *columns.stride(), **tile)
    return out if x.dim() == 3 else out[0]


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as float32 [T, N], from values rounded to the dtype of `weight` and summed in float32.

    Args:
        x: [T, K] float32.
        weight: [N, K] float32, bfloat16 or float16.
    """
    return row_matmul(rounded(x, weight.dtype), weight.t())


def token_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return the logits [T, U] of `token_ids` [U] alone, for hidden [T, D] and the output embedding [V, D]."""
    return label_logits(hidden.contiguous(), head, token_ids.expand(len(hidden), -1).contiguous())


def argmax_token(hidden: Tensor, head: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the token with the highest logit per row [T] int64; the lowest id wins a tie of up to 16.

    A shortlist in the dtype of `head`, then float32 logits, as kernels/cpu.py tells.

    Args:
        hidden: [T, D] float32, after the final norm.
        head: [V, D] the output embedding.
        allowed: [T, V] bool, at least one of each row; None for all.
    """
    logits = float_linear(hidden, head)
    if allowed is not None:
        logits.masked_fill_(~allowed, float("-inf"))
    ids = logits.topk(min(ARGMAX_SHORTLIST, len(head)), dim=-1).indices.sort(dim=-1).values
    exact = label_logits(hidden.contiguous(), head, ids)
    if allowed is not None:
        exact.masked_fill_(~allowed.gather(1, ids), float("-inf"))
    return ids.gather(1, exact.argmax(dim=-1, keepdim=True)).squeeze(1)
