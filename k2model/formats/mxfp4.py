"""MXFP4, as gpt-oss is released: 4-bit floats in blocks of 32 that share a power of two.

Source: OCP Microscaling Formats (MX) 1.0, section 5.3.2 (FP4 is E2M1, the scale E8M0); the layout of blocks and nibbles
is that of openai/gpt-oss, gpt_oss/torch/weights.py.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Values that share a scale."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def expand_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values as float32 [..., K]: exact, as 4-bit floats times powers of two are.

    Args:
        blocks: [..., K / 32, 16] uint8, two values a byte, the low nibble first.
        scales: [..., K / 32] uint8; a block is multiplied by 2 ** (scale - 127).
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    return torch.ldexp(table[nibbles.int()], scales.int()[..., None] - 127).flatten(-2)
