"""A decoder and an engine on a card against those on the CPU. Without a card, its kernels are interpreted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.compress.recipe import open_tokenizer, prepare_int8
from k2model.config import ModelConfig
from k2model.decoder.branches import Branches
from k2model.decoder.card import StackedExperts, check_sizes, find_card
from k2model.decoder.feed_forward import MixtureOfExperts
from k2model.decoder.model import Decoder
from k2model.decoder.pages import PagePool
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import KeyValues, Span
from k2model.engine.engine import Engine, is_card_lost
from k2model.engine.request import Candidate, Completion, Request, Sampling
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from schemas.errors import CheckpointError, EnvironmentMismatch
from tests.cards import CARD, card, card_decoder
from tests.checkpoints import config_json, pack_experts, write_checkpoint

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1},
    "qwen3_moe": {},
    "gpt_oss": {},
    "deepseek_v3": {"q_lora_rank": 32, "num_attention_heads": 2},
}
"""The kernels want heads of 16 and norms in 16s; each family keeps what it has of its own."""

SHARED = tuple(range(3, 21))
TREE = Branches((41, 50, 60), (0, 0, 1), (frozenset({0}), frozenset({1}), frozenset({1, 2})))
CANDIDATES = (Candidate((40, 41), 2), Candidate((40, 50, 60), 3), Candidate((70,), 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    made = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2BATCH_CACHE", str(made / "cache"))
        yield {name: write_checkpoint(made / name, 1, family=name, **options) for name, options in FAMILIES.items()}


TRIED = PRECISIONS | {"int8 alone": replace(PRECISIONS["int8"], key_values=torch.float32)}
"""`int8`'s keys are bfloat16, which hides what its products do differently."""


def cpu_decoder(folder: Path, precision: str) -> Decoder:
    chosen = TRIED[precision]
    source = open_checkpoint(str(folder)) if chosen.expand else prepare_int8(str(folder))
    return Decoder.from_weights(source.config(), source.weights(), chosen)


@torch.inference_mode()
def logits(decoder: Decoder) -> Tensor:
    """Return logits of all that attention has a way of its own for, [11, V].

    Two prompts behind a shared beginning that ends within a page, one of them with a tree, one alone, and a token that
    follows one computed before. None is so near a tie of a router's that another rounding chooses another expert.
    """
    shared, before = KeyValues(len(SHARED)), KeyValues(6)
    decoder.forward(decoder.step([Span(SHARED, keep=shared), Span(tuple(range(60, 66)), keep=before)]))
    prompts = [Span((7, 8, 9), shared, TREE), Span((17, 8), shared), Span((25, 36))]
    return decoder.logits(decoder.forward(decoder.step([*prompts, Span((33,), before, decodes=True)]))).cpu()


@pytest.mark.parametrize(
    ("family", "precision", "bits"),
    [
        ("deepseek_v3", "int8", 8),
        ("deepseek_v3", "int8 alone", 13),
        ("gpt_oss", "fp32", 24),
        *(
            pytest.param(family, precision, bits, marks=pytest.mark.soak)
            for precision, bits in (("int8", 8), ("int8 alone", 13), ("fp32", 24), ("mixed", 8), ("bf16", 8))
            for family in FAMILIES
        ),
    ],
)
def test_logits_are_those_of_the_cpu(folders: dict[str, Path], family: str, precision: str, bits: int) -> None:
    right = logits(cpu_decoder(folders[family], precision))
    with card():
        decoder = card_decoder(folders[family], TRIED[precision])
        found = logits(decoder)
    assert decoder.pool.layers[0].dtype == TRIED[precision].key_values
    if precision.startswith("int8") and family != "llama":
        assert isinstance(decoder.layers[-1].feed_forward, StackedExperts)
    # Values rounded to so many bits, sums in another order: each layer adds twice to the stream, by sums of at most
    # 2**8 terms, whose roundings grow as their root. Keys and values are bfloat16 beside INT8. Of INT8's inputs a few
    # (4) fall to the other side of a tie, each a step of 2**-7 in a sum that is 2**4 times a term: 2**-9 = 2**(4 - 13).
    largest = float(right.abs().max()) * 2**-bits * 2**4 * 2 * len(decoder.layers)
    torch.testing.assert_close(found, right, rtol=0, atol=largest)


def scored(tail: tuple[int, ...]) -> Request:
    return Request(prompt_ids=SHARED + tail, candidates=CANDIDATES)


def generated(prompt: tuple[int, ...], tokens: int, **options: Any) -> Request:
    return Request(prompt_ids=prompt, max_tokens=tokens, **options)


REQUESTS = [
    scored((7, 8)),
    scored((17,)),
    generated((*SHARED, 1), 3),
    generated(tuple(range(60, 66)), 2, sampling=Sampling(temperature=1.0, seed=3)),
]


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    completions = engine.submit(requests).result()
    assert [completion.error for completion in completions] == [""] * len(requests)
    return completions


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.soak) for f in [*FAMILIES][1:])])
def test_the_engine_answers_as_on_the_cpu_and_each_request_alone_the_same(
    folders: dict[str, Path], family: str
) -> None:
    tokenizer = open_tokenizer(open_checkpoint(str(folders[family])))
    engine = Engine(cpu_decoder(folders[family], "int8 alone"), tokenizer, "cpu")
    right = answers(engine, REQUESTS)
    engine.close()
    with card():
        decoder = card_decoder(folders[family], TRIED["int8 alone"])
        engine = Engine(decoder, tokenizer, "card")
        found = answers(engine, REQUESTS)
        alone = [answers(engine, [request])[0] for request in REQUESTS[2:0:-1]]
        engine.close()
    for expected, got in zip(right, found, strict=True):
        assert got.token_ids == expected.token_ids
        assert got.computed_tokens == expected.computed_tokens
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    # Their beginning was shared, and was not: the same bits.
    assert [(a.token_ids, a.logprobs) for a in alone] == [(f.token_ids, f.logprobs) for f in found[2:0:-1]]
    assert max(f.shared_tokens for f in found) == len(SHARED)


def test_pages_that_move_keep_what_they_hold() -> None:
    pool = PagePool(2, 1, 8, torch.float32, CARD)
    pages = pool.take(3)
    pool.layers[1][pages[1]] = 5.0
    more = pool.take(200)
    assert (pool.layers[1][pages[1]] == 5.0).all()
    assert not pool.layers[1][more].any()
    assert len({*pages, *more}) == 203


def test_where_memory_is_short_only_what_is_needed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(2, 1, 8, torch.float32, CARD)
    pages = pool.take(64)
    real = torch.Tensor.new_zeros

    def short(tensor: Tensor, *shape: int) -> Tensor:
        if shape[0] > 70 or (shape[0] == 70 and tensor is pool.layers[1]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", short)
    with pytest.raises(torch.OutOfMemoryError):
        pool.take(6)  # the second layer found no room
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda tensor, *shape: real(tensor, *shape))
    pages += pool.take(6)
    assert sorted(pages + pool.take(pool.num_free)) == [*range(pool._num_pages)]
    assert {len(layer) for layer in pool.layers} == {pool._num_pages}


def test_a_card_that_fails_ends_the_engine_and_no_request_is_blamed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(cpu_decoder(folders["llama"], "fp32"), open_tokenizer(open_checkpoint(str(folders["llama"]))), "x")

    def forward(step: object) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(type(engine.decoder), "forward", lambda decoder, step, read: forward(step))
    with pytest.raises(EnvironmentMismatch, match="the card failed: RuntimeError: Triton"):
        engine.submit([scored((1,)), scored((2,))]).result(timeout=20)
    engine.close()
    assert is_card_lost(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    assert not is_card_lost(torch.OutOfMemoryError("CUDA out of memory"))


def test_what_no_kernel_computes_is_refused_by_name(tmp_path: Path) -> None:
    for family, options, problem in [
        ("llama", {}, "the head size 8 is not within 16 and 256"),
        ("llama", {"hidden_size": 104, "head_dim": 16}, "hidden_size 104 is no multiple of 16"),
        ("qwen3", {"head_dim": 24}, "head_dim 24 is no multiple of 16"),
        ("deepseek_v3", {}, "q_lora_rank 24 is no multiple of 16"),
        ("deepseek_v3", {"q_lora_rank": 32, "kv_lora_rank": 48}, "kv_lora_rank 48 is no power of two"),
        ("qwen3_moe", {"num_experts": 513}, "513 experts are more than 512"),
    ]:
        with pytest.raises(CheckpointError, match=problem) as caught:
            check_sizes(ModelConfig.from_dict(config_json(family, **options), "test"))
        assert 'mode = "cpu"' in caught.value.remedy
    packed = pack_experts(write_checkpoint(tmp_path, family="deepseek_v3", q_lora_rank=32, moe_intermediate_size=32,
                                           hidden_size=64))  # fmt: skip
    source = open_checkpoint(str(packed))
    with pytest.raises(CheckpointError, match="INT4 weights") as caught:
        Decoder.from_weights(source.config(), source.weights(), PRECISIONS["int8"], CARD)
    assert "--int4 int8" in caught.value.remedy


def test_without_a_card_there_is_no_engine_on_one(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_card("cpu") is None
    with pytest.raises(EnvironmentMismatch, match="finds no NVIDIA card"):
        Engine.open(str(folders["llama"]), device="cuda")


def test_a_card_has_a_fingerprint_of_its_own(folders: dict[str, Path]) -> None:
    name = str(folders["llama"])
    assert fingerprint(name, "int8") == fingerprint(name, "int8", (), "cpu") != fingerprint(name, "int8", (), "cuda")


def test_experts_that_are_not_int8_are_computed_one_by_one(folders: dict[str, Path]) -> None:
    moe = card_decoder(folders["qwen3_moe"]).layers[0].feed_forward
    assert isinstance(moe, MixtureOfExperts)
    assert not isinstance(moe, StackedExperts)
    assert len(moe.experts) == 6


@pytest.mark.gpu
@pytest.mark.skipif(CARD.type != "cuda", reason="needs an NVIDIA card")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_engine_on_a_real_card(folders: dict[str, Path], family: str) -> None:
    """Opened as a job opens it: 200 requests, in one submission and one by one."""
    name = str(folders[family])
    requests = [scored((7, 8, i % 50, i)) for i in range(150)] + [generated((*SHARED, i), 9) for i in range(50)]
    on_cpu = Engine.open(name)
    right = answers(on_cpu, requests)
    on_cpu.close()
    on_card = Engine.open(name, device="cuda")
    found = answers(on_card, requests)
    again = [answers(on_card, [request])[0] for request in requests[::7]]
    on_card.close()
    assert [(a.token_ids, a.logprobs) for a in again] == [(f.token_ids, f.logprobs) for f in found[::7]]
    pairs = [*zip(right, found, strict=True)]
    assert sum(got.token_ids == expected.token_ids for expected, got in pairs) >= len(pairs) - 2  # a tie may fall
    assert all(got.logprobs == pytest.approx(expected.logprobs, abs=0.05) for expected, got in pairs)
