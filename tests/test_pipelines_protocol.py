"""The commit protocol holds in every order of storage operations that is tried; `make chaos` tries 10,000."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.protocol import Process, Protocol, schedules


def test_schedules() -> None:
    schedules(120)


@contextmanager
def begun(*variants: int) -> Iterator[Protocol]:
    """Yield a machine with one of two units done, attempts at the other, and two drivers at their end; check it."""
    machine = Protocol()
    try:
        machine.begin(1, list(variants), is_coarse=True)
        yield machine
    except BaseException:
        machine.close()
        raise
    machine.teardown()


def go_on(machine: Protocol, process: Process, point: str = "the end") -> None:
    machine.step(process)
    while not process.next_op.startswith(point):
        assert not process.is_done, f"ended without {point}"
        machine.step(process)


def test_second_driver_publishes_late_what_was_superseded() -> None:
    with begun(1, 2) as machine:
        first, second, late, quick = machine.processes
        go_on(machine, first, "write receipts/")
        go_on(machine, second, "write receipts/")
        go_on(machine, first)
        go_on(machine, late, "write _manifest")
        go_on(machine, second)
        go_on(machine, quick)
        go_on(machine, late)
    assert len(machine.vouched) == 2


def test_receipt_is_read_before_its_attempt_went_on() -> None:
    with begun(1, 2) as machine:
        first, second, late, quick = machine.processes
        go_on(machine, second, "write receipts/")
        go_on(machine, first, "write receipts/")
        machine.step(first)
        go_on(machine, late, "write _manifest")
        go_on(machine, second)
        go_on(machine, quick)
        go_on(machine, late)


def test_receipt_comes_while_its_file_is_being_deleted() -> None:
    with begun(1, 2) as machine:
        late, winner, slow, quick = machine.processes
        go_on(machine, late, "write claims/")
        go_on(machine, winner)
        go_on(machine, slow, "list receipts")
        go_on(machine, quick, "delete data/")
        go_on(machine, late)
        go_on(machine, slow)
        go_on(machine, quick)


def test_late_driver_does_not_hide_the_published_manifest() -> None:
    with begun(0) as machine:
        attempt, late, quick = machine.processes
        go_on(machine, late, "write _unfinished")
        go_on(machine, attempt)
        go_on(machine, quick)
        go_on(machine, late)


def test_late_attempt_finds_its_file_deleted() -> None:
    with begun(0, 1) as machine:
        winner, late, driver, other = machine.processes
        go_on(machine, late, "write claims/")
        go_on(machine, winner)
        go_on(machine, driver)
        assert not machine.stored("rejects")
        go_on(machine, late)
        go_on(machine, other)


def test_driver_that_dies_before_the_leftovers_are_deleted() -> None:
    with begun(0, 1) as machine:
        winner, late, driver, _ = machine.processes
        go_on(machine, late, "write claims/")
        late.kill()
        go_on(machine, winner)
        go_on(machine, driver, "look at claims/")
        driver.kill()
        assert machine.stored("rejects")
    assert not machine.stored("rejects")
