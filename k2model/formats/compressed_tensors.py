"""The compressed-tensors W8A8 layout (`int-quantized`), which vLLM and llm-compressor share: read and written here.

A quantized linear is `.weight` int8 [N, K] with `.weight_scale` [N, 1]; activations are quantized per token at run
time, symmetric. Source: vllm-project/compressed-tensors, `compressors/quantized_compressors/int_quantized.py`.
"""

from collections.abc import Mapping
from typing import Any

from schemas.errors import CheckpointError

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantization_config() -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose decoder linears are all W8A8."""
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _WEIGHTS,
                "input_activations": _ACTIVATIONS,
                "output_activations": None,
            }
        },
    }


def is_w8a8(config: Mapping[str, Any], where: str) -> bool:
    """Return whether config.json declares W8A8 as above; False when it declares no quantization at all.

    Raises: CheckpointError for any other scheme, rather than guess at its numbers.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if not declared:
        return False
    method, layout = declared.get("quant_method"), declared.get("format")
    groups = declared.get("config_groups") or {}
    if method != "compressed-tensors" or layout != "int-quantized" or not groups:
        raise CheckpointError(
            f'{where}: quantization "{method}" with format "{layout}" is not read by this version',
            remedy="use a float checkpoint, or a compressed-tensors W8A8 (int-quantized) one",
        )
    for name, group in groups.items():
        for part, expected in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
            scheme = group.get(part) or {}
            wrong = {key: scheme.get(key) for key, value in expected.items() if scheme.get(key) != value}
            if wrong:
                raise CheckpointError(f"{where}: quantization_config {name}.{part} has {wrong}, expected {expected}")
    return True
