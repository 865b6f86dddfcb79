"""Rows of a unit in, the same rows with the added columns out. A row never raises: it becomes a rejected row."""

import hashlib
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from k2model.engine.request import GREEDY, Candidate, Completion, Request, SupportsSubmit
from k2model.tokenizer import Tokenizer
from pipelines.arithmetic import flops_of
from pipelines.cache import Cache
from pipelines.columns import Answers, Numbers, added_columns, count_labels
from schemas.annotations import output_schema
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

    def requests_of(self, texts: Sequence[str]) -> list[tuple[Request, ...] | RowError]:
        """Return all requests of each row, or why there are none."""
        ...

    def columns_of(self, answers: Sequence[Sequence[Completion]]) -> dict[str, pa.Array]:
        """Return the task columns, by name without prefix, from the completions of each row's requests."""
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
    flops: dict[str, int]
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
            flops=self.flops,
            attempts=self.attempts,
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests of one row, and their name."""

    requests: tuple[Request, ...]
    prompt_hash: str


def annotate(
    block: Block, plan: Plan, prompts: SupportsPrompts, engine: SupportsSubmit, cache: Cache | None = None
) -> AnnotatedBlock:
    """Return the block's rows, in order, with every added column.

    Texts that give the same requests are asked once; the first such row has route `large`, or `cache` if an earlier run
    had its answer, the others `duplicate`. But for `route` and `usage`, a row is the same with and without a cache.
    """
    began, busy_before = time.perf_counter(), engine.busy_seconds
    asked_for = ask(row_texts(block.table, plan.columns), prompts)
    answers = answer_all(asked_for, prompts, engine, cache, block.unit.unit_id)
    busy = (engine.busy_seconds - busy_before) / (time.perf_counter() - began)
    fates = [outcome(fate, answers) for fate in asked_for]
    places = np.array([-1 if isinstance(fate, RowError) else answers.places[fate] for fate in fates], np.int64)
    columns = added_columns(plan, fates, places, answers)
    schema = output_schema(block.table.schema, plan)
    added = [columns[schema.field(index).name] for index in range(block.table.num_columns, len(schema))]
    table = pa.Table.from_arrays([*block.table.columns, *added], schema=schema)
    rejects = _rejects(block, fates, plan)
    asked = places[places >= 0]
    return AnnotatedBlock(
        unit=block.unit,
        table=table,
        rejects=rejects,
        rows_cached=int(answers.is_cached.sum()),
        labels=count_labels(columns, plan),
        error_codes=dict(sorted(Counter(rejects.column("error_code").to_pylist()).items())),
        prompt_tokens=int(answers.prompt_tokens[asked].sum()),
        computed_tokens=int(answers.computed_tokens.sum()),
        output_tokens=int(answers.output_tokens[asked].sum()),
        started=block.started,
        attempts=block.attempts,
        engine_busy=round(min(1.0, busy), 3),
        flops=flops_of(plan.flops, engine.take_work(), _saved_tokens(asked, answers)),
    )


def outcome(fate: Asked | RowError, answers: Answers) -> str | RowError:
    """Return the prompt hash of what was answered, or why it was not."""
    return fate if isinstance(fate, RowError) else answers.errors.get(fate.prompt_hash, fate.prompt_hash)


def _saved_tokens(asked: Numbers, answers: Answers) -> dict[str, int]:
    """Return prompt tokens not computed, by cause; `asked` says which answer each annotated row has."""
    prompt_tokens = answers.prompt_tokens
    return {
        "duplicates": int(prompt_tokens[asked].sum() - prompt_tokens.sum()),
        "shared": int(answers.shared_tokens.sum()),
        "earlier_runs": int(prompt_tokens[answers.is_cached].sum()),
    }


def row_texts(table: pa.Table, columns: TicketColumns) -> list[str | RowError]:
    """Return the text of each row, or why it has none.

    The text is the non-blank text columns joined by a blank line. Bytes that are not UTF-8 reject the row, even beside
    a good column: what they said is unknown.
    """
    names = columns.present(table.schema)
    if not names:
        return [NullText("the file has no text column") for _ in range(table.num_rows)]
    values = [_decoded(table.column(name)) for name in names]
    return [_row_text(names, row) for row in zip(*values, strict=True)]


def _decoded(column: pa.ChunkedArray) -> list[str | bytes | None]:
    """Return the values of a text column; those that are not UTF-8 as bytes."""
    try:
        values: list[str | bytes | None] = _plain(column).to_numpy(zero_copy_only=False).tolist()
    except pa.ArrowException:  # of one that is not UTF-8, none is returned
        return [_text_or_bytes(value) for value in raw_bytes(column)]
    return values


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def raw_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    """Return the bytes of each value of a text column, unchecked: pyarrow's own text conversion raises on bad UTF-8."""
    column = _plain(column)
    if pa.types.is_large_string(column.type):
        binary = pa.large_binary()
    elif pa.types.is_string_view(column.type):
        binary = pa.binary_view()
    else:
        binary = pa.binary()
    values: list[bytes | None] = column.cast(binary).to_numpy(zero_copy_only=False).tolist()
    return values


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a text column without its dictionary; one that is all null as strings."""
    if pa.types.is_dictionary(column.type):
        chunks = [chunk.dictionary_decode() for chunk in column.chunks]
        return pa.chunked_array(chunks, type=column.type.value_type)
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def _row_text(names: Sequence[str], row: Sequence[str | bytes | None]) -> str | RowError:
    if bytes in map(type, row):
        return _invalid(names, row)
    visible = [text for text in row if isinstance(text, str) and is_visible(text)]
    if visible:
        return "\n\n".join(visible)
    lengths = [len(text) for text in row if text is not None]
    if not lengths:
        return NullText(f"every text column is null: {', '.join(names)}")
    return BlankText(f"no visible character among {sum(lengths)}")


def _invalid(names: Sequence[str], row: Sequence[str | bytes | None]) -> InvalidText:
    """Return what is wrong with the first value that is not UTF-8."""
    name, value = next((name, value) for name, value in zip(names, row, strict=True) if isinstance(value, bytes))
    try:
        value.decode()
    except UnicodeDecodeError as error:
        shown = value[error.start : error.start + 4].hex(" ")
        return InvalidText(f'column "{name}" is not UTF-8 at byte {error.start}: {shown}')
    raise AssertionError(value)


def is_visible(text: str) -> bool:
    """Return whether any character shows: not white space, separator (Z*) or other (C*, such as U+200B)."""
    return text[:1].isalnum() or any(unicodedata.category(char)[0] not in "ZC" for char in text)


def ask(texts: Sequence[str | RowError], prompts: SupportsPrompts) -> list[Asked | RowError]:
    """Return the requests of each row, or why there are none; each distinct text is tokenized once."""
    distinct = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    found = prompts.requests_of(distinct)
    names = iter(hash_requests([requests for requests in found if not isinstance(requests, RowError)]))
    fates = [requests if isinstance(requests, RowError) else Asked(requests, next(names)) for requests in found]
    known = dict(zip(distinct, fates, strict=True))
    return [known[text] if isinstance(text, str) else text for text in texts]


def hash_requests(rows: Sequence[Sequence[Request]]) -> list[str]:
    """Return, for each row, 32 hex digits that name all it asks: prompts, candidates, limits, and how tokens are drawn.

    Instructions, with which all prompts of a job begin, are digested once for each length of prompt, and candidates,
    which all its rows have, are spelled once.
    """
    prefix_ids: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    prefix = spelled = b""
    begun: dict[tuple[int, ...], Any] = {}
    hashes = []
    for requests in rows:
        names: Any = None
        is_drawn = False
        for request in requests:
            ids, start = request.prompt_ids, request.num_prefix_tokens
            if ids[:start] != prefix_ids:
                prefix_ids, begun = ids[:start], {}
                prefix = array("q", prefix_ids).tobytes()
            if request.candidates is not candidates:
                candidates, spelled = request.candidates, _candidate_numbers(request.candidates)
            # Every list is preceded by its length, so that no two different requests give the same numbers.
            head = (len(ids), start, request.max_tokens, len(candidates))
            if names is not None:
                names.update(array("q", head).tobytes() + prefix)
            elif (beginning := (len(requests), *head)) in begun:
                names = begun[beginning].copy()
            else:
                begun[beginning] = hashlib.sha256(array("q", beginning).tobytes() + prefix)
                names = begun[beginning].copy()
            names.update(array("q", ids[start:]).tobytes() + spelled)
            is_drawn |= (request.stop_strings, request.grammar, request.sampling) != _GREEDILY
        if is_drawn:
            names.update(repr([(r.stop_strings, r.grammar, r.sampling) for r in requests]).encode())
        hashes.append(names.hexdigest()[:32])
    return hashes


_GREEDILY = ((), None, GREEDY)


def _candidate_numbers(candidates: Sequence[Candidate]) -> bytes:
    """Return what names the candidates."""
    numbers = array("q")
    for candidate in candidates:
        numbers.extend((len(candidate.token_ids), candidate.num_scored))
        numbers.extend(candidate.token_ids)
    return numbers.tobytes()


def answer_all(
    fates: Sequence[Asked | RowError],
    prompts: SupportsPrompts,
    engine: SupportsSubmit,
    cache: Cache | None = None,
    unit_id: str = "",
) -> Answers:
    """Return the answer to all that is asked, to equal requests once; what no cache knows is one submission."""
    distinct = {fate.prompt_hash: fate.requests for fate in fates if isinstance(fate, Asked)}
    known = cache.lookup({name: len(requests) for name, requests in distinct.items()}) if cache else {}
    unknown = {name: requests for name, requests in distinct.items() if name not in known}
    asked = list(chain.from_iterable(unknown.values()))
    completions = engine.submit(asked).result() if asked else []
    parts = iter(completions)
    computed = {name: list(islice(parts, len(requests))) for name, requests in unknown.items()}
    errors = {}
    if any(completion.error for completion in completions):
        errors = {name: _failure(own) for name, own in computed.items() if any(one.error for one in own)}
    if cache:
        cache.store(unit_id, {name: own for name, own in computed.items() if name not in errors})
    answered = {name: known.get(name) or computed[name] for name in distinct if name not in errors}
    return _answers(answered, errors, known.keys(), distinct, prompts)


def _failure(completions: Sequence[Completion]) -> EngineFailure:
    error = next(completion.error for completion in completions if completion.error)
    remedy = "try the row in a run of its own; if it fails there, too, please report it"
    return EngineFailure(f"the model could not compute this row: {error}", remedy=remedy)


def _answers(
    answered: Mapping[str, Sequence[Completion]],
    errors: Mapping[str, EngineFailure],
    known: Collection[str],
    asked: Mapping[str, Sequence[Request]],
    prompts: SupportsPrompts,
) -> Answers:
    """Return `answered` as columns; `known` came from the cache."""
    requests = list(chain.from_iterable(asked[name] for name in answered))
    completions = list(chain.from_iterable(answered.values()))
    is_cached = np.array([name in known for name in answered], bool)
    counts = np.fromiter(map(len, answered.values()), np.int64, len(answered))
    starts = np.cumsum(counts) - counts

    def sums(numbers: list[int]) -> Numbers:
        """Return the sum of each answer's numbers."""
        return np.add.reduceat(np.array(numbers, np.int64), starts) if numbers else np.zeros(0, np.int64)

    prompt_tokens = sums([len(request.prompt_ids) for request in requests])
    prefix_tokens = sums([request.num_prefix_tokens for request in requests])
    return Answers(
        places={name: place for place, name in enumerate(answered)},
        errors=errors,
        columns=prompts.columns_of(list(answered.values())),
        prompt_tokens=prompt_tokens,
        cached_tokens=np.where(is_cached, prompt_tokens, prefix_tokens),
        computed_tokens=sums([one.computed_tokens for one in completions]),
        shared_tokens=sums([one.shared_tokens for one in completions]),
        output_tokens=sums([len(one.token_ids) for one in completions]),
        is_cached=is_cached,
    )


def _rejects(block: Block, fates: Sequence[str | RowError], plan: Plan) -> pa.Table:
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
