"""The plan: which files, which units, which identity."""

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.units import InputFile, cut
from schemas.errors import SchemaMismatch, SpecError
from schemas.runs import Plan, Task, Unit
from schemas.tickets import TicketColumns
from tests.fakes import COLUMNS, POLICY, fake_plan, tickets, write_tickets


def cuts(row_groups: tuple[int, ...], unit_rows: int) -> list[tuple[tuple[int, int], int, int, int]]:
    file = InputFile(url="/in.parquet", etag="1", row_groups=row_groups, problems=())
    return [(unit.row_groups, unit.skip, unit.rows, unit.first_row) for unit in cut(file, unit_rows)]


def test_small_row_groups_are_merged() -> None:
    assert cuts((10,) * 7, 25) == [((0, 2), 0, 20, 0), ((2, 4), 0, 20, 20), ((4, 6), 0, 20, 40), ((6, 7), 0, 10, 60)]


def test_giant_row_group_is_sliced() -> None:
    assert cuts((55,), 25) == [((0, 1), 0, 25, 0), ((0, 1), 25, 25, 25), ((0, 1), 50, 5, 50)]


def test_giant_row_group_between_small_ones() -> None:
    assert cuts((5, 5, 30, 5, 0, 5), 25) == [
        ((0, 2), 0, 10, 0),
        ((2, 3), 0, 25, 10),
        ((2, 3), 25, 5, 35),
        ((3, 6), 0, 10, 40),
    ]


def test_row_group_of_exactly_the_limit_is_whole() -> None:
    assert cuts((25, 25), 25) == [((0, 1), 0, 25, 0), ((1, 2), 0, 25, 25)]


@pytest.mark.parametrize("row_groups", [(), (0,), (0, 0)])
def test_no_rows_give_no_unit(row_groups: tuple[int, ...]) -> None:
    assert cuts(row_groups, 25) == []


@pytest.mark.parametrize("unit_rows", [1, 3, 7, 64, 1000])
def test_units_tile_the_file(unit_rows: int) -> None:
    row_groups = (3, 0, 100, 1, 1, 64, 65, 7)
    units = cuts(row_groups, unit_rows)
    assert [start for _, _, _, start in units] == [sum(rows for _, _, rows, _ in units[:i]) for i in range(len(units))]
    assert sum(rows for _, _, rows, _ in units) == sum(row_groups)
    assert max(rows for _, _, rows, _ in units) <= unit_rows
    for (first, _), skip, _, start in units:
        assert sum(row_groups[:first]) + skip == start


def test_same_inputs_give_the_same_plan(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "c.parquet"):
        write_tickets(tmp_path / "in", name, tickets(50), row_group_size=20)
    plans = [fake_plan([tmp_path / "in"], tmp_path / "out") for _ in range(2)]
    assert plans[0] == plans[1]
    assert Plan.from_json(plans[0].to_json(), plans[0].units) == plans[0]
    order = [(Path(unit.url).name, unit.first_row) for unit in plans[0].units]
    assert order == sorted(order)
    assert plans[0].rows == 150
    assert len({unit.unit_id for unit in plans[0].units}) == len(plans[0].units)


def test_patterns_are_merged_and_relative_paths_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "b.parquet", "note.txt"):
        write_tickets(tmp_path / "in", name, tickets(3))
    monkeypatch.chdir(tmp_path)
    plan = fake_plan(["in/", "in/*.parquet", tmp_path / "in" / "a.parquet", "in"], "out")
    assert [unit.url for unit in plan.units] == [str(tmp_path / "in" / name) for name in ("a.parquet", "b.parquet")]
    assert plan.files == 2
    assert plan.output == f"{tmp_path}/out/{plan.run_id}"


def test_file_with_a_star_in_its_name_is_itself(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a[1].parquet", tickets(3))
    write_tickets(tmp_path, "a1.parquet", tickets(4))
    assert fake_plan([tmp_path / "a[1].parquet"], tmp_path / "out").rows == 3


def test_inputs_in_memory_store() -> None:
    with fsspec.open("memory://planned/a.parquet", "wb") as file:
        pq.write_table(tickets(3), file)
    plan = fake_plan(["memory://planned/"], "memory://planned-out")
    assert [unit.url for unit in plan.units] == ["memory:///planned/a.parquet"]


@pytest.mark.parametrize("pattern", ["nothing/", "nothing.parquet", "*.parquet", "empty"])
def test_pattern_without_a_file_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="no input file matches"):
        fake_plan([tmp_path / pattern], tmp_path / "out")


def test_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="s4"):
        fake_plan(["s4://bucket/x.parquet"], tmp_path / "out")


def test_identity_follows_inputs_and_settings(tmp_path: Path) -> None:
    path = write_tickets(tmp_path / "in", "a.parquet", tickets(10))
    turned = Task(name=POLICY.name, kind=POLICY.kind, labels=dict(reversed(POLICY.labels.items())))
    same = {name: POLICY.labels[name] for name in turned.labels}

    def run_id(**settings: object) -> str:
        return fake_plan([path], tmp_path / "out", **settings).run_id  # type: ignore[arg-type]

    ids = [
        run_id(),
        run_id(unit_rows=5),
        run_id(prefix="k2_"),
        run_id(max_prompt_tokens=100),
        run_id(tasks=[POLICY]),
        run_id(tasks=[Task(name="policy", kind="choose", labels=same)]),
        run_id(columns=TicketColumns(id="ticket_id", text=("body",))),
    ]
    before = fake_plan([path], tmp_path / "out")
    write_tickets(tmp_path / "in", "a.parquet", tickets(10, start=1))
    os.utime(path, ns=(1, 1))
    after = fake_plan([path], tmp_path / "out")
    assert len({*ids, after.run_id}) == len(ids) + 1
    assert after.units[0].unit_id != before.units[0].unit_id
    assert run_id(on_bad_file="fail") == after.run_id


def test_bad_files_are_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    table = tickets(4)
    write_tickets(folder, "good.parquet", table)
    whole = write_tickets(folder, "truncated.parquet", table).read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.parquet").write_bytes(b"")
    (folder / "short.parquet").write_bytes(b"PAR1")
    (folder / "footer.parquet").write_bytes(whole[:-60] + b"\xff" * 52 + whole[-8:])
    write_tickets(folder, "renamed.parquet", table.rename_columns(["ticket_id", "subject", "bdoy", "m", "w"]))
    retyped = table.set_column(2, "body", pa.array([1, 2, 3, 4]))
    write_tickets(folder, "retyped.parquet", retyped)
    write_tickets(folder, "clash.parquet", table.append_column("status", pa.array(["new"] * 4)))
    plan = fake_plan([folder], tmp_path / "out")
    fates = {Path(file.url).stem: (file.error_code, file.error_message) for file in plan.rejected_files}
    assert {name: code for name, (code, _) in fates.items()} == {
        "truncated": "unreadable_file",
        "zero": "unreadable_file",
        "short": "unreadable_file",
        "footer": "unreadable_file",
        "renamed": "missing_column",
        "retyped": "wrong_type",
        "clash": "name_collision",
    }
    assert 'did you mean "bdoy"' in fates["renamed"][1]
    assert "int64" in fates["retyped"][1]
    assert [Path(unit.url).name for unit in plan.units] == ["good.parquet"]
    assert plan.files == 8
    clashing = [
        file for file in fake_plan([folder], tmp_path / "out", prefix="k2_").rejected_files if "clash" in file.url
    ]
    assert clashing == []


def test_bad_file_can_refuse_the_plan_with_every_difference(tmp_path: Path) -> None:
    write_tickets(tmp_path, "good.parquet", tickets(4))
    write_tickets(tmp_path, "one.parquet", pa.table({"body": pa.array([1])}))
    with pytest.raises(SchemaMismatch) as caught:
        fake_plan([tmp_path], tmp_path / "out", on_bad_file="fail")
    for part in (
        "1 of 2 input files",
        "one.parquet",
        '"ticket_id" is missing',
        '"subject" is missing',
        '"body" is int64',
    ):
        assert part in caught.value.message


def test_no_usable_file_refuses_the_plan(tmp_path: Path) -> None:
    (tmp_path / "zero.parquet").write_bytes(b"")
    with pytest.raises(SchemaMismatch, match="1 of 1"):
        fake_plan([tmp_path], tmp_path / "out")


def test_file_without_rows_is_fine(tmp_path: Path) -> None:
    write_tickets(tmp_path, "none.parquet", tickets(5).slice(0, 0))
    plan = fake_plan([tmp_path], tmp_path / "out")
    assert (plan.units, plan.rejected_files, plan.files) == ((), (), 1)


def test_optional_column_may_be_missing(tmp_path: Path) -> None:
    write_tickets(tmp_path, "a.parquet", tickets(4).drop_columns(["subject"]))
    columns = TicketColumns(id="ticket_id", text=("subject", "body"), optional=("subject",))
    assert fake_plan([tmp_path], tmp_path / "out", columns=columns).rows == 4
    with pytest.raises(SchemaMismatch, match="subject"):
        fake_plan([tmp_path], tmp_path / "out", columns=COLUMNS)


def test_footer_larger_than_the_first_read(tmp_path: Path) -> None:
    path = write_tickets(tmp_path, "a.parquet", tickets(2000), row_group_size=2)
    assert int.from_bytes(path.read_bytes()[-8:-4], "little") > 64 * 1024
    units: tuple[Unit, ...] = fake_plan([path], tmp_path / "out", unit_rows=1000).units
    assert [unit.row_groups for unit in units] == [(0, 500), (500, 1000)]
