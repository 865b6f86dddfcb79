"""The end of a run: totals of the receipts, the manifest, `_SUCCESS` if it is complete, and then the leftovers deleted.

The order is the point: COMMIT.md says who may rely on what after each step.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipelines import storage
from pipelines.commit import claim_url, read_failures, receipt_url, receipts_of
from schemas.errors import StorageError
from schemas.runs import Manifest, Plan, Receipt, RejectedFile

_FOLDERS = ("data", "rejects")

_TOTALS = (
    *("rows_annotated", "rows_rejected", "rows_cached"),
    *("prompt_tokens", "computed_tokens", "output_tokens", "attempts"),
)
"""Fields of the manifest that are the sums of those of the receipts."""


def finalize(plan: Plan, *, max_reject_rate: float, stopped_by: str = "") -> Manifest:
    """Return the run's manifest; `_SUCCESS` is there afterwards if and only if the run is complete.

    A complete run is final: called again, this returns what was published, whatever the limits are by then. Files that
    nothing names are what killed attempts left; they are deleted once there is a `_SUCCESS`. A receipt whose file has
    been lost is deleted, so that the next run does its unit again. May be called at any time, by several at once.

    Args:
        plan: the run.
        max_reject_rate: highest share of rejected rows, in [0, 1].
        stopped_by: `deadline`, `budget` or `stopped`, if one of these left units undone.

    Raises: StorageError.
    """
    stored = {folder: set(storage.names(storage.join(plan.output, folder))) for folder in _FOLDERS}
    manifest = _published(plan, stored)
    if manifest is None:
        receipts = _sound_receipts(plan, stored)
        manifest = make_manifest(plan, receipts, read_failures(plan), max_reject_rate, stopped_by)
        if manifest.status != "complete":
            _write(plan, "_unfinished.json", manifest)
            return manifest
        # Asked after the receipts were read, and not only before: without a _SUCCESS by now, whoever deletes leftovers
        # looks for claims later than this, and finds those of all the receipts that were read.
        manifest = _published(plan, stored) or _publish(plan, manifest)
    _delete_leftovers(plan, manifest, stored)
    return manifest


def read_manifest(run_url: str) -> Manifest | None:
    """Return the published result of a complete run, else what `finalize` found last; None before it was called.

    Raises: StorageError.
    """
    is_complete = storage.exists(storage.join(run_url, "_SUCCESS"))
    url = storage.join(run_url, "_manifest.json" if is_complete else "_unfinished.json")
    try:
        return Manifest.from_json(storage.read_text(url))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{url}: not a manifest of this version: {error}", remedy="run the job again") from error


def orphan_files(plan: Plan, manifest: Manifest) -> list[str]:
    """Return the files of the run's folders that the manifest does not name, such as `data/part-...`."""
    receipts = {f"{unit.unit_id}.json" for unit in plan.units}
    named = {"data": set(manifest.data), "rejects": set(manifest.rejects), "receipts": receipts, "failures": receipts}
    return [
        storage.join(folder, name)
        for folder, kept in named.items()
        for name in storage.names(storage.join(plan.output, folder))
        if name not in kept
    ]


def make_manifest(
    plan: Plan,
    receipts: Iterable[Receipt],
    failures: Mapping[str, RejectedFile],
    max_reject_rate: float,
    stopped_by: str = "",
) -> Manifest:
    """Return the manifest that these receipts, in plan order, add up to; each is forgotten once it is added.

    Args:
        plan: the run.
        receipts: of the units that are done.
        failures: why units could not be read, by unit id; one that has a receipt by now could be.
        max_reject_rate: highest share of rejected rows, in [0, 1].
        stopped_by: what left units undone, if anything did.
    """
    sums = _Sums(labels={task.name: Counter() for task in plan.tasks if task.labels})
    for receipt in receipts:
        sums.add(receipt)
    failed = {file.url: file for unit_id, file in failures.items() if unit_id not in sums.units}
    rejected_files = plan.rejected_files + tuple(failed.values())
    if len(sums.units) < len(plan.units) or rejected_files:
        status = "incomplete"
    elif sums.totals["rows_rejected"] > max_reject_rate * plan.rows:
        status = "too_many_rejects"
    else:
        status = "complete"
    return Manifest(
        run_id=plan.run_id,
        status=status,
        outcome=(stopped_by if status == "incomplete" else "") or status,
        rows_in=plan.rows,
        units=len(plan.units),
        units_done=len(sums.units),
        **sums.totals,
        error_codes=dict(sums.error_codes),
        labels={name: dict(rows) for name, rows in sums.labels.items()},
        data=tuple(sums.data),
        rejects=tuple(sums.rejects),
        rejected_files=rejected_files,
        engine_busy=round(sums.busy_rows / (sums.rows or 1), 3),
        flops=dict(sums.flops),
    )


@dataclass(kw_only=True, slots=True)
class _Sums:
    """What receipts add up to."""

    labels: dict[str, Counter[str]]
    units: set[str] = field(default_factory=set)
    data: list[str] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_TOTALS, 0)))
    error_codes: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    busy_rows: float = 0.0
    """The receipts' share of time that the model computed, times their rows."""

    def add(self, receipt: Receipt) -> None:
        self.units.add(receipt.unit_id)
        self.data.append(receipt.data)
        if receipt.rejects is not None:
            self.rejects.append(receipt.rejects)
        for name in _TOTALS:
            self.totals[name] += getattr(receipt, name)
        self.error_codes.update(receipt.error_codes)
        self.flops.update(receipt.flops)
        self.rows += receipt.rows
        self.busy_rows += receipt.engine_busy * receipt.rows
        for name, rows in self.labels.items():
            rows.update(receipt.labels.get(name, {}))


def _published(plan: Plan, stored: Mapping[str, set[str]]) -> Manifest | None:
    """Return the published manifest; None if there is no `_SUCCESS`.

    If one of its files is gone, which only a hand from outside can bring about, the run is unpublished.
    """
    success, url = (storage.join(plan.output, name) for name in ("_SUCCESS", "_manifest.json"))
    if not storage.exists(success):
        return None
    try:
        manifest = Manifest.from_json(storage.read_text(url))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        manifest = None
    if manifest is not None and all(
        _is_stored(plan, stored, folder, name)
        for folder, names in (("data", manifest.data), ("rejects", manifest.rejects))
        for name in names
    ):
        return manifest
    storage.delete(success)  # first: what `_SUCCESS` vouches for is never missing
    storage.delete(url)
    return None


def _publish(plan: Plan, manifest: Manifest) -> Manifest:
    _write(plan, "_manifest.json", manifest)
    storage.write_bytes_atomic(storage.join(plan.output, "_SUCCESS"), b"")
    return manifest


def _write(plan: Plan, name: str, manifest: Manifest) -> None:
    storage.write_bytes_atomic(storage.join(plan.output, name), manifest.to_json().encode())


def _sound_receipts(plan: Plan, stored: Mapping[str, set[str]]) -> Iterable[Receipt]:
    """Yield the receipts whose files exist, in plan order; delete the others."""
    for unit_id, receipt in receipts_of(plan):
        if (
            receipt is not None
            and _is_stored(plan, stored, "data", receipt.data)
            and (receipt.rejects is None or _is_stored(plan, stored, "rejects", receipt.rejects))
        ):
            yield receipt
        else:
            storage.delete(receipt_url(plan, unit_id))


def _is_stored(plan: Plan, stored: Mapping[str, set[str]], folder: str, name: str) -> bool:
    """Return whether the file exists; a listing may be old, so what it lacks is asked for by name."""
    return name in stored[folder] or storage.exists(storage.join(plan.output, folder, name))


def _delete_leftovers(plan: Plan, manifest: Manifest, stored: Mapping[str, set[str]]) -> None:
    """Delete the files that nothing names and nobody claims. Only after `_SUCCESS`: see COMMIT.md."""
    named = {"data": set(manifest.data), "rejects": set(manifest.rejects)}
    leftovers = [(folder, name) for folder in _FOLDERS for name in stored[folder] - named[folder]]

    def delete(leftover: tuple[str, str]) -> None:
        folder, name = leftover
        if not storage.exists(claim_url(plan, name)):
            storage.delete(storage.join(plan.output, folder, name))

    storage.in_threads(delete, leftovers)
    # Of writers that were killed; a living one, late for a run that is complete, writes again.
    temporary = [
        storage.join(plan.output, folder, name)
        for folder in ("receipts", "claims", "attempts")
        for name in storage.names(storage.join(plan.output, folder))
        if name.startswith(".")
    ]
    storage.in_threads(storage.delete, temporary)
    notes = storage.names(storage.join(plan.output, "failures"))
    storage.in_threads(lambda name: storage.delete(storage.join(plan.output, "failures", name)), notes)
    storage.delete(storage.join(plan.output, "_unfinished.json"))
