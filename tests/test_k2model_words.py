"""Texts cut at spaces have the ids of whole ones: on any text, for every known way to split, whatever came before."""

import json
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from k2model import words as words_module
from k2model.compress.recipe import open_tokenizer
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, open_checkpoint
from k2model.pretokenizers import parts_at_spaces, pre_tokenizer, split_by
from k2model.tokenizer import Tokenizer
from k2model.words import _CUT, Words
from tests.checkpoints import write_tokenizer
from tests.fakes import fake_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "kimi-k2")

# Whitespace of every kind, what patterns treat by itself, letters of several scripts, and anything at all.
TEXTS = st.text(
    st.sampled_from(" \u00a0\u2003\u3000\u0085\u2028\t\n\r\x0b\x1c\u200b\ufeff|/'’.,!?(-#")
    | st.sampled_from("aAsStdéßǅʰ한中文ーا0٣Ⅷ½\u0301\u094d😀\x00")
    | st.characters(exclude_categories=["Cs"])
    | st.just(" ")
)


def byte_level(name: str, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """Return a tokenizer that splits in the way of this name."""
    spelled, _ = pre_tokenizer(name, "here")
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw = json.loads(tokenizer.to_str()) | {"pre_tokenizer": spelled}
    made = tokenizers.Tokenizer.from_str(json.dumps(raw))
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """Return what is merged by itself."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def parts(text: str) -> list[str]:
    """Return `text` cut in front of every space behind a visible character."""
    first, *others = _CUT.split(text)
    return [first, *(f" {part}" for part in others)]


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return open_tokenizer(open_checkpoint(DEFAULT_CHECKPOINT))


@pytest.mark.parametrize("name", NAMES)
def test_no_piece_reaches_over_a_cut(name: str) -> None:
    tokenizer = byte_level(name)
    assert parts_at_spaces(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert "".join(parts(text)) == text
        assert [piece for part in parts(text) for piece in pieces(tokenizer, part)] == pieces(tokenizer, text)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_every_character_before_a_space(name: str) -> None:
    """What Python takes for visible may not be white space to the pattern: each of the basic plane, but for private."""
    tokenizer = byte_level(name, normalizers.NFC())
    chars = [chr(code) for code in [*range(0xD800), *range(0xF900, 0x10000)] if code < 0x3400 or code > 0xF8FF]
    text = "".join(f"{char} a" for char in chars)
    assert len(parts(text)) > 10_000
    assert [piece for part in parts(text) for piece in pieces(tokenizer, part)] == pieces(tokenizer, text)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return what a text's ids are, all of it at once."""
    return [i for i in tokenizer.plain.encode(text, add_special_tokens=False).ids if i not in tokenizer.control_ids]


def test_ids_are_those_of_whole_texts(embedded: Tokenizer) -> None:
    assert embedded.words is not None

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(TEXTS | st.sampled_from(["<|im_end|>", "a <|im_start|> b", "it's 5 | x| y", "| ", " "]), max_size=5)
    )
    def check(texts: list[str]) -> None:
        assert embedded.encode_all(texts) == [ids_of(embedded, text) for text in texts]

    check()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the tickets")
@pytest.mark.parametrize("source", ["embedded", "kimi_tokenizer", "llama"])
def test_ids_of_tickets(source: str, embedded: Tokenizer) -> None:
    tokenizer = embedded if source == "embedded" else Tokenizer.open(SHARED / "fixtures" / source)
    texts: list[str] = []
    for path in sorted((SHARED / "tickets" / "moderation").glob("*.parquet"))[::3]:
        values = pq.read_table(path, columns=["body"])["body"].cast("binary").to_pylist()
        texts += [value.decode(errors="replace") for value in values[:100] if value]
    assert len(texts) > 200
    assert tokenizer.encode_all(texts) == [ids_of(tokenizer, text) for text in texts]


def test_words_are_tokenized_once_and_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [list(text.encode()) for text in texts]

    words = Words(encode)  # type: ignore[arg-type]
    texts = ["a b a b", " b", "b  a"]
    assert words.encode(texts) == words.encode(texts) == [list(text.encode()) for text in texts]
    assert sorted(asked) == ["  a", " a", " b", " b", "a", "b"]
    monkeypatch.setattr(words_module, "MAX_SIZE", 400)
    for number in range(200):
        text = f"{number} a {number + 1}"
        assert words.encode([text, "x" * 500]) == [list(text.encode()), [120] * 500]
        assert len(words._known) <= 20


def test_threads_share_words(embedded: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "MAX_SIZE", 2000)
    texts = [f"ticket {number} of {number % 7} says {number * number}" for number in range(300)]
    expected = [ids_of(embedded, text) for text in texts]
    words = Words(embedded._encode_each)
    wrong: list[int] = []

    def work(step: int) -> None:
        for number in range(0, 300, step):
            if words.encode(texts[number : number + step]) != expected[number : number + step]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(step,)) for step in (3, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_ways_to_split_are_left_alone() -> None:
    plain = byte_level("gpt-2")
    lower, spaces, open_end, none = (byte_level("gpt-2") for _ in range(4))
    lower.normalizer = normalizers.Lowercase()
    spaces.pre_tokenizer = pre_tokenizers.Metaspace()
    none.pre_tokenizer = None
    raw = json.loads(plain.to_str()) | {"pre_tokenizer": split_by(r"\w+ \w+")}
    open_end = tokenizers.Tokenizer.from_str(json.dumps(raw))
    prefixed = byte_level("gpt-2")
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = [parts_at_spaces(tokenizer) for tokenizer in (plain, lower, spaces, open_end, none, prefixed)]
    assert found == [True, False, False, False, False, False]


def test_whole_texts_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = fake_tokenizer()
    monkeypatch.setattr("k2model.tokenizer._BATCH_CHARS", 10)
    texts = ["", "a b c", "x" * 25, "d", "", "e f", "g" * 10, ""]
    assert tokenizer._encode_each(texts) == [ids_of(tokenizer, text) for text in texts]
    assert tokenizer.encode_all([]) == tokenizer._encode_each([]) == []


def test_limits_of_the_file_cut_no_ticket(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    whole = Tokenizer.open(tmp_path)
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    path.write_text(json.dumps(raw | {"truncation": truncation, "padding": padding}))
    limited = Tokenizer.open(tmp_path)
    texts = ["one two three four", "x"]
    assert limited.encode_all(texts) == whole.encode_all(texts)
    assert len(limited.encode(texts[0])) > 3
    assert limited._encode_each(texts) == whole._encode_each(texts)
    assert limited.encode_markup(texts[0]) == whole.encode_markup(texts[0])
