"""The job file: strict TOML in, a frozen `JobSpec` out.

An unknown key is an error that names the nearest known one, because a misspelled key that is silently ignored costs a
night of annotation. Relative paths are relative to the current folder. No environment variable is read.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.limits import is_deadline
from jobs.section import Section
from pipelines.watch import STALL_SECONDS
from schemas.annotations import TASK_FIELDS
from schemas.errors import SpecError
from schemas.runs import Task
from schemas.tickets import TicketColumns

RUNNERS = ("local", "dask", "portable")
MODES = ("cpu",)
PRECISIONS = ("int8", "mixed", "bf16", "fp32")
ON_BAD_FILE = ("reject", "fail")

_KEYS: dict[str, tuple[str, ...]] = {
    "": ("job", "input", "output", "model", "deploy", "task", "limits", "cache"),
    "job": ("name",),
    "input": ("urls", "columns", "on_bad_file", "unit_rows"),
    "input.columns": ("id", "text"),
    "output": ("url", "prefix"),
    "model": ("checkpoint", "precision", "router_thresholds"),
    "deploy": ("mode", "runner", "workers", "options", "dask_address", "price_per_hour", "tokens_per_second"),
    "task": (
        *("name", "kind", "labels", "guidelines", "instruction", "calibrate", "threshold", "max_tokens"),
        *("json_schema", "regex", "choices", "temperature", "top_p", "seed", "samples", "stop"),
    ),
    "limits": ("max_prompt_tokens", "max_reject_rate", "deadline", "max_cost", "grace_seconds", "stall_seconds"),
    "cache": ("max_gb",),
}

_KINDS_OF_KEY = {
    "labels": ("choose", "choose_many"),
    "calibrate": ("choose",),
    "threshold": ("choose_many",),
    **dict.fromkeys(
        (
            "instruction",
            "max_tokens",
            "json_schema",
            "regex",
            "choices",
            "temperature",
            "top_p",
            "seed",
            "samples",
            "stop",
        ),
        ("generate",),
    ),
}

_COLDEST = 0.01
"""The lowest temperature but 0: below it, differences of logits leave the range of float32."""

_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_PREFIX = re.compile(r"[A-Za-z0-9_]{0,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """What a person asks for: which tables, which questions, which model, where to."""

    name: str
    urls: tuple[str, ...]
    columns: TicketColumns
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
    raw = _read_toml(path)
    for section, values in (overrides or {}).items():
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table.update(values)
    return make_spec(raw, path)


def make_spec(raw: Mapping[str, Any], where: str) -> JobSpec:
    """Return the job of these sections, as `tomllib` reads them. Raises: SpecError, which `where` begins."""
    return _job(Section(where, _KEYS, raw))


def _read_toml(path: str) -> dict[str, Any]:
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
        columns=_columns(input_.section("columns")),
        on_bad_file=input_.one_of("on_bad_file", ON_BAD_FILE, "reject"),
        unit_rows=input_.integer("unit_rows", 2048),
        output=output.text("url", ""),
        prefix=output.matching("prefix", _PREFIX, "letters, digits and underscore", ""),
        checkpoint=model.text("checkpoint", DEFAULT_CHECKPOINT) or DEFAULT_CHECKPOINT,
        precision=model.one_of("precision", PRECISIONS, "int8"),
        router_thresholds=_router_thresholds(model),
        mode=_mode(deploy),
        runner=deploy.one_of("runner", RUNNERS, "local"),
        workers=deploy.integer("workers", 1),
        options=deploy.texts("options"),
        dask_address=_dask_address(deploy),
        tasks=_tasks(root),
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


def _mode(deploy: Section) -> str:
    mode = deploy.text("mode", "cpu")
    if mode not in MODES:
        raise deploy.wrong("mode", "one of: cpu; this version has no other mode", 'say mode = "cpu", or leave it out')
    return mode


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


def _columns(section: Section) -> TicketColumns:
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


def _tasks(root: Section) -> tuple[Task, ...]:
    tables = root.table.get("task", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SpecError(
            f"{root.file}: there is no task" if not tables else f"{root.file}: [task] must be written [[task]]",
            remedy='add [[task]] with name = "policy", kind = "choose" and labels = ["safe", "spam"]',
        )
    tasks = tuple(_task(replace(root, name="task", table=table, number=i)) for i, table in enumerate(tables, start=1))
    seen: set[str] = set()
    for i, task in enumerate(tasks, start=1):
        if task.name in seen:
            section = replace(root, name="task", table={"name": task.name}, number=i)
            raise section.wrong("name", "a name that no task before it has")
        seen.add(task.name)
    return tasks


def _task(section: Section) -> Task:
    section.check_keys()
    name = section.matching("name", _TASK_NAME, "a letter, then letters, digits and underscores: it names columns")
    kind = section.one_of("kind", tuple(TASK_FIELDS))
    for key, kinds in _KINDS_OF_KEY.items():
        if key in section.table and kind not in kinds:
            what = f'{section.where(key)} does not go with kind = "{kind}"'
            raise SpecError(what, remedy=f"remove it; it belongs to {' and '.join(kinds)}")
    labels = _labels(section, kind)
    instruction = section.text("instruction", "")
    if kind == "generate" and not instruction.strip():
        raise section.missing("instruction", '"Summarize the ticket in one sentence."')
    task = Task(
        name=name,
        kind=kind,
        labels=labels,
        guidelines=section.text("guidelines", ""),
        instruction=instruction,
        calibrate=section.flag("calibrate", default=False),
        threshold=section.share("threshold", 0.5),
        max_tokens=section.integer("max_tokens", 64),
        json_schema=_json_schema(section),
        regex=_unless_empty(section, "regex"),
        choices=_choices(section),
        **_drawing(section),
    )
    _check_grammar(section, task)
    return task


def _unless_empty(section: Section, key: str) -> str:
    value = section.text(key, "")
    if key in section.table and not value:
        raise section.wrong(key, "a string that is not empty")
    return value


def _json_schema(section: Section) -> str:
    """Return the JSON schema as JSON, its keys in the order written, which is the order of an answer's; or nothing."""
    value = section.table.get("json_schema")
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise section.wrong("json_schema", "the path of a .json file that exists, or a table") from None
        except (OSError, ValueError, RecursionError) as error:
            raise section.wrong("json_schema", f"a file of JSON in UTF-8: {error}", "mend the file") from error
    if not isinstance(value, dict):
        raise section.wrong("json_schema", "a JSON schema that is an object: a table, or the path of a .json file")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise section.wrong("json_schema", f"what JSON can say: {error}", "write dates as strings") from error


def _choices(section: Section) -> tuple[str, ...]:
    choices = section.texts("choices")
    if "choices" in section.table and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise section.wrong("choices", "at least 2 different strings")
    return choices


def _drawing(section: Section) -> dict[str, Any]:
    """Return how the tokens of a `generate` task are drawn, and what ends them."""
    temperature = section.real("temperature", 0.0)
    if not (temperature == 0 or _COLDEST <= temperature <= 100):
        raise section.wrong("temperature", f"0, which takes the likeliest token, or a number from {_COLDEST} to 100")
    top_p = section.real("top_p", 1.0)
    if not 0 < top_p <= 1:
        raise section.wrong("top_p", "a number above 0, up to 1")
    samples = section.integer("samples", 1)
    if samples > 1 and not temperature:
        raise section.wrong("samples", "1: without a temperature every sample is the same", "add: temperature = 0.7")
    stop = section.table.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise section.wrong("stop", "a list of strings that are not empty")
    return {
        "temperature": temperature,
        "top_p": top_p,
        "seed": section.integer("seed", 0, least=0),
        "samples": samples,
        "stop": tuple(stop),
    }


def _check_grammar(section: Section, task: Task) -> None:
    """Raise SpecError for two grammars, or one that cannot be compiled."""
    given = [key for key in ("json_schema", "regex", "choices") if key in section.table]
    if len(given) > 1:
        what = f"{section.where(given[1])} does not go with {given[0]}"
        raise SpecError(what, remedy="keep one: an answer matches one of json_schema, regex, choices")
    if given:
        from k2model.engine.grammar import grammar_problem
        from pipelines.prompts import grammar_of

        grammar = grammar_of(task)
        if grammar is not None and (problem := grammar_problem(grammar)):
            remedy = "correct it; github.com/guidance-ai/llguidance says which parts of JSON Schema and regex there are"
            raise section.wrong(given[0], f"what an answer can follow: {problem}", remedy)


def _labels(section: Section, kind: str) -> dict[str, str]:
    """Return label to description, in the order written; empty for `generate`."""
    if kind == "generate":
        return {}
    value = section.table.get("labels", {})
    fewest = 2 if kind == "choose" else 1
    expected = f"at least {fewest} labels: a list of strings, or a table of label = description"
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        if len(set(value)) < len(value):
            raise section.wrong("labels", "each label once")
        labels = dict.fromkeys(value, "")
    elif isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        labels = dict(value)
    else:
        raise section.wrong("labels", expected)
    if len(labels) < fewest:
        raise (
            section.wrong("labels", expected)
            if "labels" in section.table
            else section.missing("labels", '{ "safe" = "ordinary talk", "spam" = "unwanted selling" }')
        )
    for label in labels:
        if not label.strip() or label != label.strip() or "\n" in label:
            raise SpecError(
                f'{section.where("labels")} has "{label}"',
                remedy="a label is one line, with no space at either end",
            )
    return labels
