"""Measurements of what handles a whole plan at once, for plans of any size: time and peak memory of each step.

No row is read and no answer computed; neither a model nor Beam is loaded, as neither is to plan and to finalize.
"""

import hashlib
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
from jobs.status import status
from jobs.verify import verify
from pipelines.commit import pending_units, read_plan, to_parquet, write_plan
from pipelines.finalize import finalize
from pipelines.units import make_plan
from schemas.annotations import output_schema
from schemas.errors import K2Error
from schemas.runs import Plan, Receipt

UNITS_PER_FILE = 100
"""Of the plan: row groups of one row."""

SPEC = Path(__file__).parent / "specs" / "moderation_sweep.toml"
NO_FINGERPRINT = "0" * 16

_Times = tuple[float, float]
"""Wall and processor seconds."""


def scale(num_units: int) -> dict[str, Any]:
    """Return the time and the peak memory of whatever handles a whole plan, for a run of `num_units` units.

    Input files are real: Parquet of `UNITS_PER_FILE` row groups, a unit each, under many names. So are data files and
    receipts, of made-up answers: `verify` proves the run. Each step has a process of its own; what it needs is loaded
    there, too, which counts for its memory and not for its time. Those that `verify` starts count for its time alone.

    Raises: K2Error if the run is not proven.
    """
    steps: dict[str, Callable[[Path], _Times]] = {
        "plan": _plan,
        "write the plan": _write,
        "write it again": _write,
        "read the plan": _read,
        "pending, none done": _pending,
        "pending, all done": _pending,
        "status, under way": _status,
        "finalize": _finalize,
        "report": _report,
        "status, complete": _status,
        "verify": _verify,
        "replay": _draw,
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
    start, cpu_start = time.perf_counter(), _cpu_s()
    call()
    return time.perf_counter() - start, _cpu_s() - cpu_start


def _cpu_s() -> float:
    """Return the processor's seconds of this process and of those it has waited for."""
    return sum(os.times()[:4])


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


def _status(folder: Path) -> _Times:
    return _timed(lambda: status(str(_run_folder(folder))))


def _verify(folder: Path) -> _Times:
    problems: list[str] = []
    times = _timed(lambda: problems.extend(verify(str(_run_folder(folder)))))
    if problems:
        raise K2Error(f"the made-up run has {len(problems)} problems, such as: {problems[0]}")
    return times


def _draw(folder: Path) -> _Times:
    from jobs.replay import draw  # loads Beam, which would count for every step's memory

    plan = read_plan(str(_run_folder(folder)))
    return _timed(lambda: draw(plan, 100, seed=0))


def _make_receipts(folder: Path) -> None:
    """Write data and receipt of every unit: each file's are the same, under their own names."""
    plan = read_plan(str(_run_folder(folder)))
    for name in ("data", "receipts"):
        Path(plan.output, name).mkdir()
    source = pq.read_table(plan.units[0].url)
    answered = [to_parquet(_answered(plan, source.slice(row, 1))) for row in range(source.num_rows)]
    for row, content in enumerate(answered):
        (folder / f"{row}.parquet").write_bytes(content)
    digests = [hashlib.sha256(content).hexdigest() for content in answered]
    labels = {task.name: dict.fromkeys(task.labels, 0) | {next(iter(task.labels)): 1} for task in plan.tasks}
    receipt = Receipt(
        unit_id="UNIT", attempt="0" * 32, data="DATA", data_sha256="DIGEST", rejects=None, rows=1, rows_annotated=1,
        rows_rejected=0, error_codes={}, labels=labels, prompt_tokens=100, computed_tokens=50, output_tokens=0,
        seconds=1.0, engine_busy=1.0,
    ).to_json()  # fmt: skip
    for unit in plan.units:
        sha256 = digests[unit.first_row]
        data = f"part-{unit.unit_id}-{sha256[:16]}.parquet"
        os.link(f"{folder}/{unit.first_row}.parquet", f"{plan.output}/data/{data}")
        text = receipt.replace("UNIT", unit.unit_id).replace("DATA", data).replace("DIGEST", sha256)
        with open(f"{plan.output}/receipts/{unit.unit_id}.json", "w") as file:
            file.write(text)


def _answered(plan: Plan, source: pa.Table) -> pa.Table:
    """Return rows with made-up answers: the first label of each task, and little else."""
    row: dict[str, Any] = {}
    for task in plan.tasks:
        row |= {f"{task.name}_label": next(iter(task.labels)), f"{task.name}_score": 1.0, f"{task.name}_margin": 1.0}
    row |= {"status": "annotated", "model_fingerprint": plan.model_fingerprint}
    row |= {"usage": {"prompt_tokens": 100, "cached_tokens": 50, "output_tokens": 0}}
    rows = [found | row for found in source.to_pylist()]
    return pa.Table.from_pylist(rows, schema=output_schema(source.schema, plan))
