"""Text to token ids and back, and the checkpoint's chat template. No torch.

Ticket text is data: `encode` never produces a control token, whatever the text spells. Only `encode_markup`, which is
given the template's own words, does. Templates are rendered in jinja's immutable sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A checkpoint's tokenizer."""

    markup: tokenizers.Tokenizer
    """Reads control tokens written in the text."""
    plain: tokenizers.Tokenizer
    """The same vocabulary and merges, with no control token to find."""
    control_ids: frozenset[int]
    stop_ids: tuple[int, ...]
    """Tokens that end a turn, ascending."""
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """`bos_token` and such, as the template may use them."""

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer of the checkpoint in `folder` (tokenizer.json, tokenizer_config.json, ...).

        Raises: CheckpointError if tokenizer.json is missing or unreadable.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{folder}: tokenizer.json is missing", remedy="put the checkpoint's tokenizer.json beside it"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            markup = tokenizers.Tokenizer.from_str(json.dumps(raw))
            # A tokenizer without added tokens has nothing to recognize in a ticket; post-processors may name them.
            plain = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": [], "post_processor": None}))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
        added = raw.get("added_tokens", [])
        settings = _read_json(folder / "tokenizer_config.json")
        special = {
            name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        stop_ids = _stop_ids(folder, markup, special["eos_token"])
        return cls(
            markup=markup,
            plain=plain,
            control_ids=frozenset(token["id"] for token in added if token.get("special")),
            stop_ids=stop_ids,
            chat_template=_chat_template(folder, settings),
            special_tokens={name: text for name, text in special.items() if text is not None},
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as data: a control token written in it is spelled out in plain tokens."""
        ids: list[int] = self.plain.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self.control_ids] if not self.control_ids.isdisjoint(ids) else ids

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

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        template = environment.from_string(self.chat_template or "")
        return template.render(messages=list(messages), add_generation_prompt=True, **self.special_tokens)


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
    """Return the ids that end a turn: generation_config.json, else config.json, and the tokenizer's own eos token."""
    stop: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None:
            stop.update(value if isinstance(value, list) else [value])
            break
    if eos_token is not None and (token_id := markup.token_to_id(eos_token)) is not None:
        stop.add(token_id)
    return tuple(sorted(stop))
