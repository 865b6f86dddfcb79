"""Real Dask clusters: schedulers and workers as processes of their own, started by the command line that users type."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.cluster import _PROFILE_VARIABLE
from schemas.runs import Plan
from tests.fakes import FakeEngine

ROOT = Path(__file__).parents[1]
START_S = 60.0


@contextmanager
def process(command: Sequence[str], log: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command in a process group of its own, which is killed in the end."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            cwd=log.parent,  # where nothing of ours can be imported from
            env={**os.environ, "PYTHONPATH": str(ROOT), _PROFILE_VARIABLE: "False", **environment},
            start_new_session=True,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield child
    finally:
        kill_group(child)


def kill_group(child: "subprocess.Popen[bytes]") -> None:
    """End a process and those it started, at once."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = START_S) -> None:
    """Wait until the condition holds; fail after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


@contextmanager
def scheduler(
    folder: Path, *, host: str = "127.0.0.1", inside: Sequence[str] = (), **environment: str
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run `dask scheduler`; yield its address and its process."""
    file = folder / f"scheduler-{time.monotonic_ns()}.json"
    words = ["--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    command = [*inside, sys.executable, "-m", "dask", "scheduler", *words]
    with process(command, folder / "scheduler.log", **environment) as child:
        wait_until(lambda: file.exists() and file.stat().st_size, "a scheduler file")
        yield json.loads(file.read_text())["address"], child


@contextmanager
def worker(
    folder: Path,
    address: str,
    *words: str,
    inside: Sequence[str] = (),
    python: str = sys.executable,
    **environment: str,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `dask worker` with three threads, and the nanny that starts it again."""
    log = folder / f"worker-{time.monotonic_ns()}.log"
    words = ("--nthreads", "3", "--no-dashboard", "--memory-limit", "0", "--local-directory", str(folder), *words)
    with process([*inside, python, "-m", "dask", "worker", address, *words], log, **environment) as child:
        yield child


def open_watched_engine(plan: Plan) -> FakeEngine:
    """Open a fake engine that notes its opening and the units under way in K2_FAKE_LOG + .engines."""
    time.sleep(0.1)  # long enough for another thread to want one too
    _note(f"{os.getpid()} opened")
    return _WatchedEngine(pause_s=0.3)


class _WatchedEngine(FakeEngine):
    lock = threading.Lock()
    underway = 0

    def submit(self, requests: Any) -> Any:
        with self.lock:
            _WatchedEngine.underway += 1
            _note(f"{os.getpid()} underway {self.underway}")
        try:
            return super().submit(requests)
        finally:
            with self.lock:
                _WatchedEngine.underway -= 1


def open_gated_engine(plan: Plan) -> FakeEngine:
    """Open a fake engine that answers nothing before the file K2_FAKE_LOG + .gate is there."""
    return _GatedEngine(pause_s=0.2)


class _GatedEngine(FakeEngine):
    def submit(self, requests: Any) -> Any:
        result = super().submit(requests)
        wait_until(Path(os.environ["K2_FAKE_LOG"] + ".gate").exists, "the gate")
        return result


def _note(line: str) -> None:
    with open(os.environ["K2_FAKE_LOG"] + ".engines", "a") as file:
        file.write(line + "\n")
