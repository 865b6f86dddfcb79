"""The local runner's process, and what follows when a process of any runner dies.

The graph of the local runner runs in a process of its own: what ends it (a crash of native code, the kernel when memory
runs out, our own watch over a hang) leaves the driver, which has another one go on. It is forked by a third process,
the nursery, that has imported what is needed and does nothing else: so a new one is there in 20 ms and not in 1.6 s,
and none is forked from the driver, whose threads it would miss. All end with the driver, however that ends, for they
read from a pipe that it alone holds open.
"""

import atexit
import importlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from pipelines import poison
from pipelines.commit import pending_units
from pipelines.giving_up import GIVEN_UP, LOOK_S
from pipelines.stop import deaf_children
from pipelines.watch import STALLED
from schemas.errors import EnvironmentMismatch, K2Error
from schemas.runs import Plan, Unit

MAX_FRUITLESS = 3
"""Processes that may die one after the other without a unit done or anything learned about the one at fault."""

# Not `-m pipelines.supervise`, nor with the current folder on the path, where any file may have the name of a module.
_NURSERY = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); import pipelines.supervise as s; s.nursery()"
)
_LOGGERS = ("apache_beam", "distributed", "asyncio")

Once = Callable[[Sequence[Unit], bool], str | None]
"""Runs the graph over units, of which the second argument says whether they are suspects; returns how it died."""


def until_done(plan: Plan, units: Sequence[Unit], once: Once, say: Callable[[str], None]) -> int:
    """Run `once` until all `units` had their turn, or the run is given up; return how often a process died on the way.

    Raises: EnvironmentMismatch if it dies again and again to no avail; what `once` raises.
    """
    deaths = fruitless = 0
    todo: Sequence[Unit] = units
    attempts = poison.settle(plan, todo, poison.UNKNOWN)
    while todo:
        suspects = {unit_id for unit_id, attempt in attempts.items() if attempt.suspect}
        ordinary = [unit for unit in todo if unit.unit_id not in suspects]
        died = once(ordinary or todo, not ordinary)
        if GIVEN_UP.is_set():  # what was under way is lost, and not to blame
            poison.let_all_go(plan, todo)
            break
        before, attempts = _learned(attempts), poison.settle(plan, todo, died or poison.UNKNOWN)
        if died is None:
            is_suspect = {unit_id for unit_id, attempt in attempts.items() if attempt.suspect}
            todo = [unit for unit in todo if unit.unit_id in is_suspect] if ordinary else []
            continue
        deaths += 1
        pending = pending_units(replace(plan, units=tuple(todo)))
        is_fruitless = len(pending) == len(todo) and _learned(attempts) == before
        fruitless, todo = fruitless + 1 if is_fruitless else 0, pending
        if fruitless == MAX_FRUITLESS:
            raise EnvironmentMismatch(
                f"{fruitless} processes ended one after the other and no unit was done: {died}",
                remedy="does the model fit into memory? run `k2batch doctor`; running the same job again resumes",
            )
        say(f"  a process ended: {died}; another one goes on")
    return deaths


def _learned(attempts: Mapping[str, poison.Attempts]) -> object:
    """Return what changes when something is learned about a unit that kills its process."""
    return [(unit_id, a.whole_deaths, repr(a.ranges)) for unit_id, a in sorted(attempts.items()) if a.suspect]


_IDLE: list["subprocess.Popen[bytes]"] = []
"""Nurseries that wait for the next job of this process."""

_PEAKS: list[int] = []


def run_child(job: Callable[[], None]) -> str | None:
    """Run `job` in a process of its own; return None once it is done, or how the process died.

    Args:
        job: what cloudpickle can pickle.

    Raises: what `job` raised.
    """
    importlib.import_module("pipelines.quiet_beam")  # before the next line, which would import it loudly
    from apache_beam.internal.cloudpickle import cloudpickle

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    message = (sys.path, sys.argv, dict(os.environ), os.getcwd(), levels, cloudpickle.dumps(job))
    prepare()
    process = _IDLE.pop()
    assert process.stdin is not None
    assert process.stdout is not None
    pid = 0
    try:
        pickle.dump(message, process.stdin)
        process.stdin.flush()
        pid = pickle.load(process.stdout)
        with _killed_when_given_up(pid):
            returncode, peak, answer = pickle.load(process.stdout)
    except BaseException as error:
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _end(process)
        if isinstance(error, EOFError | OSError):
            return "killed together with the process that watches over it"
        raise
    _IDLE.append(process)
    _PEAKS.append(peak)
    if returncode or not answer:
        return _death(returncode)
    raised = pickle.loads(answer)
    if raised is not None:
        raise raised
    return None


@contextmanager
def _killed_when_given_up(pid: int) -> Iterator[None]:
    """Kill the process `pid` if the run is given up within the body, which waits for its end."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            if GIVEN_UP.is_set():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=look, name="k2batch-given-up", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def peak_memory() -> int:
    """Return the most memory that a process of `run_child` ever held, in the unit of `getrusage`."""
    return max(_PEAKS, default=0)


def prepare() -> None:
    """Start a nursery, unless one is idle: its imports take 1.6 s, which other work may fill."""
    if _IDLE:
        return
    command = [sys.executable, "-P", "-c", _NURSERY]
    with deaf_children():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    pickle.dump(sys.path, process.stdin)
    process.stdin.flush()
    _IDLE.append(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


@atexit.register
def _end_all() -> None:
    while _IDLE:
        _end(_IDLE.pop())


def _death(returncode: int) -> str:
    if returncode == -signal.SIGKILL:
        return "killed by signal 9 (SIGKILL), as the kernel does when memory runs out"
    if returncode < 0:
        return f"killed by signal {-returncode} ({signal.Signals(-returncode).name})"
    if returncode == STALLED:
        return "it computed nothing for too long"
    return f"ended with exit code {returncode}"


def nursery() -> None:
    """Be the process that forks one for each job; ends with the driver."""
    # All that a job imports, but torch, whose threads no fork survives.
    for module in ("pipelines.runners", "apache_beam.runners.portability.fn_api_runner.fn_runner"):
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the driver's output is for its result
    with suppress(EOFError, BrokenPipeError):
        while True:
            message = pickle.load(sys.stdin.buffer)
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                answers.close()
                _be_child(writer, *message)
            os.close(writer)
            pickle.dump(pid, answers)
            answers.flush()
            with os.fdopen(reader, "rb") as file:
                answer = file.read()
            _, status, usage = os.wait4(pid, 0)
            pickle.dump((os.waitstatus_to_exitcode(status), usage.ru_maxrss, answer), answers)
            answers.flush()
    os._exit(0)


def _be_child(
    writer: int,
    path: list[str],
    argv: list[str],
    environ: dict[str, str],
    folder: str,
    levels: dict[str, int],
    job: bytes,
) -> None:
    """Do the job and write what it raised, or None."""
    threading.Thread(target=_end_with_driver, name="k2batch-lifeline", daemon=True).start()
    try:
        sys.path[:], sys.argv[:] = path, argv
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(folder)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        pickle.loads(job)()
        answer = pickle.dumps(None)
    except BaseException as error:
        answer = _pickled(error)
    with os.fdopen(writer, "wb") as file:
        file.write(answer)
    sys.stderr.flush()
    os._exit(0)  # what threads are still about, of Beam's or torch's, must not keep it


def _end_with_driver() -> None:
    os.read(0, 1)  # the driver writes no more: this is the end of the pipe
    os._exit(1)


def _pickled(error: BaseException) -> bytes:
    """Return `error`, which keeps its kind if it can be pickled, and its traceback if it is a bug."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, K2Error):
        error.add_note(f"In the process that annotates:\n{text}")
    try:
        pickle.loads(answer := pickle.dumps(error))
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}\n{text}"))
    return answer
