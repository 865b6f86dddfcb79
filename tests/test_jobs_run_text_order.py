"""`text_order = "shared"`: the order is chosen once, stands in the plan, and is the only thing that differs."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.run
from jobs.cli import main
from jobs.replay import replay
from jobs.run import plan_job, run
from jobs.spec import JobSpec, load_spec
from jobs.verify import verify
from pipelines.commit import read_plan
from tests.fake_jobs import checkpoint, open_planned_engine, run_here
from tests.fakes import write_tickets

LONG = "As it was written before, and then again, and once more. "
ANSWERS = ("ticket_id", "policy_label", "policy_score", "policy_scores", "prompt_hash", "status")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job over tickets whose last text column repeats; some rows lack one of the columns."""
    table = pa.table(
        {
            "ticket_id": [f"T{row}" for row in range(24)],
            "body": [None if row % 7 == 0 else f"{row} is the number of this ticket" for row in range(24)],
            "product": [None if row % 5 == 0 else f"{row % 2} is the product. {LONG * 2}" for row in range(24)],
        }
    )
    write_tickets(tmp_path / "in", "a.parquet", table, row_group_size=12)
    path = tmp_path / "job.toml"
    path.write_text(
        f"""
[job]
name = "sweep"
[input]
urls = ["{tmp_path}/in/"]
columns = {{ id = "ticket_id", text = ["body", "product?"] }}
unit_rows = 12
[output]
url = "{tmp_path}/out/"
[model]
checkpoint = "{checkpoint(tmp_path / "checkpoint")}"
[deploy]
runner = "portable"
options = ["--runner=FnApiRunner"]
[[task]]
name = "policy"
kind = "choose"
labels = {{ "safe" = "ordinary talk", "spam" = "adverts" }}
[limits]
max_reject_rate = 1.0
max_prompt_tokens = 4096
[cache]
max_gb = 0
""",
        encoding="utf-8",
    )
    return path


def spec_of(job: Path, **input_: Any) -> JobSpec:
    return load_spec(str(job), {"input": input_})


def answers(output: str) -> dict[str, list[Any]]:
    table = pq.read_table(f"{output}/data", columns=list(ANSWERS))
    values: dict[str, list[Any]] = table.sort_by("ticket_id").to_pydict()
    return values


def test_every_row_is_answered_as_if_the_chosen_order_had_been_given(job: Path) -> None:
    chosen = run_here(spec_of(job, text_order="shared"))
    columns = {"id": "ticket_id", "text": ["product?", "body"]}
    turned = run_here(spec_of(job, columns=columns))
    given = run_here(spec_of(job))
    folders = [str(job.parent / "out" / manifest.run_id) for manifest in (chosen, turned, given)]
    assert len(set(folders)) == 3
    plans = [read_plan(folder).columns for folder in folders]
    assert [plan.text for plan in plans] == [("product", "body"), ("product", "body"), ("body", "product")]
    assert plans[0].optional == ("product",)
    assert answers(folders[0]) == answers(folders[1]) != answers(folders[2])
    assert (chosen.rows_annotated, chosen.prompt_tokens) == (turned.rows_annotated, turned.prompt_tokens)


def test_an_order_is_chosen_once(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(job, text_order="shared")
    said: list[str] = []
    first, _ = run(spec, say=said.append, open_engine=open_planned_engine)
    assert "  order of the text columns: product, body" in said
    before = answers(first.output)
    monkeypatch.setattr(jobs.run, "fewest_tokens", lambda counts: pytest.fail("chosen again"))
    monkeypatch.setattr(jobs.run, "count_orders", lambda *arguments: pytest.fail("counted again"))
    assert run(spec, open_engine=open_planned_engine)[0].rows_annotated == first.rows_annotated
    receipts = sorted(Path(first.output, "receipts").iterdir())
    receipts[0].unlink()
    Path(first.output, "_SUCCESS").unlink()
    resumed, _ = run(spec, open_engine=open_planned_engine)
    assert (resumed.run_id, resumed.status) == (first.run_id, "complete")
    assert answers(first.output) == before
    assert verify(first.output) == []
    assert replay(first.output, 24, open_engine=open_planned_engine).is_equal


def test_what_stands_in_the_plan_is_asked_whatever_would_be_chosen_now(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(job, text_order="shared")
    with monkeypatch.context() as patch:
        patch.setattr(jobs.run, "fewest_tokens", lambda counts: ("body", "product"))
        manifest = run_here(spec)
    assert plan_job(spec).columns.text == ("body", "product")
    assert run_here(spec) == manifest


def test_one_column_has_one_order(job: Path) -> None:
    columns = {"id": "ticket_id", "text": ["body"]}
    assert plan_job(spec_of(job, columns=columns, text_order="shared")).columns.text == ("body",)


def test_plan_tells_the_tokens_of_each_order_whatever_the_setting(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(job), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text_order"] == ["body", "product"]
    told = {tuple(each["text_order"]): each["computed_tokens"] for each in facts["text_orders"]}
    assert list(told) == [("body", "product"), ("product", "body")]
    assert told["body", "product"] == facts["computed_tokens"] > told["product", "body"]
    assert main(["plan", str(job)]) == 0
    text = capsys.readouterr().out
    assert 'text_order = "shared" asks with product, body' in text
    job.write_text(job.read_text().replace("unit_rows", 'text_order = "shared"\nunit_rows'))
    assert main(["plan", str(job)]) == 0
    text = capsys.readouterr().out
    assert f"product, body{told['product', 'body']:>35,}  as planned" in text
    assert "other prompts" not in text


def test_another_order_is_refused_by_name(job: Path) -> None:
    from schemas.errors import SpecError

    with pytest.raises(SpecError, match='text_order is "share", expected one of: given, shared') as caught:
        spec_of(job, text_order="share")
    assert 'did you mean "shared"?' in caught.value.remedy
