"""The command line: verbs, exit codes, JSON, and that stopping and starting again loses nothing."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.arguments import EXAMPLES
from jobs.cli import main
from pipelines.commit import to_parquet
from schemas.runs import Plan
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import FakeEngine

ROOT = Path(__file__).parents[1]
SUMMARY_KEYS = [
    "run_id",
    "status",
    "outcome",
    "rows_in",
    "rows_annotated",
    "rows_rejected",
    "rows_cached",
    "rows_left",
    "units",
    "units_left",
    "seconds",
    "seconds_left",
    "tickets_per_second",
    "prompt_tokens",
    "computed_tokens",
    "cost",
    "cost_left",
    "output",
    "restarts",
    "resume",
]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of one command."""
    code = main([str(word) for word in words], open_engine=open_planned_engine)
    out, err = capsys.readouterr()
    return code, out, err


def test_run_json_ends_with_one_object_of_exactly_the_documented_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "run", job_file(tmp_path), "--json")
    assert code == 0
    assert len(out.splitlines()) == 1
    summary: dict[str, Any] = json.loads(out)
    assert list(summary) == SUMMARY_KEYS
    assert (summary["rows_in"], summary["rows_annotated"], summary["rows_rejected"]) == (40, 33, 7)
    assert "40 tickets in 1 files" in err
    assert "MB in the largest process" in err


def test_the_verbs_of_a_run_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path)
    plan = json.loads(call(capsys, "plan", job, "--json")[1])
    assert (plan["rows"], plan["units"], plan["files"]) == (40, 4, 1)
    assert not (tmp_path / "out").exists()
    run = json.loads(call(capsys, "run", job, "--json")[1])
    assert run["run_id"] == plan["run_id"]
    code, out, _ = call(capsys, "status", run["output"], "--json")
    assert (code, json.loads(out)["status"], json.loads(out)["units_done"]) == (0, "complete", 4)
    code, out, _ = call(capsys, "verify", run["output"], "--json")
    assert (code, json.loads(out)) == (0, {"proven": True, "problems": []})
    code, out, _ = call(capsys, "verify", run["output"], "--replay", 5, "--json")
    replayed = {"rows": 5, "replayed": 5, "flips": [], "problems": []}
    assert (code, json.loads(out)) == (0, {"proven": True, "problems": [], "replay": replayed})
    code, out, _ = call(capsys, "report", run["output"])
    assert code == 0
    assert "40 in = 33 annotated + 7 rejected" in out


def test_a_run_with_a_unit_missing_is_unfinished_and_not_proven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = json.loads(call(capsys, "run", job_file(tmp_path), "--json")[1])["output"]
    next(Path(output, "receipts").iterdir()).unlink()
    code, out, _ = call(capsys, "status", output)
    assert code == 5
    assert "unfinished, 3 of 4 units done" in out
    (record,) = Path(output, "calls").iterdir()
    record.write_text(record.read_text().replace('"complete"', '"running"'))
    out = call(capsys, "status", output, "--json")[1]
    assert json.loads(out)["outcome"] == "running"
    record.write_text(re.sub(r'"started": [0-9.]+', '"started": 1000', record.read_text()))
    assert "unfinished (killed), 3 of 4 units done" in call(capsys, "status", output)[1]
    assert call(capsys, "verify", output)[0] == 5


def test_limits_of_the_command_line_stop_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path)
    code, out, err = call(capsys, "run", job, "--deadline", "0s")
    assert code == 5
    assert "incomplete (deadline)" in out
    assert "  left      40 rows (100.0%) in 4 of 4 units, unknown how long" in out
    assert f"  go on     k2batch run {job} --deadline 0s" in out
    assert "nothing is under way" in err
    assert call(capsys, "run", job, "--deadline", "soon")[0] == 2
    code, _, err = call(capsys, "run", job, "--max-cost", 3)
    assert code == 2
    assert "price_per_hour" in err
    assert "time and cost: unknown until the job ran once" in call(capsys, "plan", job)[1]


def test_a_flip_is_not_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = json.loads(call(capsys, "run", job_file(tmp_path), "--json")[1])["output"]
    for path in Path(output, "data").iterdir():
        table = pq.read_table(path)
        place = table.schema.get_field_index("gist_text")
        path.write_bytes(to_parquet(table.set_column(place, "gist_text", pa.array(["forged"] * len(table)))))
    code, out, _ = call(capsys, "verify", output, "--replay", 2, "--json")
    assert code == 5
    facts = json.loads(out)
    assert (facts["proven"], len(facts["problems"])) == (False, 4)
    assert [(flip["column"], flip["stored"]) for flip in facts["replay"]["flips"]] == [("gist_text", "forged")] * 2
    code, out, _ = call(capsys, "verify", output, "--replay", 2)
    assert code == 5
    assert "replayed 2 of 2 rows drawn, each alone: 2 flipped" in out


def test_plan_counts_tokens_and_rejects_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path)
    plan = json.loads(call(capsys, "plan", job, "--json")[1])
    run = json.loads(call(capsys, "run", job, "--json")[1])
    manifest = json.loads(Path(run["output"], "_manifest.json").read_text())
    assert plan["error_codes"] == manifest["error_codes"]
    assert plan["prompt_tokens"] == manifest["prompt_tokens"]
    assert (plan["rows_read"], plan["is_estimate"]) == (40, False)
    cached = sum(plan["cached_tokens"].values())
    assert plan["computed_tokens"] == plan["prompt_tokens"] - cached + plan["scored_tokens"]
    out = call(capsys, "plan", job)[1]
    assert "rows to be rejected: 7 (3 blank_text, 1 invalid_utf8, 2 null_text, 1 prompt_too_long)" in out
    assert f"{plan['computed_tokens']:,}" in out


def test_plan_opens_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path)
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    assert call(capsys, "plan", job)[0] == 0


def test_a_bad_file_exits_3_and_plan_says_so_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path)
    (tmp_path / "in" / "b.parquet").write_bytes(b"no table")
    code, out, _ = call(capsys, "plan", job)
    assert code == 3
    assert "b.parquet: unreadable_file" in out
    assert call(capsys, "run", job)[0] == 3
    assert call(capsys, "run", job, "--input", tmp_path / "in" / "a.parquet")[0] == 0


def test_errors_are_said_to_people_and_to_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path, more="max_rows = 3")
    code, out, err = call(capsys, "run", job, "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["code"] == "bad_spec"
    assert 'no key "max_rows"' in error["message"]
    assert error["remedy"] in err
    code, out, err = call(capsys, "run", job)
    assert (code, out) == (2, "")
    assert "remedy:" in err


def test_a_missing_checkpoint_exits_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "run", job_file(tmp_path), "--checkpoint", tmp_path / "nowhere")
    assert code == 4
    assert "nowhere" in err


def test_no_input_and_too_many_rejects_have_their_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", job_file(tmp_path), "--input", tmp_path / "none-*.parquet")[0] == 2
    assert call(capsys, "run", job_file(tmp_path, max_reject_rate=0.0))[0] == 6


def test_a_wrong_command_line_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["annotate"])
    assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize("verb", EXAMPLES)
def test_every_verb_shows_its_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert EXAMPLES[verb] in capsys.readouterr().out


def test_help_names_every_verb_and_exit_code_and_every_verb_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {code}  " in out for code in (0, 1, 2, 3, 4, 5, 6))
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line.strip()]
    assert set(EXAMPLES) <= set(listed)
    with pytest.raises(SystemExit):
        main(["nothing"])
    choices = capsys.readouterr().err.rpartition("choose from ")[2]
    assert {word.strip(" ')\n") for word in choices.split(",")} == set(EXAMPLES)


def test_help_loads_nothing_heavy() -> None:
    # Time differs from machine to machine; what takes it does not.
    code = textwrap.dedent("""
        import sys
        from jobs.cli import main
        try:
            main(["--help"])
        except SystemExit:
            pass
        heavy = {"apache_beam", "dask", "fsspec", "jinja2", "k2model", "numpy", "pyarrow", "tokenizers", "torch"}
        print(sorted(heavy & set(sys.modules)), file=sys.stderr)
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_leaving_keeps_the_exit_code_whatever_threads_are_in_libraries() -> None:
    code = textwrap.dedent("""
        import atexit, io, threading, time
        import pyarrow as pa, pyarrow.parquet as pq
        from jobs.cli import leave

        class Slow(io.BytesIO):
            def read(self, *size):
                read.set()
                time.sleep(0.01)
                return super().read(*size)

        def keep_reading():
            while True:
                pq.ParquetFile(pa.PythonFile(Slow(file.getvalue()), mode="r"), pre_buffer=True).read()

        read, file = threading.Event(), io.BytesIO()
        pq.write_table(pa.table({"a": range(1000)}), file)
        atexit.register(print, "exit handlers ran")
        threading.Thread(target=keep_reading, daemon=True).start()
        read.wait()
        leave(5)
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (5, "exit handlers ran\n", "")


def test_a_bug_exits_1_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(plan: Plan) -> FakeEngine:
        raise ZeroDivisionError("oh")

    assert main(["run", str(job_file(tmp_path)), "--json"], open_engine=broken) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "bug"
    assert "Traceback" in err
