"""A job's answers beside the labels people gave: accuracy, F1, precision, recall, calibration, each with its spread.

Intervals are percentile bootstraps over rows (Efron and Tibshirani 1993, chapter 13). The calibration error is the
expected one over 15 bins of equal width (Guo et al., arXiv 1706.04599).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.progress import Say, Show
from jobs.run import plan_job, run
from jobs.spec import JobSpec
from pipelines import storage
from pipelines.annotate import OpenEngine
from pipelines.commit import read_plan
from pipelines.read import read_data
from schemas.errors import SchemaMismatch, SpecError
from schemas.runs import Manifest, Plan, Task

RESAMPLES = 1000
"""Of a bootstrap: the ends of a 95 % interval then move by about 1 % of its width from seed to seed."""

_BINS = 15
_SEED = 0

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Callable[[Array], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measure of all rows, and the interval that holds 95 % of what other rows of the kind would give."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelQuality:
    """How one label fares. Each number is None where it would divide by zero."""

    label: str
    support: int
    """Rows that people gave it."""
    given: int
    """Rows that the job gave it."""
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How one task fares on labelled rows. A rejected row counts as wrong."""

    task: str
    column: str
    """Of the truth."""
    rows: int
    """Rows with a true label."""
    rejected: int
    """Of these, rows without an answer."""
    accuracy: Estimate
    """`choose_many`: rows whose whole set of labels is right."""
    macro_f1: Estimate
    """Mean over the labels that people or the job gave."""
    calibration_error: Estimate | None
    """Mean distance of the score of an answer from how often such answers are right; None for `choose_many`."""
    labels: tuple[LabelQuality, ...]
    spread: dict[str, dict[str, float]]
    """`median` and `deviation` of each measure over samples of rows, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What people and the job said of each row with a true label."""

    truth: Array
    """[R, L] bool: the labels people gave."""
    given: Array
    """[R, L] bool: the labels the job gave; none in a rejected row."""
    answered: Array
    """[R] bool: the row was not rejected."""
    score: Array | None
    """[R] float64, of the label given, 0 in a rejected row; None for `choose_many`."""


def evaluate_job(
    spec: JobSpec,
    given: Sequence[str],
    *,
    repeats: int = 0,
    sample: int = 0,
    say: Say = lambda line: None,
    shows: Sequence[Show] = (),
    open_engine: OpenEngine | None = None,
) -> tuple[list[Quality], Manifest]:
    """Return how the job fares on its input, whose files hold the true labels; it is run as far as it was not before.

    Args:
        spec: the job, over labelled files.
        given: what `truth_columns` takes.
        repeats: as `evaluate` takes it.
        sample: likewise.
        say: as `run` takes it.
        shows: likewise.
        open_engine: likewise.

    Raises: SpecError, before anything is run, if a task has no column; SchemaMismatch; what `run` raises.
    """
    plan = plan_job(spec)
    names = pq.read_schema(storage.open_read(plan.units[0].url)).names if plan.units else []
    columns = truth_columns(plan.tasks, names, given)
    summary, manifest = run(spec, say=say, shows=shows, open_engine=open_engine)
    return evaluate(read_plan(summary.output), manifest, columns=columns, repeats=repeats, sample=sample), manifest


def evaluate(
    plan: Plan, manifest: Manifest, *, columns: dict[str, str], repeats: int = 0, sample: int = 0
) -> list[Quality]:
    """Return how each task with labels fares on a run whose input holds the true ones.

    Args:
        plan: of the run.
        manifest: of the run; only the files it names are read, and of these only the columns that are needed.
        columns: task to column of the truth: a label, or a list of labels for `choose_many`; null where unknown.
        repeats: samples of rows to draw for the spread; 0 for none.
        sample: rows of each; 0 for as many as there are. With replacement, so that this says something, too.

    Raises: SpecError if there is no such task or column; SchemaMismatch if a true label is none of the task's.
    """
    tasks = [task for task in plan.tasks if task.kind in ("choose", "choose_many")]
    found = []
    for name, column in columns.items():
        task = next((task for task in tasks if task.name == name), None)
        if task is None:
            known = ", ".join(task.name for task in tasks) or "none"
            raise SpecError(f'no task "{name}" with labels', remedy=f"tasks with labels: {known}")
        found.append(_quality(task, column, _read(plan, manifest, task, column), repeats, sample))
    return found


def truth_columns(tasks: Sequence[Task], names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Return the column of the truth for each task.

    Args:
        tasks: of the job.
        names: columns of the labelled files.
        given: `TASK=COLUMN`, or `COLUMN` for a job with one task with labels; if empty, the column that has the task's
            name, or `label` for a job with one task.

    Raises: SpecError if a task has no column, or a column that is not there.
    """
    known = [task.name for task in tasks if task.kind in ("choose", "choose_many")]
    if not known:
        raise SpecError("the job has no task with labels", remedy="eval needs a task of kind choose or choose_many")
    if given:
        pairs = [text.partition("=") for text in given]
        if len(known) > 1 and any(not column for _, _, column in pairs):
            raise SpecError(f"--column {given[0]}: the job has {len(known)} tasks", remedy="write TASK=COLUMN")
        chosen = {(task if column else known[0]): (column or task) for task, _, column in pairs}
    else:
        alone = "label" if len(known) == 1 and "label" in names else None
        chosen = {task: task if task in names else alone or "" for task in known}
        chosen = {task: column for task, column in chosen.items() if column}
    missing = [column for column in chosen.values() if column not in names]
    if missing or not chosen:
        what = f'no column "{missing[0]}"' if missing else f"no column named {' or '.join(known)}"
        raise SpecError(
            f"the labelled files have {what}: {', '.join(names)}", remedy="name it with --column TASK=COLUMN"
        )
    return chosen


def _read(plan: Plan, manifest: Manifest, task: Task, column: str) -> Answers:
    """Return the rows that have a true label. Raises: SchemaMismatch."""
    index = {label: place for place, label in enumerate(task.labels)}
    is_many = task.kind == "choose_many"
    answer = f"{plan.prefix}{task.name}_{'labels' if is_many else 'label'}"
    names = [column, answer] if is_many else [column, answer, f"{plan.prefix}{task.name}_score"]
    truths: list[list[int]] = []
    given: list[list[int] | None] = []
    scores: list[float] = []
    for name in manifest.data:
        table = read_data(plan, name, names)
        values = [table[other].to_pylist() for other in names[1:]]
        for row, (truth, said, *score) in enumerate(zip(true_labels(table[column], name), *values, strict=True)):
            if truth is None:
                continue
            if any(label not in index for label in truth) or (len(truth) != 1 and not is_many):
                raise SchemaMismatch(
                    f'{name} row {row}: column "{column}" has {truth}, which task "{task.name}" does not know',
                    remedy=f"its labels are: {', '.join(index)}",
                )
            truths.append([index[label] for label in truth])
            given.append(None if said is None else [index[label] for label in (said if is_many else [said])])
            scores += [value or 0.0 for value in score]
    if not truths:
        raise SchemaMismatch(f'column "{column}" has no label in any row', remedy="give labelled rows")
    return Answers(
        truth=one_hot(truths, len(index)),
        given=one_hot([labels or [] for labels in given], len(index)),
        answered=np.array([labels is not None for labels in given]),
        score=None if is_many else np.array(scores, dtype=float),
    )


def true_labels(column: pa.ChunkedArray, name: str) -> list[list[str] | None]:
    """Return the labels of each row; a lone label as a list of one. Raises: SchemaMismatch."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    item = column.type.value_type if is_list or pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(item) or pa.types.is_large_string(item) or pa.types.is_string_view(item)):
        raise SchemaMismatch(f"{name}: true labels are {column.type}, expected text", remedy="write labels as text")
    values = column.to_pylist()
    return values if is_list else [None if value is None else [value] for value in values]


def one_hot(rows: Sequence[Sequence[int]], width: int) -> Array:
    """Return rows of places as [R, width] bool."""
    out = np.zeros((len(rows), width), dtype=bool)
    for row, places in enumerate(rows):
        out[row, list(places)] = True
    return out


def measures(answers: Answers) -> dict[str, Measure]:
    """Return each measure as a function of how often every row counts, [R]."""
    hits, given, truth = (
        matrix.astype(float) for matrix in (answers.truth & answers.given, answers.given, answers.truth)
    )
    right = ((answers.truth == answers.given).all(axis=1) & answers.answered).astype(float)

    def accuracy(weights: Array) -> float:
        return float(weights @ right / weights.sum())

    def macro_f1(weights: Array) -> float:
        # Over the labels that people or the job gave, 0 for one that is never right: scikit-learn's f1_score.
        occurs = weights @ (truth + given)
        seen = occurs > 0
        return float((2 * (weights @ hits)[seen] / occurs[seen]).mean()) if seen.any() else math.nan

    if answers.score is None:
        return {"accuracy": accuracy, "macro_f1": macro_f1}
    bins = np.minimum((answers.score * _BINS).astype(int), _BINS - 1)
    surplus = np.where(answers.answered, right - answers.score, 0)

    def calibration_error(weights: Array) -> float:
        total = weights @ answers.answered
        return float(np.abs(np.bincount(bins, weights * surplus, minlength=_BINS)).sum() / total) if total else math.nan

    return {"accuracy": accuracy, "macro_f1": macro_f1, "calibration_error": calibration_error}


def _quality(task: Task, column: str, answers: Answers, repeats: int, sample: int) -> Quality:
    total, found = len(answers.truth), measures(answers)
    draws = np.random.default_rng(_SEED)
    resampled = [_counts(draws, total, total) for _ in range(RESAMPLES)]
    estimates = {}
    for name, measure in found.items():
        low, high = np.nanpercentile([measure(weights) for weights in resampled], [2.5, 97.5])
        estimates[name] = Estimate(value=measure(np.ones(total)), low=float(low), high=float(high))
    return Quality(
        task=task.name,
        column=column,
        rows=total,
        rejected=total - int(answers.answered.sum()),
        accuracy=estimates["accuracy"],
        macro_f1=estimates["macro_f1"],
        calibration_error=estimates.get("calibration_error"),
        labels=tuple(_of_labels(task, answers)),
        spread=_spread(found, total, repeats, sample),
    )


def _counts(draws: np.random.Generator, total: int, size: int) -> Array:
    """Return how often each of `total` rows is among `size` drawn with replacement."""
    return np.bincount(draws.integers(0, total, size), minlength=total).astype(float)


def _spread(found: dict[str, Measure], total: int, repeats: int, sample: int) -> dict[str, dict[str, float]]:
    """Return median and standard deviation of each measure over `repeats` samples of rows."""
    if repeats < 2:
        return {}
    draws = np.random.default_rng(_SEED + 1)
    drawn = [_counts(draws, total, sample or total) for _ in range(repeats)]
    values = {name: [measure(weights) for weights in drawn] for name, measure in found.items()}
    return {
        name: {"median": statistics.median(each), "deviation": statistics.stdev(each)} for name, each in values.items()
    }


def _of_labels(task: Task, rows: Answers) -> Iterator[LabelQuality]:
    right, support, given = (rows.truth & rows.given).sum(axis=0), rows.truth.sum(axis=0), rows.given.sum(axis=0)
    for place, label in enumerate(task.labels):
        hits, people, job = int(right[place]), int(support[place]), int(given[place])
        yield LabelQuality(
            label=label,
            support=people,
            given=job,
            precision=hits / job if job else None,
            recall=hits / people if people else None,
            f1=2 * hits / (people + job) if people + job else None,
        )


def as_text(found: Sequence[Quality]) -> str:
    """Return `found` for people."""
    lines = []
    for quality in found:
        lines.append(f'{quality.task}: {quality.rows:,} rows with a label in "{quality.column}"' + _rejected(quality))
        for name in ("accuracy", "macro_f1", "calibration_error"):
            estimate = getattr(quality, name)
            if estimate is None:
                continue
            interval = f"95 % of rows like these: {estimate.low:.1%} to {estimate.high:.1%}"
            line = f"  {name.replace('_', ' '):<18}{estimate.value:>7.1%}  ({interval})"
            if quality.spread:
                spread = quality.spread[name]
                line += f"  samples: median {spread['median']:.1%}, deviation {spread['deviation']:.1%}"
            lines.append(line)
        width = max(len(row.label) for row in quality.labels)
        lines.append(f"  {'label':<{width}} {'people':>8} {'job':>8} {'precision':>10} {'recall':>8} {'F1':>8}")
        for row in quality.labels:
            precision, recall, f1 = (_share(value) for value in (row.precision, row.recall, row.f1))
            counts = f"  {row.label:<{width}} {row.support:>8,} {row.given:>8,}"
            lines.append(f"{counts} {precision:>10} {recall:>8} {f1:>8}")
    return "\n".join(lines)


def _rejected(quality: Quality) -> str:
    return f", {quality.rejected:,} of them rejected (counted as wrong)" if quality.rejected else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def facts(found: Sequence[Quality]) -> list[dict[str, Any]]:
    """Return `found` as `--json` prints it."""
    return [asdict(quality) for quality in found]
