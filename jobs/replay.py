"""Rows of a finished run, computed again: each alone, far from the rows it was computed beside, to the same bits."""

import random
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.verify import same_values
from pipelines import graph
from pipelines.annotate import Block, OpenEngine, SupportsAnnotate, SupportsPrompts, annotate
from pipelines.commit import read_plan, read_receipt, receipts_of
from pipelines.read import read_data, read_unit
from schemas.annotations import task_columns
from schemas.errors import K2Error, SchemaMismatch
from schemas.runs import Plan, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A stored value that is not what the model says of its row."""

    url: str
    """Of the input file."""
    row: int
    """In that file, from 0."""
    column: str
    stored: Any
    recomputed: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What came of computing rows again."""

    rows: int
    """Rows drawn: as many as asked for, or all that are annotated."""
    replayed: int
    """Of these, rows that could be computed again."""
    flips: tuple[Flip, ...]
    problems: tuple[str, ...]
    """Why the others could not."""

    @property
    def is_equal(self) -> bool:
        """Whether every row drawn was computed again, and none flipped."""
        return self.replayed == self.rows and not self.flips


def replay(run_url: str, num_rows: int, *, seed: int = 0, open_engine: OpenEngine | None = None) -> Replay:
    """Return what the model says now of `num_rows` annotated rows of a run, drawn at random from all of its units.

    Each row is read from the input and computed alone; its status, task columns and prompt hash are compared with the
    stored ones, to the bit. One unit is in memory at a time.

    Args:
        run_url: the run's folder.
        num_rows: rows to draw; all if it has fewer.
        seed: the same seed draws the same rows.
        open_engine: stands in for the model, in tests.

    Raises: SpecError if there is no run; CheckpointError if the checkpoint is not the run's; StorageError.
    """
    plan = read_plan(run_url)
    names = _compared(plan)
    drawn = draw(plan, num_rows, seed=seed)
    replayed = 0
    flips: list[Flip] = []
    problems: list[str] = []
    try:
        engine, prompts = graph.engine_and_prompts(plan, open_engine or graph.open_model)
        for unit, places in drawn:
            where = f"unit {unit.unit_id} ({unit.url})"
            try:
                source, stored = read_unit(unit), _read_data(plan, unit, names)
                rows = _annotated_rows(plan, stored, places)
            except (K2Error, pa.ArrowException, OSError, KeyError, IndexError) as error:
                problems.append(f"{where}: {len(places)} rows cannot be replayed: {error}")
                continue
            for row in rows:
                flips.extend(_flips(plan, unit, row, source, stored, prompts, engine))
            replayed += len(rows)
    finally:
        graph.close_engines()
    rows_drawn = sum(len(places) for _, places in drawn)
    return Replay(rows=rows_drawn, replayed=replayed, flips=tuple(flips), problems=tuple(problems))


def as_lines(found: Replay) -> list[str]:
    """Return `found` for people: the counts, then a line for each problem and flip."""
    rows = len({(flip.url, flip.row) for flip in found.flips})
    return [
        f"replayed {found.replayed} of {found.rows} rows drawn, each alone: {rows} flipped",
        *(f"  {problem}" for problem in found.problems),
        *(
            f"  {flip.url} row {flip.row} {flip.column}: stored {flip.stored!r}, recomputed {flip.recomputed!r}"
            for flip in found.flips
        ),
    ]


def draw(plan: Plan, num_rows: int, *, seed: int) -> list[tuple[Unit, list[int]]]:
    """Return `num_rows` annotated rows of the run, each as likely, as units and places among their annotated rows.

    Both are in plan order. Of a receipt its number of rows alone is kept: a million receipts would take gigabytes.

    Raises: StorageError.
    """
    annotated = {unit_id: receipt.rows_annotated for unit_id, receipt in receipts_of(plan) if receipt is not None}
    done = [unit for unit in plan.units if unit.unit_id in annotated]
    ends = list(accumulate(annotated[unit.unit_id] for unit in done))
    total = ends[-1] if ends else 0
    drawn: dict[int, list[int]] = {}
    for place in sorted(random.Random(seed).sample(range(total), min(num_rows, total))):
        index = bisect_right(ends, place)
        drawn.setdefault(index, []).append(place - ends[index] + annotated[done[index].unit_id])
    return [(done[index], places) for index, places in drawn.items()]


def _compared(plan: Plan) -> list[str]:
    """Return the columns that must be the same again; not `usage` and `route`, which tell of the rows beside."""
    names = [field.name for task in plan.tasks for field in task_columns(task, plan.prefix)]
    return names + [plan.prefix + name for name in ("status", "error_message", "prompt_hash")]


def _read_data(plan: Plan, unit: Unit, names: Sequence[str]) -> pa.Table:
    """Return the columns `names` of a unit's output.

    Raises: FileNotFoundError or StorageError; ArrowException if it is damaged; KeyError if it lacks a column;
        SchemaMismatch if it has not the receipt's rows, or there is no receipt any more.
    """
    receipt = read_receipt(plan, unit.unit_id)
    if receipt is None:
        raise SchemaMismatch("its receipt is gone")
    table = read_data(plan, receipt.data, names)
    if table.num_rows != receipt.rows:
        raise SchemaMismatch(f"data/{receipt.data} has {table.num_rows} rows, its receipt says {receipt.rows}")
    return table


def _annotated_rows(plan: Plan, stored: pa.Table, places: Sequence[int]) -> list[int]:
    """Return the rows at `places` among the annotated ones. Raises: IndexError if there are not as many."""
    is_annotated = pc.equal(stored.column(f"{plan.prefix}status"), "annotated")
    rows = pc.indices_nonzero(is_annotated).to_pylist()
    return [rows[place] for place in places]


def _flips(
    plan: Plan,
    unit: Unit,
    row: int,
    source: pa.Table,
    stored: pa.Table,
    prompts: SupportsPrompts,
    engine: SupportsAnnotate,
) -> Iterator[Flip]:
    """Yield each column in which row `row` of the unit differs from what is computed for it alone."""
    alone = annotate(Block(unit, source.slice(row, 1), time.perf_counter()), plan, prompts, engine).table
    for name in stored.schema.names:
        before, after = stored.column(name).slice(row, 1), alone.column(name)
        if not same_values(before, after):
            yield Flip(
                url=unit.url,
                row=unit.first_row + row,
                column=name,
                stored=before.to_pylist()[0],
                recomputed=after.to_pylist()[0],
            )
