"""Quantization sections: the numbers of what is read, and the names of what is not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.compressed_tensors import quantization_config
from k2model.formats.quantization import check_declared, read_scheme
from k2model.formats.weights import Scheme, TensorInfo
from schemas.errors import CheckpointError
from tests.checkpoints import CONFIG, write_checkpoint

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": ACTIVATIONS,
        }
    },
}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
            "input_activations": None,
        }
    },
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 96]}


def changed(section: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    made = copy.deepcopy(section)
    *steps, last = path.split(".")
    inner = made
    for step in steps:
        inner = inner[step]
    inner[last] = value
    return made


def test_the_numbers_are_those_of_the_config() -> None:
    assert read_scheme({}, "here") == Scheme()
    assert read_scheme({"quantization_config": W8A8}, "here") == Scheme()
    assert read_scheme({"quantization_config": INT4}, "here") == Scheme(int4_group_size=64)
    assert read_scheme({"quantization_config": FP8}, "here") == Scheme(fp8_block=(128, 96))
    assert read_scheme({"quantization_config": {"quant_method": "mxfp4"}}, "here") == Scheme()


def test_what_we_write_is_read() -> None:
    for int8_embedding in (False, True):
        for int4_targets, all_int4, expected in (
            ([], False, Scheme()),
            (["re:.*experts.*"], False, Scheme(int4_group_size=16)),
            (["Linear"], True, Scheme(int4_group_size=16)),
        ):
            section = quantization_config(int4_targets, 16, all_int4=all_int4, int8_embedding=int8_embedding)
            assert read_scheme({"quantization_config": section}, "here") == expected


@pytest.mark.parametrize(
    "raw",
    [
        {"compression_config": INT4},
        {"compression_config": {key: value for key, value in INT4.items() if key != "quant_method"}},
        {"text_config": {"quantization_config": INT4}},
        {"text_config": {"compression_config": INT4}, "quantization_config": None},
        {"quantization_config": changed(INT4, "quantization_status", "frozen")},
        {"quantization_config": changed(INT4, "config_groups.group_0.weights.strategy", None)},
        {"quantization_config": changed(INT4, "config_groups.group_0.weights.actorder", "static")},
        {"quantization_config": changed(INT4, "config_groups.group_0.input_activations", ACTIVATIONS)},
        {"quantization_config": changed(INT4, "format", "mixed-precision")},
        {"quantization_config": changed(INT4, "sparsity_config", {"format": "dense"})},
    ],
)
def test_older_and_nested_spellings_are_the_same(raw: dict[str, Any]) -> None:
    assert read_scheme(raw, "here") == Scheme(int4_group_size=64)


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        *(({"quant_method": method}, f'quantization "{method}" is not read')
          for method in ("gptq", "awq", "bitsandbytes", "modelopt", "hqq", "fbgemm_fp8", "quark", None)),
        (changed(W8A8, "format", "float-quantized"), 'format "float-quantized"'),
        (changed(W8A8, "format", "nvfp4-pack-quantized"), 'format "nvfp4-pack-quantized"'),
        (changed(W8A8, "format", "sparse"), 'format "sparse"'),
        (changed(W8A8, f"{GROUP}.weights.symmetric", False), "weights has symmetric = False"),
        (changed(W8A8, f"{GROUP}.input_activations.symmetric", False), "input_activations has symmetric = False"),
        (changed(W8A8, f"{GROUP}.input_activations.dynamic", False), "input_activations has dynamic = False"),
        (changed(W8A8, f"{GROUP}.input_activations.strategy", "tensor"), "input_activations has strategy = 'tensor'"),
        (changed(W8A8, f"{GROUP}.input_activations.num_bits", 4), "input_activations has num_bits = 4"),
        (changed(W8A8, f"{GROUP}.input_activations", None), "8-bit weights are read with 8-bit activations only"),
        (changed(W8A8, f"{GROUP}.output_activations", ACTIVATIONS), "quantizes output activations"),
        (changed(W8A8, f"{GROUP}.weights.strategy", "tensor"), '8 bits by "tensor"'),
        (changed(W8A8, f"{GROUP}.weights.type", "float"), "type = 'float'"),
        (changed(W8A8, f"{GROUP}.weights.dynamic", True), "weights has dynamic = True"),
        (changed(W8A8, f"{GROUP}.weights", None), "quantizes no weights"),
        (changed(INT4, f"{GROUP}.weights.num_bits", 3), '3 bits by "group"'),
        (changed(INT4, f"{GROUP}.weights.strategy", "channel"), '4 bits by "channel"'),
        (changed(INT4, f"{GROUP}.weights.group_size", 0), "group_size = 0"),
        (changed(INT4, f"{GROUP}.weights.actorder", "group"), "actorder = 'group'"),
        (changed(INT4, f"{GROUP}.input_activations", {**ACTIVATIONS, "dynamic": False}), "dynamic = False"),
        (changed(INT4, "format", "int-quantized"), 'group_0 is int4, which format "int-quantized" does not hold'),
        (changed(INT4, "config_groups", {}), "has no config_groups"),
        (changed(INT4, "kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
        (changed(INT4, "transform_config", {"config_groups": {}}), "transform_config"),
        (changed(INT4, "sparsity_config", {"format": "sparse-24-bitmask"}), "sparse files are not read"),
        (
            changed(INT4, "config_groups.group_1",
                    changed(INT4, f"{GROUP}.weights.group_size", 32)["config_groups"]["group_0"]),
            r"INT4 groups of several sizes: \[32, 64\]",
        ),
        (changed(FP8, "activation_scheme", "static"), "activation_scheme = 'static'"),
        (changed(FP8, "fmt", "e5m2"), "fmt = 'e5m2'"),
        (changed(FP8, "weight_block_size", None), "weight_block_size = None"),
        (changed(FP8, "weight_block_size", [128]), r"weight_block_size = \[128\]"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_scheme({"quantization_config": section}, "here")


@pytest.mark.parametrize(
    ("section", "name", "dtype", "message"),
    [
        (W8A8, "x.input_scale", "F32", "means static activation scales"),
        (W8A8, "x.weight_zero_point", "I8", "means asymmetric weights"),
        (INT4, "x.weight_g_idx", "I32", "means columns grouped out of order"),
        ({}, "x.qweight", "I32", "means GPTQ or AWQ weights"),
        ({}, "x.k_scale", "F32", "means a quantized KV cache"),
        ({}, "x.weight_packed", "I32", "is int4, and config.json declares no such quantization"),
        (W8A8, "x.weight_packed", "I32", "is int4, and config.json declares no such quantization"),
        ({}, "x.weight", "F8_E4M3", "is fp8, and config.json declares no such quantization"),
        (INT4, "x.weight", "I8", "is int8, and config.json declares no such quantization"),
    ],
)
def test_tensors_no_declaration_speaks_of_are_refused(
    section: dict[str, Any], name: str, dtype: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_declared({name: TensorInfo(dtype, (8, 8))}, {"quantization_config": section}, "here")


def test_int8_without_a_declaration_is_w8a8() -> None:
    check_declared({"x.weight": TensorInfo("I8", (8, 8))}, {}, "here")


def test_a_declaration_over_float_tensors_changes_nothing() -> None:
    check_declared({"x.weight": TensorInfo("BF16", (8, 8))}, {"quantization_config": FP8}, "here")


def test_a_folder_with_another_quantization_is_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match='"awq" is not read') as refused:
        open_checkpoint(str(folder)).weights()
    assert "W8A8" in refused.value.remedy
