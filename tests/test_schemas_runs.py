"""Plans survive the way through JSON, whatever their tasks ask."""

from pathlib import Path

from schemas.annotations import task_columns
from schemas.runs import Plan, Task
from tests.fakes import TASKS, fake_plan, tickets, write_tickets

FIELDS = Task(name="fields", kind="generate", instruction="?", json_schema='{"type": "object"}', stop=("\n\n", "é"))
DRAWN = Task(name="drawn", kind="generate", instruction="?", choices=("a", "b"), temperature=0.5, samples=4, seed=2**62)


def test_a_plan_is_the_same_after_json(tmp_path: Path) -> None:
    url = write_tickets(tmp_path, "a.parquet", tickets(3))
    plan = fake_plan([url], tmp_path / "out", tasks=(*TASKS, FIELDS, DRAWN))
    assert Plan.from_json(plan.to_json(), plan.units) == plan
    others = [fake_plan([url], tmp_path / "out", tasks=tasks) for tasks in (TASKS, (*TASKS, FIELDS), (*TASKS, DRAWN))]
    assert len({plan.run_id, *(other.run_id for other in others)}) == 4


def test_a_task_written_before_there_were_grammars_is_read() -> None:
    raw = {"name": "team", "kind": "choose", "labels": {"a": "", "b": ""}, "threshold": 0.5, "max_tokens": 64}
    assert Task.from_dict(raw) == Task(name="team", kind="choose", labels={"a": "", "b": ""})


def test_columns_of_a_schema_and_of_samples_are_there_where_they_are_asked_for() -> None:
    names = [[field.name for field in task_columns(task, "p_")] for task in (FIELDS, DRAWN)]
    assert names == [
        ["p_fields_text", "p_fields_finish_reason", "p_fields_json"],
        ["p_drawn_text", "p_drawn_finish_reason", "p_drawn_samples"],
    ]
