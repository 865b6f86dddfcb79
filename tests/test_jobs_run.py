"""One run: its summary, its progress, its resumption and its exit code."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.run import exit_code, run
from jobs.spec import load_spec
from pipelines.finalize import make_manifest
from schemas.errors import SchemaMismatch
from schemas.runs import Plan, RejectedFile
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import FakeEngine, fake_plan, tickets, write_tickets


def open_no_engine(plan: Plan) -> FakeEngine:
    raise AssertionError("a finished run must not open the model")


def test_run_annotates_every_row_once_and_a_second_call_computes_nothing(tmp_path: Path) -> None:
    spec = load_spec(str(job_file(tmp_path)))
    said: list[str] = []
    first, manifest = run(spec, say=said.append, open_engine=open_planned_engine)
    assert (first.status, first.rows_in, first.rows_annotated, first.rows_rejected) == ("complete", 40, 33, 7)
    assert (first.units, exit_code(manifest)) == (4, 0)
    assert first.tickets_per_second > 0
    assert first.prompt_tokens >= first.computed_tokens > 0
    assert "40 tickets in 1 files, 4 units" in said[0]
    folder = Path(first.output)
    assert (folder / "_SUCCESS").exists()
    written = {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}

    second, _ = run(spec, open_engine=open_no_engine)
    assert second.tickets_per_second == 0
    totals = ("run_id", "status", "rows_in", "rows_annotated", "rows_rejected", "units", "prompt_tokens", "output")
    assert [getattr(second, name) for name in totals] == [getattr(first, name) for name in totals]
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()} == written


def test_a_lost_receipt_is_the_only_unit_done_again(tmp_path: Path) -> None:
    spec = load_spec(str(job_file(tmp_path)))
    first, _ = run(spec, open_engine=open_planned_engine)
    receipts = sorted(Path(first.output, "receipts").glob("*.json"))
    kept = {path: path.read_bytes() for path in receipts[1:]}
    receipts[0].unlink()
    said: list[str] = []
    again, _ = run(spec, say=said.append, open_engine=open_planned_engine)
    assert again.status == "complete"
    assert any("3 units are done already, 1 to go" in line for line in said)
    assert {path: path.read_bytes() for path in receipts[1:]} == kept
    assert len(list(Path(first.output, "data").iterdir())) == 4


def test_too_many_rejects_is_no_success_until_the_limit_says_so(tmp_path: Path) -> None:
    strict = load_spec(str(job_file(tmp_path, max_reject_rate=0.1)))
    summary, manifest = run(strict, open_engine=open_planned_engine)
    assert (summary.status, exit_code(manifest)) == ("too_many_rejects", 6)
    assert not Path(summary.output, "_SUCCESS").exists()
    text = (tmp_path / "job.toml").read_text().replace("max_reject_rate = 0.1", "max_reject_rate = 0.5")
    (tmp_path / "job.toml").write_text(text)
    lenient, _ = run(load_spec(str(tmp_path / "job.toml")), open_engine=open_no_engine)
    assert (lenient.status, lenient.run_id) == ("complete", summary.run_id)


def test_a_bad_file_leaves_the_others_annotated_and_exits_3(tmp_path: Path) -> None:
    spec = load_spec(str(job_file(tmp_path)))
    (tmp_path / "in" / "broken.parquet").write_bytes(b"PAR1 nothing")
    said: list[str] = []
    summary, manifest = run(spec, say=said.append, open_engine=open_planned_engine)
    assert (summary.status, summary.rows_annotated, exit_code(manifest)) == ("incomplete", 33, 3)
    assert any("broken.parquet: unreadable_file" in line for line in said)


def test_on_bad_file_fail_writes_nothing(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    path.write_text(path.read_text().replace("unit_rows = 10", 'unit_rows = 10\non_bad_file = "fail"'))
    (tmp_path / "in" / "broken.parquet").write_bytes(b"")
    with pytest.raises(SchemaMismatch, match=r"broken\.parquet"):
        run(load_spec(str(path)), open_engine=open_planned_engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("outcome", "has_bad_file", "code"),
    [
        ("complete", False, 0),
        ("incomplete", False, 5),
        ("incomplete", True, 3),
        ("too_many_rejects", False, 6),
        ("deadline", False, 5),
        ("budget", False, 5),
        ("stopped", True, 5),  # the others of its units may yet be done
    ],
)
def test_exit_codes_are_the_documented_ones(outcome: str, has_bad_file: bool, code: int, tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(1))
    bad = RejectedFile(url="u", error_code="wrong_type", error_message="m")
    plan = fake_plan([tmp_path], tmp_path / "out")
    manifest = make_manifest(plan, [], {plan.units[0].unit_id: bad} if has_bad_file else {}, max_reject_rate=1.0)
    assert exit_code(replace(manifest, outcome=outcome)) == code
