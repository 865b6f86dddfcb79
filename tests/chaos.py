"""Real processes, killed, doubled, out of disk, with jumping clocks; what is left is compared with an undisturbed run.

`python -m tests.chaos` (`make chaos`) tries 100 random kills and 10,000 schedules of the protocol, and prints a table.
This process runs no Beam itself: gRPC's threads do not survive the forks of the soak.
"""

import argparse
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pipelines import storage
from pipelines.commit import done_units, pending_units, read_plan, read_receipts, write_plan
from pipelines.finalize import finalize, read_manifest
from pipelines.read import read_data
from pipelines.runners import run_units
from schemas.runs import Plan
from tests.fakes import FakeEngine, annotate_directly, fake_plan, tickets, write_tickets
from tests.s3_servers import BUCKET, JuiceFS, has_juicefs, s3_environment

ROOT = Path(__file__).parents[1]
UNIT_ROWS = 10
PAUSE_S = 0.05
"""The fake model's time for each unit."""

_THREADS = ["--runner=FnApiRunner", "--direct_running_mode=multi_threading", "--direct_num_workers=3"]


def open_paced_engine(plan: Plan) -> FakeEngine:
    """Open a fake model that takes a little while over each unit."""
    return FakeEngine(pause_s=PAUSE_S)


def open_engine_in_jumping_time(plan: Plan) -> FakeEngine:
    """Open a fake model in a process whose clock jumps up to thirty years at each look at it."""
    true_time = time.time
    time.time = lambda: true_time() + random.uniform(-1e9, 1e9)
    return FakeEngine(pause_s=PAUSE_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What is left of a run that was disturbed, once it is complete."""

    scenario: str
    disturbed: int
    """How often."""
    seconds: float
    rows: int
    rows_lost: int
    rows_doubled: int
    """By the manifest or by a glob, whichever is worse."""
    is_same: bool
    """Whether each unit's data has the bytes that an undisturbed run gives it."""

    def line(self) -> str:
        """Return the row of the table."""
        cells = (self.scenario, self.disturbed, f"{self.seconds:.0f}", f"{self.rows:,}", self.rows_lost)
        return "| " + " | ".join(map(str, (*cells, self.rows_doubled, "yes" if self.is_same else "NO"))) + " |"


def planned(folder: Path, output: Path, num_units: int) -> Plan:
    """Return the written plan of a run over `num_units` units of ten rows below `folder`."""
    if not (folder / "in").exists():
        write_tickets(folder / "in", "a.parquet", tickets(UNIT_ROWS * num_units), row_group_size=UNIT_ROWS)
    plan = fake_plan([folder / "in"], output, unit_rows=UNIT_ROWS)
    write_plan(plan)
    return plan


def undisturbed(folder: Path, num_units: int) -> dict[str, str]:
    """Return the checksum of each unit's data in a run that nothing disturbs."""
    plan = planned(folder, folder / "quiet", num_units)
    finish(plan)
    return {unit_id: receipt.data_sha256 for unit_id, receipt in read_receipts(plan).items()}


def judge(scenario: str, plan: Plan, expected: dict[str, str], disturbed: int, seconds: float) -> Outcome:
    """Return what is left of a complete run."""
    manifest = read_manifest(plan.output)
    assert manifest is not None
    assert manifest.status == "complete", manifest
    by_listing = [name for name in storage.names(storage.join(plan.output, "data")) if name.endswith(".parquet")]
    counts = [_ids(plan, names) for names in (manifest.data, by_listing)]
    rows = {f"T{number:06d}" for number in range(plan.rows)}
    found = {unit_id: receipt.data_sha256 for unit_id, receipt in read_receipts(plan).items()}
    return Outcome(
        scenario=scenario,
        disturbed=disturbed,
        seconds=seconds,
        rows=plan.rows,
        rows_lost=max(len(rows - count.keys()) for count in counts),
        rows_doubled=max(count.total() - len(count) for count in counts),
        is_same=found == expected,
    )


def _ids(plan: Plan, names: Sequence[str]) -> Counter[str]:
    return Counter(id_ for name in names for id_ in read_data(plan, name, ["ticket_id"])[0].to_pylist())


_DRIVER = """
import sys
import tests.chaos as chaos
from pipelines.commit import pending_units, read_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units

if __name__ == "__main__":
    plan = read_plan(sys.argv[1])
    run_units(plan, pending_units(plan), runner=sys.argv[2], workers=2, open_engine=getattr(chaos, sys.argv[3]))
    finalize(plan, max_reject_rate=0.0)
"""


def drive(
    plan: Plan, runner: str = "local", opens: str = "open_paced_engine", folder: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a driver, in a process group of its own, that does what is pending and finalizes.

    Its script is put into `folder`, or that of the plan's output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = (folder or Path(plan.output).parent) / "driver.py"
    script.write_text(_DRIVER)
    command = [sys.executable, str(script), plan.output, runner, opens]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def wait_for(plan: Plan, units: int, driver: "subprocess.Popen[bytes]") -> None:
    """Return once so many units are done, or the driver has ended."""
    deadline = time.monotonic() + 90
    while len(done_units(plan)) < units and driver.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


def finish(plan: Plan) -> None:
    """Do what is pending, here, and finalize."""
    annotate_directly(plan, pending_units(plan))
    assert finalize(plan, max_reject_rate=0.0).status == "complete"


def kill_all(plan: Plan, runner: str) -> int:
    """SIGKILL the driver and its workers at once, in the middle of the run."""
    driver = drive(plan, runner)
    wait_for(plan, len(plan.units) // 3, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    return 1


def kill_workers(plan: Plan, runner: str) -> int:
    """SIGKILL the worker that has used most time, twice; the driver goes on by itself."""
    driver = drive(plan, runner)
    kills = 0
    for share in (4, 2):
        wait_for(plan, len(plan.units) // share, driver)
        workers = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        if workers:
            max(workers, key=lambda worker: sum(worker.cpu_times()[:2])).kill()
            kills += 1
    assert driver.wait(timeout=120) == 0
    assert read_manifest(plan.output) is not None, "the driver did not finish the run"
    return kills


def two_drivers(plan: Plan, runner: str) -> int:
    """Start a second driver on the run while the first is at work."""
    first = drive(plan, runner)
    wait_for(plan, 2, first)
    second = drive(plan, runner)
    assert (first.wait(timeout=120), second.wait(timeout=120)) == (0, 0)
    return 1


def jumping_clock(plan: Plan, runner: str) -> int:
    """Kill a run whose clock jumps, and give every file of it another time of change."""
    driver = drive(plan, runner, "open_engine_in_jumping_time")
    wait_for(plan, len(plan.units) // 2, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    for path in Path(plan.output).rglob("*"):
        os.utime(path, (random.uniform(0, 4e9),) * 2)
    driver = drive(plan, runner, "open_engine_in_jumping_time")
    assert driver.wait(timeout=120) == 0
    return 2


SCENARIOS: dict[str, tuple[Callable[[Plan, str], int], str]] = {
    "SIGKILL of driver and worker": (kill_all, "local"),
    "SIGKILL of the worker, twice": (kill_workers, "local"),
    "SIGKILL of driver and both Dask workers": (kill_all, "dask"),
    "two drivers on one run": (two_drivers, "local"),
    "clock and file times jump; SIGKILL": (jumping_clock, "local"),
}


def disturb(scenario: str, folder: Path, num_units: int) -> Outcome:
    """Return what is left of a run that met `scenario`."""
    expected = undisturbed(folder, num_units)
    plan = planned(folder, folder / "out", num_units)
    call, runner = SCENARIOS[scenario]
    start = time.perf_counter()
    disturbed = call(plan, runner)
    finish(plan)
    return judge(scenario, plan, expected, disturbed, time.perf_counter() - start)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Yield a folder on a disk of its own. Raises: OSError where this machine allows no mount."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), 2)


def full_disk(folder: Path, num_units: int) -> Outcome:
    """Return what is left of a run whose disk was full for a while."""
    expected = undisturbed(folder, num_units)
    start = time.perf_counter()
    with small_disk(folder / "disk", f"{8 * num_units}k") as disk:
        plan = planned(folder, disk / "out", num_units)
        assert drive(plan).wait(timeout=120) != 0, "the disk is too large for this scenario"
        assert 0 < len(done_units(plan)) < num_units
        libc = ctypes.CDLL(None, use_errno=True)
        assert not libc.mount(b"none", os.fsencode(disk), b"tmpfs", 32, b"size=64m")  # 32: MS_REMOUNT
        finish(plan)
        return judge("disk full, then room again", plan, expected, 1, time.perf_counter() - start)


def store_killed(folder: Path, num_units: int) -> Outcome:
    """Return what is left of a run whose store, input and output, was killed twice, each time started again later."""
    store = JuiceFS(folder)
    store.start()
    os.environ.update(s3_environment(store.endpoint))
    try:
        local = write_tickets(folder / "in", "a.parquet", tickets(UNIT_ROWS * num_units), row_group_size=UNIT_ROWS)
        bucket = f"s3://{BUCKET}"
        storage.write_bytes_atomic(f"{bucket}/in/a.parquet", local.read_bytes())
        quiet, plan = (
            fake_plan([f"{bucket}/in"], f"{bucket}/{name}", unit_rows=UNIT_ROWS) for name in ("quiet", "out")
        )
        write_plan(quiet)
        finish(quiet)
        expected = {unit_id: receipt.data_sha256 for unit_id, receipt in read_receipts(quiet).items()}
        start = time.perf_counter()
        write_plan(plan)
        driver = drive(plan, folder=folder)
        for share in (4, 2):
            wait_for(plan, num_units // share, driver)
            assert driver.poll() is None, "it was over before the store was killed"
            store.kill()
            time.sleep(5)
            store.start()
        assert driver.wait(timeout=300) == 0
        scenario = "SIGKILL of the store (JuiceFS, input and output), back after 5 s"
        return judge(scenario, plan, expected, 2, time.perf_counter() - start)
    finally:
        store.stop()


def soak(folder: Path, kills: int, num_units: int, seed: int) -> Outcome:
    """Return what is left of runs that are killed at random moments and resumed, until so many kills have hit.

    Each driver is forked from here, where Beam is imported already, so that most of its life is work.
    """
    expected = undisturbed(folder, num_units)
    chance = random.Random(seed)
    hits = 0
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    while hits < kills:
        plan = planned(folder, folder / "soak", num_units)
        while (manifest := read_manifest(plan.output)) is None or manifest.status != "complete":
            before = len(done_units(plan))
            pid = os.fork()
            if not pid:
                _forked_driver(plan)
            while not (is_over := bool(os.waitpid(pid, os.WNOHANG)[0])) and len(done_units(plan)) == before:
                time.sleep(0.01)
            if is_over:
                continue
            if hits < kills:  # a driver that has done a unit, and is doing others
                time.sleep(chance.uniform(0.0, 0.5))
                os.kill(pid, signal.SIGKILL)
            hits += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        finalize(plan, max_reject_rate=0.0)
        outcomes.append(judge("", plan, expected, 0, 0.0))
        shutil.rmtree(plan.output)
    return Outcome(
        scenario=f"SIGKILL at a random moment, {len(outcomes)} runs",
        disturbed=hits,
        seconds=time.perf_counter() - start,
        rows=sum(outcome.rows for outcome in outcomes),
        rows_lost=sum(outcome.rows_lost for outcome in outcomes),
        rows_doubled=sum(outcome.rows_doubled for outcome in outcomes),
        is_same=all(outcome.is_same for outcome in outcomes),
    )


def _forked_driver(plan: Plan) -> None:
    """Do what is pending, finalize, and end this process."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        plan = read_plan(plan.output)
        run_units(plan, pending_units(plan), runner="portable", options=_THREADS, open_engine=open_paced_engine)
        finalize(plan, max_reject_rate=0.0)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kills:
            for number, scenario in enumerate(SCENARIOS):
                print(scenario, file=sys.stderr, flush=True)
                outcomes.append(disturb(scenario, Path(folder, str(number)), arguments.units))
            outcomes.append(full_disk(Path(folder, "full"), arguments.units))
            print("soak", file=sys.stderr, flush=True)
            outcomes.append(soak(Path(folder, "soak"), arguments.kills, arguments.units, arguments.seed))
            if has_juicefs():  # last: a client of S3 has threads, which a fork would miss
                print("store", file=sys.stderr, flush=True)
                Path(folder, "store").mkdir()
                outcomes.append(store_killed(Path(folder, "store"), arguments.units))
    print("| scenario | times | seconds | rows | lost | doubled | same bytes |\n|---|---|---|---|---|---|---|")
    for outcome in outcomes:
        print(outcome.line(), flush=True)
    if arguments.schedules:
        from tests.protocol import schedules

        start = time.perf_counter()
        schedules(arguments.schedules, seed=arguments.seed)
        print(f"{arguments.schedules:,} schedules of the commit protocol: {time.perf_counter() - start:.0f} s")
    assert all(outcome.is_same and not outcome.rows_lost + outcome.rows_doubled for outcome in outcomes)


if __name__ == "__main__":
    main()
