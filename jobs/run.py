"""One run of a job: plan, what is still pending, the flow, finalize, report. Running again resumes."""

import logging
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from jobs.progress import Say, progress
from jobs.report import publish_report
from jobs.spec import JobSpec
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from pipelines.annotate import OpenEngine
from pipelines.commit import done_units, pending_units, write_plan
from pipelines.finalize import finalize
from pipelines.prompts import Prompts
from pipelines.tokens import Tokens, count_tokens
from pipelines.units import make_plan
from schemas.runs import Manifest, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The result of a run, as `k2batch run --json` prints it. Totals are the run's; seconds are this call's."""

    run_id: str
    status: str
    """`complete`, `incomplete` or `too_many_rejects`."""
    rows_in: int
    rows_annotated: int
    rows_rejected: int
    units: int
    seconds: float
    """Wall time of this call, from the job file to the report."""
    tickets_per_second: float
    """Rows done by this call over `seconds`; 0 when all were done before."""
    prompt_tokens: int
    """Tokens of every row's prompt, as if each had been asked alone."""
    computed_tokens: int
    """Tokens the model really computed."""
    output: str
    """The run's folder."""


def plan_job(spec: JobSpec) -> Plan:
    """Return the plan of the job; writes nothing.

    Raises: SpecError; SchemaMismatch; CheckpointError; StorageError.
    """
    return make_plan(
        job=spec.name,
        urls=spec.urls,
        output=spec.output,
        columns=spec.columns,
        tasks=spec.tasks,
        checkpoint=spec.checkpoint,
        model_fingerprint=fingerprint(spec.checkpoint, spec.precision, spec.router_thresholds),
        mode=spec.mode,
        precision=spec.precision,
        router_thresholds=spec.router_thresholds,
        prefix=spec.prefix,
        max_prompt_tokens=spec.max_prompt_tokens,
        unit_rows=spec.unit_rows,
        on_bad_file=spec.on_bad_file,
    )


def plan_tokens(spec: JobSpec, plan: Plan) -> Tokens:
    """Return what the job's rows will cost in tokens; opens the model's tokenizer, not its weights.

    Raises: SpecError; CheckpointError; StorageError.
    """
    from k2model.compress.recipe import open_tokenizer  # loads torch, which a run does only in its workers

    source = open_checkpoint(spec.checkpoint)
    limit = min(plan.max_prompt_tokens, source.config().max_position_embeddings)
    return count_tokens(plan, Prompts(plan.tasks, open_tokenizer(source), limit))


def plan_facts(plan: Plan, tokens: Tokens) -> dict[str, Any]:
    """Return the plan as `k2batch plan --json` prints it."""
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
        "prompt_tokens": tokens.prompt_tokens,
        "cached_tokens": {
            "duplicates": tokens.duplicates,
            "instructions": tokens.instructions,
            "beginnings": tokens.beginnings,
        },
        "scored_tokens": tokens.scored,
        "computed_tokens": tokens.computed_tokens,
        "max_output_tokens": tokens.generated,
    }


def plan_text(plan: Plan, tokens: Tokens) -> str:
    """Return the plan for people: what is read, what is refused, and the tokens before and after sharing."""
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
    return "\n".join([*lines, f"    {'written, at most':<32}{tokens.generated:>16,}"])


def run(
    spec: JobSpec, *, say: Say = lambda line: None, open_engine: OpenEngine | None = None
) -> tuple[Summary, Manifest]:
    """Return the result of the job, which is annotated as far as it was not before.

    Args:
        spec: the job.
        say: takes each line of progress.
        open_engine: stands in for the model, in tests.

    Raises: K2Error, of any kind but RowError.
    """
    start = time.perf_counter()
    _quiet_libraries()
    plan = plan_job(spec)
    write_plan(plan)
    pending = pending_units(plan)
    done = {unit.unit_id for unit in plan.units} - {unit.unit_id for unit in pending}
    _announce(plan, len(pending), say)
    if pending:
        from pipelines.runners import run_units  # Beam, 0.6 s, which a finished run and `plan` do not need

        with progress(plan, done, say):
            run_units(
                plan,
                pending,
                runner=spec.runner,
                workers=spec.workers,
                options=spec.options,
                open_engine=open_engine,
            )
    manifest = finalize(plan, max_reject_rate=spec.max_reject_rate)
    publish_report(plan, manifest)
    seconds = time.perf_counter() - start
    finished = done_units(plan) - done
    rows = sum(unit.rows for unit in plan.units if unit.unit_id in finished)
    return summarize(plan, manifest, seconds, rows), manifest


def summarize(plan: Plan, manifest: Manifest, seconds: float, rows: int) -> Summary:
    """Return the summary of a call that took `seconds` and did `rows`."""
    return Summary(
        run_id=manifest.run_id,
        status=manifest.status,
        rows_in=manifest.rows_in,
        rows_annotated=manifest.rows_annotated,
        rows_rejected=manifest.rows_rejected,
        units=manifest.units,
        seconds=round(seconds, 3),
        tickets_per_second=round(rows / seconds, 2) if seconds else 0.0,
        prompt_tokens=manifest.prompt_tokens,
        computed_tokens=manifest.computed_tokens,
        output=plan.output,
    )


def exit_code(manifest: Manifest) -> int:
    """Return the exit code that the documented table gives this result."""
    if manifest.status == "complete":
        return 0
    if manifest.status == "too_many_rejects":
        return 6
    return 3 if manifest.rejected_files else 5


def peak_memory_mb() -> float:
    """Return the most memory this process, or any worker it waited for, ever held, in MB."""
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # Kilobytes on Linux, bytes on macOS.
    return max(usages) / (1e6 if sys.platform == "darwin" else 1e3)


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
