"""The run's folder: what makes a unit done, and what does not."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.commit import claim_url, done_units, pending_units, read_plan, read_receipts, receipt_url, write_plan
from pipelines.finalize import finalize, read_manifest
from schemas.errors import SpecError, StorageError
from schemas.runs import Manifest, Plan
from tests.fakes import annotate_directly, fake_plan, tickets, write_tickets


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A written plan of four units over two files."""
    for number in range(2):
        write_tickets(tmp_path / "in", f"{number}.parquet", tickets(20, start=20 * number), row_group_size=10)
    plan = fake_plan([tmp_path / "in"], tmp_path / "out", unit_rows=10)
    write_plan(plan)
    return plan


def annotate_all(plan: Plan) -> None:
    annotate_directly(plan, pending_units(plan))


def snapshot(plan: Plan) -> dict[str, bytes]:
    """Return the content of every file of the run."""
    folder = Path(plan.output)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(plan: Plan, folder: str) -> list[str]:
    return sorted(os.listdir(Path(plan.output) / folder))


def test_plan_is_written_once(plan: Plan) -> None:
    path = Path(plan.output) / "plan.json"
    os.utime(path, ns=(1, 1))
    write_plan(plan)
    assert path.stat().st_mtime_ns == 1
    assert read_plan(plan.output) == plan
    with pytest.raises(StorageError, match="holds another plan"):
        write_plan(replace(plan, units=plan.units[:1]))


def test_plan_of_a_moved_run_knows_where_it_is(plan: Plan, tmp_path: Path) -> None:
    Path(plan.output).rename(tmp_path / "moved")
    assert read_plan(str(tmp_path / "moved") + "/").output == str(tmp_path / "moved")


def test_folder_without_a_plan_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no plan\.json"):
        read_plan(str(tmp_path))


def test_receipts_alone_make_units_done(plan: Plan) -> None:
    assert pending_units(plan) == plan.units
    annotate_all(plan)
    assert pending_units(plan) == ()
    assert list(read_receipts(plan)) == [unit.unit_id for unit in plan.units]
    os.unlink(receipt_url(plan, plan.units[2].unit_id))
    assert pending_units(plan) == (plan.units[2],)


def test_stray_files_among_receipts_make_nothing_done(plan: Plan) -> None:
    folder = Path(plan.output) / "receipts"
    folder.mkdir()
    (folder / f".{plan.units[0].unit_id}.json.abc").write_text("{}")
    (folder / "other.json").write_text("{}")
    assert done_units(plan) == frozenset()
    (folder / f"{plan.units[0].unit_id}.json").write_text("{ cut off")
    assert read_receipts(plan) == {}


def test_finalize_publishes_what_receipts_name(plan: Plan) -> None:
    annotate_all(plan)
    folder = Path(plan.output)
    (folder / "data" / "part-orphan.parquet").write_bytes(b"half")
    (folder / "data" / ".part-x.parquet.tmp").write_bytes(b"half")
    (folder / "rejects").mkdir(exist_ok=True)
    (folder / "rejects" / "part-orphan.parquet").write_bytes(b"half")
    manifest = finalize(plan, max_reject_rate=0.0)
    assert manifest.status == "complete"
    assert (manifest.rows_in, manifest.rows_annotated, manifest.rows_rejected) == (40, 40, 0)
    assert (manifest.units, manifest.units_done) == (4, 4)
    assert files(plan, "data") == sorted(manifest.data)
    assert files(plan, "rejects") == []
    assert sum(manifest.labels["policy"].values()) == 40
    assert (folder / "_SUCCESS").exists()
    assert Manifest.from_json((folder / "_manifest.json").read_text()) == manifest


def test_missing_unit_is_incomplete(plan: Plan) -> None:
    annotate_directly(plan, plan.units[1:])
    manifest = finalize(plan, max_reject_rate=0.0)
    assert manifest.status == "incomplete"
    assert (manifest.units_done, manifest.rows_in, manifest.rows_annotated) == (3, 40, 30)
    assert read_manifest(plan.output) == manifest
    assert not (Path(plan.output) / "_manifest.json").exists()
    assert not (Path(plan.output) / "_SUCCESS").exists()
    annotate_all(plan)
    assert finalize(plan, max_reject_rate=0.0) == read_manifest(plan.output) != manifest
    assert not (Path(plan.output) / "_unfinished.json").exists()


def test_published_run_is_final(plan: Plan) -> None:
    annotate_all(plan)
    manifest = finalize(plan, max_reject_rate=0.0)
    os.unlink(receipt_url(plan, plan.units[0].unit_id))
    before = snapshot(plan)
    assert finalize(plan, max_reject_rate=0.0) == manifest
    assert snapshot(plan) == before


def test_published_run_that_loses_a_file_is_done_again(plan: Plan) -> None:
    annotate_all(plan)
    manifest = finalize(plan, max_reject_rate=0.0)
    os.unlink(Path(plan.output) / "data" / manifest.data[2])
    assert finalize(plan, max_reject_rate=0.0).status == "incomplete"
    assert not (Path(plan.output) / "_SUCCESS").exists()
    assert pending_units(plan) == (plan.units[2],)
    annotate_all(plan)
    again = finalize(plan, max_reject_rate=0.0)
    assert (again.status, again.data) == ("complete", manifest.data)


def test_leftovers_stay_until_the_run_is_complete(plan: Plan) -> None:
    annotate_directly(plan, plan.units[1:])
    leftover = Path(plan.output) / "data" / f"part-{plan.units[0].unit_id}-0123456789abcdef.parquet"
    leftover.write_bytes(b"an attempt that is about to write its receipt, for all we know")
    finalize(plan, max_reject_rate=0.0)
    assert leftover.exists()
    annotate_all(plan)
    finalize(plan, max_reject_rate=0.0)
    assert not leftover.exists()


def test_claimed_file_is_never_deleted(plan: Plan) -> None:
    annotate_all(plan)
    claimed = Path(plan.output) / "data" / f"part-{plan.units[0].unit_id}-0123456789abcdef.parquet"
    claimed.write_bytes(b"a second driver may be about to publish this")
    Path(claim_url(plan, claimed.name)).touch()
    finalize(plan, max_reject_rate=0.0)
    assert claimed.exists()


def test_second_attempt_yields_to_the_first(plan: Plan) -> None:
    annotate_all(plan)
    before = snapshot(plan)
    annotate_directly(plan, plan.units)
    assert snapshot(plan) == before


def test_unreadable_receipt_is_done_again(plan: Plan) -> None:
    annotate_all(plan)
    Path(receipt_url(plan, plan.units[1].unit_id)).write_text("{ cut off")
    assert finalize(plan, max_reject_rate=0.0).status == "incomplete"
    assert pending_units(plan) == (plan.units[1],)


def test_lost_data_file_is_done_again(plan: Plan) -> None:
    annotate_all(plan)
    lost = read_receipts(plan)[plan.units[1].unit_id].data
    os.unlink(Path(plan.output) / "data" / lost)
    assert finalize(plan, max_reject_rate=0.0).status == "incomplete"
    assert pending_units(plan) == (plan.units[1],)
    annotate_all(plan)
    assert finalize(plan, max_reject_rate=0.0).status == "complete"


def test_rejected_file_is_incomplete(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(5))
    (tmp_path / "b.parquet").write_bytes(b"")
    plan = fake_plan([tmp_path], tmp_path / "out")
    write_plan(plan)
    annotate_all(plan)
    manifest = finalize(plan, max_reject_rate=1.0)
    assert manifest.status == "incomplete"
    assert manifest.units == manifest.units_done == 1
    assert [file.error_code for file in manifest.rejected_files] == ["unreadable_file"]
    assert not (Path(plan.output) / "_SUCCESS").exists()


@pytest.mark.parametrize(("rate", "status"), [(0.09, "too_many_rejects"), (0.1, "complete")])
def test_reject_rate_is_held(tmp_path: Path, rate: float, status: str) -> None:
    bodies = pa.array([None, *[f"body {number}" for number in range(9)]])
    table = pa.table({"ticket_id": pa.array(range(10)), "subject": pa.nulls(10, pa.string()), "body": bodies})
    write_tickets(tmp_path, "a.parquet", table)
    plan = fake_plan([tmp_path], tmp_path / "out")
    write_plan(plan)
    annotate_all(plan)
    manifest = finalize(plan, max_reject_rate=rate)
    assert manifest.status == status
    assert manifest.error_codes == {"null_text": 1}
    assert len(manifest.rejects) == 1
    assert (Path(plan.output) / "_SUCCESS").exists() == (status == "complete")


def test_run_without_units_is_complete(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(3).slice(0, 0))
    plan = fake_plan([tmp_path], tmp_path / "out")
    write_plan(plan)
    annotate_all(plan)
    assert finalize(plan, max_reject_rate=0.0).status == "complete"


def test_temporary_files_of_killed_writers_go_once_the_run_is_complete(plan: Plan) -> None:
    annotate_directly(plan, plan.units[:3])
    left = [Path(plan.output) / folder / f".{folder}.0123" for folder in ("receipts", "claims", "data")]
    for path in left:
        path.write_bytes(b"half")
    finalize(plan, max_reject_rate=1.0)
    assert all(path.exists() for path in left)
    annotate_directly(plan, plan.units[3:])
    assert finalize(plan, max_reject_rate=1.0).status == "complete"
    assert not any(path.exists() for path in left)
    assert (
        len(list((Path(plan.output) / "receipts").iterdir()))
        == len(list((Path(plan.output) / "claims").iterdir()))
        == 4
    )
