"""The report: totals, reasons, samples; and a ticket in it is never more than text."""

from pathlib import Path

import pyarrow as pa
import pytest

from jobs.report import CLIP, clip, read_manifest, render, report, text_report
from jobs.run import run
from jobs.spec import load_spec
from pipelines.commit import read_plan
from schemas.errors import SpecError
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import write_tickets


def run_job(folder: Path) -> str:
    return run(load_spec(str(job_file(folder))), open_engine=open_planned_engine)[0].output


def test_report_accounts_for_every_row(tmp_path: Path) -> None:
    output = run_job(tmp_path)
    html = Path(output, "report.html").read_text(encoding="utf-8")
    plan = read_plan(output)
    text = text_report(plan, read_manifest(plan))
    for code, rows in {"null_text": 2, "blank_text": 3, "invalid_utf8": 1, "prompt_too_long": 1}.items():
        assert f"{rows} × <code>{code}</code>" in html
        assert f"{rows} × {code}" in text
    assert "40 in = 33 annotated + 7 rejected" in text
    for name in Path(output, "data").iterdir():
        assert f'href="data/{name.name}"' in html
    assert "byte 3" in html or "offset 3" in html  # the invalid row says where
    assert "ticket 0" in html


def test_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    html = Path(run_job(tmp_path), "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "src=" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "default-src 'none'" in html


def test_ticket_text_is_escaped_clipped_and_cannot_turn_the_page(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    nasty = "<script>alert(1)</script> \u202e\x1b[31m " + "y" * 400
    table = pa.table({"ticket_id": ['"><img src=x>'], "body": [nasty]})
    write_tickets(tmp_path / "in", "a.parquet", table)
    summary, _ = run(load_spec(str(path)), open_engine=open_planned_engine)
    html = Path(summary.output, "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html
    assert "<img" not in html
    assert "y" * CLIP not in html
    assert not {"\u202e", "\x1b"} & set(html)


def test_clip_marks_what_it_hides() -> None:
    assert clip("a\x00b") == "a\N{REPLACEMENT CHARACTER}b"
    assert clip("x" * (CLIP + 1)) == "x" * CLIP + "…"
    assert clip("x" * CLIP) == "x" * CLIP


def test_report_names_the_rejected_file(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    write_tickets(tmp_path / "in", "b.parquet", pa.table({"ticket_id": ["1"], "text": ["hello"]}))
    summary, _ = run(load_spec(str(path)), open_engine=open_planned_engine)
    text, facts = report(summary.output)
    assert "b.parquet: missing_column" in text
    assert facts["rejected_files"][0]["error_code"] == "missing_column"
    assert "missing_column" in Path(summary.output, "report.html").read_text(encoding="utf-8")


def test_report_of_no_run_and_of_an_unfinished_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"plan\.json"):
        report(str(tmp_path))
    output = run_job(tmp_path)
    Path(output, "_manifest.json").unlink()
    with pytest.raises(SpecError, match="not finished"):
        report(output)


def test_columns_of_every_string_type_are_shown(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    body = pa.array(["dictionary body", "dictionary body"]).dictionary_encode()
    table = pa.table({"ticket_id": pa.array([7, 8], pa.int64()), "body": body})
    write_tickets(tmp_path / "in", "a.parquet", table)
    summary, _ = run(load_spec(str(path)), open_engine=open_planned_engine)
    html = Path(summary.output, "report.html").read_text(encoding="utf-8")
    assert "<bdi>7</bdi>" in html
    assert "dictionary body" in html


def test_report_of_many_files_lists_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(load_spec(str(job_file(tmp_path)), {}), open_engine=open_planned_engine)
    plan = read_plan(str(next((tmp_path / "out").glob("sweep-*"))))
    manifest = read_manifest(plan)
    monkeypatch.setattr("jobs.report.FILES", 2)
    page = render(plan, manifest)
    assert [f"<code>{name}</code>" in page for name in manifest.data] == [True, True, False, False]
    assert "4 data files" in page
    assert "the first 2 here" in page
