"""What a checkpoint is worth on rows held back, and what it costs: quality, bytes, FLOPs by cause, tickets per second.

FLOPs are those of the linears of one token, and of the head. What prompts share is not counted: sharing is the engine's
doing, and takes as much off the teacher.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np

from jobs.compress_data import Question, Row
from jobs.evaluate import Answers, measures, one_hot
from k2model.compress.recipe import is_quantized
from k2model.compress.train import has_bfloat16_product
from k2model.config import ModelConfig
from k2model.engine.engine import Engine
from k2model.engine.request import Completion, Request
from k2model.flops import token_flops
from k2model.formats.checkpoint import open_checkpoint
from k2model.parameters import parameters
from pipelines.prompts import Prompts
from schemas.errors import K2Error, RowError

_ROUNDS = 2
"""Timed passes of each of two checkpoints, in turn: what else runs meanwhile slows both."""


def measure(name: str, questions: Sequence[Question], max_prompt_tokens: int) -> dict[str, Any]:
    """Return quality, bytes and FLOPs of checkpoint `name`.

    Quality is that of the weights as they are stored: INT8 where they are INT8, else in bfloat16 where the processor
    multiplies it, as they were trained, three times as fast as in float32.

    Raises: CheckpointError; K2Error if a row cannot be computed.
    """
    source = open_checkpoint(name)
    config = source.config()
    precision = "int8" if is_quantized(source) else "bf16" if has_bfloat16_product("cpu") else "fp32"
    with _opened(name, precision) as engine:
        quality = {each.name: _quality(engine, each, max_prompt_tokens) for each in questions if each.held_back}
    return {
        "precision": precision,
        "quality": quality,
        "bytes": sum(path.stat().st_size for path in source.files()),
        "bytes_float32": 4 * _stored_values(config),
        "parameters": _stored_values(config),
        "flops_per_token": flops_per_token(config),
    }


@contextmanager
def _opened(name: str, precision: str) -> Iterator[Engine]:
    engine = Engine.open(name, precision=precision)
    try:
        yield engine
    finally:
        engine.close()


def _quality(engine: Engine, question: Question, max_prompt_tokens: int) -> dict[str, float]:
    """Return accuracy and macro-F1, of rows that are too long for the model, too: they are wrong."""
    places = {label: place for place, label in enumerate(question.task.labels)}
    prompts = _prompts(engine, question, max_prompt_tokens)
    prompts.calibrate(engine)
    asked = _requests(prompts, question.held_back)
    completions = iter(_complete(engine, [request for requests in asked for request in requests]))
    columns = prompts.columns_of([[next(completions) for _ in requests] for requests in asked if requests])
    suffix = "label" if question.task.kind == "choose" else "labels"
    answers = iter(columns[f"{question.task.name}_{suffix}"].to_pylist())
    said = [next(answers) if requests else [] for requests in asked]
    given = [[labels] if isinstance(labels, str) else labels for labels in said]
    found = measures(
        Answers(
            truth=one_hot([row.truth or () for row in question.held_back], len(places)),
            given=one_hot([[places[label] for label in labels] for labels in given], len(places)),
            answered=np.array([bool(requests) for requests in asked]),
            score=None,
        )
    )
    weights = np.ones(len(asked))
    return {"rows": len(asked), **{name: round(of(weights), 4) for name, of in found.items()}}


def _prompts(engine: Engine, question: Question, max_prompt_tokens: int) -> Prompts:
    return Prompts([question.task], engine.tokenizer, min(max_prompt_tokens, engine.max_position_embeddings))


def _requests(prompts: Prompts, rows: Sequence[Row]) -> list[tuple[Request, ...]]:
    """Return what is asked of each row; nothing where the prompt is too long."""
    return [() if isinstance(asked, RowError) else asked for asked in prompts.requests_of([row.text for row in rows])]


def _complete(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    completions = engine.submit(requests).result()
    if error := next((completion.error for completion in completions if completion.error), ""):
        raise K2Error(f"the model could not compute a row: {error}", remedy="run k2batch doctor")
    return completions


def speed(name: str, beside: str, questions: Sequence[Question], rows: int, max_prompt_tokens: int) -> dict[str, float]:
    """Return INT8 tickets per second of checkpoint `name`, and their ratio to those of another, timed in turn with it.

    Args:
        name: the checkpoint; one that is not INT8 is converted first, which is kept.
        beside: the other.
        questions: rows held back are asked, the first of each; those to learn from where there are none.
        rows: asked in a pass, of all questions together.
        max_prompt_tokens: longer prompts are left out.
    """

    def rate(checkpoint: str) -> float:
        with _opened(checkpoint, "int8") as engine:  # one at a time: two loops would slow each other
            asked = _asked(engine, questions, rows, max_prompt_tokens)
            return len(asked) / _seconds(engine, asked)

    pairs = [(rate(name), rate(beside)) for _ in range(_ROUNDS)]
    return {
        "tickets_per_second": round(max(own for own, _ in pairs), 2),
        "ratio": round(statistics.median(own / other for own, other in pairs), 3),
    }


def _asked(engine: Engine, questions: Sequence[Question], rows: int, max_prompt_tokens: int) -> list[Request]:
    asked: list[Request] = []
    for question in questions:
        prompts = _prompts(engine, question, max_prompt_tokens)
        timed = (question.held_back or question.rows)[: max(1, rows // len(questions))]
        asked += chain.from_iterable(_requests(prompts, timed))
    _complete(engine, asked[:2])  # what is made once, such as the candidates' tree
    return asked


def _seconds(engine: Engine, requests: Sequence[Request]) -> float:
    start = time.perf_counter()
    _complete(engine, requests)
    return time.perf_counter() - start


def flops_per_token(config: ModelConfig) -> dict[str, int]:
    """Return the FLOPs of a token: of the `layers` as `token_flops` counts them, and of the whole `head`.

    `not_activated` are those of the experts that it is not routed to. Scoring labels computes the head's rows for the
    labels' tokens alone; a generated token, all of them.
    """
    found = token_flops(config)
    routers = sum(2 * parameter.size for parameter in parameters(config) if parameter.role == "router")
    return {
        "layers": found["token"],
        "not_activated": found["all_experts"] - found["token"] - routers,  # less the price of choosing
        "head": 2 * config.vocab_size * config.hidden_size,
    }


def flops_saved(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Return the share of the FLOPs `before`, head included, that is saved, by cause."""
    whole = before["layers"] + before["head"]
    causes = {
        "pruned": before["layers"] + before["not_activated"] - after["layers"] - after["not_activated"],
        "not_activated": after["not_activated"] - before["not_activated"],
        "vocabulary": before["head"] - after["head"],
    }
    return {cause: round(flops / whole, 4) for cause, flops in causes.items()}


def _stored_values(config: ModelConfig) -> int:
    return sum(p.size for p in parameters(config) if p.role != "head" or not config.tie_word_embeddings)
