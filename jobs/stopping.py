"""The driver's side of stopping: the record of its call, kept fresh, and what Ctrl-C and SIGTERM do while units run."""

import math
import queue
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

from jobs.limits import Limit
from jobs.progress import Say, duration
from jobs.spec import JobSpec
from pipelines import storage
from pipelines.commit import done_units, read_receipt
from pipelines.giving_up import GIVEN_UP
from pipelines.stop import BEAT_S, RUNNING, Call, call_url, write_call
from schemas.errors import K2Error
from schemas.runs import Plan, Receipt, Unit

_RETRY_S = 2.0
_SAMPLE = 32
_ENDED = 0


class CallUnderWay:
    """A call whose record is kept: what it will have ended as, and whether a stop was asked for."""

    def __init__(self, plan: Plan, spec: JobSpec, start: float, limit: Limit | None, say: Say) -> None:
        self.plan = plan
        self.start = start
        self.limit = limit
        self.grace_s = spec.grace_seconds
        self.say = say
        self.outcome = RUNNING
        self.is_asked_to_stop = False
        self.is_annotating = False
        self.events: queue.SimpleQueue[int] = queue.SimpleQueue()
        """Signals that came. A put into this queue, unlike Event.set, may be interrupted by one."""
        self.news: queue.SimpleQueue[int] = queue.SimpleQueue()
        """The same, for who writes the record."""
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

    def failed_as(self) -> str:
        """Return what a call has ended as that raised an error."""
        if self.is_asked_to_stop:
            return "stopped"
        return self.limit.outcome if self.limit is not None and GIVEN_UP.is_set() else "failed"


@contextmanager
def recorded(plan: Plan, spec: JobSpec, start: float, *, limit: Limit | None, say: Say) -> Iterator[CallUnderWay]:
    """Yield the call begun at `start`, by `time.perf_counter`; its record is kept from now until its end.

    Once its limit, or a SIGTERM, is past by `grace_seconds`, the run is given up: units under way are lost, and a store
    that fails is not tried again.

    Raises: StorageError.
    """
    call = CallUnderWay(plan, spec, start, limit, say)
    call.write()
    threads = [threading.Thread(target=do, args=(call,), daemon=True) for do in (_mind_the_time, _keep_record)]
    for thread in threads:
        thread.start()
    try:
        yield call
    except BaseException:
        call.outcome = call.failed_as()
        with suppress(K2Error):  # the first error is the one to tell
            call.write()
        raise
    else:
        call.write()
    finally:
        call.events.put(_ENDED)
        call.news.put(_ENDED)
        for thread in threads:
            thread.join(timeout=10)
        GIVEN_UP.clear()


@contextmanager
def stoppable(call: CallUnderWay) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM ask the workers to begin no further unit; the second does what it did before.

    In a thread other than the main one, which alone may listen to signals, there is none of that.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        call.is_asked_to_stop = True
        call.events.put(number)

    for number in before:
        signal.signal(number, ask)
    call.is_annotating = True
    try:
        yield
    finally:
        call.is_annotating = False
        restore()


def _mind_the_time(call: CallUnderWay) -> None:
    """Take signals, and give the run up when its time is over. Uses no storage, which may not answer for minutes."""
    give_up_at = math.inf
    if call.limit is not None:
        give_up_at = time.monotonic() + call.limit.at - time.time() + call.grace_s
    while True:
        left_s = give_up_at - time.monotonic()
        try:
            number = call.events.get(timeout=max(0.0, left_s) if left_s < math.inf else None)
        except queue.Empty:
            number = None
        if number == _ENDED:
            return
        if number is not None:
            call.outcome = "stopped"
            call.say(f"  {signal.Signals(number).name}: no further unit is begun; once more: leave at once")
            if number == signal.SIGTERM:  # whoever sends it takes the machine away soon after
                give_up_at = min(give_up_at, time.monotonic() + call.grace_s)
            call.news.put(number)
        if time.monotonic() >= give_up_at:
            give_up_at = math.inf
            if call.is_annotating:
                call.say(f"  units are still under way after {call.grace_s:.0f} s of grace: giving them up")
            GIVEN_UP.set()


def _keep_record(call: CallUnderWay) -> None:
    """Write the call's record every while, and at once when a signal came."""
    wait_s = BEAT_S
    while True:
        try:
            number = call.news.get(timeout=wait_s)
        except queue.Empty:
            number = None
        if number == _ENDED:
            return
        wait_s = BEAT_S if _is_written(call) else _RETRY_S
        if number is not None:
            call.say(_drain_line(call, call.grace_s if number == signal.SIGTERM else None))


def _is_written(call: CallUnderWay) -> bool:
    try:
        call.write()
    except Exception as error:  # the flow meets the same store and speaks for itself
        call.say(f"  the call's record cannot be written just now: {error}")
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


def sample_receipts(plan: Plan, done: Set[str], number: int = _SAMPLE) -> list[tuple[Unit, Receipt]]:
    """Return some `number` of the done units with their receipts, from all over the plan. Raises: StorageError."""
    units = [unit for unit in plan.units if unit.unit_id in done]
    some = units[:: max(1, len(units) // number)]
    receipts = storage.in_threads(lambda unit: read_receipt(plan, unit.unit_id), some)
    return [(unit, receipt) for unit, receipt in zip(some, receipts, strict=True) if receipt is not None]
