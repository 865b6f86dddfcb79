"""What changed between two runs: counted by id, in any order of rows, with bounded memory."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import churn as churn_module
from jobs.churn import NOT_GIVEN, REJECTED, Churn, churn, read_churn
from jobs.cli import main
from jobs.report import read_manifest, report
from jobs.spec import load_spec
from pipelines.commit import read_plan
from schemas.errors import SpecError
from tests.fake_jobs import dirty_tickets, job_file, run_here
from tests.fakes import write_tickets

TOPICS = '[[task]]\nname = "topics"\nkind = "choose_many"\nlabels = ["billing", "login", "other"]\n'


def annotate(path: Path) -> str:
    """Run the job; return the run's folder."""
    manifest = run_here(load_spec(str(path)))
    assert manifest.status == "complete"
    return str(path.parent / "out" / manifest.run_id)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def compare(new: str, old: str) -> Churn:
    plan = read_plan(new)
    return churn(plan, read_manifest(plan), old)


def rows_of(output: str, column: str) -> dict[str, Any]:
    """Return the values of a column by id, of rows whose id is theirs alone."""
    table = pq.read_table(f"{output}/data", columns=["ticket_id", column])
    ids = [None if value is None else str(value) for value in table["ticket_id"].to_pylist()]
    return {
        str(one): value
        for one, value in zip(ids, table[column].to_pylist(), strict=True)
        if one is not None and ids.count(one) == 1
    }


def expected(old: str, new: str, column: str) -> Counter[tuple[str, str]]:
    before, after = rows_of(old, column), rows_of(new, column)
    return Counter((before[one] or REJECTED, after[one] or REJECTED) for one in before.keys() & after.keys())


def test_an_edited_label_shows_what_it_changed(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    first = annotate(path)
    assert read_churn(read_plan(first)) is None
    change(path, "ordinary talk", "ordinary words of people")
    second = annotate(path)
    found = read_churn(read_plan(second))
    assert found is not None
    assert found.against == Path(first).name
    assert (found.rows_in_both, found.rows_new, found.rows_gone, found.rows_unclear) == (39, 0, 0, 2)
    counts = {(c.before, c.after): c.rows for c in found.tasks["policy"]}
    assert counts == expected(first, second, "policy_label")
    assert set(counts) == {("safe", "safe"), ("safe", "spam"), ("spam", "safe"), ("spam", "spam"), (REJECTED,) * 2}
    assert list(found.tasks) == ["policy"]
    moved = counts["safe", "spam"]
    text, facts = report(second)
    assert f"safe → spam {moved:>8,}" in text
    assert json.loads(json.dumps(facts["churn"])) == json.loads(Path(second, "churn.json").read_text())
    html = Path(second, "report.html").read_text()
    assert f"Changed since <code>{found.against}</code>" in html
    assert f'<td>safe</td><td><b>spam</b></td><td class="n">{moved}</td>' in html


@pytest.mark.parametrize("rows_at_once", [1_000_000, 7, 1])
def test_rows_come_go_move_and_share_ids(tmp_path: Path, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(churn_module, "_ROWS_AT_ONCE", rows_at_once)
    path = job_file(tmp_path)

    def write(ids: Sequence[int | str | None]) -> None:
        texts = [f"words {number % 7} of {one}" for number, one in enumerate(ids)]
        write_tickets(tmp_path / "in", "a.parquet", pa.table({"ticket_id": ids, "body": texts}))

    write([str(one) for one in range(30)] + ["x", "x", None, "twice"])
    first = annotate(path)
    change(path, "[output]", '[output]\nprefix = "k2_"')
    write([*range(40, 4, -1), 100, 100, None])
    second = annotate(path)
    found = compare(second, first)
    assert (found.rows_in_both, found.rows_new, found.rows_gone) == (25, 11, 6)
    assert found.rows_unclear == 3 + 3
    after = rows_of(second, "k2_policy_label")
    before = rows_of(first, "policy_label")
    both = Counter((before[one], after[one]) for one in before.keys() & after.keys())
    assert {(c.before, c.after): c.rows for c in found.tasks["policy"]} == both
    write([*["5"] * 2, *map(str, range(6, 30)), None])  # its other half has one 5
    third = compare(annotate(path), first)
    assert (third.rows_in_both, third.rows_new, third.rows_gone, third.rows_unclear) == (24, 0, 6, 3 + 1 + 3)


def test_labels_of_many_count_each(tmp_path: Path) -> None:
    path = job_file(tmp_path, more=TOPICS)
    first = annotate(path)
    change(path, '"billing", "login"', '"login", "billing"')
    second = annotate(path)
    found = compare(second, first).tasks["topics"]
    before, after = rows_of(first, "topics_labels"), rows_of(second, "topics_labels")
    counts: Counter[tuple[str, str]] = Counter()
    for one in before.keys() & after.keys():
        if before[one] is None:
            counts[REJECTED, REJECTED] += 1
            continue
        for label in {*before[one], *after[one]}:
            counts[tuple(label if label in given[one] else NOT_GIVEN for given in (before, after))] += 1  # type: ignore[index]
    assert {(c.before, c.after): c.rows for c in found} == counts
    assert any(NOT_GIVEN in pair for pair in counts)
    assert list(found) == sorted(found, key=lambda c: (-c.rows, c.before, c.after))


def test_the_run_before_is_the_latest_that_had_ended(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    runs = []
    for number in range(3):
        os.utime(tmp_path / "in" / "a.parquet", (1e9 + number, 1e9 + number))
        runs.append(annotate(path))
    names = [Path(run).name for run in runs]
    assert [found and found.against for found in map(read_churn, map(read_plan, runs))] == [None, *names[:2]]
    kept = Path(runs[2], "churn.json").stat().st_mtime_ns
    annotate(path)
    assert Path(runs[2], "churn.json").stat().st_mtime_ns == kept  # a finished run costs nothing
    report(runs[2], runs[0])
    assert read_churn(read_plan(runs[2])) == compare(runs[2], runs[0])
    text, _ = report(runs[0])  # the later ones had not ended
    assert "against" not in text
    Path(runs[1], "_SUCCESS").unlink()
    Path(runs[2], "churn.json").unlink()
    report(runs[2])
    assert (read_churn(read_plan(runs[2])) or compare(runs[0], runs[1])).against == names[0]


def test_a_broken_earlier_run_is_none_and_a_named_one_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = job_file(tmp_path)
    first = annotate(path)
    for file in Path(first, "data").iterdir():
        file.unlink()
    os.utime(tmp_path / "in" / "a.parquet")
    second = annotate(path)
    assert read_churn(read_plan(second)) is None
    assert [record.message.partition(":")[0] for record in caplog.records] == ["not compared with an earlier run"]
    with pytest.raises(SpecError, match="not a run"):
        report(second, str(tmp_path))
    change(path, 'name = "policy"', 'name = "rule"')
    with pytest.raises(SpecError, match="no task in common"):
        report(annotate(path), second)


def test_the_verb_takes_the_run_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job_file(tmp_path)
    first = annotate(path)
    write_tickets(tmp_path / "in", "a.parquet", dirty_tickets().slice(5))
    second = annotate(path)
    capsys.readouterr()
    assert main(["report", first, "--against", second, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["churn"]
    assert (facts["against"], facts["rows_in_both"], facts["rows_new"]) == (Path(second).name, 34, 5)
    assert main(["report", first]) == 0
    out = capsys.readouterr().out
    assert f"against   {Path(second).name}: 34 rows in both, 5 new, 0 gone, 2 whose id is null" in out
    assert "policy, 0 changed" in out
