"""Units on a `dask.distributed` cluster, through Beam's Dask runner: the user's, or worker processes of our own."""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import Any

from pipelines import graph, storage
from pipelines.giving_up import GIVEN_UP, LOOK_S, wait_or_give_up
from pipelines.quiet_beam import beam
from pipelines.stop import deaf_children
from schemas.errors import EnvironmentMismatch, K2Error, SpecError
from schemas.runs import Plan, Unit

BUNDLE_THREADS = 3
"""Units under way at once per engine: while one computes, others read and write. Measured on a unit of 0.15 s reading
and 0.15 s writing: the engine is busy 50 % of the time with 1, 87 % with 2, 91 % with 3."""

PACKAGES = ("k2batch", "apache-beam", "cloudpickle", "dask", "distributed", "pyarrow", "tokenizers", "torch")
"""What decides whether a step can be sent to a worker, and which bits come back."""

_SCHEDULER_PACKAGES = ("k2batch", "apache-beam", "cloudpickle", "dask", "distributed")
"""The scheduler unpickles the graph too, but computes nothing."""

_ROUND = 2_000
"""Units in one graph. A graph takes 30 kB of the driver's memory and 1.5 ms for each of its units, measured at 10,000,
so a million in one would take 30 GB. Two are under way at once, so that no worker waits for a round's slowest unit."""

_RETRIES = 2
_CONNECT_S = 10
_WORKERS_S = 300.0
"""How long a cluster may be without a worker, at the start or later: that of a machine that is being started."""
_RESTART_S = 30.0
"""How long our own may be: Dask starts a dead worker again in seconds, or never, where it died early in its life
(`Nanny._on_worker_exit` passes over the status `starting`)."""
_LOOK_S = 5.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LOG_VARIABLE = "DASK_LOGGING__DISTRIBUTED"
_PROFILE_VARIABLE = "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"
"""Dask looks at every thread's stack 100 times a second, in which Python 3.11.7 was twice seen to lock up for good on a
loaded machine (github.com/python/cpython/issues/106883)."""
_ADDRESS_OPTIONS = ("--dask_client_address", "--dask_scheduler_file")

Say = Callable[[str], None]


class _NoWorkers(EnvironmentMismatch):
    """There was no worker for too long."""


class _GivenUp(Exception):
    """The run is given up; what is under way is no longer waited for."""


def run_dask(
    build: Callable[..., None],
    plan: Plan,
    units: Sequence[Unit],
    *,
    options: Sequence[str],
    workers: int,
    address: str,
    say: Say,
    is_over: Callable[[], bool],
) -> str | None:
    """Run the graph over `units` on the cluster at `address`, or on `workers` processes that end with this call.

    Returns None once all had their turn or the run is given up, or how a worker died, after which others may have had
    none.

    Args:
        build: adds the graph of its argument `units` to a pipeline.
        plan: the plan that the units belong to, written already.
        units: at least one, in the order in which they are to begin.
        options: Beam pipeline options.
        workers: processes to start where there is no `address`.
        address: such as `tcp://host:8786`; empty for none.
        say: takes a line when there is something to wait for.
        is_over: whether no further unit may be begun.

    Raises: EnvironmentMismatch if the cluster cannot be used, or is lost on the way; what a unit raised three times.
    """
    try:
        import apache_beam.runners.dask.dask_runner
        from dask.base import annotate
        from distributed import KilledWorker
    except ImportError as error:
        raise EnvironmentMismatch(f"runner dask: {error}", remedy='pip install "k2batch[dask]"') from error
    if given := [option for option in options if option.startswith(_ADDRESS_OPTIONS)]:
        raise SpecError(f'"{given[0]}" is among [deploy] options', remedy='say dask_address = "tcp://host:8786"')
    del apache_beam
    # Importing distributed sets its loggers to INFO, here and in each worker; at ERROR a worker still prints every
    # failed unit's traceback, three times for its retries. What ends a run is raised by the driver, once.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    # A slot is a unit under way on a card: a worker started with --resources GPU=3 has three.
    slots = {} if plan.mode == "cpu" else {"GPU": 1}
    try:
        with (
            _given_cluster(address, plan, slots, say) if address else _local_cluster(workers, slots) as client,
            annotate(retries=_RETRIES, **({"resources": slots} if slots else {})),
            _lost_cluster_told(client),
        ):
            _run_rounds(build, units, options, client, slots, say, _WORKERS_S if address else _RESTART_S, is_over)
    except _GivenUp:
        if address:
            say(f"{address}: units under way there are not waited for; what they still commit is kept")
    except _NoWorkers as error:
        if address:
            raise
        return error.message
    except KilledWorker as error:
        return f"{error.last_worker.address} was the last of {error.allowed_failures + 1} workers to die at one unit"
    return None


def _run_rounds(
    build: Callable[..., None],
    units: Sequence[Unit],
    options: Sequence[str],
    client: Any,
    slots: Mapping[str, int],
    say: Say,
    patience_s: float,
    is_over: Callable[[], bool],
) -> None:
    """Run the graph over slices of `units`, two at a time."""
    underway: deque[Any] = deque()
    try:
        for start in range(0, len(units), _ROUND):
            if is_over():  # else every unit left would be sent round for a worker to pass over
                break
            underway.append(_start(build, units[start : start + _ROUND], start, options, client.scheduler.address))
            if len(underway) > 1:
                _finish(underway, client, slots, say, patience_s)
        while underway:
            _finish(underway, client, slots, say, patience_s)
    finally:
        for result in underway:
            result.client.close()


def _start(build: Callable[..., None], units: Sequence[Unit], first: int, options: Sequence[str], address: str) -> Any:
    """Return the result of a graph over `units`, the first of which is number `first` of all; it has begun."""
    from apache_beam.runners.dask.dask_runner import DaskRunner
    from dask.base import annotate

    # One task per unit: the scheduler balances them as they end. Of several units in a task, the runner would read all
    # before it annotated one, and commit none before it had annotated all.
    flags = [*options, f"--dask_client_address={address}", f"--dask_npartitions={len(units)}"]
    pipeline = beam.Pipeline(runner=DaskRunner(), options=beam.options.pipeline_options.PipelineOptions(flags))
    build(pipeline, units=units)
    graph.refuse_unsafe(pipeline)
    # By itself Dask takes partitions by name, the last first: 39, 38, ..., 4, 39 before 3. A lambda, so that the
    # scheduler gets it by value.
    with annotate(priority=lambda key: -(first + key[1]) if isinstance(key, tuple) else 0):
        return pipeline.run()


def _finish(underway: deque[Any], client: Any, slots: Mapping[str, int], say: Say, patience_s: float) -> None:
    """Wait for the oldest graph under way, and take it off.

    Raises: what a unit raised; EnvironmentMismatch if there was no worker for it for too long.
    """
    result = underway[0]
    (future,) = result.futures
    seen = time.monotonic()
    while not future.done():  # the runner's own wait cannot look up in between
        _wait(future)
        waited = time.monotonic() - seen
        if future.done() or _has_slots(client, slots):
            seen = time.monotonic()
        elif waited > patience_s:
            raise _NoWorkers(
                f"{client.scheduler.address}: no worker for {waited:.0f} s",
                remedy="start workers, then run the same job again: it resumes",
            )
        elif waited < 2 * _LOOK_S:
            say(f"every worker of {client.scheduler.address} is gone; waiting up to {patience_s:.0f} s for another")
    if future.status != "finished":
        future.result()
    # The runner never closes its client, which then tries to reconnect for 30 s at exit.
    underway.popleft().client.close()


def _wait(future: Any) -> None:
    """Wait for `future`, but only a while. Raises: _GivenUp."""
    until = time.monotonic() + _LOOK_S
    while not future.done() and time.monotonic() < until:
        if GIVEN_UP.is_set():
            raise _GivenUp
        with suppress(TimeoutError):
            future.exception(timeout=LOOK_S)


def _has_slots(client: Any, slots: Mapping[str, int]) -> bool:
    """Return whether there is a worker that may run a unit."""
    workers = client.scheduler_info()["workers"].values()
    return any(all(worker["resources"].get(name, 0) >= n for name, n in slots.items()) for worker in workers)


@contextmanager
def _lost_cluster_told(client: Any) -> Iterator[None]:
    """Turn what the end of a scheduler raises, which is many things, into an error that says so."""
    try:
        yield
    except _GivenUp:
        raise
    except Exception as error:
        # Futures are cancelled when the connection breaks, even if it comes back; nothing here cancels one.
        if not isinstance(error, CancelledError) and _answers(client):
            raise
        raise EnvironmentMismatch(
            f"{client.scheduler.address}: the scheduler was lost under way: {type(error).__name__}: {error}",
            remedy="start it again, then run the same job again: it resumes",
        ) from error


def _answers(client: Any) -> bool:
    with suppress(Exception):
        client.scheduler_info()  # which waits for a connection, and without one returns what it knew
    return bool(client.status == "running")


@contextmanager
def _given_cluster(address: str, plan: Plan, slots: Mapping[str, int], say: Say) -> Iterator[Any]:
    """Yield a client of a cluster of the user's, once it is fit; its workers give the engines back afterwards."""
    from distributed import Client

    _look_for_scheduler(address)
    with Client(address, timeout=_CONNECT_S, set_as_default=False) as client:
        _wait_for_workers(client, address, say)
        versions: Any = client.get_versions(packages=PACKAGES)
        check_versions(versions)
        if not _has_slots(client, slots):
            raise EnvironmentMismatch(
                f'{address}: no worker has a GPU slot, which mode = "{plan.mode}" needs',
                remedy=f"start one per card: dask worker {address} --nthreads {BUNDLE_THREADS}"
                f" --resources GPU={BUNDLE_THREADS}",
            )
        _check_storage(client, plan)
        _tell_idle_cores(client, say)
        try:
            yield client
        finally:
            # A worker that does not answer must not keep a driver that has its result, or an error to tell. One that
            # is still about its units must keep its engine.
            if not GIVEN_UP.is_set():
                closing = threading.Thread(target=_close_engines, args=(client,), daemon=True)
                closing.start()
                closing.join(_CONNECT_S)


def _close_engines(client: Any) -> None:
    with suppress(Exception):  # what ended the run matters more
        client.run(graph.close_engines, on_error="ignore")


def _look_for_scheduler(address: str) -> None:
    """Raise EnvironmentMismatch, within seconds, where no scheduler answers; a client waits for ever for a mute one."""
    from distributed.core import rpc

    async def ask() -> Any:
        async with rpc(address) as scheduler:
            return await scheduler.identity()

    try:
        found = asyncio.run(asyncio.wait_for(ask(), _CONNECT_S))["type"]
        problem = "" if found == "Scheduler" else f"is that of a {found}"
    except TimeoutError:
        problem = f"nothing answers within {_CONNECT_S} s"
    except Exception as error:  # of any kind: another service's answer is read as if it were Dask's
        problem = f"{type(error).__name__}: {error}"
    if problem:
        remedy = "give the address that `dask scheduler` prints; does a firewall let its port through?"
        raise EnvironmentMismatch(f"[deploy] dask_address {address}: {problem}", remedy=remedy)


def _wait_for_workers(client: Any, address: str, say: Say) -> None:
    if client.scheduler_info()["workers"]:
        return
    say(f"{address} has no worker yet; waiting up to {_WORKERS_S:.0f} s for one")
    try:
        if not wait_or_give_up(lambda: client.wait_for_workers(1, timeout=_WORKERS_S)):
            raise _GivenUp
    except TimeoutError:
        remedy = f"start some: dask worker {address} --nthreads {BUNDLE_THREADS}"
        raise EnvironmentMismatch(f"{address}: no worker came within {_WORKERS_S:.0f} s", remedy=remedy) from None


def check_versions(versions: Mapping[str, Any]) -> None:
    """Compare the scheduler's and the workers' packages with ours.

    Args:
        versions: what `Client.get_versions(packages=PACKAGES)` says.

    Raises: EnvironmentMismatch naming each process at fault, with its packages.
    """
    ours = versions["client"]["packages"]
    problems = _differences("the scheduler", versions["scheduler"]["packages"], ours, _SCHEDULER_PACKAGES)
    for address, found in versions["workers"].items():
        problems += _differences(f"worker {address}", found["packages"], ours, PACKAGES)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise EnvironmentMismatch(
            f"{'; '.join(problems[:5])}{more}",
            remedy="install there what is here, k2batch's wheel with it, or start it from the image that"
            " jobs/deploy/Dockerfile builds",
        )


def _differences(
    who: str, theirs: Mapping[str, str | None], ours: Mapping[str, str | None], names: Sequence[str]
) -> list[str]:
    wrong = []
    for name in ("python", *names):
        found, wanted = _public(name, theirs.get(name)), _public(name, ours.get(name))
        if found is None:
            wrong.append(f"{name} is not installed")
        elif found != wanted:
            wrong.append(f"{name} {found}, here {wanted}")
    return [f"{who}: {', '.join(wrong)}"] if wrong else []


def _public(name: str, version: str | None) -> str | None:
    """Return the part of a version that matters: Python's minor, a package's without its build such as `+cpu`."""
    if version is None:
        return None
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def _check_storage(client: Any, plan: Plan) -> None:
    """Raise EnvironmentMismatch for a worker that does not see the run's folder: it would write elsewhere."""
    for address, problem in client.run(_look_at, storage.join(plan.output, "plan.json")).items():
        if problem:
            raise EnvironmentMismatch(
                f"worker {address}: {problem}",
                remedy="[output] url must lead every worker to the same store: s3://..., or a folder they share",
            )


def _tell_idle_cores(client: Any, say: Say) -> None:
    """Say so where workers compute with one core of several: Dask's nanny sets that, unless it is told another."""
    found = client.run(_threads_and_cores).values()
    if idle := sum(threads == "1" and cores > 1 for threads, cores in found):
        say(f"{idle} of {len(found)} workers compute with 1 of their cores; start them with OMP_NUM_THREADS=<cores>")


def _threads_and_cores() -> tuple[str | None, int]:
    return os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1


def _look_at(url: str) -> str:
    """Return why this process cannot use `url`; nothing if it can."""
    try:
        return "" if storage.exists(url) else f"finds no {url}"
    except (K2Error, ImportError, ValueError) as error:
        return f"cannot look at {url}: {error}"


@contextmanager
def _local_cluster(workers: int, slots: Mapping[str, int]) -> Iterator[Any]:
    """Yield a client of a cluster of `workers` processes on this machine, which share its cores."""
    from distributed import Client, LocalCluster

    threads = str(max(1, (os.cpu_count() or 1) // workers))
    wanted = {**dict.fromkeys(_THREAD_VARIABLES, threads), _LOG_VARIABLE: "critical", _PROFILE_VARIABLE: "False"}
    before = dict(os.environ)
    # Dask sets the number of threads to 1, and more, in the driver's own environment before it spawns a worker, unless
    # it is set: so it is set here for the workers, and all is put back for the driver.
    os.environ.update({name: before.get(name, value) for name, value in wanted.items()})
    cluster = None
    try:
        with deaf_children():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=BUNDLE_THREADS,
                processes=True,
                # Memory is the engine's, not Dask's: spilling cannot free it, and pausing at 80 % would stall the run.
                memory_limit=0,
                dashboard_address=None,
                # The scheduler has an HTTP port all the same: any, or a second run on this machine warns of the first.
                scheduler_kwargs={"dashboard_address": ":0"},
                preload=["pipelines.quiet_beam"],
                resources={name: n * BUNDLE_THREADS for name, n in slots.items()},
                silence_logs=logging.CRITICAL,
            )
        with Client(cluster.scheduler_address, set_as_default=False) as client:
            yield client
    finally:
        if cluster is not None:
            cluster.close()
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
