"""Linear layers: the same call, whatever the weights are stored as."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import cpu


class Linear(Protocol):
    """y = x @ weight.T."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 [T, N] of `x` [T, K] float32."""
        ...


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """Weights as floats, products in their dtype. Float32 is the reference path, bfloat16 the yardstick of INT8."""

    weight: Tensor
    """[N, K]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 [T, N]."""
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).float()


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """W8A8: one scale per output channel, one per token, exact int32 sums."""

    weight: Tensor
    """[N, K] int8."""
    weight_scale: Tensor
    """[N] float32."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 [T, N]."""
        x_int8, x_scale = cpu.quantize_rows(x)
        return cpu.int8_linear(x_int8, x_scale, self.weight, self.weight_scale)


def stack(linears: list[Linear]) -> Linear:
    """Return one layer that computes all of `linears`, outputs side by side, so that their input is quantized once."""
    if all(isinstance(linear, Int8Linear) for linear in linears):
        int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
        return Int8Linear(torch.cat([i.weight for i in int8]), torch.cat([i.weight_scale for i in int8]))
    floats = [linear for linear in linears if isinstance(linear, FloatLinear)]
    if len(floats) != len(linears):
        raise TypeError("stack: linears of one kind, got both int8 and float")
    return FloatLinear(torch.cat([linear.weight for linear in floats]))
