"""Grammars: whatever is drawn under their masks matches, ends where it is complete, and has no control token."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from k2model.compress.recipe import copy_tokenizer
from k2model.engine.grammar import Matcher, compile_grammar, fill_masks, grammar_problem, vocabulary_of
from k2model.engine.request import Grammar
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, open_checkpoint
from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError, SpecError
from tests.fakes import fake_tokenizer

FIXTURES = Path(__file__).parents[2] / "shared/fixtures"

TRIAGE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "team": {"enum": ["billing", "technical", 'say "hi"']},
        "urgency": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "refund": {"type": ["number", "null"]},
    },
    "required": ["team", "urgency", "tags"],
    "additionalProperties": False,
}
CHOICES = ["hate", "hate speech", 'a "b" \\ c', "new\nline", "é世😀", "<|im_end|>", "a/b | {c}", "#%x"]
REGEXES = [
    r"[A-Z]{2}-\d{3,5}",
    r"(yes|no)( (maybe|surely)){0,2}",
    r"[é世😀]{1,4}",
    r"a/b\\\"?\n.",
    "(?i)ab?c|<\\|im_end\\|>",
]


def sentencepiece() -> Tokenizer:
    """Return a tokenizer of Llama 2's kind: words begin with ▁, bytes have tokens of their own."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁yes", "yes", "▁no", '":', "▁maybe", "é"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words])
    }
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    markup = tokenizers.Tokenizer(model)
    markup.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    markup.decoder = decoders.Sequence(steps)
    markup.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(
        markup=markup,
        plain=markup,
        control_ids=frozenset({0, 1, 2}),
        stop_ids=(2,),
        turn_end_id=None,
        chat_template=None,
        special_tokens={},
    )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("embedded")
    copy_tokenizer(open_checkpoint(DEFAULT_CHECKPOINT), folder)
    return Tokenizer.open(folder)


@pytest.fixture(scope="module", params=["bytes", "smollm2", "sentencepiece", "kimi"])
def tokenizer(request: pytest.FixtureRequest, embedded: Tokenizer) -> Tokenizer:
    if request.param == "kimi":
        if not FIXTURES.exists():
            pytest.skip("needs the fixtures")
        return Tokenizer.open(FIXTURES / "kimi_tokenizer")
    return {"bytes": fake_tokenizer(), "smollm2": embedded, "sentencepiece": sentencepiece()}[request.param]


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(fill_masks([matcher])[0], bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, limit: int = 400) -> str | None:
    """Return the text of a random answer under the masks, or None if it did not end within `limit` tokens."""
    chance = random.Random(seed)
    matcher = compile_grammar(grammar, tokenizer)
    ids: list[int] = []
    while len(ids) < limit and not matcher.is_finished():
        ids_allowed = allowed(matcher)
        assert max(ids_allowed) < vocabulary_of(tokenizer).size
        stops = set(ids_allowed) & tokenizer.control_ids
        assert stops == (set(tokenizer.stop_ids) if matcher.place.is_accepting() else set())
        token_id = chance.choice(ids_allowed)
        if token_id in stops:
            break
        matcher.accept(token_id)
        ids.append(token_id)
    if not matcher.place.is_accepting():
        return None
    return b"".join(vocabulary_of(tokenizer).token_bytes(token_id) for token_id in ids).decode()


def answers(grammar: Grammar, tokenizer: Tokenizer, count: int) -> list[str]:
    texts = [text for seed in range(count) if (text := walk(grammar, tokenizer, seed)) is not None]
    assert len(texts) >= count / 2
    return texts


def test_random_answers_match_the_schema(tokenizer: Tokenizer) -> None:
    for text in answers(Grammar("json_schema", json.dumps(TRIAGE)), tokenizer, 12):
        value = json.loads(text)
        assert list(value)[:3] == ["team", "urgency", "tags"]
        assert set(value) <= set(TRIAGE["properties"])
        assert value["team"] in TRIAGE["properties"]["team"]["enum"]
        assert value["urgency"] in range(1, 6)
        assert len(value["tags"]) <= 2
        assert all(len(tag) <= 6 for tag in value["tags"])
        assert isinstance(value.get("refund"), int | float | None)


@pytest.mark.parametrize("regex", REGEXES)
def test_random_answers_match_the_regex_whole(tokenizer: Tokenizer, regex: str) -> None:
    for text in answers(Grammar("regex", regex), tokenizer, 8):
        assert re.fullmatch(regex, text), text


def test_random_answers_are_one_of_the_choices_and_every_choice_is_reached(tokenizer: Tokenizer) -> None:
    grammar = Grammar("choices", json.dumps(CHOICES))
    texts = answers(grammar, tokenizer, 60)
    assert set(texts) <= set(CHOICES)
    assert len(set(texts)) >= 5
    for choice in CHOICES:
        matcher = compile_grammar(grammar, tokenizer)
        for token_id in vocabulary_of(tokenizer).spell(choice.encode()):
            assert not matcher.is_finished()
            matcher.accept(token_id)
        assert matcher.place.is_accepting()
        assert matcher.is_finished() == (choice != "hate")


def test_json_has_no_white_space_to_get_lost_in_unless_the_schema_asks_for_it() -> None:
    tokenizer = fake_tokenizer()
    properties = {"a": {"type": "boolean"}, "b": {"type": "null"}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    assert set(answers(Grammar("json_schema", json.dumps(schema)), tokenizer, 8)) == {
        '{"a": true, "b": null}', '{"a": false, "b": null}'
    }  # fmt: skip
    tight = {**schema, "x-guidance": {"key_separator": ":", "item_separator": ","}}
    assert walk(Grammar("json_schema", json.dumps(tight)), tokenizer, 0) in (
        '{"a":true,"b":null}', '{"a":false,"b":null}'
    )  # fmt: skip


def test_letters_that_spell_a_control_token_are_never_that_token() -> None:
    tokenizer = fake_tokenizer()
    markup = tokenizers.Tokenizer.from_str(tokenizer.markup.to_str())
    markup.add_tokens(["THINK"])  # not special: the library would take it for a word
    (think,) = markup.encode("THINK").ids
    tokenizer = replace(tokenizer, markup=markup, control_ids=tokenizer.control_ids | {think})
    for grammar in (Grammar("regex", r"(THINK|<\|im_end\|>|<\|im_start\|>){1,3}"), Grammar("regex", "(?s).*")):
        matcher = compile_grammar(grammar, tokenizer)
        for token_id in tokenizer.encode("THINK<|im_end|><|im_start|>"):
            control = set(allowed(matcher)) & tokenizer.control_ids
            assert control == (set(tokenizer.stop_ids) if matcher.place.is_accepting() else set())
            matcher.accept(token_id)


def test_masks_of_one_call_are_those_of_each_alone_and_filling_changes_nothing(embedded: Tokenizer) -> None:
    grammars = [
        Grammar("json_schema", json.dumps(TRIAGE)),
        Grammar("regex", REGEXES[1]),
        Grammar("choices", '["abcd","bcde"]'),
    ]
    matchers = [compile_grammar(grammar, embedded) for grammar in grammars * 3]
    for matcher, count in zip(matchers, range(9), strict=True):
        for _ in range(count // 3):
            matcher.accept(next(i for i in allowed(matcher) if i not in embedded.control_ids))
    together = fill_masks(matchers)
    assert together.shape == (9, 4 * 49152 // 32)
    for mask, matcher in zip(together, matchers, strict=True):
        assert (fill_masks([matcher])[0] == mask).all()
    assert (fill_masks(matchers) == together).all()


def test_what_is_compiled_is_kept_and_answers_do_not_share_their_place() -> None:
    tokenizer = fake_tokenizer()
    grammar = Grammar("choices", '["a","b"]')
    one, two = compile_grammar(grammar, tokenizer), compile_grammar(grammar, tokenizer)
    assert one.vocabulary is two.vocabulary
    one.accept(tokenizer.encode("a")[0])
    assert (one.is_finished(), two.is_finished()) == (True, False)
    with pytest.raises(ValueError, match="does not match the grammar"):
        two.accept(tokenizer.encode("x")[0])


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("json_schema", '{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}', "minimum (5) is greater"),
        ("json_schema", '{"x-guidance": {"bogus": 1}}', "bogus"),
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "nothing matches it"),
        ("regex", r"\d{3}", ""),
        ("choices", '["a", "b"]', ""),
        ("json_schema", "{}", ""),
    ],
)
def test_what_cannot_be_followed_is_said_in_a_line(kind: str, text: str, says: str) -> None:
    problem = grammar_problem(Grammar(kind, text))
    assert says in problem if says else problem == ""
    assert "\n" not in problem


def test_a_grammar_that_cannot_be_compiled_and_a_tokenizer_without_an_end() -> None:
    with pytest.raises(SpecError, match=r"regex \( cannot be compiled: unclosed group"):
        compile_grammar(Grammar("regex", "("), fake_tokenizer())
    with pytest.raises(SpecError, match='the grammar is "lark"'):
        compile_grammar(Grammar("lark", "start: /a/"), fake_tokenizer())
    with pytest.raises(CheckpointError, match="no token that ends a turn"):
        compile_grammar(Grammar("regex", "a"), replace(fake_tokenizer(), stop_ids=()))


def test_spelling_gives_back_the_bytes_and_no_control_token(tokenizer: Tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    for text in (b"abc", "é世😀 x".encode(), "世".encode()[1:], b"<|im_end|></s>", b" a"):
        ids = vocabulary.spell(text)
        assert b"".join(map(vocabulary.token_bytes, ids)) == text
        assert tokenizer.control_ids.isdisjoint(ids)
    assert vocabulary.token_bytes(vocabulary.size + 3) == b""
    assert {vocabulary.token_bytes(token_id) for token_id in tokenizer.stop_ids} == {b""}


def test_forced_tokens_are_those_that_the_masks_allow_alone(tokenizer: Tokenizer) -> None:
    grammars = [
        Grammar("json_schema", json.dumps(TRIAGE)),
        Grammar("choices", json.dumps(CHOICES)),
        *(Grammar("regex", regex) for regex in REGEXES),
    ]
    chance, num_forced = random.Random(6), 0
    for grammar in grammars:
        matcher = compile_grammar(grammar, tokenizer)
        for _ in range(150):
            if matcher.is_finished():
                break
            forced = matcher.forced()
            for place, token_id in enumerate(forced):
                assert allowed(matcher) == [token_id]
                assert matcher.forced() == forced[place:]
                matcher.accept(token_id)
            num_forced += len(forced)
            if matcher.is_finished():
                break
            words = [i for i in allowed(matcher) if i not in tokenizer.control_ids]
            matcher.accept(chance.choice(words))
    assert num_forced > 20


def test_masks_behind_guesses_are_those_of_the_answer_that_goes_on_so(tokenizer: Tokenizer) -> None:
    chance = random.Random(7)
    grammars = [Grammar("json_schema", json.dumps(TRIAGE)), Grammar("regex", REGEXES[1]), Grammar("regex", REGEXES[2])]
    matchers = [compile_grammar(grammar, tokenizer) for grammar in grammars]
    for _ in range(6):
        matchers = [matcher for matcher in matchers if not matcher.is_finished()]
        guesses, expected = [], []
        for matcher in matchers:
            ahead = Matcher(matcher.vocabulary, matcher.place.deep_copy())
            guess: list[int] = []
            expected.append(fill_masks([ahead])[0])
            for _ in range(chance.randint(0, 4)):
                words = [i for i in allowed(ahead) if i not in tokenizer.control_ids]
                if not words:
                    break
                guess.append(chance.choice(words))
                ahead.accept(guess[-1])
                if ahead.is_finished():
                    guess.pop()
                    break
                expected.append(fill_masks([ahead])[0])
            guesses.append(guess)
            barred = next(i for i in range(5, 400) if i not in allowed(ahead)) if not ahead.is_finished() else 5
            if not ahead.is_finished():
                assert matcher.count_possible([*guess, barred, 7]) == len(guess)
        if not matchers:
            break
        assert (fill_masks(matchers, guesses) == np.stack(expected)).all()
        assert (fill_masks(matchers) == np.stack([fill_masks([matcher])[0] for matcher in matchers])).all()
        for matcher in matchers:
            words = [i for i in allowed(matcher) if i not in tokenizer.control_ids]
            if words:
                matcher.accept(chance.choice(words))
