"""How a run stands, told from its folder alone."""

import time
from pathlib import Path

import pytest

from jobs.status import as_text, status
from pipelines.commit import read_receipts, write_plan
from pipelines.finalize import finalize
from pipelines.stop import BEAT_S, Call, write_call
from schemas.runs import Plan
from tests.fakes import FINGERPRINT, annotate_directly, fake_plan, tickets, write_tickets


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return the plan of a run of four units, one of which is done."""
    write_tickets(tmp_path / "in", "a.parquet", tickets(40), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    write_plan(plan)
    annotate_directly(plan, plan.units[:1])
    return plan


def note_call(plan: Plan, call_id: str, started: float, seconds: float, outcome: str) -> None:
    call = Call(
        call_id=call_id, started=started, seconds=seconds, outcome=outcome, model_fingerprint=FINGERPRINT,
        runner="local", price_per_hour=36.0,
    )  # fmt: skip
    write_call(plan.output, call)


def test_rates_cost_and_time_are_those_of_all_calls(plan: Plan) -> None:
    now = time.time()
    note_call(plan, "a", now - 500, 3.0, "stopped")
    note_call(plan, "b", now - 3, 2.0, "running")
    facts, manifest = status(plan.output)
    assert manifest is None
    assert (facts["status"], facts["outcome"], facts["units_done"], facts["units"]) == ("unfinished", "running", 1, 4)
    (receipt,) = read_receipts(plan).values()
    tokens = receipt.prompt_tokens + receipt.output_tokens
    assert (facts["seconds"], facts["rows_per_second"], facts["tokens_per_second"]) == (5.0, 2.0, round(tokens / 5, 1))
    assert (facts["seconds_left"], facts["cost"], facts["cost_left"]) == (15.0, 0.05, 0.15)
    assert 1.0 <= facts["silent_seconds"] < 60
    text = as_text(facts)
    assert "unfinished (running), 1 of 4 units done" in text
    assert f"5 s so far: 2.0 rows/s, {tokens / 5:,.0f} tokens/s, cost 0.05" in text
    assert "about 15 s to go, cost about 0.15" in text
    assert "its driver was last heard of" in text


def test_a_driver_that_fell_silent_is_told_from_one_that_works(plan: Plan) -> None:
    note_call(plan, "a", time.time() - 10 * BEAT_S, 2.0, "running")
    facts, _ = status(plan.output)
    assert (facts["outcome"], facts["silent_seconds"]) == ("killed", None)


def test_without_a_call_there_is_no_rate(plan: Plan) -> None:
    facts, _ = status(plan.output)
    assert facts["rows_per_second"] is facts["seconds_left"] is facts["cost"] is None
    assert len(as_text(facts).splitlines()) == 1


def test_a_complete_run_has_the_last_word(plan: Plan) -> None:
    annotate_directly(plan, plan.units[1:])
    finalize(plan, max_reject_rate=1.0)
    note_call(plan, "a", time.time() - 20, 10.0, "complete")
    facts, manifest = status(plan.output)
    assert manifest is not None
    assert (facts["status"], facts["outcome"], facts["seconds_left"]) == ("complete", "complete", 0.0)
    assert "to go" not in as_text(facts)
