"""What changed between two runs: how many rows went from which label to which, matched by id, for each task of both.

Only ids and labels are read. They are sorted by the hash of the id into temporary files of a million rows, which are
matched one after the other, so that memory does not grow with the runs.
"""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.annotate import raw_bytes
from pipelines.cache_files import FAILURES, written
from pipelines.commit import read_plan, runs_of
from pipelines.finalize import read_manifest
from schemas.errors import SpecError
from schemas.runs import Manifest, Plan, Task

REJECTED = "(rejected)"
NOT_GIVEN = "(not given)"
"""The other side of a `choose_many` label that was given in one run alone."""

LINES = 12
"""Changes of a task shown on a terminal."""

_FILE = "churn.json"
_ROWS_AT_ONCE = 1_000_000
_BATCH_ROWS = 65_536

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Rows that had one label before and have one now."""

    before: str
    after: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Churn:
    """A run beside an earlier one."""

    against: str
    """The earlier run's id."""
    rows_in_both: int
    rows_new: int
    rows_gone: int
    rows_unclear: int
    """Of both runs: rows that cannot be matched, since their id is null or occurs twice."""
    tasks: dict[str, tuple[Change, ...]]
    """Of every task that scores labels in both runs, the rows in both, unchanged ones too; the most rows first. For
    `choose_many` a row counts once for each label given in either run."""


def churn(plan: Plan, manifest: Manifest, earlier_url: str) -> Churn:
    """Return what changed since the run at `earlier_url`.

    Raises: SpecError if that is no finished run, or has no task in common; StorageError.
    """
    earlier = read_plan(earlier_url)
    before = read_manifest(earlier.output)
    if before is None:
        raise SpecError(f"{earlier_url}: not finished, it has no manifest", remedy="run its job again: it resumes")
    tasks = _common(earlier, plan)
    if not tasks:
        remedy = "compare runs that have a choose or choose_many task of the same name"
        raise SpecError(f"{earlier.run_id} and {plan.run_id} have no task in common", remedy=remedy)
    names = [task.name for task in tasks]
    values = [_Values() for _ in tasks]
    parts = 1 + max(before.rows_in, manifest.rows_in) // _ROWS_AT_ONCE
    pairs: list[Counter[tuple[int, int]]] = [Counter() for _ in tasks]
    totals = np.zeros(4, np.int64)
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(parts)] for _ in range(2)]
        old = _Sorted(earlier, before, names, values, files[0])
        new = _Sorted(plan, manifest, names, values, files[1])
        totals[3] = old.rows_without_id + new.rows_without_id
        for part in range(parts):
            totals += _match(old.part(part), new.part(part), pairs)
    both, added, gone, unclear = totals.tolist()
    changes = {
        task.name: _changes(task, counts, labels) for task, counts, labels in zip(tasks, pairs, values, strict=True)
    }
    return Churn(
        against=earlier.run_id,
        rows_in_both=both,
        rows_new=added,
        rows_gone=gone,
        rows_unclear=unclear,
        tasks=changes,
    )


def _common(earlier: Plan, plan: Plan) -> list[Task]:
    """Return the plan's tasks that score labels, and did so in `earlier`."""
    kinds = {task.name: task.kind for task in earlier.tasks}
    return [task for task in plan.tasks if task.labels and kinds.get(task.name) == task.kind]


class _Values:
    """Numbers for the labels of a task; a rejected row is 0."""

    def __init__(self) -> None:
        self.number_of: dict[tuple[str, ...] | None, int] = {None: 0}

    def numbers(self, column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
        """Return a number for each value: a label, or a list of them."""
        if pa.types.is_list(column.type):
            return np.array([self._number(None if row is None else tuple(row)) for row in column.to_pylist()], np.int32)
        coded = column.combine_chunks().dictionary_encode()
        numbers = [self._number((label,)) for label in coded.dictionary.to_pylist()]
        codes = coded.indices.fill_null(len(numbers)).to_numpy()
        rows: npt.NDArray[np.int32] = np.array([*numbers, 0], np.int32)[codes]
        return rows

    def _number(self, labels: tuple[str, ...] | None) -> int:
        return self.number_of.setdefault(labels, len(self.number_of))


class _Sorted:
    """The rows of a run in temporary files by the hash of their id: the hash, then a number for each task."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        names: Sequence[str],
        values: Sequence[_Values],
        files: Sequence[IO[bytes]],
    ) -> None:
        self._type = np.dtype([("id", np.int64), *((f"task{i}", np.int32) for i in range(len(names)))])
        self._files = files
        self.rows_without_id = 0
        kinds = {task.name: task.kind for task in plan.tasks}
        suffixes = {"choose": "label", "choose_many": "labels"}
        columns = [f"{plan.prefix}{name}_{suffixes[kinds[name]]}" for name in names]
        for batch in _batches(plan, manifest, [plan.columns.id, *columns]):
            self.rows_without_id += batch.column(0).null_count
            batch = batch.filter(pc.is_valid(batch.column(0)))
            rows = np.empty(batch.num_rows, self._type)
            rows["id"] = _hashes(batch.column(0))
            for index, value in enumerate(values):
                rows[f"task{index}"] = value.numbers(batch.column(1 + index))
            place = rows["id"].view(np.uint64) % np.uint64(len(files))
            for part, file in enumerate(self._files):
                file.write(rows[place == part].tobytes())

    def part(self, part: int) -> npt.NDArray[Any]:
        """Return the rows of one file, ascending."""
        self._files[part].seek(0)
        rows = np.frombuffer(self._files[part].read(), self._type)
        return rows[np.argsort(rows["id"], kind="stable")]


def _batches(plan: Plan, manifest: Manifest, columns: list[str]) -> Iterator[pa.Table]:
    for name in manifest.data:
        with storage.open_read(storage.join(plan.output, "data", name)) as file:
            for batch in pq.ParquetFile(file, pre_buffer=True).iter_batches(_BATCH_ROWS, columns=columns):
                yield pa.Table.from_batches([batch]).select(columns)


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return 64 bits of each id, the same within this process. An id is the same as text and as number."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    return np.fromiter(map(hash, raw_bytes(column)), np.int64, len(column))


def _match(old: npt.NDArray[Any], new: npt.NDArray[Any], pairs: list[Counter[tuple[int, int]]]) -> npt.NDArray[Any]:
    """Add the labels of rows in both to `pairs`; return rows in both, new, gone and unclear."""
    once_old, once_new = (_once(rows["id"]) for rows in (old, new))
    both_old = old[once_old & _is_in(old["id"], new["id"][once_new])]
    both_new = new[once_new & _is_in(new["id"], old["id"][once_old])]
    for index, counts in enumerate(pairs):
        before, after = (rows[f"task{index}"].astype(np.int64) for rows in (both_old, both_new))
        found, rows = np.unique(before << 32 | after, return_counts=True)
        for pair, number in zip(found.tolist(), rows.tolist(), strict=True):
            counts[pair >> 32, pair & 0xFFFFFFFF] += number
    both = len(both_old)
    added = int((once_new & ~_is_in(new["id"], old["id"])).sum())
    gone = int((once_old & ~_is_in(old["id"], new["id"])).sum())
    return np.array([both, added, gone, len(old) + len(new) - 2 * both - added - gone])


def _is_in(ids: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which of `ids` are among the ascending `others`."""
    if not len(others):
        return np.zeros(len(ids), bool)
    found: npt.NDArray[np.bool_] = others[np.minimum(np.searchsorted(others, ids), len(others) - 1)] == ids
    return found


def _once(ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which of these ascending numbers occur once."""
    once = np.ones(len(ids), np.bool_)
    is_other = ids[1:] != ids[:-1]
    once[1:] &= is_other
    once[:-1] &= is_other
    return once


def _changes(task: Task, pairs: Counter[tuple[int, int]], values: _Values) -> tuple[Change, ...]:
    given = list(values.number_of)
    counts: Counter[tuple[str, str]] = Counter()
    for (old, new), rows in pairs.items():
        before, after = given[old], given[new]
        if task.kind == "choose" or before is None or after is None:
            counts[_shown(before), _shown(after)] += rows
            continue
        for label in dict.fromkeys((*before, *after)):
            counts[label if label in before else NOT_GIVEN, label if label in after else NOT_GIVEN] += rows
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Change(before=before, after=after, rows=rows) for (before, after), rows in ordered)


def _shown(labels: tuple[str, ...] | None) -> str:
    return REJECTED if labels is None else ", ".join(labels) or NOT_GIVEN


def write_churn(plan: Plan, manifest: Manifest, against: str = "") -> Churn | None:
    """Return the churn of a run and keep it in its folder; None where there is nothing to compare with.

    Args:
        plan: the run.
        manifest: its result.
        against: the earlier run's folder; without, what is kept, else the latest that had finished when this one began.

    Raises: K2Error, only if `against` is given.
    """
    url = storage.join(plan.output, _FILE)
    if against:
        found = churn(plan, manifest, against)
    else:
        if manifest.status != "complete" or (kept := read_churn(plan)):
            return kept if manifest.status == "complete" else None
        try:
            earlier = _earlier(plan)
            if earlier is None:
                return None
            found = churn(plan, manifest, earlier)
        except (*FAILURES, KeyError) as error:  # the run is whole, whatever became of an earlier one
            _LOG.warning("not compared with an earlier run: %s", error)
            return None
    storage.write_bytes_atomic(url, json.dumps(asdict(found), indent=1, ensure_ascii=False).encode())
    return found


def read_churn(plan: Plan) -> Churn | None:
    """Return what `write_churn` kept; None if it kept nothing."""
    try:
        raw = json.loads(storage.read_text(storage.join(plan.output, _FILE)))
        tasks = {name: tuple(Change(**change) for change in changes) for name, changes in raw["tasks"].items()}
        return Churn(**{**raw, "tasks": tasks})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _earlier(plan: Plan) -> str | None:
    """Return the folder of the latest run of this job, with a task in common, that had ended when this one began."""
    began = written(storage.join(plan.output, "plan.json")) or 0.0
    urls = [url for url in runs_of(plan) if url != plan.output]
    ended = {url: written(storage.join(url, "_SUCCESS")) for url in urls}
    finished = [(time, url) for url, time in ended.items() if time is not None and time <= began]
    return next((url for _, url in sorted(finished, reverse=True) if _common(read_plan(url), plan)), None)


def churn_lines(found: Churn) -> list[str]:
    """Return the churn as lines of a report."""
    counts = f"{found.rows_in_both:,} rows in both, {found.rows_new:,} new, {found.rows_gone:,} gone"
    if found.rows_unclear:
        counts += f", {found.rows_unclear:,} whose id is null or occurs twice"
    lines = [f"  against   {found.against}: {counts}"]
    for task, changes in found.tasks.items():
        moved = [change for change in changes if change.before != change.after]
        lines.append(f"  {task}, {sum(change.rows for change in moved):,} changed")
        width = max((len(f"{change.before} → {change.after}") for change in moved[:LINES]), default=0)
        lines += [f"    {f'{change.before} → {change.after}':<{width}} {change.rows:>8,}" for change in moved[:LINES]]
        if len(moved) > LINES:
            lines.append(f"    and {len(moved) - LINES} other changes: {_FILE}")
    return lines
