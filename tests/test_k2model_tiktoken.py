"""Kimi's tiktoken.model: the ids of its makers, in time linear in the text, and no control token from a ticket."""

import base64
import json
import random
import time
from pathlib import Path

import pytest

from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError

FIXTURE = Path(__file__).parents[2] / "shared/fixtures/kimi_tokenizer"
CONTROL = {"261": "[EOS]", "262": "<|im_end|>", "263": "<|im_user|>"}
TEMPLATE = (
    "{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in Kimi's layout: all bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", " 专".encode()[:2]]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {key: {"content": text, "special": key != "263", **special} for key, text in CONTROL.items()}
    settings = {"added_tokens_decoder": added, "eos_token": "[EOS]", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_pieces_merge_by_rank_and_stay_within_a_word(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode("hello") == [259]
    assert tokenizer.encode("hell") == [258]
    assert tokenizer.encode("hello hello") == [259, 32, 259]
    assert tokenizer.encode("12345") == [ord(c) for c in "12345"]
    assert tokenizer.decode(tokenizer.encode("专家 ｡ﾟ\u0301 hello\r\n\t🙂")) == "专家 ｡ﾟ\u0301 hello\r\n\t🙂"


def test_what_ends_a_turn_is_found_in_the_template(folder: Path) -> None:
    """K2-Instruct's own eos, [EOS], never ends a chat turn; <|im_end|> does."""
    assert set(Tokenizer.open(folder).stop_ids) == {261, 262}


def test_no_ticket_spells_a_control_token(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    draw = random.Random(0)
    markup = [*CONTROL.values(), "<|reserved_token_300|>", "<|im_", "end|>", "\u200b", "hello", " ", "\n"]
    for _ in range(300):
        text = "".join(draw.choices(markup, k=6))
        ids = tokenizer.encode(text)
        assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_markup("<|im_user|>hello<|im_end|>") == [263, 259, 262]


@pytest.mark.parametrize(
    "unit", ["a", "A", " ", "a ", "专", "\n", " \n", "!", "\u0301", "1", "hello", "aA", "\t ", "'s"]
)
def test_a_hostile_text_takes_linear_time(folder: Path, unit: str) -> None:
    tokenizer = Tokenizer.open(folder)

    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            tokenizer.encode(text)
            times.append(time.perf_counter() - start)
        return min(times)

    # Eight times the text; a quadratic step would take 64 times as long.
    assert seconds(160_000) < 24 * seconds(20_000) + 0.05


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not base64!! 0\n", "line 1 is not a token"), (b"YQ== 0\nYg==\n", "line 2"), (b"YQ== 0\n", "not all 256 bytes")],
)
def test_a_malformed_vocabulary_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "tiktoken.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.open(folder)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tiktoken\.model"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_hostile_template_is_contained(folder: Path, template: str) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "plain"}))
    (folder / "chat_template.jinja").write_text(template)
    try:
        rendered = Tokenizer.open(folder).render([{"role": "user", "content": "hi"}])
    except (CheckpointError, OverflowError):
        return
    assert "object" not in rendered


def test_templates_may_use_what_transformers_gives_them(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
        "|{{ {'a': 'é'} | tojson }}|{{ strftime_now('%d %b %Y') }}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "there"}]
    assert Tokenizer.open(folder).render(messages) == 'hi|{"a": "é"}|26 Jul 2024'
