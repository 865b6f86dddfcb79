"""Each CPU kernel against its plain twin, on ragged and extreme shapes; and the same row, the same bits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels import cpu, reference, rowwise
from kernels.cpu_routing import choose_experts

SHAPES = [(1, 1, 1), (1, 576, 576), (7, 63, 100), (33, 576, 960), (130, 1536, 65), (3, 2000, 8)]
UNITS = Path(__file__).parents[2] / "shared/fixtures/quant_units/units.safetensors"


def rows(t: int, k: int, seed: int = 0) -> Tensor:
    """Return [t, k] activations with an outlier channel and, with room, a zero, a huge and a subnormal row."""
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(seed))
    x[:, k // 2] *= 60
    for row, value in ((1, 0.0), (2, 1e30), (4, 1e-42)):
        if t > row:
            x[row] *= value
    return x


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Leave NaN in freed memory, so that a kernel that forgets to write an element shows it."""
    for size in (64, 4096, 262144):
        torch.full((size,), float("nan"))


@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
def test_quantize_rows_is_its_twin(t: int, k: int, n: int) -> None:
    x = rows(t, k)
    x_int8, x_scale = rowwise.quantize_rows(x)
    expected, expected_scale = reference.quantize_rows(x)
    # absmax * (1 / 127) and absmax / 127 may differ by one rounding, so a value at a tie may fall to its other side.
    torch.testing.assert_close(x_scale, expected_scale, rtol=2**-22, atol=1e-44)
    assert (x_int8.int() - expected.int()).abs().max() <= 1
    assert (x_int8 != expected).sum() <= 1 + x.numel() * 2**-12


def test_quantize_rows_keeps_half_a_step() -> None:
    x = rows(64, 576)[8:]
    x_int8, x_scale = rowwise.quantize_rows(x)
    error = (x - x_int8.float() * x_scale[:, None]).abs()
    assert (error <= 0.5001 * x_scale[:, None]).all()
    assert x_int8.abs().amax(dim=1).eq(127).all()


@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
def test_int8_linear_is_exact(t: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (t, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    ones = torch.ones
    exact = (x.long() @ weight.long().t()).float()
    assert torch.equal(cpu.int8_linear(x, ones(t), weight, ones(n)), exact)
    assert torch.equal(reference.int8_linear(x, ones(t), weight, ones(n)), exact)


def test_int8_linear_is_exact_where_int16_would_overflow() -> None:
    x = torch.full((17, 4096), 127, dtype=torch.int8)
    weight = torch.full((9, 4096), -127, dtype=torch.int8)
    assert (reference.int8_matmul(x, weight) == -(127**2) * 4096).all()
    assert cpu.int8_linear(x, torch.ones(17), weight, torch.ones(9)).eq(-(127**2) * 4096).all()


def test_int8_linear_refuses_what_does_not_fit() -> None:
    x, scale = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2)
    with pytest.raises(cpu.ShapeError, match="weight"):
        cpu.int8_linear(x, scale, torch.zeros(3, 9, dtype=torch.int8), torch.ones(3))


@pytest.mark.skipif(not UNITS.exists(), reason="needs the fixtures")
def test_the_layer_computes_the_published_unit() -> None:
    units = load_file(UNITS)
    x_int8, x_scale = rowwise.quantize_rows(units["x"])
    scale = units["a8_127_xscale"].squeeze(1)
    used = units["x"].abs().amax(dim=1) > 0
    torch.testing.assert_close(x_scale[used], scale[used], rtol=2**-22, atol=0)
    assert torch.equal(x_int8, units["a8_127_xq"])
    ones = torch.ones
    acc = cpu.int8_linear(units["a8_127_xq"], ones(9), units["w8_q"], ones(40))
    assert torch.equal(acc.int(), units["a8_127_acc_int32"])
    y = cpu.int8_linear(x_int8, x_scale, units["w8_q"], units["w8_scale"].squeeze(1))
    torch.testing.assert_close(y, units["a8_127_y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t", "d"), [(1, 1), (5, 63), (64, 576)])
def test_rms_norm_is_its_twin(t: int, d: int) -> None:
    x, weight = rows(t, d, seed=3).clamp(-1e4, 1e4), torch.rand(d) + 0.5
    torch.testing.assert_close(
        rowwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6
    )


def test_rope_and_swiglu_are_their_twins() -> None:
    x, angles = torch.randn(9, 3, 8), torch.randn(9, 4) * 100
    torch.testing.assert_close(
        cpu.apply_rope(x, angles.cos(), angles.sin()), reference.apply_rope(x, angles.cos(), angles.sin())
    )
    gate_up = torch.randn(7, 26) * 30
    torch.testing.assert_close(rowwise.swiglu(gate_up), reference.swiglu(gate_up), rtol=1e-5, atol=1e-6)


def test_sigmoid_is_its_twin() -> None:
    x = torch.cat([torch.randn(1000) * 20, torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), float("-inf"), -104.0])])
    torch.testing.assert_close(cpu.sigmoid(x), reference.sigmoid(x), rtol=1e-6, atol=1e-37)
    assert cpu.sigmoid(x)[-3:-1].tolist() == [1.0, 0.0]
    assert not cpu.sigmoid(x).isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 5, 7])
@pytest.mark.parametrize("n", [8, 13, 288, 700, 1536])
def test_no_activation_depends_on_its_place_in_the_tensor(n: int, threads: int) -> None:
    """Widths that no vector divides, in tensors large enough that threads share them."""
    generator, before = torch.Generator().manual_seed(n), torch.get_num_threads()
    x = torch.randn(97, 2 * n, generator=generator) * 3
    torch.set_num_threads(1)
    kernels: list[Callable[[Tensor], Tensor]] = [
        cpu.sigmoid,
        rowwise.swiglu,
        partial(rowwise.swiglu, alpha=1.702, limit=7.0),
    ]
    wholes = [kernel(x) for kernel in kernels]
    try:
        torch.set_num_threads(threads)
        for size in (1, 2, 3, 11, 50, 96):
            some = torch.randperm(97, generator=generator)[:size]
            for kernel, whole in zip(kernels, wholes, strict=True):
                assert torch.equal(kernel(x[some]), whole[some])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("t", "n"), [(1, 1), (7, 13), (64, 160)])
@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (1.0, 0.5)])
def test_clamped_swiglu_is_its_twin(t: int, n: int, alpha: float, limit: float) -> None:
    gate_up = torch.randn(t, 2 * n) * 10
    gate_up.view(-1)[:2] = torch.tensor([-1e30, limit])
    gate_up[0, n] = 3e38
    got = rowwise.swiglu(gate_up, alpha, limit)
    torch.testing.assert_close(got, reference.clamped_swiglu(gate_up, alpha, limit), rtol=2e-6, atol=1e-6)
    assert got.abs().max() <= limit * (limit + 1)
    both = torch.full((1, 2), 1e9)  # gate at its upper clamp, up at its upper clamp
    exact = (limit + 1) * limit * torch.sigmoid(torch.tensor(alpha * limit)).item()
    assert rowwise.swiglu(both, alpha, limit).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("x_shape", "k", "n"), [((1,), 1, 1), ((17,), 63, 5), ((33,), 576, 12), ((3, 16), 20, 7), ((2, 19), 128, 40)]
)
def test_row_matmul_is_its_twin(x_shape: tuple[int, ...], k: int, n: int) -> None:
    x, weight = torch.randn(*x_shape, k), torch.randn(*x_shape[:-1], k, n)
    torch.testing.assert_close(cpu.row_matmul(x, weight), reference.row_matmul(x, weight), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("experts", "chosen", "groups", "kept"),
    [
        (1, 1, 1, 1),
        (7, 3, 1, 1),
        (7, 7, 1, 1),
        (24, 5, 8, 3),
        (12, 1, 2, 1),
        (6, 2, 6, 4),
        (16, 4, 4, 4),
        (384, 8, 1, 1),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_choose_experts_is_its_twin(experts: int, chosen: int, groups: int, kept: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(experts)
    scores = torch.rand(67, experts, generator=generator)
    scores[1], scores[2], scores[3] = 0.5, -scores[2], scores[3] * 1e-30
    bias = torch.randn(experts, generator=generator) if biased else None
    got = choose_experts(scores, bias, chosen, groups, kept)
    assert torch.equal(got, reference.choose_experts(scores, bias, chosen, groups, kept))
    assert got.dtype == torch.int64
    assert got.shape == (67, chosen)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 5)])
def test_of_equal_experts_and_groups_the_lower_is_chosen(groups: int, kept: int) -> None:
    scores = torch.randint(0, 3, (200, 16), generator=torch.Generator().manual_seed(2)).float()
    bias = torch.tensor([0.0, 1.0] * 8)
    for correction in (None, bias):
        got = choose_experts(scores, correction, 4, groups, kept)
        assert torch.equal(got, reference.choose_experts(scores, correction, 4, groups, kept))
    assert choose_experts(torch.zeros(2, 16), None, 4, groups, kept).tolist() == [[0, 1, 2, 3]] * 2


def test_a_dropped_group_is_out_even_when_all_scores_are_negative() -> None:
    scores = torch.tensor([[-1.0, -1.0, -5.0, -0.9]])  # the second group has the best expert and the worse sum
    assert choose_experts(scores, None, 2, 2, 1).tolist() == [[0, 1]]


def int4_case(t: int, k: int, n: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations and scales that bfloat16 holds exactly, and weights."""
    generator = torch.Generator().manual_seed(k + n)
    x = torch.randn(t, k, generator=generator)
    x[:, k // 2] *= 60
    weight = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, k // group_size, generator=generator) * 0.02 + 0.001
    return x.bfloat16().float(), weight, scale.bfloat16().float()


@pytest.mark.parametrize("group_size", cpu.INT4_GROUP_SIZES)
@pytest.mark.parametrize(("t", "groups", "n"), [(1, 1, 16), (7, 3, 48), (33, 2, 208), (130, 1, 64)])
def test_int4_linear_is_its_twin(t: int, groups: int, n: int, group_size: int) -> None:
    x, weight, scale = int4_case(t, groups * group_size, n, group_size)
    got = cpu.int4_linear(x, *cpu.int4_pack(weight, scale), group_size)
    expected = reference.int4_linear(x, weight, scale)
    # The result is rounded to bfloat16, each weight times its scale too: 2**-9 of what is summed.
    reach = reference.int4_linear(x.abs(), weight.abs(), scale)
    assert ((got - expected).abs() <= 2**-8 * expected.abs() + 2**-9 * reach + 1e-6).all()
    assert got.dtype == torch.float32


def test_int4_linear_tells_every_weight_and_every_group_apart() -> None:
    weight = (torch.arange(16 * 64) % 16 - 8).view(16, 64).to(torch.int8)
    scale = torch.tensor([[1.0, 2.0]]) * 2.0 ** torch.arange(-8, 8)[:, None]
    got = cpu.int4_linear(torch.eye(64), *cpu.int4_pack(weight, scale), 32)
    assert torch.equal(got, (weight.float() * scale.repeat_interleave(32, dim=1)).t())


def test_logits_of_some_tokens_are_those_of_all() -> None:
    hidden, head = torch.randn(35, 24), torch.randn(300, 24).bfloat16()
    ids = torch.tensor([5, 299, 0])
    expected = hidden @ head.float().t()[:, ids]
    torch.testing.assert_close(cpu.token_logits(hidden, head, ids), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cpu.token_logits(hidden[7:9], head, ids), cpu.token_logits(hidden, head, ids)[7:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_kernels_are_their_twins(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(150, 24), torch.randn(300, 24).to(dtype)
    token_ids = torch.randint(0, 300, (150, 3))
    expected = reference.token_logprobs(hidden, head.float(), token_ids)
    # Bfloat16 rounds inputs and logits to 8 bits: 2**-9 of the largest logit each.
    largest = (hidden @ head.float().t()).abs().max().item()
    tolerance = 2 * 2**-9 * largest if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(cpu.token_logprobs(hidden, head, token_ids), expected, rtol=0, atol=tolerance)
    assert torch.equal(cpu.argmax_token(hidden, head), reference.argmax_token(hidden, head.float()))


def test_argmax_takes_the_lowest_of_equal_tokens() -> None:
    head = torch.randn(40, 8)
    head[[31, 7, 19]] = 5.0
    assert cpu.argmax_token(torch.ones(3, 8), head).tolist() == [7, 7, 7]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 97])
def test_a_row_has_the_same_bits_among_any_others(size: int, threads: int) -> None:
    """Every kernel, 97 rows against any `size` of them, at SmolLM2's widths and on one or two threads."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, norm, head = random(97, 576), random(576).sigmoid(), random(1000, 576).bfloat16()
    weight = torch.randint(-127, 128, (960, 576), dtype=torch.int8, generator=generator)
    ids = torch.randint(0, 1000, (97, 4), generator=generator)
    router, by_head, absorbed = random(64, 576) / 24, random(97, 4, 128), random(4, 128, 96)
    int4 = torch.randint(-8, 8, (96, 576), dtype=torch.int8, generator=generator)
    packed = cpu.int4_pack(int4, random(96, 18).sigmoid())

    def everything(some: Tensor) -> list[Tensor]:
        x_int8, x_scale = rowwise.quantize_rows(x[some])
        logits = cpu.row_matmul(x[some], router.t())
        return [
            x_int8, x_scale, cpu.int8_linear(x_int8, x_scale, weight, torch.full((960,), 0.01)),
            rowwise.rms_norm(x[some], norm, 1e-5), rowwise.swiglu(x[some]),
            cpu.token_logprobs(x[some], head, ids[some]),
            cpu.argmax_token(x[some], head), rowwise.swiglu(x[some], 1.702, 7.0),
            logits, choose_experts(logits, None, 6, 8, 3), cpu.int4_linear(x[some], *packed, 32),
            cpu.row_matmul(by_head[some].transpose(0, 1), absorbed).transpose(0, 1),
        ]  # fmt: skip

    before = torch.get_num_threads()
    whole = everything(torch.arange(97))
    try:
        torch.set_num_threads(threads)
        for some in (torch.arange(size), torch.randperm(97, generator=generator)[:size]):
            for part, all_rows in zip(everything(some), whole, strict=True):
                assert torch.equal(part, all_rows[some])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("rows_", "k", "n"), [(1, 1, 1), (4, 1100, 31), (33, 1024, 16), (5, 4096, 7), (2, 20000, 3)])
def test_int8_products_with_and_without_the_instruction_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, rows_: int, k: int, n: int
) -> None:
    for seed, low in ((0, -127), (1, 127)):  # random, and sums as large as they get
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(low, 128, (rows_, k), generator=generator, dtype=torch.int8)
        weight = torch.randint(low, 128, (n, k), generator=generator, dtype=torch.int8)
        x_scale, weight_scale = torch.rand(rows_, generator=generator), torch.rand(n, generator=generator)
        expected = reference.int8_linear(x, x_scale, weight, weight_scale)
        for has_product, has_pairs in ((True, True), (False, True), (False, False)):
            if has_product and not torch.equal(torch._int_mm(x, weight.t()), reference.int8_matmul(x, weight)):
                continue  # an old processor: has_int8_product() says no there
            monkeypatch.setattr(cpu, "has_int8_product", lambda has_product=has_product: has_product)
            monkeypatch.setattr(cpu, "HAS_INT16_PAIRS", has_pairs)
            assert torch.equal(cpu.int8_linear(x, x_scale, weight, weight_scale), expected)


def test_the_int8_product_of_this_processor_is_exact_or_not_used() -> None:
    x = torch.full((3, 2048), -127, dtype=torch.int8)
    got = cpu.int8_linear(x, torch.ones(3), -x[:2].clone(), torch.ones(2))
    assert (got == -2048 * 127.0**2).all()


def test_one_wait_for_a_core_does_not_choose_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    seconds = {"int8": iter([1, 50, 1, 1, 1, 1]), "float": iter([5, 5, 5, 5, 5, 5])}

    def taking(way: str, x_int8: Tensor, weight: Tensor) -> Tensor:
        clock[0] += next(seconds[way])
        return x_int8[:1, :1]

    monkeypatch.setattr("kernels.cpu.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(cpu, "_onednn_int8_matmul", partial(taking, "int8"))
    monkeypatch.setattr(cpu, "_float_int8_matmul", partial(taking, "float"))
    assert cpu.has_int8_product.__wrapped__()
