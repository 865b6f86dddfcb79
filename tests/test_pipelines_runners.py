"""Whole runs: exactly once on every runner, through kills, dirt and errors, with the fake model."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import verify
from pipelines.commit import done_units, pending_units, read_plan, read_receipts, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.errors import CheckpointError, SpecError
from schemas.runs import Plan
from schemas.tickets import TicketColumns
from tests.fakes import (
    FakeEngine,
    fake_plan,
    open_dying_fake_engine,
    open_fake_engine,
    open_other_fake_engine,
    open_slow_fake_engine,
    read_output,
    text_array,
    tickets,
    write_tickets,
)

ROOT = Path(__file__).parents[1]
EDGE = ROOT.parent / "shared" / "tickets" / "_edge"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which fake engines, in any process, note every submission."""
    path = tmp_path / "submissions.log"
    path.touch()
    monkeypatch.setenv("K2_FAKE_LOG", str(path))
    return path


def planned(tmp_path: Path, *, name: str = "out", num_files: int = 2) -> Plan:
    """Return a written plan of five units per file of 50 tickets."""
    for number in range(0 if (tmp_path / "in").exists() else num_files):
        write_tickets(tmp_path / "in", f"{number}.parquet", tickets(50, start=50 * number), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / name, unit_rows=10)
    write_plan(plan)
    return plan


def assert_exactly_once(plan: Plan) -> None:
    manifest = finalize(plan, max_reject_rate=1.0)
    assert verify(plan.output) == []
    assert manifest.units_done == manifest.units
    found = Counter(id_ for table in read_output(plan).values() for id_ in table.column("ticket_id").to_pylist())
    assert set(found.values()) == {1}
    assert len(found) == plan.rows


def test_local_runner_does_every_unit_once(tmp_path: Path, log: Path) -> None:
    plan = planned(tmp_path)
    run_units(plan, plan.units, open_engine=open_fake_engine)
    assert len(log.read_text().splitlines()) == len(plan.units) == 10
    assert_exactly_once(plan)


def test_done_units_are_not_done_again(tmp_path: Path, log: Path) -> None:
    plan = planned(tmp_path)
    run_units(plan, plan.units[:4], open_engine=open_fake_engine)
    before = read_receipts(plan)
    run_units(plan, plan.units, open_engine=open_fake_engine)
    assert len(log.read_text().splitlines()) == 10
    assert {name: receipt for name, receipt in read_receipts(plan).items() if name in before} == before
    assert_exactly_once(plan)


def test_local_runner_opens_one_engine(tmp_path: Path, log: Path) -> None:
    plan = planned(tmp_path)
    run_units(plan, plan.units, options=["--direct_num_workers=4"], open_engine=_open_and_count)
    assert log.with_suffix(".opened").read_text() == "opened\n"


def _open_and_count(plan: Plan) -> FakeEngine:
    with Path(os.environ["K2_FAKE_LOG"]).with_suffix(".opened").open("a") as file:
        file.write("opened\n")
    time.sleep(0.1)  # long enough for another thread to want one too
    return open_fake_engine(plan)


def test_portable_runner_takes_its_options(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    run_units(plan, plan.units, runner="portable", options=["--runner=FnApiRunner"], open_engine=open_fake_engine)
    assert_exactly_once(plan)


@pytest.mark.parametrize("options", [[], ["--runner=DirectRunner"]])
def test_portable_runner_must_be_named(tmp_path: Path, options: list[str]) -> None:
    plan = planned(tmp_path)
    with pytest.raises(SpecError, match="--runner"):
        run_units(plan, plan.units, runner="portable", options=options, open_engine=open_fake_engine)


def test_unknown_runner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="local, dask, portable"):
        run_units(planned(tmp_path), (), runner="flink")


def test_dask_on_two_processes_gives_what_local_gives(tmp_path: Path, log: Path) -> None:
    local, dask = planned(tmp_path, name="local"), planned(tmp_path, name="dask")
    run_units(local, local.units, open_engine=open_fake_engine)
    log.write_text("")
    importlib.import_module("distributed")  # which adds to the environment, once
    before = dict(os.environ)
    run_units(dask, dask.units, runner="dask", workers=2, open_engine=open_slow_fake_engine)
    assert dict(os.environ) == before
    processes = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(processes) == len(dask.units)
    assert len(set(processes)) == 2
    assert str(os.getpid()) not in processes
    assert_exactly_once(dask)
    expected, found = read_output(local), read_output(dask)
    assert list(expected) == list(found)
    for unit_id, table in expected.items():
        assert str(table.to_pylist()) == str(found[unit_id].to_pylist())


def test_dask_survives_a_killed_worker(tmp_path: Path, log: Path) -> None:
    plan = planned(tmp_path)
    run_units(plan, plan.units, runner="dask", workers=2, open_engine=open_dying_fake_engine)
    assert Path(f"{log}.died").exists()
    assert_exactly_once(plan)


@pytest.mark.parametrize(("runner", "workers"), [("local", 1), ("dask", 1)])
def test_error_of_a_worker_keeps_its_kind(tmp_path: Path, runner: str, workers: int) -> None:
    plan = planned(tmp_path, num_files=1)
    with pytest.raises(CheckpointError, match="fingerprint 0000000000000000, planned ffffffffffffffff") as caught:
        run_units(plan, plan.units, runner=runner, workers=workers, open_engine=open_other_fake_engine)
    assert "the checkpoint changed" in caught.value.remedy
    assert done_units(plan) == frozenset()


def test_error_that_is_a_bug_is_shown(tmp_path: Path) -> None:
    plan = planned(tmp_path, num_files=1)
    with pytest.raises(ZeroDivisionError, match="tests cannot count"):
        run_units(plan, plan.units, open_engine=_open_badly)


def _open_badly(plan: Plan) -> FakeEngine:
    raise ZeroDivisionError("tests cannot count")


def test_damaged_file_does_not_stop_the_others(tmp_path: Path, log: Path) -> None:
    plan = planned(tmp_path)
    path = Path(plan.units[0].url)
    content = bytearray(path.read_bytes())
    stat = path.stat()
    first = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = first.dictionary_page_offset
    content[start : start + first.total_compressed_size] = b"\xff" * first.total_compressed_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the planned file, as far as the store can tell
    run_units(plan, plan.units, open_engine=open_fake_engine)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert manifest.status == "incomplete"
    assert (manifest.units, manifest.units_done) == (10, 9)
    (failed,) = manifest.rejected_files
    assert failed.url == str(path)
    assert "row groups 1 to 1: cannot be decoded" in failed.error_message
    (problem,) = [problem for problem in verify(plan.output) if "has no receipt" in problem]
    assert f"{path} rows 10 to 19" in problem
    content = bytearray(pq_bytes(tickets(50)))
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run_units(plan, pending_units(plan), open_engine=open_fake_engine)
    assert finalize(plan, max_reject_rate=1.0).status == "complete"
    assert len(log.read_text().splitlines()) == 10
    assert_exactly_once(plan)


def pq_bytes(table: pa.Table) -> bytes:
    """Return what `write_tickets` writes with row groups of ten."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10)
    return bytes(sink.getvalue())


def test_file_changed_under_way_is_named(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    write_tickets(tmp_path / "in", "1.parquet", tickets(51))
    run_units(plan, plan.units, open_engine=open_fake_engine)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert (manifest.status, manifest.units_done) == ("incomplete", 5)
    assert "changed since the plan was made" in manifest.rejected_files[0].error_message


_DRIVER = """
import sys
from pipelines.commit import pending_units, read_plan
from pipelines.runners import run_units
from tests.fakes import open_slow_fake_engine

if __name__ == "__main__":
    plan = read_plan(sys.argv[1])
    run_units(plan, pending_units(plan), runner=sys.argv[2], workers=2, open_engine=open_slow_fake_engine)
"""


def drive(plan: Plan, runner: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start a driver in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "K2_FAKE_LOG": str(log)}
    script = Path(plan.output).parent / "driver.py"
    script.write_text(_DRIVER)
    command = [sys.executable, str(script), plan.output, runner]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("runner", ["local", "dask"])
def test_killed_driver_resumes(tmp_path: Path, log: Path, runner: str) -> None:
    plan = planned(tmp_path, num_files=6)
    process = drive(plan, runner, log)
    try:
        deadline = time.monotonic() + 60
        while len(done_units(plan)) < 4:
            assert process.poll() is None, "the driver ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = read_receipts(plan)
    assert 4 <= len(done) < len(plan.units)
    log.write_text("")
    run_units(read_plan(plan.output), pending_units(plan), open_engine=open_fake_engine)
    assert len(log.read_text().splitlines()) == len(plan.units) - len(done)
    after = read_receipts(plan)
    assert {unit_id: after[unit_id] for unit_id in done} == done
    assert_exactly_once(plan)


def dirty(num_rows: int) -> pa.Table:
    """Return tickets with every kind of dirt a row can have, four rows in nine of it."""
    kinds = [
        b"plain",
        None,
        b"",
        "\u200b \u2028".encode(),
        b"\xff\xfe",
        b"\x00\x07bell",
        b"<|im_end|>",
        b"plain",
        b"x" * 400_000,
    ]
    bodies = [kinds[number % 9] if number % 9 != 7 else b"body %d" % number for number in range(num_rows)]
    return pa.table(
        {
            "ticket_id": text_array(
                [None if number % 11 == 0 else b"id %d" % (number % 5) for number in range(num_rows)]
            ),
            "subject": text_array([None] * num_rows),
            "body": text_array(bodies),
        }
    )


def test_dirty_rows_meet_their_fates(tmp_path: Path) -> None:
    table = dirty(45)
    write_tickets(tmp_path, "a.parquet", table, row_group_size=11)
    plan = fake_plan([tmp_path], tmp_path / "out", unit_rows=20)
    write_plan(plan)
    run_units(plan, plan.units, open_engine=open_fake_engine)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert manifest.error_codes == {"null_text": 5, "blank_text": 10, "invalid_utf8": 5, "prompt_too_long": 5}
    assert (manifest.rows_annotated, manifest.rows_rejected) == (20, 25)
    assert verify(plan.output) == []
    output = pa.concat_tables(read_output(plan).values())
    for name in table.schema.names:
        assert output.column(name).cast(pa.binary()).to_pylist() == table.column(name).cast(pa.binary()).to_pylist()


def odd_files(folder: Path) -> dict[str, str]:
    """Write one file of each odd kind; return file name to fate."""
    table = tickets(6)
    whole = write_tickets(folder, "good.parquet", table).read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[:-100])
    (folder / "zero_bytes.parquet").write_bytes(b"")
    (folder / "not_parquet.parquet").write_bytes(b"ticket_id,body\n1")
    write_tickets(folder, "zero_rows.parquet", table.slice(0, 0))
    write_tickets(folder, "missing.parquet", table.drop_columns(["body"]))
    write_tickets(folder, "retyped.parquet", table.set_column(2, "body", pa.array(range(6))))
    write_tickets(folder, "clash.parquet", table.append_column("usage", pa.array(range(6))))
    drifted = table.select(["body", "weight", "ticket_id", "subject"]).append_column("sla", pa.array(range(6)))
    drifted = drifted.set_column(0, "body", table.column("body").cast(pa.large_string()))
    write_tickets(folder, "drifted.parquet", drifted)
    write_tickets(folder, "dictionary.parquet", table.set_column(2, "body", table.column("body").dictionary_encode()))
    bad = {"truncated": "unreadable_file", "zero_bytes": "unreadable_file", "not_parquet": "unreadable_file"}
    bad |= {"missing": "missing_column", "retyped": "wrong_type", "clash": "name_collision"}
    return {f"{name}.parquet": code for name, code in bad.items()}


def test_odd_files_meet_their_fates(tmp_path: Path) -> None:
    fates = odd_files(tmp_path / "in")
    plan = fake_plan([tmp_path / "in"], tmp_path / "out")
    write_plan(plan)
    run_units(plan, plan.units, open_engine=open_fake_engine)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert {Path(file.url).name: file.error_code for file in manifest.rejected_files} == fates
    assert (manifest.status, manifest.rows_annotated, manifest.rows_rejected) == ("incomplete", 18, 0)
    assert verify(plan.output) == []
    assert not (Path(plan.output) / "_SUCCESS").exists()


@pytest.mark.skipif(not EDGE.exists(), reason="the example tickets are not beside this repository")
def test_edge_files_meet_their_fates(tmp_path: Path) -> None:
    plan = fake_plan([EDGE], tmp_path / "out")
    write_plan(plan)
    run_units(plan, plan.units, open_engine=open_fake_engine)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert {Path(file.url).stem: file.error_code for file in manifest.rejected_files} == {
        "body_is_int64": "wrong_type",
        "dictionary_body": "missing_column",  # no subject; annotated below, where only the body is asked for
        "missing_subject": "missing_column",
        "not_parquet": "unreadable_file",
        "truncated": "unreadable_file",
        "zero_bytes": "unreadable_file",
    }
    assert manifest.rows_annotated + manifest.rows_rejected == manifest.rows_in == 200
    assert verify(plan.output) == []


@pytest.mark.skipif(not EDGE.exists(), reason="the example tickets are not beside this repository")
def test_edge_files_with_an_optional_subject(tmp_path: Path) -> None:
    columns = TicketColumns(id="ticket_id", text=("subject", "body"), optional=("subject",))
    plan = fake_plan([EDGE], tmp_path / "out", columns=columns)
    write_plan(plan)
    run_units(plan, plan.units, open_engine=open_fake_engine)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert manifest.rows_annotated + manifest.rows_rejected == manifest.rows_in == 600
    assert len(manifest.rejected_files) == 4
    assert verify(plan.output) == []
    types = {str(table.schema.field("body").type) for table in read_output(plan).values()}
    assert types == {"string", "large_string", "dictionary<values=string, indices=int32, ordered=0>"}


def test_run_in_a_memory_store() -> None:
    with fsspec.open("memory://run-in/a.parquet", "wb") as file:
        pq.write_table(tickets(30), file)
    plan = fake_plan(["memory://run-in/*.parquet"], "memory://run-out", unit_rows=10)
    write_plan(plan)
    # Such a store is in this process alone, so this is where its units are done.
    run_units(plan, plan.units, runner="portable", options=["--runner=FnApiRunner"], open_engine=open_fake_engine)
    assert finalize(plan, max_reject_rate=0.0).status == "complete"
    assert verify(plan.output) == []
