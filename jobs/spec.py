"""The job file: strict TOML in, a frozen `JobSpec` out.

An unknown key is an error that names the nearest known one, because a misspelled key that is silently ignored costs a
night of annotation. Relative paths are relative to the current folder. No environment variable is read.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.limits import is_deadline
from jobs.section import Section
from jobs.spec_tasks import TASK_KEYS, read_tasks
from pipelines.watch import STALL_SECONDS
from schemas.errors import SpecError
from schemas.runs import Task
from schemas.tickets import TicketColumns

RUNNERS = ("local", "dask", "portable")
MODES = ("cpu", "gpu")
PRECISIONS = ("int8", "mixed", "bf16", "fp32")
ON_BAD_FILE = ("reject", "fail")
TEXT_ORDERS = ("given", "shared")

_KEYS: dict[str, tuple[str, ...]] = {
    "": ("job", "input", "output", "model", "deploy", "task", "limits", "cache"),
    "job": ("name",),
    "input": ("urls", "columns", "text_order", "on_bad_file", "unit_rows"),
    "input.columns": ("id", "text"),
    "output": ("url", "prefix"),
    "model": ("checkpoint", "precision", "router_thresholds"),
    "deploy": ("mode", "runner", "workers", "options", "dask_address", "price_per_hour", "tokens_per_second"),
    "task": TASK_KEYS,
    "limits": ("max_prompt_tokens", "max_reject_rate", "deadline", "max_cost", "grace_seconds", "stall_seconds"),
    "cache": ("max_gb",),
}

_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX = re.compile(r"[A-Za-z0-9_]{0,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """What a person asks for: which tables, which questions, which model, where to."""

    name: str
    urls: tuple[str, ...]
    columns: TicketColumns
    text_order: str
    """`given`, or `shared`: the order of the text columns that fewest tokens are computed for."""
    on_bad_file: str
    """`reject` (annotate the other files, end incomplete) or `fail` (refuse before any work)."""
    unit_rows: int
    """Rows of one unit of work at most."""
    output: str
    prefix: str
    """Written before every added column's name."""
    checkpoint: str
    precision: str
    """What the model's values are rounded to, one of PRECISIONS."""
    router_thresholds: tuple[float, ...]
    """Of each layer, to drop experts by, as `k2batch sparsify` found them; none to drop none."""
    mode: str
    runner: str
    workers: int
    """Worker processes, for the `dask` runner."""
    options: tuple[str, ...]
    """Beam pipeline options, such as `--runner=FlinkRunner`."""
    dask_address: str
    """Of the user's own Dask scheduler, such as `tcp://host:8786`; empty to start `workers` processes here."""
    tasks: tuple[Task, ...]
    max_prompt_tokens: int
    max_reject_rate: float
    """Share of the rows that may be rejected before the run counts as failed, in [0, 1]."""
    price_per_hour: float
    """Of all machines that the run holds, together, in any currency; 0 if not given."""
    tokens_per_second: float
    """What `plan` reckons with before anything was measured; 0 if not given."""
    deadline: str
    """When no unit should be under way any more: a local time of day, or how long from the start; empty for never."""
    max_cost: float
    """What all calls of the run may cost together, in the currency of the price; 0 for no limit."""
    grace_seconds: float
    """How long the units under way may take after SIGTERM."""
    stall_seconds: float
    """After which a process that computes nothing is ended, and what it computed tried more carefully."""
    cache_gb: float
    """What kept answers may take under the output folder once a run ends, in 10^9 bytes; 0 to keep and take none."""


def load_spec(path: str, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> JobSpec:
    """Return the job that the TOML file at `path` describes.

    Args:
        path: the job file.
        overrides: section to key to value, from the command line; they win over the file.

    Raises: SpecError, naming the file, the section and the key.
    """
    raw = read_toml(path)
    for section, values in (overrides or {}).items():
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table.update(values)
    return make_spec(raw, path)


def make_spec(raw: Mapping[str, Any], where: str) -> JobSpec:
    """Return the job of these sections, as `tomllib` reads them. Raises: SpecError, which `where` begins."""
    return _job(Section(where, _KEYS, raw))


def read_toml(path: str) -> dict[str, Any]:
    """Return the tables of the file at `path`. Raises: SpecError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(p.name for p in (Path(__file__).parent / "specs").glob("*.toml")))
        raise SpecError(f"{path}: no such job file", remedy=f"check the path; jobs/specs has {shipped}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}", remedy="a job file is TOML in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not TOML: {error}", remedy="strings need quotes; tables are [section]") from error


def _job(root: Section) -> JobSpec:
    from k2model.formats.checkpoint import DEFAULT_CHECKPOINT

    root.check_keys()
    input_, output, model, deploy, limits = (
        root.section(key) for key in ("input", "output", "model", "deploy", "limits")
    )
    urls = input_.texts("urls")
    if not urls:
        raise input_.missing("urls", '["tickets/*.parquet"]')
    if not output.text("url", "").strip():
        raise output.missing("url", '"annotated/"')
    name_rule = "letters, digits, dot, dash and underscore, 64 at most"
    return JobSpec(
        name=root.section("job").matching("name", _JOB_NAME, name_rule),
        urls=urls,
        columns=read_columns(input_.section("columns")),
        text_order=input_.one_of("text_order", TEXT_ORDERS, "given"),
        on_bad_file=input_.one_of("on_bad_file", ON_BAD_FILE, "reject"),
        unit_rows=input_.integer("unit_rows", 2048),
        output=output.text("url", ""),
        prefix=output.matching("prefix", _PREFIX, "letters, digits and underscore", ""),
        checkpoint=model.text("checkpoint", DEFAULT_CHECKPOINT) or DEFAULT_CHECKPOINT,
        precision=model.one_of("precision", PRECISIONS, "int8"),
        router_thresholds=_router_thresholds(model),
        mode=deploy.one_of("mode", MODES, "cpu"),
        runner=deploy.one_of("runner", RUNNERS, "local"),
        workers=deploy.integer("workers", 1),
        options=deploy.texts("options"),
        dask_address=_dask_address(deploy),
        tasks=read_tasks(root),
        max_prompt_tokens=limits.integer("max_prompt_tokens", 2048),
        max_reject_rate=limits.share("max_reject_rate", 0.01),
        price_per_hour=_positive(deploy, "price_per_hour"),
        tokens_per_second=_positive(deploy, "tokens_per_second"),
        deadline=_deadline(limits),
        max_cost=_max_cost(limits, deploy),
        grace_seconds=_positive(limits, "grace_seconds", 100.0),
        stall_seconds=_positive(limits, "stall_seconds", STALL_SECONDS),
        cache_gb=_cache_gb(root.section("cache")),
    )


def _positive(section: Section, key: str, default: float = 0.0) -> float:
    """Return a number above 0, or the default."""
    value = section.real(key, default)
    if key in section.table and not 0 < value < math.inf:
        raise section.wrong(key, "a number above 0")
    return value


def _deadline(limits: Section) -> str:
    text = limits.text("deadline", "")
    if "deadline" in limits.table and not is_deadline(text):
        raise limits.wrong("deadline", 'a time of day such as "06:00", or a length of time such as "2h30m"')
    return text


def _max_cost(limits: Section, deploy: Section) -> float:
    if "max_cost" in limits.table and "price_per_hour" not in deploy.table:
        raise SpecError(
            f"{limits.where('max_cost')} says nothing without a price",
            remedy="add: [deploy] price_per_hour, that of all machines which the run holds, together",
        )
    return _positive(limits, "max_cost")


def _cache_gb(cache: Section) -> float:
    max_gb = cache.real("max_gb", 10.0)
    if not 0 <= max_gb < math.inf:
        raise cache.wrong("max_gb", "a number from 0, which turns the cache off")
    return max_gb


def _dask_address(deploy: Section) -> str:
    address = deploy.text("dask_address", "")
    if address and deploy.table.get("runner") != "dask":
        raise deploy.wrong("dask_address", 'none, unless runner is "dask"', 'say runner = "dask"')
    return address


def _router_thresholds(model: Section) -> tuple[float, ...]:
    """Return what the file that `router_thresholds` names says; nothing for no file."""
    path = model.text("router_thresholds", "")
    if not path:
        return ()
    remedy = "make it: k2batch sparsify JOB.toml -o thresholds.json"
    try:
        thresholds = json.loads(Path(path).read_text(encoding="utf-8"))["thresholds"]
    except FileNotFoundError:
        raise model.wrong("router_thresholds", "the path of a file that exists", remedy) from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise model.wrong("router_thresholds", "a file that k2batch sparsify wrote", remedy) from error
    if not isinstance(thresholds, list) or not all(isinstance(t, int | float) and 0 < t <= 1 for t in thresholds):
        raise model.wrong("router_thresholds", "a file whose thresholds are numbers above 0, up to 1", remedy)
    return tuple(float(threshold) for threshold in thresholds)


def read_columns(section: Section) -> TicketColumns:
    """Return which columns are the ticket. Raises: SpecError."""
    if "id" not in section.table:
        raise section.missing("id", '"ticket_id"')
    texts = section.texts("text")
    if not texts:
        raise section.missing("text", '["subject?", "body"]')
    names = tuple(name.removesuffix("?") for name in texts)
    identifier = section.text("id", "")
    if not identifier:
        raise section.wrong("id", "the name of a column")
    if len(set(names)) < len(names):
        raise section.wrong("text", "each column once")
    optional = tuple(name.removesuffix("?") for name in texts if name.endswith("?"))
    if len(optional) == len(names):
        raise section.wrong("text", 'at least one column that every file has, that is without a trailing "?"')
    return TicketColumns(id=identifier, text=names, optional=optional)
