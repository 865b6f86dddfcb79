"""Many units: a pipeline has some of them at a time, and Beam does not tear one in two."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipelines import graph, runners
from pipelines.commit import pending_units, write_plan
from pipelines.graph import Flow
from pipelines.quiet_beam import beam
from schemas.runs import Unit
from tests.fakes import fake_plan, open_fake_engine, tickets, write_tickets

NUM_ELEMENTS = 40
SEEN: list[int] = []


class SlowToWrite:
    """An element that takes 50 ms to pickle, so that all take longer than the second after which Beam would send."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        time.sleep(0.05)
        return SlowToWrite, (self.number,)


class Note(beam.DoFn):
    """Notes what arrives."""

    def process(self, element: SlowToWrite) -> Iterator[Any]:
        SEEN.append(element.number)
        return iter(())


def run_slow_elements() -> None:
    """Run the local graph over slow elements; for a process of its own, whose memory a torn one would use up."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    def build(pipeline: Any, flow: Any, units: Sequence[Any]) -> None:
        elements = pipeline | beam.Create([SlowToWrite(number) for number in range(NUM_ELEMENTS)], reshuffle=False)
        _ = elements | beam.Reshuffle() | beam.ParDo(Note())  # type: ignore[no-untyped-call]

    graph.build = build
    runners._local_graph(cast(Flow, SimpleNamespace(stop=None)), [cast(Unit, None)], ())
    assert sorted(SEEN) == list(range(NUM_ELEMENTS)), SEEN


def test_no_element_is_sent_in_two_halves() -> None:
    code = "from tests import test_pipelines_runners_rounds as t; t.run_slow_elements()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_units_go_by_rounds_and_the_engine_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tickets(tmp_path / "in", "a.parquet", tickets(100), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    write_plan(plan)
    rounds: list[int] = []
    closed: list[int] = []
    build, close = graph.build, graph.close_engines

    def counted(pipeline: Any, flow: Flow, units: Sequence[Any]) -> None:
        rounds.append(len(units))
        build(pipeline, flow, units)

    def close_counted() -> None:
        closed.append(len(rounds))
        close()

    monkeypatch.setattr(graph, "build", counted)
    monkeypatch.setattr(graph, "close_engines", close_counted)
    monkeypatch.setattr(runners, "ROUND_UNITS", 4)
    flow = Flow(plan=plan, open_engine=open_fake_engine, stop=None, stall_seconds=0, keep_errors=True)
    runners._local_graph(flow, plan.units, ())
    assert (rounds, closed) == ([4, 4, 2], [3])
    assert pending_units(plan) == ()
