"""A batch file of OpenAI's requests, answered by the ordinary flow: lost as little as a job, and resumed like one.

The lines become Parquet in `<output>.k2batch/`, one row each; the run there has plan, units and receipts as any other,
so it may be stopped at any moment, retried, or spread over workers. When every line is answered or refused, the two
files are written from it, in the order of the input, each whole or not at all.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa

from jobs.progress import Say, Show
from jobs.run import Summary, exit_code, left_text, run
from jobs.spec import JobSpec, make_spec
from pipelines import storage
from pipelines.annotate import OpenEngine
from pipelines.batch_api import read_line, result_line
from pipelines.commit import read_plan, to_parquet
from pipelines.read import read_data
from schemas.annotations import REQUEST
from schemas.errors import SpecError, StorageError
from schemas.runs import Manifest, Plan, Task, digest

UNIT_LINES = 64
"""Lines of a unit: what a kill may cost and a deadline be missed by, since long answers take minutes. Three units are
under way at once, which is more than a CPU decodes together to any profit."""

_FILE_LINES = 8192
_READ_BYTES = 8 * 1024 * 1024
_ANSWERED_NOTHING = 6

_LINES = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        pa.field("custom_id", pa.string()),
        pa.field("request", pa.string()),
        pa.field("problem", pa.string()),
    ]
)
_RESULT_COLUMNS = [*_LINES.names, "batch_text", "status", "error_code", "error_message", "usage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The result of a batch, as `k2batch batch --json` prints it."""

    status: str
    """As a run's; `complete` once the files are written."""
    request_counts: dict[str, int]
    """`total`, `completed` and `failed` lines."""
    models: dict[str, int]
    """Requests by the model that they name."""
    model: str
    """Which answered."""
    output: str
    """The file of answers; empty until all lines are done."""
    errors: str
    """The file of failed lines; empty if none failed."""
    run: Summary
    """Of the flow that answered; its `output` is the folder to `verify`."""


def default_errors(output: str) -> str:
    """Return where failed lines go: `out.errors.jsonl` beside `out.jsonl`."""
    stem, dot, ending = output.rpartition(".")
    return f"{stem}.errors.{ending}" if dot and "/" not in ending else f"{output}.errors"


def answer_batch(
    source: str,
    output: str,
    errors: str,
    *,
    max_tokens: int,
    overrides: Mapping[str, Mapping[str, Any]],
    say: Say = lambda line: None,
    shows: Sequence[Show] = (),
    open_engine: OpenEngine | None = None,
) -> tuple[Batch, int]:
    """Return what came of the batch file at `source`, and the exit code; running it again resumes.

    Args:
        source: URL of the requests.
        output: URL for the answers.
        errors: URL for the lines that failed; no file is there afterwards if none did.
        max_tokens: of an answer, for requests that name no number.
        overrides: sections of a job file, such as `model`, to their keys.
        say: takes what is to be told in words.
        shows: are handed the progress.
        open_engine: stands in for the model, in tests.

    Raises: SpecError; CheckpointError; StorageError; EnvironmentMismatch.
    """
    source, output, errors = (storage.absolute(url) for url in (source, output, errors))
    if len({source, output, errors}) < 3:
        raise SpecError(f"{output}: input, output and errors must be three files", remedy="name others by -o, --errors")
    work = f"{output}.k2batch"
    lines, models = _stage(source, work)
    spec = _spec(lines, work, max_tokens, overrides)
    summary, manifest = run(spec, say=say, shows=shows, open_engine=open_engine)
    plan = read_plan(summary.output)
    name = plan.checkpoint.rstrip("/").rpartition("/")[2]
    counts = {"total": manifest.rows_in, "completed": manifest.rows_annotated, "failed": manifest.rows_rejected}
    is_complete = manifest.status == "complete"
    if is_complete:
        _publish_results(plan, manifest, name, output, errors)
    batch = Batch(
        status=manifest.status,
        request_counts=counts,
        models=models,
        model=name,
        output=output if is_complete else "",
        errors=errors if is_complete and counts["failed"] else "",
        run=summary,
    )
    answered_nothing = is_complete and counts["total"] == counts["failed"] > 0
    return batch, _ANSWERED_NOTHING if answered_nothing else exit_code(manifest)


def as_text(batch: Batch) -> str:
    """Return the result for people."""
    counts = batch.request_counts
    named = ", ".join(f"{model or 'no name'} ({requests:,})" for model, requests in batch.models.items())
    lines = [
        f"{batch.status}: {counts['total']:,} requests, {counts['completed']:,} completed, {counts['failed']:,} failed",
        f"  asked     {named or 'nothing'}",
        f"  answered  by {batch.model}",
    ]
    lines += [f"  {what:<9} {url}" for what, url in (("output", batch.output), ("errors", batch.errors)) if url]
    return "\n".join([*lines, *left_text(batch.run)])


def _spec(lines: str, work: str, max_tokens: int, overrides: Mapping[str, Mapping[str, Any]]) -> JobSpec:
    """Return the job that answers the lines in the folder `lines`."""
    raw: dict[str, Any] = {
        "job": {"name": "batch"},
        "input": {"urls": [f"{lines}/"], "columns": {"id": "line", "text": ["request"]}, "unit_rows": UNIT_LINES},
        "output": {"url": work},
        "task": [{"name": "batch", "kind": "generate", "instruction": "answer"}],
        # The context is the limit, and failed lines have a file of their own.
        "limits": {"max_prompt_tokens": 2**31 - 1, "max_reject_rate": 1.0},
    }
    for section, values in overrides.items():
        raw[section] = {**raw.get(section, {}), **values}
    spec = make_spec(raw, "k2batch batch")
    return replace(spec, tasks=(Task(name="batch", kind=REQUEST, max_tokens=max_tokens),))


def _stage(source: str, work: str) -> tuple[str, dict[str, int]]:
    """Return the folder of Parquet files that hold the lines of `source`, and the models that these name.

    Written once for each content of the file: rewritten, the files would make another run.
    """
    try:
        folder = storage.join(work, f"lines-{digest([source, storage.etag(source)])}")
    except FileNotFoundError:
        raise SpecError(f"{source}: no such file", remedy="give the requests by -i, one JSON object a line") from None
    done = storage.join(folder, "staged.json")
    try:
        models: dict[str, int] = json.loads(storage.read_text(done))
        return folder, models
    except FileNotFoundError:
        pass
    named: Counter[str] = Counter()
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    files = 0

    def write() -> None:
        nonlocal files
        table = pa.Table.from_pylist(rows, schema=_LINES)
        url = storage.join(folder, f"lines-{files:08d}.parquet")
        if not storage.exists(url):  # another driver's, or that of a call which was killed: the same
            storage.write_bytes_atomic(url, to_parquet(table))
        files += 1
        rows.clear()

    for number, raw in enumerate(_read_lines(source), start=1):
        line, model = read_line(number, raw, seen)
        if line.request is not None:
            named[model] += 1
        rows.append(asdict(line))
        if len(rows) == _FILE_LINES:
            write()
    if rows or not files:
        write()
    models = dict(named.most_common())
    storage.write_bytes_atomic(done, json.dumps(models, ensure_ascii=False).encode())
    return folder, models


def _read_lines(url: str) -> Iterator[bytes]:
    """Yield the lines of the file, without their ends; what follows the last end is a line if there is anything."""
    with storage.open_read(url) as file:
        rest = b""
        while block := file.read(_READ_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        if rest:
            yield rest


def _publish_results(plan: Plan, manifest: Manifest, model: str, output: str, errors: str) -> None:
    """Write both files; the answers last, so that whoever waits for them finds the errors there.

    Raises: StorageError if a line has no result, or two.
    """

    def write(file: BinaryIO, wants_answers: bool) -> None:
        expected = 1
        for row in _result_rows(plan, manifest):
            if row["line"] != expected:
                remedy = "run `k2batch verify` on the run's folder"
                raise StorageError(f"{plan.output}: line {expected} has no result in its place", remedy=remedy)
            expected += 1
            text, is_answer = result_line(row, model, plan.model_fingerprint)
            if is_answer == wants_answers:
                file.write(text.encode() + b"\n")
        if expected != manifest.rows_in + 1:
            raise StorageError(f"{plan.output}: {manifest.rows_in - expected + 1} lines have no result")

    if manifest.rows_rejected:
        storage.write_file_atomic(errors, lambda file: write(file, wants_answers=False))
    else:
        storage.delete(errors)
    storage.write_file_atomic(output, lambda file: write(file, wants_answers=True))


def _result_rows(plan: Plan, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the rows of the run, in the order of the lines; one file is in memory at a time."""
    for name in manifest.data:
        yield from read_data(plan, name, _RESULT_COLUMNS).to_pylist()
