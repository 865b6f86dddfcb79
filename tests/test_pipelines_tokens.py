"""The plan's tokens are those that the engine then computes, and each cause takes off what it should."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from k2model.engine.engine import Engine
from pipelines.annotate import Block, annotate
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from pipelines.tokens import Tokens, count_tokens
from schemas.runs import Plan, Task
from schemas.tickets import TicketColumns
from tests.checkpoints import write_checkpoint
from tests.fake_jobs import dirty_tickets
from tests.fakes import POLICY, REPLY, TASKS, TOPICS, fake_plan, fake_tokenizer, tickets, write_tickets

BODY = TicketColumns(id="ticket_id", text=("body",))


def plan_of(folder: Path, table: pa.Table, tasks: Sequence[Task], unit_rows: int = 64) -> Plan:
    write_tickets(folder / "in", "a.parquet", table, row_group_size=unit_rows)
    return fake_plan([folder / "in"], folder / "out", tasks=tasks, unit_rows=unit_rows, columns=BODY)


def prompts_of(plan: Plan) -> Prompts:
    return Prompts(plan.tasks, fake_tokenizer(), plan.max_prompt_tokens)


def count(folder: Path, bodies: Sequence[str], tasks: Sequence[Task] = (POLICY,), unit_rows: int = 64) -> Tokens:
    table = pa.table({"ticket_id": [str(row) for row in range(len(bodies))], "body": bodies})
    plan = plan_of(folder, table, tasks, unit_rows)
    return count_tokens(plan, prompts_of(plan))


def length(body: str, tasks: Sequence[Task] = (POLICY,)) -> tuple[int, int]:
    """Return the tokens of a row's prompt, and those of its instructions."""
    request = Prompts(tasks, fake_tokenizer(), 4096).requests(body)[0]
    return len(request.prompt_ids), request.num_prefix_tokens


THREAD = "As I wrote to you on Monday and again on Tuesday, nothing works. "


def test_the_engine_computes_what_the_plan_says(tmp_path: Path) -> None:
    """Duplicates, quoted threads within threads, two cuts of one file, two scored tasks."""
    bodies = [f"{THREAD * (row % 4)}{row % 5} is the number of this ticket" for row in range(60)]
    table = pa.table({"ticket_id": [str(row) for row in range(60)], "body": bodies})
    plan = plan_of(tmp_path, table, (POLICY, TOPICS), unit_rows=25)
    assert len(plan.units) == 3
    tokens = count_tokens(plan, prompts_of(plan))
    engine = Engine.open(str(write_checkpoint(tmp_path / "model", max_position_embeddings=4096)))
    prompts = Prompts(plan.tasks, engine.tokenizer, plan.max_prompt_tokens)
    blocks = [annotate(Block(unit, read_unit(unit), 0.0), plan, prompts, engine) for unit in plan.units]
    engine.close()
    assert tokens.prompt_tokens == sum(block.prompt_tokens for block in blocks)
    # Instructions are computed for no row in particular, and so are in no receipt.
    instructions = length("x", plan.tasks)[1]
    assert tokens.computed_tokens == sum(block.computed_tokens for block in blocks) + instructions
    assert min(tokens.duplicates, tokens.instructions, tokens.beginnings, tokens.scored) > 0


def test_a_row_alone_shares_nothing(tmp_path: Path) -> None:
    tokens = count(tmp_path, ["hello"], (REPLY,))
    assert tokens.prompt_tokens == tokens.computed_tokens == length("hello", (REPLY,))[0]
    assert (tokens.cached_tokens, tokens.generated) == (0, REPLY.max_tokens)


def test_each_cause(tmp_path: Path) -> None:
    bodies = [THREAD + "one", "one", THREAD + "two", "one"]
    total, prefix = length("one")
    tokens = count(tmp_path, bodies)
    assert tokens.prompt_tokens == 4 * total + 2 * len(THREAD)
    assert tokens.duplicates == total
    assert tokens.instructions == 2 * prefix
    assert tokens.beginnings == len(THREAD)
    assert tokens.cached_tokens == total + 2 * prefix + len(THREAD)


def test_prompts_are_shared_within_a_unit_and_instructions_beyond(tmp_path: Path) -> None:
    total, prefix = length("one")
    tokens = count(tmp_path, ["one", "one"], unit_rows=1)
    assert (tokens.duplicates, tokens.instructions, tokens.beginnings) == (0, prefix, 0)
    assert tokens.computed_tokens == 2 * total - prefix + tokens.scored


def test_samples_share_their_prompt(tmp_path: Path) -> None:
    drawn = Task(name="reply", kind="generate", instruction="Answer.", max_tokens=8, temperature=1.0, samples=3)
    tokens = count(tmp_path, [THREAD], (drawn,))
    total, prefix = length(THREAD, (drawn,))
    assert (tokens.prompt_tokens, tokens.generated) == (3 * total, 24)
    assert tokens.computed_tokens == total + 2  # the last token of each is its own
    assert (tokens.instructions, tokens.beginnings) == (2 * prefix, 2 * (total - prefix - 1))


def test_rejects_are_those_of_the_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, dirty_tickets(), TASKS)
    tokens = count_tokens(plan, prompts_of(plan))
    expected = {"null_text": 2, "blank_text": 3, "invalid_utf8": 1, "prompt_too_long": 1}
    assert (dict(tokens.rejects), tokens.rows) == (expected, 40)


def test_a_large_job_is_estimated_from_whole_units(tmp_path: Path) -> None:
    bodies = [f"ticket number {row:04}" for row in range(100)]
    table = pa.table({"ticket_id": [str(row) for row in range(100)], "body": bodies})
    plan = plan_of(tmp_path, table, (POLICY,), unit_rows=10)
    whole = count_tokens(plan, prompts_of(plan))
    part = count_tokens(plan, prompts_of(plan), max_rows=35)
    assert (whole.is_estimate, whole.rows) == (False, 100)
    assert (part.is_estimate, part.rows) == (True, 40)
    # Rows of one length: what is counted row by row is exact, and instructions are computed once, however many rows.
    for name in ("prompt_tokens", "instructions", "duplicates", "scored"):
        assert getattr(part, name) == getattr(whole, name)
    assert part.beginnings == pytest.approx(whole.beginnings, rel=0.05)
    assert count_tokens(plan, prompts_of(plan), max_rows=35) == part


def test_a_unit_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, tickets(20), (POLICY,), unit_rows=10)
    write_tickets(tmp_path / "in", "a.parquet", tickets(21))
    tokens = count_tokens(plan, prompts_of(plan))
    assert (tokens.rows, tokens.prompt_tokens, tokens.is_estimate) == (0, 0, False)
    assert len(tokens.unreadable) == 2
    assert "changed since" in tokens.unreadable[0]
