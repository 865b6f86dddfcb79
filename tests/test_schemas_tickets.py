"""The contract of an input table, and the records that cross storage."""

from typing import Any

import pyarrow as pa
import pytest

from schemas.runs import Manifest, ModelFlops, Plan, Receipt, RejectedFile, Task, Unit, digest
from schemas.tickets import TicketColumns, differences

COLUMNS = TicketColumns(id="ticket_id", text=("subject", "body"), optional=("subject",))


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.null()]
)
def test_every_way_to_store_text_is_text(type_: pa.DataType) -> None:
    assert differences(pa.schema([("body", type_), ("ticket_id", pa.int64())]), COLUMNS) == []


def test_every_difference_is_listed_with_its_remedy() -> None:
    schema = pa.schema([("ticket_idd", pa.string()), ("subject", pa.int64()), ("body", pa.binary())])
    assert differences(schema, COLUMNS) == [
        ("missing_column", 'column "ticket_id" is missing, did you mean "ticket_idd"?'),
        ("wrong_type", 'column "subject" is int64, expected string'),
        ("wrong_type", 'column "body" is binary, expected string'),
    ]


def test_a_column_that_occurs_twice_is_no_column() -> None:
    schema = pa.schema([("ticket_id", pa.string()), ("body", pa.string()), ("body", pa.string())])
    assert differences(schema, COLUMNS) == [("wrong_type", 'column "body" occurs more than once')]


def test_records_come_back_from_json_as_they_were() -> None:
    unit = Unit(unit_id="u", url="s3://b/x", etag="e", row_groups=(0, 2), skip=3, rows=9, first_row=3)
    bad = RejectedFile(url="s3://b/y", error_code="unreadable_file", error_message="…")
    plan = Plan(
        run_id="r", job="j", output="out/r", columns=COLUMNS, tasks=(Task(name="t", kind="choose", labels={"ä": "b"}),),
        checkpoint="c", model_fingerprint="f", mode="cpu", prefix="", max_prompt_tokens=1, units=(unit,),
        rejected_files=(bad,), files=2, flops=ModelFlops(token=8, all_experts=20, expert=2),
    )  # fmt: skip
    assert Plan.from_json(plan.to_json(), plan.units) == plan
    totals: Any = {"prompt_tokens": 1, "computed_tokens": 1, "output_tokens": 0}
    receipt = Receipt(
        unit_id="u", attempt="a", data="d", data_sha256="s", rejects=None, rows=9, rows_annotated=8, rows_rejected=1,
        error_codes={"blank_text": 1}, labels={"t": {"ä": 8}}, seconds=0.5, flops={"computed": 7}, **totals,
    )  # fmt: skip
    assert Receipt.from_json(receipt.to_json()) == receipt
    manifest = Manifest(
        run_id="r", status="incomplete", outcome="deadline", rows_in=9, rows_annotated=8, rows_rejected=1, units=1,
        units_done=1, error_codes={}, labels={}, data=("d",), rejects=(), rejected_files=(bad,), **totals,
    )  # fmt: skip
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_digest_does_not_follow_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
