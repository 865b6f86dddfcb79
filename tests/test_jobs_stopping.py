"""Stopping a run: signals, deadline, budget. What is done is kept, the rest is told, going on gives the same bytes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import stopping
from jobs.limits import Limit
from jobs.run import Summary, exit_code, left_text, resumable, run
from jobs.spec import JobSpec, load_spec
from pipelines.commit import read_plan, read_receipts
from pipelines.finalize import read_manifest
from pipelines.giving_up import GIVEN_UP
from pipelines.stop import Call, read_calls, write_call
from schemas.errors import StorageError
from schemas.runs import Plan
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import FakeEngine, tickets, write_tickets

ROOT = Path(__file__).parents[1]
IN_PROCESS = {"runner": "portable", "options": ["--runner=FnApiRunner"]}


def long_job(tmp_path: Path, more: str = "") -> Path:
    """Write a job of 24 units; return its path."""
    job = job_file(tmp_path, more=more)
    write_tickets(tmp_path / "in", "b.parquet", tickets(200, start=1000), row_group_size=10)
    return job


def spec_of(job: Path, **limits: Any) -> JobSpec:
    """Return the job, to be run in this process by one thread; `price_per_hour` is 3600, a second costs 1."""
    return load_spec(str(job), {"deploy": {**IN_PROCESS, "price_per_hour": 3600.0}, "limits": limits})


def open_slow_engine(plan: Plan) -> FakeEngine:
    return FakeEngine(fingerprint=plan.model_fingerprint, pause_s=0.2)


def open_no_engine(plan: Plan) -> FakeEngine:
    raise AssertionError("no unit may be begun")


def open_engine_and_terminate(plan: Plan) -> FakeEngine:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return open_slow_engine(plan)


def digests(summary: Summary) -> dict[str, str]:
    """Return the digest of each done unit's data file."""
    return {name: receipt.data_sha256 for name, receipt in read_receipts(read_plan(summary.output)).items()}


def dead_call(output: str, **fields: Any) -> None:
    """Leave the record of a call that ended long ago."""
    write_call(output, replace(Call(call_id="dead", started=1000.0, model_fingerprint="f", runner="local"), **fields))


DRIVER = """
import pathlib
import sys
from pipelines import storage
from tests.fakes import FakeEngine
from jobs.cli import leave, main

def refuse(*given):
    raise ConnectionRefusedError("nobody listens")

class Engine(FakeEngine):
    def submit(self, requests):
        pathlib.Path(sys.argv[3]).touch()
        return super().submit(requests)

def open_engine(plan):
    pause_s = float(sys.argv[2])
    if pause_s < 0:
        pathlib.Path(sys.argv[3]).touch()
        storage._write_local = refuse
    return Engine(fingerprint=plan.model_fingerprint, pause_s=max(0.0, pause_s))

if __name__ == "__main__":
    leave(main(["run", sys.argv[1], *sys.argv[4:], "--json"], open_engine=open_engine))
"""


@contextmanager
def driven(job: Path, pause_s: float, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Yield a process, in a group of its own, that runs the job, once a unit, which takes `pause_s`, is under way.

    Or once the model is open and has taken the store away, if `pause_s` is negative; or once it has ended, if it has a
    limit.
    """
    script, mark = job.with_name("drive.py"), job.with_name("open")
    script.write_text(DRIVER)
    command = [sys.executable, str(script), str(job), str(pause_s), str(mark), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            wait_for(lambda: mark.exists() or (words and process.poll() is not None), process)
            yield process
        finally:
            process.kill()


def wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "words", [(), pytest.param(("--runner", "dask", "--workers", "2"), marks=pytest.mark.slow)], ids=["local", "dask"]
)
def test_ctrl_c_keeps_what_is_under_way_and_the_next_call_gives_the_same_bytes(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    job = long_job(tmp_path)
    with driven(job, 0.5, *words) as process:
        wait_for(lambda: len(list((tmp_path / "out").glob("*/receipts/*.json"))) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers must not end of it
        out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert "SIGINT: no further unit is begun; once more: leave at once" in err
    summary = json.loads(out)
    assert (summary["status"], summary["outcome"]) == ("incomplete", "stopped")
    folder = Path(summary["output"])
    assert not (folder / "_SUCCESS").exists()
    manifest = read_manifest(str(folder))
    assert manifest is not None
    assert (manifest.status, manifest.outcome) == ("incomplete", "stopped")
    assert summary["units_left"] == 24 - len(list((folder / "receipts").iterdir())) > 0
    assert summary["rows_in"] == summary["rows_left"] + summary["rows_annotated"] + summary["rows_rejected"]
    assert summary["resume"] == " ".join(["k2batch run", str(job), *words])
    assert [call.outcome for call in read_calls(str(folder))] == ["stopped"]
    resumed, _ = run(spec_of(job), open_engine=open_planned_engine)
    assert (resumed.outcome, resumed.units_left, resumed.resume) == ("complete", 0, "")
    undisturbed = load_spec(str(job), {"deploy": IN_PROCESS, "output": {"url": str(tmp_path / "other")}})
    assert digests(run(undisturbed, open_engine=open_planned_engine)[0]) == digests(resumed)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    with driven(long_job(tmp_path), 60) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "are being finished" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 5
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "running the same command again resumes" in err
    (record,) = (tmp_path / "out").glob("*/calls/*.json")
    assert json.loads(record.read_text())["outcome"] == "stopped"


def test_after_sigterm_units_have_the_grace_and_no_longer(tmp_path: Path) -> None:
    with driven(long_job(tmp_path, more="grace_seconds = 0.5"), 600) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert "units are still under way after" in err
    assert_given_up(json.loads(out), "stopped")


def assert_given_up(summary: dict[str, Any], outcome: str) -> None:
    """Nothing was done, nothing is published, no unit is blamed, and the run goes on to the bytes of another."""
    assert (summary["status"], summary["outcome"], summary["units_left"]) == ("incomplete", outcome, 24)
    folder = Path(summary["output"])
    assert not (folder / "_SUCCESS").exists()
    assert [call.outcome for call in read_calls(str(folder))] == [outcome]
    begun = [json.loads(path.read_text()) for path in (folder / "attempts").glob("*.json")]
    assert [(attempts["doing"], attempts["deaths"]) for attempts in begun] == [("", 0)] * len(begun)
    job = folder.parents[1] / "job.toml"
    resumed, _ = run(spec_of(job), open_engine=open_planned_engine)
    assert (resumed.outcome, resumed.units_left) == ("complete", 0)
    undisturbed = load_spec(str(job), {"deploy": IN_PROCESS, "output": {"url": str(job.with_name("other"))}})
    assert digests(run(undisturbed, open_engine=open_planned_engine)[0]) == digests(resumed)


@pytest.mark.parametrize(
    ("words", "outcome"), [(("--deadline", "8s"), "deadline"), (("--max-cost", "8"), "budget")], ids=["time", "cost"]
)
def test_a_limit_and_its_grace_are_a_hard_bound(tmp_path: Path, words: tuple[str, ...], outcome: str) -> None:
    more = "grace_seconds = 0.5\n[deploy]\nprice_per_hour = 3600.0"
    with driven(long_job(tmp_path, more=more), 600, *words) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    summary = json.loads(out)
    assert "units are still under way after" in err  # a unit was begun in time, else nothing is given up
    assert 8.5 <= summary["cost"] < 24  # seconds; 9 where nothing else runs
    assert_given_up(summary, outcome)


def test_the_run_is_given_up_once_the_limit_is_past_by_the_grace(tmp_path: Path) -> None:
    spec = spec_of(job_file(tmp_path, more="grace_seconds = 0.3"))
    plan = read_plan(run(spec, open_engine=open_planned_engine)[0].output)
    said: list[str] = []
    began = time.time()
    limit = Limit(began + 0.2, "deadline", "")

    def end_in_time_trouble() -> None:
        with (
            stopping.recorded(plan, spec, time.perf_counter(), limit=limit, say=said.append) as call,
            stopping.stoppable(call),
        ):
            assert GIVEN_UP.wait(30)
            assert time.time() >= began + 0.45
            raise StorageError("away")

    with pytest.raises(StorageError, match="away"):
        end_in_time_trouble()
    assert not GIVEN_UP.is_set()
    assert [line for line in said if "giving them up" in line]
    assert [call.outcome for call in read_calls(plan.output)] == ["complete", "deadline"]


def test_a_store_that_is_down_does_not_keep_a_run_beyond_the_grace(tmp_path: Path) -> None:
    where = """[deploy]\nrunner = "portable"\noptions = ["--runner=FnApiRunner"]"""
    job = long_job(tmp_path, more=f"grace_seconds = 0.5\n{where}")
    with driven(job, -1.0) as process:  # the engine that opens takes the store away
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)  # of the 600 s for which a store is tried
    assert process.returncode == 5, err
    error = json.loads(out)["error"]
    assert error["code"] == "given_up"
    assert "nobody listens (given up with the run)" in error["message"]


def test_sigterm_drains_and_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said: list[str] = []

    summary, manifest = run(spec_of(long_job(tmp_path)), say=said.append, open_engine=open_engine_and_terminate)
    assert (summary.outcome, manifest.outcome, exit_code(manifest)) == ("stopped", "stopped", 5)
    assert 0 < summary.units_left < 24
    assert summary.seconds_left is not None
    assert any("are being finished, 100 s at most" in line for line in said)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_call_in_a_thread_hears_no_signal_and_runs(tmp_path: Path) -> None:
    spec = spec_of(job_file(tmp_path))
    found: list[Summary] = []
    thread = threading.Thread(target=lambda: found.append(run(spec, open_engine=open_planned_engine)[0]))
    thread.start()
    thread.join()
    assert [summary.outcome for summary in found] == ["complete"]


def test_a_stop_left_over_from_a_dead_call_stops_nothing(tmp_path: Path) -> None:
    spec = spec_of(job_file(tmp_path))
    dead_call(run(spec_of(job_file(tmp_path), deadline="0s"), open_engine=open_no_engine)[0].output, outcome="stopped")
    assert run(spec, open_engine=open_planned_engine)[0].outcome == "complete"


def test_a_deadline_ends_the_call_and_the_rest_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    spec = spec_of(long_job(tmp_path), deadline="3s")
    summary, manifest = run(spec, say=said.append, open_engine=open_slow_engine)
    assert (summary.status, summary.outcome, exit_code(manifest)) == ("incomplete", "deadline", 5)
    assert summary.units_left > 0
    assert summary.cost is not None
    assert summary.cost > 0
    assert any(line.startswith("  deadline: nothing is under way") for line in said)
    text = left_text(resumable(summary, ["run", "a job.toml", "--json", "--deadline", "3s"]))
    assert f"  left      {summary.rows_left} rows" in text[0]
    assert text[1] == "  go on     k2batch run 'a job.toml' --deadline 3s"
    assert read_calls(summary.output)[-1].outcome == "deadline"


def test_a_budget_counts_what_earlier_calls_cost(tmp_path: Path) -> None:
    job = job_file(tmp_path)
    first, _ = run(spec_of(job, deadline="0s"), open_engine=open_no_engine)
    assert (first.outcome, first.units_left, first.seconds_left, first.cost_left) == ("deadline", 4, None, None)
    dead_call(first.output, seconds=60.0)
    said: list[str] = []
    spent, manifest = run(spec_of(job, max_cost=60.0), say=said.append, open_engine=open_no_engine)
    assert (spent.outcome, exit_code(manifest), spent.units_left) == ("budget", 5, 4)
    assert spent.cost is not None
    assert spent.cost > 60
    assert any(line.startswith("  budget 60.00, 6") for line in said)
    last, _ = run(spec_of(job, max_cost=1000.0), open_engine=open_planned_engine)
    assert (last.outcome, last.units_left, last.seconds_left) == ("complete", 0, 0.0)
    assert last.cost is not None
    assert last.cost > spent.cost


def test_the_command_after_a_budget_names_a_larger_one(tmp_path: Path) -> None:
    summary, _ = run(spec_of(job_file(tmp_path), deadline="0s"), open_engine=open_no_engine)
    fields = {name: getattr(summary, name) for name in summary.__slots__} | {"outcome": "budget"}
    words = ["run", "j.toml", "--max-cost", "1"]
    assert resumable(Summary(**fields), words).resume == "k2batch run j.toml --max-cost 1"
    fields |= {"cost": 1.0, "cost_left": 2.0}
    assert resumable(Summary(**fields), words).resume == "k2batch run j.toml --max-cost 1 --max-cost=3.30"


def test_a_call_that_fails_says_so_in_its_record(tmp_path: Path) -> None:
    def broken(plan: Plan) -> FakeEngine:
        raise StorageError("no weights")

    with pytest.raises(StorageError, match="no weights"):
        run(spec_of(job_file(tmp_path)), open_engine=broken)
    (record,) = (tmp_path / "out").glob("*/calls/*.json")
    assert json.loads(record.read_text())["outcome"] == "failed"


def test_a_finished_run_leaves_no_further_record(tmp_path: Path) -> None:
    spec = spec_of(job_file(tmp_path), deadline="1h")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    output = run(spec, open_engine=open_planned_engine)[0].output
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    run(spec, open_engine=open_no_engine)
    assert [call.outcome for call in read_calls(output)] == ["complete"]


def test_a_stop_that_could_not_be_written_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    failures = [StorageError("down"), StorageError("still down")]

    def write(run_url: str, call: Call) -> None:
        if call.outcome == "stopped" and failures:
            raise failures.pop()
        written.append(call.outcome)

    monkeypatch.setattr(stopping, "write_call", write)
    monkeypatch.setattr(stopping, "_RETRY_S", 0.01)
    monkeypatch.setattr(stopping, "BEAT_S", 0.05)
    spec = spec_of(job_file(tmp_path))
    plan = read_plan(run(spec, open_engine=open_planned_engine)[0].output)
    said: list[str] = []
    with (
        stopping.recorded(plan, spec, time.perf_counter(), limit=None, say=said.append) as call,
        stopping.stoppable(call),
    ):
        time.sleep(0.2)
        assert written.count("running") > 3
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    assert "stopped" in written
    assert sum("cannot be written just now" in line for line in said) == 2
