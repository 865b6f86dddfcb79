"""A stand-in engine that some tickets kill, stop or upset: what a ticket does to it stands in its text."""

import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NoReturn

import pyarrow as pa

from k2model.engine.request import Completion, Request
from pipelines import graph
from pipelines.read import read_unit
from schemas.runs import Plan, Unit
from tests.fakes import FakeEngine


def die(number: int) -> NoReturn:
    """End this process by a signal, which may take another of its threads a moment to meet."""
    os.kill(os.getpid(), number)
    time.sleep(60)
    raise AssertionError("unreachable")


class PoisonousEngine(FakeEngine):
    """Does to its process what the first poison among the requests of a submission says."""

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        """Return a future that is done, if there was no poison."""
        said = "\n".join(self.tokenizer.decode(request.prompt_ids) for request in requests)
        if "POISON kills" in said or ("POISON left" in said and "POISON right" in said):
            die(signal.SIGKILL)
        if "POISON crashes" in said:
            faulthandler.disable()
            ctypes.string_at(0)
        if "POISON hangs" in said:
            time.sleep(3600)
        if "POISON fills memory" in said:
            raise MemoryError("no more")
        return super().submit(requests)


def open_poisonous_engine(plan: Plan) -> PoisonousEngine:
    """Open the engine."""
    return PoisonousEngine(fingerprint=plan.model_fingerprint, pause_s=0.02)


def open_crashing_engine(plan: Plan) -> FakeEngine:
    """Die while the model is opened, each time."""
    die(signal.SIGKILL)


class _HopelessEngine(FakeEngine):
    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        die(signal.SIGILL)


def open_hopeless_engine(plan: Plan) -> FakeEngine:
    """Open an engine that dies of whatever it is asked."""
    return _HopelessEngine()


def open_engine_beside_a_deadly_file(plan: Plan) -> FakeEngine:
    """Open an engine in a process that dies of reading the unit that begins at row 4."""

    def read(unit: Unit) -> pa.Table:
        if unit.first_row == 4:
            die(signal.SIGBUS)
        return read_unit(unit)

    vars(graph)["read_unit"] = read
    return FakeEngine(fingerprint=plan.model_fingerprint)
