"""What attention does beside its products: each is its plain twin, and its bits are its own whatever stands beside."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import attention_rows, reference

DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")


def soft(scores: Tensor, bias: Tensor, rows: Tensor, sinks: Tensor | None, scale: float) -> Tensor:
    out = scores.clone()
    attention_rows.softmax_(out, bias, rows, sinks, scale)
    return out


def exact_softmax(scores: Tensor, bias: Tensor, sinks: Tensor | None, scale: float) -> Tensor:
    wide = scores.double() * scale
    wide[..., wide.shape[-1] - bias.shape[-1] :] += bias[:, None]
    if sinks is None:
        return torch.softmax(wide, dim=-1)
    column = sinks.double().view(1, -1, 1, 1).expand(*wide.shape[:3], 1)
    return torch.softmax(torch.cat([wide, column], dim=-1), dim=-1)[..., :-1]


def hidden_above_diagonal(length: int, keys: int) -> Tensor:
    return torch.zeros(1, length, keys).masked_fill_(torch.ones(length, keys).triu(1).bool(), float("-inf"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "length", "keys", "width"), [(1, 1, 1, 1, 1), (3, 6, 5, 37, 5), (2, 9, 32, 224, 32)]
)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("spread", [0.1, 4.0, 300.0])
def test_softmax_is_its_twin(
    dtype: torch.dtype, b: int, h: int, length: int, keys: int, width: int, with_sinks: bool, spread: float
) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(b, h, length, keys) * spread).to(dtype)
    bias = hidden_above_diagonal(length, width)
    sinks = torch.randn(h) * spread if with_sinks else None
    rows = torch.tensor([[0, length]] * b)
    got, expected = soft(scores, bias, rows, sinks, 0.7), exact_softmax(scores, bias, sinks, 0.7)
    # Each argument of exp is rounded once in two places, by 2**-24 of at most `spread` * 5; exp itself by 2e-7; the sum
    # by `keys` * 2**-31; and the result to `dtype`.
    argument = spread * 5 * 2**-23
    rtol = argument + 4e-7 + keys * 2**-31 + (2**-8 if dtype == torch.bfloat16 else 2**-22)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-37)
    assert (got[..., keys - width :] == 0).logical_or(bias[:, None] == 0).all()  # what is hidden weighs nothing


def test_weights_sum_to_one_over_very_many_keys() -> None:
    got = soft(torch.zeros(1, 1, 1, 100_000), torch.zeros(1, 1, 1), torch.tensor([[0, 1]]), None, 1.0)
    assert got.sum().item() == pytest.approx(1, abs=100_000 / 2**31)


def test_a_lower_sink_and_a_far_key_weigh_nothing_and_one_alone_weighs_all() -> None:
    scores = torch.tensor([[[[-500.0, 3.0]]]])
    none, rows = torch.zeros(1, 1, 1), torch.tensor([[0, 1]])
    assert soft(scores, none, rows, torch.tensor([-500.0]), 1.0).tolist() == [[[[0.0, 1.0]]]]
    assert soft(scores, none, rows, torch.tensor([500.0]), 1.0).tolist() == [[[[0.0, 0.0]]]]
    assert soft(scores - 1e4, none, rows, None, 1.0).tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000])  # of either sign: processors make the negative one
def test_a_score_that_is_none_spoils_its_row_and_no_other(dtype: torch.dtype, bits: int) -> None:
    scores = torch.zeros(1, 1, 2, 40)
    scores.view(torch.int32)[0, 0, 0, 7] = bits
    got = soft(scores.to(dtype), torch.zeros(1, 2, 1), torch.tensor([[0, 2]]), None, 1.0)
    assert got[0, 0, 0].isnan().all()
    torch.testing.assert_close(got[0, 0, 1], torch.full((40,), 1 / 40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_count_are_left_and_the_others_have_their_own_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    scores = torch.randn(40, 4, 8, 96).to(dtype)
    bias = hidden_above_diagonal(8, 8)
    rows = torch.tensor([[n % 4, 4 + n % 5] for n in range(40)])
    got = soft(scores, bias, rows, None, 0.3)
    for b, (begin, end) in enumerate(rows.tolist()):
        assert torch.equal(got[b, :, :begin], scores[b, :, :begin])
        assert torch.equal(got[b, :, end:], scores[b, :, end:])
        alone = soft(scores[b : b + 1], bias, torch.tensor([[begin, end]]), None, 0.3)  # on one thread
        assert torch.equal(alone[0], got[b])


def test_each_sequence_may_have_a_bias_of_its_own() -> None:
    scores, rows = torch.randn(2, 3, 4, 12), torch.tensor([[0, 4]] * 2)
    own = torch.stack([hidden_above_diagonal(4, 4)[0], torch.zeros(4, 4)])
    both = soft(scores, own, rows, None, 1.0)
    for b in (0, 1):
        assert torch.equal(both[b], soft(scores[b : b + 1], own[b : b + 1], rows[:1], None, 1.0)[0])


@pytest.mark.parametrize(("t", "heads", "d"), [(1, 1, 2), (7, 3, 10), (300, 12, 64)])
def test_rotating_in_place_is_its_twin(t: int, heads: int, d: int) -> None:
    torch.manual_seed(2)
    x, angles = torch.randn(t, (heads + 2) * d), torch.randn(t, d // 2)
    expected = reference.apply_rope(x[:, : heads * d].view(t, heads, d), angles.cos(), angles.sin())
    got = x.clone()
    attention_rows.rotate_(got, angles.cos(), angles.sin(), heads)
    torch.testing.assert_close(got[:, : heads * d].view(t, heads, d), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[:, heads * d :], x[:, heads * d :])


@pytest.mark.parametrize("t", [1, 41])
def test_float16_is_spread_too(t: int) -> None:
    x, out = torch.randn(t, 80), torch.full((t, 3, 2, 16), NAN, dtype=torch.float16)
    attention_rows.spread(x, 16, torch.arange(t), torch.arange(t) % 2, out)
    assert torch.equal(out[torch.arange(t), :, torch.arange(t) % 2], x[:, 16:64].to(torch.float16).view(t, 3, 16))
    assert int(out.isnan().sum()) == t * 3 * 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 41, 700])
def test_what_is_spread_is_found_again(dtype: torch.dtype, t: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(t, 5 * 16)
    x[0, :4] = torch.tensor([3.4e38, -0.0, 1e-45, float("inf")])
    block, slot = torch.arange(t) // 40, torch.randperm(t) % 40 if t < 40 else torch.arange(t) % 40
    out = torch.full((t // 40 + 1, 3, 40, 16), NAN, dtype=dtype)
    attention_rows.spread(x, 16, block, slot, out)
    rounded = x[:, 16:64].to(dtype)
    assert torch.equal(out[block, :, slot], rounded.view(t, 3, 16))
    assert int(out.isnan().sum()) == out.numel() - t * 3 * 16
    back = torch.full((t, 48), NAN)
    attention_rows.collect(out, block, slot, back)
    assert torch.equal(back, rounded.float())


def test_every_bfloat16_is_rounded_as_torch_does() -> None:
    bits = torch.arange(0, 2**32, 65_521, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(2**16, dtype=torch.int64) << 16 | 0x8000).to(torch.int32)
    x = torch.cat([bits, ties]).view(torch.float32)
    x = x[: len(x) // 16 * 16].view(-1, 16)
    out = torch.empty(len(x), 1, 1, 16, dtype=torch.bfloat16)
    attention_rows.spread(x, 0, torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64), out)
    expected = x.bfloat16()
    assert torch.equal(out.view_as(x).isnan(), expected.isnan())
    assert torch.equal(out.view_as(x)[~expected.isnan()], expected[~expected.isnan()])


def test_memory_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        attention_rows.rotate_(torch.randn(4, 8)[:, :4], torch.randn(4, 2), torch.randn(4, 2), 1)


def made() -> str:
    """Return the digest of what each makes of the same numbers."""
    torch.manual_seed(0)
    x, angles = torch.randn(40, 12 * 64) * 3, torch.randn(40, 32)
    attention_rows.rotate_(x, angles, angles, 9)
    digest = hashlib.sha256(x.numpy().tobytes())
    for dtype in DTYPES:
        scores = (torch.randn(8, 9, 32, 160) * 5).to(dtype)
        got = soft(scores, hidden_above_diagonal(32, 32), torch.tensor([[0, 32]] * 8), torch.randn(9), 0.3)
        digest.update(got.float().numpy().tobytes())
    return digest.hexdigest()


def test_bits_do_not_depend_on_the_processor() -> None:
    """Compiled for the oldest x86-64 there is, without wide registers or fused multiply-add, bits are the same."""
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    code = "from tests.test_kernels_attention_rows import made; print(made())"
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True).stdout
    assert said.strip() == made()
