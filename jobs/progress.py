"""How far a run is: looked up in its receipts while it goes on, and handed to whatever shows it."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipelines import poison, storage
from pipelines.commit import done_units, read_receipt
from schemas.runs import Plan

POLL_SECONDS = 2.0
"""The least time between looks at the receipts."""

LOOKING_SHARE = 0.05
"""The most of its time that the watching thread looks: a million receipts take a store a thousand calls to list."""

RECEIPTS_READ = 200
"""New receipts read at a look, for their sums; those of the others are taken to be as much a row."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A run at one moment. Totals are the run's; rates are those of this call."""

    run_id: str
    units: int
    units_done: int
    rows: int
    rows_done: int
    rows_now: int
    """Of `rows_done`, those of this call."""
    seconds: float
    """Since this call began."""
    rows_per_second: float
    tokens_per_second: float
    """Tokens of the prompts answered, as if each had been asked alone, and of the answers."""
    seconds_left: float | None
    """At this call's rate; None before its first unit is done."""
    cost: float | None
    """Of all calls so far; None without a price."""
    units_under_way: int = 0
    units_quarantined: int = 0
    """Under which processes died: they are done last, in halves down to the row at fault."""
    prompt_tokens: float = 0.0
    """Of this call, as are those below: the receipts' sums, estimated where they came faster than they are read."""
    computed_tokens: float = 0.0
    output_tokens: float = 0.0
    rows_rejected: dict[str, float] = field(default_factory=dict)
    """By error code."""
    engine_busy: float | None = None
    """Share of the time that the model computed; None before the first unit is done."""


Show = Callable[[Progress], None]
Cost = Callable[[float], float | None]


def no_cost(seconds: float) -> float | None:
    """Return None: nobody said what an hour costs."""
    return None


@contextmanager
def watch(plan: Plan, done: set[str], shows: Sequence[Show], *, say: Say, cost: Cost = no_cost) -> Iterator[None]:
    """Show how far the run is, from a thread, and once more at the end.

    Args:
        plan: the run.
        done: ids of the units done before.
        shows: each is called at every look.
        say: is told when the receipts cannot be read.
        cost: returns the cost of the run after so many seconds of this call.
    """
    watcher = _Watcher(plan, done, shows, say, cost)
    thread = threading.Thread(target=watcher.loop, name="k2batch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watcher.stop.set()
        thread.join(timeout=10)


class _Watcher:
    def __init__(self, plan: Plan, done: set[str], shows: Sequence[Show], say: Say, cost: Cost) -> None:
        self.plan = plan
        self.rows_of = {unit.unit_id: unit.rows for unit in plan.units}
        self.shows = shows
        self.say = say
        self.cost = cost
        self.stop = threading.Event()
        self.start = time.perf_counter()
        self.seen = set(done)
        self.rows_before = self.rows_done = sum(self.rows_of[unit_id] for unit_id in done)
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.rejected: defaultdict[str, float] = defaultdict(float)
        self.begun = (0, 0)

    def loop(self) -> None:
        """Look until the call ends, and then once more."""
        pause = POLL_SECONDS
        while not self.stop.wait(pause):
            took = self.look()
            pause = max(POLL_SECONDS, took / LOOKING_SHARE)
        self.look()

    def look(self) -> float:
        """Show what the receipts say now; return how many seconds it took."""
        began = time.perf_counter()
        try:
            self._count(done_units(self.plan) - self.seen)
            self.begun = poison.tally(self.plan, self.seen)
        except Exception as error:  # progress is a courtesy: the flow meets the same store and speaks for itself
            self.say(f"  progress cannot be read just now: {error}")
        else:
            now = self.progress(began - self.start)
            for show in self.shows:
                show(now)
        return time.perf_counter() - began

    def _count(self, new: frozenset[str]) -> None:
        read = storage.in_threads(lambda unit_id: read_receipt(self.plan, unit_id), sorted(new)[:RECEIPTS_READ])
        receipts = [receipt for receipt in read if receipt is not None]  # one may be replaced or deleted meanwhile
        rows, rows_read = sum(self.rows_of[unit_id] for unit_id in new), sum(receipt.rows for receipt in receipts)
        for receipt in receipts:
            share = rows / max(rows_read, 1)
            for name in ("prompt_tokens", "computed_tokens", "output_tokens"):
                self.sums[name] += share * getattr(receipt, name)
            self.sums["busy_rows"] += share * receipt.rows * receipt.engine_busy
            for code, number in receipt.error_codes.items():
                self.rejected[code] += share * number
        self.rows_done += rows
        self.seen |= new

    def progress(self, seconds: float) -> Progress:
        """Return what is known `seconds` after the call began."""
        rows_now = self.rows_done - self.rows_before
        per_second = rows_now / max(seconds, 1e-9)
        return Progress(
            run_id=self.plan.run_id,
            units=len(self.rows_of),
            units_done=len(self.seen),
            rows=self.plan.rows,
            rows_done=self.rows_done,
            rows_now=rows_now,
            seconds=seconds,
            rows_per_second=per_second,
            tokens_per_second=(self.sums["prompt_tokens"] + self.sums["output_tokens"]) / max(seconds, 1e-9),
            seconds_left=(self.plan.rows - self.rows_done) / per_second if per_second else None,
            cost=self.cost(seconds),
            units_under_way=self.begun[0],
            units_quarantined=self.begun[1],
            prompt_tokens=self.sums["prompt_tokens"],
            computed_tokens=self.sums["computed_tokens"],
            output_tokens=self.sums["output_tokens"],
            rows_rejected=dict(self.rejected),
            engine_busy=self.sums["busy_rows"] / rows_now if rows_now else None,
        )


def progress_line(now: Progress) -> str:
    """Return a line such as `  3/9 units · 768/1,520 tickets (51 %) · 24.1 tickets/s · 5,120 tokens/s · 31 s to go`."""
    share = 100 * now.rows_done // max(now.rows, 1)
    parts = [f"  {now.units_done}/{now.units} units", f"{now.rows_done:,}/{now.rows:,} tickets ({share} %)"]
    if now.seconds_left is None:
        parts.append(f"{duration(now.seconds)} so far")
    else:
        parts += [f"{now.rows_per_second:,.1f} tickets/s", f"{now.tokens_per_second:,.0f} tokens/s"]
        parts.append(f"{duration(now.seconds_left)} to go" if now.rows_done < now.rows else duration(now.seconds))
    if now.cost is not None:
        parts.append(f"cost {now.cost:,.2f}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Return a length of time for people: `31 s`, `4 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
