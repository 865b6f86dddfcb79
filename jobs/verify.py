"""Proof of a run from its files alone: every input row is in the output once, unchanged, beside its annotation.

Reads the plan, receipts, manifest, data, rejects and the input files; trusts none of them. A few units are in memory at
a time, so that waits on a store overlap; many are shared among processes, one to a core.
"""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from multiprocessing import get_context

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.annotate import id_texts
from pipelines.commit import read_plan, read_receipt, receipts_of
from pipelines.finalize import make_manifest, orphan_files, read_manifest
from pipelines.read import read_unit
from schemas.annotations import output_schema
from schemas.errors import K2Error, StorageError
from schemas.rejects import REJECTS
from schemas.runs import Plan, Receipt, Unit

_MANIFEST_KEYS = (
    "run_id",
    "rows_in",
    "rows_annotated",
    "rows_rejected",
    "units",
    "units_done",
    "prompt_tokens",
    "computed_tokens",
    "output_tokens",
    "error_codes",
    "flops",
    "labels",
    "data",
    "rejects",
)


_PAGE = 500
_MANY = 4000
"""From so many units on, processes are worth their start: a second each."""


def verify(run_url: str) -> list[str]:
    """Return every problem found in the run in the folder `run_url`, as sentences; empty if the run is proven.

    Proven means: the units tile the rows of each input file; each unit has one receipt; each data file has the bytes
    and rows of its receipt, and every column of its input rows, in order; rejected rows stand in the rejects file, with
    the same code; the manifest's totals are the sums of the receipts; no other file lies about.

    Raises: SpecError if there is no run; StorageError.
    """
    plan = read_plan(run_url)
    problems = list(_check_tiling(plan))
    problems.extend(chain.from_iterable(_unit_problems(plan)))
    problems.extend(_check_manifest(plan))
    return problems


def _unit_problems(plan: Plan) -> Iterator[list[str]]:
    """Yield the problems of every unit, some units at a time, in the plan's order."""
    pages = [plan.units[start : start + _PAGE] for start in range(0, len(plan.units), _PAGE)]
    head = replace(plan, units=())
    if len(plan.units) < _MANY:
        yield from map(_page_problems, repeat(head), pages)
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield from pool.map(_page_problems, repeat(head), pages)


def _page_problems(plan: Plan, units: Sequence[Unit]) -> list[str]:
    if all(map(storage.is_local, [plan.output, *{unit.url for unit in units}])):
        # Nothing is waited for but Python's lock: 1.2 ms a unit, 1.8 in sixteen threads.
        return [problem for unit in units for problem in _problems(plan, unit)]
    return [*chain.from_iterable(storage.in_threads(lambda unit: _problems(plan, unit), units))]


def _problems(plan: Plan, unit: Unit) -> tuple[str, ...]:
    receipt = read_receipt(plan, unit.unit_id)
    found = ("has no receipt",) if receipt is None else _check_unit(plan, unit, receipt)
    return tuple(f"{_where(unit)}: {problem}" for problem in found)


def _where(unit: Unit) -> str:
    return f"unit {unit.unit_id} ({unit.url} rows {unit.first_row} to {unit.first_row + unit.rows - 1})"


def _check_tiling(plan: Plan) -> Iterator[str]:
    """Yield where the units of a file leave out or repeat a row, or are not where they say."""
    by_file: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in plan.units:
        by_file[unit.url].append(unit)
    for unit_id, times in Counter(unit.unit_id for unit in plan.units).items():
        if times > 1:
            yield f"plan.json: unit {unit_id} is there {times} times"
    for rejected in plan.rejected_files:
        if rejected.url in by_file:
            yield f"plan.json: {rejected.url} is both rejected and cut into units"
    for url, units in by_file.items():
        try:
            with storage.open_read(url) as file:
                metadata = pq.ParquetFile(file).metadata
        except (K2Error, pa.ArrowException, OSError) as error:
            yield f"{url}: cannot be read: {error}"
            continue
        starts = [0]  # row number of the first row of each row group, and of the end
        for index in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(index).num_rows)
        end = 0
        for unit in sorted(units, key=lambda unit: unit.first_row):
            if unit.first_row != end:
                yield f"{_where(unit)}: begins at row {unit.first_row}, but the unit before it ends at row {end}"
            if unit.row_groups[1] >= len(starts) or unit.first_row != starts[unit.row_groups[0]] + unit.skip:
                yield f"{_where(unit)}: its row groups {unit.row_groups} and skip {unit.skip} name other rows"
            end = unit.first_row + unit.rows
        if end != metadata.num_rows:
            yield f"{url}: its units end at row {end}, but it has {metadata.num_rows} rows"


def _check_unit(plan: Plan, unit: Unit, receipt: Receipt) -> Iterator[str]:
    try:
        content = storage.read_bytes(storage.join(plan.output, "data", receipt.data))
    except FileNotFoundError:
        yield f"data/{receipt.data} is missing"
        return
    found = hashlib.sha256(content).hexdigest()
    if found != receipt.data_sha256:
        yield f"data/{receipt.data} has sha256 {found}, its receipt says {receipt.data_sha256}"
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        yield f"data/{receipt.data} cannot be read: {error}"
        return
    if not table.num_rows == receipt.rows == unit.rows:
        yield f"data/{receipt.data} has {table.num_rows} rows, its receipt says {receipt.rows}, the plan {unit.rows}"
        return
    try:
        source = read_unit(unit)
    except K2Error as error:
        yield f"its input rows cannot be read: {error.message}"
        return
    yield from _check_columns(plan, receipt, source, table)
    if not table.schema.equals(output_schema(source.schema, plan)):
        yield f"data/{receipt.data} has other columns or types than its input and the added ones"
        return
    yield from _check_statuses(plan, receipt, table)
    yield from _check_rejects(plan, unit, receipt, table)


def _check_columns(plan: Plan, receipt: Receipt, source: pa.Table, table: pa.Table) -> Iterator[str]:
    """Yield which input columns the data file does not have as they were; the id column first."""
    names = source.schema.names
    if table.schema.names[: len(names)] != names:
        yield f"data/{receipt.data} has columns {table.schema.names[: len(names)]}, its input {names}"
        return
    for index in sorted(range(len(names)), key=lambda index: names[index] != plan.columns.id):
        if not same_values(source.column(index), table.column(index)):
            yield f'data/{receipt.data} column "{names[index]}" differs from its input'


def same_values(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    """Return whether two columns hold the same values, to the bit: NaN equals NaN, and bytes need not be UTF-8."""
    if left.type != right.type or len(left) != len(right):
        return False
    if pa.types.is_dictionary(left.type):
        left, right = _decoded(left), _decoded(right)
    # Arrow's comparison is quick, but says that NaN differs from NaN; Parquet's bytes tell such columns apart.
    return bool(left.equals(right)) or _parquet_bytes(left) == _parquet_bytes(right)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], type=column.type.value_type)


def _parquet_bytes(column: pa.ChunkedArray) -> bytes:
    """Return the column as Parquet, which depends on the values alone once there is one chunk."""
    buffer = io.BytesIO()
    table = pa.table({"column": column.combine_chunks()})
    pq.write_table(table, buffer, compression="none", store_schema=False, use_dictionary=False)
    return buffer.getvalue()


def _check_statuses(plan: Plan, receipt: Receipt, table: pa.Table) -> Iterator[str]:
    """Yield where the receipt's numbers are not those of the data file."""
    prefix = plan.prefix
    statuses = Counter(table.column(f"{prefix}status").to_pylist())
    codes = Counter(code for code in table.column(f"{prefix}error_code").to_pylist() if code is not None)
    usage = table.column(f"{prefix}usage").combine_chunks()
    found: dict[str, object] = {
        "rows_annotated": statuses.pop("annotated", 0),
        "rows_rejected": statuses.pop("rejected", 0),
        "error_codes": dict(codes),
        "labels": _label_counts(plan, table),
        "prompt_tokens": pc.sum(usage.field("prompt_tokens")).as_py() or 0,
        "output_tokens": pc.sum(usage.field("output_tokens")).as_py() or 0,
    }
    if statuses:
        yield f"data/{receipt.data} has rows of status {sorted(map(str, statuses))}"
    for key, value in found.items():
        if value != getattr(receipt, key):
            yield f"its receipt says {key} {getattr(receipt, key)}, data/{receipt.data} has {value}"
    fingerprints = set(table.column(f"{prefix}model_fingerprint").to_pylist())
    if fingerprints - {plan.model_fingerprint}:
        yield f"data/{receipt.data} was annotated by {sorted(map(str, fingerprints))}, planned {plan.model_fingerprint}"


def _label_counts(plan: Plan, table: pa.Table) -> dict[str, dict[str, int]]:
    counts = {}
    for task in plan.tasks:
        if task.kind == "choose":
            given = Counter(table.column(f"{plan.prefix}{task.name}_label").to_pylist())
        elif task.kind == "choose_many":
            rows = table.column(f"{plan.prefix}{task.name}_labels").to_pylist()
            given = Counter(label for row in rows if row is not None for label in row)
        else:
            continue
        given.pop(None, None)
        # A label outside the job file would be a key too many.
        counts[task.name] = {**dict.fromkeys(task.labels, 0), **given}
    return counts


def _check_rejects(plan: Plan, unit: Unit, receipt: Receipt, table: pa.Table) -> Iterator[str]:
    """Yield where the rejects file does not list exactly the rejected rows of the data file."""
    is_rejected = pc.equal(table.column(f"{plan.prefix}status"), "rejected")
    rows = pc.indices_nonzero(is_rejected).to_pylist()
    if receipt.rejects is None:
        if rows:
            yield f"{len(rows)} rows of data/{receipt.data} are rejected, but its receipt names no rejects file"
        return
    try:
        content = storage.read_bytes(storage.join(plan.output, "rejects", receipt.rejects))
        rejects = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except FileNotFoundError:
        yield f"rejects/{receipt.rejects} is missing"
        return
    except (pa.ArrowException, OSError) as error:
        yield f"rejects/{receipt.rejects} cannot be read: {error}"
        return
    ids = id_texts(table.column(plan.columns.id))
    codes = table.column(f"{plan.prefix}error_code").to_pylist()
    messages = table.column(f"{plan.prefix}error_message").to_pylist()
    expected = {
        "unit_id": [unit.unit_id] * len(rows),
        "url": [unit.url] * len(rows),
        "row": [unit.first_row + row for row in rows],
        "id": [ids[row] for row in rows],
        "error_code": [codes[row] for row in rows],
        "error_message": [messages[row] for row in rows],
    }
    if not rejects.schema.equals(REJECTS):
        yield f"rejects/{receipt.rejects} has other columns than a rejects file"
    elif rejects.to_pydict() != expected:
        yield f"rejects/{receipt.rejects} does not list the {len(rows)} rejected rows of data/{receipt.data}"


def _check_manifest(plan: Plan) -> Iterator[str]:
    """Yield where the manifest is not the sum of the receipts, or `_SUCCESS` is wrong."""
    try:
        manifest = read_manifest(plan.output)
    except StorageError as error:
        yield error.message
        return
    if manifest is None:
        yield "_manifest.json or _SUCCESS is missing: the run has not been finalized"
        return
    if manifest.status == "complete":  # before that, killed attempts may have left files, which are not published
        yield from (f"{name} is an orphan: nothing names it" for name in orphan_files(plan, manifest))
    receipts = (receipt for _, receipt in receipts_of(plan) if receipt is not None)
    expected = make_manifest(plan, receipts, {}, max_reject_rate=1.0)
    for key in _MANIFEST_KEYS:
        if getattr(manifest, key) != getattr(expected, key):
            yield f"_manifest.json says {key} {getattr(manifest, key)}, the receipts add up to {getattr(expected, key)}"
    missing = set(plan.rejected_files) - set(manifest.rejected_files)
    for file in sorted(missing, key=lambda file: file.url):
        yield f"_manifest.json does not name the rejected file {file.url}"
    is_incomplete = manifest.units_done < manifest.units or bool(manifest.rejected_files)
    if is_incomplete != (manifest.status == "incomplete"):
        yield (
            f"_manifest.json says {manifest.status}, with {manifest.units_done} of {manifest.units} units "
            f"and {len(manifest.rejected_files)} rejected files"
        )
    if storage.exists(storage.join(plan.output, "_SUCCESS")) != (manifest.status == "complete"):
        yield f"_SUCCESS is {'missing' if manifest.status == 'complete' else 'there'}, the status is {manifest.status}"
