"""OpenAI's batch files: lines of requests in, lines of answers out, and the prompts between.

A line is `{"custom_id", "method", "url", "body"}`, a result `{"id", "custom_id", "response", "error"}`. A request that
fails has a response with a status and OpenAI's error object in its body, as OpenAI's own error files do; only a line
that is no request at all has `response: null` and says why in `error`. Nothing in a result depends on when, where or
beside what it was computed: ids are digests of the request, and `created` is 0.

`model` may say anything, so that existing files need no edit: the answer's `model` and `system_fingerprint` tell which
checkpoint answered. Moderation is that checkpoint's own judgement, P(yes) against P(no) for each category.

Source: OpenAI's API reference; github.com/openai/openai-openapi/issues/302 for where errors really stand.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from k2model.engine.request import Completion, Request
from k2model.tokenizer import Tokenizer
from pipelines.batch_body import CHAT, COMPLETIONS, MODERATIONS, Call, parse_body
from pipelines.prompts import Frame, Prompts
from schemas.errors import BadRequest, CheckpointError, PromptTooLong, RowError, SpecError
from schemas.runs import Task, digest

MAX_TOKENS = 1024
"""Tokens of an answer at most where the request names no number. The reference's own default is the context, but every
sequence is promised its tokens' memory before it starts: with 8,192 each, four decode at a time."""

MODERATION = Task(
    name="moderation",
    kind="choose_many",
    labels={
        "harassment": "insults or bullies someone",
        "harassment/threatening": "harasses someone and threatens harm",
        "hate": "attacks people for race, gender, religion, origin, orientation or disability",
        "hate/threatening": "hate that threatens harm",
        "illicit": "helps to commit a crime",
        "illicit/violent": "helps to commit a violent crime or to get weapons",
        "self-harm": "promotes or shows self-harm",
        "self-harm/intent": "the writer means to harm themselves",
        "self-harm/instructions": "says how to harm oneself",
        "sexual": "meant to arouse",
        "sexual/minors": "sexual, and about someone under 18",
        "violence": "shows death, violence or injury",
        "violence/graphic": "shows them in detail",
    },
)
"""The reference's categories."""

_MARK = re.compile("\ue000(\\d+)\ue000")
"""Where a message's text goes in the rendered template: private-use characters, so that no template contains them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a batch file; the columns of the table that the flow reads."""

    line: int
    """From 1."""
    custom_id: str | None
    request: str | None
    """JSON of `url` and `body`; None where there is a problem."""
    problem: str | None
    """JSON of message, param and code, and `is_request`: whether the line was a request at all."""


def read_line(number: int, raw: bytes, seen: set[str]) -> tuple[Line, str]:
    """Return a line of the input, and the model that it names.

    Args:
        number: of the line, from 1.
        raw: its bytes, with or without the end of the line.
        seen: the custom ids of the lines before it; its own is added.
    """
    custom_id: str | None = None
    is_request = False
    try:
        value = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        custom_id = _custom_id(value)
        if custom_id in seen:
            what = f'custom_id "{custom_id}" stands in a line before, too: its answer is that line\'s'
            raise BadRequest(what, param="custom_id", reason="duplicate_custom_id")
        seen.add(custom_id)
        is_request = True
        if value.get("method") != "POST":
            raise BadRequest('method is not "POST"', param="method")
        call = parse_body(value.get("url"), value.get("body"))
        request = _dump({"url": call.url, "body": value["body"]})
    except BadRequest as error:
        problem = _dump(
            {"message": error.message, "param": error.param, "code": error.reason, "is_request": is_request}
        )
        return Line(line=number, custom_id=custom_id, request=None, problem=problem), ""
    return Line(line=number, custom_id=custom_id, request=request, problem=None), call.model


def _decode(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that a line is. Raises: BadRequest."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        shown = raw[error.start : error.start + 4].hex(" ")
        what = f"the line is not UTF-8 at byte {error.start}: {shown}"
        raise BadRequest(what, reason="invalid_utf8") from None
    if not text.strip():
        raise BadRequest("the line is empty", reason="empty_line")
    try:
        value = json.loads(text)
        # JSON can spell half a character ("\\ud800"), and UTF-8 cannot.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest("the line spells half a character, such as \\ud800", reason="invalid_unicode") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the line is not JSON: {error}", reason="invalid_json_line") from None
    if not isinstance(value, dict):
        raise BadRequest("the line is not a JSON object", reason="invalid_json_line")
    return value


def _custom_id(value: Mapping[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadRequest("custom_id is missing: expected a string", param="custom_id", reason="missing_custom_id")
    return custom_id


class BatchPrompts:
    """The prompts of a batch: each row is a request of its own."""

    def __init__(self, task: Task, tokenizer: Tokenizer, max_context_tokens: int) -> None:
        """Know the checkpoint.

        Args:
            task: its `max_tokens` holds for requests that name none.
            tokenizer: the checkpoint's.
            max_context_tokens: of a prompt with its answer.
        """
        self._max_tokens = task.max_tokens
        self._tokenizer = tokenizer
        self._max_context_tokens = max_context_tokens
        self._begin_ids = tokenizer.markup.encode("").ids
        """What a text without a chat format begins with."""
        self._shapes: dict[tuple[str, ...], list[list[int] | int]] = {}
        self._moderation: Prompts | None = None

    def requests_of(self, texts: Sequence[str]) -> list[tuple[Request, ...] | RowError]:
        """Return what each `Line.request` asks, one for each answer, or why it is not asked.

        What is no JSON is a prompt: the flow's own, to try whether the model computes at all.
        """
        return [self._asked(text) for text in texts]

    def _asked(self, text: str) -> tuple[Request, ...] | RowError:
        try:
            return self.requests(text)
        except RowError as error:
            # Its traceback would keep the frames, and so the texts, of every rejected row alive.
            return error.with_traceback(None)

    def requests(self, text: str) -> tuple[Request, ...]:
        """Return what one asks. Raises: BadRequest; PromptTooLong."""
        try:
            value = json.loads(text)
        except ValueError:
            value = {"url": COMPLETIONS, "body": {"prompt": text}}
        call = parse_body(value["url"], value["body"])
        if call.task is None:
            asked = self._moderate().requests_of(call.texts)
            error = next((requests for requests in asked if isinstance(requests, RowError)), None)
            if error is not None:
                raise error
            return tuple(request for requests in asked if not isinstance(requests, RowError) for request in requests)
        if call.url == CHAT:
            prompts = [self._chat(call)]
        else:
            prompts = [[*self._begin_ids, *ids] for ids in self._tokenizer.encode_all(call.texts)]
        return tuple(request for ids in prompts for request in self._ask(ids, call.task))

    def columns_of(self, answers: Sequence[Sequence[Completion]]) -> dict[str, pa.Array]:
        """Return the column `text`: JSON of the choices, or of the categories' scores, in the order asked."""
        return {"batch_text": pa.array([_dump(self._answer(row)) for row in answers], pa.string())}

    def _answer(self, completions: Sequence[Completion]) -> Any:
        if completions[0].finish_reason:
            return [[self._tokenizer.decode(c.token_ids), c.finish_reason] for c in completions]
        return self._moderate().columns_of([[c] for c in completions])["moderation_scores"].to_pylist()

    def _ask(self, prompt_ids: Sequence[int], task: Task) -> tuple[Request, ...]:
        if not prompt_ids:
            raise BadRequest("the prompt has no token", param="prompt")
        room = self._max_context_tokens - len(prompt_ids)
        max_tokens = task.max_tokens or min(self._max_tokens, max(room, 1))
        if max_tokens > room:
            raise PromptTooLong(
                f"the model's context is {self._max_context_tokens} tokens: the prompt has {len(prompt_ids)}, and the"
                f" answer may have {max_tokens}"
            )
        frame = Frame((), (), task=replace(task, max_tokens=max_tokens))
        return frame.requests(prompt_ids, self._tokenizer.stop_ids)

    def _chat(self, call: Call) -> list[int]:
        """Return the tokens of a conversation. What its messages say is data: only the template has control tokens."""
        shape = self._shapes.get(call.roles)
        if shape is None:
            shape = self._shapes[call.roles] = self._shape(call.roles)
        ids: list[int] = []
        for part in shape:
            ids += self._tokenizer.encode(call.texts[part]) if isinstance(part, int) else part
        return ids

    def _shape(self, roles: Sequence[str]) -> list[list[int] | int]:
        """Return the chat format of messages of these roles: its tokens, and where which message's text goes."""
        messages = [{"role": role, "content": f"\ue000{i}\ue000"} for i, role in enumerate(roles)]
        try:
            parts = _MARK.split(self._tokenizer.render(messages))
        except CheckpointError as error:
            raise BadRequest(error.message, param="messages", reason="unsupported_messages") from None
        for i in sorted(set(range(len(roles))) - set(map(int, parts[1::2]))):
            what = f"the checkpoint's chat template leaves out messages[{i}]"
            raise BadRequest(what, param=f"messages[{i}]", reason="unsupported_messages")
        markup = self._tokenizer.encode_markup
        return [int(part) if place % 2 else markup(part) for place, part in enumerate(parts)]

    def _moderate(self) -> Prompts:
        """Return the prompts of moderation, made at first use: no other request needs their room in the context."""
        if self._moderation is None:
            try:
                self._moderation = Prompts((MODERATION,), self._tokenizer, self._max_context_tokens)
            except SpecError as error:
                raise BadRequest(f"this checkpoint cannot moderate: {error.message}", param="url") from None
        return self._moderation


def result_line(row: Mapping[str, Any], model: str, fingerprint: str) -> tuple[str, bool]:
    """Return the result of one row of the run, as a line without its end, and whether it is an answer.

    Args:
        row: the columns of `Line`, and those that the run added.
        model: the checkpoint's name.
        fingerprint: what it holds.
    """
    if row["problem"] is not None:
        problem = json.loads(row["problem"])
        name = digest([row["line"], row["custom_id"], row["problem"]], 32)
        if not problem.pop("is_request"):
            return _result(name, row["custom_id"], None, {**problem, "line": row["line"]}), False
        return _failure(name, row["custom_id"], 400, problem), False
    name = digest([row["custom_id"], row["request"]], 32)
    value = json.loads(row["request"])
    call = parse_body(value["url"], value["body"])
    if row["status"] != "annotated":
        return _rejection(name, row, call), False
    body = _body(name, call, json.loads(row["batch_text"]), row["usage"], model, fingerprint)
    return _result(name, row["custom_id"], _response(name, 200, body), None), True


def _rejection(name: str, row: Mapping[str, Any], call: Call) -> str:
    """Return the result of a request that the run rejected: the client's fault, or ours."""
    param = "messages" if call.url == CHAT else "input" if call.url == MODERATIONS else "prompt"
    problem = {"message": row["error_message"], "param": param, "code": row["error_code"]}
    if row["error_code"] == PromptTooLong.code:
        return _failure(name, row["custom_id"], 400, problem | {"code": "context_length_exceeded"})
    if row["error_code"] == BadRequest.code:
        return _failure(name, row["custom_id"], 400, problem)
    return _failure(name, row["custom_id"], 500, problem | {"param": None})


def _failure(name: str, custom_id: str | None, status_code: int, problem: Mapping[str, Any]) -> str:
    kind = "invalid_request_error" if status_code < 500 else "server_error"
    error = {"message": problem["message"], "type": kind, "param": problem["param"], "code": problem["code"]}
    return _result(name, custom_id, _response(name, status_code, {"error": error}), None)


def _response(name: str, status_code: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status_code, "request_id": name, "body": body}


def _result(name: str, custom_id: str | None, response: Mapping[str, Any] | None, error: Any) -> str:
    return _dump({"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error})


def _body(
    name: str, call: Call, answers: Sequence[Any], usage: Mapping[str, int], model: str, fingerprint: str
) -> dict[str, Any]:
    """Return the body of an answer in the form of its endpoint."""
    if call.task is None:
        results = [_moderated(dict(scores)) for scores in answers]
        return {"id": f"modr-{name}", "model": model, "results": results}
    # Every sample is a request with the whole prompt; a client pays for the prompt once.
    prompt_tokens = usage["prompt_tokens"] // call.task.samples
    is_chat = call.url == CHAT
    choices = []
    for index, (text, finish_reason) in enumerate(answers):
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
        choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish_reason})
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": model,
        "system_fingerprint": f"fp_{fingerprint}",
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": usage["output_tokens"],
            "total_tokens": prompt_tokens + usage["output_tokens"],
        },
    }


def _moderated(scores: Mapping[str, float]) -> dict[str, Any]:
    categories = {name: score >= MODERATION.threshold for name, score in scores.items()}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": dict(scores),
        "category_applied_input_types": {name: ["text"] for name in scores},
    }


def _dump(value: Any) -> str:
    """Return `value` as JSON in a line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
