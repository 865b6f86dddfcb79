"""The watch: a process that computes nothing for too long is ended, whatever holds it; one that works is not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_WORK = """
import ctypes
import sys
import time
from pipelines import watch

class Engine:
    busy_seconds = 0.0

watch._GRACE_S = 0.5
engine = Engine()
with watch.watched(engine, 0.4, lambda cause: print(cause, flush=True)):
    if sys.argv[1] == "works":
        for _ in range(10):
            time.sleep(0.2)
            engine.busy_seconds += 0.1
    elif sys.argv[1] == "hangs":
        time.sleep(60)
    elif sys.argv[1] == "hangs in native code":
        ctypes.PyDLL(None).sleep(60)  # keeps Python's lock
time.sleep(1.5)
print("after")
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("works", 0, "after"),
        ("hangs", 75, "nothing was computed for 0.4 s"),
        ("hangs in native code", 1, ""),
    ],
)
def test_only_a_process_that_computes_nothing_is_ended(how: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WORK, how], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout.strip()) == (code, said)
    assert ("Timeout" in done.stderr) == (code == 1)
