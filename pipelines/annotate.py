"""Rows of a unit in, the same rows with the added columns out. A row never raises: it becomes a rejected row."""

import hashlib
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import pyarrow as pa

from k2model.engine.request import GREEDY, Candidate, Completion, Request, SupportsSubmit
from k2model.tokenizer import Tokenizer
from pipelines.cache import Cache
from schemas.annotations import ROW_FIELDS, output_schema, task_columns
from schemas.errors import BlankText, EngineFailure, InvalidText, NullText, RowError
from schemas.rejects import REJECTS
from schemas.runs import Plan, Receipt, Unit
from schemas.tickets import TicketColumns


class SupportsAnnotate(SupportsSubmit, Protocol):
    """What the flow needs of an opened model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the checkpoint's tokenizer."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return the digest of what was opened."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Return the longest context in tokens."""
        ...


OpenEngine = Callable[[Plan], SupportsAnnotate]
"""Opens the model in a worker; an importable function, since its name is what travels."""


class SupportsPrompts(Protocol):
    """What the flow needs of the prompts."""

    def requests(self, text: str) -> tuple[Request, ...]:
        """Return all requests of one row. Raises: RowError."""
        ...

    def answers(self, completions: Sequence[Completion]) -> dict[str, object]:
        """Return the values of the task columns, by name without prefix."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """A unit with its rows, between reading and annotating."""

    unit: Unit
    table: pa.Table
    started: float
    """`time.perf_counter()` when the unit was begun."""
    attempts: int = 1
    """Begun at this unit, this one too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedBlock:
    """A unit with its output rows, ready to commit."""

    unit: Unit
    table: pa.Table
    rejects: pa.Table
    rows_cached: int
    labels: dict[str, dict[str, int]]
    error_codes: dict[str, int]
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    started: float
    engine_busy: float
    attempts: int

    def receipt(self, *, attempt: str, data: str, data_sha256: str, rejects: str | None) -> Receipt:
        """Return the receipt of this block, stored under these file names."""
        return Receipt(
            unit_id=self.unit.unit_id,
            attempt=attempt,
            data=data,
            data_sha256=data_sha256,
            rejects=rejects,
            rows=self.table.num_rows,
            rows_annotated=self.table.num_rows - self.rejects.num_rows,
            rows_rejected=self.rejects.num_rows,
            rows_cached=self.rows_cached,
            error_codes=self.error_codes,
            labels=self.labels,
            prompt_tokens=self.prompt_tokens,
            computed_tokens=self.computed_tokens,
            output_tokens=self.output_tokens,
            seconds=round(time.perf_counter() - self.started, 3),
            engine_busy=self.engine_busy,
            attempts=self.attempts,
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests of one row, and their name."""

    requests: tuple[Request, ...]
    prompt_hash: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What the model said to one `Asked`."""

    answers: Mapping[str, object]
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts: the instructions, which all rows share. What else was shared depends on the rows beside it."""
    computed_tokens: int
    output_tokens: int
    route: str
    """Of the first row that asks: `large` or `cache`."""


def annotate(
    block: Block, plan: Plan, prompts: SupportsPrompts, engine: SupportsSubmit, cache: Cache | None = None
) -> AnnotatedBlock:
    """Return the block's rows, in order, with every added column.

    Texts that give the same requests are asked once; the first such row has route `large`, or `cache` if an earlier run
    had its answer, the others `duplicate`. But for `route` and `usage`, a row is the same with and without a cache.
    """
    began, busy_before = time.perf_counter(), engine.busy_seconds
    asked_for = ask(row_texts(block.table, plan.columns), prompts)
    distinct = {fate.prompt_hash: fate for fate in asked_for if isinstance(fate, Asked)}
    outcomes = answer_all(distinct, prompts, engine, cache, block.unit.unit_id)
    answered = {name: answer for name, answer in outcomes.items() if isinstance(answer, Answered)}
    busy = (engine.busy_seconds - busy_before) / (time.perf_counter() - began)
    fates = [_fate(fate, outcomes) for fate in asked_for]
    columns = _columns(fates, answered, plan)
    schema = output_schema(block.table.schema, plan)
    added = [pa.array(columns[name], schema.field(index).type) for index, name in _added(schema, block.table)]
    table = pa.Table.from_arrays([*block.table.columns, *added], schema=schema)
    rejects = _rejects(block, fates, plan)
    asked = [answered[fate.prompt_hash] for fate in fates if isinstance(fate, Asked)]
    return AnnotatedBlock(
        unit=block.unit,
        table=table,
        rejects=rejects,
        rows_cached=columns[f"{plan.prefix}route"].count("cache"),
        labels=_count_labels(columns, plan),
        error_codes=dict(sorted(Counter(rejects.column("error_code").to_pylist()).items())),
        prompt_tokens=sum(answer.prompt_tokens for answer in asked),
        computed_tokens=sum(answer.computed_tokens for answer in answered.values()),
        output_tokens=sum(answer.output_tokens for answer in asked),
        started=block.started,
        attempts=block.attempts,
        engine_busy=round(min(1.0, busy), 3),
    )


def _added(schema: pa.Schema, table: pa.Table) -> list[tuple[int, str]]:
    return [(index, schema.field(index).name) for index in range(table.num_columns, len(schema))]


def row_texts(table: pa.Table, columns: TicketColumns) -> list[str | RowError]:
    """Return the text of each row, or why it has none.

    The text is the non-blank text columns joined by a blank line. Bytes that are not UTF-8 reject the row, even beside
    a good column: what they said is unknown.
    """
    names = columns.present(table.schema)
    if not names:
        return [NullText("the file has no text column") for _ in range(table.num_rows)]
    values = [raw_bytes(table.column(name)) for name in names]
    return [_row_text(names, row) for row in zip(*values, strict=True)]


def raw_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    """Return the bytes of each value of a text column, unchecked: pyarrow's own text conversion raises on bad UTF-8."""
    type_ = column.type
    if pa.types.is_dictionary(type_):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], type=type_.value_type)
        type_ = column.type
    if pa.types.is_large_string(type_):
        binary = pa.large_binary()
    elif pa.types.is_string_view(type_):
        binary = pa.binary_view()
    else:
        binary = pa.binary()
    values: list[bytes | None] = column.cast(binary).to_pylist()
    return values


def _row_text(names: Sequence[str], row: Sequence[bytes | None]) -> str | RowError:
    texts: list[str] = []
    for name, value in zip(names, row, strict=True):
        if value is None:
            continue
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            shown = value[error.start : error.start + 4].hex(" ")
            return InvalidText(f'column "{name}" is not UTF-8 at byte {error.start}: {shown}')
    if not texts:
        return NullText(f"every text column is null: {', '.join(names)}")
    visible = [text for text in texts if is_visible(text)]
    if not visible:
        length = sum(len(text) for text in texts)
        return BlankText(f"no visible character among {length}")
    return "\n\n".join(visible)


def is_visible(text: str) -> bool:
    """Return whether any character shows: not white space, separator (Z*) or other (C*, such as U+200B)."""
    return any(unicodedata.category(char)[0] not in "ZC" for char in text)


def ask(texts: Sequence[str | RowError], prompts: SupportsPrompts) -> list[Asked | RowError]:
    """Return the requests of each row, or why there are none; each distinct text is tokenized once."""
    known: dict[str, Asked | RowError] = {}
    fates: list[Asked | RowError] = []
    for text in texts:
        if isinstance(text, RowError):
            fates.append(text)
            continue
        fate = known.get(text)
        if fate is None:
            try:
                requests = prompts.requests(text)
                fate = Asked(requests, hash_requests(requests))
            except RowError as error:
                # Its traceback would keep the frames, and so the texts, of every rejected row alive.
                fate = error.with_traceback(None)
            known[text] = fate
        fates.append(fate)
    return fates


def hash_requests(requests: Sequence[Request]) -> str:
    """Return 32 hex digits that name all that `requests` ask: prompts, candidates, limits, and how tokens are drawn."""
    # Every list is preceded by its length, so that no two different requests give the same numbers.
    names = hashlib.sha256(array("q", [len(requests)]))
    for request in requests:
        head = (len(request.prompt_ids), request.num_prefix_tokens, request.max_tokens, len(request.candidates))
        names.update(array("q", (*head, *request.prompt_ids)))
        names.update(_candidate_numbers(request.candidates))
    drawn = [(request.stop_strings, request.grammar, request.sampling) for request in requests]
    if any(how != ((), None, GREEDY) for how in drawn):
        names.update(repr(drawn).encode())
    return names.hexdigest()[:32]


@lru_cache(maxsize=64)
def _candidate_numbers(candidates: tuple[Candidate, ...]) -> bytes:
    """Return what names the candidates; all rows of a job have the same, and these are most of what is named."""
    numbers = array("q")
    for candidate in candidates:
        numbers.extend((len(candidate.token_ids), candidate.num_scored))
        numbers.extend(candidate.token_ids)
    return numbers.tobytes()


def _fate(fate: Asked | RowError, outcomes: Mapping[str, "Answered | RowError"]) -> Asked | RowError:
    """Return `fate`, or why the engine had no answer."""
    outcome = outcomes.get(fate.prompt_hash) if isinstance(fate, Asked) else None
    return outcome if isinstance(outcome, RowError) else fate


def answer_all(
    distinct: Mapping[str, Asked],
    prompts: SupportsPrompts,
    engine: SupportsSubmit,
    cache: Cache | None = None,
    unit_id: str = "",
) -> dict[str, Answered | RowError]:
    """Return the answer to each of `distinct`, or why there is none; what no cache knows is asked in one submission."""
    known = cache.lookup({name: len(asked.requests) for name, asked in distinct.items()}) if cache else {}
    requests = [request for name, asked in distinct.items() if name not in known for request in asked.requests]
    completions = iter(engine.submit(requests).result() if requests else ())
    computed = {
        name: [next(completions) for _ in asked.requests] for name, asked in distinct.items() if name not in known
    }
    if cache:
        cache.store(unit_id, {name: own for name, own in computed.items() if not any(one.error for one in own)})
    answered: dict[str, Answered | RowError] = {}
    for name, asked in distinct.items():
        own = known[name] if name in known else computed[name]
        error = next((completion.error for completion in own if completion.error), None)
        if error is not None:
            remedy = "try the row in a run of its own; if it fails there, too, please report it"
            answered[name] = EngineFailure(f"the model could not compute this row: {error}", remedy=remedy)
            continue
        prompt_tokens = sum(len(request.prompt_ids) for request in asked.requests)
        answered[name] = Answered(
            answers=prompts.answers(own),
            prompt_tokens=prompt_tokens,
            cached_tokens=prompt_tokens if name in known else sum(one.num_prefix_tokens for one in asked.requests),
            computed_tokens=sum(completion.computed_tokens for completion in own),
            output_tokens=sum(len(completion.token_ids) for completion in own),
            route="cache" if name in known else "large",
        )
    return answered


def _columns(
    fates: Sequence[Asked | RowError], answered: Mapping[str, Answered], plan: Plan
) -> dict[str, list[object]]:
    """Return the values of every added column, by its full name."""
    names = [plan.prefix + field.name for field in ROW_FIELDS]
    task_names = [field.name for task in plan.tasks for field in task_columns(task, plan.prefix)]
    columns: dict[str, list[object]] = {name: [] for name in (*task_names, *names)}
    seen: set[str] = set()
    for fate in fates:
        if isinstance(fate, RowError):
            values: tuple[object, ...] = ("rejected", fate.code, fate.message, plan.model_fingerprint, None, None, None)
            for name in task_names:
                columns[name].append(None)
        else:
            answer = answered[fate.prompt_hash]
            is_first = fate.prompt_hash not in seen
            seen.add(fate.prompt_hash)
            usage = {
                "prompt_tokens": answer.prompt_tokens,
                "cached_tokens": answer.cached_tokens if is_first else answer.prompt_tokens,
                "output_tokens": answer.output_tokens,
            }
            route = answer.route if is_first else "duplicate"
            values = ("annotated", None, None, plan.model_fingerprint, fate.prompt_hash, usage, route)
            for name in task_names:
                columns[name].append(_arrow_value(answer.answers[name.removeprefix(plan.prefix)]))
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
    return columns


def _arrow_value(value: object) -> object:
    """Return `value` as pyarrow takes it: a map as pairs, which keep their order."""
    return list(value.items()) if isinstance(value, Mapping) else value


def _count_labels(columns: Mapping[str, Sequence[object]], plan: Plan) -> dict[str, dict[str, int]]:
    """Return how many rows got each label, in the order of the job file, for every task that has labels."""
    counts = {}
    for task in plan.tasks:
        if task.kind == "choose":
            given = Counter(value for value in columns[f"{plan.prefix}{task.name}_label"] if value is not None)
        elif task.kind == "choose_many":
            rows = columns[f"{plan.prefix}{task.name}_labels"]
            given = Counter(label for row in rows if isinstance(row, list | tuple) for label in row)
        else:
            continue
        counts[task.name] = {label: given.get(label, 0) for label in task.labels}
    return counts


def _rejects(block: Block, fates: Sequence[Asked | RowError], plan: Plan) -> pa.Table:
    """Return the rows of the rejects table, in row order."""
    rejected = [(index, fate) for index, fate in enumerate(fates) if isinstance(fate, RowError)]
    ids = id_texts(block.table.column(plan.columns.id)) if rejected else []
    rows = [
        {
            "unit_id": block.unit.unit_id,
            "url": block.unit.url,
            "row": block.unit.first_row + index,
            "id": ids[index],
            "error_code": fate.code,
            "error_message": fate.message,
        }
        for index, fate in rejected
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)


def id_texts(column: pa.ChunkedArray) -> list[str | None]:
    """Return each id as text; bytes that are not UTF-8 as U+FFFD."""
    if pa.types.is_integer(column.type):
        return [None if value is None else str(value) for value in column.to_pylist()]
    return [None if value is None else value.decode(errors="replace") for value in raw_bytes(column)]
