"""The Beam graph: `Create(units) | Reshuffle | AnnotateUnits`, and the one engine of each process.

`AnnotateUnits` is three fused 1:1 steps, so only unit descriptors are shuffled and rows never leave their process.
No tagged outputs, no `finish_bundle` outputs, no state, one leaf: on these Beam's Dask runner is silently wrong (tagged
streams merge, only the last leaf runs, `finish_bundle` outputs are dropped), so `refuse_unsafe` refuses them.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipelines.annotate import AnnotatedBlock, Block, OpenEngine, SupportsAnnotate, annotate
from pipelines.commit import commit, has_receipt, write_failure
from pipelines.prompts import Prompts
from pipelines.quiet_beam import beam
from pipelines.read import read_unit
from schemas.errors import CheckpointError, EnvironmentMismatch, SchemaMismatch
from schemas.runs import Plan, Unit


class _Provider:
    """The engines and prompts of this process: one per model as planned, whichever thread asks first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engines: dict[tuple[object, ...], SupportsAnnotate] = {}
        self.prompts: dict[tuple[object, ...], Prompts] = {}
        self.errors: list[Exception] = []


# Module-level, not apache_beam.utils.shared: that one holds a weak reference, and DoFns come and go with their bundles.
_PROVIDER = _Provider()


def open_model(plan: Plan) -> SupportsAnnotate:
    """Return an opened engine for the plan's model."""
    # Here, so that torch is loaded where rows are annotated and not where graphs are built.
    from k2model.engine.engine import Engine

    return Engine.open(plan.checkpoint, precision=plan.precision, router_thresholds=plan.router_thresholds)


def engine_and_prompts(plan: Plan, open_engine: OpenEngine) -> tuple[SupportsAnnotate, Prompts]:
    """Return this process's engine for `plan` and the prompts of its tasks, opened at first use.

    Raises: CheckpointError if the checkpoint is not the one that was planned.
    """
    engine_key = (plan.checkpoint, plan.precision, plan.router_thresholds, open_engine)
    prompts_key = (*engine_key, plan.run_id)
    with _PROVIDER.lock:
        engine = _PROVIDER.engines.get(engine_key)
        if engine is None:
            engine = _PROVIDER.engines[engine_key] = open_engine(plan)
        if engine.fingerprint != plan.model_fingerprint:
            raise CheckpointError(
                f"{plan.checkpoint}: fingerprint {engine.fingerprint}, planned {plan.model_fingerprint}",
                remedy="the checkpoint changed, or this worker has another one; run the job again",
            )
        prompts = _PROVIDER.prompts.get(prompts_key)
        if prompts is None:
            limit = min(plan.max_prompt_tokens, engine.max_position_embeddings)
            prompts = Prompts(plan.tasks, engine.tokenizer, limit)
            prompts.calibrate(engine)
            _PROVIDER.prompts[prompts_key] = prompts
        return engine, prompts


def close_engines() -> None:
    """Close every engine of this process."""
    with _PROVIDER.lock:
        for engine in _PROVIDER.engines.values():
            close = getattr(engine, "close", None)
            if close is not None:
                with suppress(Exception):
                    close()
        _PROVIDER.engines.clear()
        _PROVIDER.prompts.clear()


def take_error() -> Exception | None:
    """Return the first error that a step kept in this process since last asked."""
    error = _PROVIDER.errors[0] if _PROVIDER.errors else None
    _PROVIDER.errors.clear()
    return error


class _Step(beam.DoFn):
    """A step that sends each element to at most one element.

    With `keep_errors`, for a runner in the driver's own process, an error is kept for `take_error` and the elements
    that follow are dropped. Beam's local runner would hand a raised one on as text, its type lost, and its threads
    would go on to print tracebacks of their own about a server that is gone.
    """

    def __init__(self, plan: Plan, keep_errors: bool) -> None:
        # Units travel as elements; a copy of all of them in every step would only be pickled.
        self.plan = replace(plan, units=())
        self.keep_errors = keep_errors

    def process(self, element: Any) -> Iterator[Any]:
        """Yield what `apply` returns."""
        if self.keep_errors and _PROVIDER.errors:
            return
        try:
            result = self.apply(element)
        except Exception as error:
            if not self.keep_errors:
                raise
            _PROVIDER.errors.append(error)
            return
        if result is not None:
            yield result

    def apply(self, element: Any) -> Any:
        """Return the step's answer to `element`, or None for none."""
        raise NotImplementedError


@beam.typehints.with_input_types(Unit)
@beam.typehints.with_output_types(Block)
class ReadUnit(_Step):
    """Unit to its rows; nothing for a unit that is done already, or whose input cannot be read (which is noted)."""

    def apply(self, element: Unit) -> Block | None:
        """Return the unit's rows."""
        started = time.perf_counter()
        if has_receipt(self.plan, element):
            return None
        try:
            return Block(element, read_unit(element), started)
        except SchemaMismatch as error:
            write_failure(self.plan, element, error)
            return None


@beam.typehints.with_input_types(Block)
@beam.typehints.with_output_types(AnnotatedBlock)
class AnnotateBlock(_Step):
    """Rows to annotated rows."""

    def __init__(self, plan: Plan, keep_errors: bool, open_engine: OpenEngine) -> None:
        super().__init__(plan, keep_errors)
        self.open_engine = open_engine

    def apply(self, element: Block) -> AnnotatedBlock:
        """Return the rows with the added columns."""
        engine, prompts = engine_and_prompts(self.plan, self.open_engine)
        return annotate(element, self.plan, prompts, engine)


@beam.typehints.with_input_types(AnnotatedBlock)
@beam.typehints.with_output_types(str)
class CommitBlock(_Step):
    """Annotated rows to the receipt that was written for them, as JSON."""

    def apply(self, element: AnnotatedBlock) -> str:
        """Return the receipt."""
        return commit(element, self.plan).to_json()


class AnnotateUnits(beam.PTransform[Any, Any]):
    """Units to receipts (JSON): read, annotate, commit, fused."""

    def __init__(self, plan: Plan, open_engine: OpenEngine = open_model, *, keep_errors: bool = False) -> None:
        super().__init__()
        self.plan = plan
        self.open_engine = open_engine
        self.keep_errors = keep_errors

    def expand(self, pcoll: Any) -> Any:
        """Return the receipts of the units `pcoll`."""
        return (
            pcoll
            | "Read" >> beam.ParDo(ReadUnit(self.plan, self.keep_errors))
            | "Annotate" >> beam.ParDo(AnnotateBlock(self.plan, self.keep_errors, self.open_engine))
            | "Commit" >> beam.ParDo(CommitBlock(self.plan, self.keep_errors))
        )


def build(
    pipeline: beam.Pipeline, plan: Plan, units: Sequence[Unit], open_engine: OpenEngine, *, keep_errors: bool = False
) -> None:
    """Add the whole graph to `pipeline`."""
    receipts = (
        pipeline
        | "Units" >> beam.Create(list(units), reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "AnnotateUnits" >> AnnotateUnits(plan, open_engine, keep_errors=keep_errors)
    )
    del receipts  # durable already; progress and totals are read from storage


class _Shape(beam.pipeline.PipelineVisitor):
    """Collects what Beam's Dask runner would get wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.produced: dict[Any, str] = {}
        self.consumed: set[Any] = set()

    def visit_transform(self, transform_node: beam.pipeline.AppliedPTransform) -> None:
        """Note one primitive step."""
        label = transform_node.full_label
        self.consumed.update(transform_node.inputs)
        self.consumed.update(side.pvalue for side in transform_node.side_inputs)
        outputs = list(transform_node.outputs.values())
        self.produced.update(dict.fromkeys(outputs, label))
        if len(outputs) > 1:
            self.problems.append(f"{label}: tagged outputs")
        if isinstance(transform_node.transform, beam.ParDo):
            fn = transform_node.transform.fn
            if type(fn).finish_bundle is not beam.DoFn.finish_bundle:
                self.problems.append(f"{label}: finish_bundle")
            if beam.transforms.userstate.is_stateful_dofn(fn):
                self.problems.append(f"{label}: state or timers")


def refuse_unsafe(pipeline: beam.Pipeline) -> None:
    """Refuse a graph that Beam's Dask runner would run wrongly without an error.

    Raises: EnvironmentMismatch naming every step at fault.
    """
    shape = _Shape()
    pipeline.visit(shape)
    leaves = [label for output, label in shape.produced.items() if output not in shape.consumed]
    if len(leaves) > 1:
        shape.problems.append(f"more than one leaf: {', '.join(leaves)}")
    if shape.problems:
        raise EnvironmentMismatch(
            f"this graph loses data on Beam's Dask runner: {'; '.join(shape.problems)}",
            remedy="use 1:1 steps with one output in one line, or another runner",
        )
