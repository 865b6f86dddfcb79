"""Linear layers: the same call, whatever the weights are stored as."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from k2model.formats.compressed_tensors import unpack_int4
from k2model.formats.weights import Weights
from kernels import cpu, ops, rowwise


class Quantized(NamedTuple):
    """Activations as INT8 layers take them."""

    values: Tensor
    """[T, K] int8."""
    scale: Tensor
    """[T] float32."""


class Linear(Protocol):
    """y = x @ weight.T + bias."""

    def __call__(self, x: Any) -> Tensor:
        """Return float32 [T, N] of `x` [T, K] float32; INT8 layers also take it Quantized."""
        ...


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """Weights as floats, inputs rounded to their dtype."""

    weight: Tensor
    """[N, K]."""
    bias: Tensor | None = None
    """[N] float32."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 [T, N]."""
        return _biased(ops.float_linear(x, self.weight), self.bias)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """W8A8: one scale per output channel, one per token, exact int32 sums."""

    weight: Tensor
    """[N, K] int8."""
    weight_scale: Tensor
    """[N] float32."""
    bias: Tensor | None = None
    """[N] float32."""

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        """Return float32 [T, N] of `x` [T, K], quantized already or to be."""
        x_int8, x_scale = x if isinstance(x, Quantized) else ops.quantize_rows(x)
        return ops.int8_linear(x_int8, x_scale, self.weight, self.weight_scale, self.bias)


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """W4A16: one scale per group of columns, activations in bfloat16."""

    packed: Tensor
    """[N, K / 2] uint8, as `cpu.int4_pack` orders it."""
    scales: Tensor
    """[K / group, N, 2] bfloat16."""
    bias: Tensor | None = None
    """[N] float32."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 [T, N]."""
        group_size = self.packed.shape[1] * 2 // self.scales.shape[0]
        return _biased(cpu.int4_linear(x, self.packed, self.scales, group_size), self.bias)


@dataclass(frozen=True, slots=True)
class LinearReader:
    """Makes linears of a checkpoint's weights."""

    weights: Weights
    dtype: torch.dtype
    """Of linears that are computed as floats."""
    expand: bool
    """Whether quantized linears are computed as floats too."""

    def read(
        self, names: list[tuple[str, int]], k: int, *, bias: bool | list[bool] = False, rows: Tensor | None = None
    ) -> Linear:
        """Return one layer that computes all of `names`, outputs side by side, so that their input is quantized once.

        Args:
            names: each linear and its N.
            k: in features.
            bias: whether each has a `.bias`.
            rows: [sum of N] int64, the order of the outputs, if not as stored.

        Raises: CheckpointError naming a tensor that is missing or has another shape.
        """
        values = self._bias(names, bias if isinstance(bias, list) else [bias] * len(names), rows)
        kinds = set() if self.expand else {self.weights.storage(name) for name, _ in names}
        if kinds == {"int8"}:
            stored = [self.weights.int8_weight(name, n, k) for name, n in names]
            weight, scale = (_in_order([pair[i] for pair in stored], rows) for i in (0, 1))
            return Int8Linear(weight, scale, values)
        group_size = self.weights.scheme.int4_group_size
        total = sum(n for _, n in names)
        if kinds == {"int4"} and total % 16 == 0 and group_size in cpu.INT4_GROUP_SIZES:
            stored = [self.weights.int4_weight(name, n, k) for name, n in names]
            packed, scale = (_in_order([pair[i] for pair in stored], rows) for i in (0, 1))
            return Int4Linear(*cpu.int4_pack(unpack_int4(packed), scale), values)
        floats = [self.weights.float_weight(name, n, k).to(self.dtype) for name, n in names]
        return FloatLinear(_in_order(floats, rows), values)

    def _bias(self, names: list[tuple[str, int]], has_bias: list[bool], rows: Tensor | None) -> Tensor | None:
        if not any(has_bias):
            return None
        parts = [
            self.weights.vector(f"{name}.bias", n) if has else torch.zeros(n)
            for (name, n), has in zip(names, has_bias, strict=True)
        ]
        return _in_order(parts, rows)


def projected(linear: Linear, x: Tensor, read: Tensor | None) -> Tensor:
    """Return `linear` of `x` [T, K], or of its rows `read` [N] alone; where these are none, no row of any width."""
    if read is None:
        return linear(x)
    x = x[read]
    return linear(x) if len(x) else x


def normed(consumer: object, x: Tensor, weight: Tensor, eps: float) -> Tensor | Quantized:
    """Return RMSNorm of `x` [T, D] as `consumer` takes it: quantized in the same pass, if that is an INT8 layer."""
    if isinstance(consumer, Int8Linear):
        values, scale, _ = ops.rms_norm_quantize(x, None, weight, eps)
        return Quantized(values, scale)
    return ops.rms_norm(x, weight, eps)


def normed_sum(
    consumer: object, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor | Quantized, Tensor]:
    """Return `normed` of x + residual, and the sum."""
    if isinstance(consumer, Int8Linear):
        values, scale, total = ops.rms_norm_quantize(x, residual, weight, eps)
        return Quantized(values, scale), total
    total = x + residual
    return ops.rms_norm(total, weight, eps), total


def gated(
    gate_up: Linear, consumer: object, x: Tensor | Quantized, alpha: float, limit: float | None
) -> Tensor | Quantized:
    """Return the gated unit of gate_up(x) as `consumer` takes it; with a limit, the clamped one."""
    clamp = None if limit is None else alpha
    if not isinstance(consumer, Int8Linear):
        return rowwise.swiglu(gate_up(x), clamp, limit)
    if isinstance(gate_up, Int8Linear):
        x_int8, x_scale = x if isinstance(x, Quantized) else ops.quantize_rows(x)
        gated = ops.int8_swiglu(x_int8, x_scale, gate_up.weight, gate_up.weight_scale, gate_up.bias, clamp, limit)
        return Quantized(*gated)
    return Quantized(*ops.swiglu_quantize(gate_up(x), clamp, limit))


def _in_order(tensors: list[Tensor], rows: Tensor | None) -> Tensor:
    joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return joined if rows is None else joined[rows]


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)
