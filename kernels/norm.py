"""RMSNorm on a card where no INT8 layer follows: one program a row.

Legend: R rows, D columns of each; BLOCK columns held in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cpu import ShapeError
from kernels.language import NO_FUSION
from kernels.quantize import MAX_BLOCK, tile


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + d, mask=d < D, other=0.0).to(tl.float32)
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), D * 1.0)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + d, x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps)) * weight, mask=d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis, float32 in the shape of `x` [*, D].

    torch's own mean cuts a row by how many rows there are; here a row's sum has the order of its columns alone.

    Raises: ShapeError if D is no multiple of 16 up to 16,384, or `weight` is not [D].
    Source: arXiv 1910.07467.
    """
    width = x.shape[-1]
    if width % 16 or not 0 < width <= MAX_BLOCK or weight.shape != (width,):
        raise ShapeError(
            f"rms_norm: {tuple(x.shape)=}, {tuple(weight.shape)=}; must be [*, D] and [D], D in 16s up to {MAX_BLOCK}"
        )
    rows = x.reshape(-1, width).contiguous()
    out = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    if len(rows):
        block, num_warps = tile(width)
        _rms_norm_kernel[(len(rows),)](rows, weight, out, eps, D=width, BLOCK=block, num_warps=num_warps, **NO_FUSION)
    return out.view(x.shape)
