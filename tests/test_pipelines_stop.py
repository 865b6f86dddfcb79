"""Whether a unit may still be begun: a record that asks to stop, a moment to end by, and in which order units go."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import runners
from pipelines import stop as stopping
from pipelines.commit import done_units, read_receipts, write_plan
from pipelines.graph import Flow, ReadUnit, close_engines
from pipelines.runners import run_units
from pipelines.stop import (
    BEAT_S,
    Call,
    Stop,
    call_url,
    longest_first,
    may_begin,
    note_pace,
    pace_of,
    read_calls,
    work,
    write_call,
)
from schemas.runs import Plan, Unit
from tests.fakes import POLICY, FakeEngine, fake_plan, open_fake_engine, open_slow_fake_engine, tickets, write_tickets

UNIT = Unit(unit_id="u", url="a.parquet", etag="e", row_groups=(0, 1), skip=0, rows=10, first_row=0, text_bytes=5000)
CALL = Call(call_id="c", started=1000.0, model_fingerprint="f", runner="local")
IN_PROCESS = ["--runner=FnApiRunner"]


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every question look at the record, and forget what other tests saw."""
    monkeypatch.setattr(stopping, "_LOOK_S", 0.0)
    monkeypatch.setattr(stopping, "_SEEN", {})


def planned(tmp_path: Path, num_units: int = 10) -> Plan:
    write_tickets(tmp_path / "in", "a.parquet", tickets(10 * num_units), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10, tasks=(POLICY,))
    write_plan(plan)
    return plan


def test_no_unit_is_begun_once_the_record_says_stopped(tmp_path: Path) -> None:
    stop = Stop(call_url=call_url(str(tmp_path), "c"))
    assert may_begin(stop, UNIT)  # no record yet
    write_call(str(tmp_path), CALL)
    assert may_begin(stop, UNIT)
    write_call(str(tmp_path), replace(CALL, outcome="stopped"))
    assert not may_begin(stop, UNIT)
    (tmp_path / "calls" / "c.json").unlink()
    assert not may_begin(stop, UNIT)  # a stop is not taken back


def test_another_call_and_a_damaged_record_stop_nobody(tmp_path: Path) -> None:
    write_call(str(tmp_path), replace(CALL, call_id="dead", outcome="stopped"))
    (tmp_path / "calls" / "c.json").write_text('{"outcome": "sto')
    assert may_begin(Stop(call_url=call_url(str(tmp_path), "c")), UNIT)
    assert [call.call_id for call in read_calls(str(tmp_path))] == ["dead"]


def test_the_record_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_LOOK_S", 60.0)
    write_call(str(tmp_path), CALL)
    stop = Stop(call_url=call_url(str(tmp_path), "c"))
    assert may_begin(stop, UNIT)
    write_call(str(tmp_path), replace(CALL, outcome="stopped"))
    assert may_begin(stop, UNIT)


def test_a_unit_is_begun_if_it_can_end_in_time(tmp_path: Path) -> None:
    stop = Stop(call_url=call_url(str(tmp_path), "c"), at=time.time() + 60)
    assert may_begin(stop, UNIT)  # nothing is known of how long it takes
    for _ in range(8):
        note_pace(stop, UNIT, 50.0)
    assert may_begin(stop, UNIT)
    assert not may_begin(stop, replace(UNIT, rows=20, text_bytes=10_000))
    for _ in range(5):  # of the last eight, most took longer
        note_pace(stop, UNIT, 70.0)
    assert not may_begin(stop, UNIT)
    assert may_begin(stop, replace(UNIT, rows=1, text_bytes=10))
    assert not may_begin(replace(stop, at=time.time()), replace(UNIT, rows=1, text_bytes=10))


def test_the_pace_of_earlier_calls_counts_until_there_is_a_newer(tmp_path: Path) -> None:
    stop = Stop(call_url=call_url(str(tmp_path), "c"), at=time.time() + 60, pace=70 / work(UNIT))
    assert not may_begin(stop, UNIT)
    note_pace(stop, UNIT, 1.0)
    assert may_begin(stop, UNIT)


def test_pace_is_the_median_of_receipts(tmp_path: Path) -> None:
    plan = planned(tmp_path, 3)
    run_units(plan, plan.units, runner="portable", options=IN_PROCESS, open_engine=open_fake_engine)
    receipts = read_receipts(plan)
    seconds = (1.0, 900.0, 2.0)
    done = [(unit, replace(receipts[unit.unit_id], seconds=s)) for unit, s in zip(plan.units, seconds, strict=True)]
    assert pace_of(done) == pytest.approx(2.0 / work(plan.units[2]))
    assert pace_of([]) == 0.0


def test_units_go_longest_first_and_texts_count(tmp_path: Path) -> None:
    for name, rows, words in (("a", 10, 1), ("b", 40, 1), ("c", 10, 20_000), ("d", 10, 1)):
        texts = [f"{name}{row} " + "word " * words for row in range(rows)]
        table = pa.table({"ticket_id": texts, "subject": texts, "body": texts})
        write_tickets(tmp_path / "in", f"{name}.parquet", table)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out")
    assert [Path(unit.url).stem for unit in longest_first(plan.units)] == ["c", "b", "a", "d"]


def test_slices_of_a_row_group_share_its_bytes(tmp_path: Path) -> None:
    write_tickets(tmp_path / "in", "a.parquet", tickets(100))
    units = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=40).units
    (whole,) = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=100).units
    assert [unit.rows for unit in units] == [40, 40, 20]
    assert whole.text_bytes > 100 * len("subject 1" + "body of ticket 1")
    assert [unit.text_bytes for unit in units] == [whole.text_bytes * unit.rows // 100 for unit in units]


def test_a_flow_ends_by_its_moment_to_about_a_unit(tmp_path: Path) -> None:
    plan = planned(tmp_path, 30)
    at = time.time() + 2.0
    stop = Stop(call_url=call_url(plan.output, "c"), at=at)
    run_units(plan, plan.units, runner="portable", options=IN_PROCESS, open_engine=open_slow_fake_engine, stop=stop)
    done = done_units(plan)
    assert len(done) < 30
    ends = [(Path(plan.output) / "receipts" / f"{unit_id}.json").stat().st_mtime for unit_id in done]
    assert max(ends, default=0.0) < at + 0.4  # what a unit takes


def _open_late(plan: Plan) -> FakeEngine:
    time.sleep(1.0)
    return FakeEngine()


def test_no_unit_is_begun_if_opening_the_model_took_too_long(tmp_path: Path) -> None:
    plan = planned(tmp_path, 1)
    stop = Stop(call_url=call_url(plan.output, "c"), at=time.time() + 0.9)
    try:
        assert ReadUnit(Flow(plan=plan, open_engine=_open_late, stop=stop)).apply(plan.units[0]) is None
        assert time.time() > stop.at  # type: ignore[operator]
        assert ReadUnit(Flow(plan=plan, open_engine=_open_late)).apply(plan.units[0]) is not None
    finally:
        close_engines()


def test_no_further_round_is_begun_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "ROUND_UNITS", 2)
    plan = planned(tmp_path, 5)
    write_call(plan.output, CALL)
    rounds = runners._rounds(plan.units, Stop(call_url=call_url(plan.output, "c")))
    assert next(rounds) == plan.units[:2]
    write_call(plan.output, replace(CALL, outcome="stopped"))
    assert list(rounds) == []
    assert list(runners._rounds(plan.units, Stop(call_url=call_url(plan.output, "d"), at=time.time()))) == []


def test_dask_begins_units_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("K2_FAKE_LOG", str(log))
    for rows in range(1, 31):
        write_tickets(tmp_path / "in", f"{rows:02}.parquet", tickets(rows, start=1000 * rows))
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", tasks=(POLICY,))
    write_plan(plan)
    order = longest_first(plan.units)
    run_units(plan, order, runner="dask", workers=1, open_engine=open_slow_fake_engine)
    begun = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert sorted(begun) == list(range(1, 31))
    # The first tasks are handed out before all are known, and three threads go at once.
    late = begun[10:]
    assert max(late) <= 25
    assert all(after - before < 6 for before, after in pairwise(late))


def test_a_call_that_fell_silent_was_killed() -> None:
    call = replace(CALL, seconds=100.0)
    assert call.outcome_at(1100.0 + BEAT_S) == "running"
    assert call.outcome_at(1100.0 + 4 * BEAT_S) == "killed"
    assert replace(call, outcome="deadline").outcome_at(1e9) == "deadline"
