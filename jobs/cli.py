"""The command line. Each verb imports what it needs when it runs, so that `--help` answers at once.

Results go to stdout, progress and errors to stderr. With `--json`, stdout ends with one JSON object, on errors too.
"""

import argparse
import atexit
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.arguments import INCOMPLETE, make_parser
from schemas.errors import K2Error

if TYPE_CHECKING:
    from jobs.spec import JobSpec
    from pipelines.annotate import OpenEngine

_INTERRUPTED = "stopped; every finished unit is kept, and running the same command again resumes"


def command() -> NoReturn:
    """Run the command of this process: the script `k2batch`."""
    leave(main())


def leave(exit_code: int) -> NoReturn:
    """End the process as `sys.exit` does, but without taking the interpreter down.

    A library's thread that comes back from C++ meanwhile, as Arrow's do, would abort it: exit code 134 after a run that
    was stopped well.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def main(argv: Sequence[str] | None = None, *, open_engine: "OpenEngine | None" = None) -> int:
    """Return the exit code of one command.

    Args:
        argv: the words after `k2batch`; those of this process if None.
        open_engine: stands in for the model, in tests.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = make_parser().parse_args(words, argparse.Namespace(words=words))
    verb, as_json = arguments.verb, arguments.json
    try:
        with _interruptible(as_json):
            if verb in ("run", "eval", "batch", "verify"):
                with_model = {"run": _run, "eval": _eval, "batch": _batch, "verify": _verify}
                return with_model[verb](arguments, open_engine)
            verbs = {"plan": _plan, "status": _status, "report": _report, "cache": _cache, "doctor": _doctor}
            of_models = {"models": _models, "sparsify": _sparsify, "compress": _compress, "bench": _bench}
            return {**verbs, **of_models}[verb](arguments)
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

    given = {"input": {"urls": arguments.input}, "output": {"url": arguments.output}, **_where(arguments)}
    return load_spec(arguments.spec, _given(given))


def _where(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the sections that say by what and where a job is done, and until when."""
    runner = arguments.runner or ("dask" if arguments.dask_address else None)
    return {
        "model": {"checkpoint": arguments.checkpoint},
        "deploy": {"runner": runner, "workers": arguments.workers, "dask_address": arguments.dask_address},
        "limits": {name: vars(arguments).get(name) for name in ("deadline", "max_cost")},
    }


def _given(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what the command line says, without the options left out."""
    said = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in sections.items()}
    return {name: keys for name, keys in said.items() if keys}


def _plan(arguments: argparse.Namespace) -> int:
    from jobs.run import plan_facts, plan_job, plan_orders, plan_text, plan_tokens

    spec = _spec(arguments)
    plan = plan_job(spec)
    tokens, orders = plan_tokens(spec, plan), plan_orders(spec, plan)
    facts = plan_facts(spec, plan, tokens, orders)
    _show(arguments, facts, plan_text(plan, tokens, orders, facts["projected"]))
    return 3 if plan.rejected_files or tokens.unreadable else 0


def _run(arguments: argparse.Namespace, open_engine: "OpenEngine | None") -> int:
    spec = _spec(arguments)
    from jobs.progress import duration
    from jobs.report import text_report
    from jobs.run import exit_code, left_text, peak_memory_mb, resumable, run
    from jobs.shows import open_shows
    from pipelines.commit import read_plan

    with open_shows(arguments.progress, arguments.metrics, _say, sys.stderr) as shows:
        summary, manifest = run(spec, say=_say, shows=shows, open_engine=open_engine)
    summary = resumable(summary, arguments.words)
    text = "\n".join([text_report(read_plan(summary.output), manifest), *left_text(summary)])
    speed = f"{summary.tickets_per_second:,.1f} tickets/s" if summary.tickets_per_second else "all done before"
    _say(f"{duration(summary.seconds)}, {speed}, {peak_memory_mb():,.0f} MB in the largest process")
    _show(arguments, asdict(summary), text)
    return exit_code(manifest)


def _batch(arguments: argparse.Namespace, open_engine: "OpenEngine | None") -> int:
    from jobs import batch
    from jobs.run import resumable
    from jobs.shows import open_shows

    errors = arguments.errors or batch.default_errors(arguments.output)
    with open_shows(arguments.progress, arguments.metrics, _say, sys.stderr) as shows:
        answered, code = batch.answer_batch(
            arguments.source,
            arguments.output,
            errors,
            max_tokens=arguments.max_tokens,
            overrides=_given(_where(arguments)),
            say=_say,
            shows=shows,
            open_engine=open_engine,
        )
    answered = replace(answered, run=resumable(answered.run, arguments.words))
    _show(arguments, asdict(answered), batch.as_text(answered))
    return code


def _status(arguments: argparse.Namespace) -> int:
    from jobs import status
    from jobs.run import exit_code

    facts, manifest = status.status(arguments.run)
    _show(arguments, facts, status.as_text(facts))
    return exit_code(manifest) if manifest is not None else INCOMPLETE


def _eval(arguments: argparse.Namespace, open_engine: "OpenEngine | None") -> int:
    from jobs import evaluate
    from jobs.run import exit_code
    from jobs.shows import open_shows

    arguments.input = arguments.truth
    spec = _spec(arguments)
    with open_shows(arguments.progress, arguments.metrics, _say, sys.stderr) as shows:
        found, manifest = evaluate.evaluate_job(
            spec,
            arguments.column,
            repeats=arguments.repeats,
            sample=arguments.sample,
            say=_say,
            shows=shows,
            open_engine=open_engine,
        )
    _show(arguments, {"run_id": manifest.run_id, "tasks": evaluate.facts(found)}, evaluate.as_text(found))
    return exit_code(manifest)


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

    text, facts = report(arguments.run, arguments.against)
    _show(arguments, facts, text)
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from pipelines.cache_files import folder_of, prune

    kept = prune(folder_of(arguments.output), arguments.max_gb)
    text = f"{kept.files:,} files of kept answers, {kept.bytes / 1e9:,.3f} GB, of {kept.models} models"
    if kept.deleted_files:
        text += f"; {kept.deleted_files:,} files, {kept.deleted_bytes / 1e9:,.3f} GB, were deleted"
    _show(arguments, asdict(kept), text)
    return 0


def _sparsify(arguments: argparse.Namespace) -> int:
    from jobs import sparsify
    from jobs.spec import load_spec

    spec = load_spec(arguments.spec, {"model": {"router_thresholds": ""}})  # which may not be there yet
    facts = sparsify.sparsify(spec, agreement=arguments.agreement, rows=max(arguments.rows, 2), say=_say)
    sparsify.write(facts, arguments.target)
    _show(arguments, facts, sparsify.as_text(facts))
    return 0


def _compress(arguments: argparse.Namespace) -> int:
    from jobs import compress, compress_report
    from jobs.compress_recipe import load_recipe

    given = _given({"compress": {"teacher": arguments.teacher, "output": arguments.output}})
    recipe = load_recipe(arguments.recipe, arguments.data, given.get("compress"))
    facts, is_done = compress.compress(recipe, say=_say)
    _show(arguments, facts, compress_report.as_text(facts))
    return 0 if is_done else INCOMPLETE


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
    if arguments.what == "scale":
        from jobs import bench_scale

        facts = bench_scale.scale(arguments.units or 10_000)
        _show(arguments, facts, bench_scale.as_text(facts))
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
    if arguments.what == "flow":
        from jobs import bench_flow

        where = {"runner": arguments.runner, "workers": arguments.workers}
        facts = bench_flow.flow(checkpoint, units=arguments.units or 40, rows=arguments.rows, **where)
        _show(arguments, facts, bench_flow.as_text(facts))
        return 0
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
    command()
