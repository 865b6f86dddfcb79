"""A batch file through the whole flow: order, errors beside answers, resumption, the same bits in any company."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from openai.types.batch_request_counts import BatchRequestCounts

from jobs import batch
from jobs.cli import main
from jobs.replay import replay
from jobs.verify import verify
from pipelines import graph, runners
from pipelines.annotate import Block, OpenEngine, annotate
from pipelines.commit import commit
from pipelines.read import read_unit
from schemas.runs import Plan, Unit
from tests.checkpoints import write_checkpoint
from tests.fake_jobs import open_planned_engine
from tests.fakes import FakeEngine
from tests.s3_servers import BUCKET, moto, s3_environment


def request(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"ticket {number}"}]
    body = {"model": "gpt-4o-mini", "messages": messages, "max_tokens": 6, **more}
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, *lines: dict[str, Any] | bytes) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotate without Beam and its processes: the same steps, called in turn. What those do, other tests hold."""
    monkeypatch.setattr(runners, "run_units", annotate_here())


def annotate_here(most: int | None = None) -> Callable[..., None]:
    """Return what stands in for `run_units`, and ends after `most` units as at a deadline."""

    def run_units(plan: Plan, units: Sequence[Unit], *, open_engine: OpenEngine | None, **_: object) -> None:
        engine, prompts = graph.engine_and_prompts(plan, open_engine or graph.open_model)
        for unit in units[:most]:
            commit(annotate(Block(unit, read_unit(unit), time.perf_counter()), plan, prompts, engine), plan)
        graph.close_engines()

    return run_units


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "tiny", max_position_embeddings=8192))


def answer(source: Path | str, output: Path | str, checkpoint: str, open_engine: Any = open_planned_engine) -> Any:
    errors = batch.default_errors(str(output))
    overrides = {"model": {"checkpoint": checkpoint}}
    return batch.answer_batch(
        str(source), str(output), errors, max_tokens=16, overrides=overrides, open_engine=open_engine
    )


def open_no_engine(plan: Plan) -> FakeEngine:
    raise AssertionError("a finished batch must not open the model")


DIRT = (
    b"",
    b"{not json",
    b'{"custom_id": "caf\xe9"}',
    {**request(1), "body": {"model": "m", "messages": [{"role": "user", "content": "again"}]}},
    request(901, top_k=4),
    request(902, messages=[{"role": "user", "content": "x" * 20_000}]),
    {**request(903), "url": "/v1/embeddings"},
)


@pytest.mark.usefixtures("here")
def test_every_line_has_its_result_in_order_and_dirt_touches_no_neighbour(tmp_path: Path, tiny: str) -> None:
    clean = [request(number) for number in range(8)]
    mixed: list[Any] = [line for pair in zip(clean, (*DIRT, request(8)), strict=True) for line in pair]
    found, code = answer(write(tmp_path / "in.jsonl", *mixed), tmp_path / "out.jsonl", tiny)
    assert (found.status, code) == ("complete", 0)
    counts = BatchRequestCounts.model_validate(found.request_counts, strict=True)
    assert (counts.total, counts.completed, counts.failed) == (16, 9, 7)
    assert (found.models, found.model) == ({"gpt-4o-mini": 10}, "tiny")
    answers, errors = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    assert [line["custom_id"] for line in answers] == [f"id-{number}" for number in range(9)]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in answers)
    assert [line["custom_id"] for line in errors] == [None, None, None, "id-1", "id-901", "id-902", "id-903"]
    assert [line["error"] and line["error"]["line"] for line in errors] == [2, 4, 6, 8, None, None, None]
    statuses = [line["response"] and line["response"]["status_code"] for line in errors]
    assert statuses == [None, None, None, None, 400, 400, 400]
    assert errors[5]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert verify(found.run.output) == []
    assert replay(found.run.output, 3, open_engine=open_planned_engine).is_equal

    alone, _ = answer(write(tmp_path / "one.jsonl", request(5)), tmp_path / "one.out.jsonl", tiny)
    assert alone.errors == ""
    assert not (tmp_path / "one.out.errors.jsonl").exists()
    assert read(tmp_path / "one.out.jsonl") == [answers[5]]


@pytest.mark.usefixtures("here")
def test_again_costs_nothing_and_a_changed_file_is_another_batch(tmp_path: Path, tiny: str) -> None:
    source, output = write(tmp_path / "in.jsonl", request(1), b"x"), tmp_path / "out.jsonl"
    first, _ = answer(source, output, tiny)
    written = output.read_bytes()
    output.unlink()
    again, code = answer(source, output, tiny, open_no_engine)
    assert (again.request_counts, again.run.output, code) == (first.request_counts, first.run.output, 0)
    assert output.read_bytes() == written
    changed, _ = answer(write(source, request(2)), output, tiny)
    assert changed.run.output != first.run.output
    assert [line["custom_id"] for line in read(output)] == ["id-2"]
    assert not (tmp_path / "out.errors.jsonl").exists()  # that of the batch before


@pytest.mark.parametrize(("lines", "code"), [((), 0), ((b"x", b"y"), 6)], ids=["empty", "nothing answered"])
@pytest.mark.usefixtures("here")
def test_a_file_without_an_answer(lines: tuple[bytes, ...], code: int, tmp_path: Path, tiny: str) -> None:
    found, exit_code = answer(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", tiny)
    assert (found.status, exit_code) == ("complete", code)
    assert found.request_counts == {"total": len(lines), "completed": 0, "failed": len(lines)}
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.usefixtures("here")
def test_files_are_urls_and_a_last_line_needs_no_end(tmp_path: Path, tiny: str) -> None:
    MemoryFileSystem.store.clear()
    lines = b"\n".join(json.dumps(request(number)).encode() for number in range(3))
    MemoryFileSystem().pipe_file("/batch/in.jsonl", b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    found, code = answer("memory://batch/in.jsonl", "memory://batch/out.jsonl", tiny)
    assert (found.request_counts["completed"], code) == (3, 0)
    assert MemoryFileSystem().cat_file("/batch/out.jsonl").count(b"\n") == 3


@pytest.mark.usefixtures("here")
def test_a_bucket_holds_requests_work_and_answers(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.call_s3("create_bucket", Bucket=BUCKET)
        store.pipe_file(f"{BUCKET}/in.jsonl", write(tmp_path / "in.jsonl", request(1), b"x").read_bytes())
        found, code = answer(f"s3://{BUCKET}/in.jsonl", f"s3://{BUCKET}/out.jsonl", tiny)
        assert (found.errors, code) == (f"s3://{BUCKET}/out.errors.jsonl", 0)
        answers, errors = (store.cat_file(f"{BUCKET}/{name}") for name in ("out.jsonl", "out.errors.jsonl"))
        assert (answers.count(b"\n"), errors.count(b"\n")) == (1, 1)
        assert found.run.output.startswith(f"s3://{BUCKET}/out.jsonl.k2batch/")
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("here")
def test_many_lines_are_many_files_and_units_in_order(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_FILE_LINES", 3)
    monkeypatch.setattr(batch, "_READ_BYTES", 50)
    monkeypatch.setattr(batch, "UNIT_LINES", 2)
    lines = [request(number) for number in range(40)]
    found, _ = answer(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", tiny)
    assert [line["custom_id"] for line in read(tmp_path / "out.jsonl")] == [line["custom_id"] for line in lines]
    assert len(list((tmp_path / "out.jsonl.k2batch").glob("lines-*/*.parquet"))) == 14
    assert len(list(Path(found.run.output, "receipts").iterdir())) == 27


@pytest.mark.usefixtures("here")
def test_a_killed_batch_publishes_nothing_and_resumes_to_the_same_bytes(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [request(number) for number in range(24)]
    whole = tmp_path / "whole.jsonl"
    answer(write(tmp_path / "in.jsonl", *lines), whole, tiny)
    output = tmp_path / "out.jsonl"
    code = (
        "import sys; from jobs import batch; from tests.fakes import FakeEngine\n"
        "batch.UNIT_LINES = 3\n"
        "def opened(plan): return FakeEngine(fingerprint=plan.model_fingerprint, pause_s=0.5)\n"
        "source, output, checkpoint = sys.argv[1:]\n"
        "batch.answer_batch(source, output, batch.default_errors(output), max_tokens=16,\n"
        "    overrides={'model': {'checkpoint': checkpoint}}, open_engine=opened)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in.jsonl"), str(output), tiny]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    receipts: list[Path] = []
    while not receipts and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        receipts = list((tmp_path / "out.jsonl.k2batch").glob("batch-*/receipts/*.json"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert 0 < len(receipts) < 8
    assert not output.exists()

    monkeypatch.setattr(batch, "UNIT_LINES", 3)
    log = tmp_path / "log"
    monkeypatch.setenv("K2_FAKE_LOG", str(log))
    found, exit_code = answer(tmp_path / "in.jsonl", output, tiny)
    assert (found.status, exit_code) == ("complete", 0)
    assert output.read_bytes() == whole.read_bytes()
    assert sum(int(line.split()[1]) for line in log.read_text().splitlines()) < 24  # what was done was not done again


def test_what_is_not_complete_is_not_published(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "UNIT_LINES", 2)
    monkeypatch.setattr(runners, "run_units", annotate_here(1))
    source, output = write(tmp_path / "in.jsonl", *map(request, range(5))), tmp_path / "out.jsonl"
    command = ["batch", "-i", str(source), "-o", str(output), "--checkpoint", tiny]
    assert main(command, open_engine=open_planned_engine) == 5
    printed = capsys.readouterr().out
    assert "5 requests, 2 completed, 0 failed" in printed
    assert f"k2batch batch -i {source}" in printed  # how to go on
    assert not output.exists()
    monkeypatch.setattr(runners, "run_units", annotate_here())
    assert main(command, open_engine=open_planned_engine) == 0
    assert len(read(output)) == 5


@pytest.mark.usefixtures("here")
def test_one_request_has_the_same_bits_in_any_company(tmp_path: Path, checkpoint: str) -> None:
    """With a real model: sampled, greedy, by a schema, and scored."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 7, "n": 2},
        {"response_format": named, "max_tokens": 40},
    ]
    lines = [request(number, **kinds[number % 3]) for number in range(12)]
    found, _ = answer(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", checkpoint, None)
    whole = read(tmp_path / "out.jsonl")
    assert found.request_counts["completed"] == 12
    assert json.loads(whole[2]["response"]["body"]["choices"][0]["message"]["content"])["a"] in ("x", "y")
    answer(write(tmp_path / "few.jsonl", *lines[9:], lines[4]), tmp_path / "few.out.jsonl", checkpoint, None)
    assert read(tmp_path / "few.out.jsonl") == [*whole[9:], whole[4]]


@pytest.mark.usefixtures("here")
def test_the_command_prints_counts_and_says_what_is_wrong(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in.jsonl", request(1), b"x"), tmp_path / "out"
    command = ["batch", "-i", str(source), "-o", str(output), "--checkpoint", tiny]
    assert main(command, open_engine=open_planned_engine) == 0
    printed = capsys.readouterr().out
    assert "2 requests, 1 completed, 1 failed" in printed
    assert f"{output}.errors" in printed
    assert main([*command, "--json", "--errors", str(tmp_path / "bad.jsonl")], open_engine=open_planned_engine) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert facts["errors"] == str(tmp_path / "bad.jsonl")
    assert main(["batch", "-i", str(tmp_path / "no.jsonl"), "-o", str(output)]) == 2
    assert main(["batch", "-i", str(source), "-o", str(source)]) == 2


def test_names_of_error_files() -> None:
    assert batch.default_errors("a/out.jsonl") == "a/out.errors.jsonl"
    assert batch.default_errors("s3://b.c/out") == "s3://b.c/out.errors"
