"""Rows that kill, stop or upset their process: they are rejected, all others are as if they had not been there."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.verify import verify
from k2model.engine.engine import Engine
from k2model.engine.request import Completion, Request, Work
from pipelines import poison
from pipelines.annotate import Block, annotate
from pipelines.commit import pending_units, read_receipts, write_plan
from pipelines.finalize import finalize
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from pipelines.runners import run_units
from schemas.errors import EnvironmentMismatch
from schemas.runs import Plan
from schemas.tickets import TicketColumns
from tests.fakes import annotate_directly, fake_plan, open_fake_engine, read_output, tickets, write_tickets
from tests.poisonous import (
    open_crashing_engine,
    open_engine_beside_a_deadly_file,
    open_hopeless_engine,
    open_poisonous_engine,
)


def planned(
    folder: Path, poisons: dict[int, str], *, name: str = "out", num_rows: int = 12, unit_rows: int = 4
) -> Plan:
    """Return a written plan over tickets of which these, by row, hold a poison."""
    table = tickets(num_rows)
    bodies = [f"POISON {poisons[i]}" if i in poisons else body for i, body in enumerate(table["body"].to_pylist())]
    if not (folder / "in").exists():
        table = table.set_column(2, "body", pa.array(bodies))
        write_tickets(folder / "in", "a.parquet", table, row_group_size=unit_rows)
    plan = fake_plan([folder / "in"], folder / name, unit_rows=unit_rows)
    write_plan(plan)
    return plan


def assert_only_rejected(plan: Plan, folder: Path, rows: set[int]) -> dict[int, str]:
    """Assert that all but `rows` are what an undisturbed run makes of them; return what `rows` were rejected for."""
    manifest = finalize(plan, max_reject_rate=1.0)
    assert manifest.status == "complete"
    assert verify(plan.output) == []
    assert manifest.rows_rejected == len(rows)
    assert manifest.error_codes == ({"poison_row": len(rows)} if rows else {})
    calm = planned(folder, {}, name="calm")
    annotate_directly(calm, calm.units)
    found = pa.concat_tables(read_output(plan).values()).to_pylist()
    expected = pa.concat_tables(read_output(calm).values()).to_pylist()
    assert len(found) == len(expected) == plan.rows
    for index, (row, calm_row) in enumerate(zip(found, expected, strict=True)):
        assert index in rows or str(row) == str(calm_row)
    assert not list(Path(plan.output, "attempts").glob("[!.]*"))
    return {index: found[index]["error_message"] for index in rows}


DEATHS = 3 + 2 + 2
"""Of the unit, of its 4 rows and of 2 of them, and of the row alone."""


def test_a_row_that_kills_its_process_is_rejected_and_no_other(tmp_path: Path) -> None:
    plan = planned(tmp_path, {5: "kills"})
    said: list[str] = []
    assert run_units(plan, plan.units, open_engine=open_poisonous_engine, say=said.append) == DEATHS
    cause = "killed by signal 9 (SIGKILL), as the kernel does when memory runs out"
    assert said == [f"  a process ended: {cause}; another one goes on"] * DEATHS
    (message,) = assert_only_rejected(plan, tmp_path, {5}).values()
    assert message.startswith("computing this row failed 4 times, the last 2 of them alone: killed by signal 9")
    attempts = [receipt.attempts for receipt in read_receipts(plan).values()]
    assert max(attempts) == attempts[1] == DEATHS + 1


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("fills memory", "MemoryError: no more"),
        ("hangs", "nothing was computed for 0.5 s"),
    ],
)
def test_whatever_a_row_does_it_alone_is_rejected(tmp_path: Path, what: str, cause: str) -> None:
    plan = planned(tmp_path, {5: what})
    run_units(plan, plan.units, open_engine=open_poisonous_engine, stall_seconds=0.5)
    (message,) = assert_only_rejected(plan, tmp_path, {5}).values()
    assert message.endswith(cause)


def test_several_bad_rows_and_rows_that_are_bad_only_together(tmp_path: Path) -> None:
    plan = planned(tmp_path, {0: "left", 2: "right", 5: "kills", 7: "fills memory"})
    run_units(plan, plan.units, open_engine=open_poisonous_engine)
    assert_only_rejected(plan, tmp_path, {5, 7})


def test_a_text_that_is_poison_is_so_in_each_of_its_rows(tmp_path: Path) -> None:
    table = tickets(8)
    bodies = ["POISON fills memory" if i in (1, 2) else "alike" if i in (0, 3) else f"body {i}" for i in range(8)]
    table = table.set_column(1, "subject", pa.array(["re"] * 8)).set_column(2, "body", pa.array(bodies))
    write_tickets(tmp_path / "in", "a.parquet", table)
    plan = planned(tmp_path, {})
    run_units(plan, plan.units, open_engine=open_poisonous_engine)
    assert_only_rejected(plan, tmp_path, {1, 2})


def test_what_is_known_of_a_poison_outlives_its_driver(tmp_path: Path) -> None:
    plan = planned(tmp_path, {3: "crashes"}, num_rows=4, unit_rows=2)

    def leave(said: str) -> None:
        raise InterruptedError(said)

    drivers = 0
    while pending := pending_units(plan):
        drivers += 1
        with suppress(InterruptedError):
            run_units(plan, pending, open_engine=open_poisonous_engine, say=leave)
    assert drivers == 3 + 1 + 2 + 1
    (message,) = assert_only_rejected(plan, tmp_path, {3}).values()
    assert message.endswith("killed by signal 11 (SIGSEGV)")


def test_a_model_that_dies_is_an_error_and_not_a_loop(tmp_path: Path) -> None:
    plan = planned(tmp_path, {})
    with pytest.raises(EnvironmentMismatch, match=r"3 processes ended.*no unit was done: killed by signal 9"):
        run_units(plan, plan.units, open_engine=open_crashing_engine)
    with pytest.raises(EnvironmentMismatch, match=r"3 processes ended.*killed by signal 4 \(SIGILL\)"):
        run_units(plan, plan.units, open_engine=open_hopeless_engine)
    assert not any(poison.read(plan, unit.unit_id).suspect for unit in plan.units)
    # Three deaths are no proof: whoever mends the model finds every row annotated.
    run_units(plan, plan.units, open_engine=open_fake_engine)
    assert_only_rejected(plan, tmp_path, set())


def test_a_unit_that_cannot_even_be_read_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    plan = planned(tmp_path, {})
    deaths = run_units(plan, plan.units, open_engine=open_engine_beside_a_deadly_file)
    assert deaths == 2 * poison.MAX_DEATHS
    manifest = finalize(plan, max_reject_rate=0.0)
    assert (manifest.status, manifest.units_done) == ("incomplete", 2)
    (file,) = manifest.rejected_files
    assert "rows 4 to 7: reading or writing them ended 3 processes: killed by signal 7 (SIGBUS)" in file.error_message
    # Whoever runs it again is told at once, until what is known is deleted.
    assert run_units(plan, pending_units(plan), open_engine=open_fake_engine) == 0
    poison.forget(plan, plan.units[1].unit_id)
    run_units(plan, pending_units(plan), open_engine=open_fake_engine)
    assert_only_rejected(plan, tmp_path, set())


def test_a_suspect_is_begun_among_suspects_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, {})
    unit = plan.units[0]
    for number in range(poison.MAX_DEATHS):
        attempts = poison.look(plan, unit.unit_id)
        assert attempts.deaths == number
        assert not poison.begin(plan, unit, attempts, is_careful=True)
        assert poison.begin(plan, unit, attempts, is_careful=False)
    attempts = poison.look(plan, unit.unit_id)
    assert not poison.begin(plan, unit, attempts, is_careful=False)
    assert poison.begin(plan, unit, poison.look(plan, unit.unit_id), is_careful=True)
    poison.let_go(plan, unit.unit_id)
    assert poison.look(plan, unit.unit_id).whole_deaths == 0


class _ShortOfMemory:
    """An engine that has no memory for some requests."""

    def __init__(self, engine: Engine, word: str) -> None:
        self.engine = engine
        self.word = word
        self.busy_seconds = 0.0
        self.sizes: list[int] = []

    def take_work(self) -> Work:
        return self.engine.take_work()

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        if any(self.word in self.engine.tokenizer.decode(request.prompt_ids) for request in requests):
            raise MemoryError("no more")
        self.sizes.append(len(requests))
        return self.engine.submit(requests)


def test_answers_found_with_care_are_the_same_to_the_bit(tmp_path: Path, checkpoint: str) -> None:
    bodies = [f"{'parcel ' * (1 + number % 7)}{number}" for number in range(24)]
    table = pa.table({"ticket_id": [f"T{n}" for n in range(24)], "body": [*bodies[:13], "poison", *bodies[13:23]]})
    write_tickets(tmp_path / "in", "a.parquet", table)
    columns = TicketColumns(id="ticket_id", text=("body",))
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", columns=columns)
    block = Block(plan.units[0], read_unit(plan.units[0]), time.perf_counter())
    engine = Engine.open(checkpoint)
    try:
        prompts = Prompts(plan.tasks, engine.tokenizer, engine.max_position_embeddings)
        expected = annotate(block, plan, prompts, engine).table.to_pylist()
        short = _ShortOfMemory(engine, "poison")
        known = poison.search(plan, block, prompts, short, 0.0)
        found = annotate(block, plan, known, known)
    finally:
        engine.close()
    # Two requests a row: the halves beside the poison, down to its neighbor.
    assert short.sizes == [2 * rows for rows in (12, 1, 1, 3, 6)]
    assert found.error_codes == {"poison_row": 1}
    rows = found.table.to_pylist()
    assert [index for index, row in enumerate(rows) if str(row) != str(expected[index])] == [13]


def test_what_every_row_raises_is_a_bug_and_no_row_is_to_blame(tmp_path: Path) -> None:
    plan = planned(tmp_path, dict.fromkeys(range(8), "fills memory"))
    with pytest.raises(MemoryError, match="no more"):
        run_units(plan, plan.units, open_engine=open_poisonous_engine)


@pytest.mark.soak
@pytest.mark.parametrize(("what", "unit_rows"), [("hangs", 2), ("kills", 4)])
def test_dask_rejects_the_row_too(tmp_path: Path, what: str, unit_rows: int) -> None:
    # Of 4 rows, the unit of the row that kills takes more workers down than Dask allows for a task.
    plan = planned(tmp_path, {5: what}, num_rows=8, unit_rows=unit_rows)
    run_units(plan, plan.units, runner="dask", workers=1, open_engine=open_poisonous_engine, stall_seconds=0.5)
    assert_only_rejected(plan, tmp_path, {5})
