"""The records a run is made of: plan, unit, receipt, manifest: frozen dataclasses here, JSON on storage but for units.

In `<output>/<run_id>/`:

- `plan.json`, and its units in `units.parquet`: written once, before any work;
- `data/part-<unit>-<digest>.parquet`, `rejects/part-<unit>-<digest>.parquet`: an attempt's rows;
- `claims/part-<unit>-<digest>`: a receipt may name this file, so it is never deleted;
- `receipts/<unit>.json`: written last, a unit is done when this exists;
- `attempts/<unit>.json`: the unit is begun, or was and is not done; so a unit that kills its process is found;
- `calls/<call>.json`: one for each call of `k2batch run` that had something to do: its time and how it ended;
- `failures/<unit>.json`: the unit's input proved damaged, gone or changed after the plan;
- `_manifest.json`: names exactly the files that count; `_unfinished.json` does so before the run is complete;
- `_SUCCESS`: every planned row is annotated or rejected, within the limits;
- `report.html`: the same for people; `churn.json`: what changed since the run before.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from schemas.tickets import TicketColumns

SCHEMA_VERSION = 2
"""Part of a run's identity: raised when the same inputs would give other bytes."""


def digest(value: Any, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question asked of every ticket."""

    name: str
    kind: str
    """`choose` (one label), `choose_many` (any number of labels) or `generate` (text)."""
    labels: dict[str, str] = field(default_factory=dict)
    """Label to description; the order is kept. Empty for `generate`."""
    guidelines: str = ""
    instruction: str = ""
    """What to write, for `generate`."""
    calibrate: bool = False
    """`choose`: divide probabilities by those of tickets without content."""
    threshold: float = 0.5
    """`choose_many`: the lowest score at which a label is given."""
    max_tokens: int = 64
    """`generate`: tokens at most. So are those below of `generate` alone."""
    json_schema: str = ""
    """A JSON schema that the answer matches, as JSON; empty for none. At most one of this and the two below."""
    regex: str = ""
    """A regular expression in Rust's syntax, \\d being 0 to 9, that the whole answer matches; empty for none."""
    choices: tuple[str, ...] = ()
    """The answer is one of these; empty for any."""
    temperature: float = 0.0
    """0: the likeliest token, always."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    samples: int = 1
    """Answers drawn for each ticket."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Return the task whose fields are `raw`, from JSON; plans of earlier versions lack some."""
        lists = {name: tuple(raw.get(name, ())) for name in ("choices", "stop")}
        return cls(**{**raw, **lists})


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A slice of one Parquet file: the unit of work, of retry and of output."""

    unit_id: str
    url: str
    etag: str
    """Changes when the file does, so a changed input is a new unit, never a stale skip."""
    row_groups: tuple[int, int]
    """First row group, and one past the last."""
    skip: int
    """Rows of the first row group that belong to an earlier unit."""
    rows: int
    first_row: int
    """Row number in the file of the unit's first row, from 0."""
    text_bytes: int = 0
    """Of the text columns, uncompressed, as the footer tells: what the unit's work is estimated by."""


def units_digest(units: Iterable[Unit]) -> str:
    """Return 16 hex digits that name these units in this order; a unit's id names its file, etag and rows."""
    names = hashlib.sha256()
    for unit in units:
        names.update(f"{unit.unit_id}\n".encode())
    return names.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedFile:
    """An input file that breaks the data contract as a whole."""

    url: str
    error_code: str
    error_message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of a token in all linears and routers; attention over keys and the output head come on top."""

    token: int = 0
    """With the experts that it is routed to. 0, as the others, in plans of earlier versions."""
    all_experts: int = 0
    """With all experts: a dense model of the same weights."""
    expert: int = 0
    """Of one expert of one layer; 0 for a dense model."""
    unread: int = 0
    """Of `token`, what the last layer does without where nobody reads its output."""


DEVICES = {"cpu": "cpu", "gpu": "cuda"}
"""`[deploy] mode` to what torch calls the device that computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything a worker needs to know, and everything a rerun must find unchanged."""

    run_id: str
    job: str
    output: str
    """`<output url>/<run_id>`, without a trailing slash."""
    columns: TicketColumns
    tasks: tuple[Task, ...]
    checkpoint: str
    model_fingerprint: str
    mode: str
    """A key of DEVICES."""
    precision: str = "int8"
    """What the model's values are rounded to, as `k2model.decoder.precision` lists; so in plans of earlier versions."""
    router_thresholds: tuple[float, ...] = ()
    """Of each layer, to drop experts by; none: a token gets all that its router chose."""
    flops: ModelFlops = ModelFlops()
    """Of the model; says nothing about the result."""
    prefix: str
    """Written before every added column's name."""
    max_prompt_tokens: int
    uses_cache: bool = False
    """Whether answers of earlier runs under the same output are taken; says nothing about the result."""
    units: tuple[Unit, ...]
    rejected_files: tuple[RejectedFile, ...]
    files: int
    """Input files seen, rejected ones too."""

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return sum(unit.rows for unit in self.units)

    def to_json(self) -> str:
        """Return the plan as JSON text, its units as their number, rows and digest."""
        units = {"number": len(self.units), "rows": self.rows, "digest": units_digest(self.units)}
        head = asdict(replace(self, units=())) | {"units": units}
        return json.dumps(head, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, units: tuple[Unit, ...]) -> Self:
        """Return the plan that `to_json` wrote, with its units. Raises: ValueError if they are not its own."""
        raw = json.loads(text)
        planned = (raw["units"]["number"], raw["units"]["digest"])
        if planned != (len(units), units_digest(units)):
            raise ValueError(f"its units are other ones: {len(units)} were found, {planned[0]} planned")
        columns = raw["columns"]
        raw["columns"] = TicketColumns(
            id=columns["id"], text=tuple(columns["text"]), optional=tuple(columns["optional"])
        )
        raw["tasks"] = tuple(Task.from_dict(task) for task in raw["tasks"])
        raw["units"] = units
        raw["rejected_files"] = tuple(RejectedFile(**file) for file in raw["rejected_files"])
        raw["router_thresholds"] = tuple(raw.get("router_thresholds", ()))
        raw["flops"] = ModelFlops(**raw.get("flops", {}))
        return cls(**raw)


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """Proof that one unit is done, with its numbers. Runner-independent, so the run's totals are sums of receipts."""

    unit_id: str
    attempt: str
    data: str
    """File name under `data/`."""
    data_sha256: str
    rejects: str | None
    """File name under `rejects/`; None when no row was rejected."""
    rows: int
    rows_annotated: int
    rows_rejected: int
    error_codes: dict[str, int]
    labels: dict[str, dict[str, int]]
    """Task name to label to rows."""
    prompt_tokens: int
    """Tokens of every row's prompt, as if each had been asked alone."""
    computed_tokens: int
    """Tokens the model really computed."""
    output_tokens: int
    seconds: float
    """Wall time of the unit, from read to commit; units overlap."""
    engine_busy: float = 0.0
    """Share of the time from the first prompt to the last answer in which the model computed, for any unit."""
    rows_cached: int = 0
    """Rows of route `cache`."""
    flops: dict[str, int] = field(default_factory=dict)
    """`computed` by its process since it wrote another receipt, and saved, by cause, as `pipelines.arithmetic` says."""
    attempts: int = 1
    """Begun at the unit until one ended with this receipt."""

    def to_json(self) -> str:
        """Return the receipt as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the receipt that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The published result of a run: the files that count, and the totals."""

    run_id: str
    status: str
    """`complete`, `incomplete` (units or input files are missing) or `too_many_rejects`."""
    outcome: str
    """How the last call ended: the status, or what stopped it before that: `deadline`, `budget` or `stopped`."""
    rows_in: int
    rows_annotated: int
    rows_rejected: int
    units: int
    units_done: int
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    error_codes: dict[str, int]
    labels: dict[str, dict[str, int]]
    data: tuple[str, ...]
    """File names under `data/`, in plan order."""
    rejects: tuple[str, ...]
    rejected_files: tuple[RejectedFile, ...]
    engine_busy: float = 0.0
    """The receipts' share, weighted by rows."""
    rows_cached: int = 0
    flops: dict[str, int] = field(default_factory=dict)
    """The receipts' sums; empty where the model's FLOPs are not known."""
    attempts: int = 0
    """Begun at the units that are done: one each, and one more for each that ended without a receipt."""

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the manifest that `to_json` wrote."""
        raw = json.loads(text)
        raw["data"] = tuple(raw["data"])
        raw["rejects"] = tuple(raw["rejects"])
        raw["rejected_files"] = tuple(RejectedFile(**file) for file in raw["rejected_files"])
        return cls(**raw)
