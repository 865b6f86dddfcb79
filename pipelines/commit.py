"""The run's folder: plan, data, rejects, receipts. A unit is done when its receipt exists, and not before.

A data file is named by the digest of its bytes and written first; the receipt, one small atomic write, comes last. So
attempts that are doubled write the same files, and one that is killed leaves at worst a file that nothing names.
COMMIT.md tells the whole protocol, and why it holds.
"""

import hashlib
import io
import json
import posixpath
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.annotate import AnnotatedBlock
from schemas.errors import K2Error, SpecError, StorageError
from schemas.runs import Plan, Receipt, RejectedFile, Unit
from schemas.units import units_of, units_table

_PAGE = 4096
"""Receipts in memory at once."""


def write_plan(plan: Plan) -> None:
    """Write units.parquet, then plan.json, once: a run that has a plan must have this one.

    Raises: StorageError if another plan stands there.
    """
    url = storage.join(plan.output, "plan.json")
    units_url = storage.join(plan.output, "units.parquet")
    try:
        found = storage.read_text(url)
    except FileNotFoundError:
        storage.write_bytes_atomic(units_url, to_parquet(units_table(plan.units)))
        storage.write_bytes_atomic(url, plan.to_json().encode())
        return
    if _identity(found) != _identity(plan.to_json()):
        remedy = "delete the folder, or set another [output] url"
        raise StorageError(f"{url}: holds another plan than {plan.run_id}", remedy=remedy)
    if not storage.exists(units_url):
        storage.write_bytes_atomic(units_url, to_parquet(units_table(plan.units)))


def _identity(plan_json: str) -> dict[str, object] | None:
    """Return what a plan must have in common with the one before it; None for what is no plan."""
    try:
        # The same checkpoint, or the run, may since have moved; the fingerprint is what counts, and is in the run's id.
        said_of_the_run = {"checkpoint": None, "output": None, "uses_cache": None, "flops": None}
        return {**json.loads(plan_json), **said_of_the_run}
    except (ValueError, TypeError):
        return None


def planned_text(plan: Plan) -> tuple[str, ...] | None:
    """Return the text columns, in order, of the plan that stands in the run's folder; None if none does."""
    try:
        return tuple(json.loads(storage.read_text(storage.join(plan.output, "plan.json")))["columns"]["text"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def read_plan(run_url: str) -> Plan:
    """Return the plan of the run in the folder `run_url`, which may have been moved since.

    Raises: SpecError if there is no run; StorageError if its plan is damaged, or of another version.
    """
    folder = storage.absolute(run_url)
    url, units_url = (storage.join(folder, name) for name in ("plan.json", "units.parquet"))
    try:
        text = storage.read_text(url)
    except FileNotFoundError as error:
        remedy = "give the folder <output>/<run_id>"
        raise SpecError(f"{run_url}: not a run, it has no plan.json", remedy=remedy) from error
    try:
        units = units_of(pq.read_table(pa.BufferReader(storage.read_bytes(units_url))))
    except (ValueError, pa.ArrowException, OSError) as error:
        remedy = "delete it, then run the job again from its file, which writes it anew"
        raise StorageError(f"{units_url}: cannot be read: {error}", remedy=remedy) from error
    try:
        plan = Plan.from_json(text, units)
    except (ValueError, KeyError, TypeError) as error:
        remedy = "delete the folder, then run the job again from its file"
        raise StorageError(f"{url}: not a plan of this version: {error}", remedy=remedy) from error
    return replace(plan, output=folder)


def runs_of(plan: Plan) -> list[str]:
    """Return the folders of the job's runs under the same output, this one among them. Raises: StorageError."""
    parent = posixpath.dirname(plan.output)
    is_run = re.compile(re.escape(plan.job) + "-[0-9a-f]{12}").fullmatch
    return [storage.join(parent, name) for name in storage.folders(parent) if is_run(name)]


def receipt_url(plan: Plan, unit_id: str) -> str:
    """Return where the receipt of a unit stands."""
    return storage.join(plan.output, "receipts", f"{unit_id}.json")


def done_units(plan: Plan) -> frozenset[str]:
    """Return the ids of the units that have a receipt: one listing, no receipt is read."""
    names = storage.names(storage.join(plan.output, "receipts"))
    found = {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}
    return frozenset(found & {unit.unit_id for unit in plan.units})


def pending_units(plan: Plan) -> tuple[Unit, ...]:
    """Return the units without a receipt, in plan order."""
    done = done_units(plan)
    return tuple(unit for unit in plan.units if unit.unit_id not in done)


def receipts_of(plan: Plan) -> Iterator[tuple[str, Receipt | None]]:
    """Yield unit id and receipt of each unit that is done, in plan order, some at a time.

    None stands for a receipt that is none: it cannot be read, or is of another unit.
    """
    done = done_units(plan)
    ids = (unit.unit_id for unit in plan.units if unit.unit_id in done)
    while page := list(islice(ids, _PAGE)):
        yield from zip(page, storage.in_threads(lambda unit_id: read_receipt(plan, unit_id), page), strict=True)


def read_receipts(plan: Plan) -> dict[str, Receipt]:
    """Return the receipts of the plan's units by unit id, in plan order. One that is not a receipt counts as none."""
    return {unit_id: receipt for unit_id, receipt in receipts_of(plan) if receipt is not None}


def read_receipt(plan: Plan, unit_id: str) -> Receipt | None:
    """Return the receipt of a unit; None if there is none, or what stands there is not one."""
    try:
        receipt = Receipt.from_json(storage.read_text(receipt_url(plan, unit_id)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return receipt if receipt.unit_id == unit_id else None


def has_receipt(plan: Plan, unit: Unit) -> bool:
    """Return whether the unit is done."""
    return storage.exists(receipt_url(plan, unit.unit_id))


def claim_url(plan: Plan, data: str) -> str:
    """Return where it stands that a receipt may name the data file `data`, so that nobody ever deletes that."""
    return storage.join(plan.output, "claims", data.removesuffix(".parquet"))


def commit(block: AnnotatedBlock, plan: Plan) -> Receipt:
    """Write the block's data, its rejects if any, and last its receipt; return the unit's receipt.

    That is another attempt's if there is one by then, and ours is not written.

    Raises: StorageError.
    """
    unit_id = block.unit.unit_id
    data = to_parquet(block.table)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"part-{unit_id}-{sha256[:16]}.parquet"
    storage.write_bytes_atomic(storage.join(plan.output, "data", name), data)
    rejects = None
    if block.rejects.num_rows:
        rejects = name
        storage.write_bytes_atomic(storage.join(plan.output, "rejects", name), to_parquet(block.rejects))
    found = read_receipt(plan, unit_id)
    if found is not None:
        return found
    receipt = block.receipt(attempt=uuid.uuid4().hex, data=name, data_sha256=sha256, rejects=rejects)
    storage.write_bytes_atomic(claim_url(plan, name), b"")
    storage.write_bytes_atomic(receipt_url(plan, unit_id), receipt.to_json().encode())
    return receipt


def to_parquet(table: pa.Table) -> bytes:
    """Return `table` as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_failure(plan: Plan, unit: Unit, error: K2Error) -> None:
    """Note why a unit's input cannot be read, so that the other units go on and `finalize` can tell."""
    rejected = RejectedFile(url=unit.url, error_code="unreadable_file", error_message=error.message)
    text = json.dumps(asdict(rejected), indent=1, ensure_ascii=False)
    storage.write_bytes_atomic(_failure_url(plan, unit.unit_id), text.encode())


def read_failures(plan: Plan) -> dict[str, RejectedFile]:
    """Return the noted failures by unit id, in plan order; a note that is deleted meanwhile counts as none."""
    names = set(storage.names(storage.join(plan.output, "failures")))
    failed = [unit.unit_id for unit in plan.units if f"{unit.unit_id}.json" in names]
    notes = storage.in_threads(lambda unit_id: _read_failure(plan, unit_id), failed)
    return {unit_id: note for unit_id, note in zip(failed, notes, strict=True) if note is not None}


def _read_failure(plan: Plan, unit_id: str) -> RejectedFile | None:
    try:
        return RejectedFile(**json.loads(storage.read_text(_failure_url(plan, unit_id))))
    except FileNotFoundError:
        return None


def _failure_url(plan: Plan, unit_id: str) -> str:
    return storage.join(plan.output, "failures", f"{unit_id}.json")
