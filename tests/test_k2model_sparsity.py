"""Dynamic sparsity: at 1 nothing changes, below it fewer experts run, and a token's experts are its own business."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.compress.quantize import quantize_weight
from k2model.compress.sparsity import Routing, Search, flops_per_token, watched, with_thresholds
from k2model.config import ModelConfig
from k2model.decoder.feed_forward import MixtureOfExperts, run_experts
from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.formats.weights import in_memory
from schemas.errors import SpecError
from tests.checkpoints import config_json, random_tensors
from tests.forward import packed_hidden
from tests.test_k2model_feed_forward import inputs, layer_of

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"num_experts_per_tok": 4}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss": ("gpt_oss", {"num_experts_per_tok": 3}),
}
THRESHOLDS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.0001)
PROMPTS = [[*range(40, 97)], [3], [*range(200, 233)], [3, 3, 9]]


def layer(name: str, threshold: float = 1.0, *, int8: bool = False) -> MixtureOfExperts:
    family, options = MODELS[name]
    raw = config_json(family, **options)
    tensors = random_tensors(raw)
    if int8:
        for linear in [n for n in tensors if ".mlp." in n and n.endswith("_proj.weight")]:
            tensors[linear], tensors[f"{linear}_scale"] = quantize_weight(tensors[linear])
    made = layer_of(raw, tensors, expand=not int8)
    return replace(made, router=replace(made.router, threshold=threshold))


def decoder(name: str) -> Decoder:
    family, options = MODELS[name]
    raw = config_json(family, **options)
    weights = in_memory(random_tensors(raw), "test")
    return Decoder.from_weights(ModelConfig.from_dict(raw, "test"), weights, PRECISIONS["fp32"])


@pytest.mark.parametrize("name", MODELS)
def test_a_threshold_of_one_changes_no_bit(name: str) -> None:
    plain = decoder(name)
    assert torch.equal(packed_hidden(with_thresholds(plain, [1.0, 1.0]), PROMPTS), packed_hidden(plain, PROMPTS))
    assert with_thresholds(plain, ()) is plain


def test_at_one_experts_of_no_weight_stay() -> None:
    whole = layer("gpt_oss")
    logits = torch.linspace(0, -900, len(whole.experts))[None]
    ids, weights = whole.router.choose(logits)
    assert weights[0].tolist() == [1.0, 0.0, 0.0]
    assert ids[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("threshold", THRESHOLDS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_dropped_follows_what_holds_the_threshold(name: str, threshold: float) -> None:
    whole, sparse = layer(name), layer(name, threshold)
    logits = whole.router.logits(inputs(200))
    ids, weights = whole.router.choose(logits)
    kept_ids, kept_weights = sparse.router.choose(logits)
    none = len(whole.experts)
    for token, (experts, shares) in enumerate(zip(ids.tolist(), weights.double().tolist(), strict=True)):
        share_of = dict(zip(experts, shares, strict=True))
        kept = [expert for expert in kept_ids[token].tolist() if expert < none]
        assert kept_ids[token].tolist() == sorted(kept) + [none] * (len(experts) - len(kept))
        assert kept_weights[token].double().tolist() == [share_of.get(e, 0.0) for e in kept_ids[token].tolist()]
        held = sorted((share_of[expert] for expert in kept), reverse=True)
        assert held[0] == max(shares)
        assert sum(held[:-1]) < threshold * sum(shares) + 1e-6
        assert len(kept) == len(experts) or sum(held) >= threshold * sum(shares) - 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_dropped_slots_are_not_computed_and_flops_fall(name: str) -> None:
    x, seen = inputs(200), []
    for threshold in THRESHOLDS:
        sparse = layer(name, threshold)
        ids, weights = sparse.router.choose(sparse.router.logits(x))
        counted = [Counting() for _ in sparse.experts]
        run_experts(counted, x, ids, weights)  # type: ignore[arg-type]
        assert [fake.rows for fake in counted] == [int((ids == e).sum()) for e in range(len(counted))]
        seen.append(sum(fake.rows for fake in counted))
    family_top = layer(name).router.config.num_experts_per_tok
    assert seen[0] == 200 * family_top
    assert all(more >= fewer for more, fewer in pairwise(seen))
    assert seen[0] > seen[2] > seen[-1]
    assert seen[-1] == 200


class Counting:
    """An expert that counts the rows that reach it."""

    def __init__(self) -> None:
        self.rows = 0

    @property
    def first(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return x.clone()


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_the_sum_of_the_kept_experts(name: str) -> None:
    x, sparse = inputs(30), layer(name, 0.6)
    ids, weights = sparse.router.choose(sparse.router.logits(x))
    expected = torch.zeros_like(x)
    for token in range(30):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert < len(sparse.experts):
                expected[token] += sparse.experts[expert].forward(x[token : token + 1])[0] * weight
    expected += sparse.shared.forward(x) if sparse.shared else 0
    torch.testing.assert_close(sparse.forward(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_tokens_bits_are_its_own_where_experts_are_dropped(name: str, int8: bool) -> None:
    sparse, x = layer(name, 0.6, int8=int8), inputs(97)
    whole = sparse.forward(x)
    for some in ([0], [96, 3], list(range(96, -1, -1)), list(range(10, 43))):
        assert torch.equal(sparse.forward(x[some]), whole[some])


def test_the_count_of_experts_and_their_flops() -> None:
    plain = decoder("qwen3_moe")
    flops = []
    for threshold in THRESHOLDS:
        counting, routings = watched(with_thresholds(plain, [threshold, threshold]))
        assert torch.equal(
            packed_hidden(counting, PROMPTS), packed_hidden(with_thresholds(plain, [threshold] * 2), PROMPTS)
        )
        assert [routing.tokens for routing in routings.values()] == [sum(map(len, PROMPTS))] * 2
        flops.append(flops_per_token(plain.config, routings))
    experts = 2 * 4 * 3 * 48 * 32 * 2  # layers, experts, linears, D, F, one product and sum
    assert flops[0]["experts"] == experts
    assert flops[-1]["experts"] == experts / 4
    assert all(more["model"] > fewer["model"] for more, fewer in pairwise(flops))
    attention = 2 * 2 * 48 * ((6 + 2 + 2) * 16 + 6 * 16)
    assert flops[0]["model"] == experts + attention + 2 * 2 * 6 * 48


def test_a_layers_threshold_drops_at_most_the_share_asked_for() -> None:
    routing = Routing()
    weights = torch.rand(500, 4, generator=torch.Generator().manual_seed(1)) + 0.01
    ids = torch.arange(4).repeat(500, 1)
    routing.add(ids, weights, 4)
    assert (routing.tokens, routing.slots) == (500, 2000)
    assert routing.threshold(0.0) == 1.0
    sums = weights.sort(dim=1, descending=True).values.cumsum(dim=1)
    for share in (0.1, 0.5, 0.9, 1.0):
        threshold = routing.threshold(share)
        dropped = (sums[:, :-1] >= threshold * sums[:, -1:]).float().mean().item()
        assert share - 0.01 <= dropped <= share + 1e-6
    two = Routing()
    two.add(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.5], [0.75, 0.25]]), 2)
    assert [two.threshold(share) for share in (0.4, 0.5, 1.0)] == [0.7501, 0.5001, 0.0001]


def test_most_is_dropped_where_least_is_lost_until_answers_change() -> None:
    routings = {0: Routing(), 2: Routing()}
    weights = torch.rand(4000, 4, generator=torch.Generator().manual_seed(1)) + 0.01
    for routing in routings.values():
        routing.add(torch.arange(4).repeat(4000, 1), weights, 4)

    def drops(thresholds: tuple[float, ...]) -> list[float]:
        sums = weights.sort(dim=1, descending=True).values.cumsum(dim=1)
        return [(sums[:, :-1] >= t * sums[:, -1:]).float().mean().item() if t < 1 else 0.0 for t in thresholds]

    asked: list[tuple[float, ...]] = []

    def loss(thresholds: tuple[float, ...]) -> float:
        asked.append(thresholds)
        first, middle, last = drops(thresholds)
        assert middle == 0
        return 3 * first**2 + last**2

    def agreement(thresholds: tuple[float, ...]) -> float:
        asked.append(thresholds)
        return 1.0 if sum(drops(thresholds)) / 2 <= 0.4 else 0.5

    search = Search(3, routings, loss, agreement)
    sensitivities = search.sensitivities()
    assert sensitivities[0] == pytest.approx(3 * sensitivities[2], rel=0.02)
    share = search.best_share(0.99, sensitivities)
    assert 0.38 < share <= 0.4
    first, _, last = drops(search.at_share(share, sensitivities))
    assert [first, last] == pytest.approx([share / 2, share * 3 / 2], abs=0.01)
    assert drops(search.at_share(0.8, sensitivities)) == pytest.approx([0.6, 0.0, 1.0], abs=0.01)
    assert search.at_share(0.0, sensitivities) == (1.0, 1.0, 1.0)
    assert len(asked) == 2 + 1 + 7


def test_a_model_without_experts_or_of_other_depth_is_refused() -> None:
    with pytest.raises(SpecError, match="3 router thresholds for 2 layers"):
        with_thresholds(decoder("gpt_oss"), [1.0, 1.0, 1.0])
    raw = config_json("llama")
    dense = Decoder.from_weights(ModelConfig.from_dict(raw, "test"), in_memory(random_tensors(raw), "test"))
    with pytest.raises(SpecError, match="llama model has no experts"):
        with_thresholds(dense, [1.0, 1.0])
