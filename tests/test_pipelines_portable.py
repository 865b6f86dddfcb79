"""The graph over Beam's own protocols, as Flink, Spark and Dataflow run it: job service, worker pool, gRPC between."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.commit import done_units, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.errors import CheckpointError, EnvironmentMismatch
from schemas.runs import Plan
from tests.clusters import process, wait_until
from tests.fakes import fake_plan, open_fake_engine, open_other_fake_engine, read_output, tickets, write_tickets


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The options that lead to a job service whose workers are processes of a pool."""
    folder = tmp_path_factory.mktemp("beam")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    module = "apache_beam.runners"
    service = [
        sys.executable,
        "-m",
        f"{module}.portability.local_job_service_main",
        "--port_file",
        str(folder / "port"),
    ]
    pool = [sys.executable, "-m", f"{module}.worker.worker_pool_main", "--service_port", str(port)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the pool starts the first `python` it finds
    with process(service, folder / "service.log"), process(pool, folder / "pool.log", PATH=path):
        wait_until((folder / "port").exists, "a job service")
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint=127.0.0.1:{(folder / 'port').read_text()}",
            "--environment_type=EXTERNAL",
            f"--environment_config=127.0.0.1:{port}",
        ]


def planned(tmp_path: Path, name: str) -> Plan:
    for number in range(0 if (tmp_path / "in").exists() else 2):
        write_tickets(tmp_path / "in", f"{number}.parquet", tickets(50, start=50 * number), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / name, unit_rows=10)
    write_plan(plan)
    return plan


def test_job_service_gives_what_local_gives(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, "portable")
    run_units(plan, plan.units, runner="portable", options=options, open_engine=open_fake_engine)
    assert finalize(plan, max_reject_rate=0.0).status == "complete"
    local = planned(tmp_path, "local")
    run_units(local, local.units, open_engine=open_fake_engine)
    found = read_output(plan)
    for unit_id, table in read_output(local).items():
        assert str(table.to_pylist()) == str(found[unit_id].to_pylist())


def test_error_of_a_worker_is_told(tmp_path: Path, options: list[str]) -> None:
    plan = planned(tmp_path, "portable")
    with pytest.raises(CheckpointError, match="fingerprint"):
        run_units(plan, plan.units, runner="portable", options=options, open_engine=open_other_fake_engine)
    assert done_units(plan) == frozenset()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runner=NoSuchRunner"], "NoSuchRunner: ValueError: Unexpected pipeline runner"),
        (["--runner=PortableRunner"], "PortableRunner: NotImplementedError: You must specify a --job_endpoint"),
        (["--runner=PortableRunner", "--job_endpoint=127.0.0.1:1"], "--job_endpoint=127.0.0.1:1: .*refused"),
        (["--runner=FlinkRunner", "--job_endpoint=flink"], "--job_endpoint=flink: "),
    ],
)
def test_runner_that_cannot_start_is_told_at_once(tmp_path: Path, options: list[str], said: str) -> None:
    plan = planned(tmp_path, "portable")
    with pytest.raises(EnvironmentMismatch, match=said):
        run_units(plan, plan.units, runner="portable", options=options, open_engine=open_fake_engine)
