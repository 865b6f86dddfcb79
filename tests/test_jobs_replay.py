"""`verify --replay` computes rows again, alone, and sees every answer that is not the stored one."""

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.replay import as_lines, draw, replay
from jobs.run import run
from jobs.spec import load_spec
from jobs.verify import verify
from k2model.engine.request import Completion, Request
from pipelines.commit import read_plan, read_receipts, receipt_url, receipts_of, to_parquet
from schemas.errors import CheckpointError, SpecError
from schemas.runs import Plan
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import FakeEngine, open_other_fake_engine


@pytest.fixture
def output(tmp_path: Path) -> str:
    """A finished run of four units: 33 rows annotated, two of them duplicates, and 7 rejected."""
    return run(load_spec(str(job_file(tmp_path))), open_engine=open_planned_engine)[0].output


def forge(output: str, index: int, row: int, name: str, value: object) -> Plan:
    """Change a stored value, and the receipt so that the digest fits; return the plan."""
    plan = read_plan(output)
    receipt = read_receipts(plan)[plan.units[index].unit_id]
    path = Path(output, "data", receipt.data)
    table = pq.read_table(path)
    values = table.column(name).to_pylist()
    values[row] = value
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    path.write_bytes(to_parquet(table.set_column(place, field, pa.array(values, field.type))))
    forged = replace(receipt, data_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    Path(receipt_url(plan, receipt.unit_id)).write_text(forged.to_json())
    return plan


def test_every_annotated_row_is_the_same_alone_duplicates_too(output: str) -> None:
    table = pq.read_table(f"{output}/data")
    assert table.column("route").to_pylist().count("duplicate") == 2
    found = replay(output, 1000, open_engine=open_planned_engine)
    assert (found.rows, found.replayed, found.flips, found.problems) == (33, 33, (), ())
    assert found.is_equal
    assert as_lines(found) == ["replayed 33 of 33 rows drawn, each alone: 0 flipped"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy_score", 0.25),
        ("policy_scores", [("safe", 0.5), ("spam", 0.5)]),
        ("gist_text", "forged"),
        ("prompt_hash", "0" * 32),
    ],
)
def test_a_forged_value_that_the_files_cannot_betray_is_found(output: str, name: str, value: object) -> None:
    plan = forge(output, 2, 4, name, value)
    assert verify(output) == []
    found = replay(output, 33, open_engine=open_planned_engine)
    assert [(flip.url, flip.row, flip.column, flip.stored) for flip in found.flips] == [
        (plan.units[2].url, 24, name, value)
    ]
    assert found.flips[0].recomputed != value
    assert not found.is_equal
    assert f"row 24 {name}: stored {value!r}" in as_lines(found)[1]


def test_a_forged_duplicate_is_found(output: str) -> None:
    plan = forge(output, 3, 2, "gist_text", "forged")
    data = read_receipts(plan)[plan.units[3].unit_id].data
    assert pq.read_table(Path(output, "data", data)).column("route").to_pylist()[2] == "duplicate"
    assert [flip.row for flip in replay(output, 33, open_engine=open_planned_engine).flips] == [32]


def test_rows_are_drawn_by_the_seed_from_all_units(
    output: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked(num_rows: int, seed: int) -> tuple[int, list[str]]:
        log = tmp_path / f"{num_rows}-{seed}-{os.urandom(4).hex()}"
        monkeypatch.setenv("K2_FAKE_LOG", str(log))
        found = replay(output, num_rows, seed=seed, open_engine=open_planned_engine)
        return found.replayed, log.read_text().splitlines()

    replayed, lines = asked(12, 0)
    assert replayed == 12
    # A submission for each row alone: its scored task and its generated one.
    assert lines == [f"{os.getpid()} 2"] * 12
    for index in range(4):
        forge(output, index, 0, "prompt_hash", str(index))
    flips = [
        {flip.row for flip in replay(output, 12, seed=seed, open_engine=open_planned_engine).flips}
        for seed in (*range(16), 0)
    ]
    assert set().union(*flips) == {0, 10, 20, 30}
    assert flips[0] == flips[-1]
    assert len({frozenset(rows) for rows in flips}) > 1


class CompanyEngine(FakeEngine):
    """Gives other answers when several rows are asked together: the defect that replaying is for."""

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        """Return a future that is done."""
        completions = super().submit(requests).result()
        if len(requests) > 2:
            completions = [replace(c, logprobs=tuple(ln * 1.001 for ln in c.logprobs)) for c in completions]
        future: Future[list[Completion]] = Future()
        future.set_result(completions)
        return future


def open_company_engine(plan: Plan) -> CompanyEngine:
    return CompanyEngine(fingerprint=plan.model_fingerprint)


def test_an_engine_whose_answers_depend_on_company_is_found(tmp_path: Path) -> None:
    output = run(load_spec(str(job_file(tmp_path))), open_engine=open_company_engine)[0].output
    found = replay(output, 33, open_engine=open_company_engine)
    # The last unit has one prompt, three times: it was alone.
    assert {flip.row for flip in found.flips} == set(range(30))
    assert {flip.column for flip in found.flips} >= {"policy_score", "policy_margin", "policy_scores"}


def test_a_real_engine_gives_the_same_bits_alone(tmp_path: Path) -> None:
    output = run(load_spec(str(job_file(tmp_path))))[0].output
    found = replay(output, 9, seed=3)
    assert (found.replayed, found.flips) == (9, ())


def test_another_checkpoint_is_an_error_by_name(output: str) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint: fingerprint 0+, planned"):
        replay(output, 3, open_engine=open_other_fake_engine)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a run"):
        replay(str(tmp_path), 3, open_engine=open_planned_engine)


def test_rows_that_cannot_be_replayed_are_counted_and_the_others_are(output: str) -> None:
    plan = read_plan(output)
    receipts = read_receipts(plan)
    names = [Path(output, "data", receipts[unit.unit_id].data) for unit in plan.units]
    names[0].unlink()
    names[1].write_bytes(b"no table")
    names[2].write_bytes(to_parquet(pq.read_table(names[2]).drop_columns(["gist_text"])))
    found = replay(output, 33, open_engine=open_planned_engine)
    assert (found.rows, found.replayed, found.flips, found.is_equal) == (33, 3, (), False)
    assert len(found.problems) == 3
    names[3].write_bytes(to_parquet(pq.read_table(names[3]).slice(1)))
    assert replay(output, 33, open_engine=open_planned_engine).replayed == 0


def test_receipts_are_not_kept_while_rows_are_drawn(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept:
        def __init__(self, rows_annotated: int) -> None:
            self.rows_annotated = rows_annotated

    plan = read_plan(output)
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    most = 0

    def receipts(plan: Plan) -> Iterator[tuple[str, Kept]]:
        nonlocal most
        for unit_id, receipt in receipts_of(plan):
            assert receipt is not None
            kept = Kept(receipt.rows_annotated)
            alive.add(kept)
            most = max(most, len(alive))
            yield unit_id, kept

    monkeypatch.setattr("jobs.replay.receipts_of", receipts)
    drawn = draw(plan, 5, seed=1)
    assert sum(len(places) for _, places in drawn) == 5
    assert most <= 2


def test_a_receipt_that_goes_meanwhile_is_a_problem(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.replay.read_receipt", lambda plan, unit_id: None)
    found = replay(output, 33, open_engine=open_planned_engine)
    assert (found.replayed, len(found.problems)) == (0, 4)
    assert "its receipt is gone" in found.problems[0]


def test_a_changed_input_cannot_be_replayed(output: str) -> None:
    url = read_plan(output).units[0].url
    Path(url).write_bytes(to_parquet(pq.read_table(url).slice(1)))
    found = replay(output, 33, open_engine=open_planned_engine)
    assert (found.replayed, len(found.problems)) == (0, 4)
    assert "changed since the plan was made" in found.problems[0]
