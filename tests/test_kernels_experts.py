"""A whole layer of experts beside its twins, and each token's bits alone and among others."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.experts import int8_experts
from tests.kernel_cases import DEVICE, poisoned_outputs, random, random_int8, route_on_card

pytestmark = [
    # Rows of dropped slots hold whatever was in memory; numpy, which plays the card, says so.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

TOKENS, HIDDEN, FF, EXPERTS, CHOSEN = 21, 48, 32, 6, 3


def layer(x: Tensor, logits: Tensor, shared: Tensor, threshold: float = 1.0) -> Tensor:
    ids, weights, counts = route_on_card(
        logits, None, CHOSEN, scoring="sigmoid", norm_topk_prob=True, threshold=threshold
    )
    gate_up, down = random_int8(EXPERTS, 2 * FF, HIDDEN, seed=1), random_int8(EXPERTS, HIDDEN, FF, seed=2)
    scales = random(EXPERTS, 2 * FF, seed=3).abs() * 1e-2, random(EXPERTS, HIDDEN, seed=4).abs() * 1e-2
    return int8_experts(
        *reference.quantize_rows(x), ids, weights, counts, gate_up, scales[0], down, scales[1],
        shared=shared, out_dtype=torch.float32,
    )  # fmt: skip


def twin(x: Tensor, logits: Tensor, shared: Tensor, threshold: float) -> Tensor:
    """Return the same, token by token and expert by expert."""
    ids, weights, counts = reference.route(
        logits, None, CHOSEN, scoring="sigmoid", norm_topk_prob=True, threshold=threshold
    )
    gate_up, down = random_int8(EXPERTS, 2 * FF, HIDDEN, seed=1), random_int8(EXPERTS, HIDDEN, FF, seed=2)
    scales = random(EXPERTS, 2 * FF, seed=3).abs() * 1e-2, random(EXPERTS, HIDDEN, seed=4).abs() * 1e-2
    x_int8, x_scale = reference.quantize_rows(x)
    out = []
    for token in range(len(x)):
        row = slice(token, token + 1)
        total = torch.zeros(1, HIDDEN, device=x.device)
        for place in range(int(counts[token])):
            e = int(ids[token, place])
            hidden = reference.int8_linear(x_int8[row], x_scale[row], gate_up[e], scales[0][e])
            y = reference.int8_linear(*reference.swiglu_quantize(hidden), down[e], scales[1][e])
            total += y * weights[token, place]
        out.append(total + shared[row])
    return torch.cat(out)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = random(TOKENS, HIDDEN)
    x[3] = 0.0
    logits = random(TOKENS, EXPERTS, seed=7, scale=3)
    logits[:, 4] = -50.0  # an expert that nobody visits
    return x, logits, random(TOKENS, HIDDEN, seed=8)


def test_a_layer_of_experts_is_its_twins_with_and_without_dropped_slots() -> None:
    x, logits, shared = inputs()
    for threshold in (1.0, 0.6):
        with poisoned_outputs():
            got = layer(x, logits, shared, threshold)
        expected = twin(x, logits, shared, threshold)
        # int32 sums are exact: what differs is the rounding of the float steps around them, some ten of 2**-24 each.
        # A card's exp may also put a gate's value on the other side of a tie, one of 127 steps of its row.
        error = (got - expected).abs() / expected.abs().amax()
        assert (error <= 10 * 2**-24).float().mean() > 0.99
        assert error.max() <= 1 / 127


def test_a_tokens_bits_are_its_own() -> None:
    x, logits, shared = inputs()
    whole = layer(x, logits, shared, 0.6)
    for some in (torch.tensor([5]), torch.arange(TOKENS - 1, -1, -1), torch.tensor([20, 3, 3, 0])):
        some = some.to(DEVICE)
        assert torch.equal(layer(x[some], logits[some], shared[some], 0.6), whole[some])


def test_no_tokens_are_no_work() -> None:
    x, logits, shared = inputs()
    assert layer(x[:0], logits[:0], shared[:0]).shape == (0, HIDDEN)
