"""Experts, INT4, sinks: each kernel beside its plain twin, on ragged and extreme shapes."""

import pytest
import torch

from kernels import cpu, reference, rowwise
from kernels.cpu_routing import choose_experts, weakest_experts


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "chosen"), [(1, 1, 1, 1), (5, 1, 1, 5), (12, 4, 2, 3), (8, 8, 3, 2)]
)
def test_experts_are_chosen_as_the_twin_chooses(experts: int, groups: int, kept: int, chosen: int) -> None:
    scores = random(37, experts)
    scores[3] = 0.0
    scores[4] = -7.0
    for bias in (None, random(experts, seed=1) * 3):
        got = choose_experts(scores, bias, chosen, groups, kept)
        assert torch.equal(got, reference.choose_experts(scores, bias, chosen, groups, kept))


def test_of_equal_experts_the_lower_wins() -> None:
    assert choose_experts(torch.zeros(2, 9), None, 3, 1, 1).tolist() == [[0, 1, 2]] * 2
    assert choose_experts(torch.zeros(1, 8), None, 3, 4, 2).tolist() == [[0, 1, 2]]


def test_excluded_groups_lose_even_with_negative_scores() -> None:
    """Old remote code wrote 0.0 for them, which beats a negative biased score."""
    scores = torch.tensor([[-1.0, -1.1, -5.0, -5.1]])
    assert choose_experts(scores, None, 2, 2, 1).tolist() == [[0, 1]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 5, 3), (33, 7168, 384), (3, 40, 9, 8)])
def test_rows_are_multiplied_as_the_twin_does_and_alone(shape: tuple[int, ...]) -> None:
    *batch, rows, k, n = shape if len(shape) > 3 else (*shape[:1], *shape[1:])
    x, weight = random(*batch, rows, k), random(*batch, k, n, seed=1)
    whole = cpu.row_matmul(x, weight)
    # The rounding of k products and k sums, each of values near 1.
    torch.testing.assert_close(whole, reference.row_matmul(x, weight), rtol=0, atol=2e-7 * k**0.5 * 8)
    for start, stop in ((0, 1), (rows // 2, rows // 2 + 1), (rows // 3, rows)):
        assert torch.equal(cpu.row_matmul(x[..., start:stop, :].contiguous(), weight), whole[..., start:stop, :])


@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_is_the_twin_within_bfloat16(group_size: int) -> None:
    n, k = 48, 256
    weight = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (random(n, k // group_size).abs() / 50).bfloat16().float()
    packed, scales = cpu.int4_pack(weight, scale)
    for rows in (1, 2, 5, 33):
        x = random(rows, k).bfloat16().float()
        got, expected = cpu.int4_linear(x, packed, scales, group_size), reference.int4_linear(x, weight, scale)
        # Weights and results are each rounded to bfloat16, 2**-9 of themselves.
        bound = 2**-8 * (expected.abs() + (x.abs() @ (weight * scale.repeat_interleave(group_size, 1)).abs().t()) / 8)
        assert ((got - expected).abs() <= bound).all()
        for row in range(rows):
            assert torch.equal(cpu.int4_linear(x[row : row + 1], packed, scales, group_size)[0], got[row])


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_the_clamped_activation_is_the_twins(limit: float) -> None:
    gate_up = torch.cat([random(9, 14) * 6, torch.tensor([[-1e4, 1e4, 0.0, -0.0, 88.0, -88.0, 7.0] * 2])])
    got, expected = rowwise.swiglu(gate_up, 1.702, limit), reference.clamped_swiglu(gate_up, 1.702, limit)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)


def test_weakest_experts_are_the_twins() -> None:
    weights = torch.randint(1, 64, (200, 6), generator=torch.Generator().manual_seed(2)) / 64
    for threshold in (0.125, 0.5, 0.75, 0.96875):
        got = weakest_experts(weights, threshold)
        assert torch.equal(got, reference.weakest_experts(weights, threshold))
        assert not got.gather(1, weights.argmax(dim=1, keepdim=True)).any()
        assert torch.equal(weakest_experts(weights[7:9], threshold), got[7:9])
    assert weakest_experts(torch.full((1, 4), 0.25), 0.5).tolist() == [[False, False, True, True]]
