"""Balancing outliers, family by family: the float model is unchanged, the INT8 one nearer to it."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.compress import calibrate
from k2model.compress.calibrate import Calibration, calibration_ids, calibration_texts, start_calibration
from k2model.compress.quantize import quantize_weight
from k2model.compress.smooth import Balance, balance
from k2model.config import ModelConfig
from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.formats.weights import in_memory
from k2model.parameters import layer_parameters, parameters
from k2model.tokenizer import Tokenizer
from kernels import rowwise
from tests.checkpoints import FAMILIES, config_json, random_tensors, write_tokenizer
from tests.forward import packed_hidden, packed_logits

IDS = [list(range(30, 90)), [7], list(range(200, 240, 3))]
LAYERS = 2


def decoder_of(raw: dict[str, Any], tensors: dict[str, Tensor], *, expand: bool = True) -> Decoder:
    config = ModelConfig.from_dict(raw, "test")
    return Decoder.from_weights(config, in_memory(tensors, "test"), replace(PRECISIONS["fp32"], expand=expand))


def calibration_of(raw: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    return start_calibration(ModelConfig.from_dict(raw, "test"), in_memory(tensors, "test"), IDS)


def linears(raw: dict[str, Any], index: int) -> list[str]:
    found = layer_parameters(ModelConfig.from_dict(raw, "test"), index)
    return [parameter.name.removesuffix(".weight") for parameter in found if parameter.is_linear]


def balances(
    raw: dict[str, Any], tensors: dict[str, Tensor], kept: frozenset[str] = frozenset(), alpha: float = 0.65
) -> list[Balance]:
    """Return each layer's balance; what is `kept` has no known reach, as in a conversion."""
    calibration, made = calibration_of(raw, tensors), []
    for index in range(LAYERS):
        strengths = calibration.run(index)
        free = [name for name in linears(raw, index) if name not in kept]
        reaches = {name: tensors[f"{name}.weight"].abs().amax(dim=0) for name in free}
        made.append(balance(calibration.config, index, strengths, reaches, kept, alpha))
    return made


def balanced(tensors: dict[str, Tensor], made: list[Balance]) -> dict[str, Tensor]:
    result = dict(tensors)
    for index, layer in enumerate(made):
        for name in [name for name in tensors if name.startswith(f"model.layers.{index}.")]:
            if tensors[name].dim() == 2:
                result[name] = layer.weight(name.removesuffix(".weight"), tensors[name])
            else:
                result[name] = layer.vector(name, tensors[name])
    return result


def as_w8a8(raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = dict(tensors)
    for parameter in parameters(ModelConfig.from_dict(raw, "test")):
        if parameter.is_linear:
            weight, scale = quantize_weight(tensors[parameter.name])
            made |= {parameter.name: weight, f"{parameter.name}_scale": scale}
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_balancing_folds_away_and_brings_int8_nearer(family: str) -> None:
    raw = config_json(family)
    tensors = random_tensors(raw, outlier=40.0)
    plain = packed_logits(decoder_of(raw, tensors), IDS)
    before = (packed_logits(decoder_of(raw, as_w8a8(raw, tensors), expand=False), IDS) - plain).abs().mean()
    moved = balanced(tensors, balances(raw, tensors))
    assert any(not torch.equal(moved[name], tensors[name]) for name in tensors if name.endswith("norm.weight"))
    torch.testing.assert_close(packed_logits(decoder_of(raw, moved), IDS), plain, rtol=0, atol=1e-3)
    after = (packed_logits(decoder_of(raw, as_w8a8(raw, moved), expand=False), IDS) - plain).abs().mean()
    assert after < 0.7 * before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_is_not_touched_and_the_rest_still_folds_away(family: str, seed: int) -> None:
    raw = config_json(family)
    tensors = random_tensors(raw, outlier=10.0)
    names = [name for index in range(LAYERS) for name in linears(raw, index)]
    kept = frozenset(random.Random(seed).sample(names, k=len(names) * (seed + 1) // 5))
    moved = balanced(tensors, balances(raw, tensors, kept))
    for name in kept:
        assert torch.equal(moved[f"{name}.weight"], tensors[f"{name}.weight"]), name
        if f"{name}.bias" in tensors:
            assert torch.equal(moved[f"{name}.bias"], tensors[f"{name}.bias"]), name
    plain = packed_logits(decoder_of(raw, tensors), IDS)
    torch.testing.assert_close(packed_logits(decoder_of(raw, moved), IDS), plain, rtol=0, atol=5e-4)


def test_every_fold_of_the_table_is_made() -> None:
    """Which of a layer's tensors move, for the family with the most of them and for the two that must leave some."""
    for family, expected in (
        ("deepseek_v3", {"input_layernorm", "q_a_layernorm", "kv_a_layernorm", "kv_b_proj", "o_proj", "gate",
                         "post_attention_layernorm", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "gate_proj",
                         "up_proj", "down_proj"}),
        ("gpt_oss", {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj",
                     "post_attention_layernorm"}),
        ("llama", {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                   "post_attention_layernorm"}),
    ):  # fmt: skip
        raw = config_json(family)
        made = balances(raw, random_tensors(raw))[1]
        names = [name.removesuffix(".weight") for name in (*made.vectors, *made.columns, *made.rows)]
        assert {name.rpartition(".")[2] for name in names} == expected, family


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_calibration_passes_on_what_the_decoder_computes(family: str) -> None:
    raw = config_json(family)
    tensors = random_tensors(raw)
    calibration = calibration_of(raw, tensors)
    for index in range(LAYERS):
        assert set(calibration.run(index)) == set(linears(raw, index))
    hidden = rowwise.rms_norm(calibration.hidden, tensors["model.norm.weight"], raw["rms_norm_eps"])
    torch.testing.assert_close(hidden, packed_hidden(decoder_of(raw, tensors), IDS), rtol=0, atol=2e-5)


def test_strength_counts_every_token_alike() -> None:
    raw = config_json("llama")
    calibration = calibration_of(raw, random_tensors(raw, outlier=40.0))
    strengths = calibration.run(0)
    for strength in strengths.values():
        assert strength.square().mean().item() == pytest.approx(1.0, rel=1e-3)
    assert strengths["model.layers.0.self_attn.q_proj"].argmax() == 5
    assert strengths["model.layers.0.mlp.up_proj"].argmax() == 5


def test_an_expert_that_no_token_reached_is_quantized_as_it_is() -> None:
    raw = config_json("qwen3_moe", num_experts_per_tok=1)
    tensors = random_tensors(raw)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].abs()
    for name in [name for name in tensors if name.endswith(("o_proj.weight", "down_proj.weight"))]:
        tensors[name] = torch.zeros_like(tensors[name])  # so that what a router sees stays positive
    gate = torch.zeros(6, 48)
    gate[2] = 1.0
    tensors |= {f"model.layers.{index}.mlp.gate.weight": gate for index in range(LAYERS)}
    calibration = calibration_of(raw, tensors)
    strengths = calibration.run(0)
    reached = [e for e in range(6) if strengths[f"model.layers.0.mlp.experts.{e}.down_proj"].any()]
    assert reached == [2]
    made = balances(raw, tensors)[0]
    assert made.rows["model.layers.0.mlp.experts.4.up_proj"].eq(1).all()
    assert torch.stack(list(made.columns.values())[:1]).isfinite().all()


def test_calibration_keeps_to_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = config_json("llama")
    monkeypatch.setattr(calibrate, "_MAX_VALUES", 61 * 48)
    calibration = calibration_of(raw, random_tensors(raw))
    assert [len(ids) for ids in calibration.prompts] == [60, 1]
    monkeypatch.setattr(calibrate, "_MAX_VALUES", 1)
    assert len(calibration_of(raw, random_tensors(raw)).prompts) == 1


def test_weights_quantize_to_half_a_step_per_channel() -> None:
    weight = torch.randn(8, 33)
    weight[3] = 0
    quantized, scale = quantize_weight(weight)
    assert ((quantized.float() * scale - weight).abs() <= 0.501 * scale).all()
    assert quantized[3].eq(0).all()
    assert quantized.abs().amax(dim=1)[[0, 1, 2, 4, 5, 6, 7]].eq(127).all()
    assert scale.isfinite().all()


def test_the_shipped_texts_are_many_and_varied(tmp_path: Path) -> None:
    texts = calibration_texts()
    assert len(texts) >= 200
    assert len(set(texts)) == len(texts)
    assert sum(not text.isascii() for text in texts) >= 20
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    prompts = calibration_ids(tokenizer)
    assert len(prompts) == len(texts)
    assert all(0 < len(ids) <= 512 for ids in prompts)
    assert all(ids[0] == 256 for ids in prompts)  # inside the chat template
