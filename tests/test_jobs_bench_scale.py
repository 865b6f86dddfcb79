"""A plan of many units is handled in little memory, and the measurement of that measures."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import bench_scale
from pipelines import storage
from pipelines.commit import pending_units, read_plan, to_parquet, write_plan
from pipelines.units import InputFile, cut
from schemas.errors import StorageError
from schemas.runs import Plan, Unit
from schemas.units import units_of, units_table
from tests.fakes import fake_plan, tickets, write_tickets

MANY = 20_000


@pytest.fixture(scope="module")
def units() -> tuple[Unit, ...]:
    """Return the units of 200 files."""
    files = [
        InputFile(url=f"s3://bucket/{n:04}.parquet", etag=f"{n:032x}", row_groups=(64,) * 100, problems=())
        for n in range(MANY // 100)
    ]
    return tuple(unit for file in files for unit in cut(file, 64))


@pytest.fixture
def plan(tmp_path: Path, units: tuple[Unit, ...]) -> Plan:
    """Return a plan of many units, written."""
    write_tickets(tmp_path / "in", "a.parquet", tickets(3))
    made = replace(fake_plan([tmp_path / "in"], tmp_path / "out"), units=units)
    write_plan(made)
    return made


def peak_of(call: object) -> tuple[object, int]:
    """Return what `call` returns, and the most bytes that were allocated meanwhile and not freed."""
    assert callable(call)
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_units_come_back_from_their_table(units: tuple[Unit, ...]) -> None:
    assert units_of(units_table(units)) == units
    with pytest.raises(ValueError, match="expected"):
        units_of(units_table(units).drop_columns(["skip"]))


def test_a_plan_is_written_without_spelling_out_its_units(plan: Plan) -> None:
    sizes = {name: Path(plan.output, name).stat().st_size for name in ("plan.json", "units.parquet")}
    assert sizes["plan.json"] < 5_000
    assert sizes["units.parquet"] < 20 * MANY
    rewritten, peak = peak_of(lambda: write_plan(plan))
    assert rewritten is None
    assert peak < 10 * MANY  # the units are neither read nor written


def test_a_plan_is_read_without_holding_its_units_twice(plan: Plan) -> None:
    found, peak = peak_of(lambda: read_plan(plan.output))
    assert found == plan
    # A unit of its own takes 300 bytes; all of them as Python values beside would be 400 more.
    assert peak < 500 * MANY


def test_pending_units_are_the_planned_ones_and_cost_a_set_of_names(plan: Plan) -> None:
    folder = Path(plan.output) / "receipts"
    folder.mkdir()
    done = [unit.unit_id for unit in plan.units[::2]]
    for unit_id in done:
        (folder / f"{unit_id}.json").touch()
    (folder / ".left.json").touch()
    (folder / "of-another-plan.json").touch()
    pending, peak = peak_of(lambda: pending_units(plan))
    assert pending == plan.units[1::2]
    assert peak < 400 * MANY


def test_units_of_another_plan_are_refused(plan: Plan, units: tuple[Unit, ...]) -> None:
    path = Path(plan.output) / "units.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(StorageError, match=r"units\.parquet: cannot be read"):
        read_plan(plan.output)
    path.unlink()
    with pytest.raises(StorageError, match=r"units\.parquet: cannot be read"):
        read_plan(plan.output)
    write_plan(plan)  # what the remedy says
    assert read_plan(plan.output) == plan
    fewer = units_table(units[:-1])
    path.write_bytes(to_parquet(fewer))
    with pytest.raises(StorageError, match=f"{MANY - 1} were found, {MANY} planned"):
        read_plan(plan.output)


def test_threads_return_all_in_order_by_pages() -> None:
    assert storage.in_threads(str, range(10_000)) == [str(number) for number in range(10_000)]


def test_scale_measures_every_step() -> None:
    facts = bench_scale.scale(230)
    assert [row["step"] for row in facts["rows"]][-2:] == ["verify", "replay"]
    assert all(0 < row["peak_mb"] < 1000 for row in facts["rows"])
    assert facts["bytes"].keys() >= {"plan.json", "units.parquet", "_manifest.json", "_SUCCESS", "report.html"}
    assert "units.parquet" in bench_scale.as_text(facts)
