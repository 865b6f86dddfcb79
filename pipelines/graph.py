"""The Beam graph: `Create(units) | Reshuffle | AnnotateUnits`, and the one engine of each process.

`AnnotateUnits` is three fused 1:1 steps, so only unit descriptors are shuffled and rows never leave their process.
No tagged outputs, no `finish_bundle` outputs, no state, one leaf: on these Beam's Dask runner is silently wrong (tagged
streams merge, only the last leaf runs, `finish_bundle` outputs are dropped), so `refuse_unsafe` refuses them.
"""

import atexit
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from pipelines import poison
from pipelines.annotate import AnnotatedBlock, Block, OpenEngine, SupportsAnnotate, SupportsPrompts, annotate
from pipelines.batch_api import BatchPrompts
from pipelines.cache import close_caches, open_cache
from pipelines.commit import commit, has_receipt, write_failure
from pipelines.prompts import Prompts
from pipelines.quiet_beam import beam
from pipelines.read import read_unit
from pipelines.stop import Stop, may_begin, note_pace
from pipelines.watch import watched
from schemas.annotations import REQUEST
from schemas.errors import CheckpointError, EnvironmentMismatch, K2Error, RowError, SchemaMismatch
from schemas.runs import DEVICES, Plan, Unit


class _Provider:
    """The engines and prompts of this process: one per model as planned, whichever thread asks first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engines: dict[tuple[object, ...], SupportsAnnotate] = {}
        self.prompts: dict[tuple[object, ...], SupportsPrompts] = {}
        self.proven: set[int] = set()
        self.errors: list[Exception] = []


# Module-level, not apache_beam.utils.shared: that one holds a weak reference, and DoFns come and go with their bundles.
_PROVIDER = _Provider()
atexit.register(gc.unfreeze)  # where nobody closes: some libraries complain of what is not taken down at the end


def open_model(plan: Plan) -> SupportsAnnotate:
    """Return an opened engine for the plan's model."""
    # Here, so that torch is loaded where rows are annotated and not where graphs are built.
    from k2model.engine.engine import Engine

    return Engine.open(
        plan.checkpoint,
        precision=plan.precision,
        router_thresholds=plan.router_thresholds,
        device=DEVICES[plan.mode],
    )


def engine_and_prompts(plan: Plan, open_engine: OpenEngine) -> tuple[SupportsAnnotate, SupportsPrompts]:
    """Return this process's engine for `plan` and the prompts of its tasks, opened at first use.

    Raises: CheckpointError if the checkpoint is not the one that was planned.
    """
    engine_key = (plan.checkpoint, plan.precision, plan.router_thresholds, plan.mode, open_engine)
    prompts_key = (*engine_key, plan.run_id)
    with _PROVIDER.lock:
        engine = _PROVIDER.engines.get(engine_key)
        if engine is None:
            engine = _PROVIDER.engines[engine_key] = open_engine(plan)
            # What is left now stays: a third of the flow's time went into looking whether 350,000 objects are garbage.
            gc.collect()
            gc.freeze()
        if engine.fingerprint != plan.model_fingerprint:
            raise CheckpointError(
                f"{plan.checkpoint}: fingerprint {engine.fingerprint}, planned {plan.model_fingerprint}",
                remedy="the checkpoint changed, or this worker has another one; run the job again",
            )
        prompts = _PROVIDER.prompts.get(prompts_key)
        if prompts is None:
            prompts = _PROVIDER.prompts[prompts_key] = _open_prompts(plan, engine)
        return engine, prompts


def _open_prompts(plan: Plan, engine: SupportsAnnotate) -> SupportsPrompts:
    limit = min(plan.max_prompt_tokens, engine.max_position_embeddings)
    if plan.tasks[0].kind == REQUEST:
        return BatchPrompts(plan.tasks[0], engine.tokenizer, limit)
    prompts = Prompts(plan.tasks, engine.tokenizer, limit)
    prompts.calibrate(engine)
    return prompts


def prove(engine: SupportsAnnotate, prompts: SupportsPrompts, stall_seconds: float) -> None:
    """Have a plain ticket computed, once for each engine, before a unit that may have killed a process gets another.

    Where this ends the process, or raises, no unit is to blame.

    Raises: K2Error if it cannot be computed.
    """
    with _PROVIDER.lock:
        if id(engine) in _PROVIDER.proven:
            return
        with watched(engine, stall_seconds, lambda cause: None):
            (requests,) = prompts.requests_of(["N/A"])
            for completion in () if isinstance(requests, RowError) else engine.submit(requests).result():
                if completion.error:
                    what = f"the model cannot compute even a plain ticket: {completion.error}"
                    raise K2Error(what, remedy="run `k2batch doctor`")
        _PROVIDER.proven.add(id(engine))


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
        _PROVIDER.proven.clear()
    gc.unfreeze()  # or what is closed would stay in a worker that goes on to other runs
    close_caches()


def take_error() -> Exception | None:
    """Return the first error that a step kept in this process since last asked."""
    error = _PROVIDER.errors[0] if _PROVIDER.errors else None
    _PROVIDER.errors.clear()
    return error


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """What every step knows."""

    plan: Plan
    """Without its units: they travel as elements, and a copy of all in every step would only be pickled."""
    open_engine: OpenEngine = open_model
    keep_errors: bool = False
    """For a runner in the process that asks: an error is kept for `take_error` and the elements that follow are
    dropped. Beam's local runner would hand a raised one on as text, its type lost, and its threads would go on to print
    tracebacks of their own about a server that is gone."""
    stop: Stop | None = None
    """Says when no further unit is begun."""
    is_careful: bool = False
    """Whether this is a round of suspects."""
    stall_seconds: float = 0.0
    """A process that computes nothing for so long ends itself; 0 for never."""


# Of suspects, one alone is read, computed or written at a time in a process, so that its end tells which.
_ALONE = threading.Lock()


class _Step(beam.DoFn):
    """A step that sends each element to at most one element."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def process(self, element: Any) -> Iterator[Any]:
        """Yield what `apply` returns."""
        if self.flow.keep_errors and _PROVIDER.errors:
            return
        try:
            with _ALONE if self.flow.is_careful else nullcontext():
                result = self.apply(element)
        except Exception as error:
            unit = element if isinstance(element, Unit) else element.unit
            poison.let_go(self.flow.plan, unit.unit_id)
            if not self.flow.keep_errors:
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
    """Unit to its rows; nothing for one that is done, may not be begun now, or cannot be read (which is noted)."""

    def apply(self, element: Unit) -> Block | None:
        """Return the unit's rows."""
        flow = self.flow
        if not may_begin(flow.stop, element) or has_receipt(flow.plan, element):
            return None
        # Opened before the unit is begun: if that ends the process, the unit is not to blame.
        engine, prompts = engine_and_prompts(flow.plan, flow.open_engine)
        if not may_begin(flow.stop, element):  # that may have taken minutes
            return None
        attempts = poison.look(flow.plan, element.unit_id)
        if attempts.deaths > 1 or attempts.suspect:
            prove(engine, prompts, flow.stall_seconds)
        if not poison.begin(flow.plan, element, attempts, is_careful=flow.is_careful):
            return None
        started = time.perf_counter()
        try:
            table = read_unit(element)
        except SchemaMismatch as error:
            write_failure(flow.plan, element, error)
            poison.forget(flow.plan, element.unit_id)
            return None
        if flow.is_careful:
            poison.let_go(flow.plan, element.unit_id)
        return Block(element, table, started, attempts.begun)


@beam.typehints.with_input_types(Block)
@beam.typehints.with_output_types(AnnotatedBlock)
class AnnotateBlock(_Step):
    """Rows to annotated rows; nothing for those that fail as no row may, which makes their unit a suspect."""

    def apply(self, element: Block) -> AnnotatedBlock | None:
        """Return the rows with the added columns."""
        plan, stall_seconds = self.flow.plan, self.flow.stall_seconds
        engine, prompts = engine_and_prompts(plan, self.flow.open_engine)
        if self.flow.is_careful:
            known = poison.search(plan, element, prompts, engine, stall_seconds)
            return annotate(element, plan, known, known, open_cache(plan))
        unit_id = element.unit.unit_id
        try:
            with watched(engine, stall_seconds, lambda cause: poison.suspect(plan, unit_id, cause)):
                return annotate(element, plan, prompts, engine, open_cache(plan))
        except (K2Error, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust code, such as the tokenizer's, is no Exception
            poison.suspect(plan, unit_id, f"{type(error).__name__}: {error}")
            return None


@beam.typehints.with_input_types(AnnotatedBlock)
@beam.typehints.with_output_types(str)
class CommitBlock(_Step):
    """Annotated rows to the receipt that was written for them, as JSON."""

    def apply(self, element: AnnotatedBlock) -> str:
        """Return the receipt."""
        flow, unit = self.flow, element.unit
        with poison.writing(flow.plan, unit.unit_id, is_careful=flow.is_careful):
            receipt = commit(element, flow.plan)
        if flow.stop is not None:
            note_pace(flow.stop, unit, receipt.seconds)
        return receipt.to_json()


class AnnotateUnits(beam.PTransform[Any, Any]):
    """Units to receipts (JSON): read, annotate, commit, fused."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def expand(self, pcoll: Any) -> Any:
        """Return the receipts of the units `pcoll`."""
        return (
            pcoll
            | "Read" >> beam.ParDo(ReadUnit(self.flow))
            | "Annotate" >> beam.ParDo(AnnotateBlock(self.flow))
            | "Commit" >> beam.ParDo(CommitBlock(self.flow))
        )


def build(pipeline: beam.Pipeline, flow: Flow, units: Sequence[Unit]) -> None:
    """Add the whole graph over `units` to `pipeline`."""
    receipts = (
        pipeline
        | "Units" >> beam.Create(list(units), reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "AnnotateUnits" >> AnnotateUnits(replace(flow, plan=replace(flow.plan, units=())))
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
