"""`verify` proves a sound run and names every kind of tampering."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.verify import same_values, verify
from pipelines.commit import read_receipts, receipt_url, to_parquet, write_plan
from pipelines.finalize import finalize
from schemas.errors import SpecError
from schemas.runs import Plan, Receipt, Unit
from tests.fakes import annotate_directly, fake_plan, text_array, tickets, write_tickets

Units = tuple[Unit, ...]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A finished run of four units, one row of each rejected."""
    for number in range(2):
        table = tickets(20, start=20 * number)
        bodies = [None if row % 10 == 3 else b"body %d" % row for row in range(20)]
        table = table.set_column(2, "body", text_array(bodies)).set_column(1, "subject", pa.nulls(20, pa.string()))
        write_tickets(tmp_path / "in", f"{number}.parquet", table, row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    write_plan(plan)
    annotate_directly(plan, plan.units)
    finalize(plan, max_reject_rate=1.0)
    return plan


def receipt_of(plan: Plan, index: int = 1) -> Receipt:
    return read_receipts(plan)[plan.units[index].unit_id]


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a Parquet file."""
    path.write_bytes(to_parquet(change(pq.read_table(path))))


def forge(plan: Plan, change: Callable[[pa.Table], pa.Table], **fields: object) -> None:
    """Rewrite the data file of a unit, and its receipt so that the digest fits."""
    receipt = receipt_of(plan)
    path = Path(plan.output) / "data" / receipt.data
    edit(path, change)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    forged = replace(receipt, data_sha256=digest, **fields)  # type: ignore[arg-type]
    Path(receipt_url(plan, receipt.unit_id)).write_text(forged.to_json())


def found(plan: Plan, *parts: str) -> list[str]:
    """Return the problems, of which one must say all `parts`."""
    problems = verify(plan.output)
    assert any(all(part in problem for part in parts) for problem in problems), problems
    return problems


def test_sound_run_is_proven(plan: Plan, tmp_path: Path) -> None:
    assert verify(plan.output) == []
    (tmp_path / "out").rename(tmp_path / "moved")
    assert verify(str(tmp_path / "moved" / plan.run_id)) == []


def test_processes_find_what_one_finds_in_the_same_order(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    os.unlink(receipt_url(plan, plan.units[3].unit_id))
    forge(plan, lambda table: with_value(table, "body", 2, "forged"))
    expected = verify(plan.output)
    assert len(expected) >= 3
    monkeypatch.setattr("jobs.verify._MANY", 1)
    monkeypatch.setattr("jobs.verify._PAGE", 1)
    assert verify(plan.output) == expected


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a run"):
        verify(str(tmp_path))


def test_deleted_data_file(plan: Plan) -> None:
    os.unlink(Path(plan.output) / "data" / receipt_of(plan).data)
    assert len(found(plan, "rows 10 to 19", f"data/{receipt_of(plan).data} is missing")) == 1


def test_flipped_byte(plan: Plan) -> None:
    path = Path(plan.output) / "data" / receipt_of(plan).data
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    found(plan, "has sha256", receipt_of(plan).data)


def with_value(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    """Return `table` with one value changed."""
    index = table.schema.get_field_index(name)
    values = table.column(name).to_pylist()
    values[row] = value
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ticket_id", "T999999", 'column "ticket_id" differs'),
        ("body", "other", 'column "body" differs'),
        ("weight", 0.5, 'column "weight" differs'),
        ("metadata", [("queue", "9")], 'column "metadata" differs'),
        ("status", "rejected", "rows_rejected"),
        ("error_code", "null_text", "error_codes"),
        ("policy_label", "elsewhere", "labels"),
        ("usage", {"prompt_tokens": 1, "cached_tokens": 0, "output_tokens": 0}, "prompt_tokens"),
        ("model_fingerprint", "0" * 16, "was annotated by"),
    ],
)
def test_edited_value(plan: Plan, name: str, value: object, said: str) -> None:
    forge(plan, lambda table: with_value(table, name, 5, value))
    found(plan, said, receipt_of(plan).data)


def test_edited_value_without_a_new_receipt(plan: Plan) -> None:
    edit(Path(plan.output) / "data" / receipt_of(plan).data, lambda table: with_value(table, "body", 5, "other"))
    found(plan, "has sha256")


def test_swapped_rows(plan: Plan) -> None:
    forge(plan, lambda table: table.take([1, 0, *range(2, 10)]))
    found(plan, 'column "ticket_id" differs')


def test_doubled_rows(plan: Plan) -> None:
    forge(plan, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    found(plan, "has 11 rows, its receipt says 10, the plan 10")


def test_doubled_row_in_place_of_another(plan: Plan) -> None:
    forge(plan, lambda table: table.take([0, 0, *range(2, 10)]))
    found(plan, 'column "ticket_id" differs')


def test_dropped_row(plan: Plan) -> None:
    forge(plan, lambda table: table.slice(1), rows=9)
    found(plan, "has 9 rows, its receipt says 9, the plan 10")


def test_dropped_column(plan: Plan) -> None:
    forge(plan, lambda table: table.drop_columns(["policy_scores"]))
    found(plan, "other columns or types")


def test_dropped_receipt(plan: Plan) -> None:
    os.unlink(receipt_url(plan, plan.units[1].unit_id))
    found(plan, "rows 10 to 19", "has no receipt")
    found(plan, "_manifest.json says units_done 4")


@pytest.mark.parametrize("name", ["data/part-x.parquet", "rejects/part-x.parquet", "receipts/x.json", "data/.half"])
def test_orphan(plan: Plan, name: str) -> None:
    (Path(plan.output) / name).write_bytes(b"x")
    assert verify(plan.output) == [f"{name} is an orphan: nothing names it"]


def test_lost_and_edited_rejects(plan: Plan) -> None:
    path = Path(plan.output) / "rejects" / str(receipt_of(plan).rejects)
    edit(path, lambda table: with_value(table, "row", 0, 14))
    found(plan, "does not list the 1 rejected rows")
    os.unlink(path)
    found(plan, "rejects/", "is missing")


def test_receipt_that_forgets_its_rejects(plan: Plan) -> None:
    forge(plan, lambda table: table, rejects=None)
    found(plan, "1 rows", "are rejected, but its receipt names no rejects file")


@pytest.mark.parametrize(
    ("key", "value"), [("rows_annotated", 40), ("labels", {}), ("data", []), ("computed_tokens", 0)]
)
def test_wrong_manifest(plan: Plan, key: str, value: object) -> None:
    path = Path(plan.output) / "_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    found(plan, f"_manifest.json says {key}")


def test_missing_manifest_and_success(plan: Plan) -> None:
    os.unlink(Path(plan.output) / "_SUCCESS")
    found(plan, "_manifest.json or _SUCCESS is missing")
    (Path(plan.output) / "_SUCCESS").touch()
    assert verify(plan.output) == []
    os.unlink(Path(plan.output) / "_manifest.json")
    found(plan, "_manifest.json or _SUCCESS is missing")


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (lambda units: units[:1] + units[2:], "its units end at row 10, but it has 20 rows"),
        (lambda units: units[1:], "begins at row 10, but the unit before it ends at row 0"),
        (lambda units: (*units, units[0]), "is there 2 times"),
        (lambda units: (replace(units[0], skip=3), *units[1:]), "name other rows"),
    ],
)
def test_plan_that_does_not_tile(
    plan: Plan, units: Callable[[tuple[object, ...]], tuple[object, ...]], said: str
) -> None:
    forged = replace(plan, units=units(plan.units))  # type: ignore[arg-type]
    os.unlink(Path(plan.output) / "plan.json")
    write_plan(forged)
    found(plan, said)


def test_changed_input(plan: Plan) -> None:
    Path(plan.units[0].url).write_bytes(to_parquet(tickets(20)))
    found(plan, "rows 0 to 9", "changed since the plan was made")


def test_lost_input(plan: Plan) -> None:
    os.unlink(plan.units[0].url)
    found(plan, "its input rows cannot be read", "gone")


def test_same_values() -> None:
    nan = pa.chunked_array([pa.array([1.0, float("nan"), None])])
    assert same_values(nan, pa.chunked_array([pa.array([1.0, float("nan")]), pa.array([None], pa.float64())]))
    assert not same_values(nan, pa.chunked_array([pa.array([1.0, None, None], pa.float64())]))
    assert not same_values(nan, pa.chunked_array([pa.array([1.0, float("nan"), 0.0])]))
    words = pa.chunked_array([text_array([b"a", b"\xff", None])])
    assert same_values(words, words)
    assert same_values(pc.dictionary_encode(words), pc.dictionary_encode(words))
    assert not same_values(words, pa.chunked_array([text_array([b"a", b"\xfe", None])]))
    assert not same_values(words, words.cast(pa.binary()))
    nested = pa.chunked_array([pa.array([[{"a": float("nan")}], [], None])])
    assert same_values(nested, nested)
    assert not same_values(nested, pa.chunked_array([pa.array([[{"a": 1.0}], [], None])]))
