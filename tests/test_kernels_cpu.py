"""Each CPU kernel against its plain twin, on ragged and extreme shapes; and the same row, the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels import cpu, reference

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
    x_int8, x_scale = cpu.quantize_rows(x)
    expected, expected_scale = reference.quantize_rows(x)
    # absmax * (1 / 127) and absmax / 127 may differ by one rounding, so a value at a tie may fall to its other side.
    torch.testing.assert_close(x_scale, expected_scale, rtol=2**-22, atol=1e-44)
    assert (x_int8.int() - expected.int()).abs().max() <= 1
    assert (x_int8 != expected).sum() <= 1 + x.numel() * 2**-12


def test_quantize_rows_keeps_half_a_step() -> None:
    x = rows(64, 576)[8:]
    x_int8, x_scale = cpu.quantize_rows(x)
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
    x_int8, x_scale = cpu.quantize_rows(units["x"])
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
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)


def test_rope_and_swiglu_are_their_twins() -> None:
    x, angles = torch.randn(9, 3, 8), torch.randn(9, 4) * 100
    torch.testing.assert_close(
        cpu.apply_rope(x, angles.cos(), angles.sin()), reference.apply_rope(x, angles.cos(), angles.sin())
    )
    gate_up = torch.randn(7, 26) * 30
    torch.testing.assert_close(cpu.swiglu(gate_up), reference.swiglu(gate_up), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("b", "h", "g", "length", "keys"), [(1, 1, 1, 1, 1), (2, 6, 2, 5, 12), (3, 4, 4, 1, 7), (1, 9, 3, 17, 17)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_its_twin(
    b: int, h: int, g: int, length: int, keys: int, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = torch.randn(b, h, length, 8), torch.randn(b, g, keys, 8), torch.randn(b, g, keys, 8)
    visible = torch.rand(length, keys) < 0.6
    visible[:, 0] = True
    k, v = k.to(dtype), v.to(dtype)
    expected = reference.attention(q, k.float(), v.float(), visible, 0.35)
    torch.testing.assert_close(cpu.attention(q, k, v, visible, 0.35), expected, rtol=tolerance, atol=tolerance)


def test_attention_beyond_one_block_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 2, 13, 8), torch.randn(1, 1, 13, 8), torch.randn(1, 1, 13, 8)
    visible = torch.ones(13, 13, dtype=torch.bool).tril()
    monkeypatch.setattr(cpu, "_QUERY_BLOCK", 4)
    torch.testing.assert_close(cpu.attention(q, k, v, visible, 0.3), reference.attention(q, k, v, visible, 0.3))


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
    """Every kernel, the first rows of 97 against `size` of them, at SmolLM2's widths and on one or two threads."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(97, 576, generator=generator)
    norm, head = torch.rand(576, generator=generator), torch.randn(1000, 576, generator=generator).bfloat16()
    weight = torch.randint(-127, 128, (960, 576), dtype=torch.int8, generator=generator)
    ids = torch.randint(0, 1000, (97, 4), generator=generator)
    q = torch.randn(97, 9, 11, 64, generator=generator)
    k, v = torch.randn(97, 3, 40, 64, generator=generator), torch.randn(97, 3, 40, 64, generator=generator)
    visible = torch.ones(11, 40, dtype=torch.bool).tril(29)

    def everything(n: int) -> list[Tensor]:
        x_int8, x_scale = cpu.quantize_rows(x[:n])
        return [
            x_int8, x_scale, cpu.int8_linear(x_int8, x_scale, weight, torch.full((960,), 0.01)),
            cpu.rms_norm(x[:n], norm, 1e-5), cpu.swiglu(x[:n]), cpu.token_logprobs(x[:n], head, ids[:n]),
            cpu.argmax_token(x[:n], head), cpu.attention(q[:n], k[:n], v[:n], visible, 0.125),
        ]  # fmt: skip

    before = torch.get_num_threads()
    whole = everything(97)
    try:
        torch.set_num_threads(threads)
        for part, all_rows in zip(everything(size), whole, strict=True):
            assert torch.equal(part, all_rows[:size])
    finally:
        torch.set_num_threads(before)


def test_the_fallback_without_exact_hardware_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x_int8, x_scale = cpu.quantize_rows(rows(9, 1100)[5:])
    weight, weight_scale = torch.randint(-127, 128, (31, 1100), dtype=torch.int8), torch.rand(31)
    fast = cpu.int8_linear(x_int8, x_scale, weight, weight_scale)
    monkeypatch.setattr(cpu, "int8_is_exact", lambda: False)
    assert torch.equal(cpu.int8_linear(x_int8, x_scale, weight, weight_scale), fast)
