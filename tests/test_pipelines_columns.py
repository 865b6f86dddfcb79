"""Columns, texts and hashes made at once are those made row by row, which is written out here."""

import hashlib
import math
import unicodedata
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2model.engine.request import GREEDY, Candidate, Completion, Grammar, Request, Sampling
from pipelines.annotate import hash_requests, is_visible, row_texts
from pipelines.columns import Answers, added_columns, count_labels
from pipelines.prompts import Prompts
from schemas.annotations import added_fields
from schemas.errors import BlankText, EngineFailure, RowError
from schemas.runs import Plan, Task
from schemas.tickets import TicketColumns
from tests.fakes import fake_tokenizer, text_array

CHOOSE = Task(name="policy", kind="choose", labels={"safe": "", "hate": "", "spam": ""})
MANY = Task(name="tags", kind="choose_many", labels={"bug": "", "praise": ""}, threshold=0.5)
PROMPTS = Prompts([CHOOSE, MANY], fake_tokenizer(), 4096)
LOGPROBS = st.lists(
    st.sampled_from([0.0, -0.5, -1.0, -700.0, -1e300, -math.inf]) | st.floats(-1000, 1000), min_size=7, max_size=7
)


def scored(logprobs: Sequence[float]) -> dict[str, Any]:
    """Return the task columns of one row."""
    top = max(logprobs[:3])
    weights = [math.exp(logprob - top) for logprob in logprobs[:3]]
    scores = [weight / math.fsum(weights) for weight in weights]
    best, second, _ = sorted(range(3), key=lambda i: (-scores[i], i))
    pairs = zip(logprobs[3::2], logprobs[4::2], strict=True)
    judged = [1 / (1 + math.exp(min(no - yes, 700.0))) for yes, no in pairs]
    return {
        "policy_label": list(CHOOSE.labels)[best],
        "policy_score": scores[best],
        "policy_margin": scores[best] - scores[second],
        "policy_scores": list(zip(CHOOSE.labels, scores, strict=True)),
        "tags_labels": [label for label, score in zip(MANY.labels, judged, strict=True) if score >= MANY.threshold],
        "tags_scores": list(zip(MANY.labels, judged, strict=True)),
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(LOGPROBS, max_size=4))
def test_scores_to_the_bit(rows: list[list[float]]) -> None:
    columns = PROMPTS.columns_of([[Completion(logprobs=tuple(row))] for row in rows])
    assert {len(column) for column in columns.values()} == {len(rows)}
    for number, row in enumerate(rows):
        # Of a set without any probability, what is said is not a number; repr tells such ones, and -0.0, apart.
        assert repr({name: column[number].as_py() for name, column in columns.items()}) == repr(scored(row))


IDS = st.lists(st.integers(0, 2**31), max_size=6).map(tuple)
CANDIDATES = st.lists(st.builds(Candidate, IDS, st.integers(0, 3)), max_size=2).map(tuple)
REQUESTS = st.builds(
    Request,
    prompt_ids=st.tuples(st.sampled_from([1, 3]), st.just(2), IDS).map(lambda ids: (*ids[:2], *ids[2])),
    num_prefix_tokens=st.integers(0, 2),
    candidates=CANDIDATES,
    max_tokens=st.integers(0, 2),
    stop_strings=st.sampled_from([(), ("x",)]),
    sampling=st.sampled_from([GREEDY, Sampling(), Sampling(temperature=1.0, seed=3)]),
    grammar=st.sampled_from([None, Grammar("regex", "a")]),
)


def name_of(requests: Sequence[Request]) -> str:
    """Return the prompt hash of one row."""
    numbers = array("q", [len(requests)])
    for request in requests:
        head = (len(request.prompt_ids), request.num_prefix_tokens, request.max_tokens, len(request.candidates))
        numbers.extend((*head, *request.prompt_ids))
        for candidate in request.candidates:
            numbers.extend((len(candidate.token_ids), candidate.num_scored, *candidate.token_ids))
    drawn = [(request.stop_strings, request.grammar, request.sampling) for request in requests]
    more = repr(drawn).encode() if any(how != ((), None, GREEDY) for how in drawn) else b""
    return hashlib.sha256(numbers.tobytes() + more).hexdigest()[:32]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(REQUESTS, min_size=1, max_size=3), max_size=6))
def test_hashes_are_those_of_every_row_by_itself(rows: list[list[Request]]) -> None:
    assert hash_requests(rows) == [name_of(row) for row in rows]


def told(values: Sequence[bytes | None]) -> str:
    """Return what a row of these values is: its text, or the code and message of its rejection."""
    texts = []
    for name, value in zip(("subject", "body"), values, strict=True):
        try:
            texts += [] if value is None else [value.decode()]
        except UnicodeDecodeError as error:
            shown = value[error.start : error.start + 4].hex(" ")  # type: ignore[index]
            return f'invalid_utf8 column "{name}" is not UTF-8 at byte {error.start}: {shown}'
    if not texts:
        return "null_text every text column is null: subject, body"
    visible = [text for text in texts if any(unicodedata.category(char)[0] not in "ZC" for char in text)]
    return "\n\n".join(visible) or f"blank_text no visible character among {sum(map(len, texts))}"


VALUES = st.none() | st.binary(max_size=6) | st.text(" \u200b\ue000é한x\n", max_size=4).map(str.encode)
TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=6), st.sampled_from(TYPES), st.integers(0, 6))
def test_texts_are_those_of_every_row_by_itself(
    rows: list[tuple[bytes | None, ...]], type_: pa.DataType, cut: int
) -> None:
    columns = {}
    for number, name in enumerate(("subject", "body")):
        values = [row[number] for row in rows]
        if pa.types.is_dictionary(type_):
            column = pa.DictionaryArray.from_arrays(pa.array(range(len(values)), pa.int32()), text_array(values))
        else:
            column = text_array(values, type_)
        columns[name] = pa.chunked_array([column.slice(0, cut), column.slice(cut)], type_)
    texts = row_texts(pa.table(columns), TicketColumns(id="id", text=("subject", "body")))
    shown = [f"{text.code} {text.message}" if isinstance(text, RowError) else text for text in texts]
    assert shown == [told(row) for row in rows]


def test_letters_and_digits_are_visible() -> None:
    for code in range(0x110000):
        if chr(code).isalnum():
            assert unicodedata.category(chr(code))[0] not in "ZC"
    assert is_visible("  \u200b a")


def test_a_column_of_nulls_alone_is_no_text() -> None:
    table = pa.table({"subject": pa.nulls(2), "body": ["a", None]})
    texts = row_texts(table, TicketColumns(id="id", text=("subject", "body")))
    assert [getattr(text, "code", text) for text in texts] == ["a", "null_text"]


def plan_of(prefix: str) -> Plan:
    """Return a plan of both tasks."""
    return Plan(
        run_id="r", job="j", output="out/r", columns=TicketColumns(id="id", text=("body",)), tasks=(CHOOSE, MANY),
        checkpoint="c", model_fingerprint="f" * 16, mode="cpu", max_prompt_tokens=4096, prefix=prefix, units=(),
        rejected_files=(), files=1,
    )  # fmt: skip


def answers_of(logprobs: Sequence[Sequence[float]], errors: dict[str, EngineFailure]) -> Answers:
    """Return answers `a`, `b`, ... of these scores; the last is from the cache."""
    numbers = np.arange(len(logprobs))
    return Answers(
        places={name: place for place, name in enumerate("abcdef"[: len(logprobs)])},
        errors=errors,
        columns=PROMPTS.columns_of([[Completion(logprobs=tuple(row))] for row in logprobs]),
        prompt_tokens=numbers + 100,
        cached_tokens=numbers + 50,
        computed_tokens=numbers,
        shared_tokens=numbers,
        output_tokens=numbers * 2,
        is_cached=numbers == len(logprobs) - 1,
    )


@pytest.mark.parametrize("prefix", ["", "policy_"])
def test_columns_of_rows_that_share_answers_or_have_none(prefix: str) -> None:
    plan = plan_of(prefix)
    rows = [[0.0, -1, -2, 0, -1, -1, 0], [-3.0, 0, -2, 0, -1, 0, -1]]
    bad = BlankText("nothing there")
    fates: list[str | RowError] = [bad, "b", "a", "b", bad, "a"]
    places = np.array([-1, 1, 0, 1, -1, 0])
    columns = added_columns(plan, fates, places, answers_of(rows, {}))
    assert [(name, column.type) for name, column in columns.items()] == [(f.name, f.type) for f in added_fields(plan)]
    found = [{name: column[row].as_py() for name, column in columns.items()} for row in range(6)]
    for row, place in zip(found, places, strict=True):
        for name, value in scored(rows[place]).items():
            given_value = row[f"{prefix}{name}"]
            if place < 0:
                assert given_value is None
            elif isinstance(value, float):
                assert given_value == np.float32(value)
            elif name.endswith("_scores"):
                assert given_value == [(label, np.float32(score)) for label, score in value]
            else:
                assert given_value == value
    told_of = {name: [row[f"{prefix}{name}"] for row in found] for name in ("status", "error_code", "route", "usage")}
    assert told_of["status"] == ["rejected", "annotated", "annotated", "annotated", "rejected", "annotated"]
    assert told_of["error_code"] == ["blank_text", None, None, None, "blank_text", None]
    assert told_of["route"] == [None, "cache", "large", "duplicate", None, "duplicate"]
    usage = [tuple(value.values()) if value else None for value in told_of["usage"]]
    assert usage == [None, (101, 51, 2), (100, 50, 0), (101, 101, 2), None, (100, 100, 0)]
    assert columns[f"{prefix}prompt_hash"].to_pylist() == [None, "b", "a", "b", None, "a"]
    assert set(columns[f"{prefix}model_fingerprint"].to_pylist()) == {"f" * 16}
    assert count_labels(columns, plan) == {"policy": {"safe": 2, "hate": 2, "spam": 0}, "tags": {"bug": 4, "praise": 2}}


def test_columns_without_any_answer() -> None:
    plan = plan_of("")
    for fates in ([], [BlankText("x")]):
        columns = added_columns(plan, fates, np.full(len(fates), -1), answers_of([], {}))
        assert {len(column) for column in columns.values()} == {len(fates)}
        assert count_labels(columns, plan)["policy"] == {"safe": 0, "hate": 0, "spam": 0}
