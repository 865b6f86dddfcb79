"""How a run stands, told from its folder alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import stopping
from jobs.status import as_text, status
from pipelines import commit, poison
from pipelines.commit import read_receipts, write_plan
from pipelines.finalize import finalize
from pipelines.stop import BEAT_S, SILENCE_S, Call, write_call
from schemas.runs import Plan, Receipt
from tests.fake_jobs import job_file
from tests.fakes import FINGERPRINT, annotate_directly, fake_plan, tickets, write_tickets

ROOT = Path(__file__).parents[1]


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


def test_units_under_way_are_told_from_those_of_a_dead_driver(plan: Plan) -> None:
    note_call(plan, "a", time.time() - 60, 1.0, "running")
    poison.write(plan, poison.Attempts(unit_id=plan.units[1].unit_id, doing="unit", begun=1))
    poison.write(plan, poison.Attempts(unit_id=plan.units[2].unit_id, doing="", suspect=True))
    facts, _ = status(plan.output)
    assert (facts["units_under_way"], facts["units_abandoned"], facts["units_quarantined"]) == (1, 0, 1)
    text = as_text(facts)
    assert "  1 unit under way\n  1 unit under which processes died" in text
    assert "last heard of 59 s ago; while it lives, that is 30 s at most" in text
    note_call(plan, "a", time.time() - 1000, 1.0, "running")
    facts, _ = status(plan.output)
    assert (facts["outcome"], facts["units_under_way"], facts["units_abandoned"]) == ("killed", 0, 1)
    assert "1 unit begun by a call that ended before" in as_text(facts)
    note_call(plan, "a", time.time() - 5, 1.0, "stopped")  # and about to end its last unit
    assert status(plan.output)[0]["units_under_way"] == 1


def test_sums_of_many_receipts_are_estimated_from_some(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    annotate_directly(plan, plan.units[1:])
    finalize(plan, max_reject_rate=1.0)
    exact, _ = status(plan.output)
    Path(plan.output, "_SUCCESS").unlink()
    Path(plan.output, "_manifest.json").unlink()
    assert not status(plan.output)[0]["is_estimate"]
    read: list[str] = []

    def read_receipt(plan: Plan, unit_id: str) -> Receipt | None:
        read.append(unit_id)
        return commit.read_receipt(plan, unit_id)

    monkeypatch.setattr(stopping, "read_receipt", read_receipt)
    monkeypatch.setattr("jobs.status.RECEIPTS_READ", 2)
    facts, _ = status(plan.output)
    assert read == [plan.units[0].unit_id, plan.units[2].unit_id]
    assert facts["is_estimate"]
    keys = ("units_done", "rows_annotated", "rows_rejected")
    assert [facts[key] for key in keys] == [exact[key] for key in keys]
    assert "4 of 4 units done, about 40 rows annotated" in as_text(facts)


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


def watched(run_url: str) -> dict[str, Any]:
    """Return what another process tells of the run."""
    command = [sys.executable, "-m", "jobs.cli", "status", run_url, "--json"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode in (0, 5), said.stderr
    facts: dict[str, Any] = json.loads(said.stdout)
    return facts


def started(job: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "jobs.cli", "run", str(job), "--progress", "json"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=quiet, stderr=quiet)


def test_another_process_watches_a_run_that_is_killed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K2BATCH_CACHE", str(tmp_path / "cache"))
    job = job_file(tmp_path)
    write_tickets(tmp_path / "in", "a.parquet", tickets(1_000), row_group_size=10)
    driver = started(job)
    try:
        deadline = time.monotonic() + 120
        while not (receipts := list((tmp_path / "out").glob("sweep-*/receipts/*.json"))):
            assert driver.poll() is None, "the run ended before anybody saw it"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(driver.pid, signal.SIGSTOP)  # it lives, and waits for the watcher
        run_url = str(receipts[0].parents[1])
        seen = watched(run_url)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert (seen["status"], seen["outcome"], seen["units"]) == ("unfinished", "running", 100)
    assert 1 <= seen["units_done"] < 100
    with monkeypatch.context() as later:
        later.setattr("jobs.status.time.time", lambda now=time.time: now() + 2 * SILENCE_S)
        killed, _ = status(run_url)
    assert (killed["status"], killed["outcome"], killed["units_under_way"]) == ("unfinished", "killed", 0)
    assert killed["units_done"] == seen["units_done"]

    driver = started(job)
    assert driver.wait(timeout=120) == 0
    facts = watched(run_url)
    assert (facts["status"], facts["units_done"], facts["units_abandoned"]) == ("complete", 100, 0)
    assert facts["rows_annotated"] + facts["rows_rejected"] == 1_000
    assert facts["seconds"] > killed["seconds"]  # both calls are counted
