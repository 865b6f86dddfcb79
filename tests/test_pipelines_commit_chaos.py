"""Real processes on one run: killed, doubled, out of disk. `make chaos` has the longer ones."""

import re
from pathlib import Path

import pytest

from tests import chaos

PIPELINES = Path(__file__).parents[1] / "pipelines"


def assert_whole(outcome: chaos.Outcome) -> None:
    assert outcome.disturbed
    assert (outcome.rows_lost, outcome.rows_doubled, outcome.is_same) == (0, 0, True), outcome


def test_two_drivers_on_one_run(tmp_path: Path) -> None:
    assert_whole(chaos.disturb("two drivers on one run", tmp_path, 20))


def test_full_disk(tmp_path: Path) -> None:
    try:
        with chaos.small_disk(tmp_path / "try", "1m"):
            pass
    except OSError as error:
        pytest.skip(f"no disk of its own: {error}")
    assert_whole(chaos.full_disk(tmp_path, 20))


def test_no_clock_decides_what_is_done_or_deleted() -> None:
    # Deadlines are about time, and alone in that; a clock that jumps can end a call early, and nothing else.
    clocks = re.compile(r"\btime\.time\(|datetime\.now|datetime\.utcnow|\bst_mtime\b")
    found = {path.name for path in PIPELINES.glob("*.py") if clocks.search(path.read_text())}
    assert found <= {"stop.py"}
