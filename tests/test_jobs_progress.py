"""How far a run is: what the receipts say, and the line made of it."""

import time
from pathlib import Path

import pytest

from jobs import progress
from jobs.progress import Progress, duration, progress_line, watch
from pipelines import poison
from pipelines.commit import read_receipts, receipt_url
from schemas.runs import Plan, Receipt, Unit
from tests.fakes import annotate_directly, fake_plan, text_array, tickets, write_tickets


def run_unit(plan: Plan, unit: Unit) -> Receipt:
    annotate_directly(plan, [unit])
    return read_receipts(plan)[unit.unit_id]


def moment(**values: object) -> Progress:
    known: dict[str, object] = {
        "run_id": "test-1", "units": 4, "units_done": 3, "rows": 2_000, "rows_done": 1_500, "rows_now": 500,
        "seconds": 10.0, "rows_per_second": 50.0, "tokens_per_second": 5_120.4, "seconds_left": 10.0, "cost": None,
    }  # fmt: skip
    return Progress(**known | values)  # type: ignore[arg-type]


def test_a_line_gives_rates_time_and_cost() -> None:
    line = progress_line(moment())
    assert line == "  3/4 units · 1,500/2,000 tickets (75 %) · 50.0 tickets/s · 5,120 tokens/s · 10 s to go"
    assert progress_line(moment(cost=3.456)).endswith("10 s to go · cost 3.46")
    nothing = moment(units_done=0, rows_done=0, rows_now=0, rows_per_second=0.0, seconds_left=None, seconds=45.0)
    assert progress_line(nothing) == "  0/4 units · 0/2,000 tickets (0 %) · 45 s so far"
    assert progress_line(moment(units_done=4, rows_done=2_000, seconds_left=0.0)).endswith("5,120 tokens/s · 10 s")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (7_500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_receipts_are_counted_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.02)
    write_tickets(tmp_path / "in", "a.parquet", tickets(40), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    before = run_unit(plan, plan.units[0])
    seen: list[Progress] = []
    said: list[str] = []
    with watch(plan, {plan.units[0].unit_id}, [seen.append], say=said.append, cost=lambda seconds: 1 + seconds):
        receipts = [run_unit(plan, unit) for unit in plan.units[1:3]]
        deadline = time.monotonic() + 10
        while not seen or seen[-1].units_done < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        last_early = seen[-1]
        receipts.append(run_unit(plan, plan.units[3]))
    assert (last_early.rows_done, last_early.rows_now, last_early.rows) == (30, 20, 40)
    assert last_early.seconds_left == pytest.approx(last_early.seconds / 2)
    last = seen[-1]
    assert (last.units, last.units_done, last.rows_done, last.rows_now, last.seconds_left) == (4, 4, 40, 30, 0)
    tokens = sum(receipt.prompt_tokens + receipt.output_tokens for receipt in receipts)
    assert before.prompt_tokens > 0
    assert last.tokens_per_second == pytest.approx(tokens / last.seconds)
    assert last.cost == 1 + last.seconds
    for name in ("prompt_tokens", "computed_tokens", "output_tokens"):
        assert getattr(last, name) == pytest.approx(sum(getattr(receipt, name) for receipt in receipts))
    assert (last.units_under_way, last.units_quarantined, last.rows_rejected) == (0, 0, {})
    assert last.engine_busy == pytest.approx(sum(receipt.engine_busy for receipt in receipts) / 3)
    assert said == []


def test_tokens_of_receipts_not_read_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "RECEIPTS_READ", 1)
    write_tickets(tmp_path / "in", "a.parquet", tickets(40), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    receipts = {unit.unit_id: run_unit(plan, unit) for unit in plan.units}
    seen: list[Progress] = []
    with watch(plan, set(), [seen.append], say=print):
        pass
    first = receipts[min(receipts)]
    assert seen[-1].tokens_per_second * seen[-1].seconds == pytest.approx(
        4 * (first.prompt_tokens + first.output_tokens)
    )


def test_rejects_and_units_under_way_are_counted(tmp_path: Path) -> None:
    bodies = [None, b"", b"x"] * 4
    table = tickets(12).set_column(1, "subject", text_array([None] * 12)).set_column(2, "body", text_array(bodies))
    write_tickets(tmp_path / "in", "a.parquet", table, row_group_size=6)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=6)
    run_unit(plan, plan.units[0])
    ended, under_way = plan.units
    for unit in (ended, under_way):  # a receipt was written just now, and the note not yet deleted
        poison.write(plan, poison.Attempts(unit_id=unit.unit_id, doing="unit", suspect=True))
    seen: list[Progress] = []
    with watch(plan, set(), [seen.append], say=print):
        pass
    assert seen[-1].rows_rejected == {"null_text": 2.0, "blank_text": 2.0}
    assert (seen[-1].units_under_way, seen[-1].units_quarantined) == (1, 1)


def test_a_store_that_does_not_answer_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tickets(tmp_path / "in", "a.parquet", tickets(10))
    plan = fake_plan([tmp_path / "in"], tmp_path / "out")
    run_unit(plan, plan.units[0])
    Path(receipt_url(plan, plan.units[0].unit_id)).write_text("torn")
    seen: list[Progress] = []
    with watch(plan, set(), [seen.append], say=print):
        pass
    assert (seen[-1].units_done, seen[-1].tokens_per_second) == (1, 0)

    def refuse(plan: object) -> frozenset[str]:
        raise OSError("no route")

    monkeypatch.setattr(progress, "done_units", refuse)
    said: list[str] = []
    with watch(plan, set(), [seen.append], say=said.append):
        pass
    assert said == ["  progress cannot be read just now: no route"]


def test_looking_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.001)
    looks: list[float] = []

    def slow(plan: object) -> frozenset[str]:
        looks.append(time.perf_counter())
        time.sleep(0.02)
        return frozenset()

    monkeypatch.setattr(progress, "done_units", slow)
    write_tickets(tmp_path / "in", "a.parquet", tickets(10))
    plan = fake_plan([tmp_path / "in"], tmp_path / "out")
    with watch(plan, set(), [], say=print):
        time.sleep(1.0)
    assert 2 <= len(looks) <= 5
