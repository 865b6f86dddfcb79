"""The ways to show a run: a bar in a terminal, lines, JSON lines, a text file for Prometheus."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.shows import QUIET_SECONDS, open_shows
from schemas.errors import ROW_ERROR_CODES, EnvironmentMismatch
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


LINE = re.compile(r'k2batch_[a-z_]+\{(code="[a-z0-9_]+",)?run_id="test-1"\} [0-9.e+-]+')


def test_metrics_have_what_a_dashboard_needs_and_pass_a_linter(tmp_path: Path) -> None:
    path = tmp_path / "k2batch.prom"
    with open_shows("none", str(path), print, io.StringIO()) as shows:
        shows[0](
            moment(
                units_under_way=3, units_quarantined=1, prompt_tokens=900.0, computed_tokens=300.0, output_tokens=20.0,
                rows_rejected={"blank_text": 4.0}, engine_busy=0.97, cost=2.5,
            )
        )  # fmt: skip
    text = path.read_text()
    assert text.endswith("\n")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in families.values():
        # What `promtool check metrics` asks of names, kinds and help.
        assert family.documentation
        assert {sample.name for sample in family.samples} == {family.name + "_total" * (family.type == "counter")}
        assert len({str(sorted(sample.labels.items())) for sample in family.samples}) == len(family.samples)
    values = {name: family.samples[0].value for name, family in families.items() if len(family.samples) == 1}
    assert values == {
        "k2batch_units": 4, "k2batch_units_done": 3, "k2batch_units_under_way": 3, "k2batch_units_quarantined": 1,
        "k2batch_rows": 2_000, "k2batch_rows_done": 1_500, "k2batch_rows_per_second": 50.0,
        "k2batch_tokens_per_second": 5_120.4, "k2batch_engine_busy": 0.97, "k2batch_seconds_left": 10.0,
        "k2batch_cost": 2.5, "k2batch_prompt_tokens": 900.0, "k2batch_computed_tokens": 300.0,
        "k2batch_output_tokens": 20.0,
        "k2batch_looked_timestamp_seconds": values["k2batch_looked_timestamp_seconds"],
    }  # fmt: skip
    rejected = {sample.labels["code"]: sample.value for sample in families["k2batch_rows_rejected"].samples}
    assert rejected == dict.fromkeys(ROW_ERROR_CODES, 0.0) | {"blank_text": 4.0}
    assert {name for name, family in families.items() if family.type == "counter"} == {
        "k2batch_prompt_tokens", "k2batch_computed_tokens", "k2batch_output_tokens", "k2batch_rows_rejected"
    }  # fmt: skip


def test_without_its_package_the_metrics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        pytest.raises(EnvironmentMismatch, match=r"k2batch\[metrics\]"),
        open_shows("none", "x.prom", print, io.StringIO()),
    ):
        pass
