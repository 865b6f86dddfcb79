"""A layer's INT8 experts on a card, from the router's choices to the sum over each token's slots.

Legend: T tokens, D hidden_size, F intermediate size, E experts, A experts per token, S slots = T * A.
"""

import torch
from torch import Tensor

from kernels.grouped_gemm import combine, expert_linear
from kernels.quantize import swiglu_quantize
from kernels.routing import align_tokens
from kernels.tiles import compute_capability, grouped_tile


def int8_experts(
    x_int8: Tensor,
    x_scale: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
    shared: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the weighted sum of each token's experts, + shared, as [T, D]; nothing waits for the device.

    Both products share one layout of slots, so they take one tile. A dropped slot is computed by nobody: what its rows
    hold goes through the gate as it is, and `combine` does not read it.

    Args:
        x_int8: [T, D] int8, row-quantized activations.
        x_scale: [T] float32.
        expert_ids: [T, A] int32, by `routing.route`.
        expert_weights: [T, A] float32, likewise.
        counts: [T] int32, likewise.
        gate_up: [E, 2 F, D] int8.
        gate_up_scale: [E, 2 F] float32.
        down: [E, D, F] int8.
        down_scale: [E, D] float32.
        gate_up_bias: [E, 2 F] float32.
        down_bias: [E, D] float32.
        alpha: with `limit`, gpt-oss's clamped gate (`quantize.swiglu_quantize`).
        limit: likewise.
        shared: [T, D], the shared expert's output.
        out_dtype: of what lies between the kernels, and of the result.

    Raises: ShapeError if the tensors do not fit each other.
    """
    tile = grouped_tile(compute_capability(x_int8.device), expert_ids.numel(), len(gate_up))
    blocks = align_tokens(expert_ids, len(gate_up), tile.block_m)
    hidden = expert_linear(
        x_int8, x_scale, gate_up, gate_up_scale, *blocks,
        slots_per_row=expert_ids.shape[1], out_dtype=out_dtype, tile=tile, bias=gate_up_bias,
    )  # fmt: skip
    h_int8, h_scale = swiglu_quantize(hidden, alpha, limit)
    y = expert_linear(
        h_int8, h_scale, down, down_scale, *blocks, slots_per_row=1, out_dtype=out_dtype, tile=tile, bias=down_bias
    )
    return combine(y, expert_weights, counts, shared)
