"""A user's own Dask cluster, of real processes: fit or refused before any work, and none of its deaths loses a row."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from jobs.cli import main
from pipelines import cluster
from pipelines.cluster import check_versions
from pipelines.commit import done_units, pending_units, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.errors import EnvironmentMismatch, SpecError
from schemas.runs import Plan
from tests.clusters import kill_group, open_gated_engine, open_watched_engine, scheduler, wait_until, worker
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import fake_plan, open_fake_engine, open_slow_fake_engine, read_output, tickets, write_tickets


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file in which fake engines, in any process, note every submission."""
    path = tmp_path_factory.mktemp("log") / "submissions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2_FAKE_LOG", str(path))
        yield path


@pytest.fixture(scope="module")
def address(log: Path) -> Iterator[str]:
    """The address of a scheduler with two workers, each a process with a nanny and one thread to compute with."""
    folder = log.parent
    with (
        scheduler(folder) as (address, _),
        worker(folder, address, OMP_NUM_THREADS="1"),
        worker(folder, address, OMP_NUM_THREADS="1"),
    ):
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address


@pytest.fixture(autouse=True)
def empty_logs(log: Path) -> None:
    log.write_text("")
    Path(f"{log}.engines").write_text("")


def planned(tmp_path: Path, *, num_files: int = 2) -> Plan:
    """Return a written plan of five units per file of 50 tickets."""
    for number in range(num_files):
        write_tickets(tmp_path / "in", f"{number}.parquet", tickets(50, start=50 * number), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    write_plan(plan)
    return plan


def assert_exactly_once(plan: Plan) -> None:
    assert finalize(plan, max_reject_rate=0.0).status == "complete"
    found = Counter(id_ for table in read_output(plan).values() for id_ in table.column("ticket_id").to_pylist())
    assert set(found.values()) == {1}
    assert len(found) == plan.rows


def strike(plan: Plan, after: int, blow: Callable[[], Any]) -> threading.Thread:
    """Call `blow` in a thread once `after` units are done; return the thread, started."""

    def wait_and_strike() -> None:
        wait_until(lambda: len(done_units(plan)) >= after, f"{after} units done")
        blow()

    thread = threading.Thread(target=wait_and_strike, daemon=True)
    thread.start()
    return thread


def test_given_workers_have_one_engine_each(tmp_path: Path, log: Path, address: str) -> None:
    plan = planned(tmp_path, num_files=4)
    run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_watched_engine)
    opened = [line.split()[0] for line in Path(f"{log}.engines").read_text().splitlines() if "opened" in line]
    assert len(opened) == len(set(opened)) == 2
    processes = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(processes) == len(plan.units)
    assert set(processes) == set(opened)
    assert_exactly_once(plan)


def test_command_line_leads_to_the_cluster(tmp_path: Path, log: Path, address: str) -> None:
    words = ["run", str(job_file(tmp_path)), "--dask-address", address]
    assert main(words, open_engine=open_planned_engine) == 0
    processes = {line.split()[0] for line in log.read_text().splitlines()}
    assert processes
    assert str(os.getpid()) not in processes


def test_rounds_do_every_unit_once(tmp_path: Path, log: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ROUND", 3)
    plan = planned(tmp_path)
    run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_fake_engine)
    assert len(log.read_text().splitlines()) == len(plan.units) == 10
    assert_exactly_once(plan)


def test_killed_worker_is_replaced(tmp_path: Path, log: Path, address: str) -> None:
    plan = planned(tmp_path, num_files=6)

    def kill_one() -> None:
        os.kill(int(log.read_text().split()[0]), signal.SIGKILL)

    blow = strike(plan, 4, kill_one)
    run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_slow_fake_engine)
    blow.join(timeout=10)
    assert_exactly_once(plan)
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)


@pytest.mark.slow
def test_worker_may_join_and_another_leave_for_good(tmp_path: Path, log: Path) -> None:
    plan = planned(tmp_path, num_files=6)

    def processes() -> set[str]:
        return {line.split()[0] for line in log.read_text().splitlines()}

    with scheduler(tmp_path) as (address, _), worker(tmp_path, address) as first, ExitStack() as late:

        def join_and_leave() -> None:
            wait_until(processes, "the first at work")
            late.enter_context(worker(tmp_path, address))
            wait_until(lambda: len(processes()) == 2, "both at work")
            Path(f"{log}.gate").touch()
            kill_group(first)

        blow = strike(plan, 0, join_and_leave)
        run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_gated_engine)
        blow.join(timeout=60)
    assert_exactly_once(plan)


@pytest.mark.slow
def test_lost_scheduler_is_told_and_the_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_S", 2)
    plan = planned(tmp_path, num_files=4)
    with scheduler(tmp_path) as (address, process), worker(tmp_path, address):
        blow = strike(plan, 4, lambda: kill_group(process))
        with pytest.raises(EnvironmentMismatch, match=f"{address}: the scheduler was lost under way") as caught:
            run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_slow_fake_engine)
        blow.join(timeout=10)
    assert "it resumes" in caught.value.remedy
    pending = pending_units(plan)
    assert 0 < len(pending) <= len(plan.units) - 4
    run_units(plan, pending, open_engine=open_fake_engine)
    assert_exactly_once(plan)


@pytest.mark.slow
def test_cluster_without_workers_is_waited_for_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_LOOK_S", 0.2)
    monkeypatch.setattr(cluster, "_WORKERS_S", 1.5)
    plan, said = planned(tmp_path, num_files=4), list[str]()

    def run(address: str) -> None:
        options: dict[str, Any] = {"open_engine": open_slow_fake_engine, "say": said.append}
        run_units(plan, plan.units, runner="dask", dask_address=address, **options)

    with scheduler(tmp_path) as (address, _):
        with pytest.raises(EnvironmentMismatch, match=r"no worker came within 2 s") as caught:
            run(address)
        assert f"dask worker {address}" in caught.value.remedy
        assert said == [f"{address} has no worker yet; waiting up to 2 s for one"]
        with worker(tmp_path, address) as last:
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
            blow = strike(plan, 4, lambda: kill_group(last))
            with pytest.raises(EnvironmentMismatch, match=r"no worker for \d s"):
                run(address)
            blow.join(timeout=10)
    assert "every worker" in said[-1]
    assert 4 <= len(done_units(plan)) < len(plan.units)


def test_what_is_no_scheduler_is_told_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_S", 1)
    plan = planned(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        cases = {
            "tcp://127.0.0.1:1": "nothing answers within 1 s",
            f"tcp://127.0.0.1:{mute.getsockname()[1]}": "nothing answers within 1 s",
            "foo://bar:1": "ValueError: unknown address scheme",
        }
        for address, reason in cases.items():
            with pytest.raises(EnvironmentMismatch, match=f"dask_address {address}: {reason}"):
                run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_fake_engine)


def test_address_of_a_worker_is_told(tmp_path: Path, address: str) -> None:
    plan = planned(tmp_path)
    with Client(address, set_as_default=False) as client:
        other = next(iter(client.scheduler_info()["workers"]))
    with pytest.raises(EnvironmentMismatch, match=f"dask_address {other}: is that of a Worker"):
        run_units(plan, plan.units, runner="dask", dask_address=other, open_engine=open_fake_engine)


def test_address_among_the_options_is_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    with pytest.raises(SpecError, match="--dask_client_address=tcp://h:1") as caught:
        run_units(plan, plan.units, runner="dask", options=["--dask_client_address=tcp://h:1"])
    assert "dask_address =" in caught.value.remedy


def test_gpu_slots_hold_units(tmp_path: Path, log: Path, address: str) -> None:
    plan = replace(planned(tmp_path), mode="gpu")
    with pytest.raises(EnvironmentMismatch, match=r"no worker has a GPU slot") as caught:
        run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_watched_engine)
    assert "--resources GPU=3" in caught.value.remedy
    with worker(tmp_path, address, "--resources", "GPU=2") as child:
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=60)
        run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_watched_engine)
    lines = Path(f"{log}.engines").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 1
    assert max(int(line.split()[-1]) for line in lines if "underway" in line) == 2
    assert child.returncode is not None
    assert_exactly_once(plan)


def test_workers_that_do_not_see_the_run_are_refused(tmp_path: Path, address: str) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(5))
    plan = fake_plan([tmp_path], "memory://out/")  # the driver's own memory
    write_plan(plan)
    with pytest.raises(EnvironmentMismatch, match=r"worker tcp://.*finds no memory://.*plan.json") as caught:
        run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_fake_engine)
    assert "s3://" in caught.value.remedy


def test_worker_without_k2batch_is_refused(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True, timeout=60)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "k2batch" not in package.name:
            (site / package.name).symlink_to(package)
    plan, python = planned(tmp_path), str(tmp_path / "bare" / "bin" / "python")
    with scheduler(tmp_path) as (address, _), worker(tmp_path, address, python=python, PYTHONPATH=""):
        with pytest.raises(EnvironmentMismatch, match=r"worker tcp://\S+: k2batch is not installed\n") as caught:
            run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_fake_engine)
        assert "jobs/deploy/Dockerfile" in caught.value.remedy


def test_workers_on_one_core_of_several_are_told(tmp_path: Path, address: str) -> None:
    plan, said = planned(tmp_path), list[str]()
    options: dict[str, Any] = {"open_engine": open_fake_engine, "say": said.append}
    run_units(plan, plan.units, runner="dask", dask_address=address, **options)
    assert said == ["2 of 2 workers compute with 1 of their cores; start them with OMP_NUM_THREADS=<cores>"]


OURS = {"python": "3.11.7.final.0", **dict.fromkeys(cluster.PACKAGES, "1.0"), "torch": "2.13.0+cpu"}


@pytest.mark.parametrize(
    ("where", "theirs", "expected"),
    [
        ("worker", {"k2batch": None}, "worker tcp://b:2: k2batch is not installed"),
        ("worker", {"python": "3.12.1.final.0"}, "worker tcp://b:2: python 3.12, here 3.11"),
        ("worker", {"torch": "2.12.0+cu126", "pyarrow": None}, "pyarrow is not installed, torch 2.12.0, here 2.13.0"),
        ("scheduler", {"apache-beam": "2.76.0"}, "the scheduler: apache-beam 2.76.0, here 1.0"),
        ("worker", {"python": "3.11.9.final.0", "torch": "2.13.0+cu126"}, ""),
        ("scheduler", {"torch": None}, ""),
    ],
)
def test_versions_are_compared(where: str, theirs: dict[str, str | None], expected: str) -> None:
    versions = {
        "client": {"packages": OURS},
        "scheduler": {"packages": OURS | (theirs if where == "scheduler" else {})},
        "workers": {
            "tcp://a:1": {"packages": OURS},
            "tcp://b:2": {"packages": OURS | (theirs if where == "worker" else {})},
        },
    }
    if not expected:
        return check_versions(versions)
    with pytest.raises(EnvironmentMismatch) as caught:
        check_versions(versions)
    assert expected in caught.value.message
    assert "a:1" not in caught.value.message
    return None
