"""The tasks of a job file, `[[task]]`: what each asks, what its answers match and how they are drawn."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.section import Section
from schemas.annotations import TASK_FIELDS
from schemas.errors import SpecError
from schemas.runs import Task

TASK_KEYS = (
    *("name", "kind", "labels", "guidelines", "instruction", "calibrate", "threshold", "max_tokens"),
    *("json_schema", "regex", "choices", "temperature", "top_p", "seed", "samples", "stop"),
)

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

_TASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def read_tasks(root: Section) -> tuple[Task, ...]:
    """Return the tasks of every [[task]], at least one. Raises: SpecError."""
    tables = root.table.get("task", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SpecError(
            f"{root.file}: there is no task" if not tables else f"{root.file}: [task] must be written [[task]]",
            remedy='add [[task]] with name = "policy", kind = "choose" and labels = ["safe", "spam"]',
        )
    tasks = tuple(read_task(replace(root, name="task", table=each, number=i)) for i, each in enumerate(tables, start=1))
    seen: set[str] = set()
    for i, task in enumerate(tasks, start=1):
        if task.name in seen:
            section = replace(root, name="task", table={"name": task.name}, number=i)
            raise section.wrong("name", "a name that no task before it has")
        seen.add(task.name)
    return tasks


def read_task(section: Section) -> Task:
    """Return the task of one [[task]]. Raises: SpecError."""
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
