"""The lines that say how far a run is."""

import pytest

from jobs.progress import duration, progress_line


def test_progress_line_gives_the_rate_of_this_call_not_of_the_calls_before() -> None:
    line = progress_line(units=3, all_units=4, rows=1_500, all_rows=2_000, rows_now=500, seconds=10)
    assert line == "  3/4 units · 1,500/2,000 tickets (75 %) · 50.0 tickets/s · 10 s to go"
    assert progress_line(0, 4, 0, 2_000, 0, 45).endswith("45 s so far")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (7_500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
