"""A run that is given up ends at once on every runner: what was under way is lost, not blamed, and done later."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.commit import done_units, pending_units, write_plan
from pipelines.giving_up import GIVEN_UP, wait_or_give_up
from pipelines.retries import retried
from pipelines.runners import run_units
from schemas.errors import GivenUp, StorageError
from tests.fakes import fake_plan, open_fake_engine, read_output, tickets, write_tickets

ROOT = Path(__file__).parents[1]

# A process of its own: threads of Beam's that are still at a unit would outlive the test in this one.
DRIVER = """
import sys
import threading
import time
from pathlib import Path

from pipelines.commit import read_plan
from pipelines.giving_up import GIVEN_UP
from pipelines.runners import run_units
from tests.fakes import FakeEngine
from jobs.cli import leave

moment = [0.0]

def open_engine(plan):
    return FakeEngine(pause_s=600)

def give_up_once_begun(folder):
    while not list(folder.glob("*.json")):
        time.sleep(0.02)
    moment[0] = time.monotonic()
    GIVEN_UP.set()

if __name__ == "__main__":
    plan = read_plan(sys.argv[1])
    threading.Thread(target=give_up_once_begun, args=[Path(plan.output, "attempts")]).start()
    deaths = run_units(
        plan, plan.units, runner=sys.argv[2], workers=1, options=sys.argv[3:], open_engine=open_engine, say=print
    )
    print(deaths, time.monotonic() - moment[0], flush=True)
    leave(0)
"""


@pytest.fixture
def given_up() -> Iterator[None]:
    """Have the run of this process given up, in a moment."""
    timer = threading.Timer(0.3, GIVEN_UP.set)
    timer.start()
    yield
    timer.join()
    GIVEN_UP.clear()


@pytest.mark.parametrize(
    ("runner", "options"),
    [("local", []), ("dask", []), ("portable", ["--runner=FnApiRunner", "--direct_running_mode=multi_threading"])],
    ids=["local", "dask", "portable"],
)
def test_units_under_way_are_lost_and_nothing_else(tmp_path: Path, runner: str, options: list[str]) -> None:
    write_tickets(tmp_path / "in", "a.parquet", tickets(60), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    write_plan(plan)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, str(script), plan.output, runner, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    deaths, seconds = found.stdout.splitlines()[-1].split()
    assert deaths == "0"
    assert float(seconds) < 20  # where nothing else runs: 0.3 s; Dask 4 s, which its workers are given to end in
    begun = [json.loads(path.read_text()) for path in Path(plan.output, "attempts").glob("*.json")]
    assert begun
    assert {(attempts["doing"], attempts["deaths"]) for attempts in begun} == {("", 0)}
    assert done_units(plan) == frozenset()
    run_units(plan, pending_units(plan), open_engine=open_fake_engine)
    assert sum(table.num_rows for table in read_output(plan).values()) == 60


def test_what_ends_before_is_waited_for_and_raises() -> None:
    ended: list[int] = []
    assert wait_or_give_up(lambda: ended.append(1))
    assert ended == [1]
    with pytest.raises(TimeoutError, match="its own"):
        wait_or_give_up(_time_out)


def _time_out() -> None:
    raise TimeoutError("its own")


@pytest.mark.usefixtures("given_up")
def test_what_does_not_end_is_left() -> None:
    began = time.monotonic()
    assert not wait_or_give_up(lambda: time.sleep(2.0))
    assert time.monotonic() - began < 1.5


@pytest.mark.usefixtures("given_up")
def test_a_wait_for_a_store_ends_and_keeps_the_error() -> None:
    calls: list[float] = []

    def refuse() -> None:
        calls.append(time.monotonic())
        raise ConnectionRefusedError("nobody listens")

    began = time.monotonic()
    with pytest.raises(GivenUp, match=r"cannot read it: ConnectionRefusedError: nobody listens \(given up") as caught:
        retried("read it", refuse)
    assert caught.value.exit_code == 5
    assert "resumes" in caught.value.remedy
    assert time.monotonic() - began < 5
    assert max(calls) - began < 0.35  # nothing is tried again afterwards
    with pytest.raises(GivenUp):  # and what is asked for later is tried once
        retried("read it", refuse)
    assert retried("read it", lambda: 7) == 7
    with pytest.raises(StorageError, match="denied") as final:
        retried("read it", _deny)
    assert final.value.exit_code == 4


def _deny() -> None:
    raise PermissionError("denied")
