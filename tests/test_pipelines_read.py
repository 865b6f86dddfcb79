"""Rows of a unit: the right ones, in order, with every byte."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.read import read_unit
from schemas.errors import SchemaMismatch
from tests.fakes import fake_plan, text_array, tickets, write_tickets


@pytest.mark.parametrize(("row_group_size", "unit_rows"), [(7, 30), (100, 30), (30, 30), (200, 1), (3, 200)])
def test_units_give_every_row_once_in_order(tmp_path: Path, row_group_size: int, unit_rows: int) -> None:
    table = tickets(130)
    write_tickets(tmp_path, "a.parquet", table, row_group_size=row_group_size)
    units = fake_plan([tmp_path], tmp_path / "out", unit_rows=unit_rows).units
    read = pa.concat_tables(read_unit(unit) for unit in units)
    assert read.drop_columns(["weight"]).equals(table.drop_columns(["weight"]))
    assert str(read.column("weight").to_pylist()) == str(table.column("weight").to_pylist())


@pytest.mark.parametrize("row_group_size", [10, 30])
def test_only_the_columns_asked_for_that_are_there(tmp_path: Path, row_group_size: int) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(30), row_group_size=row_group_size)
    unit = fake_plan([tmp_path], tmp_path / "out", unit_rows=20).units[0]
    read = read_unit(unit, columns=("body", "nowhere", "ticket_id"))
    assert sorted(read.schema.names) == ["body", "ticket_id"]
    assert read.column("body").to_pylist() == [f"body of ticket {number}" for number in range(unit.rows)]


def test_slice_beyond_the_decoding_batch(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(3000), row_group_size=3000)
    units = fake_plan([tmp_path], tmp_path / "out", unit_rows=1100).units
    assert [len(units), units[1].skip] == [3, 1100]
    assert read_unit(units[1]).column("ticket_id").to_pylist() == [f"T{number:06d}" for number in range(1100, 2200)]


def test_types_and_bad_bytes_survive(tmp_path: Path) -> None:
    bad = [b"fine", b"\xff\xfe\x00bad", None, b"cut \xe2\x82"]
    table = pa.table(
        {
            "ticket_id": text_array([b"1", b"\xff", None, b"1"], pa.large_string()),
            "body": text_array(bad),
            "subject": text_array(bad, pa.string_view()),
            "kind": pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int32()), text_array([b"a", b"\xff"])),
            "tags": pa.MapArray.from_arrays([0, 1, 1, 2, 4], text_array([b"\xff"] * 4), text_array(bad)),
        }
    )
    path = write_tickets(tmp_path, "a.parquet", table, row_group_size=2)
    (unit,) = fake_plan([path], tmp_path / "out").units
    read = read_unit(unit)
    assert read.schema.types == table.schema.types
    assert read.drop_columns(["kind"]).equals(table.drop_columns(["kind"]))
    kinds = pa.chunked_array([chunk.dictionary_decode() for chunk in read.column("kind").chunks])
    assert kinds.cast(pa.binary()).to_pylist() == [b"a", b"\xff", None, b"a"]


def test_changed_file_is_refused(tmp_path: Path) -> None:
    path = write_tickets(tmp_path, "a.parquet", tickets(10))
    (unit,) = fake_plan([path], tmp_path / "out").units
    write_tickets(tmp_path, "a.parquet", tickets(11))
    with pytest.raises(SchemaMismatch, match="changed since the plan was made") as caught:
        read_unit(unit)
    assert "run the job again" in caught.value.remedy


def test_lost_file_is_refused(tmp_path: Path) -> None:
    path = write_tickets(tmp_path, "a.parquet", tickets(10))
    (unit,) = fake_plan([path], tmp_path / "out").units
    path.unlink()
    with pytest.raises(SchemaMismatch, match="gone since the plan was made"):
        read_unit(unit)


def test_damaged_page_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tickets(tmp_path, "a.parquet", tickets(100))
    damage(path)
    (unit,) = fake_plan([path], tmp_path / "out", unit_rows=100).units
    with pytest.raises(SchemaMismatch, match=r"a\.parquet row groups 0 to 0: cannot be decoded"):
        read_unit(unit)


def damage(path: Path) -> None:
    """Overwrite the first column's pages; the footer stays good."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
