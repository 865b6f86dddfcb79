"""INT8 post-training quantization of one weight."""

import torch
from torch import Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` [N, K] as int8 and its scales [N, 1] float32: absmax / 127 per output channel."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight.float() / scale).clamp(-127, 127).to(torch.int8), scale
