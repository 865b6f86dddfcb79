"""The columns that a unit's rows get, made from those of its answers: one answer may be that of many rows.

N rows, A answers. Values of answers are never a Python object for each row: that took as long as all else but the
tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.annotations import ROW_FIELDS, USAGE, task_columns
from schemas.errors import EngineFailure, RowError
from schemas.runs import Plan

Numbers = npt.NDArray[np.int64]

_STATUSES = pa.array(["annotated", "rejected"])
_ROUTES = pa.array(["large", "cache", "duplicate"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the model said to several rows' requests."""

    places: Mapping[str, int]
    """By prompt hash, for what was answered: where in all that follows its values stand."""
    errors: Mapping[str, EngineFailure]
    """By prompt hash, for what was not."""
    columns: Mapping[str, pa.Array]
    """The tasks', [A] each, by name without prefix."""
    prompt_tokens: Numbers
    cached_tokens: Numbers
    """Of the prompts: the instructions, which all rows share. What else was shared depends on the rows beside it."""
    computed_tokens: Numbers
    shared_tokens: Numbers
    """Of the prompts: those computed for others, or once for all."""
    output_tokens: Numbers
    is_cached: npt.NDArray[np.bool_]
    """Whether an earlier run had the answer."""


def added_columns(
    plan: Plan, fates: Sequence[str | RowError], places: Numbers, answers: Answers
) -> dict[str, pa.Array]:
    """Return every added column by its full name, [N] each.

    Args:
        plan: of the run.
        fates: [N] the prompt hash of each row, or why it is rejected.
        places: [N] which answer is a row's; -1 where it is rejected.
        answers: of the unit.
    """
    is_rejected = places < 0
    own = pa.array(places, mask=is_rejected)
    columns = {
        field.name: answers.columns[field.name.removeprefix(plan.prefix)].cast(field.type).take(own)
        for task in plan.tasks
        for field in task_columns(task, plan.prefix)
    }
    errors = [fate if isinstance(fate, RowError) else None for fate in fates]
    usage, route = _usage_and_route(places, is_rejected, answers)
    values = (
        _STATUSES.take(pa.array(is_rejected.astype(np.int64))),
        pa.array([error and error.code for error in errors], pa.string()),
        pa.array([error and error.message for error in errors], pa.string()),
        pa.repeat(plan.model_fingerprint, len(fates)),
        pa.array([None if isinstance(fate, RowError) else fate for fate in fates], pa.string()),
        usage,
        route,
    )
    names = [plan.prefix + field.name for field in ROW_FIELDS]
    return columns | dict(zip(names, values, strict=True))


def _usage_and_route(
    places: Numbers, is_rejected: npt.NDArray[np.bool_], answers: Answers
) -> tuple[pa.Array, pa.Array]:
    """Return both columns: the first row of an answer had it computed, or taken from the cache, the others share it."""
    is_first = np.zeros(len(places), bool)
    is_first[np.unique(places, return_index=True)[1]] = True
    prompt_tokens = answers.prompt_tokens
    own = pa.array(places, mask=is_rejected)
    # Each answer stands here twice: as it is for the row that asked, and behind, as it is for its duplicates.
    asked = pa.array(np.where(is_first, places, places + len(prompt_tokens)), mask=is_rejected)
    cached_tokens = np.concatenate([answers.cached_tokens, prompt_tokens])
    routes = np.concatenate([answers.is_cached.astype(np.int64), np.full(len(prompt_tokens), 2)])
    counts = [(prompt_tokens, own), (cached_tokens, asked), (answers.output_tokens, own)]
    usage = pa.StructArray.from_arrays(
        [pa.array(values, pa.int32()).take(at) for values, at in counts], fields=list(USAGE), mask=pa.array(is_rejected)
    )
    return usage, _ROUTES.take(pa.array(routes)).take(asked)


def count_labels(columns: Mapping[str, pa.Array], plan: Plan) -> dict[str, dict[str, int]]:
    """Return how many rows got each label, in the order of the job file, for every task that has labels."""
    counts = {}
    for task in plan.tasks:
        if task.kind == "choose":
            labels = columns[f"{plan.prefix}{task.name}_label"]
        elif task.kind == "choose_many":
            labels = columns[f"{plan.prefix}{task.name}_labels"].flatten()
        else:
            continue
        given = {pair["values"]: pair["counts"] for pair in labels.value_counts().to_pylist()}
        counts[task.name] = {label: given.get(label, 0) for label in task.labels}
    return counts
