"""The job file: strict TOML in, a frozen `JobSpec` out.

An unknown key is an error that names the nearest known one, because a misspelled key that is silently ignored costs a
night of annotation. Relative paths are relative to the current folder. No environment variable is read.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from schemas.annotations import TASK_FIELDS
from schemas.errors import SpecError
from schemas.runs import Task
from schemas.tickets import TicketColumns

RUNNERS = ("local", "dask", "portable")
MODES = ("cpu",)
ON_BAD_FILE = ("reject", "fail")

_KEYS: dict[str, tuple[str, ...]] = {
    "": ("job", "input", "output", "model", "deploy", "task", "limits"),
    "job": ("name",),
    "input": ("urls", "columns", "on_bad_file", "unit_rows"),
    "input.columns": ("id", "text"),
    "output": ("url", "prefix"),
    "model": ("checkpoint",),
    "deploy": ("mode", "runner", "workers", "options"),
    "task": ("name", "kind", "labels", "guidelines", "instruction", "threshold", "max_tokens"),
    "limits": ("max_prompt_tokens", "max_reject_rate"),
}

_KINDS_OF_KEY = {
    "labels": ("choose", "choose_many"),
    "threshold": ("choose_many",),
    "instruction": ("generate",),
    "max_tokens": ("generate",),
}

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
    mode: str
    runner: str
    workers: int
    """Worker processes, for the `dask` runner."""
    options: tuple[str, ...]
    """Beam pipeline options, such as `--runner=FlinkRunner` or `--dask_client_address=tcp://host:8786`."""
    tasks: tuple[Task, ...]
    max_prompt_tokens: int
    max_reject_rate: float
    """Share of the rows that may be rejected before the run counts as failed, in [0, 1]."""


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
    return _job(_Section(path, "", raw))


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


@dataclass(frozen=True, slots=True)
class _Section:
    """A table of the job file, and where it stands, so that every error can say so."""

    file: str
    name: str
    table: Mapping[str, Any]
    number: int = 0
    """Which of several, from 1; 0 for a table that occurs once."""

    def where(self, key: str = "") -> str:
        """Return `job.toml: [section] key`, for messages."""
        name = f"[[{self.name}]] number {self.number}" if self.number else f"[{self.name}]" if self.name else ""
        return " ".join(part for part in (f"{self.file}:", name, key) if part)

    def check_keys(self) -> None:
        """Raise SpecError for the first key that the section does not have."""
        known = _KEYS[self.name]
        for key in self.table:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                what = f'has no key "{key}"' if self.name else f"there is no section [{key}]"
                remedy = f'did you mean "{near[0]}"?' if near else f"it may have: {', '.join(known)}"
                raise SpecError(f"{self.where()} {what}", remedy=remedy)

    def section(self, key: str) -> "_Section":
        """Return the table under `key`, empty if absent, its keys checked."""
        table = self.table.get(key, {})
        name = f"{self.name}.{key}" if self.name else key
        if not isinstance(table, dict):
            remedy = f"write the header [{name}] and its keys below it"
            raise SpecError(f"{self.file}: {name} is {_show(table)}, expected a table", remedy=remedy)
        section = _Section(self.file, name, table)
        section.check_keys()
        return section

    def missing(self, key: str, example: str) -> SpecError:
        """Return the error for a key that must be there."""
        return SpecError(f"{self.where(key)} is missing", remedy=f"add: {key} = {example}")

    def wrong(self, key: str, expected: str, remedy: str = "") -> SpecError:
        """Return the error for a key whose value is not `expected`."""
        return SpecError(f"{self.where(key)} is {_show(self.table.get(key))}, expected {expected}", remedy=remedy)

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.table.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string in quotes")
        return value

    def matching(self, key: str, pattern: re.Pattern[str], expected: str, default: str | None = None) -> str:
        """Return a string that `pattern` matches whole."""
        if default is None and key not in self.table:
            raise self.missing(key, '"..."')
        value = self.text(key, default or "")
        if not pattern.fullmatch(value):
            raise self.wrong(key, expected)
        return value

    def one_of(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """Return one of `known`."""
        if default is None and key not in self.table:
            raise self.missing(key, f'"{known[0]}"')
        value = self.text(key, default or "")
        if value not in known:
            near = get_close_matches(value, known, n=1)
            raise self.wrong(key, f"one of: {', '.join(known)}", remedy=f'did you mean "{near[0]}"?' if near else "")
        return value

    def integer(self, key: str, default: int) -> int:
        """Return an integer of at least 1."""
        value = self.table.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a whole number from 1")
        return value

    def share(self, key: str, default: float) -> float:
        """Return a number in [0, 1]."""
        value = self.table.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise self.wrong(key, "a number from 0 to 1")
        return float(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; a lone string counts as a list of one."""
        value = self.table.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item.strip() for item in values):
            raise self.wrong(key, "a list of strings that are not blank")
        return tuple(values)


def _show(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _job(root: _Section) -> JobSpec:
    from k2model.formats.checkpoint import DEFAULT_CHECKPOINT

    root.check_keys()
    input_, output, deploy, limits = (root.section(key) for key in ("input", "output", "deploy", "limits"))
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
        checkpoint=root.section("model").text("checkpoint", DEFAULT_CHECKPOINT) or DEFAULT_CHECKPOINT,
        mode=_mode(deploy),
        runner=deploy.one_of("runner", RUNNERS, "local"),
        workers=deploy.integer("workers", 1),
        options=deploy.texts("options"),
        tasks=_tasks(root),
        max_prompt_tokens=limits.integer("max_prompt_tokens", 2048),
        max_reject_rate=limits.share("max_reject_rate", 0.01),
    )


def _mode(deploy: _Section) -> str:
    mode = deploy.text("mode", "cpu")
    if mode not in MODES:
        raise deploy.wrong("mode", "one of: cpu; this version has no other mode", 'say mode = "cpu", or leave it out')
    return mode


def _columns(section: _Section) -> TicketColumns:
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


def _tasks(root: _Section) -> tuple[Task, ...]:
    tables = root.table.get("task", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SpecError(
            f"{root.file}: there is no task" if not tables else f"{root.file}: [task] must be written [[task]]",
            remedy='add [[task]] with name = "policy", kind = "choose" and labels = ["safe", "spam"]',
        )
    tasks = tuple(_task(_Section(root.file, "task", table, i)) for i, table in enumerate(tables, start=1))
    seen: set[str] = set()
    for i, task in enumerate(tasks, start=1):
        if task.name in seen:
            section = _Section(root.file, "task", {"name": task.name}, i)
            raise section.wrong("name", "a name that no task before it has")
        seen.add(task.name)
    return tasks


def _task(section: _Section) -> Task:
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
    return Task(
        name=name,
        kind=kind,
        labels=labels,
        guidelines=section.text("guidelines", ""),
        instruction=instruction,
        threshold=section.share("threshold", 0.5),
        max_tokens=section.integer("max_tokens", 64),
    )


def _labels(section: _Section, kind: str) -> dict[str, str]:
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
