"""Measurements of the flow without a model: rows per second, what a unit costs, and where the time goes.

The engine answers at once, so that what is measured is everything else: reading, prompts, columns, writing, receipts.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench_scale import NO_FINGERPRINT, SPEC, bench_plan
from k2model.compress.recipe import open_tokenizer
from k2model.engine.request import Completion, Request, Work
from k2model.formats.checkpoint import open_checkpoint
from k2model.tokenizer import Tokenizer
from pipelines.annotate import Block, OpenEngine, SupportsAnnotate, annotate
from pipelines.commit import commit, write_plan
from pipelines.finalize import finalize
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from pipelines.runners import run_units
from schemas.runs import Plan


class _NoEngine:
    """Answers at once, the same to everything."""

    fingerprint = NO_FINGERPRINT
    max_position_embeddings = 1 << 20
    busy_seconds = 0.0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def take_work(self) -> Work:
        """Return that nothing was computed."""
        return Work()

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        """Return a future that is done."""
        future: Future[list[Completion]] = Future()
        made = {number: _no_completion(number) for number in {len(request.candidates) for request in requests}}
        future.set_result([made[len(request.candidates)] for request in requests])
        return future


def _no_completion(num_candidates: int) -> Completion:
    return Completion(logprobs=tuple(-1.0 - index / 8 for index in range(num_candidates)), computed_tokens=1)


def open_no_engine(plan: Plan) -> SupportsAnnotate:
    """Return an engine that computes nothing, with the tokenizer of the plan's checkpoint."""
    return _NoEngine(open_tokenizer(open_checkpoint(plan.checkpoint)))


class _NoTokenizer:
    """Makes a token of every 4 bytes of a text, about as many as a real one, in no time; the rest is the real one's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return, for each text, as many numbers as it has groups of 4 bytes."""
        padded = (data + b" " * (-len(data) % 4) for data in map(str.encode, texts))
        return [memoryview(data).cast("I").tolist() for data in padded]


def open_no_tokenizer(plan: Plan) -> SupportsAnnotate:
    """Return an engine that computes nothing, and whose tokenizer does not, either."""
    engine = _NoEngine(open_tokenizer(open_checkpoint(plan.checkpoint)))
    engine.tokenizer = _NoTokenizer(engine.tokenizer)  # type: ignore[assignment]
    return engine


def flow(
    checkpoint: str, *, units: int = 40, rows: int = 2048, runner: str = "local", workers: int = 2
) -> dict[str, Any]:
    """Return what the flow costs, without a model, on tickets whose texts all differ.

    Three runs tell the costs apart: `units` units of `rows` rows, as many of one row, and one of one row. The last is
    the start; what the second takes more is the cost of units; what the first takes more, that of rows. The shares are
    of a thread that takes the same steps in turn.

    Args:
        checkpoint: whose tokenizer is used.
        units: units of a run.
        rows: rows of a unit.
        runner: which runs them.
        workers: processes, for `dask`.
    """
    rates = []
    for tokens, open_engine in (("tokenized", open_no_engine), ("given", open_no_tokenizer)):
        run = partial(_seconds, checkpoint, runner=runner, workers=workers, open_engine=open_engine)
        start_s, units_s, all_s = run(1, 1), run(units, 1), run(units, rows)
        rates.append(
            {
                "tokens": tokens,
                # None: what was measured is lost in the noise of the machine.
                "rows/s": round(units * (rows - 1) / (all_s - units_s)) if all_s > units_s else None,
                "unit_ms": round(1000 * (units_s - start_s) / max(units - 1, 1), 2) if units_s > start_s else None,
                "start_s": round(start_s, 2),
                "all_s": round(all_s, 2),
            }
        )
    return {
        "runner": runner,
        "workers": workers if runner == "dask" else 1,
        "units": units,
        "rows_per_unit": rows,
        "rows": rates,
        "steps": _steps(checkpoint, min(units, 10), rows),
    }


def as_text(facts: dict[str, Any]) -> str:
    """Return the result of `flow` as lines."""
    lines = [f"{facts['units']} units of {facts['rows_per_unit']:,} rows, runner {facts['runner']}"]
    lines += [
        f"  tokens {row['tokens']:<10} {_shown(row['rows/s']):>9} rows/s {_shown(row['unit_ms']):>8} ms per unit "
        f"{row['start_s']:>6.2f} s to start {row['all_s']:>7.2f} s in all"
        for row in facts["rows"]
    ]
    lines += [
        f"  {step['step']:<28} {step['us_per_row']:>8.2f} µs per row {step['share']:>6.1%}" for step in facts["steps"]
    ]
    return "\n".join(lines)


def _shown(number: float | None) -> str:
    return "?" if number is None else f"{number:,}"


def _seconds(checkpoint: str, units: int, rows: int, *, runner: str, workers: int, open_engine: OpenEngine) -> float:
    """Return the wall time of a run over generated tickets, from the written plan to the last receipt."""
    with tempfile.TemporaryDirectory() as folder:
        plan = _generate(Path(folder), checkpoint, units, rows)
        write_plan(plan)
        start = time.perf_counter()
        run_units(plan, plan.units, runner=runner, workers=workers, open_engine=open_engine)
        seconds = time.perf_counter() - start
        finalize(plan, max_reject_rate=0.0)
        return seconds


def _generate(folder: Path, checkpoint: str, units: int, rows: int) -> Plan:
    """Write tickets for so many units into `folder`, and return their plan."""
    bodies = _sample_bodies()
    texts = [f"{bodies[number % len(bodies)]} {number}" for number in range(units * rows)]
    table = pa.table({"ticket_id": [f"T{number}" for number in range(len(texts))], "body": texts})
    (folder / "in").mkdir()
    pq.write_table(table, folder / "in" / "tickets.parquet", row_group_size=rows)
    return bench_plan(folder, checkpoint, rows)


def _sample_bodies() -> list[str]:
    """Return the texts of the shipped tickets that can be annotated and are no longer than most."""
    paths = sorted((SPEC.parents[1] / "samples").glob("moderation-*.parquet"))
    values = [
        value for path in paths for value in pq.read_table(path, columns=["body"])["body"].cast("binary").to_pylist()
    ]
    texts = [value.decode(errors="replace") for value in values if value]
    return [text for text in texts if text.strip() and len(text) < 2000]


class _Clock:
    """Adds up the processor's seconds of calls by name, those of threads that they start among them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, timed."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

        return wrapped


def _steps(checkpoint: str, units: int, rows: int) -> list[dict[str, Any]]:
    """Return the processor's time of each step, taken in turn in one thread, in µs for each row, and its share."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        plan = _generate(Path(folder), checkpoint, units, rows)
        engine = open_no_engine(plan)
        tokenizer = _Timed(engine.tokenizer, encode_all=clock.timed("tokenize", engine.tokenizer.encode_all))
        prompts = Prompts(plan.tasks, tokenizer, plan.max_prompt_tokens)
        timed_prompts = _Timed(
            prompts,
            requests_of=clock.timed("requests", prompts.requests_of),
            columns_of=clock.timed("answers", prompts.columns_of),
        )
        timed_engine = _Timed(engine, submit=clock.timed("engine", engine.submit))
        clock.seconds.clear()  # of the instructions
        for unit in plan.units:
            table = clock.timed("read", read_unit)(unit)
            block = clock.timed("annotate", annotate)(Block(unit, table, 0.0), plan, timed_prompts, timed_engine)
            clock.timed("commit", commit)(block, plan)
    own = clock.seconds
    seconds = {
        "read": own["read"],
        "tokenize": own["tokenize"],
        "prompts to requests": own["requests"] - own["tokenize"],
        "engine, which does nothing": own["engine"],
        "answers to columns": own["answers"],
        "texts, hashes, columns": own["annotate"] - own["requests"] - own["engine"] - own["answers"],
        "Parquet, data, receipt": own["commit"],
    }
    total = sum(seconds.values())
    return [
        {"step": step, "us_per_row": round(1e6 * took / (units * rows), 2), "share": round(took / total, 3)}
        for step, took in seconds.items()
    ]


class _Timed:
    """Something with some of its methods replaced."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self.inner = inner
        self.__dict__ |= methods

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
