"""What a run costs: never a number that nobody measured or gave."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cost import cost_of, find_rate, projection, projection_text, spent_seconds
from jobs.run import plan_job, plan_tokens, run
from jobs.spec import JobSpec, load_spec
from pipelines.stop import Call, read_calls, write_call
from pipelines.tokens import Tokens
from tests.fake_jobs import job_file, open_planned_engine

IN_PROCESS = {"runner": "portable", "options": ["--runner=FnApiRunner"]}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return load_spec(str(job_file(tmp_path)), {"deploy": IN_PROCESS})


def test_cost_is_time_by_price(spec: JobSpec) -> None:
    assert cost_of(1800, 4.0) == 2.0
    assert cost_of(1800, 0.0) is None
    call = Call(call_id="c", started=0.0, seconds=60.0, model_fingerprint="f", runner="local")
    assert spent_seconds([call, replace(call, seconds=30.0)]) == 90.0


def test_before_anything_ran_time_and_cost_are_unknown(spec: JobSpec) -> None:
    spec = replace(spec, price_per_hour=4.0)
    plan = plan_job(spec)
    assert find_rate(spec, plan) is None
    projected = projection(spec, plan, plan_tokens(spec, plan), None)
    assert set(projected.values()) == {None}
    assert "unknown until the job ran once" in projection_text(projected)


def test_a_given_rate_is_used_and_named(spec: JobSpec) -> None:
    spec = replace(spec, tokens_per_second=50.0)
    plan = plan_job(spec)
    rate = find_rate(spec, plan)
    assert rate is not None
    tokens = Tokens(rows=40, prompt_tokens=900, generated=100)
    projected = projection(spec, plan, tokens, rate)
    assert projected == {
        "seconds": 20.0,
        "cost": None,
        "tokens_per_second": 50.0,
        "rate_from": "[deploy] tokens_per_second",
    }
    assert projection_text(projected) == (
        "  time about 20 s, cost: set [deploy] price_per_hour, by 50 tokens/s, [deploy] tokens_per_second"
    )
    assert projection(replace(spec, price_per_hour=360.0), plan, tokens, rate)["cost"] == 2.0


def test_the_last_run_of_the_job_tells_the_rate(spec: JobSpec, tmp_path: Path) -> None:
    summary, manifest = run(spec, open_engine=open_planned_engine)
    (call,) = read_calls(summary.output)
    write_call(summary.output, replace(call, seconds=10.0))
    edited = replace(spec, tokens_per_second=1.0, max_prompt_tokens=4000)  # another run of the same job
    plan = plan_job(edited)
    assert plan.run_id != summary.run_id
    rate = find_rate(edited, plan)
    assert rate is not None
    assert rate.tokens_per_second == manifest.computed_tokens / 10.0
    assert rate.written_per_row == manifest.output_tokens / manifest.rows_annotated
    assert rate.source == f"measured in {summary.run_id}"
    # A second call, killed after 10 s more, did nothing: it was paid for all the same.
    write_call(summary.output, replace(call, call_id="killed", started=call.started + 60, seconds=10.0))
    slower = find_rate(edited, plan)
    assert slower is not None
    assert slower.tokens_per_second == manifest.computed_tokens / 20.0
    projected = projection(edited, plan, plan_tokens(edited, plan), slower)
    assert projected["seconds"] > 0


@pytest.mark.parametrize("changed", ["runner", "model_fingerprint"])
def test_a_run_by_another_model_or_runner_tells_nothing(spec: JobSpec, changed: str) -> None:
    summary, _ = run(spec, open_engine=open_planned_engine)
    (call,) = read_calls(summary.output)
    write_call(summary.output, replace(call, **{changed: "another"}))  # type: ignore[arg-type]
    assert find_rate(spec, plan_job(spec)) is None


def test_a_folder_that_is_no_run_of_the_job_tells_nothing(spec: JobSpec, tmp_path: Path) -> None:
    summary, _ = run(spec, open_engine=open_planned_engine)
    Path(summary.output).rename(tmp_path / "out" / "sweep-of-another-job-000000000000")
    (tmp_path / "out" / "_cache").mkdir(exist_ok=True)
    assert find_rate(spec, plan_job(spec)) is None
