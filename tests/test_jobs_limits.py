"""Deadline and budget: what a person writes, and the moment it means."""

import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from jobs.limits import deadline_at, is_deadline, limit_of
from jobs.spec import JobSpec, load_spec
from schemas.errors import SpecError
from tests.fake_jobs import job_file

NOW = datetime(2026, 11, 24, 22, 15, 30)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("23:00", datetime(2026, 11, 24, 23, 0)),
        ("6:00", datetime(2026, 11, 25, 6, 0)),
        ("06:00", datetime(2026, 11, 25, 6, 0)),
        ("22:15", datetime(2026, 11, 25, 22, 15)),
        ("2h30m", datetime(2026, 11, 25, 0, 45, 30)),
        ("90m", datetime(2026, 11, 24, 23, 45, 30)),
        ("36h", datetime(2026, 11, 26, 10, 15, 30)),
        ("0s", NOW),
        ("1h1m1s", datetime(2026, 11, 24, 23, 16, 31)),
    ],
)
def test_a_deadline_is_the_next_such_time_or_so_long_from_now(text: str, moment: datetime) -> None:
    assert is_deadline(text)
    assert deadline_at(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "24:00", "6", "06:60", "2h 30m", "30m2h", "h", "-1h", "1.5h", "soon", "06:00:00"])
def test_nothing_else_is_a_deadline(text: str) -> None:
    assert not is_deadline(text)


def test_a_time_of_day_is_local_on_the_day_that_the_clocks_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        evening = datetime(2026, 10, 24, 22, 0)  # the night has an hour more
        assert deadline_at("06:00", evening).timestamp() - evening.timestamp() == 9 * 3600
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return load_spec(str(job_file(tmp_path)), {"deploy": {"price_per_hour": 36.0}})


def test_the_earlier_of_deadline_and_budget_counts(spec: JobSpec) -> None:
    assert limit_of(spec, 0.0, NOW) is None
    deadline = limit_of(replace(spec, deadline="23:15"), 0.0, NOW)
    assert deadline is not None
    assert (deadline.at, deadline.outcome) == (datetime(2026, 11, 24, 23, 15).timestamp(), "deadline")
    assert deadline.text == "deadline 2026-11-24 23:15, in 60 min"
    both = limit_of(replace(spec, deadline="23:15", max_cost=2.0), 100.0, NOW)
    assert both is not None
    # 200 s cost 2; 100 s of them are gone.
    assert (both.at, both.outcome) == (NOW.timestamp() + 100.0, "budget")
    assert both.text == "budget 2.00, 1.00 spent before; the rest is 2 min"
    later = limit_of(replace(spec, deadline="23:15", max_cost=200.0), 100.0, NOW)
    assert later is not None
    assert later.outcome == "deadline"


def test_a_budget_that_is_spent_leaves_no_time(spec: JobSpec) -> None:
    limit = limit_of(replace(spec, max_cost=2.0), 1000.0, NOW)
    assert limit is not None
    assert limit.at == NOW.timestamp()


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("limits", "deadline", "6 o'clock", "a time of day"),
        ("limits", "deadline", 6, "a string in quotes"),
        ("limits", "max_cost", 0, "a number above 0"),
        ("limits", "max_cost", float("inf"), "a number above 0"),
        ("limits", "grace_seconds", -1, "a number above 0"),
        ("deploy", "price_per_hour", "4", "a number above 0"),
        ("deploy", "tokens_per_second", 0, "a number above 0"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, section: str, key: str, value: object, said: str) -> None:
    overrides = {"deploy": {"price_per_hour": 1.0}}
    overrides.setdefault(section, {})[key] = value  # type: ignore[assignment]
    with pytest.raises(SpecError, match=rf"\[{section}\] {key}.*{said}"):
        load_spec(str(job_file(tmp_path)), overrides)


def test_a_budget_needs_a_price(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"\[limits\] max_cost says nothing without a price") as caught:
        load_spec(str(job_file(tmp_path)), {"limits": {"max_cost": 3.0}})
    assert "[deploy] price_per_hour" in caught.value.remedy
