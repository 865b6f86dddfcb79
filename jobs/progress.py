"""How far a run is, said while it goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.commit import done_units
from schemas.runs import Plan

POLL_SECONDS = 2.0
"""Between looks at the receipts: one listing each, which a store answers a thousand names at a time."""

QUIET_SECONDS = 30.0
"""The longest silence of the progress lines."""

Say = Callable[[str], None]


@contextmanager
def progress(plan: Plan, done: set[str], say: Say) -> Iterator[None]:
    """Say how far the run is, from a thread, whenever a unit is done."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(plan, done, say, stop), name="k2batch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _watch(plan: Plan, done: set[str], say: Say, stop: threading.Event) -> None:
    start = said = time.perf_counter()
    rows_of = {unit.unit_id: unit.rows for unit in plan.units}
    rows_before = sum(rows_of[unit_id] for unit_id in done)
    units_said = len(done)
    while not stop.wait(POLL_SECONDS):
        now = time.perf_counter()
        try:
            receipts = done_units(plan)
        except Exception as error:  # progress is a courtesy: the flow meets the same store and speaks for itself
            say(f"  progress cannot be read just now: {error}")
            continue
        if len(receipts) == units_said and now - said < QUIET_SECONDS:
            continue
        rows = sum(rows_of[unit_id] for unit_id in receipts)
        said, units_said = now, len(receipts)
        say(progress_line(len(receipts), len(plan.units), rows, plan.rows, rows - rows_before, now - start))


def progress_line(units: int, all_units: int, rows: int, all_rows: int, rows_now: int, seconds: float) -> str:
    """Return a line such as `  3/9 units · 768/1,520 tickets (51 %) · 24.1 tickets/s · 31 s to go`."""
    line = f"  {units}/{all_units} units · {rows:,}/{all_rows:,} tickets ({100 * rows // max(all_rows, 1)} %)"
    if not rows_now:
        return f"{line} · {duration(seconds)} so far"
    rate = rows_now / seconds
    return f"{line} · {rate:.1f} tickets/s · {duration((all_rows - rows) / rate)} to go"


def duration(seconds: float) -> str:
    """Return a length of time for people: `31 s`, `4 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
