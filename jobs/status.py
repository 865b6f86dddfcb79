"""How a run stands, from its folder alone: for another machine, while it goes on, or long after."""

import time
from collections.abc import Set
from typing import Any

from jobs.cost import cost_of, spent_seconds
from jobs.progress import duration
from jobs.stopping import sample_receipts
from pipelines.commit import done_units, read_plan
from pipelines.finalize import read_manifest
from pipelines.poison import tally
from pipelines.stop import BEAT_S, RUNNING, SILENCE_S, read_calls
from schemas.runs import Manifest, Plan

RECEIPTS_READ = 1_000
"""The sums of more receipts are estimated from so many, all over the plan: a million take a store hours to read."""


def status(run_url: str) -> tuple[dict[str, Any], Manifest | None]:
    """Return how the run stands, as `k2batch status --json` prints it, and its manifest if that is its last word.

    Units and rows done are counted by one listing. Rates are over the wall time of all calls so far. Of a call under
    way, half a minute may not be recorded yet.

    Raises: SpecError if there is no run; StorageError.
    """
    plan = read_plan(run_url)
    done = done_units(plan)
    begun, suspects = tally(plan, done)
    now, calls, manifest = time.time(), read_calls(plan.output), read_manifest(plan.output)
    call = calls[-1].outcome_at(now) if calls else ""
    # A manifest is older than the receipts while a resumed run is under way.
    is_final = manifest is not None and manifest.units_done == len(done) and call != RUNNING
    word = outcome = "unfinished"
    if manifest is not None and is_final:
        word, outcome = manifest.status, manifest.outcome
    elif call in (RUNNING, "stopped", "failed", "killed"):
        outcome = call
    is_heard = bool(calls) and call in (RUNNING, "stopped") and calls[-1].silent_at(now) <= SILENCE_S
    rows, annotated, rejected, tokens, is_estimate = _sums(plan, done, manifest if is_final else None)
    seconds = spent_seconds(calls)
    price = calls[-1].price_per_hour if calls else 0.0
    left = seconds * (plan.rows - rows) / rows if rows and seconds else None
    facts = {
        "run_id": plan.run_id,
        "status": word,
        "outcome": outcome,
        "units": len(plan.units),
        "units_done": len(done),
        "units_under_way": begun if is_heard else 0,
        "units_abandoned": 0 if is_heard else begun,
        "units_quarantined": suspects,
        "rows_in": plan.rows,
        "rows_annotated": annotated,
        "rows_rejected": rejected,
        "is_estimate": is_estimate,
        "rejected_files": len(manifest.rejected_files if manifest is not None else plan.rejected_files),
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 2) if seconds else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "seconds_left": None if left is None else round(left, 1),
        "cost": cost_of(seconds, price),
        "cost_left": None if left is None else cost_of(left, price),
        "silent_seconds": round(calls[-1].silent_at(now), 1) if outcome == RUNNING else None,
        "output": plan.output,
    }
    return facts, manifest if is_final else None


def _sums(plan: Plan, done: Set[str], manifest: Manifest | None) -> tuple[int, int, int, int, bool]:
    """Return rows done, annotated and rejected, tokens, and whether all but the first are estimates."""
    if manifest is not None:
        annotated, rejected = manifest.rows_annotated, manifest.rows_rejected
        return annotated + rejected, annotated, rejected, manifest.prompt_tokens + manifest.output_tokens, False
    rows = sum(unit.rows for unit in plan.units if unit.unit_id in done)
    receipts = [receipt for _, receipt in sample_receipts(plan, done, RECEIPTS_READ)]
    share = rows / max(1, sum(receipt.rows for receipt in receipts))
    rejected = round(share * sum(receipt.rows_rejected for receipt in receipts))
    tokens = round(share * sum(receipt.prompt_tokens + receipt.output_tokens for receipt in receipts))
    return rows, rows - rejected, rejected, tokens, len(receipts) < len(done)


_BEGUN = {
    "units_under_way": "under way",
    "units_abandoned": "begun by a call that ended before they did: the next one does them again",
    "units_quarantined": "under which processes died: done last, and with care",
}


def as_text(facts: dict[str, Any]) -> str:
    """Return `facts` for people."""
    outcome, word = facts["outcome"], facts["status"]
    lines = [
        f"{facts['run_id']}: {word if outcome == word else f'{word} ({outcome})'}, {facts['units_done']:,} of "
        f"{facts['units']:,} units done, {'about ' if facts['is_estimate'] else ''}{facts['rows_annotated']:,} rows "
        f"annotated and {facts['rows_rejected']:,} rejected of {facts['rows_in']:,}"
    ]
    for key, about in _BEGUN.items():
        if facts[key]:
            lines.append(f"  {facts[key]:,} {'unit' if facts[key] == 1 else 'units'} {about}")
    if facts["rows_per_second"]:
        cost = "" if facts["cost"] is None else f", cost {facts['cost']:,.2f}"
        rates = f"{facts['rows_per_second']:,.1f} rows/s, {facts['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"  {duration(facts['seconds'])} so far: {rates}{cost}")
    if facts["seconds_left"]:
        cost = "" if facts["cost_left"] is None else f", cost about {facts['cost_left']:,.2f}"
        lines.append(f"  about {duration(facts['seconds_left'])} to go{cost}")
    if facts["silent_seconds"] is not None:
        silent = f"  its driver was last heard of {duration(facts['silent_seconds'])} ago"
        is_late = facts["silent_seconds"] > BEAT_S + 5
        lines.append(silent + (f"; while it lives, that is {BEAT_S:.0f} s at most" if is_late else ""))
    return "\n".join(lines)
