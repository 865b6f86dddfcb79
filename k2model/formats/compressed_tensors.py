"""The compressed-tensors layouts, which vLLM and llm-compressor share: W8A8 and INT4 by group, read and written here.

A quantized linear is `.weight` int8 [N, K] with `.weight_scale` [N, 1]; activations are quantized per token at run
time, symmetric. Source: vllm-project/compressed-tensors, `compressors/quantized_compressors/int_quantized.py`.
"""

from typing import Any

import torch
from torch import Tensor

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantization_config(
    int4_targets: list[str], int4_group_size: int, *, all_int4: bool, int8_embedding: bool = False
) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose decoder linears are W8A8, or INT4 by group.

    Args:
        int4_targets: module names, or patterns behind `re:`, of the linears stored as INT4.
        int4_group_size: columns that share a scale there.
        all_int4: whether no linear is W8A8.
        int8_embedding: whether the input embedding's rows are INT8, too.
    """
    group = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    int8 = {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": _ACTIVATIONS, "format": "int-quantized"}
    int4 = {
        "targets": int4_targets,
        "weights": {**group, "group_size": int4_group_size},
        "input_activations": None,
        "format": "pack-quantized",
    }
    rows = {"targets": ["Embedding"], "weights": _WEIGHTS, "input_activations": None, "format": "int-quantized"}
    possible = ((int8, not all_int4), (int4, bool(int4_targets)), (rows, int8_embedding))
    groups = [scheme for scheme, there in possible if there]
    formats = {str(scheme["format"]) for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*\\.gate$"],
        "config_groups": {f"group_{i}": {**scheme, "output_activations": None} for i, scheme in enumerate(groups)},
    }


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the weights [N, K] int8 in [-8, 7] of `packed` [N, K / 8] int32: low nibble first, stored as q + 8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & 15).flatten(-2).to(torch.int8) - 8


def pack_int4(weight: Tensor) -> Tensor:
    """Return `weight` [N, K] int8 in [-8, 7] as [N, K / 8] int32, the inverse of `unpack_int4`."""
    nibbles = (weight.to(torch.int64) + 8).unflatten(-1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
