"""Text to token ids and back, and the checkpoint's chat template. No torch.

Ticket text is data: `encode` never produces a control token, whatever the text spells. Only `encode_markup`, which is
given the template's own words, does. Templates are rendered in jinja's immutable sandbox.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from k2model.pretokenizers import parts_at_spaces
from k2model.tiktoken import tokenizer_json
from k2model.words import Words
from schemas.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A checkpoint's tokenizer."""

    markup: tokenizers.Tokenizer
    """Reads control tokens written in the text."""
    plain: tokenizers.Tokenizer
    """The same vocabulary and merges, with no control token to find."""
    control_ids: frozenset[int]
    """Added tokens, special or not: what no ticket may spell."""
    stop_ids: tuple[int, ...]
    """Tokens that end a turn, ascending: named in generation_config.json or config.json, the eos token, and what the
    template puts behind the assistant's words. Kimi-K2's config.json names one that never ends a turn."""
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """`bos_token` and such, as the template may use them."""
    turn_end_id: int | None = None
    """The token that the template puts behind the assistant's words; None if it has no such token."""
    words: Words | None = field(init=False, repr=False, compare=False)
    """Of texts so far; None where a text is more than its words."""

    def __post_init__(self) -> None:
        """Look whether words can be tokenized by themselves."""
        words = Words(self._encode_each) if parts_at_spaces(self.plain) else None
        object.__setattr__(self, "words", words)

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer of the checkpoint in `folder` (tokenizer.json or tiktoken.model, tokenizer_config.json).

        Raises: CheckpointError if both are missing, or unreadable.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        path, ranks = folder / "tokenizer.json", folder / "tiktoken.model"
        if not path.exists() and not ranks.exists():
            raise CheckpointError(
                f"{folder}: neither tokenizer.json nor tiktoken.model is there",
                remedy="put the checkpoint's tokenizer files beside its weights",
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else tokenizer_json(ranks, settings)
            # Either would make a text's ids depend on something else than the text, and cut long ones unasked.
            raw |= {"truncation": None, "padding": None}
            markup = tokenizers.Tokenizer.from_str(json.dumps(raw))
            # A tokenizer without added tokens has nothing to recognize in a ticket; post-processors may name them.
            plain = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": [], "post_processor": None}))
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
        added = raw.get("added_tokens", [])
        special = {
            name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        opened = cls(
            markup=markup,
            plain=plain,
            control_ids=frozenset(token["id"] for token in added),
            stop_ids=_stop_ids(folder, markup, special["eos_token"]),
            chat_template=_chat_template(folder, settings),
            special_tokens={name: text for name, text in special.items() if text is not None},
        )
        turn_end = opened._turn_end()
        stop_ids = tuple(sorted({*opened.stop_ids, *turn_end}))
        return replace(opened, stop_ids=stop_ids, turn_end_id=turn_end[0] if turn_end else None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as data: a control token written in it is spelled out in plain tokens."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as data, as `encode` does of one."""
        return self.words.encode(texts) if self.words else self._encode_each(texts)

    def _encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, nothing remembered."""
        rows = []
        for batch in _batches(texts):
            for encoding in self.plain.encode_batch_fast(batch, add_special_tokens=False):
                ids: list[int] = encoding.ids
                is_clean = self.control_ids.isdisjoint(ids)
                rows.append(ids if is_clean else [i for i in ids if i not in self.control_ids])
        return rows

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of `text`, with control tokens recognized. For templates, never for ticket text."""
        ids: list[int] = self.markup.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, control tokens left out."""
        text: str = self.markup.decode(list(token_ids), skip_special_tokens=True)
        return text

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return `messages` in the checkpoint's chat format, up to where the assistant speaks.

        A checkpoint without a template gets plain paragraphs. A template that refuses a system message gets its words
        at the head of the first user message.

        Raises: CheckpointError if the template cannot be rendered.
        """
        if self.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        try:
            return self._render(messages)
        except TemplateError as error:
            if messages[0]["role"] == "system" and len(messages) > 1:
                first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                return self.render([first, *messages[2:]])
            raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {error}") from error

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        def refuse(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = _TODAY.strftime
        environment.filters["tojson"] = to_json
        template = environment.from_string(self.chat_template or "")
        return template.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special_tokens
        )

    def _turn_end(self) -> list[int]:
        """Return the token behind the assistant's words in the chat format, if it is a control token."""
        if self.chat_template is None:
            return []
        words = "k2batch-words"
        conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": words}]
        try:
            rendered = self._render(conversation, add_generation_prompt=False)
        except TemplateError:
            return []
        _, found, behind = rendered.rpartition(words)
        following = self.encode_markup(behind)[:1] if found else []
        return [token_id for token_id in following if token_id in self.control_ids]


_BATCH_CHARS = 100_000
"""Of texts tokenized at once: until its ids are taken, each token is some 150 bytes."""


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield `texts` in batches of some `_BATCH_CHARS` characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what is trained on: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_TODAY = datetime.date(2024, 7, 26)
"""The date that templates print: a constant, so that a prompt is the same tomorrow. Llama 3's own default."""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _token_text(token: Any) -> str | None:
    """Return a special token's text; tokenizer_config.json spells it as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _stop_ids(folder: Path, markup: tokenizers.Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """Return the ids that the files say end a turn: generation_config.json, else config.json, and the eos token's."""
    stop: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        raw = _read_json(folder / name)
        value = raw.get("eos_token_id", (raw.get("text_config") or {}).get("eos_token_id"))
        if value is not None:
            stop.update(value if isinstance(value, list) else [value])
            break
    if eos_token is not None and (token_id := markup.token_to_id(eos_token)) is not None:
        stop.add(token_id)
    return tuple(sorted(stop))
