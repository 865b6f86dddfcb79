"""When a call must stop: its deadline and its budget, as one moment."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from jobs.progress import duration

if TYPE_CHECKING:
    from jobs.spec import JobSpec

_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")
_SPAN = re.compile(r"(?=\d)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?")


@dataclass(frozen=True, slots=True)
class Limit:
    """The moment at which no unit should be under way any more."""

    at: float
    """Seconds since 1970."""
    outcome: str
    """Of a call that this limit ends: `deadline` or `budget`."""
    text: str
    """For people."""


def is_deadline(text: str) -> bool:
    """Return whether `text` is a time of day, such as 06:00, or a length of time, such as 2h30m."""
    return bool(_CLOCK.fullmatch(text) or _SPAN.fullmatch(text))


def deadline_at(text: str, now: datetime) -> datetime:
    """Return the moment that `text` names: the next such time of day, in the zone of `now`, or so long after `now`.

    Args:
        text: what `is_deadline` accepts.
        now: local time, without a zone.
    """
    clock = _CLOCK.fullmatch(text)
    if clock:
        moment = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return moment if moment > now else moment + timedelta(days=1)
    hours, minutes, seconds = (int(part or 0) for part in _SPAN.fullmatch(text).groups())  # type: ignore[union-attr]
    return now + timedelta(hours=hours, minutes=minutes, seconds=seconds)


def limit_of(spec: "JobSpec", spent_s: float, started: datetime) -> Limit | None:
    """Return the earlier of deadline and budget, or None if the job has neither.

    Args:
        spec: the job.
        spent_s: seconds of the calls before this one.
        started: when this call began, local time without a zone.
    """
    limits = []
    if spec.deadline:
        moment = deadline_at(spec.deadline, started)
        left_s = (moment - started).total_seconds()
        limits.append(Limit(moment.timestamp(), "deadline", f"deadline {moment:%Y-%m-%d %H:%M}, in {duration(left_s)}"))
    if spec.max_cost:
        spent = spent_s / 3600 * spec.price_per_hour
        left_s = max(0.0, spec.max_cost - spent) / spec.price_per_hour * 3600
        text = f"budget {spec.max_cost:,.2f}, {spent:,.2f} spent before; the rest is {duration(left_s)}"
        limits.append(Limit(started.timestamp() + left_s, "budget", text))
    return min(limits, key=lambda limit: limit.at, default=None)
