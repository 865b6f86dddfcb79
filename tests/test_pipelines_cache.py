"""Answers of earlier runs: taken to the bit, never in the way of a run, never more than they may take."""

import logging
import math
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k2model.engine.request import Completion, Request
from pipelines import cache, cache_files, storage
from pipelines.annotate import AnnotatedBlock, Block, annotate
from pipelines.cache import Cache, close_caches, open_cache
from pipelines.cache_files import USED, folder_of, listing, prune, tidy
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from schemas.runs import SCHEMA_VERSION, Plan
from tests.fakes import COLUMNS, TASKS, FakeEngine, fake_plan, tickets, write_tickets
from tests.s3_servers import moto, s3_environment

NAMES = [f"{number:032x}" for number in (0, 7 << 64, 1 << 70, (1 << 127) + 5, 2**128 - 1)]
ODD = (0.1, -0.0, 5e-324, -1.7976931348623157e308, float("-inf"), float("nan"), -math.pi)


def plan_of(folder: Path, job: str = "first", *, fingerprint: str = "f" * 16, mode: str = "cpu") -> Plan:
    """Return a plan without units whose run lies in `folder`."""
    run_id = f"{job}-0123456789ab"
    return Plan(
        run_id=run_id,
        job=job,
        output=f"{folder}/{run_id}",
        columns=COLUMNS,
        tasks=TASKS,
        checkpoint="fake",
        model_fingerprint=fingerprint,
        mode=mode,
        prefix="",
        max_prompt_tokens=4096,
        uses_cache=True,
        units=(),
        rejected_files=(),
        files=0,
    )


def answers(start: int, number: int = 3) -> dict[str, list[Completion]]:
    """Return one scored completion for each of `number` prompts."""
    random_bytes = random.Random(start).randbytes
    return {random_bytes(16).hex(): [Completion(logprobs=(-0.5 - start, -i / 3))] for i in range(number)}


def keep(folder: Path, job: str, unit_id: str, known: dict[str, list[Completion]]) -> Path:
    """Store `known` as a unit of the run of `job`; return the file."""
    before = {stored.name for stored in listing(folder_of(str(folder)))}
    Cache(plan_of(folder, job)).store(unit_id, known)
    (name,) = {stored.name for stored in listing(folder_of(str(folder)))} - before
    return folder / "_cache" / name


def ask(folder: Path, known: dict[str, list[Completion]], job: str = "later") -> dict[str, list[Completion]]:
    """Return what a new process of the run of `job` finds."""
    return Cache(plan_of(folder, job)).lookup({name: len(group) for name, group in known.items()})


def bits(found: dict[str, list[Completion]]) -> dict[str, list[tuple[bytes, tuple[int, ...], str]]]:
    return {
        name: [(struct.pack(f"{len(c.logprobs)}d", *c.logprobs), c.token_ids, c.finish_reason) for c in group]
        for name, group in found.items()
    }


def test_answers_come_back_to_the_bit(tmp_path: Path) -> None:
    written = Completion(token_ids=(5, 0, 2**31 - 1), finish_reason="stop", computed_tokens=9)
    known = {
        NAMES[0]: [Completion(logprobs=ODD)],
        NAMES[1]: [Completion(logprobs=ODD[::-1]), written, Completion(finish_reason="length")],
        NAMES[2]: [written],
        NAMES[4]: [Completion(logprobs=(-1.0,)), Completion(logprobs=(-2.0,))],
    }
    keep(tmp_path, "first", "u", known)
    found = ask(tmp_path, known | {NAMES[3]: [written]})
    assert bits(found) == bits(known)
    assert found[NAMES[2]][0].computed_tokens == 0
    assert ask(tmp_path, {}) == {}
    assert ask(tmp_path, {f"{1:032x}": [written]}) == {}  # its first 64 bits are another's
    for name, number in ((NAMES[4], 3), (NAMES[1], 4)):  # not as many as are asked for
        assert ask(tmp_path, {name: [written] * number}) == {}


def test_a_run_does_not_read_its_own_answers_but_those_of_the_run_that_was_deleted(tmp_path: Path) -> None:
    known = answers(0)
    file = keep(tmp_path, "first.with.dots", "u", known)
    assert ask(tmp_path, known, "first.with.dots") == {}
    plan_file = tmp_path / "first.with.dots-0123456789ab" / "plan.json"
    plan_file.parent.mkdir()
    plan_file.write_text("{}")
    os.utime(file, (1e9, 1e9))
    assert ask(tmp_path, known, "first.with.dots") == known
    os.utime(plan_file, (1e9, 1e9))
    assert ask(tmp_path, known, "first.with.dots") == {}


@pytest.mark.parametrize("change", [{"fingerprint": "0" * 16}, {"mode": "gpu"}])
def test_what_another_model_said_is_not_known(tmp_path: Path, change: dict[str, str]) -> None:
    known = answers(0)
    keep(tmp_path, "first", "u", known)
    other = Cache(plan_of(tmp_path, "later", **change))
    assert other.lookup(dict.fromkeys(known, 1)) == {}


def test_answers_of_another_version_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = answers(0)
    keep(tmp_path, "first", "u", known)
    monkeypatch.setattr(cache_files, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert ask(tmp_path, known) == {}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "columns"])
def test_a_damaged_file_is_left_out_with_a_remark(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = answers(0), answers(1)
    file = keep(tmp_path, "first", "u0", bad)
    keep(tmp_path, "first", "u1", good)
    if damage == "columns":
        pq.write_table(pa.table({"key": ["x"]}), file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"PAR1 no PAR1"}[damage])
    assert ask(tmp_path, bad | good) == good
    assert [file.name in record.message for record in caplog.records] == [True]


def test_no_flipped_bit_becomes_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    known = answers(0, 40)
    file = keep(tmp_path, "first", "u", known)
    whole = file.read_bytes()
    chance = random.Random(5)
    outcomes = set()
    for _ in range(150):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        found = ask(tmp_path, known)
        assert found.items() <= known.items()
        outcomes.add(len(found))
    assert outcomes == {0, 40}


def test_files_deleted_under_way_are_misses_and_the_others_are_found_again(tmp_path: Path) -> None:
    gone, left = answers(0), answers(1)
    file = keep(tmp_path, "first", "u0", gone)
    keep(tmp_path, "first", "u1", left)
    known = Cache(plan_of(tmp_path, "later"))
    assert known.lookup({NAMES[0]: 1}) == {}  # opens the index
    file.unlink()
    keep(tmp_path, "second", "u2", gone)  # as a run that merges its files does
    assert known.lookup(dict.fromkeys(gone, 1)) == {}
    assert known.lookup(dict.fromkeys(gone, 1)) == gone
    assert known.lookup(dict.fromkeys(left, 1)) == left


def test_no_cache_folder_can_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "_cache").write_text("not a folder")
    known = Cache(plan_of(tmp_path))
    assert known.lookup({NAMES[0]: 1}) == {}
    known.store("u", answers(0))
    tidy(plan_of(tmp_path), 1)
    assert len(caplog.records) >= 1


def test_a_sample_of_the_keys_finds_units_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [answers(number, 200) for number in range(8)]
    for number, unit in enumerate(units):
        keep(tmp_path, "first", f"u{number}", unit)
    monkeypatch.setattr(cache, "MAX_KEYS", 200)
    known = Cache(plan_of(tmp_path, "later"))
    for unit in units:
        some = dict(list(unit.items())[:150]) | answers(100, 50)
        assert len(known.lookup(dict.fromkeys(some, 1))) == 150
    index = known._open_index()
    assert 50 < len(index.high) <= 200
    assert (np.diff(index.high.astype(object)) > 0).all()


def test_files_of_units_are_put_together_and_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [answers(number) for number in range(20)]
    units[3] |= {NAMES[1]: [Completion(token_ids=(1,)), Completion(token_ids=(2,))]}
    units[9] |= {NAMES[1]: units[3][NAMES[1]]}
    for number, unit in enumerate(units):
        keep(tmp_path, "a.merged.b", f"u{number:02}", unit)
    other = keep(tmp_path, "a", "u", answers(50))
    (tmp_path / "_cache" / other.name.replace("first", "x")).touch()
    bad = keep(tmp_path, "a.merged.b", "u99", answers(99))
    bad.write_bytes(b"PAR1")
    everything = {name: group for unit in units for name, group in unit.items()}
    size = sum(stored.size for stored in listing(folder_of(str(tmp_path)))) // 3
    monkeypatch.setattr(cache_files, "_MERGED_BYTES", size)
    for _ in range(2):  # the second time there is nothing left to do
        tidy(plan_of(tmp_path, "a.merged.b"), 10)
        names = {stored.name for stored in listing(folder_of(str(tmp_path)))}
        assert other.name in names
        assert len(names) in (3, 4, 5)
        assert bits(ask(tmp_path, everything)) == bits(everything)
        for path in (tmp_path / "_cache").glob(f"*{USED}"):
            path.unlink()


@pytest.mark.parametrize("moment", ["write_bytes_atomic", "delete"])
def test_a_merge_that_is_killed_loses_nothing(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [answers(number) for number in range(4)]
    for number, unit in enumerate(units):
        keep(tmp_path, "first", f"u{number}", unit)
    everything = {name: group for unit in units for name, group in unit.items()}

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, moment, die)
        with pytest.raises(KeyboardInterrupt):
            tidy(plan_of(tmp_path), 10)
    assert ask(tmp_path, everything) == everything
    tidy(plan_of(tmp_path), 10)
    assert ask(tmp_path, everything) == everything


def test_pruning_deletes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    files = {}
    for number in range(5):
        files[number] = keep(tmp_path, "first", f"u{number}", answers(number, 50))
        os.utime(files[number], (1e9 + number, 1e9 + number))
    assert ask(tmp_path, answers(1, 50))  # used now
    marker = Path(f"{files[1]}{USED}")
    assert marker.exists()
    (tmp_path / "_cache" / f"gone.parquet{USED}").touch()
    folder, size = folder_of(str(tmp_path)), files[0].stat().st_size
    kept = prune(folder, 3.5 * size / 1e9)
    assert (kept.files, kept.models, kept.deleted_files) == (3, 1, 2)
    names = {stored.name for stored in listing(folder)}
    assert names == {files[1].name, files[3].name, files[4].name, marker.name}
    assert prune(folder, 1.0).deleted_files == 0
    assert prune(folder, 0).deleted_files == 3
    assert listing(folder) == []


def test_two_runs_at_once_write_and_read(tmp_path: Path) -> None:
    units = [answers(number, 30) for number in range(40)]

    def work(job: str, mine: Sequence[dict[str, list[Completion]]]) -> None:
        for number, unit in enumerate(mine):
            own = Cache(plan_of(tmp_path, job))
            found = own.lookup(dict.fromkeys(unit, 1))
            assert found in ({}, unit)
            own.store(f"u{number}", {name: group for name, group in unit.items() if name not in found})
        tidy(plan_of(tmp_path, job), 10)

    failures: list[BaseException] = []

    def guarded(job: str, mine: Sequence[dict[str, list[Completion]]]) -> None:
        try:
            work(job, mine)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=args) for args in (("a", units), ("b", units[::-1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    everything = {name: group for unit in units for name, group in unit.items()}
    assert ask(tmp_path, everything) == everything


def test_a_kill_while_writing_leaves_whole_files(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.test_pipelines_cache import answers, plan_of\n"
        "from pipelines.cache import Cache\n"
        "for number in range(10**6):\n"
        "    Cache(plan_of(Path(sys.argv[1]))).store(f'u{number}', answers(number, 2000))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while len(listing(folder_of(str(tmp_path)))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert ask(tmp_path, answers(0, 2000)) == answers(0, 2000)
    for path in (tmp_path / "_cache").glob("*.parquet"):
        assert pq.read_table(path).num_rows == 2000


class CountingEngine(FakeEngine):
    """Counts what it is asked; fails over prompts with this token in them."""

    def __init__(self, bad_token: int = -1) -> None:
        super().__init__()
        self.asked = 0
        self.bad_token = bad_token

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        self.asked += len(requests)
        future: Future[list[Completion]] = Future()
        future.set_result(
            [
                Completion(error="no memory") if self.bad_token in request.prompt_ids else completion
                for request, completion in zip(requests, super().submit(requests).result(), strict=True)
            ]
        )
        return future


def annotated(folder: Path, table: pa.Table, engine: FakeEngine, job: str) -> AnnotatedBlock:
    """Annotate `table` as the only unit of a run of its own."""
    close_caches()
    write_tickets(folder / job, "a.parquet", table)
    plan = fake_plan([folder / job], folder / "out", unit_rows=10_000)
    plan = replace(plan, output=str(folder / "out" / job), run_id=job, uses_cache=True)
    (unit,) = plan.units
    prompts = Prompts(plan.tasks, engine.tokenizer, 4096)
    return annotate(Block(unit, read_unit(unit), time.perf_counter()), plan, prompts, engine, open_cache(plan))


def test_cached_rows_are_the_computed_ones_but_for_route_and_usage(tmp_path: Path) -> None:
    table = pa.concat_tables([tickets(20), tickets(20).slice(3, 2)])
    engines = CountingEngine(), CountingEngine()
    first, again = (annotated(tmp_path, table, engine, f"job{i}") for i, engine in enumerate(engines))
    assert [engine.asked for engine in engines] == [40, 0]
    same = [name for name in first.table.schema.names if name not in ("route", "usage", "weight")]
    assert again.table.select(same).equals(first.table.select(same))
    routes = [block.table.column("route").to_pylist() for block in (first, again)]
    assert routes == [["large"] * 20 + ["duplicate"] * 2, ["cache"] * 20 + ["duplicate"] * 2]
    assert (first.rows_cached, again.rows_cached) == (0, 20)
    assert (again.computed_tokens, again.prompt_tokens, again.output_tokens) == (
        0,
        first.prompt_tokens,
        first.output_tokens,
    )
    for before, after in zip(first.table["usage"].to_pylist(), again.table["usage"].to_pylist(), strict=True):
        assert after == before | {"cached_tokens": before["prompt_tokens"]}


def test_failures_are_not_kept(tmp_path: Path) -> None:
    table = tickets(20)
    probe = FakeEngine().tokenizer.encode("7")[0]
    first = annotated(tmp_path, table, CountingEngine(probe), "job0")
    assert first.error_codes == {"engine_failure": 2}  # T000007 and T000017
    engine = CountingEngine()
    again = annotated(tmp_path, table, engine, "job1")
    assert (engine.asked, again.rows_cached, again.rejects.num_rows) == (4, 18, 0)


def test_a_job_without_a_cache_opens_none(tmp_path: Path) -> None:
    assert open_cache(replace(plan_of(tmp_path), uses_cache=False)) is None


def take_turns(output: str) -> None:
    """Write, merge, read, use and prune a cache at `output`, as two runs do."""
    first, later = (replace(plan_of(Path(), job), output=f"{output}/{job}-0123456789ab") for job in ("first", "later"))
    units = [answers(number) for number in range(3)]
    for number, unit in enumerate(units):
        Cache(first).store(f"u{number}", unit)
    assert len(listing(folder_of(output))) == 3
    tidy(first, 1)
    (merged,) = listing(folder_of(output))
    assert abs(merged.written - time.time()) < 100
    everything = {name: group for unit in units for name, group in unit.items()}
    assert Cache(later).lookup(dict.fromkeys(everything, 1)) == everything
    assert [stored.name for stored in listing(folder_of(output))] == [merged.name, merged.name + USED]
    assert Cache(first).lookup(dict.fromkeys(everything, 1)) == {}
    assert prune(folder_of(output), 0).deleted_files == 1
    assert listing(folder_of(output)) == []


def test_the_cache_lives_in_any_store() -> None:
    take_turns("memory://cache/annotated")


def test_the_cache_lives_in_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with moto() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().call_s3("create_bucket", Bucket="kept-answers")
        take_turns("s3://kept-answers/annotated")
