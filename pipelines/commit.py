"""The run's folder: plan, data, rejects, receipts. A unit is done when its receipt exists, and not before.

Data files have names unique to the attempt and are written first; the receipt, one small atomic write, comes last.
So a killed, retried or doubled attempt leaves at worst files that no receipt names, which `finalize` deletes.
"""

import hashlib
import io
import json
import uuid
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.annotate import AnnotatedBlock
from schemas.errors import K2Error, SpecError, StorageError
from schemas.runs import Plan, Receipt, RejectedFile, Unit


def write_plan(plan: Plan) -> None:
    """Write plan.json, once: a run that has one must have this one.

    Raises: StorageError if another plan stands there.
    """
    url = storage.join(plan.output, "plan.json")
    try:
        found = read_plan(plan.output)
    except SpecError:
        storage.write_bytes_atomic(url, plan.to_json().encode())
        return
    # The same checkpoint may since have moved: its fingerprint is what counts, and is in the run's id.
    if replace(found, checkpoint=plan.checkpoint) != plan:
        remedy = "delete the folder, or set another [output] url"
        raise StorageError(f"{url}: holds another plan than {plan.run_id}", remedy=remedy)


def read_plan(run_url: str) -> Plan:
    """Return the plan of the run in the folder `run_url`, which may have been moved since.

    Raises: SpecError if there is no run.
    """
    folder = storage.absolute(run_url)
    url = storage.join(folder, "plan.json")
    try:
        plan = Plan.from_json(storage.read_text(url))
    except FileNotFoundError as error:
        remedy = "give the folder <output>/<run_id>"
        raise SpecError(f"{run_url}: not a run, it has no plan.json", remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        remedy = "run the job again from its file"
        raise StorageError(f"{url}: not a plan of this version: {error}", remedy=remedy) from error
    return replace(plan, output=folder)


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


def read_receipts(plan: Plan) -> dict[str, Receipt]:
    """Return the receipts of the plan's units by unit id, in plan order. One that is not a receipt counts as none."""
    done = done_units(plan)
    ids = [unit.unit_id for unit in plan.units if unit.unit_id in done]
    receipts = storage.in_threads(lambda unit_id: _read_receipt(plan, unit_id), ids)
    return {unit_id: receipt for unit_id, receipt in zip(ids, receipts, strict=True) if receipt is not None}


def _read_receipt(plan: Plan, unit_id: str) -> Receipt | None:
    try:
        receipt = Receipt.from_json(storage.read_text(receipt_url(plan, unit_id)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return receipt if receipt.unit_id == unit_id else None


def has_receipt(plan: Plan, unit: Unit) -> bool:
    """Return whether the unit is done."""
    return storage.exists(receipt_url(plan, unit.unit_id))


def commit(block: AnnotatedBlock, plan: Plan) -> Receipt:
    """Write the block's data, its rejects if any, and last its receipt; return the receipt.

    Raises: StorageError.
    """
    attempt = uuid.uuid4().hex
    name = f"part-{block.unit.unit_id}-{attempt}.parquet"
    data = to_parquet(block.table)
    storage.write_bytes_atomic(storage.join(plan.output, "data", name), data)
    rejects = None
    if block.rejects.num_rows:
        rejects = name
        storage.write_bytes_atomic(storage.join(plan.output, "rejects", name), to_parquet(block.rejects))
    receipt = block.receipt(attempt=attempt, data=name, data_sha256=hashlib.sha256(data).hexdigest(), rejects=rejects)
    storage.write_bytes_atomic(receipt_url(plan, block.unit.unit_id), receipt.to_json().encode())
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
    """Return the noted failures by unit id, in plan order."""
    names = set(storage.names(storage.join(plan.output, "failures")))
    failed = [unit.unit_id for unit in plan.units if f"{unit.unit_id}.json" in names]
    texts = storage.in_threads(lambda unit_id: storage.read_text(_failure_url(plan, unit_id)), failed)
    return {unit_id: RejectedFile(**json.loads(text)) for unit_id, text in zip(failed, texts, strict=True)}


def delete_failure(plan: Plan, unit_id: str) -> None:
    """Delete the note of a unit that is done after all."""
    storage.delete(_failure_url(plan, unit_id))


def _failure_url(plan: Plan, unit_id: str) -> str:
    return storage.join(plan.output, "failures", f"{unit_id}.json")
