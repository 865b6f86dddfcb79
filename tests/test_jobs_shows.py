"""The ways to show a run: a bar in a terminal, lines, JSON lines, a text file for Prometheus."""

import io
import json
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.shows import QUIET_SECONDS, open_shows
from schemas.errors import EnvironmentMismatch
from tests.test_jobs_progress import moment


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_when_something_is_done_or_all_is_quiet() -> None:
    said: list[str] = []
    with open_shows("auto", None, said.append, io.StringIO()) as shows:
        for rows, seconds in ((0, 2.0), (0, 4.0), (500, 6.0), (500, 8.0), (500, 6 + QUIET_SECONDS), (700, 39.0)):
            for show in shows:
                show(moment(rows_now=rows, seconds=seconds, rows_done=1_000 + rows))
    assert [line.split(" · ")[1].split(" ")[0] for line in said] == ["1,500/2,000", "1,500/2,000", "1,700/2,000"]


def test_json_lines_hold_every_number() -> None:
    stream = io.StringIO()
    with open_shows("json", None, print, stream) as shows:
        shows[0](moment(cost=1.5))
        shows[0](moment(seconds_left=None))
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["rows_done"], first["tokens_per_second"], first["cost"]) == (1_500, 5_120.4, 1.5)
    assert (second["seconds_left"], second["cost"]) == (None, None)


def test_a_terminal_gets_a_bar_and_lines_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with open_shows("auto", None, print, terminal) as shows:
        shows[0](moment())
        print("a unit was tried again", file=sys.stderr)
        shows[0](moment(units_done=4, rows_done=2_000, seconds_left=0.0))
    text = terminal.getvalue()
    assert "a unit was tried again" in text
    assert "4/4 units" in text
    assert "2,000/2,000 tickets · 50.0 tickets/s · 5,120 tokens/s · 10 s" in text


def test_none_shows_nothing() -> None:
    with open_shows("none", None, print, Terminal()) as shows:
        assert shows == []


def test_prometheus_reads_its_file(tmp_path: Path) -> None:
    path = tmp_path / "k2batch.prom"
    with open_shows("none", str(path), print, io.StringIO()) as shows:
        shows[0](moment(seconds_left=None))
        shows[0](moment(cost=2.5))
    found = {family.name: family.samples for family in text_string_to_metric_families(path.read_text())}
    assert found["k2batch_rows_done"][0].value == 1_500
    assert found["k2batch_rows_done"][0].labels == {"run_id": "test-1"}
    assert found["k2batch_cost"][0].value == 2.5
    assert found["k2batch_looked_timestamp_seconds"][0].value > 1.7e9
    assert [child.name for child in tmp_path.iterdir()] == ["k2batch.prom"]


def test_without_its_package_the_metrics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        pytest.raises(EnvironmentMismatch, match=r"k2batch\[metrics\]"),
        open_shows("none", "x.prom", print, io.StringIO()),
    ):
        pass
