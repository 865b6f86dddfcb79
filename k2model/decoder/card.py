"""A decoder's parts on a card: tensors moved there, a layer's INT8 experts stacked, what no kernel computes refused.

Legend: E experts, D hidden_size, F intermediate size.
"""

import importlib.util
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.decoder.feed_forward import FeedForward, MixtureOfExperts
from k2model.decoder.linear import Int4Linear, Int8Linear, Quantized
from kernels import ops
from schemas.errors import CheckpointError, EnvironmentMismatch

T = TypeVar("T")

_MAX_EXPERTS = 512
_MAX_HEAD_SIZE = 256
_ON_CPU = 'compute it with [deploy] mode = "cpu"'


@dataclass(frozen=True, slots=True)
class StackedExperts(MixtureOfExperts):
    """A layer's INT8 experts in two tensors, which one kernel each reads for all tokens; `experts` is empty."""

    gate_up: Int8Linear
    """[E, 2 F, D]."""
    down: Int8Linear
    """[E, D, F]."""
    swiglu_alpha: float | None
    swiglu_limit: float | None

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """Return [T, D] float32 for `x` [T, D] float32; nothing waits for the device."""
        from kernels.experts import int8_experts

        assert isinstance(x, Tensor)
        expert_ids, expert_weights, counts = self.router.route(self.router.logits(x))
        quantized = Quantized(*ops.quantize_rows(x))
        shared = None
        if self.shared is not None:
            shared = self.shared.forward(quantized if isinstance(self.shared.first, Int8Linear) else x)
        return int8_experts(
            *quantized, expert_ids, expert_weights, counts,
            self.gate_up.weight, self.gate_up.weight_scale, self.down.weight, self.down.weight_scale,
            gate_up_bias=self.gate_up.bias, down_bias=self.down.bias, alpha=self.swiglu_alpha, limit=self.swiglu_limit,
            shared=shared, out_dtype=torch.float32,
        )  # fmt: skip


def find_card(device: str) -> torch.device | None:
    """Return the card that `device` names, such as `cuda`; None for `cpu`. Raises: EnvironmentMismatch."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        remedy = "install torch's CUDA build and the card's driver, or " + _ON_CPU
        raise EnvironmentMismatch(f"device {device}: torch {torch.__version__} finds no NVIDIA card", remedy=remedy)
    if importlib.util.find_spec("triton") is None:
        raise EnvironmentMismatch(f"device {device}: triton is not installed", remedy='pip install "k2batch[gpu]"')
    return torch.device(device)


def on_card(part: T, device: torch.device) -> T:
    """Return `part` of a decoder, a tensor or what holds some, on `device`. Raises: CheckpointError for INT4."""
    if isinstance(part, Tensor):
        return cast(T, part.to(device))
    if isinstance(part, Int4Linear):
        raise CheckpointError(
            "the checkpoint has INT4 weights, which are not computed on a card",
            remedy=f"k2batch models convert CHECKPOINT FOLDER --int4 int8 makes them INT8; or {_ON_CPU}",
        )
    if isinstance(part, MixtureOfExperts) and (stacked := _stacked(part, device)):
        return cast(T, stacked)
    if isinstance(part, list):
        return cast(T, [on_card(one, device) for one in part])
    if is_dataclass(part) and not isinstance(part, type):
        moved = {one.name: on_card(getattr(part, one.name), device) for one in fields(part)}
        return replace(part, **moved)
    return part


def _stacked(moe: MixtureOfExperts, device: torch.device) -> StackedExperts | None:
    """Return `moe` with its experts stacked on `device`, if they are INT8."""
    experts = [expert for expert in moe.experts if isinstance(expert.gate_up_proj, Int8Linear)]
    if len(experts) < len(moe.experts):
        return None
    gate_up, down = ([getattr(expert, f"{name}_proj") for expert in experts] for name in ("gate_up", "down"))
    first: FeedForward = experts[0]
    return StackedExperts(
        router=on_card(moe.router, device),
        experts=(),
        shared=on_card(moe.shared, device),
        gate_up=_stack(gate_up, device),
        down=_stack(down, device),
        swiglu_alpha=None if first.swiglu_limit is None else first.swiglu_alpha,
        swiglu_limit=first.swiglu_limit,
    )


def _stack(linears: list[Int8Linear], device: torch.device) -> Int8Linear:
    """Return the linears of all experts as one, each tensor with a first axis more."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return Int8Linear(
        weight=torch.stack([linear.weight for linear in linears]).to(device),
        weight_scale=torch.stack([linear.weight_scale for linear in linears]).to(device),
        bias=torch.stack(biases).to(device) if biases else None,
    )


def check_sizes(config: ModelConfig) -> None:
    """Raise CheckpointError, naming the size, if the model has one that the kernels for cards do not take."""
    attention, moe = config.attention, config.moe
    sixteens = {"hidden_size": config.hidden_size}
    if isinstance(attention, LatentAttentionConfig):
        head_size = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        sixteens["q_lora_rank"] = attention.q_lora_rank or 0
        rank = attention.kv_lora_rank
        _require(16 <= rank and not rank & (rank - 1), f"kv_lora_rank {rank} is no power of two from 16 on")
        windows = [window for window in config.sliding_windows if window is not None]
        _require(not windows, f"latent attention has a sliding window, {windows[:1]}")
    else:
        head_size = attention.head_dim
        if attention.qk_norm:
            sixteens["head_dim"] = head_size
    _require(16 <= head_size <= _MAX_HEAD_SIZE, f"the head size {head_size} is not within 16 and {_MAX_HEAD_SIZE}")
    for name, size in sixteens.items():
        _require(size % 16 == 0, f"{name} {size} is no multiple of 16")
    if moe is not None:
        count = moe.n_routed_experts
        _require(count <= _MAX_EXPERTS, f"{count} experts are more than {_MAX_EXPERTS}")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"{problem}: the kernels for cards do not take that", remedy=_ON_CPU)
