"""A second run over a grown or edited input computes what is new; whatever is cached, its answers are its own."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.replay import replay
from jobs.report import report
from jobs.run import run
from jobs.spec import JobSpec, load_spec
from jobs.verify import verify
from pipelines import cache_files, graph
from pipelines.commit import read_plan, read_receipts
from schemas.errors import SpecError
from schemas.runs import Manifest
from tests.fake_jobs import dirty_tickets, job_file, open_planned_engine, run_here
from tests.fakes import text_array, write_tickets

HOW = ("route", "usage")
"""The columns that tell how an answer came about; all others are the same however."""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each submission to the fake engine, in whatever process."""
    monkeypatch.setenv("K2_FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


class Done(NamedTuple):
    """A finished run."""

    run_id: str
    output: str
    rows_cached: int
    asked: int
    """Requests that the model got."""


def annotate(path: Path, log: Path) -> Done:
    """Run the job."""
    return _run(path, log, lambda spec: run(spec, open_engine=open_planned_engine)[1])


def annotate_here(path: Path, log: Path) -> Done:
    """Run the job without Beam and its process, which take a second."""
    return _run(path, log, run_here)


def _run(path: Path, log: Path, how: Callable[[JobSpec], Manifest]) -> Done:
    log.write_text("")
    spec = load_spec(str(path))
    manifest = how(spec)
    output = f"{spec.output}{manifest.run_id}"
    assert manifest.status == "complete"
    assert verify(output) == []
    asked = sum(int(line.split()[1]) for line in log.read_text().splitlines())
    return Done(manifest.run_id, output, manifest.rows_cached, asked)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def answers(output: str) -> list[dict[str, object]]:
    """Return the rows of a run, in input order, without how they came about."""
    plan = read_plan(output)
    receipts = read_receipts(plan)
    tables = [pq.read_table(f"{output}/data/{receipts[unit.unit_id].data}") for unit in plan.units]
    rows: list[dict[str, object]] = pa.concat_tables(tables).drop_columns((*HOW, "body")).to_pylist()
    return rows


def routes(output: str) -> dict[str, int]:
    found = pq.read_table(f"{output}/data").column("route").value_counts().to_pylist()
    return {str(one["values"]): one["counts"] for one in found}


def edited() -> pa.Table:
    """Return the tickets with other bodies in rows 2, 3, 5, 8 and 21."""
    table = dirty_tickets()
    bodies = table.column("body").cast(pa.binary()).to_pylist()
    for row in (2, 3, 5, 8, 21):
        bodies[row] = f"other words {row}".encode()
    return table.set_column(1, "body", text_array(bodies))


def test_only_new_and_changed_texts_are_computed(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path)
    first = annotate_here(path, log)
    assert (first.rows_cached, first.asked) == (0, 62)  # 31 distinct texts, two requests each
    assert sorted(file.name.split(".")[2] for file in (tmp_path / "out" / "_cache").iterdir()) == ["merged"]
    write_tickets(tmp_path / "in", "a.parquet", edited(), row_group_size=10)
    new = pa.table({"ticket_id": ["N1", "N2", "N3"], "body": ["ticket 4", "brand new", "brand new"]})
    write_tickets(tmp_path / "in", "b.parquet", new)
    second = annotate(path, log)
    assert second.run_id != first.run_id
    assert second.asked == 2 * (5 + 1)
    assert routes(second.output) == {"cache": 31 - 5 + 1, "large": 6, "duplicate": 3, "None": 7}
    assert second.rows_cached == 27
    assert [receipt.rows_cached for receipt in read_receipts(read_plan(second.output)).values()] == [6, 10, 9, 1, 1]
    assert replay(second.output, 100, open_engine=open_planned_engine).is_equal
    # The same without a cache: the same but for how.
    change(path, "[limits]", "[cache]\nmax_gb = 0\n[limits]")
    change(path, f"{tmp_path}/out/", f"{tmp_path}/elsewhere/")
    third = annotate_here(path, log)
    assert (third.rows_cached, third.asked) == (0, 66)  # "ticket 4" in two units
    assert answers(third.output) == answers(second.output)
    assert not (tmp_path / "elsewhere" / "_cache").exists()


def test_limits_behind_the_model_hit_and_other_words_to_it_miss(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path)
    annotate_here(path, log)
    change(path, 'kind = "choose"', 'kind = "choose"\ncalibrate = true')
    calibrated = annotate_here(path, log)
    assert (calibrated.rows_cached, calibrated.asked) == (31, 3)  # the tickets that say nothing
    change(path, "ordinary talk", "ordinary words")
    assert annotate_here(path, log).asked == 62 + 3


def test_a_lost_cache_costs_time_only_and_a_kill_changes_no_byte(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path)
    annotate_here(path, log)
    write_tickets(tmp_path / "in", "a.parquet", edited(), row_group_size=10)
    second = annotate_here(path, log)
    assert second.asked == 10
    plan = read_plan(second.output)
    before = read_receipts(plan)
    # As a kill leaves it: the unit's answers are cached, and it has no receipt.
    for unit in plan.units[:2]:
        Path(second.output, "receipts", f"{unit.unit_id}.json").unlink()
    (Path(second.output) / "_SUCCESS").unlink()
    (Path(second.output) / "_manifest.json").unlink()
    again = annotate_here(path, log)
    assert (again.run_id, again.asked) == (second.run_id, 8)
    after = read_receipts(plan)
    assert [r.data_sha256 for r in after.values()] == [r.data_sha256 for r in before.values()]
    for file in (tmp_path / "out" / "_cache").iterdir():
        file.unlink()
    os.utime(tmp_path / "in" / "a.parquet")
    third = annotate_here(path, log)
    assert third.asked == 62
    assert answers(third.output) == answers(second.output)


def test_replay_computes_and_so_finds_what_a_forged_cache_said(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path)
    annotate_here(path, log)
    (file,) = (tmp_path / "out" / "_cache").iterdir()
    table = pq.read_table(file)
    forged = pa.array([[-3.0, -0.1] if row else row for row in table["logprobs"].to_pylist()], pa.list_(pa.float64()))
    file.write_bytes(cache_files.to_parquet(table.set_column(1, table.schema.field(1), forged)))
    os.utime(tmp_path / "in" / "a.parquet")
    second = annotate_here(path, log)
    assert second.asked == 0
    found = replay(second.output, 100, open_engine=open_planned_engine)
    assert {flip.column for flip in found.flips} >= {"policy_score", "policy_scores"}
    assert len({flip.row for flip in found.flips}) == 33


def test_the_cache_is_pruned_when_a_run_ends(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path, more="[cache]\nmax_gb = 1e-9\n")
    annotate_here(path, log)
    assert list((tmp_path / "out" / "_cache").iterdir()) == []
    assert load_spec(str(path)).cache_gb == 1e-9


def test_the_cache_may_be_turned_on_and_off_between_the_calls_of_a_run(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path)
    first = annotate_here(path, log)
    Path(first.output, "receipts", f"{read_plan(first.output).units[0].unit_id}.json").unlink()
    change(path, "[limits]", "[cache]\nmax_gb = 0\n[limits]")
    again = annotate_here(path, log)
    assert again.run_id == first.run_id


def test_a_real_model_says_the_same_cached_and_computed(tmp_path: Path, checkpoint: str) -> None:
    path = job_file(tmp_path)
    write_tickets(tmp_path / "in", "a.parquet", dirty_tickets().slice(0, 20))
    text = path.read_text().replace(str(tmp_path / "checkpoint"), checkpoint)
    path.write_text(text.replace("max_prompt_tokens = 4096", "max_prompt_tokens = 1024"))
    first = run_here(load_spec(str(path)), graph.open_model)
    os.utime(tmp_path / "in" / "a.parquet")
    second = run_here(load_spec(str(path)), graph.open_model)
    assert (first.rows_annotated, first.rows_cached, second.rows_cached) == (20, 0, 20)
    assert first.computed_tokens > second.computed_tokens == 0
    outputs = [f"{tmp_path}/out/{manifest.run_id}" for manifest in (first, second)]
    assert answers(outputs[0]) == answers(outputs[1])
    assert replay(outputs[1], 5).is_equal


def test_the_verb_says_what_is_kept_and_deletes_it(
    tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate_here(job_file(tmp_path), log)
    (file,) = (tmp_path / "out" / "_cache").iterdir()
    assert main(["cache", f"{tmp_path}/out", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "files": 1,
        "bytes": file.stat().st_size,
        "models": 1,
        "deleted_files": 0,
        "deleted_bytes": 0,
    }
    assert main(["cache", f"{tmp_path}/out/", "--max-gb", "0"]) == 0
    assert "0 files of kept answers, 0.000 GB, of 0 models; 1 files" in capsys.readouterr().out
    assert not file.exists()
    with pytest.raises(SystemExit):
        main(["cache", f"{tmp_path}/out/", "--max-gb", "-1"])


def test_the_report_tells_the_rows_that_earlier_runs_answered(tmp_path: Path, log: Path) -> None:
    path = job_file(tmp_path)
    first = annotate_here(path, log)
    os.utime(tmp_path / "in" / "a.parquet")
    second = annotate_here(path, log)
    texts = [report(run.output)[0] for run in (first, second)]
    assert ["cached    31 rows" in text for text in texts] == [False, True]
    assert "<b>31</b>answered in earlier runs" in Path(second.output, "report.html").read_text()


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "true", '"10"'])
def test_a_size_is_a_number_from_0(tmp_path: Path, value: str) -> None:
    path = job_file(tmp_path, more=f"[cache]\nmax_gb = {value}\n")
    with pytest.raises(SpecError, match=r"\[cache\] max_gb"):
        load_spec(str(path))
