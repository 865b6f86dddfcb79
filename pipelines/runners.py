"""Where the graph runs: `local` (threads of this process), `dask` (worker processes), `portable` (any other runner)."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipelines import graph
from pipelines.annotate import OpenEngine
from pipelines.graph import open_model
from pipelines.quiet_beam import beam
from schemas.errors import EnvironmentMismatch, K2Error, SpecError
from schemas.runs import Plan, Unit

RUNNERS = ("local", "dask", "portable")

BUNDLE_THREADS = 3
"""Units under way at once per engine: while one computes, others read and write. Measured on a unit of 0.15 s reading
and 0.15 s writing: the engine is busy 50 % of the time with 1, 87 % with 2, 91 % with 3."""

_RETRIES = 2
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LOG_VARIABLE = "DASK_LOGGING__DISTRIBUTED"


def run_units(
    plan: Plan,
    units: Sequence[Unit],
    *,
    runner: str = "local",
    workers: int = 1,
    options: Sequence[str] = (),
    open_engine: OpenEngine | None = None,
) -> None:
    """Annotate `units` and commit each; return when the runner is done.

    A unit whose input cannot be read is noted and left without a receipt; any other error ends the run.

    Args:
        plan: the plan that the units belong to, written already.
        units: the units to do; those that have a receipt by then are skipped.
        runner: one of `RUNNERS`.
        workers: worker processes, for `dask`.
        options: Beam pipeline options, such as `--direct_num_workers=4` or `--dask_client_address=tcp://...`.
        open_engine: opens the model in a worker; an importable function.

    Raises: the K2Error of the step that failed; EnvironmentMismatch if the runner cannot start.
    """
    if runner not in RUNNERS:
        raise SpecError(f'runner is "{runner}", expected one of: {", ".join(RUNNERS)}')
    if not units:
        return  # an empty graph has no partition to run on Dask
    build = partial(graph.build, plan=plan, units=units, open_engine=open_engine or open_model)
    try:
        if runner == "local":
            _run_local(build, options)
        elif runner == "dask":
            _run_dask(build, options, workers, len(units))
        else:
            _run_portable(build, options)
    except Exception as error:
        known = _find_k2(error)
        if known is None or known is error:
            raise
        raise known from error


def _find_k2(error: BaseException | None) -> K2Error | None:
    while error is not None:
        if isinstance(error, K2Error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _run_local(build: Callable[..., None], options: Sequence[str]) -> None:
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

    if any(option.startswith("--direct_running_mode") for option in options):
        raise SpecError(
            "runner local runs in threads of this process; --direct_running_mode is not among its options",
            remedy='for several processes, use runner = "dask"',
        )
    flags = ["--direct_running_mode=multi_threading", f"--direct_num_workers={BUNDLE_THREADS}", *options]
    # Named, never Beam's default runner: that one first tries to download a binary.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=beam.options.pipeline_options.PipelineOptions(flags))
    build(pipeline, keep_errors=True)
    graph.take_error()  # one that an interrupted run left behind
    try:
        pipeline.run().wait_until_finish()
    finally:
        graph.close_engines()
    error = graph.take_error()
    if error is not None:
        raise error


def _run_portable(build: Callable[..., None], options: Sequence[str]) -> None:
    names = [option.partition("=")[2] for option in options if option.startswith("--runner=")]
    if not names or names[-1].lower() in ("directrunner", "switchingdirectrunner"):
        raise SpecError(
            "runner portable needs --runner=<name> among [deploy] options",
            remedy='for one machine, use runner = "local"',
        )
    pipeline = beam.Pipeline(options=beam.options.pipeline_options.PipelineOptions(list(options)))
    build(pipeline)
    pipeline.run().wait_until_finish()


def _run_dask(build: Callable[..., None], options: Sequence[str], workers: int, num_units: int) -> None:
    try:
        from apache_beam.runners.dask.dask_runner import DaskRunner
        from dask.base import annotate
    except ImportError as error:
        raise EnvironmentMismatch(f"runner dask: {error}", remedy="pip install 'apache-beam[dask]'") from error

    given = [option for option in options if option.startswith("--dask_client_address=")]
    with _given_cluster(given[-1]) if given else _local_cluster(workers) as address:
        # One task per unit: the scheduler balances them as they end.
        flags = [*options, f"--dask_client_address={address}", f"--dask_npartitions={num_units}"]
        pipeline = beam.Pipeline(runner=DaskRunner(), options=beam.options.pipeline_options.PipelineOptions(flags))
        build(pipeline)
        graph.refuse_unsafe(pipeline)
        with annotate(retries=_RETRIES):
            result: Any = pipeline.run()
        try:
            result.wait_until_finish()
        finally:
            # The runner never closes its client, which then tries to reconnect for 30 s at exit.
            result.client.close()


@contextmanager
def _given_cluster(option: str) -> Iterator[str]:
    """Yield the address of a cluster of the user's; its workers give the engines back afterwards."""
    from distributed import Client

    address = option.partition("=")[2]
    try:
        yield address
    finally:
        with Client(address, set_as_default=False) as client:
            client.run(graph.close_engines)


@contextmanager
def _local_cluster(workers: int) -> Iterator[str]:
    """Yield the address of a cluster of `workers` processes on this machine, which share its cores."""
    from distributed import LocalCluster

    # Importing distributed sets its loggers to INFO, here and in each worker; at ERROR a worker still prints every
    # failed unit's traceback, three times for its retries. What ends a run is raised by the driver, once.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    wanted = {**dict.fromkeys(_THREAD_VARIABLES, threads), _LOG_VARIABLE: "critical"}
    before = dict(os.environ)
    # Dask sets the number of threads to 1, and more, in the driver's own environment before it spawns a worker, unless
    # it is set: so it is set here for the workers, and all is put back for the driver.
    os.environ.update({name: before.get(name, value) for name, value in wanted.items()})
    cluster = None
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=BUNDLE_THREADS,
            processes=True,
            # Memory is the engine's, not Dask's: spilling cannot free it, and pausing at 80 % would stall the run.
            memory_limit=0,
            dashboard_address=None,
            preload=["pipelines.quiet_beam"],
            silence_logs=logging.CRITICAL,
        )
        yield cluster.scheduler_address
    finally:
        if cluster is not None:
            cluster.close()
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
