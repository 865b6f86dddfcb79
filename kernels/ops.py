"""The kernels by name, whatever device the tensors are on: torch's dispatcher picks the CPU's or the card's.

Each operator has three implementations: kernels/cpu.py, a Triton kernel, and a fake one that knows shapes alone, so
that torch.compile can trace through it. Triton is imported when the first tensor on a card arrives.

Legend: T tokens, D hidden_size, K/N in/out features, F intermediate size, E experts, A experts per token, V vocabulary,
C tokens asked for.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, library

from kernels import cpu, cpu_routing, rowwise

_OPERATORS = library.Library("k2batch", "DEF")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [T, K] as int8 in [-127, 127] and its row scales [T] float32. Twin: kernels/reference.py."""
    x_int8, x_scale = torch.ops.k2batch.quantize_rows(x)
    return x_int8, x_scale


def rms_norm_quantize(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMSNorm(x + residual) as int8 [T, D], its row scales [T] float32, and x + residual, in one pass over rows.

    Args:
        x: [T, D].
        residual: [T, D], or None for nothing to add; the sum is then `x` itself.
        weight: [D].
        eps: added to the mean square.
    """
    x_int8, x_scale, total = torch.ops.k2batch.rms_norm_quantize(x, residual, weight, eps)
    return x_int8, x_scale, x if residual is None else total


def swiglu_quantize(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return silu(gate) * up of gate_up [T, 2 F] as int8 [T, F] and its row scales [T] float32.

    With `alpha` and `limit`, gpt-oss's clamped form (`clamped_swiglu` of kernels/reference.py).
    """
    x_int8, x_scale = torch.ops.k2batch.swiglu_quantize(gate_up, alpha, limit)
    return x_int8, x_scale


def int8_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x @ weight.T + bias as [T, N], accumulated exactly in int32.

    Args:
        x_int8: [T, K] int8, row-quantized activations.
        x_scale: [T] float32; x ≈ x_int8 * x_scale[:, None].
        weight: [N, K] int8.
        weight_scale: [N] float32.
        bias: [N] float32.
        out_dtype: of the result.

    Raises: ShapeError if K differs or could overflow int32.
    Source: LLM.int8(), arXiv 2208.07339, vector-wise scaling.
    """
    y: Tensor = torch.ops.k2batch.int8_linear(x_int8, x_scale, weight, weight_scale, bias, out_dtype)
    return y


def int8_swiglu(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    alpha: float | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return swiglu_quantize(int8_linear(...)) as int8 [T, N / 2] and its row scales [T] float32.

    For arguments of both. On the CPU products are scaled in the pass that gates them.
    """
    h_int8, h_scale = torch.ops.k2batch.int8_swiglu(x_int8, x_scale, weight, weight_scale, bias, alpha, limit)
    return h_int8, h_scale


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return log softmax(hidden @ head.T) at `token_ids`, as [T, C] float32, without [T, V] logits in memory.

    Args:
        hidden: [T, D] after the final norm.
        head: [V, D] the output embedding.
        token_ids: [T, C] int64.
    """
    y: Tensor = torch.ops.k2batch.token_logprobs(hidden, head, token_ids)
    return y


def route(
    logits: Tensor,
    correction_bias: Tensor | None,
    num_experts_per_tok: int,
    *,
    scoring: str,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool,
    routed_scaling_factor: float = 1.0,
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the experts of each token [T, A] int32, their weights [T, A] float32, and how many are kept [T] int32.

    Kept slots come first, experts ascending; dropped ones have expert E and weight 0. Of the A highest choices (of
    equals, the lower id) a slot is dropped if slots of higher weight hold `threshold` of the token's weight together,
    after arXiv 2403.07652, section 3.1; never the highest. The weights of the others stay as they are.

    Args:
        logits: [T, E] float32.
        correction_bias: [E], added to scores for choosing alone (arXiv 2408.15664).
        num_experts_per_tok: A.
        scoring: "sigmoid" or "softmax" over all experts (DeepSeek-V3, Qwen3-MoE); "softmax_topk" chooses by logits and
            takes the softmax of the chosen (gpt-oss).
        n_group: groups of neighbouring experts.
        topk_group: groups to choose from, by the sum of their two best scores (arXiv 2412.19437, section 2.1.2).
        norm_topk_prob: divide weights by their sum + 1e-20. The softmax of the chosen sums to 1 either way.
        routed_scaling_factor: multiplies the weights last.
        threshold: in (0, 1]; 1 drops nothing.

    Raises: ShapeError, on a card, where a row or its groups do not fit the kernel.
    """
    ids, weights, counts = torch.ops.k2batch.route(
        logits, correction_bias, num_experts_per_tok, scoring, n_group, topk_group, norm_topk_prob,
        routed_scaling_factor, threshold,
    )  # fmt: skip
    return ids, weights, counts


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis of `x` [*, D], float32. Source: arXiv 1910.07467."""
    y: Tensor = torch.ops.k2batch.rms_norm(x, weight, eps)
    return y


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as float32 [T, N], from values rounded to the dtype of `weight` and summed in float32.

    Args:
        x: [T, K] float32.
        weight: [N, K] float32, bfloat16 or float16.
    """
    y: Tensor = torch.ops.k2batch.float_linear(x, weight)
    return y


def row_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight of float32 [T, K] and [K, N], or [Z, T, K] and [Z, K, N]; a row's bits are its own."""
    y: Tensor = torch.ops.k2batch.row_matmul(x, weight)
    return y


def token_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return the logits [T, U] of `token_ids` [U] alone, for hidden [T, D] and the output embedding [V, D]."""
    y: Tensor = torch.ops.k2batch.token_logits(hidden, head, token_ids)
    return y


def argmax_token(hidden: Tensor, head: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the token with the highest logit per row [T] int64; the lowest id wins a tie of up to 16.

    Args:
        hidden: [T, D] float32, after the final norm.
        head: [V, D] the output embedding.
        allowed: [T, V] bool, at least one of each row; None for all.
    """
    y: Tensor = torch.ops.k2batch.argmax_token(hidden, head, allowed)
    return y


def _on_card(module: str, name: str) -> Callable[..., Any]:
    """Return the Triton function `name` of kernels/`module`, imported when it is called."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"kernels.{module}"), name)(*args)

    return call


def _rms_norm_quantize_on_card(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    rows = x.contiguous()  # columns of one product with others, where attention is latent
    x_int8, x_scale, total = import_module("kernels.quantize").rms_norm_quantize(rows, residual, weight, eps)
    # An operator may not return what it was given.
    return [x_int8, x_scale, x.new_empty(0) if residual is None else total]


def _fake_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_rows(x), x.new_empty(0) if residual is None else torch.empty_like(x)


def _fake_swiglu(gate_up: Tensor, alpha: float | None, limit: float | None) -> tuple[Tensor, Tensor]:
    return _fake_rows(gate_up[:, : gate_up.shape[1] // 2])


def _fake_linear(
    x_int8: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x_scale.new_empty(x_int8.shape[0], weight.shape[0], dtype=out_dtype)


def _fake_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    return hidden.new_empty(token_ids.shape, dtype=torch.float32)


def _fake_route(
    logits: Tensor, correction_bias: Tensor | None, num_experts_per_tok: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], num_experts_per_tok)
    return (
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape[0], dtype=torch.int32),
    )


def _int8_swiglu_on_card(*arguments: Any) -> tuple[Tensor, Tensor]:
    *product, alpha, limit = arguments
    return swiglu_quantize(int8_linear(*product), alpha, limit)


def _fake_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-1], dtype=torch.float32)


def _define(schema: str, on_cpu: Callable[..., Any], on_card: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _OPERATORS.define(schema)
    _OPERATORS.impl(name, on_cpu, "CPU")
    _OPERATORS.impl(name, on_card, "CUDA")
    library.register_fake(f"k2batch::{name}", fake, lib=_OPERATORS)


_define(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)",
    rowwise.quantize_rows,
    _on_card("quantize", "quantize_rows"),
    _fake_rows,
)
_define(
    "rms_norm_quantize(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    rowwise.rms_norm_quantize,
    _rms_norm_quantize_on_card,
    _fake_rms_norm,
)
_define(
    "swiglu_quantize(Tensor gate_up, float? alpha, float? limit) -> (Tensor, Tensor)",
    rowwise.swiglu_quantize,
    _on_card("quantize", "swiglu_quantize"),
    _fake_swiglu,
)
_define(
    "int8_linear(Tensor x_int8, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor",
    cpu.int8_linear,
    _on_card("int8_gemm", "int8_linear"),
    _fake_linear,
)
_define(
    "int8_swiglu(Tensor x_int8, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, float? alpha,"
    " float? limit) -> (Tensor, Tensor)",
    cpu.int8_swiglu,
    _int8_swiglu_on_card,
    lambda x_int8, x_scale, weight, *_: (x_int8.new_empty(len(x_int8), len(weight) // 2), torch.empty_like(x_scale)),
)
_define(
    "token_logprobs(Tensor hidden, Tensor head, Tensor token_ids) -> Tensor",
    cpu.token_logprobs,
    _on_card("label_score", "token_logprobs"),
    _fake_logprobs,
)
_define(
    "route(Tensor logits, Tensor? correction_bias, int num_experts_per_tok, str scoring, int n_group, int topk_group,"
    " bool norm_topk_prob, float routed_scaling_factor, float threshold) -> (Tensor, Tensor, Tensor)",
    cpu_routing.route,
    _on_card("routing", "route"),
    _fake_route,
)
_define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rowwise.rms_norm,
    _on_card("norm", "rms_norm"),
    lambda x, weight, eps: torch.empty_like(x),
)
_define(
    "float_linear(Tensor x, Tensor weight) -> Tensor",
    cpu.float_linear,
    _on_card("float_gemm", "float_linear"),
    lambda x, weight: _fake_product(x, weight.t()),
)
_define(
    "row_matmul(Tensor x, Tensor weight) -> Tensor",
    cpu.row_matmul,
    _on_card("float_gemm", "row_matmul"),
    _fake_product,
)
_define(
    "token_logits(Tensor hidden, Tensor head, Tensor token_ids) -> Tensor",
    cpu.token_logits,
    _on_card("float_gemm", "token_logits"),
    lambda hidden, head, token_ids: hidden.new_empty(len(hidden), len(token_ids)),
)
_define(
    "argmax_token(Tensor hidden, Tensor head, Tensor? allowed) -> Tensor",
    cpu.argmax_token,
    _on_card("float_gemm", "argmax_token"),
    lambda hidden, head, allowed: hidden.new_empty(len(hidden), dtype=torch.int64),
)
