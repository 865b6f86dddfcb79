"""What the body of a request in a batch file asks, checked word by word. Source: OpenAI's API reference, November 2026.

What would change an answer and is not done here is refused by name; null is as good as absent.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from k2model.engine.grammar import grammar_problem
from k2model.engine.request import Grammar
from schemas.errors import BadRequest
from schemas.runs import Task

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODERATIONS = "/v1/moderations"

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_DRAWN = ("max_tokens", "temperature", "top_p", "n", "stop", "seed")
_USED = {
    CHAT: ("model", "messages", "max_completion_tokens", "response_format", *_DRAWN),
    COMPLETIONS: ("model", "prompt", *_DRAWN),
    MODERATIONS: ("model", "input"),
}

_IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "stream_options", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction"),
    )
)
"""They change who pays, how fast it goes and what is kept, but no answer."""

_INERT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "stream": (False,),
}
_INERT_BY_URL: dict[str, dict[str, tuple[Any, ...]]] = {
    CHAT: {
        **_INERT,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "reasoning_effort": ("none",),
    },
    COMPLETIONS: {**_INERT, "best_of": (1,), "echo": (False,), "suffix": ("",)},
    MODERATIONS: {},
}
"""Parameters that are not supported, with the values that ask for nothing."""

_COMPLETION_TOKENS = 16
"""The reference's own default for /v1/completions."""

_MOST_SAMPLES = 128
_MOST_TEXTS = 2048
"""Of one request. A row is computed, and fails, as a whole."""
_COLDEST = 0.01
"""The lowest temperature but 0: below it, differences of logits leave the range of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request, checked."""

    url: str
    model: str
    """As the client named it; empty if it named none."""
    texts: tuple[str, ...]
    """The contents of the messages, the prompts, or the texts to moderate."""
    roles: tuple[str, ...] = ()
    """Of the messages."""
    task: Task | None = None
    """How the answer is drawn; its `max_tokens` is 0 where none were named. None for moderations."""

    @property
    def num_answers(self) -> int:
        """Answers to give: `n` for a chat, for every prompt `n`, or one for every text to moderate."""
        samples = self.task.samples if self.task is not None else 1
        return samples if self.url == CHAT else samples * len(self.texts)


def parse_body(url: Any, body: Any) -> Call:
    """Return what a request asks. Raises: BadRequest naming the parameter at fault."""
    if url not in _USED:
        raise _wrong("url", url, f"one of {', '.join(_USED)}", reason="unsupported_url")
    if not isinstance(body, dict):
        raise _wrong("body", body, "an object")
    given = {name: value for name, value in body.items() if value is not None}
    _check_names(url, given)
    model = given.get("model", "")
    if not isinstance(model, str):
        raise _wrong("model", model, "a string")
    if url == MODERATIONS:
        return Call(url=url, model=model, texts=_inputs(given))
    if url == CHAT:
        roles, texts = _messages(given)
        return Call(url=url, model=model, roles=roles, texts=texts, task=_task(given))
    return Call(url=url, model=model, texts=_prompts(given), task=_task({"max_tokens": _COMPLETION_TOKENS, **given}))


def _check_names(url: str, given: Mapping[str, Any]) -> None:
    """Refuse what is not known, and what is not done."""
    used, inert = _USED[url], _INERT_BY_URL[url]
    for name, value in given.items():
        if name in used or name in _IGNORED:
            continue
        if name not in inert:
            near = get_close_matches(name, [*used, *inert], n=1)
            hint = f'did you mean "{near[0]}"?' if near else "remove it"
            raise BadRequest(f'"{name}" is not supported: {hint}', param=name, reason="unknown_parameter")
        if value not in inert[name]:
            what = f'"{name}" is not supported: leave it out, or say {json.dumps(inert[name][0])}'
            raise BadRequest(what, param=name, reason="unsupported_parameter")


def _messages(given: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the roles and the contents of the messages."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list of at least one message")
    roles, texts = [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _wrong(where, message, "an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
        for key, value in message.items():
            if key not in ("role", "content") and value:  # histories hold "refusal": null, "tool_calls": []
                what = f"{where}.{key} is not supported: leave it out"
                raise BadRequest(what, param=f"{where}.{key}", reason="unsupported_parameter")
        roles.append(_ROLES[role])
        texts.append(_content(f"{where}.content", message.get("content")))
    return tuple(roles), tuple(texts)


def _content(where: str, content: Any) -> str:
    """Return a message's text; of several parts, each on a line of its own, as other engines have it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _wrong(where, content, "a string, or a list of text parts")
    return "\n".join(_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        what = f"a part of type {_show(kind)} is not supported: this model reads text alone"
        raise BadRequest(what, param=where, reason="unsupported_content")
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong(f"{where}.text", text, "a string")
    return text


def _prompts(given: Mapping[str, Any]) -> tuple[str, ...]:
    prompt = given.get("prompt")
    prompts: Any = [prompt] if isinstance(prompt, str) else prompt
    if not _are_texts(prompts):
        what = f"a string or a list of up to {_MOST_TEXTS} strings, none empty; token ids are one model's own"
        raise _wrong("prompt", prompt, what)
    return tuple(prompts)


def _inputs(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("input")
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return (_content("input", value),)
    inputs: Any = [value] if isinstance(value, str) else value
    if not _are_texts(inputs):
        raise _wrong(
            "input", value, f"a string, a list of up to {_MOST_TEXTS} strings, or a list of text parts, none empty"
        )
    return tuple(inputs)


def _are_texts(values: Any) -> bool:
    if not isinstance(values, list) or not 0 < len(values) <= _MOST_TEXTS:
        return False
    return all(isinstance(text, str) and text for text in values)


def _task(given: Mapping[str, Any]) -> Task:
    """Return how the answer is drawn. Temperature and top_p are 1 where the client is silent, as the reference says."""
    temperature = _number(given, "temperature", 1.0, 2.0)
    if 0 < temperature < _COLDEST:
        raise _wrong("temperature", temperature, f"0, or a number from {_COLDEST} to 2")
    return Task(
        name="batch",
        kind="generate",
        max_tokens=_max_tokens(given),
        temperature=temperature,
        top_p=_number(given, "top_p", 1.0, 1.0),
        samples=_whole(given, "n", 1, 1, _MOST_SAMPLES),
        seed=_whole(given, "seed", 0, -(2**63), 2**63 - 1),
        stop=_stop(given),
        json_schema=_json_schema(given),
    )


def _max_tokens(given: Mapping[str, Any]) -> int:
    """Return the tokens of an answer at most; 0 if the client names none."""
    named = {_whole(given, name, 0, 1, 2**31) for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(named) > 1:
        raise BadRequest("max_tokens and max_completion_tokens differ: name one", param="max_tokens")
    return named.pop() if named else 0


def _number(given: Mapping[str, Any], name: str, default: float, most: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise _wrong(name, value, f"a number from 0 to {most:g}")
    return float(value)


def _whole(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least} to {most}")
    return value


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop", [])
    stop = [value] if isinstance(value, str) else value
    if (stop and not _are_texts(stop)) or not isinstance(stop, list):
        raise _wrong("stop", value, "a string or a list of strings, none empty")
    return tuple(stop)


def _json_schema(given: Mapping[str, Any]) -> str:
    """Return the JSON schema that the answer follows, as JSON; empty for none."""
    value = given.get("response_format", {"type": "text"})
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return '{"type": "object"}'
    named = value.get("json_schema") if kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        expected = "of type text, json_object, or json_schema with an object json_schema.schema"
        raise _wrong("response_format", value, expected)
    text = json.dumps(schema, ensure_ascii=False)
    if problem := _schema_problem(text):
        raise BadRequest(f"no answer can follow the schema: {problem}", param="response_format.json_schema.schema")
    return text


@functools.lru_cache(maxsize=256)
def _schema_problem(schema: str) -> str:
    return grammar_problem(Grammar("json_schema", schema))


def _wrong(param: str, value: Any, expected: str, reason: str = "invalid_value") -> BadRequest:
    if value is None:
        return BadRequest(f"{param} is missing: expected {expected}", param=param, reason="missing_required_parameter")
    return BadRequest(f"{param} is {_show(value)}, expected {expected}", param=param, reason=reason)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
