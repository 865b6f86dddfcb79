"""The graph: the shapes that Beam's Dask runner gets wrong are refused, and ours is not one of them."""

import gc
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.transforms.userstate import BagStateSpec

from pipelines.graph import Flow, build, close_engines, engine_and_prompts, refuse_unsafe
from schemas.errors import EnvironmentMismatch
from tests.fakes import fake_plan, open_fake_engine, tickets, write_tickets


def test_our_graph_is_safe(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(5))
    plan = fake_plan([tmp_path], tmp_path / "out")
    pipeline = beam.Pipeline()
    build(pipeline, Flow(plan=plan, open_engine=open_fake_engine), plan.units)
    refuse_unsafe(pipeline)


def test_what_is_there_when_a_model_was_opened_is_no_more_looked_through_for_garbage(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(5))
    plan = fake_plan([tmp_path], tmp_path / "out")
    gc.unfreeze()
    try:
        engine_and_prompts(plan, lambda plan: open_fake_engine(plan))  # of a name of its own: opened anew
        assert gc.get_freeze_count() > 0.9 * (gc.get_freeze_count() + len(gc.get_objects()))
    finally:
        close_engines()
    assert gc.get_freeze_count() == 0


def test_tagged_outputs_are_refused() -> None:
    pipeline = beam.Pipeline()
    split = pipeline | beam.Create([1, 2]) | "Split" >> beam.Map(lambda x: x).with_outputs("bad", main="good")
    (split.good, split.bad) | beam.Flatten()
    with pytest.raises(EnvironmentMismatch, match=r"Split.*tagged outputs"):
        refuse_unsafe(pipeline)


def test_second_leaf_is_refused() -> None:
    pipeline = beam.Pipeline()
    numbers = pipeline | beam.Create([1, 2])
    numbers | "Left" >> beam.Map(lambda x: x)
    numbers | "Right" >> beam.Map(lambda x: x)
    with pytest.raises(EnvironmentMismatch, match=r"more than one leaf: Left.*Right"):
        refuse_unsafe(pipeline)


class _Late(beam.DoFn):
    def __init__(self) -> None:
        pass

    def process(self, element: int) -> Iterator[int]:
        yield element

    def finish_bundle(self) -> Iterator[int]:
        yield 0


class _Stateful(beam.DoFn):
    BAG = BagStateSpec("bag", beam.coders.VarIntCoder())

    def __init__(self) -> None:
        pass

    def process(self, element: tuple[int, int], bag: object = beam.DoFn.StateParam(BAG)) -> Iterator[int]:
        yield element[1]


def test_finish_bundle_is_refused() -> None:
    pipeline = beam.Pipeline()
    pipeline | beam.Create([1, 2]) | "Late" >> beam.ParDo(_Late())
    with pytest.raises(EnvironmentMismatch, match=r"Late.*finish_bundle"):
        refuse_unsafe(pipeline)


def test_state_is_refused() -> None:
    pipeline = beam.Pipeline()
    pipeline | beam.Create([(1, 2)]) | "Keep" >> beam.ParDo(_Stateful())
    with pytest.raises(EnvironmentMismatch, match=r"Keep.*state"):
        refuse_unsafe(pipeline)
