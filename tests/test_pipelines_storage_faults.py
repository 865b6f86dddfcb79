"""A store of which a third of the calls fail costs time, never a row or a byte."""

import os
import threading
from pathlib import Path

import pytest

from jobs.verify import verify
from pipelines import retries, storage
from pipelines.commit import pending_units, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.errors import SchemaMismatch, StorageError
from tests import faulty_store
from tests.fakes import fake_plan, tickets, write_tickets
from tests.faulty_store import annotate, asked, content_of, open_engine


@pytest.fixture(autouse=True)
def _faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    monkeypatch.setenv("K2_FAULT_WAIT_S", "0.01")
    monkeypatch.setenv("K2_FAULT_LOG", str(tmp_path / "calls.log"))
    monkeypatch.delenv("K2_FAULT_RATE", raising=False)


def test_a_third_of_the_calls_failing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = annotate(tmp_path, "quiet", 12)
    assert finalize(quiet, max_reject_rate=0.0).status == "complete"
    expected = content_of(quiet)
    assert len(expected) == 12
    assert not asked()[1]
    monkeypatch.setenv("K2_FAULT_RATE", "0.3")
    plan = annotate(tmp_path, "loud", 12)
    manifest = finalize(plan, max_reject_rate=0.0)
    assert (manifest.status, manifest.rows_annotated) == ("complete", 240)
    assert content_of(plan) == expected
    assert verify(plan.output) == []
    calls, faults = asked()
    # Which calls fail is drawn; that of 200 none breaks off in the middle of an upload happens.
    assert {"throttled", "reset", "timed out", "cut short"} <= set(faults)
    assert faults.total() > 0.15 * calls.total()  # the quiet run's calls are among them
    # No upload that broke off stands under a name that counts, and none is left at all.
    assert sorted(os.listdir(plan.output.removeprefix("faulty://") + "/data")) == sorted(manifest.data)


def test_stale_listings_cost_a_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = annotate(tmp_path, "quiet", 6)
    plan = fake_plan([f"faulty://{tmp_path}/in/*.parquet"], f"faulty://{tmp_path}/stale", unit_rows=20)
    write_plan(plan)
    monkeypatch.setenv("K2_STALE_RATE", "1")  # each listing shows what stood there at the one before
    tries = 0
    while (manifest := finalize(plan, max_reject_rate=0.0)).status != "complete":
        tries += 1
        assert tries < 10
        run_units(plan, pending_units(plan), open_engine=open_engine)
    assert tries > 1
    assert manifest.status == "complete"
    monkeypatch.delenv("K2_STALE_RATE")
    assert finalize(plan, max_reject_rate=0.0).rows_annotated == 120
    assert content_of(plan) == content_of(quiet)
    assert verify(plan.output) == []


def test_a_store_that_is_down_for_a_while_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = tmp_path / "calls.log.down"
    down.touch()
    threading.Timer(0.5, down.unlink).start()
    plan = annotate(tmp_path, "down", 2)
    assert asked()[1].total() > 10
    assert finalize(plan, max_reject_rate=0.0).status == "complete"
    down.touch()
    monkeypatch.setattr(retries, "BUDGET_S", 0.2)
    with pytest.raises(StorageError, match=r"cannot list .* attempts in 0\.2 s"):
        finalize(plan, max_reject_rate=0.0)


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in range(3):
        write_tickets(tmp_path / f"day={day}" / "part", "a.parquet", tickets(2))
    pattern = f"faulty://{tmp_path}/day=*/part/*.parquet"
    assert len(storage.find(pattern)) == 3
    assert storage.find(f"faulty://{tmp_path}/**/a.parquet") == storage.find(pattern)
    monkeypatch.setattr(retries, "BUDGET_S", 0.05)
    ls = faulty_store.FaultyFileSystem.ls

    def refuse_day_1(self, path, **more):  # type: ignore[no-untyped-def]
        if "day=1" in path:
            raise TimeoutError("slow")
        return ls(self, path, **more)

    monkeypatch.setattr(faulty_store.FaultyFileSystem, "ls", refuse_day_1)
    with pytest.raises(StorageError, match="day=1: TimeoutError"):
        storage.find(pattern)


def test_a_failing_read_is_not_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.read import read_unit

    write_tickets(tmp_path / "in", "a.parquet", tickets(40), row_group_size=20)
    plan = fake_plan([f"faulty://{tmp_path}/in/"], tmp_path / "out", unit_rows=20)
    monkeypatch.setattr(retries, "BUDGET_S", 0.05)
    cat = faulty_store.FaultyFileSystem.cat_file
    reads: list[int] = []

    def cat_once(self, path, start=None, end=None):  # type: ignore[no-untyped-def]
        reads.append(1)
        if len(reads) > 1:  # the footer comes, the rows do not; a plain OSError, as pyarrow raises for bad pages
            raise OSError("the line is dead")
        return cat(self, path, start, end)

    monkeypatch.setattr(faulty_store.FaultyFileSystem, "cat_file", cat_once)
    with pytest.raises(StorageError, match="the line is dead"):
        read_unit(plan.units[1])


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.read import read_unit

    write_tickets(tmp_path / "in", "a.parquet", tickets(40), row_group_size=20)
    plan = fake_plan([f"faulty://{tmp_path}/in/"], tmp_path / "out", unit_rows=20)
    cat = faulty_store.FaultyFileSystem.cat_file

    def cat_and_replace(self, path, start=None, end=None):  # type: ignore[no-untyped-def]
        content = cat(self, path, start, end)
        write_tickets(tmp_path / "in", "a.parquet", tickets(40, start=500), row_group_size=20)
        return content

    monkeypatch.setattr(faulty_store.FaultyFileSystem, "cat_file", cat_and_replace)
    with pytest.raises(SchemaMismatch, match="changed since the plan"):
        read_unit(plan.units[1])


def test_a_file_that_goes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.read import read_unit

    path = write_tickets(tmp_path / "in", "a.parquet", tickets(40), row_group_size=20)
    plan = fake_plan([f"faulty://{tmp_path}/in/"], tmp_path / "out", unit_rows=20)
    cat = faulty_store.FaultyFileSystem.cat_file

    def cat_and_delete(self, name, start=None, end=None):  # type: ignore[no-untyped-def]
        content = cat(self, name, start, end)
        path.unlink()
        return content

    monkeypatch.setattr(faulty_store.FaultyFileSystem, "cat_file", cat_and_delete)
    with pytest.raises(SchemaMismatch, match="gone since the plan"):
        read_unit(plan.units[1])
