"""Ways to show a run while it goes on: a bar for a terminal, lines, JSON lines, a text file for Prometheus."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from jobs.progress import Progress, Say, Show, progress_line
from schemas.errors import ROW_ERROR_CODES, EnvironmentMismatch

QUIET_SECONDS = 30.0
"""The longest silence of lines."""


@contextmanager
def open_shows(kind: str, metrics: str | None, say: Say, stream: TextIO) -> Iterator[list[Show]]:
    """Yield what shows a run.

    Args:
        kind: `bar`, `lines`, `json`, `none`; `auto` is a bar where `stream` is a terminal, else lines.
        metrics: path of a text file for Prometheus, or None.
        say: takes a line for people.
        stream: takes the bar and JSON lines.

    Raises: EnvironmentMismatch if the metrics' package is not installed.
    """
    shows: list[Show] = [TextFile(metrics)] if metrics else []
    if kind == "auto":
        kind = "bar" if stream.isatty() else "lines"
    if kind == "bar":
        with _bar() as show:
            yield [*shows, show]
        return
    if kind == "lines":
        shows.append(Lines(say))
    elif kind == "json":
        shows.append(lambda now: print(json.dumps(asdict(now)), file=stream, flush=True))
    yield shows


class Lines:
    """A line whenever a unit is done, or all has long been quiet."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.rows_said = 0
        self.said = 0.0

    def __call__(self, now: Progress) -> None:
        """Say it, if there is something to say."""
        if now.rows_now == self.rows_said and now.seconds - self.said < QUIET_SECONDS:
            return
        self.said, self.rows_said = now.seconds, now.rows_now
        self.say(progress_line(now))


@contextmanager
def _bar() -> Iterator[Show]:
    """Yield what draws a bar on stderr; lines printed meanwhile stand above it."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.fields[units]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} % {task.description}"),
    )
    with Bars(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:
        task = bars.add_task("", total=None, units="")

        def show(now: Progress) -> None:
            # The line without its own units and share, which the bar shows.
            _, tickets, *rest = progress_line(now).strip().split(" · ")
            text = " · ".join([tickets.partition(" (")[0], *rest])
            units = f"{now.units_done}/{now.units} units"
            bars.update(task, total=max(now.rows, 1), completed=now.rows_done, description=text, units=units)

        yield show


class TextFile:
    """A file that Prometheus's node exporter collects (its textfile collector); replaced whole.

    Gauges are the run's; counters, whose names end with `_total`, begin anew with each call, as Prometheus expects.
    """

    def __init__(self, path: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, write_to_textfile
        except ImportError as error:
            remedy = "pip install 'k2batch[metrics]'"
            raise EnvironmentMismatch(f"--metrics {path}: {error}", remedy=remedy) from error
        self.path = path
        self.now: Progress | None = None
        self.write = write_to_textfile
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def __call__(self, now: Progress) -> None:
        """Replace the file."""
        self.now = now
        self.write(self.path, self.registry)

    def collect(self) -> Iterator[Any]:
        """Yield every metric, as `prometheus_client` asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = self.now
        if now is None:
            return
        for name, about in _GAUGES.items():
            value = time.time() if name == "looked_timestamp_seconds" else getattr(now, name)
            if value is not None:
                gauge = GaugeMetricFamily(f"k2batch_{name}", about, labels=["run_id"])
                gauge.add_metric([now.run_id], value)
                yield gauge
        for name, about in _COUNTERS.items():
            counter = CounterMetricFamily(f"k2batch_{name}", about, labels=["run_id"])
            counter.add_metric([now.run_id], getattr(now, name))
            yield counter
        rejected = CounterMetricFamily(
            "k2batch_rows_rejected", "Rows rejected by this call.", labels=["run_id", "code"]
        )
        for code in ROW_ERROR_CODES:  # all of them, so that the first of a kind is an increase
            rejected.add_metric([now.run_id, code], now.rows_rejected.get(code, 0.0))
        yield rejected


_GAUGES = {
    "units": "Units of the run.",
    "units_done": "Units that have a receipt.",
    "units_under_way": "Units that are begun and not done.",
    "units_quarantined": "Units under which processes died, which are done last and with care.",
    "rows": "Rows of the run.",
    "rows_done": "Rows of units that have a receipt.",
    "rows_per_second": "Rows per second of this call.",
    "tokens_per_second": "Tokens per second of this call, of prompts as if each had been asked alone, and of answers.",
    "engine_busy": "Share of the time that the model computed, of the units of this call.",
    "seconds_left": "Seconds to go at this call's rate.",
    "cost": "Cost of the run so far, as [deploy] price_per_hour counts it.",
    "looked_timestamp_seconds": "When the receipts were last looked at, since 1970.",
}

_COUNTERS = {
    "prompt_tokens": "Tokens of the prompts answered by this call, as if each had been asked alone.",
    "computed_tokens": "Tokens of prompts that the model computed; the rest was shared.",
    "output_tokens": "Tokens written.",
}
