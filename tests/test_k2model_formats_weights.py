"""Weights: stored as they are, expanded exactly, and compared with the model before any is read."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from k2model.formats.compressed_tensors import pack_int4
from k2model.formats.weights import Scheme, in_memory
from k2model.parameters import Parameter
from schemas.errors import CheckpointError

UNITS = Path(__file__).parents[2] / "shared" / "fixtures" / "quant_units" / "units.safetensors"

N, K = 40, 64
LINEAR = Parameter("model.layers.0.mlp.up_proj.weight", (N, K), "dense")
NAME = "model.layers.0.mlp.up_proj"
VECTOR = Parameter("model.norm.weight", (K,), "vector")
NORM = {"model.norm.weight": torch.ones(K)}
INT8 = {f"{NAME}.weight": torch.ones(N, K, dtype=torch.int8), f"{NAME}.weight_scale": torch.ones(N, 1)}
INT4 = {
    f"{NAME}.weight_packed": torch.zeros(N, K // 8, dtype=torch.int32),
    f"{NAME}.weight_scale": torch.ones(N, K // 32),
    f"{NAME}.weight_shape": torch.tensor([N, K]),
}
FP8 = {
    f"{NAME}.weight": torch.ones(N, K).to(torch.float8_e4m3fn),
    f"{NAME}.weight_scale_inv": torch.ones(3, 2),
}
SCHEME = Scheme(fp8_block=(16, 48), int4_group_size=32)


@pytest.mark.skipif(not UNITS.exists(), reason="the reference units are not here")
def test_int8_and_int4_expand_to_the_references_numbers() -> None:
    units = load_file(UNITS)
    int8 = in_memory({"linear.weight": units["w8_q"], "linear.weight_scale": units["w8_scale"]}, "units")
    int4 = in_memory({f"linear.weight_{key}": units[f"w4_{key}"] for key in ("packed", "scale", "shape")}, "units")
    assert int8.storage("linear") == "int8"
    assert int4.storage("linear") == "int4"
    assert int8.float_weight("linear", 40, 96).equal(units["w8_q"].float() * units["w8_scale"].float())
    assert int4.float_weight("linear", 40, 96).equal(units["w4_dequant"])


def test_every_value_of_int4_survives_packing() -> None:
    weight = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(N, K // 32)
    stored = in_memory({f"{NAME}.weight_packed": pack_int4(weight), f"{NAME}.weight_scale": scale}, "here")
    assert stored.float_weight(NAME, N, K).equal(weight.float() * scale.repeat_interleave(32, dim=1))


def test_fp8_blocks_are_cut_off_at_the_edges() -> None:
    weight = (torch.arange(N * K).view(N, K) % 17 - 8).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    stored = in_memory({f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale}, "here", SCHEME)
    found = stored.float_weight(NAME, N, K)
    for row, column in ((0, 0), (15, 47), (16, 48), (39, 63), (31, 47)):
        assert found[row, column] == weight[row, column].float() * scale[row // 16, column // 48]


@pytest.mark.parametrize("stored", [INT8, INT4, FP8, {f"{NAME}.weight": torch.ones(N, K, dtype=torch.bfloat16)}])
def test_each_way_of_storing_passes(stored: Mapping[str, Tensor]) -> None:
    in_memory({**NORM, **stored}, "here", SCHEME).check([LINEAR, VECTOR], tied=False)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**NORM}, "up_proj.weight is missing"),
        ({**INT8}, "model.norm.weight is missing"),
        ({**NORM, **INT8, "model.other": torch.ones(1)}, "model.other is not part of the model"),
        ({**NORM, f"{NAME}.weight": torch.ones(K, N)}, r"up_proj.weight is \(64, 40\), expected \(40, 64\)"),
        ({**NORM, f"{NAME}.weight": INT8[f"{NAME}.weight"]}, "up_proj.weight_scale is missing"),
        ({**NORM, **INT8, f"{NAME}.weight_scale": torch.ones(N)}, r"weight_scale is \(40,\), expected \(40, 1\)"),
        ({**NORM, **INT8, f"{NAME}.weight_scale": torch.ones(N, 1, dtype=torch.int32)}, "weight_scale has dtype I32"),
        ({**NORM, **INT4, f"{NAME}.weight_scale": torch.ones(N, 1)}, r"weight_scale is \(40, 1\), expected \(40, 2\)"),
        ({**NORM, **INT4, f"{NAME}.weight_packed": torch.ones(N, 8)}, "weight_packed has dtype F32, expected I32"),
        ({**NORM, **FP8, f"{NAME}.weight_scale_inv": torch.ones(1, 1)}, r"scale_inv is \(1, 1\), expected \(3, 2\)"),
        ({**NORM, f"{NAME}.weight": torch.ones(N, K, dtype=torch.int16)}, "up_proj.weight has dtype I16"),
        ({**NORM, f"{NAME}.weight": torch.ones(N, K).to(torch.float8_e5m2)}, "up_proj.weight has dtype F8_E5M2"),
        ({"model.norm.weight": torch.ones(K, dtype=torch.int8), **INT8}, "model.norm.weight has dtype I8"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        in_memory(tensors, "here", SCHEME).check([LINEAR, VECTOR], tied=False)


def test_a_group_size_that_does_not_divide_the_columns_is_refused() -> None:
    weights = in_memory({**NORM, **INT4}, "here", Scheme(int4_group_size=48))
    with pytest.raises(CheckpointError, match="weight_scale is"):
        weights.check([LINEAR, VECTOR], tied=False)
    with pytest.raises(CheckpointError, match="64 columns, which groups of 48 do not divide"):
        weights.int4_weight(NAME, N, K)


def test_a_stated_shape_that_is_another_is_refused() -> None:
    weights = in_memory({**INT4, f"{NAME}.weight_shape": torch.tensor([N, K - 1])}, "here", SCHEME)
    with pytest.raises(CheckpointError, match=r"weight_shape says \(40, 63\), expected \(40, 64\)"):
        weights.int4_weight(NAME, N, K)


def test_the_output_embedding_may_be_absent_only_where_it_is_tied() -> None:
    head = Parameter("lm_head.weight", (8, K), "head")
    weights = in_memory(NORM, "here")
    weights.check([VECTOR, head], tied=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing"):
        weights.check([VECTOR, head], tied=False)
