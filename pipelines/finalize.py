"""The end of a run: totals of the receipts, orphans deleted, the manifest, and `_SUCCESS` if it is one."""

from collections import Counter
from collections.abc import Iterable, Mapping

from pipelines import storage
from pipelines.commit import delete_failure, read_failures, read_receipts, receipt_url
from schemas.runs import Manifest, Plan, Receipt, RejectedFile


def finalize(plan: Plan, *, max_reject_rate: float) -> Manifest:
    """Return the run's manifest and write it; `_SUCCESS` is there afterwards if and only if the run is complete.

    A receipt whose file has been lost is deleted, so that the next run does its unit again. Files that no receipt
    names are what killed or doubled attempts left, and are deleted. Not to be called while units are being annotated.

    Args:
        plan: the run.
        max_reject_rate: highest share of rejected rows, in [0, 1].

    Raises: StorageError.
    """
    success = storage.join(plan.output, "_SUCCESS")
    receipts = _sound_receipts(plan)
    failed = _failed_files(plan, receipts)
    manifest = make_manifest(plan, receipts, failed, max_reject_rate)
    is_complete = manifest.status == "complete"
    if not is_complete:
        storage.delete(success)  # before the manifest: no moment shows an incomplete run as a success
    orphans = orphan_files(plan, receipts)
    storage.in_threads(storage.delete, [storage.join(plan.output, name) for name in orphans])
    storage.write_bytes_atomic(storage.join(plan.output, "_manifest.json"), manifest.to_json().encode())
    if is_complete:
        storage.write_bytes_atomic(success, b"")
    return manifest


def orphan_files(plan: Plan, receipts: Mapping[str, Receipt]) -> list[str]:
    """Return the files of the run's folders that nothing names, such as `data/part-...`, temporary files too."""
    named: dict[str, set[str | None]] = {
        "data": {receipt.data for receipt in receipts.values()},
        "rejects": {receipt.rejects for receipt in receipts.values()},
        "receipts": {f"{unit.unit_id}.json" for unit in plan.units},
        "failures": {f"{unit.unit_id}.json" for unit in plan.units},
    }
    return [
        storage.join(folder, name)
        for folder, kept in named.items()
        for name in storage.names(storage.join(plan.output, folder))
        if name not in kept
    ]


def _sound_receipts(plan: Plan) -> dict[str, Receipt]:
    """Return the receipts whose files exist, in plan order; delete the others."""
    receipts = read_receipts(plan)
    stored = {folder: set(storage.names(storage.join(plan.output, folder))) for folder in ("data", "rejects")}
    sound = {}
    for unit_id, receipt in receipts.items():
        if receipt.data in stored["data"] and (receipt.rejects is None or receipt.rejects in stored["rejects"]):
            sound[unit_id] = receipt
        else:
            storage.delete(receipt_url(plan, unit_id))
    return sound


def _failed_files(plan: Plan, receipts: Mapping[str, Receipt]) -> tuple[RejectedFile, ...]:
    """Return the files with a unit that could not be read, each once; drop the notes of units done since."""
    failed: dict[str, RejectedFile] = {}
    for unit_id, file in read_failures(plan).items():
        if unit_id in receipts:
            delete_failure(plan, unit_id)
        else:
            failed.setdefault(file.url, file)
    return tuple(failed.values())


def make_manifest(
    plan: Plan, receipts: Mapping[str, Receipt], failed: tuple[RejectedFile, ...], max_reject_rate: float
) -> Manifest:
    """Return the manifest that these receipts, in plan order, add up to."""
    done = list(receipts.values())
    rejected_files = plan.rejected_files + failed
    rows_rejected = sum(receipt.rows_rejected for receipt in done)
    if len(done) < len(plan.units) or rejected_files:
        status = "incomplete"
    elif rows_rejected > max_reject_rate * plan.rows:
        status = "too_many_rejects"
    else:
        status = "complete"
    return Manifest(
        run_id=plan.run_id,
        status=status,
        rows_in=plan.rows,
        rows_annotated=sum(receipt.rows_annotated for receipt in done),
        rows_rejected=rows_rejected,
        units=len(plan.units),
        units_done=len(done),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in done),
        computed_tokens=sum(receipt.computed_tokens for receipt in done),
        output_tokens=sum(receipt.output_tokens for receipt in done),
        error_codes=_sum_counts(receipt.error_codes for receipt in done),
        labels={
            task.name: _sum_counts(receipt.labels.get(task.name, {}) for receipt in done)
            for task in plan.tasks
            if task.kind != "generate"
        },
        data=tuple(receipt.data for receipt in done),
        rejects=tuple(receipt.rejects for receipt in done if receipt.rejects is not None),
        rejected_files=rejected_files,
        engine_busy=round(sum(r.engine_busy * r.rows for r in done) / (sum(r.rows for r in done) or 1), 3),
    )


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        # Not `total += ...`, which drops labels that no row got.
        for name, rows in count.items():
            total[name] += rows
    return dict(total)
