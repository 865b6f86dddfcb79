"""Block FP8, as DeepSeek-V3 and Kimi-K2 are released: `weight` float8_e4m3fn, one float32 scale per block of it.

Source: deepseek-ai/DeepSeek-V3, inference/kernel.py `weight_dequant`.
"""

import torch
from torch import Tensor


def expand_fp8(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """Return weight * scale as float32 [N, K]; a multiplier, despite its name.

    Args:
        weight: [N, K] float8_e4m3fn.
        scale_inv: [ceil(N / rows), ceil(K / columns)] float32.
        block: rows and columns that share a scale. Blocks at the edges are cut off, as kv_a_proj_with_mqa's 576 rows.
    """
    n, k = weight.shape
    scale = scale_inv.float().repeat_interleave(block[0], dim=0)[:n].repeat_interleave(block[1], dim=1)[:, :k]
    return weight.to(torch.float32) * scale
