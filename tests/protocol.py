"""The commit protocol as a state machine: the real `commit` and `finalize`, interleaved at every storage operation.

Processes are threads that hand over before each storage operation, so that any of them can be stalled, killed or woken
late between any two. The store has what COMMIT.md assumes and no more: whole writes, reads of a named file that are
never old, and listings that may be.
"""

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from k2model.engine.request import Completion, Request
from pipelines import commit as commit_module
from pipelines import storage
from pipelines.annotate import AnnotatedBlock, Block, annotate
from pipelines.commit import commit, has_receipt, pending_units, write_failure, write_plan
from pipelines.finalize import finalize
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from schemas.errors import SchemaMismatch
from schemas.runs import Manifest, Plan, Unit
from tests.fakes import POLICY, FakeEngine, fake_plan, tickets, write_tickets

NUM_UNITS = 2
NUM_VARIANTS = 3
"""Results that attempts at a unit may have: as ever; a row rejected, as if memory had run out; the same rows written by
another version of pyarrow, in other bytes."""

POINTS = ("write receipts/", "write _manifest", "delete data/")
"""Operations before which a stalled process does most harm."""

MAX_PROCESSES = 6
VARIANT = st.integers(0, NUM_VARIANTS - 1)
STEPS = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 99])
"""Storage operations that a process does before it is stalled; 0: until one of `POINTS`."""
WHICH = st.integers(0, MAX_PROCESSES - 1)
RARELY = st.sampled_from([False] * 9 + [True])
LAG = st.sampled_from([0, 0, 1, 4])
"""How many changes ago a listing is from."""


class _FailingEngine(FakeEngine):
    def submit(self, requests: Any) -> "Future[list[Completion]]":
        future: Future[list[Completion]] = Future()
        answers: list[Completion] = super().submit(requests).result()
        future.set_result([_failed(requests[0]), *answers[1:]])
        return future


def _failed(request: Request) -> Completion:
    return Completion(error="out of memory", computed_tokens=0)


@cache
def planned() -> tuple[Plan, dict[tuple[str, int], AnnotatedBlock]]:
    """Return a plan of some units of two rows, and for each unit id what an attempt of each variant gives."""
    with tempfile.TemporaryDirectory() as folder:
        write_tickets(Path(folder), "a.parquet", tickets(2 * NUM_UNITS), row_group_size=2)
        plan = fake_plan([folder], "memory://protocol", unit_rows=2, tasks=(POLICY,))
        blocks = {}
        for variant, engine in enumerate((FakeEngine(), _FailingEngine(), FakeEngine())):
            prompts = Prompts(plan.tasks, engine.tokenizer, plan.max_prompt_tokens)
            for unit in plan.units:
                block = annotate(Block(unit, read_unit(unit), 0.0), plan, prompts, engine)
                if variant == 2:
                    block = replace(block, table=block.table.replace_schema_metadata({"writer": "another"}))
                blocks[unit.unit_id, variant] = block
    return plan, blocks


_to_parquet = commit_module.to_parquet
_WRITTEN: dict[int, tuple[pa.Table, bytes]] = {}


def to_parquet_once(table: pa.Table) -> bytes:
    """Return what `to_parquet` does; each of the few tables here is written once."""
    if id(table) not in _WRITTEN:
        _WRITTEN[id(table)] = table, _to_parquet(table)
    return _WRITTEN[id(table)][1]


class Killed(BaseException):
    """What a killed process raises where it stood."""


class Process:
    """A call in a thread of its own that waits before each of its storage operations until it is told to go on."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.next_op = "start"
        self.is_done = self.is_killed = False
        self.error: BaseException | None = None
        self._call = call
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.process = self  # type: ignore[attr-defined]
        self._thread.start()
        self.step()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._call()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.is_done, self.next_op = True, "the end"
        self._halted.release()

    def step(self) -> None:
        """Do the next storage operation, and what follows up to the one after it."""
        if not self.is_done:
            self._go.release()
            assert self._halted.acquire(timeout=60)
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        """End it where it stands: its next operation is not done."""
        self.is_killed = True
        self.step()
        self._thread.join()

    def hand_over(self, op: str) -> None:
        """Wait for the next step; called in the process's own thread."""
        self.next_op = op
        self._halted.release()
        self._go.acquire()
        if self.is_killed:
            raise Killed


class Store:
    """A store in memory, in place of the functions of `pipelines.storage`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.files: dict[str, bytes] = {}
        self.views: list[frozenset[str]] = [frozenset()]
        self.lag = 0
        """How many changes ago the next listing is from."""

    def patch(self, patcher: pytest.MonkeyPatch) -> None:
        """Put this store in the place of all others."""
        for name in ("write_bytes_atomic", "read_bytes", "read_text", "exists", "names", "delete"):
            patcher.setattr(storage, name, getattr(self, name))
        patcher.setattr(storage, "in_threads", lambda call, items: [call(item) for item in items])

    def _op(self, kind: str, url: str) -> str:
        path = url.removeprefix(self.root + "/")
        process = getattr(threading.current_thread(), "process", None)
        if process is not None:
            process.hand_over(f"{kind} {path}")
        return path

    def _changed(self) -> None:
        self.views.append(frozenset(self.files))

    def write_bytes_atomic(self, url: str, data: bytes) -> None:
        path = self._op("write", url)
        self.files[path] = data
        self._changed()

    def read_bytes(self, url: str) -> bytes:
        path = self._op("read", url)
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def read_text(self, url: str) -> str:
        return self.read_bytes(url).decode()

    def exists(self, url: str) -> bool:
        return self._op("look at", url) in self.files

    def names(self, url: str) -> list[str]:
        folder = self._op("list", url) + "/"
        view = self.views[max(0, len(self.views) - 1 - self.lag)]
        return sorted(path.removeprefix(folder) for path in view if path.startswith(folder))

    def delete(self, url: str) -> None:
        self.files.pop(self._op("delete", url), None)
        self._changed()


class Protocol(RuleBasedStateMachine):
    """Runs, stray attempts and their ends, in any order. Invariant: what `_SUCCESS` vouched for once holds for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.blocks = planned()
        self.patcher = pytest.MonkeyPatch()
        self.store = Store(self.plan.output)
        self.store.patch(self.patcher)
        self.patcher.setattr(commit_module, "to_parquet", to_parquet_once)
        self.processes: list[Process] = []
        self.is_coarse = False
        self.are_bytes_equal = True
        self.vouched: set[bytes] = set()
        self.promised: set[str] = set()
        """Files that a published manifest named, at any time."""
        self.contents = {
            folder: {
                to_parquet_once(getattr(block, column)): block
                for block in self.blocks.values()
                if block.rejects.num_rows or column == "table"
            }
            for folder, column in (("data", "table"), ("rejects", "rejects"))
        }

    @initialize(
        number=st.sampled_from([1, 1, 1, 0, 2]),
        variants=st.lists(VARIANT, min_size=2, max_size=3),
        is_coarse=st.booleans(),
    )
    def begin(self, number: int, variants: list[int], is_coarse: bool) -> None:
        """So many units are done; several attempts at the next one, and two drivers at their end, are about to begin.

        If `is_coarse`, processes are stalled only where a stall does most harm, so that fewer schedules try all orders.
        """
        write_plan(self.plan)
        for unit in self.plan.units[:number]:
            self._attempt(unit, 0)
        self.is_coarse = is_coarse
        for variant in variants:
            self._begin_attempt(self.plan.units[1], variant)
        self.processes += [Process(lambda: finalize(self.plan, max_reject_rate=1.0)) for _ in range(2)]

    def _begin_attempt(self, unit: Unit, variant: int) -> None:
        self.are_bytes_equal &= variant == 0
        self.processes.append(Process(lambda: self._attempt(unit, variant)))

    def _attempt(self, unit: Unit, variant: int) -> None:
        if not has_receipt(self.plan, unit):
            commit(self.blocks[unit.unit_id, variant], self.plan)

    def _run(self, variant: int, max_reject_rate: float) -> Manifest:
        write_plan(self.plan)
        for unit in pending_units(self.plan):
            self._attempt(unit, variant)
        return finalize(self.plan, max_reject_rate=max_reject_rate)

    def _is_room(self) -> bool:
        return not self.processes or (len(self.processes) < MAX_PROCESSES and not self.is_coarse)

    @precondition(_is_room)
    @rule(variant=VARIANT, max_reject_rate=st.sampled_from([1.0, 0.0]))
    def begin_run(self, variant: int, max_reject_rate: float) -> None:
        """Another driver begins, with one worker that lives and dies with it."""
        self.are_bytes_equal &= variant == 0
        self.processes.append(Process(lambda: self._run(variant, max_reject_rate)))

    @precondition(_is_room)
    @rule(unit=st.integers(0, NUM_UNITS - 1), variant=VARIANT)
    def begin_attempt(self, unit: int, variant: int) -> None:
        """A worker of some driver, which may be dead by now, begins a unit."""
        self._begin_attempt(self.plan.units[unit], variant)

    @precondition(lambda self: not self.is_coarse)
    @rule(unit=st.integers(0, NUM_UNITS - 1))
    def note_failure(self, unit: int) -> None:
        """A worker could not read its input just now."""
        write_failure(self.plan, self.plan.units[unit], SchemaMismatch("half a file"))

    @precondition(lambda self: self.processes)
    @rule(which=WHICH, is_killed=RARELY, steps=STEPS, lag=LAG)
    def go_on(self, which: int, is_killed: bool, steps: int, lag: int) -> None:
        """One process goes on until it ends or is stalled again; or it is killed where it stands."""
        process = self.processes[which % len(self.processes)]
        if is_killed:
            process.kill()
        for step in count(1):
            self.step(process, lag)
            is_at_point = process.next_op.startswith(POINTS)
            if process.is_done or (is_at_point if self.is_coarse or not steps else step == steps):
                break
        self.processes = [process for process in self.processes if not process.is_done]

    def step(self, process: Process, lag: int = 0) -> None:
        """One process does one storage operation; what was published before is there still."""
        self.store.lag = lag
        process.step()
        self.store.lag = 0
        self.what_success_vouches_for_holds()

    @invariant()
    def what_success_vouches_for_holds(self) -> None:
        """A reader finds every row once, now and for ever after, by any manifest that it may have read."""
        files = self.store.files
        if "_SUCCESS" not in files:
            assert not self.vouched, "_SUCCESS has been taken back"
            return
        text = files["_manifest.json"]
        if text not in self.vouched:
            manifest = Manifest.from_json(text.decode())
            self._check(manifest)
            self.vouched.add(text)
            self.promised |= {f"data/{name}" for name in manifest.data}
            self.promised |= {f"rejects/{name}" for name in manifest.rejects}
        lost = self.promised - files.keys()
        assert not lost, f"published, and gone: {lost}"
        if self.are_bytes_equal:
            assert self.stored("data") == set(Manifest.from_json(text.decode()).data), "a glob finds other files"

    def _check(self, manifest: Manifest) -> None:
        """Assert that the manifest names one result of each unit, data and rejects of the same attempt."""
        assert manifest.status == "complete"
        files = self.store.files
        found = [self.contents["data"][files[f"data/{name}"]] for name in manifest.data]
        assert [block.unit for block in found] == list(self.plan.units)
        expected = [to_parquet_once(block.rejects) for block in found if block.rejects.num_rows]
        assert [files[f"rejects/{name}"] for name in manifest.rejects] == expected
        assert manifest.rows_rejected == sum(block.rejects.num_rows for block in found)
        assert manifest.rows_annotated + manifest.rows_rejected == self.plan.rows

    def stored(self, folder: str) -> set[str]:
        """Return the names of the files in a folder of the run."""
        return {path.removeprefix(f"{folder}/") for path in self.store.files if path.startswith(f"{folder}/")}

    def teardown(self) -> None:
        """One quiet run ends it, beside any number of stalled processes; these, woken, change nothing."""
        try:
            self._quiet_run()
            for process in self.processes:
                while not process.is_done:
                    self.step(process, 0)
            self._quiet_run()
        finally:
            self.close()

    def close(self) -> None:
        """End what is left, and give the real store back."""
        for process in self.processes:
            process.kill()
        self.patcher.undo()

    def _quiet_run(self) -> None:
        manifest = self._run(0, 1.0)
        self._check(manifest)
        self.what_success_vouches_for_holds()
        assert self.vouched
        claimed = {f"{name}.parquet" for name in self.stored("claims")}
        for folder, named in (("data", manifest.data), ("rejects", manifest.rejects)):
            assert self.stored(folder) - set(named) <= claimed, "left lying about"
        assert not self.stored("failures")
        assert "_unfinished.json" not in self.store.files


def schedules(number: int, *, seed: int | None = None) -> None:
    """Run so many schedules of the machine; without a seed always the same ones."""
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    chosen = settings(
        max_examples=number,
        stateful_step_count=40,
        deadline=None,
        derandomize=seed is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    machine: Any = Protocol
    if seed is not None:
        from hypothesis import seed as seeded

        machine = seeded(seed)(type("Protocol", (Protocol,), {}))
    run_state_machine_as_test(machine, settings=chosen)
