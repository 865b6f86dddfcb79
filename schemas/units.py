"""The units of a plan as a table: a million of them are 25 MB on storage and are never spelled out as text."""

from collections.abc import Sequence

import pyarrow as pa

from schemas.runs import Unit

_NAME = pa.dictionary(pa.int32(), pa.string())

UNITS = pa.schema(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("url", _NAME, nullable=False),
        pa.field("etag", _NAME, nullable=False),
        pa.field("first_row_group", pa.int32(), nullable=False),
        pa.field("end_row_group", pa.int32(), nullable=False),
        pa.field("skip", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("text_bytes", pa.int64(), nullable=False),
    ]
)
"""One row for each unit, in plan order; the columns are the fields of `Unit`, `row_groups` as two."""

# Python values of this many units exist beside the units made of them.
_BATCH_ROWS = 16_384


def units_table(units: Sequence[Unit]) -> pa.Table:
    """Return the units as a table with the schema `UNITS`."""
    values = {
        "first_row_group": [unit.row_groups[0] for unit in units],
        "end_row_group": [unit.row_groups[1] for unit in units],
    }
    names = [name for name in UNITS.names if name not in values]
    values |= {name: [getattr(unit, name) for unit in units] for name in names}
    return pa.table({name: pa.array(values[name], UNITS.field(name).type) for name in UNITS.names}, schema=UNITS)


def units_of(table: pa.Table) -> tuple[Unit, ...]:
    """Return the units that `units_table` made `table` of. Raises: ValueError if its columns are others."""
    if not table.schema.equals(UNITS):
        raise ValueError(f"columns {table.schema.names}, expected {UNITS.names}")
    shared: dict[str, str] = {}  # a URL and an etag are one string for all units of their file
    units: list[Unit] = []
    for batch in table.to_batches(_BATCH_ROWS):
        ids, urls, etags, firsts, ends, *numbers = (column.to_pylist() for column in batch.columns)
        for unit_id, url, etag, first, end, skip, rows, first_row, text_bytes in zip(
            ids, urls, etags, firsts, ends, *numbers, strict=True
        ):
            units.append(
                Unit(
                    unit_id=unit_id,
                    url=shared.setdefault(url, url),
                    etag=shared.setdefault(etag, etag),
                    row_groups=(first, end),
                    skip=skip,
                    rows=rows,
                    first_row=first_row,
                    text_bytes=text_bytes,
                )
            )
    return tuple(units)
