"""The order of the text columns: all are tried, the engine computes what is told of each, and the fewest is chosen."""

from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2model.engine.engine import Engine
from pipelines.annotate import Block, annotate
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from pipelines.text_order import fewest_tokens, orders_of
from pipelines.tokens import Tokens, count_orders, count_tokens
from schemas.tickets import TicketColumns
from tests.checkpoints import write_checkpoint
from tests.fakes import POLICY, fake_plan, fake_tokenizer, write_tickets

NAMES = ("body", "product", "thread")
COLUMNS = TicketColumns(id="ticket_id", text=NAMES)
PROMPTS = Prompts((POLICY,), fake_tokenizer(), 4096)
LONG = "As it was written before, and then again, and once more. "


def products(rows: int) -> pa.Table:
    """Return tickets of three products, which stand in the last column and would be computed again for each."""
    numbers = range(rows)
    return pa.table(
        {
            "ticket_id": [str(row) for row in numbers],
            "body": [f"{row} is the number of this ticket" for row in numbers],
            "product": [f"{row % 3} is the product. {LONG}" for row in numbers],
            "thread": pa.array([None] * rows, pa.string()),
        }
    )


def test_all_orders_of_few_columns_and_those_that_move_one_of_many_to_the_front() -> None:
    assert orders_of(("a", "b")) == [("a", "b"), ("b", "a")]
    assert sorted(orders_of("abcd")) == sorted(permutations("abcd"))
    assert orders_of("abcde") == [tuple(order) for order in ("abcde", "bacde", "cabde", "dabce", "eabcd")]


def test_of_equal_orders_the_given_one_and_none_for_which_a_row_is_lost() -> None:
    few, many = Tokens(prompt_tokens=10), Tokens(prompt_tokens=20)
    assert fewest_tokens({("a", "b"): few, ("b", "a"): few}) == ("a", "b")
    assert fewest_tokens({("a", "b"): many, ("b", "a"): few}) == ("b", "a")
    few.rejects["prompt_too_long"] += 1
    assert fewest_tokens({("a", "b"): many, ("b", "a"): few}) == ("a", "b")


def test_the_engine_computes_in_each_order_what_is_told_of_it(tmp_path: Path) -> None:
    write_tickets(tmp_path / "in", "a.parquet", products(12), row_group_size=6)
    engine = Engine.open(str(write_checkpoint(tmp_path / "model", max_position_embeddings=4096)))
    computed = {}
    for order in orders_of(("body", "product")):
        columns = TicketColumns(id="ticket_id", text=order)
        plan = fake_plan([tmp_path / "in"], tmp_path / "out", tasks=(POLICY,), unit_rows=6, columns=columns)
        counts = count_orders(plan, PROMPTS, orders_of(order))
        assert fewest_tokens(counts) == ("product", "body")
        blocks = [annotate(Block(unit, read_unit(unit), 0.0), plan, PROMPTS, engine) for unit in plan.units]
        computed[order] = sum(block.computed_tokens for block in blocks)
        instructions = PROMPTS.requests("x")[0].num_prefix_tokens
        assert counts[order] == count_tokens(plan, PROMPTS)
        assert counts[order].computed_tokens == computed[order] + instructions
    engine.close()
    assert computed["product", "body"] < computed["body", "product"]


def test_all_orders_together_tokenize_no_more_rows_than_the_plan(tmp_path: Path) -> None:
    write_tickets(tmp_path / "in", "a.parquet", products(120), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", tasks=(POLICY,), unit_rows=10, columns=COLUMNS)
    counts = count_orders(plan, PROMPTS, orders_of(NAMES), max_rows=120)
    assert {tokens.rows for tokens in counts.values()} == {20}
    assert all(tokens.is_estimate for tokens in counts.values())
    assert count_tokens(plan, PROMPTS, max_rows=120).rows == 120


def test_a_unit_that_cannot_be_read_chooses_nothing(tmp_path: Path) -> None:
    write_tickets(tmp_path / "in", "a.parquet", products(20))
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", tasks=(POLICY,), columns=COLUMNS)
    write_tickets(tmp_path / "in", "a.parquet", products(21))
    counts = count_orders(plan, PROMPTS, orders_of(NAMES))
    assert fewest_tokens(counts) == NAMES
    assert {len(tokens.unreadable) for tokens in counts.values()} == {1}


TEXT = st.sampled_from([None, "", "a", "no", LONG, LONG + "a", LONG * 2, "Other words that are long enough to share. "])


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_no_order_is_chosen_that_computes_more_than_the_given_one(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str | None, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("orders")
    columns = {name: pa.array([row[place] for row in rows], pa.string()) for place, name in enumerate(NAMES)}
    table = pa.table({"ticket_id": [str(row) for row in range(len(rows))], **columns})
    write_tickets(folder / "in", "a.parquet", table, row_group_size=5)
    plan = fake_plan([folder / "in"], folder / "out", tasks=(POLICY,), unit_rows=5, columns=COLUMNS)
    counts = count_orders(plan, PROMPTS, orders_of(NAMES))
    chosen = counts[fewest_tokens(counts)]
    assert chosen.computed_tokens <= counts[NAMES].computed_tokens
    assert chosen.computed_tokens == min(tokens.computed_tokens for tokens in counts.values())
    # Whatever the order, the same rows are annotated.
    assert len({tuple(sorted(tokens.rejects.items())) for tokens in counts.values()}) == 1
    # And whatever was given, as few are computed.
    turned = count_orders(plan, PROMPTS, orders_of(NAMES[::-1]))
    assert turned[fewest_tokens(turned)].computed_tokens == chosen.computed_tokens
