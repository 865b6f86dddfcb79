"""The process that annotates: it is the driver's, ends with it, hands on what it raised, and heeds no signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.supervise import peak_memory, run_child
from schemas.errors import CheckpointError

ROOT = Path(__file__).parents[1]


def test_a_death_is_told_and_the_next_process_is_there_at_once() -> None:
    assert run_child(lambda: os._exit(3)) == "ended with exit code 3"
    assert run_child(lambda: os.kill(os.getpid(), signal.SIGSEGV)) == "killed by signal 11 (SIGSEGV)"
    started = time.perf_counter()
    assert run_child(lambda: None) is None
    assert time.perf_counter() - started < 1.0  # 0.05 s where nothing else runs; a new interpreter takes 1.6
    assert peak_memory() > 1000


def test_what_is_raised_keeps_its_kind() -> None:
    def fail() -> None:
        raise CheckpointError("model.bin: truncated", remedy="fetch it again")

    with pytest.raises(CheckpointError, match=r"model\.bin: truncated") as caught:
        run_child(fail)
    assert caught.value.remedy == "fetch it again"

    class Unpicklable(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def fail_oddly() -> None:
        raise Unpicklable(1, 2)

    with pytest.raises(RuntimeError, match=r"Unpicklable: 1 and 2\n(.|\n)*fail_oddly"):
        run_child(fail_oddly)


def test_surroundings_are_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("K2_TEST", "here")
    monkeypatch.setattr(sys, "argv", ["a", "b"])

    def look() -> None:
        raise LookupError(f"{os.getcwd()} {os.environ['K2_TEST']} {sys.argv[1]}")

    with pytest.raises(LookupError, match=f"{tmp_path} here b"):
        run_child(look)


def test_signals_of_a_terminal_are_left_to_the_driver() -> None:
    def signal_self() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        raise LookupError("alive")

    with pytest.raises(LookupError, match="alive"):
        run_child(signal_self)


_DRIVER = """
import os
import time
from pipelines.supervise import run_child

def job():
    print(os.getpid(), os.getppid(), flush=True)
    time.sleep(600)

run_child(job)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_driver(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", _DRIVER], cwd=ROOT, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        child, nursery = map(int, driver.stderr.readline().split())
        driver.send_signal(number)
        driver.wait(timeout=10)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in (child, nursery)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
