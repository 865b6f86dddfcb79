"""Sampling: a row's tokens are its own, grammars and stop strings are kept, distributions are what they claim."""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k2model.engine import sampler as module
from k2model.engine.grammar import vocabulary_of
from k2model.engine.request import Grammar, Request, Sampling
from k2model.engine.sampler import SequenceSampler, prepare_masks
from k2model.tokenizer import Tokenizer
from kernels import cpu, reference
from tests.fakes import fake_tokenizer
from tests.test_k2model_engine_grammar import sentencepiece

HIDDEN_SIZE = 48
NUM_ROWS = 272
"""Rows of the output embedding: 13 more than the fake tokenizer has tokens."""

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
GRAMMARS = [None, Grammar("json_schema", SCHEMA), Grammar("regex", "[a-f]{3,9}"), Grammar("choices", '["aa","ab"]')]


def head(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def states(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def started(tokenizer: Tokenizer | None = None, **options: Any) -> SequenceSampler:
    options = {"max_tokens": 64, "stop_ids": (257,), **options}
    return SequenceSampler(Request(prompt_ids=(1,), **options), tokenizer or fake_tokenizer())


def generate(sampler: SequenceSampler, hidden_seed: int, lm_head: Tensor) -> str:
    """Return the text of an answer from random hidden states."""
    for hidden in states(sampler.request.max_tokens, hidden_seed):
        (token_id,) = next_tokens(hidden[None], lm_head, [sampler])
        if sampler.accept(token_id):
            break
    return text_of(sampler)


def next_tokens(hidden: Tensor, lm_head: Tensor, samplers: list[SequenceSampler]) -> list[int]:
    """Return the next token of each sequence, of which nothing is guessed."""
    return module.next_tokens(hidden, lm_head, samplers, prepare_masks(samplers, [[]] * len(samplers)))


def text_of(sampler: SequenceSampler, tokenizer: Tokenizer | None = None) -> str:
    return (tokenizer or fake_tokenizer()).decode(sampler.output_ids)


def feed(sampler: SequenceSampler, pieces: list[str | bytes], tokenizer: Tokenizer) -> str | None:
    """Give `sampler` the tokens of each piece; return why it ended, and check that it ended with the last piece."""
    why = None
    for piece in pieces:
        assert why is None
        ids = vocabulary_of(tokenizer).spell(piece.encode() if isinstance(piece, str) else piece)
        for token_id in ids:
            assert why is None
            why = sampler.accept(token_id)
    return why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_alone_and_among_others(dtype: torch.dtype) -> None:
    lm_head, tokenizer, chance = head(dtype), fake_tokenizer(), random.Random(3)
    count = 43
    hidden = states(count)
    samplers = [
        started(
            tokenizer,
            grammar=GRAMMARS[i % 4],
            sampling=Sampling(temperature=[0.0, 0.7, 1.5][i % 3], top_p=[1.0, 0.8][i // 2 % 2], seed=i),
        )
        for i in range(count)
    ]
    for _ in range(3):
        alone = [next_tokens(row[None], lm_head, [sampler])[0] for row, sampler in zip(hidden, samplers, strict=True)]
        assert next_tokens(hidden, lm_head, samplers) == alone
        order = chance.sample(range(count), 29)
        some = next_tokens(hidden[order], lm_head, [samplers[i] for i in order])
        assert some == [alone[i] for i in order]
        for sampler, token_id in zip(samplers, alone, strict=True):
            sampler.accept(token_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_a_row_have_the_same_bits_in_every_company(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    lm_head = torch.randn(module._VOCAB_BLOCK + 77, 576, generator=generator).to(dtype)
    hidden = torch.randn(37, 576, generator=generator)
    together = module._logits(hidden, lm_head)
    assert together.shape == (37, len(lm_head))
    for some in ([0], [36], [5, 9, 30], [*range(17)], [*range(36, 3, -1)]):
        assert torch.equal(module._logits(hidden[some], lm_head), together[some])
    assert torch.allclose(together, hidden @ lm_head.float().t(), atol=1e-3)


def test_greedy_without_a_grammar_is_the_plain_argmax() -> None:
    hidden, lm_head = states(20), head(torch.bfloat16)
    plain = cpu.argmax_token(hidden, lm_head).tolist()
    assert next_tokens(hidden, lm_head, [started() for _ in range(20)]) == plain


def test_greedy_under_a_mask_is_the_best_allowed_token_and_the_lowest_of_equal_ones() -> None:
    generator = torch.Generator().manual_seed(7)
    lm_head, hidden = head(), states(80)
    for share in (0.01, 0.3, 0.99):
        allowed = torch.rand(80, NUM_ROWS, generator=generator) < share
        allowed[:, 200] = True
        expected = reference.argmax_token(hidden, lm_head, allowed)
        assert torch.equal(cpu.argmax_token(hidden, lm_head, allowed), expected)
        assert allowed.gather(1, expected[:, None]).all()
    equal = torch.ones(NUM_ROWS, HIDDEN_SIZE)
    barred = torch.ones(1, NUM_ROWS, dtype=torch.bool)
    barred[:, :5] = False
    barred[:, 7:] = False
    assert cpu.argmax_token(states(1), equal, barred).tolist() == [5]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_answers_under_a_grammar_match_it_and_end_by_themselves(temperature: float) -> None:
    lm_head = head()
    lm_head[259:] *= 50  # padding of the embedding would win every draw
    for number in range(12):
        sampling = Sampling(temperature=temperature, seed=number)
        value = json.loads(generate(started(grammar=GRAMMARS[1], sampling=sampling), number, lm_head))
        assert (value["a"] in range(100), value["b"] in ("x", "yy")) == (True, True)
        assert set(generate(started(grammar=GRAMMARS[2], sampling=sampling), number, lm_head)) <= set("abcdef")
        assert generate(started(grammar=GRAMMARS[3], sampling=sampling), number, lm_head) in ("aa", "ab")


def test_a_grammar_ends_an_answer_as_soon_as_nothing_can_follow() -> None:
    tokenizer = fake_tokenizer()
    sampler = started(tokenizer, grammar=GRAMMARS[3])
    assert feed(sampler, ["aa"], tokenizer) == "stop"
    assert text_of(sampler) == "aa"
    sampler = started(tokenizer, grammar=Grammar("choices", '["a","ab"]'))
    assert feed(sampler, ["a"], tokenizer) is None
    assert sampler.accept(257) == "stop"
    assert text_of(sampler) == "a"
    with pytest.raises(ValueError, match="does not match"):
        feed(started(tokenizer, grammar=GRAMMARS[3]), ["x"], tokenizer)


def test_a_stop_token_and_the_limit_end_an_answer() -> None:
    tokenizer = fake_tokenizer()
    sampler = started(tokenizer, max_tokens=3)
    assert [sampler.accept(token_id) for token_id in (70, 71, 257)] == [None, None, "stop"]
    assert sampler.output_ids == [70, 71]
    assert feed(started(tokenizer, max_tokens=3), ["abc"], tokenizer) == "length"
    # The stop token may be likeliest while the grammar still wants more: then it is not allowed.
    lm_head = torch.zeros(NUM_ROWS, HIDDEN_SIZE)
    lm_head[257] = 1.0
    assert next_tokens(torch.ones(1, HIDDEN_SIZE), lm_head, [started(tokenizer)]) == [257]
    bound = started(tokenizer, grammar=GRAMMARS[3])
    assert next_tokens(torch.ones(1, HIDDEN_SIZE), lm_head, [bound]) == tokenizer.encode("a")


@pytest.mark.parametrize("tokenizer", [fake_tokenizer(), sentencepiece()], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        (["\n\n"], ["one\n", "two\n", "\n"], "one\ntwo"),
        (["END"], ["E", "EN", "END"], "EEN"),
        (["aab"], ["aa", "ab"], "a"),
        (["世界"], ["世", "世", "界"], "世"),
        (["界"], ["世".encode()[:2], "世".encode()[2:] + "界".encode()[:1], "界".encode()[1:]], "世"),
        (["xyz", "y"], ["ax", "y"], "ax"),
        (["b", "abb"], ["a", "b"], "a"),
        (["bc", "abc"], ["ab", "c"], ""),
        (["<|im_end|>"], ["a<|im_end|", ">"], "a"),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(
    tokenizer: Tokenizer, stops: list[str], pieces: list[str | bytes], text: str
) -> None:
    sampler = started(tokenizer, stop_strings=tuple(stops))
    assert feed(sampler, pieces, tokenizer) == "stop"
    assert text_of(sampler, tokenizer) == text


def test_broken_characters_do_not_hide_a_stop_string() -> None:
    tokenizer = fake_tokenizer()
    sampler = started(tokenizer, stop_strings=("é",))
    assert feed(sampler, [b"\xc3", "x", b"\xc3", "é"], tokenizer) == "stop"
    assert text_of(sampler) == "\ufffdx\ufffd"


def test_letters_before_a_stop_string_in_its_own_token_are_kept() -> None:
    tokenizer = sentencepiece()
    ids = {piece: tokenizer.markup.get_vocab()[piece] for piece in ("▁yes", "a", "▁maybe", "n")}
    sampler = started(tokenizer, stop_strings=("ob", "sn"), stop_ids=(2,))
    assert [sampler.accept(ids[piece]) for piece in ("a", "▁maybe", "▁yes")] == [None] * 3
    assert sampler.accept(ids["n"]) == "stop"
    assert text_of(sampler, tokenizer) == "a maybe ye"
    assert sampler.output_ids[:2] == [ids["a"], ids["▁maybe"]]
    assert tokenizer.control_ids.isdisjoint(sampler.output_ids)
    # Two in one token: the first to be complete, as if the letters had come one by one.
    sampler = started(tokenizer, stop_strings=("maybe", "yb"), stop_ids=(2,))
    assert sampler.accept(ids["▁maybe"]) == "stop"
    assert text_of(sampler, tokenizer) == "ma"


def test_stop_strings_do_not_depend_on_where_tokens_are_cut() -> None:
    tokenizer, chance = fake_tokenizer(), random.Random(0)
    alphabet = ["a", "b", "é", "世"]
    for _ in range(300):
        text = "".join(chance.choices(alphabet, k=30))
        stops = ["".join(chance.choices(alphabet, k=chance.randint(2, 4))) for _ in range(2)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        # Bytes and characters agree: no stop string begins or ends inside a character.
        expected = text[: min(ends)[1]] if ends else text
        sampler = started(tokenizer, stop_strings=tuple(stops), max_tokens=500)
        why = None
        for token_id in tokenizer.encode(text):
            if why := sampler.accept(token_id):
                break
        assert (text_of(sampler), why) == (expected, "stop" if ends else None)


def test_a_control_token_is_no_text_for_a_stop_string() -> None:
    tokenizer = fake_tokenizer()
    sampler = started(tokenizer, stop_strings=("<|im_start|>", "ab"))
    assert [sampler.accept(i) for i in (*tokenizer.encode("a"), 256, *tokenizer.encode("b"))] == [None, None, "stop"]
    assert text_of(sampler) == ""


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    expected = torch.softmax(logits / 0.8, dim=0)
    draws = Counter(
        module._draw(logits, started(sampling=Sampling(temperature=0.8, seed=i)), None) for i in range(4000)
    )
    for token_id, probability in enumerate(expected.tolist()):
        assert draws[token_id] / 4000 == pytest.approx(probability, abs=0.025)
    assert draws[4] == 0


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3, 4]), (0.9, [1, 2, 3, 4]), (0.8, [1, 3, 4]), (0.75, [1, 3, 4]), (0.6, [1, 3]), (0.3, [1]),
     (0.31, [1, 3]), (1e-9, [1])],
)  # fmt: skip
def test_the_nucleus_is_the_fewest_likeliest_tokens_lower_ids_first(top_p: float, kept: list[int]) -> None:
    weights = np.array([0.1, 0.3, 0.1, 0.3, 0.2], dtype=np.float32) * 7
    if top_p == 0.9:
        kept = [0, 1, 3, 4]  # of the two at 0.1, the lower id
    assert np.flatnonzero(module._nucleus(weights, top_p)).tolist() == kept


def test_a_nucleus_of_many_is_that_of_a_full_sort() -> None:
    chance = np.random.default_rng(0)
    for top_p in (0.05, 0.5, 0.9, 0.999, 1 - 1e-12):
        weights = np.exp(chance.normal(size=5000) * 3).astype(np.float32)
        order = np.argsort(-weights, kind="stable")
        shares = np.cumsum(weights[order], dtype=np.float64)
        kept = order[: int((shares < top_p * shares[-1]).sum()) + 1]
        assert set(np.flatnonzero(module._nucleus(weights, top_p))) == set(kept.tolist())


def test_equal_weights_of_many_tokens_keep_the_lower_ids() -> None:
    weights = np.random.default_rng(0).integers(1, 4, size=3000).astype(np.float32)
    for top_p in (0.2, 0.6, 0.9):
        kept = module._nucleus(weights, top_p) > 0
        last = weights[kept].min()
        assert kept[weights > last].all()
        tied = kept[weights == last]
        assert (~tied).any()
        assert tied[: int(tied.sum())].all()


@pytest.mark.parametrize(("number", "token_id"), [(0.0, 2), (1 - 2**-52, 5)])
def test_the_smallest_and_the_largest_random_number_draw_a_token_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, number: float, token_id: int
) -> None:
    monkeypatch.setattr(module, "_uniform", lambda sampling, num_tokens: number)
    logits = torch.full((9,), float("-inf"))
    logits[2:6] = torch.tensor([0.1, 0.7, 0.3, -0.2])
    assert module._draw(logits, started(sampling=Sampling(temperature=1.3)), None) == token_id


def test_a_low_temperature_and_a_small_top_p_draw_the_likeliest_token() -> None:
    hidden, lm_head = states(30), head()
    greedy = next_tokens(hidden, lm_head, [started() for _ in range(30)])
    for sampling in (Sampling(temperature=0.01), Sampling(temperature=5.0, top_p=1e-6)):
        samplers = [started(sampling=replace(sampling, seed=i)) for i in range(30)]
        assert next_tokens(hidden, lm_head, samplers) == greedy


def test_the_seed_and_the_number_of_tokens_decide_the_draw() -> None:
    assert module._uniform(Sampling(seed=1), 0) == module._uniform(Sampling(seed=1, temperature=1.0), 0)
    numbers = [module._uniform(Sampling(seed=seed), count) for seed in range(100) for count in range(30)]
    assert len(set(numbers)) == 3000
    assert all(0 <= number < 1 for number in numbers)
    assert np.histogram(numbers, bins=10)[0] == pytest.approx([300] * 10, abs=70)
    assert module._uniform(Sampling(seed=7), 3) == 0.059536365062332175  # as in every version, on every machine


def test_masks_can_be_prepared_beside_the_forward_pass_and_asking_twice_changes_nothing() -> None:
    hidden, lm_head, tokenizer = states(9), head(), fake_tokenizer()
    samplers = [started(tokenizer, grammar=GRAMMARS[i % 4], sampling=Sampling(temperature=i % 2)) for i in range(9)]
    with ThreadPoolExecutor(1) as threads:
        prepared = threads.submit(prepare_masks, samplers, [[]] * 9).result()
    assert [mask is None for mask in prepared] == [i % 4 == 0 for i in range(9)]
    once = module.next_tokens(hidden, lm_head, samplers, prepared)
    assert once == module.next_tokens(hidden, lm_head, samplers, prepared) == next_tokens(hidden, lm_head, samplers)
    for sampler, token_id in zip(samplers, once, strict=True):
        assert sampler.accept(token_id) in (None, "stop")


def test_a_guess_goes_no_further_than_the_answer_can() -> None:
    a, b, x = fake_tokenizer().encode("abx")
    assert started().possible([a, b, 257, a]) == [a, b]
    assert started(grammar=GRAMMARS[3]).possible([a, b, x]) == [a, b]
    assert started(grammar=GRAMMARS[3]).possible([x, a]) == []
    assert started(grammar=GRAMMARS[3]).possible([]) == []


def test_forced_tokens_end_an_answer_as_drawn_ones_do() -> None:
    tokenizer = fake_tokenizer()
    sampler = started(tokenizer, grammar=Grammar("choices", '["abcdef","x"]'))
    assert sampler.forced() == []
    assert sampler.accept(tokenizer.encode("a")[0]) is None
    assert sampler.forced() == tokenizer.encode("bcdef")
    assert (sampler.accept_forced(), text_of(sampler)) == ("stop", "abcdef")
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"max_tokens": 4}, "length", "abcd"),
        ({"stop_strings": ("de",)}, "stop", "abc"),
        ({"stop_ids": tuple(tokenizer.encode("c"))}, "stop", "ab"),
    ]
    for options, why, text in cases:
        sampler = started(tokenizer, grammar=Grammar("choices", '["abcdef","x"]'), **options)
        assert sampler.accept(tokenizer.encode("a")[0]) is None
        assert (sampler.accept_forced(), text_of(sampler)) == (why, text)
    assert started(tokenizer).accept_forced() is None
