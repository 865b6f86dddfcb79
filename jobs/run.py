"""One run of a job: plan, what is still pending, the flow, finalize, report. Running again resumes."""

import logging
import math
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from jobs.cost import cost_of, find_rate, projection, projection_text, spent_seconds
from jobs.limits import Limit, limit_of
from jobs.progress import Say, Show, duration, watch
from jobs.report import publish_report, share
from jobs.spec import JobSpec
from jobs.stopping import CallUnderWay, recorded, sample_receipts, stoppable
from k2model.flops import token_flops
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from pipelines.annotate import OpenEngine
from pipelines.cache_files import tidy
from pipelines.commit import done_units, pending_units, planned_text, read_failures, write_plan
from pipelines.finalize import finalize
from pipelines.prompts import Prompts
from pipelines.stop import Stop, longest_first, pace_of, read_calls, work
from pipelines.supervise import peak_memory, prepare
from pipelines.text_order import Order, fewest_tokens, orders_of
from pipelines.tokens import Tokens, count_orders, count_tokens
from pipelines.units import make_plan
from schemas.runs import DEVICES, Manifest, ModelFlops, Plan, Unit

ORDERS_SHOWN = 3
"""Orders of the text columns told beside the planned one; `--json` has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The result of a run, as `k2batch run --json` prints it. Totals are the run's; seconds are this call's."""

    run_id: str
    status: str
    """`complete`, `incomplete` or `too_many_rejects`."""
    outcome: str
    """The status; or what stopped the run before that: `deadline`, `budget` or `stopped`."""
    rows_in: int
    rows_annotated: int
    rows_rejected: int
    rows_cached: int
    """Of the annotated rows: those whose answer an earlier run had."""
    rows_left: int
    units: int
    units_left: int
    seconds: float
    """Wall time of this call, from the job file to the report."""
    seconds_left: float | None
    """What the rest will take, by the work that this call did; None if it did none."""
    tickets_per_second: float
    """Rows done by this call over `seconds`; 0 when all were done before."""
    prompt_tokens: int
    """Tokens of every row's prompt, as if each had been asked alone."""
    computed_tokens: int
    """Tokens the model really computed."""
    cost: float | None
    """Of all calls of the run; None without `[deploy] price_per_hour`."""
    cost_left: float | None
    output: str
    """The run's folder."""
    restarts: int = 0
    """Processes that died during this call, each followed by another."""
    resume: str = ""
    """The command that goes on, if anything is left."""


def plan_job(spec: JobSpec) -> Plan:
    """Return the plan of the job; writes nothing.

    With `text_order = "shared"` the order of its text columns is chosen here, unless the run has a plan: that has it.

    Raises: SpecError; SchemaMismatch; CheckpointError; StorageError.
    """
    plan = make_plan(
        job=spec.name,
        urls=spec.urls,
        output=spec.output,
        columns=spec.columns,
        tasks=spec.tasks,
        checkpoint=spec.checkpoint,
        model_fingerprint=fingerprint(spec.checkpoint, spec.precision, spec.router_thresholds, DEVICES[spec.mode]),
        mode=spec.mode,
        precision=spec.precision,
        router_thresholds=spec.router_thresholds,
        prefix=spec.prefix,
        max_prompt_tokens=spec.max_prompt_tokens,
        unit_rows=spec.unit_rows,
        on_bad_file=spec.on_bad_file,
        uses_cache=spec.cache_gb > 0,
        text_order=spec.text_order,
    )
    plan = replace(plan, flops=ModelFlops(**token_flops(open_checkpoint(spec.checkpoint).config())))
    if spec.text_order == "given" or len(plan.columns.text) == 1:
        return plan
    text = planned_text(plan) or fewest_tokens(plan_orders(spec, plan))
    return replace(plan, columns=replace(plan.columns, text=text))


def plan_orders(spec: JobSpec, plan: Plan) -> dict[Order, Tokens]:
    """Return what the job's rows will cost in tokens by the order of their text columns, the one given first.

    Nothing if there is but one. Raises: as `plan_tokens`.
    """
    orders = orders_of(spec.columns.text)
    return count_orders(plan, _prompts(spec, plan), orders) if len(orders) > 1 else {}


def plan_tokens(spec: JobSpec, plan: Plan) -> Tokens:
    """Return what the job's rows will cost in tokens; opens the model's tokenizer, not its weights.

    Raises: SpecError; CheckpointError; StorageError.
    """
    return count_tokens(plan, _prompts(spec, plan))


def _prompts(spec: JobSpec, plan: Plan) -> Prompts:
    from k2model.compress.recipe import open_tokenizer  # loads torch, which a run does only in its workers

    source = open_checkpoint(spec.checkpoint)
    limit = min(plan.max_prompt_tokens, source.config().max_position_embeddings)
    return Prompts(plan.tasks, open_tokenizer(source), limit)


def plan_facts(spec: JobSpec, plan: Plan, tokens: Tokens, orders: Mapping[Order, Tokens]) -> dict[str, Any]:
    """Return the plan as `k2batch plan --json` prints it. Raises: StorageError."""
    return {
        "run_id": plan.run_id,
        "files": plan.files,
        "units": len(plan.units),
        "rows": plan.rows,
        "rejected_files": [asdict(file) for file in plan.rejected_files],
        "output": plan.output,
        "rows_read": tokens.rows,
        "is_estimate": tokens.is_estimate,
        "unreadable_units": tokens.unreadable,
        "error_codes": dict(sorted(tokens.rejects.items())),
        **_tokens_facts(tokens),
        "max_output_tokens": tokens.generated,
        "text_order": plan.columns.text,
        "text_orders": [
            {"text_order": order, "rows_read": counted.rows, **_tokens_facts(counted)}
            for order, counted in orders.items()
        ],
        "projected": projection(spec, plan, tokens, find_rate(spec, plan)),
    }


def _tokens_facts(tokens: Tokens) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.prompt_tokens,
        "cached_tokens": {
            "duplicates": tokens.duplicates,
            "instructions": tokens.instructions,
            "beginnings": tokens.beginnings,
        },
        "scored_tokens": tokens.scored,
        "computed_tokens": tokens.computed_tokens,
    }


def plan_text(plan: Plan, tokens: Tokens, orders: Mapping[Order, Tokens], projected: Mapping[str, Any]) -> str:
    """Return the plan for people: what is read, what is refused, tokens before and after sharing, time and cost."""
    lines = [f"{plan.run_id}: {plan.rows:,} rows in {plan.files} files, {len(plan.units)} units, to {plan.output}"]
    lines += [f"  rejected file {file.url}: {file.error_code}: {file.error_message}" for file in plan.rejected_files]
    lines += [f"  unreadable: {message}" for message in tokens.unreadable]
    about = "about " if tokens.is_estimate else ""
    if tokens.rejects:
        codes = ", ".join(f"{count:,} {code}" for code, count in sorted(tokens.rejects.items()))
        lines.append(f"  rows to be rejected: {about}{tokens.rejects.total():,} ({codes})")
    share = (
        f"estimated from {tokens.rows:,} rows ({tokens.rows / plan.rows:.0%})" if tokens.is_estimate else "of all rows"
    )
    lines.append(f"  tokens, {share}:")
    counts = {
        "prompts, each asked alone": tokens.prompt_tokens,
        "cached: exact duplicates": -tokens.duplicates,
        "cached: instructions": -tokens.instructions,
        "cached: other shared beginnings": -tokens.beginnings,
        "labels to score": tokens.scored,
        "computed": tokens.computed_tokens,
    }
    lines += [f"    {what:<32}{count:>16,}" for what, count in counts.items()]
    lines.append(f"    {'written, at most':<32}{tokens.generated:>16,}")
    return "\n".join([*lines, *_orders_text(plan, orders), projection_text(projected)])


def _orders_text(plan: Plan, orders: Mapping[Order, Tokens]) -> list[str]:
    """Return what would be computed in the planned order of the text columns, and in the best others."""
    if len(orders) < 2:
        return []
    planned = orders[plan.columns.text]
    best = fewest_tokens(orders)
    others = sorted((order for order in orders if order != plan.columns.text), key=lambda o: orders[o].computed_tokens)
    of_rows = f"estimated from {planned.rows:,} rows" if planned.is_estimate else "of all rows"
    lines = [f"  computed tokens by order of the text columns, {of_rows}:"]
    for order in (plan.columns.text, *others[:ORDERS_SHOWN]):
        computed = orders[order].computed_tokens
        of_planned = f"{share(computed, planned.computed_tokens)} of that"
        note = "as planned" if order == plan.columns.text else of_planned
        lines.append(f"    {', '.join(order):<32}{computed:>16,}  {note}")
    if orders[best].computed_tokens < planned.computed_tokens:
        lines.append(f'    [input] text_order = "shared" asks with {", ".join(best)}: other prompts, a run of its own')
    return lines


def run(
    spec: JobSpec,
    *,
    say: Say = lambda line: None,
    shows: Sequence[Show] = (),
    open_engine: OpenEngine | None = None,
) -> tuple[Summary, Manifest]:
    """Return the result of the job, which is annotated as far as it was not before.

    Args:
        spec: the job.
        say: takes what is to be told in words.
        shows: are handed the progress.
        open_engine: stands in for the model, in tests.

    Raises: K2Error, of any kind but RowError.
    """
    start, started = time.perf_counter(), datetime.now()
    _quiet_libraries()
    plan = plan_job(spec)
    write_plan(plan)
    pending = pending_units(plan)
    done = {unit.unit_id for unit in plan.units} - {unit.unit_id for unit in pending}
    _announce(plan, len(pending), say)
    if spec.text_order != "given":
        say(f"  order of the text columns: {', '.join(plan.columns.text)}")
    spent_s = spent_seconds(read_calls(plan.output))
    restarts = 0
    if not pending:
        manifest = _publish(spec, plan)
    else:
        limit = limit_of(spec, spent_s, started)
        with recorded(plan, spec, start, limit=limit, say=say) as call:
            stop = _stop(plan, done, call, limit, say)
            shown = watch(plan, done, shows, say=say, cost=lambda s: cost_of(spent_s + s, spec.price_per_hour))
            with stoppable(call), shown:
                restarts = _annotate(spec, plan, pending, stop, say, open_engine)
            manifest = _publish(spec, plan, stopped_by=_stopped_by(plan, pending, call, limit, say))
            if plan.uses_cache:
                tidy(plan, spec.cache_gb)
            call.outcome = manifest.outcome
    summary = summarize(spec, plan, manifest, seconds=time.perf_counter() - start, spent_s=spent_s, done=done)
    return replace(summary, restarts=restarts), manifest


def _stop(plan: Plan, done: set[str], call: CallUnderWay, limit: Limit | None, say: Say) -> Stop:
    if limit is None:
        return Stop(call_url=call.url)
    say(f"  {limit.text}")
    return Stop(call_url=call.url, at=limit.at, pace=pace_of(sample_receipts(plan, done)))


def _annotate(
    spec: JobSpec, plan: Plan, pending: Sequence[Unit], stop: Stop, say: Say, open_engine: OpenEngine | None
) -> int:
    if spec.runner == "local":
        prepare()
    from pipelines.runners import run_units  # Beam, 0.6 s, which a finished run and `plan` do not need

    return run_units(
        plan,
        longest_first(pending),
        runner=spec.runner,
        workers=spec.workers,
        options=spec.options,
        open_engine=open_engine,
        dask_address=spec.dask_address,
        say=say,
        stop=stop,
        stall_seconds=spec.stall_seconds,
    )


def _stopped_by(plan: Plan, pending: Sequence[Unit], call: CallUnderWay, limit: Limit | None, say: Say) -> str:
    """Return what kept units of `pending` from being begun: `stopped`, the limit's outcome, or nothing."""
    if not call.is_asked_to_stop and limit is None:
        return ""
    if not {unit.unit_id for unit in pending} - done_units(plan) - read_failures(plan).keys():
        return ""
    if call.is_asked_to_stop or limit is None:
        return "stopped"
    early_s = limit.at - time.time()
    say(f"  {limit.outcome}: nothing is under way, {abs(early_s):.1f} s {'before' if early_s > 0 else 'after'} it")
    return limit.outcome


def _publish(spec: JobSpec, plan: Plan, stopped_by: str = "") -> Manifest:
    manifest = finalize(plan, max_reject_rate=spec.max_reject_rate, stopped_by=stopped_by)
    publish_report(plan, manifest)
    return manifest


def summarize(
    spec: JobSpec, plan: Plan, manifest: Manifest, *, seconds: float, spent_s: float, done: Set[str]
) -> Summary:
    """Return the summary of a call.

    Args:
        spec: the job.
        plan: the run.
        manifest: its result as of now.
        seconds: of the call.
        spent_s: seconds of the calls before it.
        done: ids of the units that those had done.
    """
    after = done_units(plan)
    now = [unit for unit in plan.units if unit.unit_id in after and unit.unit_id not in done]
    left = [unit for unit in plan.units if unit.unit_id not in after]
    work_now, work_left = (sum(map(work, units)) for units in (now, left))
    seconds_left = round(seconds * work_left / work_now, 1) if work_now else None if work_left else 0.0
    return Summary(
        run_id=manifest.run_id,
        status=manifest.status,
        outcome=manifest.outcome,
        rows_in=manifest.rows_in,
        rows_annotated=manifest.rows_annotated,
        rows_rejected=manifest.rows_rejected,
        rows_cached=manifest.rows_cached,
        rows_left=sum(unit.rows for unit in left),
        units=manifest.units,
        units_left=len(left),
        seconds=round(seconds, 3),
        seconds_left=seconds_left,
        tickets_per_second=round(sum(unit.rows for unit in now) / seconds, 2) if seconds else 0.0,
        prompt_tokens=manifest.prompt_tokens,
        computed_tokens=manifest.computed_tokens,
        cost=cost_of(spent_s + seconds, spec.price_per_hour),
        cost_left=None if seconds_left is None else cost_of(seconds_left, spec.price_per_hour),
        output=plan.output,
    )


def resumable(summary: Summary, words: Sequence[str]) -> Summary:
    """Return the summary with the command that goes on: that of this call, its `words` behind the program's name.

    After a budget it names a larger one, if what is left can be told.
    """
    if not summary.units_left:
        return summary
    said = [word for word in words if word != "--json"]
    if summary.outcome == "budget" and summary.cost is not None and summary.cost_left is not None:
        # A tenth more than reckoned; of two such options the last counts.
        said.append(f"--max-cost={math.ceil(110 * (summary.cost + summary.cost_left)) / 100:.2f}")
    return replace(summary, resume=shlex.join(["k2batch", *said]))


def left_text(summary: Summary) -> list[str]:
    """Return what is left to do, as lines for people; none if nothing is."""
    if not summary.units_left:
        return []
    about = "unknown how long" if summary.seconds_left is None else f"about {duration(summary.seconds_left)}"
    cost = "" if summary.cost_left is None else f", cost about {summary.cost_left:,.2f}"
    rows = f"{summary.rows_left:,} rows ({share(summary.rows_left, summary.rows_in)})"
    lines = [f"  left      {rows} in {summary.units_left:,} of {summary.units:,} units, {about}{cost}"]
    return [*lines, f"  go on     {summary.resume}"] if summary.resume else lines


def exit_code(manifest: Manifest) -> int:
    """Return the exit code that the documented table gives this result."""
    if manifest.outcome == "incomplete":
        return 3 if manifest.rejected_files else 5
    return {"complete": 0, "too_many_rejects": 6}.get(manifest.outcome, 5)


def peak_memory_mb() -> float:
    """Return the most memory this process, or any worker it waited for, ever held, in MB."""
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # Kilobytes on Linux, bytes on macOS.
    return max(*usages, peak_memory()) / (1e6 if sys.platform == "darwin" else 1e3)


def _announce(plan: Plan, pending: int, say: Say) -> None:
    say(
        f"run {plan.run_id}: {plan.rows:,} tickets in {plan.files - len(plan.rejected_files)} files,"
        f" {len(plan.units)} units"
    )
    for file in plan.rejected_files:
        say(f"  rejected file {file.url}: {file.error_code}: {file.error_message}")
    if pending < len(plan.units):
        say(f"  {len(plan.units) - pending} units are done already, {pending} to go")


def _quiet_libraries() -> None:
    """Keep Beam's and Dask's remarks out of the progress lines; their errors still come."""
    for name in ("apache_beam", "distributed", "asyncio", "tornado"):
        logging.getLogger(name).setLevel(logging.ERROR)
