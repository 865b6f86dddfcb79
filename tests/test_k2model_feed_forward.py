"""Routers and experts against the formulas, token by token; and a token's experts are its own business."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.compress.quantize import quantize_weight
from k2model.config import ModelConfig
from k2model.decoder.feed_forward import FeedForward, MixtureOfExperts, read_feed_forward
from k2model.decoder.linear import LinearReader
from k2model.formats.weights import in_memory
from tests.checkpoints import config_json, random_tensors

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, not normalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "mixtral": ("mixtral", {}),
    "gpt_oss": ("gpt_oss", {"swiglu_limit": 0.6}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, one group kept, not normalized": (
        "deepseek_v3",
        {"topk_group": 1, "n_group": 2, "norm_topk_prob": False},
    ),
    "kimi_k2, two shared": ("kimi_k2", {"n_shared_experts": 2}),
}


def layer_of(raw: dict[str, Any], tensors: dict[str, Tensor], *, expand: bool = True) -> MixtureOfExperts:
    reader = LinearReader(in_memory(tensors, "test"), torch.float32, expand)
    made = read_feed_forward(ModelConfig.from_dict(raw, "test"), 1, reader)
    assert isinstance(made, MixtureOfExperts)
    return made


def inputs(count: int = 40) -> Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(9))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def naive(raw: dict[str, Any], tensors: dict[str, Tensor], row: Tensor) -> Tensor:
    """Return what layer 1 makes of one token [D], with lists and loops."""

    def get(name: str) -> Tensor:
        return tensors[f"model.layers.1.mlp.{name}"].double()

    def feed_forward(name: str, x: Tensor) -> Tensor:
        gate, up = get(f"{name}.gate_proj.weight") @ x, get(f"{name}.up_proj.weight") @ x
        if raw["model_type"] == "gpt_oss":
            gate = (gate + get(f"{name}.gate_proj.bias")).clamp(max=raw["swiglu_limit"])
            up = (up + get(f"{name}.up_proj.bias")).clamp(-raw["swiglu_limit"], raw["swiglu_limit"])
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            return get(f"{name}.down_proj.weight") @ inner + get(f"{name}.down_proj.bias")
        return get(f"{name}.down_proj.weight") @ (gate * torch.sigmoid(gate) * up)

    x, family, top = row.double(), raw["model_type"], raw["num_experts_per_tok"]
    logits = (get("gate.weight") @ x).tolist()
    experts = list(range(len(logits)))
    if family in ("deepseek_v3", "kimi_k2"):
        weights = [sigmoid(logit) for logit in logits]
        biased = [w + b for w, b in zip(weights, get("gate.e_score_correction_bias").tolist(), strict=True)]
        size = len(experts) // raw["n_group"]
        best_two = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(raw["n_group"])]
        kept = sorted(range(raw["n_group"]), key=lambda g: -best_two[g])[: raw["topk_group"]]
        chosen = sorted((e for e in experts if e // size in kept), key=lambda e: -biased[e])[:top]
    else:
        if family == "gpt_oss":
            logits = [logit + bias for logit, bias in zip(logits, get("gate.bias").tolist(), strict=True)]
        chosen = sorted(experts, key=lambda e: -logits[e])[:top]
        reach = chosen if family == "gpt_oss" else experts
        total = sum(math.exp(logits[e]) for e in reach)
        weights = [math.exp(logit) / total for logit in logits]
    if raw.get("norm_topk_prob", family == "mixtral"):
        total = sum(weights[e] for e in chosen)
        weights = [weight / total for weight in weights]
    scaling = raw.get("routed_scaling_factor", 1.0)
    out = sum((feed_forward(f"experts.{e}", x) * weights[e] * scaling for e in chosen), torch.zeros(48).double())
    return out + feed_forward("shared_experts", x) if raw.get("n_shared_experts") else out


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_what_the_formulas_say(name: str) -> None:
    family, options = MODELS[name]
    raw = config_json(family, **options)
    tensors = random_tensors(raw, seed=3)
    x = inputs()
    expected = torch.stack([naive(raw, tensors, row) for row in x]).float()
    torch.testing.assert_close(layer_of(raw, tensors).forward(x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_with_their_experts_in_ascending_order(name: str) -> None:
    family, options = MODELS[name]
    raw = config_json(family, **options)
    router = layer_of(raw, random_tensors(raw)).router
    expert_ids, weights = router.choose(router.logits(inputs()))
    assert expert_ids.shape == weights.shape == (40, raw["num_experts_per_tok"])
    assert expert_ids.diff(dim=1).gt(0).all()
    assert weights.gt(0).all()
    if raw.get("norm_topk_prob", True):
        torch.testing.assert_close(weights.sum(dim=1), torch.full((40,), raw.get("routed_scaling_factor", 1.0)))


def test_the_correction_bias_chooses_and_does_not_weigh() -> None:
    raw = config_json("kimi_k2", norm_topk_prob=False, routed_scaling_factor=1.0)
    tensors = random_tensors(raw)
    bias = torch.zeros(8)
    bias[[1, 4, 6]] = 50.0
    router = layer_of(raw, {**tensors, "model.layers.1.mlp.gate.e_score_correction_bias": bias}).router
    logits = router.logits(inputs())
    expert_ids, weights = router.choose(logits)
    assert expert_ids.unique(dim=0).tolist() == [[1, 4, 6]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [1, 4, 6]])


@pytest.mark.parametrize("favourite", [0, 3])
def test_all_tokens_at_one_expert_and_experts_without_tokens(favourite: int) -> None:
    raw = config_json("qwen3_moe", num_experts_per_tok=1)
    tensors = random_tensors(raw)
    gate = torch.zeros(6, 48)
    gate[favourite] = 1.0
    layer = layer_of(raw, {**tensors, "model.layers.1.mlp.gate.weight": gate})
    x = inputs().abs()
    expected = layer.experts[favourite].forward(x)
    torch.testing.assert_close(layer.forward(x), expected, rtol=0, atol=1e-6)
    assert layer.forward(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_tokens_bits_are_its_own_in_int8(name: str, threads: int) -> None:
    family, options = MODELS[name]
    raw = config_json(family, **options)
    tensors = random_tensors(raw)
    for linear in [n for n in tensors if ".mlp." in n and n.endswith("_proj.weight")]:
        tensors[linear], tensors[f"{linear}_scale"] = quantize_weight(tensors[linear])
    layer = layer_of(raw, tensors, expand=False)
    x, before = inputs(97), torch.get_num_threads()
    whole = layer.forward(x)
    try:
        torch.set_num_threads(threads)
        for some in ([0], [96, 3], list(range(96, -1, -1)), list(range(10, 43))):
            assert torch.equal(layer.forward(x[some]), whole[some])
    finally:
        torch.set_num_threads(before)


def test_layers_without_experts_are_dense() -> None:
    raw = config_json("deepseek_v3")
    reader = LinearReader(in_memory(random_tensors(raw), "test"), torch.float32, expand=True)
    config = ModelConfig.from_dict(raw, "test")
    dense = read_feed_forward(config, 0, reader)
    assert isinstance(dense, FeedForward)
    assert dense.forward(inputs()).shape == (40, 48)
