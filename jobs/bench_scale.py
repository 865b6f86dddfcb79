"""Measurements of what handles a whole plan at once, for plans of any size: time and peak memory of each step.

No row is read and no answer computed; neither a model nor Beam is loaded, as neither is to plan and to finalize.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.report import publish_report, read_manifest
from jobs.spec import load_spec
from pipelines.commit import pending_units, read_plan, write_plan
from pipelines.finalize import finalize
from pipelines.units import make_plan
from schemas.annotations import output_schema
from schemas.runs import Plan, Receipt

UNITS_PER_FILE = 100
"""Of the plan: row groups of one row."""

# Names of one file: ext4 has at most 65,000.
_LINKS = 50_000
SPEC = Path(__file__).parent / "specs" / "moderation_sweep.toml"
NO_FINGERPRINT = "0" * 16

_Times = tuple[float, float]
"""Wall and processor seconds."""


def scale(num_units: int) -> dict[str, Any]:
    """Return the time and the peak memory of whatever handles a whole plan, for a run of `num_units` units.

    Input files are real: Parquet of `UNITS_PER_FILE` row groups, a unit each, under many names. Receipts are made up,
    data files have no rows. Each step has a process of its own; what it needs is loaded there, too, which counts for
    its memory and not for its time.
    """
    steps: dict[str, Callable[[Path], _Times]] = {
        "plan": _plan,
        "write the plan": _write,
        "write it again": _write,
        "read the plan": _read,
        "pending, none done": _pending,
        "pending, all done": _pending,
        "finalize": _finalize,
        "report": _report,
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _link_inputs(folder, num_units)
        for step, call in steps.items():
            if step == "pending, all done":
                _in_process(_make_receipts, folder)
            rows.append({"step": step} | _in_process(call, folder))
        bytes_ = {path.name: path.stat().st_size for path in _run_folder(folder).iterdir() if path.is_file()}
    return {"units": num_units, "bytes": bytes_, "rows": rows}


def as_text(facts: dict[str, Any]) -> str:
    """Return the result of `scale` as lines."""
    lines = [f"a run of {facts['units']:,} units"]
    lines += [
        f"  {row['step']:<20} {row['seconds']:>9,.2f} s {row['cpu_s']:>9,.2f} s of a processor {row['peak_mb']:>7,} MB"
        for row in facts["rows"]
    ]
    lines += [f"  {name:<20} {size / 1e6:>9,.2f} MB" for name, size in sorted(facts["bytes"].items())]
    return "\n".join(lines)


def _in_process(call: Callable[[Path], _Times | None], folder: Path) -> dict[str, float]:
    """Return the times that `call` tells, and the peak memory of the process it had to itself."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, call, folder).result()


def _measured(call: Callable[[Path], _Times | None], folder: Path) -> dict[str, float]:
    seconds, cpu_s = call(folder) or (0.0, 0.0)
    return {"seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2), "peak_mb": round(_peak_mb())}


def _peak_mb() -> float:
    """Return the most memory this process held. On Linux, `ru_maxrss` begins at that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _link_inputs(folder: Path, num_units: int) -> None:
    units = min(UNITS_PER_FILE, num_units)
    table = pa.table({"ticket_id": [str(row) for row in range(units)], "body": ["a ticket"] * units})
    pq.write_table(table, folder / "one.parquet", row_group_size=1)
    (folder / "in").mkdir()
    for number in range(-(-num_units // units)):
        os.link(folder / "one.parquet", folder / "in" / f"{number:06}.parquet")


def _run_folder(folder: Path) -> Path:
    return next((folder / "out").glob("bench-*"))


def _timed(call: Callable[[], object]) -> _Times:
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu_start


def bench_plan(folder: Path, checkpoint: str, unit_rows: int) -> Plan:
    """Return the plan of the shipped sweep over the tickets in `folder`/in, for an engine that computes nothing."""
    spec = load_spec(str(SPEC), {})
    return make_plan(
        job="bench",
        urls=[str(folder / "in")],
        output=str(folder / "out"),
        columns=spec.columns,
        tasks=spec.tasks,
        checkpoint=checkpoint,
        model_fingerprint=NO_FINGERPRINT,
        mode="cpu",
        unit_rows=unit_rows,
    )


def _plan(folder: Path) -> _Times:
    return _timed(lambda: bench_plan(folder, "none", 1))


def _write(folder: Path) -> _Times:
    plan = bench_plan(folder, "none", 1)
    return _timed(lambda: write_plan(plan))


def _read(folder: Path) -> _Times:
    return _timed(lambda: read_plan(str(_run_folder(folder))))


def _pending(folder: Path) -> _Times:
    plan = read_plan(str(_run_folder(folder)))
    return _timed(lambda: pending_units(plan))


def _finalize(folder: Path) -> _Times:
    plan = read_plan(str(_run_folder(folder)))
    return _timed(lambda: finalize(plan, max_reject_rate=0.0))


def _report(folder: Path) -> _Times:
    plan = read_plan(str(_run_folder(folder)))
    manifest = read_manifest(plan)
    return _timed(lambda: publish_report(plan, manifest))


def _make_receipts(folder: Path) -> None:
    """Write a receipt for every unit, and a data file with the right columns and no row."""
    plan = read_plan(str(_run_folder(folder)))
    for name in ("data", "receipts"):
        Path(plan.output, name).mkdir()
    schema = output_schema(pq.read_schema(plan.units[0].url), plan)
    labels = {task.name: dict.fromkeys(task.labels, 0) for task in plan.tasks}
    for number, unit in enumerate(plan.units):
        data = f"part-{unit.unit_id}-{number:032x}.parquet"
        if number % _LINKS == 0:
            pq.write_table(schema.empty_table(), folder / f"{number}.parquet")
        os.link(folder / f"{number // _LINKS * _LINKS}.parquet", Path(plan.output, "data", data))
        receipt = Receipt(
            unit_id=unit.unit_id, attempt=f"{number:032x}", data=data, data_sha256="0" * 64, rejects=None,
            rows=unit.rows, rows_annotated=unit.rows, rows_rejected=0, error_codes={}, labels=labels, prompt_tokens=100,
            computed_tokens=50, output_tokens=0, seconds=1.0, engine_busy=1.0,
        )  # fmt: skip
        Path(plan.output, "receipts", f"{unit.unit_id}.json").write_text(receipt.to_json())
