"""Stopping well: whether a unit may still be begun, and the record by which the workers of a call learn it.

A call is one `k2batch run`. Its record, `calls/<call_id>.json` in the run's folder, is written by its driver alone:
before any unit is begun, every half minute, when a stop is asked for, and at the end. So a stop reaches the workers of
every runner, another call of the same run takes no notice of it, and what a killed call cost is known to half a minute.
"""

import json
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from typing import Self

from pipelines import storage
from schemas.runs import Receipt, Unit

RUNNING = "running"
"""The outcome of a call that has none yet; any other word in its record means: begin no unit."""

BEAT_S = 30.0
"""Between two writes of a call's record: what a killed call cost is known to this."""

SILENCE_S = 3 * BEAT_S
"""A call that was not heard of for so long was killed."""

# A worker looks at the record at most this often, so a run of quick units on a store pays one read a second.
_LOOK_S = 1.0

# The pace is that of this many units: the first of a process wait for the model to open, and are soon forgotten.
_RECENT = 8


# Rows cost by themselves, and much of the bytes may be a few giant texts, which are rejected. Over three sets of 40,000
# real, dirty tickets, in units of 512, bytes alone miss a unit's computed tokens by 15 to 39 % (the median), this by 4
# to 12 %; rows alone by 3 %, but to them a file of long threads looks like one of short chats.
_ROW_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The record of one call."""

    call_id: str
    started: float
    """Seconds since 1970, UTC."""
    seconds: float = 0.0
    """Wall time so far."""
    outcome: str = RUNNING
    """`running`; `stopped` from when a stop was asked for; `failed` after an error; else the manifest's outcome."""
    model_fingerprint: str
    runner: str
    price_per_hour: float = 0.0
    """Of all its machines together; 0 if not given."""

    def silent_at(self, now: float) -> float:
        """Return the seconds from its last word to `now`, in seconds since 1970."""
        return max(0.0, now - self.started - self.seconds)

    def outcome_at(self, now: float) -> str:
        """Return the outcome as of `now`, in seconds since 1970: `killed` for a call that fell silent."""
        is_silent = self.silent_at(now) > SILENCE_S
        return "killed" if self.outcome == RUNNING and is_silent else self.outcome

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the record that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """What a worker must know to say whether a unit may be begun."""

    call_url: str
    """Of the call's record."""
    at: float | None = None
    """Seconds since 1970 at which no unit should be under way any more; None for no limit."""
    pace: float = 0.0
    """Seconds of a unit for each byte of its work, as earlier calls saw it; 0 if there were none."""


@contextmanager
def deaf_children() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM from the threads and processes that are started meanwhile, and from their own.

    A terminal and systemd signal every process of a run, but when to stop is the driver's to decide: Dask's workers end
    at once, and leave it waiting for others.
    """
    resource_tracker.ensure_running()  # else multiprocessing does, and unblocks both signals when it starts a process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call_url(run_url: str, call_id: str) -> str:
    """Return where the record of a call stands."""
    return storage.join(run_url, "calls", f"{call_id}.json")


def write_call(run_url: str, call: Call) -> None:
    """Write the record. Raises: StorageError."""
    storage.write_bytes_atomic(call_url(run_url, call.call_id), call.to_json().encode())


def read_calls(run_url: str) -> list[Call]:
    """Return the records of all calls of the run, oldest first; one that cannot be parsed is left out."""
    names = [name for name in storage.names(storage.join(run_url, "calls")) if name.endswith(".json")]
    found = storage.in_threads(lambda name: _read_call(storage.join(run_url, "calls", name)), names)
    return sorted((call for call in found if call is not None), key=lambda call: call.started)


def _read_call(url: str) -> Call | None:
    try:
        return Call.from_json(storage.read_text(url))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def work(unit: Unit) -> int:
    """Return the expected work of a unit, in bytes of text; a row counts as `_ROW_BYTES` beside its own text."""
    return unit.text_bytes + _ROW_BYTES * unit.rows


def longest_first(units: Iterable[Unit]) -> list[Unit]:
    """Return `units`, those of most work first: the last to end are then short, and end together.

    Beam's local runner deals a list out to its threads in turn, each of which keeps to it; Dask gets the order as
    priorities, and hands out the first few tasks before it knows them all; other runners may do as they like.
    """
    return sorted(units, key=work, reverse=True)


def pace_of(done: Iterable[tuple[Unit, Receipt]]) -> float:
    """Return the seconds of a unit for each byte of its work, the median of these; 0 for none."""
    paces = [receipt.seconds / work(unit) for unit, receipt in done]
    return statistics.median(paces) if paces else 0.0


class _Seen:
    """What this process knows of one call: whether a stop was asked for, and its own pace."""

    def __init__(self) -> None:
        self.looked = -_LOOK_S
        self.is_stopped = False
        self.paces: deque[float] = deque(maxlen=_RECENT)


# One entry for each call that this process worked for: a Dask worker outlives many.
_SEEN: dict[str, _Seen] = {}


def may_begin(stop: Stop | None, unit: Unit) -> bool:
    """Return whether the unit may be begun: no stop was asked for, and it can end by `stop.at` as units went so far.

    A process that has seen no unit end, of this run, takes it that any can.

    Raises: StorageError.
    """
    if stop is None or is_over(stop):
        return stop is None
    paces = _SEEN[stop.call_url].paces
    pace = statistics.median(paces) if paces else stop.pace
    return stop.at is None or time.time() + pace * work(unit) < stop.at


def is_over(stop: Stop) -> bool:
    """Return whether no unit may be begun any more, however short. Raises: StorageError."""
    seen = _SEEN.setdefault(stop.call_url, _Seen())
    if seen.is_stopped or (stop.at is not None and time.time() >= stop.at):
        return True
    now = time.monotonic()
    if now - seen.looked >= _LOOK_S:
        seen.looked = now
        call = _read_call(stop.call_url)
        seen.is_stopped = call is not None and call.outcome != RUNNING
    return seen.is_stopped


def note_pace(stop: Stop, unit: Unit, seconds: float) -> None:
    """Note how long a unit took in this process."""
    _SEEN.setdefault(stop.call_url, _Seen()).paces.append(seconds / work(unit))
