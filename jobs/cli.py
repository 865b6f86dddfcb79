"""The command line. Each verb imports what it needs when it runs, so that `--help` answers at once.

Results go to stdout, progress and errors to stderr. With `--json`, stdout ends with one JSON object, on errors too.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any

from jobs.arguments import INCOMPLETE, make_parser
from schemas.errors import K2Error

if TYPE_CHECKING:
    from jobs.spec import JobSpec
    from pipelines.annotate import OpenEngine

_INTERRUPTED = "stopped; every finished unit is kept, and running the same command again resumes"


def main(argv: Sequence[str] | None = None, *, open_engine: "OpenEngine | None" = None) -> int:
    """Return the exit code of one command.

    Args:
        argv: the words after `k2batch`; those of this process if None.
        open_engine: stands in for the model, in tests.
    """
    arguments = make_parser().parse_args(argv)
    verb, as_json = arguments.verb, arguments.json
    try:
        with _interruptible(as_json):
            if verb in ("run", "verify"):
                return {"run": _run, "verify": _verify}[verb](arguments, open_engine)
            verbs = {"plan": _plan, "status": _status, "report": _report, "doctor": _doctor}
            return {**verbs, "bench": _bench, "models": _models, "sparsify": _sparsify}[verb](arguments)
    except K2Error as error:
        return _fail(error.code, error.message, error.remedy, error.exit_code, as_json)
    except KeyboardInterrupt:
        return _fail("interrupted", "stopped", "", INCOMPLETE, as_json)
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing is wrong, and nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        import traceback

        traceback.print_exc()
        remedy = "this should not happen: please report the lines above"
        return _fail("bug", f"{type(error).__name__}: {error}", remedy, 1, as_json)


def _spec(arguments: argparse.Namespace) -> "JobSpec":
    from jobs.spec import load_spec

    given = {
        "input": {"urls": arguments.input},
        "output": {"url": arguments.output},
        "model": {"checkpoint": arguments.checkpoint},
        "deploy": {"runner": arguments.runner, "workers": arguments.workers},
    }
    overrides = {
        section: {key: value for key, value in values.items() if value is not None} for section, values in given.items()
    }
    return load_spec(arguments.spec, {section: values for section, values in overrides.items() if values})


def _plan(arguments: argparse.Namespace) -> int:
    from jobs.run import plan_facts, plan_job, plan_text, plan_tokens

    spec = _spec(arguments)
    plan = plan_job(spec)
    tokens = plan_tokens(spec, plan)
    _show(arguments, plan_facts(plan, tokens), plan_text(plan, tokens))
    return 3 if plan.rejected_files or tokens.unreadable else 0


def _run(arguments: argparse.Namespace, open_engine: "OpenEngine | None") -> int:
    spec = _spec(arguments)
    from jobs.progress import duration
    from jobs.report import text_report
    from jobs.run import exit_code, peak_memory_mb, run
    from pipelines.commit import read_plan

    summary, manifest = run(spec, say=_say, open_engine=open_engine)
    text = text_report(read_plan(summary.output), manifest)
    speed = f"{summary.tickets_per_second:,.1f} tickets/s" if summary.tickets_per_second else "all done before"
    _say(f"{duration(summary.seconds)}, {speed}, {peak_memory_mb():,.0f} MB in the largest process")
    _show(arguments, asdict(summary), text)
    return exit_code(manifest)


def _status(arguments: argparse.Namespace) -> int:
    from jobs.report import read_manifest
    from jobs.run import exit_code
    from pipelines import storage
    from pipelines.commit import read_plan, read_receipts

    plan = read_plan(arguments.run)
    receipts = read_receipts(plan).values()
    manifest = read_manifest(plan) if storage.exists(storage.join(plan.output, "_manifest.json")) else None
    # A manifest is older than the receipts while a resumed run is under way.
    is_final = manifest is not None and manifest.units_done == len(receipts)
    status = manifest.status if manifest is not None and is_final else "unfinished"
    facts = {
        "run_id": plan.run_id,
        "status": status,
        "units": len(plan.units),
        "units_done": len(receipts),
        "rows_in": plan.rows,
        "rows_annotated": sum(receipt.rows_annotated for receipt in receipts),
        "rows_rejected": sum(receipt.rows_rejected for receipt in receipts),
        "rejected_files": len(manifest.rejected_files if manifest is not None else plan.rejected_files),
        "output": plan.output,
    }
    text = (
        f"{plan.run_id}: {status}, {len(receipts)} of {len(plan.units)} units done, {facts['rows_annotated']:,} rows"
        f" annotated and {facts['rows_rejected']:,} rejected of {plan.rows:,}"
    )
    _show(arguments, facts, text)
    return exit_code(manifest) if manifest is not None and is_final else INCOMPLETE


def _verify(arguments: argparse.Namespace, open_engine: "OpenEngine | None") -> int:
    from jobs.verify import verify

    problems = verify(arguments.run)
    lines = [f"{arguments.run}: {len(problems)} problems", *(f"  {problem}" for problem in problems)]
    if not problems:
        lines = [f"{arguments.run}: proven, every input row is in the output once"]
    facts: dict[str, Any] = {"proven": not problems, "problems": problems}
    if arguments.replay:
        from jobs import replay

        found = replay.replay(arguments.run, arguments.replay, seed=arguments.seed, open_engine=open_engine)
        facts |= {"proven": facts["proven"] and found.is_equal, "replay": asdict(found)}
        lines += replay.as_lines(found)
    _show(arguments, facts, "\n".join(lines))
    return 0 if facts["proven"] else INCOMPLETE


def _report(arguments: argparse.Namespace) -> int:
    from jobs.report import report

    text, facts = report(arguments.run)
    _show(arguments, facts, text)
    return 0


def _sparsify(arguments: argparse.Namespace) -> int:
    from jobs import sparsify
    from jobs.spec import load_spec

    spec = load_spec(arguments.spec, {"model": {"router_thresholds": ""}})  # which may not be there yet
    facts = sparsify.sparsify(spec, agreement=arguments.agreement, rows=max(arguments.rows, 2), say=_say)
    sparsify.write(facts, arguments.target)
    _show(arguments, facts, sparsify.as_text(facts))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from jobs.doctor import as_text, examine

    checks = examine()
    states = [check.state for check in checks]
    worst = next((state for state in ("fail", "warn") if state in states), "ok")
    _show(arguments, {"state": worst, "checks": [asdict(check) for check in checks]}, as_text(checks))
    return K2Error.exit_code if worst == "fail" else 0


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.what == "kernels":
        from jobs import bench_kernels

        facts = bench_kernels.kernels(arguments.rounds or 7, arguments.only)
        if arguments.plot:
            bench_kernels.plot(facts, arguments.plot)
        _show(arguments, facts, bench_kernels.as_text(facts))
        return 0
    if arguments.what in ("layer", "conversion"):
        from jobs import bench_models

        facts = (
            bench_models.layer(rounds=arguments.rounds or 3)
            if arguments.what == "layer"
            else bench_models.conversion(arguments.limit_mb, balanced=arguments.balanced)
        )
        _show(arguments, facts, bench_models.as_text(facts))
        return 0
    from jobs import bench, bench_engine
    from k2model.formats.checkpoint import DEFAULT_CHECKPOINT

    checkpoint = arguments.checkpoint or DEFAULT_CHECKPOINT
    files = {"tickets": arguments.tickets, "labels": arguments.labels}
    if arguments.what == "linear":
        facts = bench.linear(checkpoint, arguments.rounds or 30)
    elif arguments.what == "quality":
        facts = bench.quality(checkpoint, precision=arguments.precision, **files)
    else:
        options = {"work": arguments.work, "limit": arguments.limit, "precision": arguments.precision, **files}
        facts = bench_engine.engine(checkpoint, rounds=arguments.rounds or 3, **options)
    as_text = bench_engine.as_text if arguments.what == "engine" else bench.as_text
    _show(arguments, facts, as_text(facts))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from jobs import models

    if arguments.action == "inspect":
        facts, text = models.inspect(arguments.checkpoint)
        _show(arguments, facts, text)
        return K2Error.exit_code if facts["problems"] else 0
    if arguments.action == "check":
        facts, equal = models.check(arguments.folders, _say if arguments.json else lambda line: print(line, flush=True))
        if arguments.json:
            _show(arguments, {"equal": equal, "fixtures": facts}, "")
        return 0 if equal else K2Error.exit_code
    facts = models.convert(
        arguments.checkpoint, arguments.target, int4=arguments.int4, balanced=not arguments.plain, say=_say
    )
    _show(arguments, facts, f"{facts['folder']}: {facts['bytes'] / 1e9:,.2f} GB")
    return 0


def _show(arguments: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Print the result: an object for programs, or text for people."""
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else text, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(code: str, message: str, remedy: str, exit_code: int, as_json: bool) -> int:
    """Say what went wrong, to people on stderr and to programs on stdout; return the exit code."""
    _say(f"k2batch: {message}" + (f"\n  remedy: {remedy}" if remedy else ""))
    if as_json:
        error = {"code": code, "message": message, "remedy": remedy}
        print(json.dumps({"error": error}, ensure_ascii=False), flush=True)
    return exit_code


@contextmanager
def _interruptible(as_json: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once.

    Waiting for the threads of a runner could take minutes. Nothing is lost by not waiting: no file is ever
    half-written, and what an unfinished unit left behind is deleted by the next run.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        os._exit(_fail("interrupted", _INTERRUPTED, "", INCOMPLETE, as_json))

    try:
        before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may set these
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
