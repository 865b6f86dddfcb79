"""What a run costs: machine time at a price that the job file names, so far, still to come, and before it runs.

`[deploy] price_per_hour` is that of all machines which the run holds, together, in whatever currency: which machines
those are, k2batch cannot know. Time is that of the calls, by their records; what was not measured is not told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.progress import duration
from jobs.spec import JobSpec
from pipelines.commit import runs_of
from pipelines.finalize import read_manifest
from pipelines.stop import Call, read_calls
from pipelines.tokens import Tokens
from schemas.errors import StorageError
from schemas.runs import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast tokens are computed."""

    tokens_per_second: float
    """Computed tokens, written ones too, over the wall time of whole calls."""
    written_per_row: float | None
    """Tokens written for each row; None if nothing was measured."""
    source: str
    """Where the rate is from, for people."""


def cost_of(seconds: float, price_per_hour: float) -> float | None:
    """Return what `seconds` cost, or None without a price."""
    return round(seconds / 3600 * price_per_hour, 4) if price_per_hour else None


def spent_seconds(calls: Iterable[Call]) -> float:
    """Return the wall time of these calls; of one that was killed, up to half a minute is not known."""
    return sum(call.seconds for call in calls)


def find_rate(spec: JobSpec, plan: Plan) -> Rate | None:
    """Return the rate of the job's last run with this model and runner, else the job file's, else None.

    Raises: StorageError.
    """
    measured = (_measured(url, plan, spec.runner) for url in runs_of(plan))
    found = max((rate for rate in measured if rate is not None), key=lambda pair: pair[0], default=None)
    if found is not None:
        return found[1]
    if spec.tokens_per_second:
        rate = spec.tokens_per_second
        return Rate(tokens_per_second=rate, written_per_row=None, source="[deploy] tokens_per_second")
    return None


def _measured(run_url: str, plan: Plan, runner: str) -> tuple[float, Rate] | None:
    """Return when a run was last worked on, and its rate; None if it has none of the plan's model and this runner."""
    calls = read_calls(run_url)
    if not calls or any((call.runner, call.model_fingerprint) != (runner, plan.model_fingerprint) for call in calls):
        return None
    try:
        manifest = read_manifest(run_url)
    except StorageError:
        return None  # written by another version
    seconds = spent_seconds(calls)
    if manifest is None or not manifest.computed_tokens or not seconds:
        return None
    if manifest.rows_cached > manifest.rows_annotated / 2:  # mostly start and look-ups: says nothing of computing
        return None
    rate = Rate(
        tokens_per_second=manifest.computed_tokens / seconds,
        written_per_row=manifest.output_tokens / max(manifest.rows_annotated, 1),
        source=f"measured in {manifest.run_id}",
    )
    return calls[-1].started, rate


def projection(spec: JobSpec, plan: Plan, tokens: Tokens, rate: Rate | None) -> dict[str, Any]:
    """Return seconds and cost of the whole job, as `k2batch plan --json` prints them; None where not known."""
    seconds = None
    if rate is not None:
        written = tokens.generated if rate.written_per_row is None else rate.written_per_row * plan.rows
        seconds = round((tokens.computed_tokens + written) / rate.tokens_per_second, 1)
    return {
        "seconds": seconds,
        "cost": None if seconds is None else cost_of(seconds, spec.price_per_hour),
        "tokens_per_second": None if rate is None else round(rate.tokens_per_second, 1),
        "rate_from": None if rate is None else rate.source,
    }


def projection_text(projected: Mapping[str, Any]) -> str:
    """Return the projection for people, in a line."""
    if projected["seconds"] is None:
        return "  time and cost: unknown until the job ran once, or [deploy] tokens_per_second is given"
    cost = "cost: set [deploy] price_per_hour" if projected["cost"] is None else f"cost about {projected['cost']:,.2f}"
    rate = f"{projected['tokens_per_second']:,.0f} tokens/s, {projected['rate_from']}"
    return f"  time about {duration(projected['seconds'])}, {cost}, by {rate}"
