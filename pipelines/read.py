"""Rows of one unit, as the file holds them: every column, every type, every byte; and those that a run wrote of it."""

from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from schemas.errors import SchemaMismatch
from schemas.runs import Plan, Unit

# A slice of a giant row group is decoded in batches of this many rows, so memory stays that of the slice.
_BATCH_ROWS = 1024


def read_unit(unit: Unit, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the unit's rows, in file order, with all input columns or those of `columns` that the file has.

    Raises: SchemaMismatch if the file is gone, is not the file that was planned, or cannot be decoded; StorageError.
    """
    try:
        with storage.open_read(unit.url) as file:
            table, problem = _decode(unit, file, columns)
        # Asked after the rows are in: a file that was replaced before or meanwhile cannot have passed.
        found = storage.etag(unit.url)
    except FileNotFoundError as error:
        raise SchemaMismatch(
            f"{unit.url}: gone since the plan was made", remedy="put it back, or run the job again without it"
        ) from error
    if found != unit.etag:
        raise SchemaMismatch(
            f"{unit.url}: changed since the plan was made (etag {found}, planned {unit.etag})",
            remedy="run the job again: a changed file makes a new plan",
        )
    if problem is not None:
        raise problem
    return table


def read_data(plan: Plan, name: str, columns: Sequence[str]) -> pa.Table:
    """Return `columns`, in this order, of the run's data file `name`.

    Raises: FileNotFoundError or StorageError; ArrowException if it is damaged; KeyError if it lacks a column.
    """
    content = storage.read_bytes(storage.join(plan.output, "data", name))
    return pq.ParquetFile(pa.BufferReader(content)).read(list(columns)).select(list(columns))


def _decode(
    unit: Unit, file: BinaryIO, columns: Sequence[str] | None
) -> tuple[pa.Table, None] | tuple[None, SchemaMismatch]:
    """Return the rows, or what is wrong with the file, if it still is the planned one."""
    first, last = unit.row_groups
    try:
        # Pre-buffered: neighbouring column chunks come in one request, not in one each.
        parquet = pq.ParquetFile(file, pre_buffer=True)
        if parquet.metadata.num_row_groups < last:
            groups = parquet.metadata.num_row_groups
            return None, SchemaMismatch(f"{unit.url}: has {groups} row groups, planned {last}")
        planned = range(first, last)
        if sum(parquet.metadata.row_group(index).num_rows for index in planned) == unit.rows:
            table = parquet.read_row_groups(list(planned), columns)
        else:
            table = _read_slice(parquet, unit, columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        # pyarrow's word for a damaged page; what the store has to say comes as a StorageError.
        where = f"{unit.url} row groups {first} to {last - 1}"
        problem = SchemaMismatch(f"{where}: cannot be decoded: {error}", remedy="write the file again")
        problem.__cause__ = error
        return None, problem
    if table.num_rows != unit.rows:
        return None, SchemaMismatch(f"{unit.url}: unit {unit.unit_id} has {table.num_rows} rows, planned {unit.rows}")
    return table, None


def _read_slice(parquet: pq.ParquetFile, unit: Unit, columns: Sequence[str] | None) -> pa.Table:
    """Return `unit.rows` rows after the first `unit.skip` of the row groups."""
    batches: list[pa.RecordBatch] = []
    skip, wanted = unit.skip, unit.rows
    for batch in parquet.iter_batches(_BATCH_ROWS, list(range(*unit.row_groups)), columns):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        part = batch.slice(skip, wanted)
        skip, wanted = 0, wanted - part.num_rows
        batches.append(part)
        if not wanted:
            break
    return pa.Table.from_batches(batches)
