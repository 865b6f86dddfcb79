"""Routing and the layout of slots in blocks, beside their plain twins."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops, reference, routing
from kernels.aot import Case, compile_cases
from kernels.cpu import ShapeError
from kernels.cpu_routing import choose_experts
from kernels.routing import align_tokens
from tests.kernel_cases import DEVICE, poisoned_outputs, random, route_on_card

# Experts, experts per token, and what else the checkpoint's config says.
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "kimi-k2": (384, 8, {"scoring": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.827}),
    "deepseek-v3": (
        256,
        8,
        {
            "scoring": "sigmoid",
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "groups of 3": (12, 3, {"scoring": "sigmoid", "n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
    "groups of 1": (8, 2, {"scoring": "sigmoid", "n_group": 8, "topk_group": 3, "norm_topk_prob": True}),
    "16 groups": (512, 8, {"scoring": "sigmoid", "n_group": 16, "topk_group": 5, "norm_topk_prob": True}),
    "qwen3": (128, 8, {"scoring": "softmax", "norm_topk_prob": True}),
    "softmax": (60, 4, {"scoring": "softmax", "norm_topk_prob": False}),
    "gpt-oss": (32, 4, {"scoring": "softmax_topk", "norm_topk_prob": False}),
    "all": (5, 5, {"scoring": "softmax", "norm_topk_prob": True}),
    "one": (1, 1, {"scoring": "sigmoid", "norm_topk_prob": True}),
}


def route_poisoned(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    with poisoned_outputs():
        return route_on_card(*args, **options)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("threshold", [1.0, 0.7, 0.01])
@pytest.mark.parametrize("name", ROUTERS)
def test_routes_are_the_twins(name: str, threshold: float) -> None:
    experts, chosen, config = ROUTERS[name]
    logits = random(7, experts, scale=2.0)
    logits[2] = 0.0
    logits[3] = -60.0
    logits[4, experts // 2] = 40.0
    logits[5] = -200.0  # no weight at all: the strongest stays
    bias = random(experts, seed=1) if config["scoring"] == "sigmoid" else None
    expected_ids, expected_weights, expected_counts = reference.route(
        logits.cpu(), None if bias is None else bias.cpu(), chosen, threshold=threshold, **config
    )
    for route in (route_poisoned, ops.route):
        ids, weights, counts = route(logits, bias, chosen, threshold=threshold, **config)
        assert ids.dtype == counts.dtype == torch.int32
        assert torch.equal(ids.cpu(), expected_ids)
        assert torch.equal(counts.cpu(), expected_counts)
        # exp, a sum of at most 512 terms in a tree, two divisions, a product: each within an ulp or two, 2**-23.
        torch.testing.assert_close(weights.cpu(), expected_weights, rtol=16 * 2**-23, atol=1e-37)


def test_experts_are_those_of_the_cpu() -> None:
    scores = random(9, 64, scale=3.0)
    scores[1] = scores[1].round()
    ids, _, counts = route_poisoned(scores, None, 6, scoring="softmax_topk", norm_topk_prob=False)
    assert torch.equal(ids.long().cpu(), choose_experts(scores.cpu(), None, 6, 1, 1))
    assert (counts == 6).all()


def test_of_equals_the_lower_expert_and_group_win() -> None:
    zeros = torch.zeros(2, 8, device=DEVICE)
    ids, _, _ = route_poisoned(zeros, None, 3, scoring="sigmoid", norm_topk_prob=True)
    assert ids.tolist() == [[0, 1, 2]] * 2
    ids, _, _ = route_poisoned(zeros, None, 3, scoring="sigmoid", n_group=4, topk_group=2, norm_topk_prob=True)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_excluded_groups_lose_to_negative_scores() -> None:
    bias = torch.tensor([-2.0, -2.1, -9.0, -9.1], device=DEVICE)
    logits = torch.zeros(1, 4, device=DEVICE)
    ids, _, _ = route_poisoned(logits, bias, 2, scoring="sigmoid", n_group=2, topk_group=1, norm_topk_prob=True)
    assert ids.tolist() == [[0, 1]]


def test_what_is_kept_comes_first_with_the_weight_it_had() -> None:
    logits = torch.tensor([[1.0, 4.0, 0.0, 4.0], [0.0, 0.0, 0.0, 9.0]], device=DEVICE).log()
    common: dict[str, Any] = {"scoring": "softmax", "threshold": 0.8}
    ids, weights, counts = route_poisoned(logits, None, 3, norm_topk_prob=True, **common)
    assert ids.tolist() == [[1, 3, 4], [3, 4, 4]]
    assert counts.tolist() == [2, 1]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[4 / 9, 4 / 9, 0.0], [1.0, 0.0, 0.0]]))
    _, weights, counts = route_poisoned(logits, None, 3, norm_topk_prob=False, scoring="softmax", threshold=0.4)
    assert (counts.tolist(), weights[:, 1:].tolist()) == ([1, 1], [[0.0, 0.0]] * 2)


def test_slots_without_weight_stay_where_nothing_is_dropped() -> None:
    logits = torch.tensor([[0.0, -900.0, -950.0, -960.0]], device=DEVICE)
    for route in (route_poisoned, ops.route):
        ids, weights, counts = route(logits, None, 3, scoring="softmax", norm_topk_prob=True)
        assert (ids.tolist(), weights.tolist(), counts.tolist()) == ([[0, 1, 2]], [[1.0, 0.0, 0.0]], [3])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_of_nan_still_name_experts_in_range() -> None:
    logits = torch.full((2, 12), float("nan"), device=DEVICE)
    logits[1] = float("-inf")
    for scoring in routing.SCORINGS:
        ids, _, counts = route_poisoned(logits, None, 3, scoring=scoring, norm_topk_prob=True)
        assert ((ids >= 0) & (ids <= 12)).all()
        assert ((counts >= 0) & (counts <= 3)).all()


def test_a_routes_bits_are_its_own() -> None:
    experts, chosen, config = ROUTERS["deepseek-v3"]
    logits, bias = random(6, experts), random(experts, seed=1)
    whole = route_on_card(logits, bias, chosen, threshold=0.6, **config)
    for rows in ([3], [5, 3, 0]):
        for part, all_rows in zip(
            route_on_card(logits[rows], bias, chosen, threshold=0.6, **config), whole, strict=True
        ):
            assert torch.equal(part, all_rows[rows])


def test_no_tokens_make_no_routes() -> None:
    ids, weights, counts = route_on_card(random(0, 8), None, 2, scoring="softmax", norm_topk_prob=True)
    assert (ids.shape, weights.shape, counts.shape) == ((0, 2), (0, 2), (0,))
    slot_ids, block_experts, num_padded = align_tokens(ids, 8, 16)
    assert (len(slot_ids), len(block_experts), num_padded.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"scoring": "relu"},
        {"n_group": 3},
        {"n_group": 2, "topk_group": 3},
        {"num_experts_per_tok": 9},
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
        {"correction_bias": torch.zeros(7)},
        {"logits": torch.zeros(1, 513)},
        {"logits": torch.zeros(8, 8).t()},
    ],
)
def test_what_cannot_be_routed_is_said(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "logits": torch.zeros(1, 8),
        "correction_bias": None,
        "num_experts_per_tok": 2,
        "scoring": "sigmoid",
        "norm_topk_prob": True,
    }
    with pytest.raises(ShapeError, match="route"):
        route_on_card(**right | wrong)


def aligned(expert_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return what `align_tokens` lays out, without what lies past its end."""
    with poisoned_outputs():
        slot_ids, block_experts, num_padded = align_tokens(expert_ids.to(DEVICE), num_experts, block_size)
    assert len(slot_ids) == len(block_experts) * block_size
    end = int(num_padded)
    assert end <= len(slot_ids)
    return slot_ids[:end].cpu(), block_experts[: end // block_size].cpu()


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("case", ["mixed", "one token", "one expert", "all dropped", "last expert", "each its own"])
def test_slots_lie_as_the_twin_lays_them(case: str, block_size: int) -> None:
    # 70 x 4 slots are three chunks, the last one ragged; 9 stands for a dropped slot.
    expert_ids = torch.randint(0, 10, (70, 4), generator=torch.Generator().manual_seed(3)).int()
    if case == "one token":
        expert_ids = torch.tensor([[2, 5, 9, 9]], dtype=torch.int32)
    elif case == "each its own":
        expert_ids = torch.arange(9, dtype=torch.int32).view(3, 3)
    elif case != "mixed":
        expert_ids.fill_({"one expert": 4, "all dropped": 9, "last expert": 8}[case])
    slot_ids, block_experts = aligned(expert_ids, 9, block_size)
    expected_slots, expected_experts = reference.align_tokens(expert_ids, 9, block_size)
    assert torch.equal(slot_ids, expected_slots)
    assert torch.equal(block_experts, expected_experts)


def test_many_chunks_are_scanned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_CHUNKS_AT_ONCE", 2)
    expert_ids = torch.randint(0, 4, (300, 2), generator=torch.Generator().manual_seed(5)).int()
    for got, expected in zip(aligned(expert_ids, 3, 16), reference.align_tokens(expert_ids, 3, 16), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("expert_ids", "block_size"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), 16),
        (torch.zeros(2, 4, dtype=torch.int32).t(), 16),
        (torch.zeros(2, 2, dtype=torch.int32), 24),
    ],
)
def test_what_cannot_be_aligned_is_said(expert_ids: Tensor, block_size: int) -> None:
    with pytest.raises(ShapeError, match="align_tokens"):
        align_tokens(expert_ids, 4, block_size)


def test_machine_code() -> None:
    types = dict.fromkeys(("logits_ptr", "bias_ptr", "weights_ptr"), "*fp32")
    types |= dict.fromkeys(("ids_ptr", "counts_ptr", "totals_ptr", "starts_ptr", "slot_ids_ptr"), "*i32")
    types |= dict.fromkeys(("block_experts_ptr", "num_padded_ptr"), "*i32")
    types |= dict.fromkeys(("S", "E", "num_chunks", "stride_lt"), "i32") | {"threshold": "fp32", "factor": "fp32"}

    def case(kernel: str, num_warps: int, capability: int = 90, **constants: Any) -> Case:
        return Case(
            kernel=f"kernels.routing:{kernel}",
            types=types,
            constants=constants,
            capability=capability,
            num_warps=num_warps,
        )

    def router(groups: int, kept: int, size: int, block_p: int, capability: int = 90) -> Case:
        blocks = {"BLOCK_G": groups, "BLOCK_P": block_p, "BLOCK_A": 8, "A": 8}
        config = {"SCORING": "sigmoid", "NORMALIZED": True, "NUM_GROUPS": groups, "KEPT_GROUPS": kept, "DROPS": True}
        return case("_route_kernel", 1, capability, GROUP_SIZE=size, **blocks, **config)

    cases = [
        router(1, 1, 384, 512),
        router(1, 1, 384, 512, capability=80),
        router(16, 8, 32, 32),
        case("_count_kernel", 4, CHUNK=128, BLOCK_E=512),
        case("_scan_kernel", 4, BLOCK=1024),
        case("_lay_out_kernel", 4, BLOCK_SIZE=128, BLOCK_E=512),
        case("_place_kernel", 8, CHUNK=128),
    ]
    for compiled, code in zip(cases, compile_cases(cases), strict=True):
        assert code.faults(compiled.capability) == [], code
