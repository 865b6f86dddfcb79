"""The driver's side of stopping: the record of its call, kept fresh, and what Ctrl-C and SIGTERM do while units run."""

import os
import queue
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

from jobs.progress import Say, duration
from jobs.spec import JobSpec
from pipelines import storage
from pipelines.commit import done_units, read_receipt
from pipelines.stop import BEAT_S, RUNNING, Call, call_url, write_call
from schemas.errors import K2Error
from schemas.runs import Plan, Receipt, Unit

_RETRY_S = 2.0
_SAMPLE = 32
_ENDED = 0


class CallUnderWay:
    """A call whose record is kept: what it will have ended as, and whether a stop was asked for."""

    def __init__(self, plan: Plan, spec: JobSpec, start: float) -> None:
        self.plan = plan
        self.start = start
        self.outcome = RUNNING
        self.is_asked_to_stop = False
        self._lock = threading.Lock()
        self._call = Call(
            call_id=uuid.uuid4().hex[:12],
            started=time.time(),
            model_fingerprint=plan.model_fingerprint,
            runner=spec.runner,
            price_per_hour=spec.price_per_hour,
        )

    @property
    def url(self) -> str:
        """Return where the record stands."""
        return call_url(self.plan.output, self._call.call_id)

    @property
    def seconds(self) -> float:
        """Return how long the call has lasted."""
        return time.perf_counter() - self.start

    def write(self) -> None:
        """Write the record as of now. Raises: StorageError."""
        with self._lock:
            write_call(self.plan.output, replace(self._call, seconds=round(self.seconds, 3), outcome=self.outcome))


@contextmanager
def recorded(plan: Plan, spec: JobSpec, start: float) -> Iterator[CallUnderWay]:
    """Yield the call begun at `start`, by `time.perf_counter`; its record is written now, and at the end once more.

    Raises: StorageError.
    """
    call = CallUnderWay(plan, spec, start)
    call.write()
    try:
        yield call
    except BaseException:
        call.outcome = "stopped" if call.is_asked_to_stop else "failed"
        with suppress(K2Error):  # the first error is the one to tell
            call.write()
        raise
    call.write()


@contextmanager
def stoppable(call: CallUnderWay, *, grace_s: float, say: Say) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM ask the workers to begin no further unit; the second does what it did before.

    So does SIGTERM by itself after `grace_s`: whoever sends it takes the machine away soon after. In a thread other
    than the main one, which alone may listen to signals, there is none of that, and the record is kept all the same.
    """
    events: queue.SimpleQueue[int] = queue.SimpleQueue()  # whose put, unlike Event.set, a signal may interrupt
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        call.is_asked_to_stop = True
        events.put(number)

    for number in before:
        signal.signal(number, ask)
    thread = threading.Thread(target=_keep, args=(call, events, grace_s, say), name="k2batch-call", daemon=True)
    thread.start()
    try:
        yield
    finally:
        restore()
        events.put(_ENDED)
        thread.join(timeout=10)


def _keep(call: CallUnderWay, events: "queue.SimpleQueue[int]", grace_s: float, say: Say) -> None:
    """Write the call's record every while, and at once when a signal came."""
    next_write = time.monotonic() + BEAT_S
    leave_at = None
    while True:
        until = min(next_write, leave_at) if leave_at is not None else next_write
        try:
            number = events.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            number = None
        if number == _ENDED:
            return
        now = time.monotonic()
        if number is not None:
            call.outcome, next_write = "stopped", now
            say(f"  {signal.Signals(number).name}: no further unit is begun; once more: leave at once")
            if number == signal.SIGTERM:
                leave_at = now + grace_s
        if leave_at is not None and now >= leave_at:
            say(f"  units are still under way after {grace_s:.0f} s: leaving them")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if now >= next_write:
            next_write = now + (BEAT_S if _is_written(call, say) else _RETRY_S)
        if number is not None:
            say(_drain_line(call, grace_s if leave_at is not None else None))


def _is_written(call: CallUnderWay, say: Say) -> bool:
    try:
        call.write()
    except Exception as error:  # the flow meets the same store and speaks for itself
        say(f"  the call's record cannot be written just now: {error}")
        return False
    return True


def _drain_line(call: CallUnderWay, grace_s: float | None) -> str:
    """Return how long the units under way may take, as far as units ended before."""
    known = ""
    with suppress(Exception):  # a courtesy, read from a store that may be what fails
        seconds = [receipt.seconds for _, receipt in sample_receipts(call.plan, done_units(call.plan))]
        known = f"; so far a unit took up to {duration(max(seconds))}" if seconds else ""
    limit = f", {grace_s:.0f} s at most" if grace_s is not None else ""
    return f"  units under way are being finished{limit}{known}"


def sample_receipts(plan: Plan, done: Set[str]) -> list[tuple[Unit, Receipt]]:
    """Return some of the done units with their receipts, from all over the plan. Raises: StorageError."""
    units = [unit for unit in plan.units if unit.unit_id in done]
    some = units[:: max(1, len(units) // _SAMPLE)]
    receipts = storage.in_threads(lambda unit: read_receipt(plan, unit.unit_id), some)
    return [(unit, receipt) for unit, receipt in zip(some, receipts, strict=True) if receipt is not None]
