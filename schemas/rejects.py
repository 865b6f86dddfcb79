"""The rejects table: one row per input row that could not be annotated, beside its unit's data file."""

import pyarrow as pa

REJECTS = pa.schema(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False, metadata={"meaning": "input file"}),
        pa.field("row", pa.int64(), nullable=False, metadata={"meaning": "row number in that file, from 0"}),
        pa.field("id", pa.string(), metadata={"meaning": "the row's id, as text; null if null"}),
        pa.field("error_code", pa.string(), nullable=False, metadata={"meaning": "schemas.errors.ROW_ERROR_CODES"}),
        pa.field("error_message", pa.string(), nullable=False),
    ]
)
