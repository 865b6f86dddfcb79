"""Scores of asked tokens against the plain twin, on tiles that hang over every edge, and the machine code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import aot, label_score, reference
from kernels.cpu import ShapeError
from tests.kernel_cases import DEVICE, poisoned_outputs, random

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARCHITECTURES = [90, 80]


def token_ids(t: int, c: int, v: int) -> Tensor:
    """Return [t, c] ids over the vocabulary, its first and its last token among them."""
    ids = torch.randint(0, v, (t, c), generator=torch.Generator().manual_seed(7))
    ids[0, 0], ids[-1, -1] = 0, v - 1
    return ids.to(DEVICE)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Score with the tiles of either card, smaller: numpy takes a second for each of the real ones."""
    key: int = request.param
    small = {90: {"BLOCK_T": 16, "BLOCK_V": 64}, 80: {"BLOCK_T": 32, "BLOCK_V": 32}}
    if DEVICE == "cpu":
        monkeypatch.setattr(label_score, "TILES", {key: label_score.TILES[key] | small[key]})
        monkeypatch.setattr(label_score, "_architecture", lambda device: key)
    return key


def tolerance(hidden: Tensor, head: Tensor) -> float:
    """Return the bound for one log-probability of operands that are exact in their dtype.

    A logit is a float32 sum of D products: at most D roundings of 2**-24 of the sum of their absolute values, plus as
    much for log2 and back. On a card, float32 operands of the normalizer are rounded to TF32's 11 bits.
    """
    largest = (hidden.double().abs() @ head.double().abs().t()).max().item()
    tf32 = 2 * 2**-11 if DEVICE == "cuda" and head.dtype == torch.float32 else 0.0
    return largest * (2 * (hidden.shape[1] + 8) * 2**-24 + tf32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "c", "d", "v"), [(1, 1, 16, 1), (7, 3, 80, 100), (18, 1, 48, 64), (3, 5, 96, 131)])
def test_token_logprobs_are_their_twin(t: int, c: int, d: int, v: int, dtype: torch.dtype, architecture: int) -> None:
    hidden, head = random(t, d, dtype=dtype), random(v, d, seed=1, dtype=dtype)
    ids = token_ids(t, c, v)
    with poisoned_outputs():
        got = label_score.token_logprobs(hidden, head, ids)
    expected = reference.token_logprobs(hidden.cpu(), head.cpu(), ids.cpu())
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=tolerance(hidden, head))


def test_hidden_rows_are_rounded_for_the_normalizer_alone(architecture: int) -> None:
    """What the CPU kernel promises too: float32 label logits, a normalizer from products in the dtype of the head."""
    hidden, head = random(5, 48), random(70, 48, seed=1, dtype=torch.bfloat16)
    ids = token_ids(5, 4, 70)
    got = label_score.token_logprobs(hidden, head, ids)
    logits = (hidden.double() @ head.double().t()).gather(1, ids)
    normalizer = torch.logsumexp(hidden.bfloat16().double() @ head.double().t(), dim=1, keepdim=True)
    torch.testing.assert_close(got.double(), logits - normalizer, rtol=0, atol=tolerance(hidden, head))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "c", "d", "v"), [(1, 1, 16, 1), (7, 3, 80, 100), (2, 4, 1040, 9)])
def test_label_logits_are_their_twin(t: int, c: int, d: int, v: int, dtype: torch.dtype) -> None:
    hidden, head = random(t, d, dtype=dtype), random(v, d, seed=1, dtype=dtype)
    ids = token_ids(t, c, v)
    with poisoned_outputs():
        got = label_score.label_logits(hidden, head, ids)
    expected = reference.label_logits(hidden.cpu(), head.cpu(), ids.cpu())
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=tolerance(hidden, head))


def test_the_whole_vocabulary_sums_to_one(architecture: int) -> None:
    hidden, head = random(2, 32), random(39, 32, seed=1)
    every = torch.arange(39, device=DEVICE).repeat(2, 1)
    total = label_score.token_logprobs(hidden, head, every).exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=2 * tolerance(hidden, head), atol=0)


@pytest.mark.parametrize("largest", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_vanish(largest: float, architecture: int) -> None:
    """One token far above the rest, in the last block; all logits far below zero, where padding's zero would win."""
    hidden = torch.zeros(3, 16, device=DEVICE)
    hidden[:, 0] = 100.0
    head = torch.zeros(70, 16, device=DEVICE)
    head[:, 0] = -abs(largest) / 100
    head[69, 0] = largest / 100
    got = label_score.token_logprobs(hidden, head, torch.tensor([[69, 0]] * 3, device=DEVICE))
    expected = reference.token_logprobs(hidden.cpu(), head.cpu(), torch.tensor([[69, 0]] * 3))
    # Logits of 1e4 in units of log 2 are rounded to 2**-24 of 1.4e4, and back.
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=4 * 1.5e4 * 2**-24)


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_a_nan_is_seen_in_its_own_row_alone(architecture: int) -> None:
    hidden, head = random(3, 16), random(40, 16, seed=1)
    hidden[1, 3] = float("nan")
    got = label_score.token_logprobs(hidden, head, token_ids(3, 2, 40))
    assert got.isnan().tolist() == [[False, False], [True, True], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_among_any_others(dtype: torch.dtype, architecture: int) -> None:
    """Alone, shuffled, and among enough rows for several blocks of tokens."""
    # Logits near each other, so that the order in which their exponentials are added shows.
    hidden, head = random(19, 48, dtype=dtype), random(100, 48, seed=1, scale=0.125, dtype=dtype)
    ids = token_ids(19, 1, 100)
    if DEVICE == "cpu":
        # The interpreter's product is BLAS's, which adds by a row's place in the tile. These sums are exact.
        hidden, head = hidden.mul(8).round().div(8), head.mul(64).round().div(64)
    whole = label_score.token_logprobs(hidden, head, ids)
    for some in (torch.tensor([18]), torch.randperm(19, generator=torch.Generator().manual_seed(4))):
        rows = some.to(DEVICE)
        assert torch.equal(label_score.token_logprobs(hidden[rows], head, ids[rows]), whole[rows])


def test_a_label_has_the_same_bits_among_any_others(architecture: int) -> None:
    hidden, head, ids = random(3, 48), random(100, 48, seed=1), token_ids(3, 5, 100)
    whole = label_score.token_logprobs(hidden, head, ids)
    for start, end in ((0, 1), (2, 5)):
        part = label_score.token_logprobs(hidden, head, ids[:, start:end].contiguous())
        assert torch.equal(part, whole[:, start:end])


def test_groups_of_token_blocks_visit_every_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks of tokens in groups of two: the last group is smaller."""
    small: dict[str, Any] = {"TMA": False, "BLOCK_T": 16, "BLOCK_V": 32, "num_warps": 4, "num_stages": 2}
    hidden, head = random(70, 16), random(90, 16, seed=1)
    expected = torch.stack(
        [torch.logsumexp(part, dim=1) for part in (hidden.double() @ head.double().t()).split(32, dim=1)], dim=1
    )
    monkeypatch.setattr(label_score, "GROUP_T", type(label_score.GROUP_T)(2))
    with poisoned_outputs():
        got = label_score._normalizer_partials(hidden, head, small)
    torch.testing.assert_close(got.double().mul(0.6931471805599453), expected, rtol=0, atol=tolerance(hidden, head))


@pytest.mark.slow
@pytest.mark.parametrize("key", ARCHITECTURES)
def test_the_real_tiles_are_their_twin(key: int) -> None:
    hidden, head = random(130, 80, dtype=torch.bfloat16), random(300, 80, seed=1, dtype=torch.bfloat16)
    got = label_score._normalizer_partials(hidden, head, label_score.TILES[key])
    width = label_score.TILES[key]["BLOCK_V"]
    logits = hidden.double() @ head.double().t()
    expected = torch.stack([torch.logsumexp(part, dim=1) for part in logits.split(width, dim=1)], dim=1)
    torch.testing.assert_close(got.double().mul(0.6931471805599453), expected, rtol=0, atol=tolerance(hidden, head))


def test_nothing_asked_is_nothing_answered() -> None:
    hidden, head = random(2, 16), random(5, 16)
    none: list[tuple[Tensor, Tensor]] = [
        (hidden[:0], torch.empty(0, 3, dtype=torch.int64, device=DEVICE)),
        (hidden, torch.empty(2, 0, dtype=torch.int64, device=DEVICE)),
    ]
    for rows, ids in none:
        assert label_score.token_logprobs(rows, head, ids).shape == ids.shape
        assert label_score.label_logits(rows, head, ids).shape == ids.shape


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, ids = random(2, 32), random(5, 32), token_ids(2, 3, 5)
    for function in (label_score.token_logprobs, label_score.label_logits):
        refused: list[Callable[[], object]] = [
            lambda function=function: function(hidden[:, :16].contiguous(), head, ids),  # type: ignore[misc]
            lambda function=function: function(hidden, head[:0], ids),  # type: ignore[misc]
            lambda function=function: function(hidden, head, ids[:1]),  # type: ignore[misc]
            lambda function=function: function(hidden, head, ids[:, 0]),  # type: ignore[misc]
            lambda function=function: function(hidden[:, :24].contiguous(), head[:, :24].contiguous(), ids),  # type: ignore[misc]
            lambda function=function: function(hidden.t().contiguous().t(), head, ids),  # type: ignore[misc]
            lambda function=function: function(hidden, head.t().contiguous().t(), ids),  # type: ignore[misc]
        ]
        for call in refused:
            with pytest.raises(ShapeError, match="hidden"):
                call()


def normalizer(capability: int, dtype: str = "bf16") -> aot.Case:
    """Return how the product with the whole embedding is launched, at D = 4096."""
    tile = dict(label_score.TILES[capability])
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    block_d = 64 if dtype == "bf16" else 32
    operands = {"hidden": f"*{dtype}", "head": f"*{dtype}"}
    if tile["TMA"]:
        operands = {
            "hidden": f"tensordesc<{dtype}[{tile['BLOCK_T']},{block_d}]>",
            "head": f"tensordesc<{dtype}[{tile['BLOCK_V']},{block_d}]>",
        }
    return aot.Case(
        kernel="kernels.label_score:_normalizer_kernel",
        types=operands | {"partials_ptr": "*fp32", "T": "i32", "V": "i32"},
        constants=tile | {"D": 4096, "BLOCK_D": block_d},
        aligned=["partials_ptr"] if tile["TMA"] else ["partials_ptr", "hidden", "head"],
        capability=capability,
        num_warps=num_warps,
        num_stages=num_stages,
        options={"enable_fp_fusion": False},
    )


def row_kernels(capability: int) -> list[aot.Case]:
    """Return how the gather of 3 labels and the merge over 150,000 tokens are launched."""
    options = {"enable_fp_fusion": False}
    gather = {"hidden_ptr": "*bf16", "head_ptr": "*bf16", "token_ids_ptr": "*i64", "logits_ptr": "*fp32"}
    merge = {"logits_ptr": "*fp32", "partials_ptr": "*fp32"}
    return [
        aot.Case(
            kernel="kernels.label_score:_label_logits_kernel",
            types=gather,
            constants={"C": 3, "D": 4096, "BLOCK_D": label_score.LABEL_BLOCK_D},
            aligned=list(gather),
            capability=capability,
            options=options,
        ),
        aot.Case(
            kernel="kernels.label_score:_logprobs_kernel",
            types=merge,
            constants={"C": 3, "SPLITS": 594, "BLOCK_C": 4, "BLOCK": 1024},
            aligned=list(merge),
            capability=capability,
            options=options,
        ),
    ]


def test_the_machine_code_has_no_faults() -> None:
    products = [normalizer(90), normalizer(90, "fp32"), normalizer(80), normalizer(80, "fp32")]
    cases = products + row_kernels(90) + row_kernels(80)
    needed = {90: ("HGMMA", "UTMALDG"), 80: ("HMMA", "LDGSTS")}
    for launched, code in zip(cases, aot.compile_cases(cases), strict=True):
        opcodes = needed[launched.capability] if launched in products else ()
        assert code.faults(launched.capability, *opcodes) == []
        assert "HMMA" in opcodes or not code.instructions.get("HMMA")
