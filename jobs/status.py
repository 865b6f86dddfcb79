"""How a run stands, from its folder alone: for another machine, while it goes on, or long after."""

import time
from collections import Counter
from typing import Any

from jobs.cost import cost_of, spent_seconds
from jobs.progress import duration
from pipelines.commit import read_plan, receipts_of
from pipelines.finalize import read_manifest
from pipelines.stop import RUNNING, read_calls
from schemas.runs import Manifest


def status(run_url: str) -> tuple[dict[str, Any], Manifest | None]:
    """Return how the run stands, as `k2batch status --json` prints it, and its manifest if that is its last word.

    Rates are over the wall time of all calls so far. Of a call under way, half a minute may not be recorded yet.

    Raises: SpecError if there is no run; StorageError.
    """
    plan = read_plan(run_url)
    sums = Counter(units=0, rows=0, annotated=0, rejected=0, tokens=0)
    for _, receipt in receipts_of(plan):
        if receipt is not None:
            sums.update(units=1, rows=receipt.rows, tokens=receipt.prompt_tokens + receipt.output_tokens)
            sums.update(annotated=receipt.rows_annotated, rejected=receipt.rows_rejected)
    now, calls, manifest = time.time(), read_calls(plan.output), read_manifest(plan.output)
    call = calls[-1].outcome_at(now) if calls else ""
    # A manifest is older than the receipts while a resumed run is under way.
    is_final = manifest is not None and manifest.units_done == sums["units"] and call != RUNNING
    word = outcome = "unfinished"
    if manifest is not None and is_final:
        word, outcome = manifest.status, manifest.outcome
    elif call in (RUNNING, "stopped", "failed", "killed"):
        outcome = call
    rows, seconds = sums["rows"], spent_seconds(calls)
    price = calls[-1].price_per_hour if calls else 0.0
    left = seconds * (plan.rows - rows) / rows if rows and seconds else None
    facts = {
        "run_id": plan.run_id,
        "status": word,
        "outcome": outcome,
        "units": len(plan.units),
        "units_done": sums["units"],
        "rows_in": plan.rows,
        "rows_annotated": sums["annotated"],
        "rows_rejected": sums["rejected"],
        "rejected_files": len(manifest.rejected_files if manifest is not None else plan.rejected_files),
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 2) if seconds else None,
        "tokens_per_second": round(sums["tokens"] / seconds, 1) if seconds else None,
        "seconds_left": None if left is None else round(left, 1),
        "cost": cost_of(seconds, price),
        "cost_left": None if left is None else cost_of(left, price),
        "silent_seconds": round(calls[-1].silent_at(now), 1) if outcome == RUNNING else None,
        "output": plan.output,
    }
    return facts, manifest if is_final else None


def as_text(facts: dict[str, Any]) -> str:
    """Return `facts` for people."""
    outcome, word = facts["outcome"], facts["status"]
    lines = [
        f"{facts['run_id']}: {word if outcome == word else f'{word} ({outcome})'}, {facts['units_done']:,} of "
        f"{facts['units']:,} units done, {facts['rows_annotated']:,} rows annotated and {facts['rows_rejected']:,} "
        f"rejected of {facts['rows_in']:,}"
    ]
    if facts["rows_per_second"]:
        cost = "" if facts["cost"] is None else f", cost {facts['cost']:,.2f}"
        rates = f"{facts['rows_per_second']:,.1f} rows/s, {facts['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"  {duration(facts['seconds'])} so far: {rates}{cost}")
    if facts["seconds_left"]:
        cost = "" if facts["cost_left"] is None else f", cost about {facts['cost_left']:,.2f}"
        lines.append(f"  about {duration(facts['seconds_left'])} to go{cost}")
    if facts["silent_seconds"] is not None:
        lines.append(f"  its driver was last heard of {duration(facts['silent_seconds'])} ago")
    return "\n".join(lines)
