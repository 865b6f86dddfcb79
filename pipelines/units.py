"""The plan: input files checked against the data contract and cut into units along their row groups.

Only footers are read, and nothing is written. The same files and settings give the same plan, to the byte.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from schemas.annotations import ROW_FIELDS, task_columns
from schemas.errors import SchemaMismatch, SpecError, StorageError
from schemas.runs import SCHEMA_VERSION, Plan, RejectedFile, Task, Unit, digest
from schemas.tickets import TicketColumns, differences

# Holds the footer of all but the widest files, so most files cost one read.
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One input file as its footer describes it."""

    url: str
    etag: str
    row_groups: tuple[int, ...]
    """Rows of each row group; empty for a file that cannot be read."""
    problems: tuple[tuple[str, str], ...]
    """Every way the file breaks the contract, as (file error code, message)."""
    text_bytes: tuple[int, ...] = ()
    """Of the text columns in each row group, uncompressed."""


def make_plan(
    *,
    job: str,
    urls: Sequence[str],
    output: str,
    columns: TicketColumns,
    tasks: Sequence[Task],
    checkpoint: str,
    model_fingerprint: str,
    mode: str,
    precision: str = "int8",
    router_thresholds: Sequence[float] = (),
    prefix: str = "",
    max_prompt_tokens: int = 2048,
    unit_rows: int = 2048,
    on_bad_file: str = "reject",
    uses_cache: bool = False,
    text_order: str = "given",
) -> Plan:
    """Return the plan of a run: its identity, its units by file then position, and the files it cannot use.

    Args:
        job: name of the job, the first half of the run's id.
        urls: files, folders (their `*.parquet`) or globs.
        output: URL of the folder that will hold the run's folder.
        columns: which columns are the ticket.
        tasks: the questions.
        checkpoint: the model as the job file names it.
        model_fingerprint: what the checkpoint holds, as `k2model.formats.checkpoint.fingerprint` tells.
        mode: deployment mode.
        precision: of the model's values; known to the fingerprint, as are the thresholds.
        router_thresholds: of each layer, to drop experts by.
        prefix: written before every added column's name.
        max_prompt_tokens: a longer prompt is rejected.
        unit_rows: most rows of one unit.
        on_bad_file: `reject` leaves a bad file out and goes on; `fail` refuses to plan.
        uses_cache: whether answers of earlier runs under `output` are taken.
        text_order: `given`, or `shared` for a plan whose text columns are to be put into another order.

    Raises: SpecError if a URL matches nothing; SchemaMismatch if a file is bad and must not be, or all are;
        StorageError.
    """
    if unit_rows < 1:
        raise SpecError(f"unit_rows is {unit_rows}, expected at least 1")
    found = sorted({url for pattern in urls for url in storage.find(pattern)})
    added = _added_names(tasks, prefix)
    files = storage.in_threads(lambda url: inspect_file(url, columns, added), found)
    rejected = tuple(_rejected(file) for file in files if file.problems)
    if rejected and (on_bad_file == "fail" or len(rejected) == len(files)):
        raise _refusal(files)
    identity = {
        "schema_version": SCHEMA_VERSION,
        # As given, whatever the order chosen of them is: that is found out once, and then stands in the plan.
        "columns": asdict(columns) | ({} if text_order == "given" else {"text_order": text_order}),
        "tasks": [asdict(task) for task in tasks],
        # Key order is lost in canonical JSON, and the order of labels reaches the prompt.
        "labels": [list(task.labels) for task in tasks],
        "model": model_fingerprint,
        "mode": mode,
        "prefix": prefix,
        "max_prompt_tokens": max_prompt_tokens,
        "unit_rows": unit_rows,
        "inputs": [[file.url, file.etag] for file in files],
    }
    run_id = f"{job}-{digest(identity, 12)}"
    return Plan(
        run_id=run_id,
        job=job,
        output=storage.join(storage.absolute(output), run_id),
        columns=columns,
        tasks=tuple(tasks),
        checkpoint=checkpoint,
        model_fingerprint=model_fingerprint,
        mode=mode,
        precision=precision,
        router_thresholds=tuple(router_thresholds),
        prefix=prefix,
        max_prompt_tokens=max_prompt_tokens,
        uses_cache=uses_cache,
        units=tuple(unit for file in files if not file.problems for unit in cut(file, unit_rows)),
        rejected_files=rejected,
        files=len(files),
    )


def inspect_file(url: str, columns: TicketColumns, added: Iterable[str]) -> InputFile:
    """Return what the footer of `url` says; a broken file is described, not raised.

    Raises: StorageError if the store refuses.
    """
    try:
        etag = storage.etag(url)
        schema, row_groups, text_bytes = _read_footer(url, columns.text)
    except FileNotFoundError as error:
        raise StorageError(f"{url}: was listed but is gone", remedy="run again once the input is stable") from error
    except (pa.ArrowException, OSError) as error:
        # Storage errors were turned into StorageError by then: this OSError is pyarrow's word for a broken footer.
        problem = ("unreadable_file", f"not a readable Parquet file: {_first_line(error)}")
        return InputFile(url=url, etag=etag, row_groups=(), problems=(problem,))
    clashes = [
        ("name_collision", f'column "{name}" has the name of an added column; set [output] prefix')
        for name in added
        if name in schema.names
    ]
    problems = (*differences(schema, columns), *clashes)
    return InputFile(url=url, etag=etag, row_groups=row_groups, problems=problems, text_bytes=text_bytes)


def _read_footer(url: str, names: Sequence[str]) -> tuple[pa.Schema, tuple[int, ...], tuple[int, ...]]:
    """Return the schema, and of each row group the rows and the uncompressed bytes of the columns `names`.

    The footer is fetched, then parsed in memory, so that a broken file is told from a broken store.
    """
    tail = storage.read_tail(url, _TAIL_BYTES)
    if len(tail) >= 8 and tail[-4:] == b"PAR1":
        size = int.from_bytes(tail[-8:-4], "little") + 8
        if size > len(tail):
            tail = storage.read_tail(url, size)
    footer = pq.ParquetFile(pa.BufferReader(tail))
    metadata = footer.metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    # Not by `metadata.schema`, which holds the metadata that holds it: 0.2 MB a file until the collector comes by.
    first = groups[0] if groups else None
    texts = [i for i in range(metadata.num_columns) if first is not None and first.column(i).path_in_schema in names]
    text_bytes = tuple(sum(group.column(index).total_uncompressed_size for index in texts) for group in groups)
    return footer.schema_arrow, tuple(group.num_rows for group in groups), text_bytes


def cut(file: InputFile, unit_rows: int) -> Iterator[Unit]:
    """Yield the units of `file`: neighbouring row groups merged up to `unit_rows`, larger ones sliced."""
    first_row = 0
    start = rows = 0
    for index, group_rows in enumerate(file.row_groups):
        if rows and rows + group_rows > unit_rows:
            yield _unit(file, (start, index), 0, rows, first_row)
            first_row, start, rows = first_row + rows, index, 0
        if group_rows > unit_rows:
            for skip in range(0, group_rows, unit_rows):
                slice_rows = min(unit_rows, group_rows - skip)
                yield _unit(file, (index, index + 1), skip, slice_rows, first_row + skip)
            first_row, start = first_row + group_rows, index + 1
        else:
            if not rows:
                start = index
            rows += group_rows
    if rows:
        yield _unit(file, (start, len(file.row_groups)), 0, rows, first_row)


def _unit(file: InputFile, row_groups: tuple[int, int], skip: int, rows: int, first_row: int) -> Unit:
    name = "|".join(str(part) for part in (file.url, file.etag, *row_groups, skip, rows))
    whole = slice(*row_groups)
    return Unit(
        unit_id=digest(name),
        url=file.url,
        etag=file.etag,
        row_groups=row_groups,
        skip=skip,
        rows=rows,
        first_row=first_row,
        text_bytes=sum(file.text_bytes[whole]) * rows // sum(file.row_groups[whole]),
    )


def _added_names(tasks: Sequence[Task], prefix: str) -> list[str]:
    names = [field.name for task in tasks for field in task_columns(task, prefix)]
    return names + [prefix + field.name for field in ROW_FIELDS]


def _rejected(file: InputFile) -> RejectedFile:
    message = "; ".join(message for _, message in file.problems)
    return RejectedFile(url=file.url, error_code=file.problems[0][0], error_message=message)


def _refusal(files: Sequence[InputFile]) -> SchemaMismatch:
    lines = [f"{file.url}: {message}" for file in files for _, message in file.problems]
    bad = sum(bool(file.problems) for file in files)
    head = f"{bad} of {len(files)} input files break the data contract:"
    return SchemaMismatch("\n  ".join([head, *lines]), remedy="mend or leave out these files, or map [input] columns")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
