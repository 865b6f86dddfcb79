"""What k2batch needs of an input table: an id column and one or more text columns.

MUST: each text column exists (unless marked optional with a trailing `?` in the job file) and is a string column:
`string`, `large_string`, `string_view`, a dictionary of one of these, or `null`. The id column exists and is a string
or an integer column; ids need not be unique and may be null.
MAY: be in any order, beside any other columns; every input column is kept as it is.
"""

from dataclasses import dataclass
from difflib import get_close_matches

import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True)
class TicketColumns:
    """Which columns of the user's table are the ticket."""

    id: str
    text: tuple[str, ...]
    """Text columns, joined in this order by a blank line; null and blank ones are left out."""
    optional: tuple[str, ...] = ()
    """Those of `text` that a file may lack."""

    def present(self, schema: pa.Schema) -> tuple[str, ...]:
        """Return the text columns that `schema` has, in order."""
        return tuple(name for name in self.text if name in schema.names)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_null(type_):  # how pandas writes a column whose values are all None
        return True
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def differences(schema: pa.Schema, columns: TicketColumns) -> list[tuple[str, str]]:
    """Return every way `schema` breaks the contract, as (file error code, message); empty if it holds."""
    found: list[tuple[str, str]] = []
    for name in (columns.id, *columns.text):
        if name not in schema.names:
            if name in columns.optional:
                continue
            near = get_close_matches(name, schema.names, n=1)
            hint = f', did you mean "{near[0]}"?' if near else f"; the file has: {', '.join(schema.names)}"
            found.append(("missing_column", f'column "{name}" is missing{hint}'))
            continue
        if len(schema.get_all_field_indices(name)) > 1:
            found.append(("wrong_type", f'column "{name}" occurs more than once'))
            continue
        type_ = schema.field(name).type
        if name == columns.id and pa.types.is_integer(type_):
            continue
        if not _is_text(type_):
            expected = "string or integer" if name == columns.id else "string"
            found.append(("wrong_type", f'column "{name}" is {type_}, expected {expected}'))
    return found
