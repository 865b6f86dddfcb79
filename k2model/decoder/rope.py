"""The angles of the rotary position embedding, arXiv 2104.09864, and its scalings."""

import math

import torch
from torch import Tensor

from k2model.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Return the rotation per position of each pair [dim / 2] float32."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies, rope, scaling)
    return frequencies


def cos_sin(rope: RopeConfig, frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of every pair at `positions` [T], each [T, dim / 2] float32."""
    angles = positions[:, None].float() * frequencies
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return angles.cos() * factor, angles.sin() * factor


def deinterleaved(dim: int) -> Tensor:
    """Return the order [dim] that turns interleaved pairs (x0, x1), ... into halves, in which rope is computed here.

    Queries and keys are reordered alike, when their weights are read, so that scores are what they were.
    """
    return torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Source: meta-llama/llama-models, `apply_scaling` of models/llama3/model.py."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, slowed)


def _yarn(frequencies: Tensor, rope: RopeConfig, scaling: YarnScaling) -> Tensor:
    """Source: arXiv 2309.00071, section 3.2 and appendix A.1."""

    def dimension(rotations: float) -> float:
        """Return the pair that turns `rotations` times over the original context."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    interpolated = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * interpolated + frequencies * (1 - interpolated)
