"""Guessed and forced tokens: the same answers to the bit, whatever was guessed, in fewer steps."""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.pages import PAGE
from k2model.decoder.step import KeyValues, Span, Step
from k2model.engine.engine import Engine
from k2model.engine.request import Candidate, Completion, Grammar, Request, Sampling
from k2model.engine.runner import Batch
from k2model.engine.sampler import SequenceSampler
from k2model.engine.speculation import Guesser, agreed
from tests.checkpoints import write_checkpoint
from tests.forward import float_decoder, stored_decoder
from tests.test_k2model_engine_sampler import GRAMMARS

LETTERS = Grammar("regex", "(abc|abd|xyz){2,20}")


@pytest.fixture(scope="module", params=["gpt_oss", "deepseek_v3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Return an engine of a kind of attention: with windows and sinks, and latent."""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2BATCH_CACHE", str(root / "cache"))
        opened = Engine.open(str(write_checkpoint(root / "source", family=request.param)))
    yield opened
    opened.close()


def requests(count: int, seed: int = 0) -> list[Request]:
    """Return prompts with repetition, and every way to draw and to end."""
    chance = random.Random(seed)
    made = []
    for index in range(count):
        unit = [chance.randrange(256) for _ in range(chance.randint(2, 12))]
        tail = [chance.randrange(256) for _ in range(chance.randint(0, 50))]
        made.append(
            Request(
                prompt_ids=(1, 1, 1, *unit * chance.randint(1, 6), *tail),
                max_tokens=chance.choice([1, 2, 5, 40, 70]),
                stop_ids=(257, chance.randrange(256)),
                stop_strings=chance.choice([(), ("e",), ("ab", "c")]),
                grammar=chance.choice([None, None, LETTERS, *GRAMMARS[1:]]),
                sampling=Sampling(temperature=chance.choice([0.0, 0.0, 0.0, 1.0]), seed=index),
            )
        )
    return made


class Steps:
    """Counts the forward passes and their tokens."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        forward = Decoder.forward

        def counted(decoder: Decoder, step: Step, read: list[int]) -> Tensor:
            self.sizes.append(len(step.token_ids))
            return forward(decoder, step, read)

        patch.setattr(Decoder, "forward", counted)


def plain(engine: Engine, asked: Sequence[Request]) -> list[Completion]:
    """Return answers of which every token was drawn from the model, one a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guesser, "guess", lambda *_: [])
        patch.setattr(SequenceSampler, "forced", lambda _: [])
        return engine.submit(asked).result(timeout=120)


def knowing(answers: dict[tuple[int, ...], tuple[int, ...]], share_wrong: float, seed: int = 0) -> object:
    """Return a `Guesser.guess` that knows the answers to prompts, but not their end; wrong in so many guesses."""
    chance = random.Random(seed)

    def guess(guesser: Guesser, output_ids: Sequence[int], limit: int, _: int) -> list[int]:
        answer = answers[tuple(guesser._ids)]
        made = [*answer, *[7] * 40][len(output_ids) : len(output_ids) + min(limit, chance.randint(1, 40))]
        if made and chance.random() < share_wrong:
            place = chance.randrange(len(made))
            made[place] = (made[place] + chance.randint(1, 200)) % 256
        return made

    return guess


def test_answers_are_the_same_with_right_and_wrong_guesses_alone_and_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(24)
    expected = plain(engine, asked)
    monkeypatch.setattr(Batch, "halves", lambda _: pytest.fail("a step could not be computed"))
    answers = {r.prompt_ids: c.token_ids for r, c in zip(asked, expected, strict=True)}
    assert engine.submit(asked).result(timeout=120) == expected
    assert [engine.submit([request]).result(timeout=120)[0] for request in asked[:5]] == expected[:5]
    for seed, share_wrong in enumerate((0.5, 1.0)):
        monkeypatch.setattr(Guesser, "guess", knowing(answers, share_wrong, seed))
        assert engine.submit(asked).result(timeout=120) == expected
    for made, known in zip(engine.submit(asked).result(timeout=120), expected, strict=True):
        assert made.computed_tokens <= known.computed_tokens  # wrong guesses are nobody's, forced last tokens not fed


def test_guesses_and_forced_tokens_save_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Request(prompt_ids=(1, 2, 3, index) * 4, max_tokens=60) for index in range(4)]
    expected = plain(engine, asked)
    answers = {r.prompt_ids: c.token_ids for r, c in zip(asked, expected, strict=True)}
    steps = Steps(monkeypatch)
    monkeypatch.setattr(Guesser, "guess", knowing(answers, 0.0))
    made = engine.submit(asked).result(timeout=120)
    assert made == expected
    assert len(steps.sizes) < 20  # of 60
    assert sum(steps.sizes) == sum(completion.computed_tokens for completion in made)  # nothing beyond max_tokens
    steps.sizes.clear()
    grammar = Grammar("choices", '["a long answer without any choice but its last letter: x", "z"]')
    (one,) = engine.submit([Request(prompt_ids=(1, 2, 3), max_tokens=80, grammar=grammar)]).result(timeout=120)
    assert len(one.token_ids) in (1, 55)
    assert len(steps.sizes) == 1  # nothing is left to choose behind the first letter
    assert one.computed_tokens == 3


def fed(decoder: Decoder, prompts: list[list[int]], tokens: list[list[int]], sizes: list[int]) -> list[Tensor]:
    """Return the hidden states [sum of sizes, D] of each prompt's `tokens`, fed so many at a time."""
    kept = [KeyValues(len(ids)) for ids in prompts]
    decoder.forward(decoder.step([Span(tuple(ids), keep=kv) for ids, kv in zip(prompts, kept, strict=True)]))
    states = []
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        spans = [Span(tuple(own[end - size : end]), kv, decodes=True) for own, kv in zip(tokens, kept, strict=True)]
        states.append(decoder.forward(decoder.step(spans)).view(len(prompts), size, -1))
        kept = [KeyValues(kv.end + size, kv.pages) for kv in kept]
    return [*torch.cat(states, dim=1)]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("make", [float_decoder, stored_decoder])
@torch.inference_mode()
def test_tokens_fed_together_have_the_bits_of_tokens_fed_one_by_one(
    family: str, make: Callable[[Path], Decoder], tmp_path: Path
) -> None:
    decoder = make(write_checkpoint(tmp_path, family=family))
    chance = random.Random(4)
    lengths = [1, 7, PAGE - 12, PAGE, PAGE + 7, 2 * PAGE - 5]
    prompts = [[chance.randrange(256) for _ in range(length)] for length in lengths]
    tokens = [[chance.randrange(256) for _ in range(12)] for _ in lengths]
    single = fed(decoder, prompts, tokens, [1] * 12)
    for sizes in ([12], [5, 1, 6]):
        for one, several in zip(single, fed(decoder, prompts, tokens, sizes), strict=True):
            assert torch.equal(one, several)


def test_a_guess_that_fails_the_step_does_not_fail_the_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Request(prompt_ids=(5, 6, 7, index), max_tokens=20) for index in range(6)]
    expected = plain(engine, asked)
    poison = next(i for i in range(256) if all(i not in c.token_ids and i not in (5, 6, 7) and i > 9 for c in expected))
    forward = Decoder.forward

    def failing(decoder: Decoder, step: Step, read: list[int]) -> Tensor:
        if poison in step.token_ids:
            raise ValueError("POISON")
        return forward(decoder, step, read)

    monkeypatch.setattr(Decoder, "forward", failing)
    monkeypatch.setattr(Guesser, "guess", lambda _, output_ids, limit, __: [poison] * min(2, limit))
    assert engine.submit(asked).result(timeout=120) == expected


def test_who_leaves_gives_its_pages_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was finished or failed."""
    other, pool, asked = Engine(engine.decoder, engine.tokenizer, "test"), engine.decoder.pool, requests(8)
    gc.collect()
    before, expected = len(pool.layers[0]) - pool.num_free, other.submit(asked).result(timeout=120)
    size, forward, poison = len(pool.layers[0]), Decoder.forward, asked[0].prompt_ids[3]

    def failing(decoder: Decoder, step: Step, read: list[int]) -> Tensor:
        if poison in step.token_ids:
            raise ValueError("POISON")
        return forward(decoder, step, read)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", failing)
        failed = other.submit(asked).result(timeout=120)
    assert "POISON" in failed[0].error
    assert other.submit(asked).result(timeout=120) == expected
    assert len(pool.layers[0]) == size
    other.close()
    del other
    gc.collect()
    assert len(pool.layers[0]) - pool.num_free == before


def test_guesses_give_way_where_a_step_is_full(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Request(prompt_ids=(1, 2, 3, index) * 3, max_tokens=40) for index in range(12)]
    expected = plain(engine, asked)
    answers = {r.prompt_ids: c.token_ids for r, c in zip(asked, expected, strict=True)}
    other = Engine(engine.decoder, engine.tokenizer, "test", max_num_batched_tokens=64)
    steps = Steps(monkeypatch)
    monkeypatch.setattr(Guesser, "guess", knowing(answers, 0.2))
    assert other.submit(asked).result(timeout=120) == expected
    other.close()
    assert max(steps.sizes) == 64


def test_scoring_and_draws_by_chance_are_not_guessed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guesser, "guess", lambda *_: pytest.fail("guessed"))
    candidates = (Candidate((10,), 1), Candidate((11,), 1))
    drawn = Request(prompt_ids=(1, 2), max_tokens=5, sampling=Sampling(temperature=1.0))
    done = engine.submit([Request(prompt_ids=(1, 2), candidates=candidates), drawn]).result(timeout=120)
    assert not any(completion.error for completion in done)


def test_a_guess_is_what_followed_the_same_three_tokens_last() -> None:
    guesser = Guesser([1, 2, 3, 4, 5, 1, 2, 3, 9, 8])
    assert guesser.guess([1, 2], 5, 1) == []
    assert guesser.guess([1, 2, 3], 2, 1) == [9, 8]
    assert guesser.guess([1, 2, 3], 5, 1) == [9, 8]  # the third is too unlikely to be right
    assert guesser.guess([1, 2, 3, 4, 1, 2, 3], 1, 1) == [4]
    assert guesser.guess([1, 2, 3, 4, 1, 2, 3], 0, 1) == []
    assert Guesser([1, 2]).guess([], 5, 1) == []
    assert Guesser([7] * 9).guess([7], 3, 1) == [7]  # nothing more is known to follow


def test_guesses_get_fewer_where_steps_are_large_and_where_they_are_wrong() -> None:
    prompt = [*range(40), 0, 1, 2]
    sizes = [len(Guesser(prompt).guess([], 31, count)) for count in (1, 4, 16, 40, 48, 1000)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[2], sizes[4:]) == (2, 0, [0, 0])
    guesser = Guesser(prompt)
    for _ in range(8):
        guesser.learn(5, 5)
    assert len(guesser.guess([], 31, 1)) > 10
    for _ in range(50):
        guesser.learn(5, 0)
    assert len(guesser.guess([], 31, 1)) == 1
    assert guesser.guess([], 31, 30) == []


def test_what_agrees_is_kept_with_one_token_more() -> None:
    assert agreed([], [4]) == [4]
    assert agreed([1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert agreed([1, 2, 3], [1, 9, 3, 4]) == [1, 9]
    assert agreed([1, 2], [0, 2, 3]) == [0]
