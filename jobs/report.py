"""The report of a run: one HTML file beside the data, and the same in a few lines for the terminal.

The file holds no script and loads nothing. Ticket text stands in it escaped and clipped, with control characters shown
as marks, so a ticket can neither run nor rearrange the page of the person who reviews it.
"""

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.churn import Churn, churn_lines, read_churn, write_churn
from k2model.formats.inspect import short
from pipelines import finalize, storage
from pipelines.arithmetic import CAUSES
from pipelines.commit import done_units, read_plan, read_receipt
from schemas.annotations import task_columns
from schemas.errors import SpecError
from schemas.runs import Manifest, Plan, Task

CLIP = 240
"""Characters of a ticket shown."""

EXAMPLES = 5
"""Rejected rows shown for each reason."""

FILES = 1_000
"""Data files listed; a page of a million would be 300 MB."""

SAMPLE_ROWS = 20
"""Annotated rows shown."""

# Controls, and the marks that turn the direction of text: either could garble the page around them.
_MARKS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A rejected row, for the report."""

    url: str
    row: int
    id: str | None
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedRow:
    """An annotated row, for the report."""

    id: str
    text: str
    answers: tuple[str, ...]
    """One for each task."""


def read_manifest(plan: Plan) -> Manifest:
    """Return the result of a run. Raises: SpecError if it was never finalized; StorageError."""
    manifest = finalize.read_manifest(plan.output)
    if manifest is None:
        remedy = "run its job again: it resumes, then publishes"
        raise SpecError(f"{plan.output}: not finished, it has no manifest", remedy=remedy)
    return manifest


def publish_report(plan: Plan, manifest: Manifest, against: str = "") -> str:
    """Write report.html into the run's folder; return its URL.

    Args:
        plan: the run.
        manifest: its result.
        against: the run to compare with; if empty, the latest of the same job that had ended when this one began.

    Raises: StorageError; SpecError if `against` is no finished run.
    """
    url = storage.join(plan.output, "report.html")
    storage.write_bytes_atomic(url, render(plan, manifest, write_churn(plan, manifest, against)).encode())
    return url


def report(run_url: str, against: str = "") -> tuple[str, dict[str, Any]]:
    """Write the report of the run at `run_url`; return it as lines for a terminal, and as the manifest's fields.

    Raises: SpecError if there is no finished run; StorageError.
    """
    plan = read_plan(run_url)
    manifest = read_manifest(plan)
    url = publish_report(plan, manifest, against)
    found = read_churn(plan)
    facts = asdict(manifest) | {"flops_per_token": asdict(plan.flops), "report": url}
    facts |= {"churn": asdict(found) if found is not None else None}
    return text_report(plan, manifest), facts


def render(plan: Plan, manifest: Manifest, churn: Churn | None = None) -> str:
    """Return the report as HTML."""
    done = done_units(plan)
    shown = list(islice((unit for unit in plan.units if unit.unit_id in done), FILES))
    receipts = storage.in_threads(lambda unit: read_receipt(plan, unit.unit_id), shown)
    files = [{"unit": unit, "receipt": receipt} for unit, receipt in zip(shown, receipts, strict=True) if receipt]
    return render_page(
        "report.html.jinja",
        plan=plan,
        manifest=manifest,
        files=files,
        rejects=reject_examples(plan, manifest),
        rows=sample_rows(plan, manifest),
        how_to_read=how_to_read(plan),
        share=share,
        flops=flops_lines(plan, manifest),
        ending=ending(manifest),
        churn=churn,
    )


def render_page(template: str, **values: Any) -> str:
    """Return the page of a template beside this file, every value escaped; `written` is the time now."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(written=written, **values)


def text_report(plan: Plan, manifest: Manifest) -> str:
    """Return the report as text of a few lines."""
    lines = [
        f"{manifest.run_id}: {ending(manifest)}",
        f"  rows      {manifest.rows_in:,} in = {manifest.rows_annotated:,} annotated"
        f" + {manifest.rows_rejected:,} rejected" + _missing_rows(manifest),
        f"  units     {manifest.units_done:,} of {manifest.units:,} done",
        f"  tokens    {manifest.prompt_tokens:,} in the prompts, {manifest.computed_tokens:,} computed"
        f" ({share(manifest.computed_tokens, manifest.prompt_tokens)}), {manifest.output_tokens:,} written",
        f"  model     computing {manifest.engine_busy:.0%} of the time",
        *(f"  {'FLOPs' if not place else '':<9} {line}" for place, line in enumerate(flops_lines(plan, manifest))),
    ]
    if manifest.attempts > manifest.units_done:
        lines.append(f"  attempts  {manifest.attempts:,} at {manifest.units_done:,} units: processes died under some")
    if manifest.rows_cached:
        lines.append(f"  cached    {manifest.rows_cached:,} rows, answered in earlier runs")
    lines += [f"  rejected  {rows:,} × {code}" for code, rows in manifest.error_codes.items()]
    for task, labels in manifest.labels.items():
        width = max((len(label) for label in labels), default=0)
        lines.append(f"  {task}")
        for label, rows in sorted(labels.items(), key=lambda item: -item[1]):
            bar = "█" * round(30 * rows / max(manifest.rows_annotated, 1))
            lines.append(f"    {label:<{width}} {rows:>8,} {share(rows, manifest.rows_annotated):>6} {bar}")
    found = read_churn(plan)
    lines += churn_lines(found) if found is not None else []
    lines += [f"  bad file  {file.url}: {file.error_code}: {file.error_message}" for file in manifest.rejected_files]
    lines += [
        f"  result    {plan.output}/data/",
        f"  report    {plan.output}/report.html",
        f"  verify    k2batch verify {plan.output}",
    ]
    return "\n".join(lines)


def flops_lines(plan: Plan, manifest: Manifest) -> list[str]:
    """Return the arithmetic of a run: what was computed, and what was not, each cause by its own name."""
    if not manifest.flops:
        return []
    per_token = f", {_short(plan.flops.token)} a token" if plan.flops.token else ""
    computed = manifest.flops["computed"]
    saved = [(flops, cause) for key, cause in CAUSES.items() if (flops := manifest.flops.get(key, 0))]
    return [
        f"{_short(computed)} computed{per_token}; attention over keys and the output head come on top",
        *(f"{_short(flops)} not computed: {cause}" for flops, cause in saved),
    ]


def _short(flops: int) -> str:
    return short(flops, digits=3, largest="E").rstrip()


def ending(manifest: Manifest) -> str:
    """Return how the run stands, such as `incomplete (deadline)`."""
    return manifest.status + ("" if manifest.outcome == manifest.status else f" ({manifest.outcome})")


def how_to_read(plan: Plan) -> list[tuple[str, str]]:
    """Return (tool, command) pairs that read the result."""
    data = f"{plan.output}/data/"
    return [
        ("pandas", f'pandas.read_parquet("{data}")'),
        ("pyarrow", f'pyarrow.dataset.dataset("{data}").to_table()'),
        ("DuckDB", f"SELECT * FROM '{data}*.parquet'"),
        ("proof", f"k2batch verify {plan.output}"),
    ]


def share(part: int, whole: int) -> str:
    """Return `part` of `whole` as a percentage."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _missing_rows(manifest: Manifest) -> str:
    missing = manifest.rows_in - manifest.rows_annotated - manifest.rows_rejected
    return f" + {missing:,} not done yet" if missing else ""


def reject_examples(plan: Plan, manifest: Manifest) -> dict[str, list[Reject]]:
    """Return a few rejected rows for each error code, reading no more files than needed."""
    examples: dict[str, list[Reject]] = {code: [] for code in manifest.error_codes}
    wanted = sum(min(EXAMPLES, rows) for rows in manifest.error_codes.values())
    for name in manifest.rejects:
        if sum(len(found) for found in examples.values()) >= wanted:
            break
        with storage.open_read(storage.join(plan.output, "rejects", name)) as file:
            rows = pq.read_table(file).to_pylist()
        for row in rows:
            found = examples.setdefault(row["error_code"], [])
            if len(found) < EXAMPLES:
                row_id = None if row["id"] is None else clip(row["id"])
                found.append(Reject(url=row["url"], row=row["row"], id=row_id, message=clip(row["error_message"])))
    return examples


def sample_rows(plan: Plan, manifest: Manifest) -> list[AnnotatedRow]:
    """Return a few annotated rows, from the start of each of a few data files."""
    sample: list[AnnotatedRow] = []
    names = manifest.data[:: max(len(manifest.data) // 4, 1)][:4]
    for name in names:
        fill = -(-(SAMPLE_ROWS - len(sample)) // (len(names) - names.index(name)))
        with storage.open_read(storage.join(plan.output, "data", name)) as file:
            sample += _annotated(plan, pq.ParquetFile(file), fill)
    return sample


def _annotated(plan: Plan, file: pq.ParquetFile, most: int) -> list[AnnotatedRow]:
    added = [field.name for task in plan.tasks for field in task_columns(task, plan.prefix)]
    texts = list(plan.columns.present(file.schema_arrow))
    status = f"{plan.prefix}status"
    batch = next(file.iter_batches(batch_size=4 * most, columns=[plan.columns.id, *texts, status, *added]), None)
    if batch is None:
        return []
    rows: list[AnnotatedRow] = []
    for i in range(batch.num_rows):
        if batch[status][i].as_py() == "annotated" and len(rows) < most:
            text = "\n".join(part for part in (_text(batch[name][i]) for name in texts) if part.strip())
            answers = tuple(_answer(plan, task, batch, i) for task in plan.tasks)
            rows.append(AnnotatedRow(id=clip(_text(batch[plan.columns.id][i])), text=clip(text), answers=answers))
    return rows


def _answer(plan: Plan, task: Task, batch: pa.RecordBatch, i: int) -> str:
    value = {
        field.name.removeprefix(f"{plan.prefix}{task.name}_"): batch[field.name][i].as_py()
        for field in task_columns(task, plan.prefix)
    }
    if task.kind == "choose":
        return f"{value['label']} ({value['score']:.3f}, margin {value['margin']:.3f})"
    if task.kind == "choose_many":
        scores = dict(value["scores"])
        return ", ".join(f"{label} ({scores[label]:.3f})" for label in value["labels"]) or "none"
    return clip(value["text"])


def _text(scalar: pa.Scalar) -> str:
    """Return a value as text, whatever bytes it holds; empty for null."""
    if not scalar.is_valid:
        return ""
    if pa.types.is_dictionary(scalar.type):
        scalar = scalar.dictionary[scalar.index.as_py()]
    if pa.types.is_integer(scalar.type):
        return str(scalar.as_py())
    return bytes(scalar.as_buffer()).decode(errors="replace")


def clip(text: str) -> str:
    """Return the first characters of `text`, with control and direction marks made visible."""
    shown = _MARKS.sub("\N{REPLACEMENT CHARACTER}", text[:CLIP])
    return shown + "…" if len(text) > CLIP else shown
