"""Where the graph runs: `local` (threads of this process), `dask` (worker processes), `portable` (any other runner)."""

import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import cast

from pipelines import graph
from pipelines.annotate import OpenEngine
from pipelines.cluster import BUNDLE_THREADS, Say, run_dask
from pipelines.giving_up import wait_or_give_up
from pipelines.graph import Flow, open_model
from pipelines.quiet_beam import beam
from pipelines.stop import Stop, is_over
from pipelines.supervise import run_child, until_done
from pipelines.watch import STALL_SECONDS
from schemas import errors
from schemas.errors import EnvironmentMismatch, K2Error, SpecError
from schemas.runs import Plan, Unit

RUNNERS = ("local", "dask", "portable")

ROUND_UNITS = 10_000
"""Units of one pipeline. Beam's local runner holds 5 kB for each; a job that is sent elsewhere carries them all."""

_CONNECT_S = 10
_OURS = re.compile(r"\bschemas\.errors\.(\w+): (.*?)(?: \[while running .*)?$", re.MULTILINE)


def run_units(
    plan: Plan,
    units: Sequence[Unit],
    *,
    runner: str = "local",
    workers: int = 1,
    options: Sequence[str] = (),
    open_engine: OpenEngine | None = None,
    dask_address: str = "",
    say: Say = lambda line: None,
    stop: Stop | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> int:
    """Annotate `units` and commit each; return how many processes died on the way.

    A unit whose input cannot be read is noted and left without a receipt, and a row that kills or stops its process is
    rejected; any other error ends the run.

    Args:
        plan: the plan that the units belong to, written already.
        units: the units to do; those that have a receipt by then are skipped.
        runner: one of `RUNNERS`.
        workers: worker processes, for `dask` without an address.
        options: Beam pipeline options, such as `--direct_num_workers=4`.
        open_engine: opens the model in a worker; an importable function.
        dask_address: of the user's own cluster, such as `tcp://host:8786`, for `dask`.
        say: takes a line when there is something to wait for.
        stop: says when no further unit is begun; None to do all.
        stall_seconds: after which a process that computes nothing is ended, on `local` and `dask`; 0 for never.

    Raises: the K2Error of the step that failed; EnvironmentMismatch if the runner cannot start.
    """
    if runner not in RUNNERS:
        raise SpecError(f'runner is "{runner}", expected one of: {", ".join(RUNNERS)}')
    if not units:
        return 0  # an empty graph has no partition to run on Dask
    flow = Flow(plan=plan, open_engine=open_engine or open_model, stop=stop, stall_seconds=stall_seconds)

    def once(units: Sequence[Unit], is_careful: bool) -> str | None:
        now = replace(flow, is_careful=is_careful)
        if runner == "local":
            return _run_local(now, units, options)
        if runner == "dask":
            build = partial(graph.build, flow=now)
            return run_dask(
                build,
                plan,
                units,
                options=options,
                workers=workers,
                address=dask_address,
                say=say,
                is_over=lambda: stop is not None and is_over(stop),
            )
        _run_portable(replace(now, stall_seconds=0), units, options)
        return None

    try:
        return until_done(plan, units, once, say)
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


def _run_local(flow: Flow, units: Sequence[Unit], options: Sequence[str]) -> str | None:
    if any(option.startswith("--direct_running_mode") for option in options):
        raise SpecError(
            "runner local runs in threads of one process; --direct_running_mode is not among its options",
            remedy='for several processes, use runner = "dask"',
        )
    return run_child(partial(_local_graph, replace(flow, keep_errors=True), tuple(units), tuple(options)))


def _local_graph(flow: Flow, units: Sequence[Unit], options: Sequence[str]) -> None:
    """Run the graph in threads of this process, over some of the units after the other, with the same engine."""
    from apache_beam.runners.portability.fn_api_runner import worker_handlers
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

    # Every second, Beam sends on what a step has written by then, from another thread: half an element, too, whose rest
    # is then decoded as nonsense. Seen with 40,000 units, of which it made 21 GB. So: never. No option says it.
    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 10**9
    flags = ["--direct_running_mode=multi_threading", f"--direct_num_workers={BUNDLE_THREADS}", *options]
    # Named, never Beam's default runner: that one first tries to download a binary.
    try:
        for some in _rounds(units, flow.stop):
            pipeline = beam.Pipeline(runner=FnApiRunner(), options=beam.options.pipeline_options.PipelineOptions(flags))
            graph.build(pipeline, flow, some)
            pipeline.run().wait_until_finish()
            error = graph.take_error()
            if error is not None:
                raise error
    finally:
        graph.close_engines()


def _rounds(units: Sequence[Unit], stop: Stop | None) -> Iterator[Sequence[Unit]]:
    """Yield the units, at most `ROUND_UNITS` at once, until none may be begun any more."""
    for start in range(0, len(units), ROUND_UNITS):
        if stop is not None and is_over(stop):
            return
        yield units[start : start + ROUND_UNITS]


def _run_portable(flow: Flow, units: Sequence[Unit], options: Sequence[str]) -> None:
    names = [option.partition("=")[2] for option in options if option.startswith("--runner=")]
    if not names or names[-1].lower() in ("directrunner", "switchingdirectrunner"):
        raise SpecError(
            "runner portable needs --runner=<name> among [deploy] options",
            remedy='for one machine, use runner = "local"',
        )
    for option in options:
        if option.startswith("--job_endpoint="):
            _look_for_job_service(option.partition("=")[2])
    try:
        for some in _rounds(units, flow.stop):
            pipeline = beam.Pipeline(options=beam.options.pipeline_options.PipelineOptions(list(options)))
            graph.build(pipeline, flow, some)
            if not _ran(pipeline):
                return
    except Exception as error:
        raise _told(error, names[-1]) from error


def _ran(pipeline: beam.Pipeline) -> bool:
    """Return whether the pipeline ran to its end; a job that is given up before is cancelled, and not waited for."""
    jobs = []

    def run() -> None:
        jobs.append(pipeline.run())
        jobs[0].wait_until_finish()

    def cancel() -> None:
        with suppress(Exception):  # not every runner can
            jobs[0].cancel()

    is_over = wait_or_give_up(run)
    if jobs and not is_over:
        thread = threading.Thread(target=cancel, daemon=True)
        thread.start()
        thread.join(_CONNECT_S)
    return is_over


def _look_for_job_service(endpoint: str) -> None:
    """Raise EnvironmentMismatch, within seconds, where nothing listens; Beam waits for minutes."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        remedy = "is the job service running there? the address is host:port"
        raise EnvironmentMismatch(f"--job_endpoint={endpoint}: {error}", remedy=remedy) from error


def _told(error: Exception, runner: str) -> K2Error:
    """Return what another runner's error says: it hands a worker's on as text, which ends with its kind and message."""
    text = str(error)
    if isinstance(error, K2Error):
        return error
    if found := _OURS.findall(text):
        name, message = found[-1]
        return cast(type[K2Error], getattr(errors, name, K2Error))(message)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    remedy = "the log of the runner says more; after that, running the same job again resumes"
    return EnvironmentMismatch(f"{runner}: {type(error).__name__}: {last}", remedy=remedy)
