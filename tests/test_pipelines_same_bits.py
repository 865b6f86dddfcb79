"""One ticket, the same bits: through the whole flow with an INT8 model, whatever the cut, order, runner and workers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.verify import verify
from k2model.formats.checkpoint import fingerprint
from pipelines.commit import write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from pipelines.units import make_plan
from schemas.runs import Task
from schemas.tickets import TicketColumns
from tests.checkpoints import write_checkpoint

TASKS = (
    Task(name="policy", kind="choose", labels={"safe": "ordinary talk", "hate": "", "hate speech": ""}),
    Task(name="topics", kind="choose_many", labels={"bug": "", "praise": ""}),
    Task(name="reply", kind="generate", instruction="Answer.", max_tokens=5),
)
ANSWERS = (
    "policy_label",
    "policy_score",
    "policy_scores",
    "topics_labels",
    "topics_scores",
    "reply_text",
    "prompt_hash",
)


def tickets() -> pa.Table:
    words = [
        "the",
        "parcel",
        "never",
        "came",
        "and",
        "nobody",
        "answers",
        "my",
        "mail",
        "since",
        "the",
        "update",
        "of",
        "last",
        "week",
    ]
    texts = [" ".join(words[(i + j) % 15] for j in range(1 + (i * 7) % 23)) + f" {i}" for i in range(60)]
    return pa.table({"ticket_id": [f"T{i}" for i in range(60)], "body": texts})


def answers(
    folder: Path, table: pa.Table, checkpoint: str, unit_rows: int, runner: str = "local", workers: int = 1
) -> dict[str, dict[str, Any]]:
    """Return the answers by ticket id of one whole run."""
    folder.mkdir()
    pq.write_table(table, folder / "tickets.parquet", row_group_size=10)
    plan = make_plan(
        job="bits",
        urls=[str(folder / "tickets.parquet")],
        output=str(folder / "out"),
        columns=TicketColumns(id="ticket_id", text=("body",)),
        tasks=TASKS,
        checkpoint=checkpoint,
        model_fingerprint=fingerprint(checkpoint, "int8"),
        mode="cpu",
        max_prompt_tokens=1024,
        unit_rows=unit_rows,
    )
    write_plan(plan)
    run_units(plan, plan.units, runner=runner, workers=workers)
    assert finalize(plan, max_reject_rate=0).status == "complete"
    assert verify(plan.output) == []
    rows = pq.read_table(f"{plan.output}/data").to_pylist()
    return {row["ticket_id"]: {name: row[name] for name in ANSWERS} for row in rows}


def test_a_ticket_has_the_same_bits_in_any_company(tmp_path: Path, checkpoint: str) -> None:
    table = tickets()
    whole = answers(tmp_path / "whole", table, checkpoint, 60)
    assert len({str(answer["policy_scores"]) for answer in whole.values()}) == 60
    assert answers(tmp_path / "sevens", table, checkpoint, 7) == whole
    assert answers(tmp_path / "reversed", table.take(list(range(59, -1, -1))), checkpoint, 60) == whole
    assert answers(tmp_path / "alone", table.slice(17, 1), checkpoint, 60) == {"T17": whole["T17"]}
    assert answers(tmp_path / "dask", table, checkpoint, 10, runner="dask", workers=2) == whole


def test_the_comparison_would_see_one_bit(tmp_path: Path, checkpoint: str) -> None:
    """The test above can fail: another checkpoint of the same shape gives other bits."""
    other = str(write_checkpoint(tmp_path / "other", seed=1))
    table = tickets().slice(0, 3)
    assert answers(tmp_path / "a", table, checkpoint, 60) != answers(tmp_path / "b", table, other, 60)
