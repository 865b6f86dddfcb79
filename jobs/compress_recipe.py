"""The recipe of a smaller model: strict TOML in, a frozen `Recipe` out, read as job files are.

Relative paths are relative to the current folder, those of data to the folder that `--data` names, those of words to
the recipe's own.
"""

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.evaluate import true_labels
from jobs.section import Section
from jobs.spec import read_columns, read_toml
from jobs.spec_tasks import read_task
from k2model.compress.distill import Mix
from k2model.compress.experts import Cut
from k2model.compress.prune import Pruning
from k2model.compress.train import TrainingOptions
from k2model.compress.vocabulary import Trim
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT
from pipelines import storage
from pipelines.units import inspect_file
from schemas.errors import SchemaMismatch, SpecError
from schemas.runs import Task
from schemas.tickets import TicketColumns

Value = int | float | str
Options = TypeVar("Options")


def _defaults(options: Any, **defaults: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of options with their defaults, those given first."""
    return {**{each.name: each.default for each in fields(options)}, **defaults}


_TRAINING: dict[str, Value] = {"batch_rows": 16, **_defaults(TrainingOptions, steps=1000)}

_UNTRAINED: dict[str, type] = {"vocabulary": Trim, "prune": Pruning, "experts": Cut}

OPTIONS: dict[str, dict[str, Value]] = {
    "tune": _TRAINING,
    **{kind: _defaults(options) for kind, options in _UNTRAINED.items()},
    "distill": {**_TRAINING, **_defaults(Mix)},
    "quantize": {**_TRAINING, **_defaults(Mix, hidden_weight=0.0), "embedding": "bf16"},
}
"""Kind of a step to what it may be told, with the default. A step that trains takes `batch_rows` rows at a time."""

_CHOICES = {"layers_by": ("importance", "depth"), "device": ("cpu", "cuda"), "embedding": ("bf16", "int8")}

_LEARNING = ("truth", "label_sample", "few_labels", "word_dropout", "renamed", "names", "also", "taught")
"""Keys of a task that a job's task does not have."""

_KEYS: dict[str, tuple[str, ...]] = {
    "": ("compress", "data", "step"),
    "compress": (
        *("teacher", "student", "output", "seed", "seeds", "max_prompt_tokens"),
        *("watched_rows", "validation_rows", "speed_rows"),
    ),
    "data": ("name", "urls", "validation", "held_back", "columns", "weight", "rows", "task"),
    "data.columns": ("id", "text"),
    "data.task": ("name", "kind", "labels", "labels_from", "guidelines", "calibrate", "threshold", *_LEARNING),
    "step": ("kind", *dict.fromkeys(key for options in OPTIONS.values() for key in options)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataTask:
    """A question asked of a set's tickets, as a job would ask it and nothing else."""

    task: Task
    truth: str
    """The column of the labels people gave; empty for none."""
    label_sample: int
    """`choose`: labels that a batch's instructions list at most, drawn anew for each; 0 for all, in the task's order.
    `choose_many`: labels that are asked about a ticket at most, all right ones first, drawn anew each time; 0 for all.
    Right ones are so met more often than in life, and scores come out higher than shares: as if by a lower threshold.
    """
    few_labels: float = 0.0
    """`choose`: share of the batches that are of 2 to `label_sample` labels alone, as another's task may have few."""
    word_dropout: float = 0.0
    """Share of a ticket's words that are left out, drawn anew each time: what is learned hangs on no single one."""
    renamed: float = 0.0
    """Share of the batches that ask in other words, so that a student knows a label in other spellings, too."""
    names: tuple[str, ...] = ()
    """What the task may be called in those."""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label to what else it may be called in those; the n-th words of all labels go together."""
    taught: bool = True
    """Whether `distill` asks the teacher about it; else labels alone are learned: where it knows them badly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Tickets to learn from, and others to be judged by."""

    name: str
    urls: tuple[str, ...]
    """None for a set that only judges, labels never seen before."""
    validation: tuple[str, ...]
    held_back: float
    """Share of the rows of `urls` that judge, where `validation` names no files."""
    columns: TicketColumns
    weight: float
    """How often a batch is of this set, beside the weights of the others."""
    rows: int
    """Rows to learn from at most; 0 for all."""
    tasks: tuple[DataTask, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step, from a checkpoint to the next."""

    kind: str
    options: dict[str, Any]

    def is_told(self) -> tuple[type, ...]:
        """Return the dataclasses of options of this kind; none for quantizing without training."""
        if "batch_rows" not in self.options:
            return (_UNTRAINED[self.kind],)
        if self.kind == "quantize" and self.options["steps"] == 0:
            return ()
        return (TrainingOptions,) if self.kind == "tune" else (TrainingOptions, Mix)

    def only(self, options: type[Options]) -> Options:
        """Return those that the dataclass `options` has. Raises: SpecError for values it refuses."""
        names = [each.name for each in fields(cast(Any, options))]
        return options(**{name: self.options[name] for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a person asks for: which teacher, which tickets, which steps, where to."""

    teacher: str
    student: str
    """What the first step begins from, where that is a checkpoint made before; empty for the teacher itself."""
    output: str
    seed: int
    seeds: int
    """Times that the steps are done: with `seed`, the next one, and so on."""
    max_prompt_tokens: int
    watched_rows: int
    """Of those learned from of each set and task, that tell when a training is at its best, at most; 0 for all."""
    validation_rows: int
    """Of each set and task, that every checkpoint is judged by at most; 0 for all."""
    speed_rows: int
    """Tickets timed; 0 for none."""
    data: tuple[DataSet, ...]
    steps: tuple[Step, ...]


def load_recipe(path: str, data: str = "", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe in the TOML file at `path`.

    Args:
        path: the recipe.
        data: the folder or URL that relative urls of data are in; empty for the current folder.
        overrides: keys of [compress], from the command line; they win over the file.

    Raises: SpecError, naming the file, the section and the key; SchemaMismatch where labels come from broken files.
    """
    raw = read_toml(path)
    compress = raw.setdefault("compress", {})
    if isinstance(compress, dict):
        compress.update(overrides or {})
    root = Section(path, _KEYS, raw)
    root.check_keys()
    section = root.section("compress")
    output = section.text("output", "")
    if not output.strip():
        raise section.missing("output", '"my-model/"')
    if not storage.is_local(output):
        raise section.wrong("output", "a folder of this machine", "train here, then copy the folder of the last step")
    return Recipe(
        teacher=section.text("teacher", DEFAULT_CHECKPOINT) or DEFAULT_CHECKPOINT,
        student=section.text("student", ""),
        output=output,
        seed=section.integer("seed", 0, least=0),
        seeds=section.integer("seeds", 1),
        max_prompt_tokens=section.integer("max_prompt_tokens", 2048),
        watched_rows=section.integer("watched_rows", 500, least=0),
        validation_rows=section.integer("validation_rows", 500, least=0),
        speed_rows=section.integer("speed_rows", 64, least=0),
        data=_data(root, data),
        steps=_steps(root),
    )


def _data(root: Section, folder: str) -> tuple[DataSet, ...]:
    sets = tuple(_set(section, folder) for section in _tables(root, "data", 'urls = "tickets/*.parquet" and a task'))
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise SpecError(f"{root.file}: two [[data]] have one name: {', '.join(names)}", remedy="give each its own name")
    return sets


def _set(section: Section, folder: str) -> DataSet:
    section.check_keys()
    urls, validation = section.texts("urls"), section.texts("validation")
    if not urls and not validation:
        raise section.missing("urls", '["tickets/*.parquet"]')
    held_back, weight = section.share("held_back", 0.1), section.real("weight", 1.0)
    if not 0 < held_back < 1:
        raise section.wrong("held_back", "a share between 0 and 1")
    if not 0 < weight < 1e9:
        raise section.wrong("weight", "a number above 0")
    urls, validation = (_in_folder(folder, each) for each in (urls, validation))
    inner = replace(section, file=section.where(), name="data", number=0)
    tasks = _tables(inner, "task", 'name = "topic", kind = "choose", labels or labels_from = "truth", and truth')
    return DataSet(
        name=section.text("name", "") or f"set {section.number}",
        urls=urls,
        validation=validation,
        held_back=held_back,
        columns=read_columns(inner.section("columns")),
        weight=weight,
        rows=section.integer("rows", 0, least=0),
        tasks=tuple(_task(each, (*urls, *validation)) for each in tasks),
    )


def _in_folder(folder: str, urls: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        url if not folder or "://" in url or url.startswith("/") else storage.join(folder, url) for url in urls
    )


def _tables(section: Section, key: str, example: str) -> list[Section]:
    """Return each of the tables written [[key]]."""
    tables, name = section.table.get(key, []), f"{section.name}.{key}".strip(".")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        what = f"there is no [[{name}]]" if not tables else f"[{name}] must be written [[{name}]]"
        raise SpecError(f"{section.file}: {what}", remedy=f"add [[{name}]] with {example}")
    return [replace(section, name=name, table=table, number=i) for i, table in enumerate(tables, start=1)]


def _task(section: Section, urls: Sequence[str]) -> DataTask:
    section.check_keys()
    section.one_of("kind", ("choose", "choose_many"))
    truth, table = section.text("truth", ""), dict(section.table)
    if "labels_from" in table:
        section.one_of("labels_from", ("truth",))
        if "labels" in table or not truth:
            what = f"{section.where('labels_from')} needs truth, and no labels"
            raise SpecError(what, remedy='say truth = "label", and either labels or labels_from')
        table["labels"] = _labels_of(truth, urls)
    label_sample = section.integer("label_sample", 0, least=0)
    if label_sample == 1:
        raise section.wrong("label_sample", "at least 2, or 0 for all")
    few_labels = section.share("few_labels", 0.0)
    if few_labels and not (label_sample and table.get("kind") == "choose"):
        raise section.wrong("few_labels", 'none without label_sample and kind = "choose"')
    own = {key: value for key, value in table.items() if key not in ("labels_from", *_LEARNING)}
    task = read_task(replace(section, table=own))
    return DataTask(
        task=task,
        truth=truth,
        label_sample=label_sample,
        few_labels=few_labels,
        word_dropout=section.share("word_dropout", 0.0),
        renamed=section.share("renamed", 0.0),
        names=section.texts("names"),
        also=_also(section, task),
        taught=section.flag("taught", default=True),
    )


def _also(section: Section, task: Task) -> dict[str, tuple[str, ...]]:
    """Return other words for labels: a table, or the name of a TOML file of such, beside the recipe."""
    table, place = section.table.get("also", {}), section.where("also")
    if isinstance(table, str):
        place = os.path.join(os.path.dirname(section.file.split(": ")[0]), table)
        if not os.path.isfile(place):
            raise section.wrong("also", f"the name of a file beside the recipe: {place} is none")
        table = read_toml(place)
    if not isinstance(table, dict):
        raise section.wrong("also", 'a table of label = ["other words", ...], or the name of a file of such')
    inner = replace(section, name=f"{section.name}.also", table=table, number=0)
    for label in table:
        if label not in task.labels:
            remedy = f"known: {', '.join(task.labels)}"[:500]
            raise SpecError(f'{place}: "{label}" is no label of task "{task.name}"', remedy=remedy)
    return {label: inner.texts(label) for label in table}


def _labels_of(truth: str, urls: Sequence[str]) -> list[str]:
    """Return the labels that people gave, sorted. Raises: SchemaMismatch; SpecError."""
    found: set[str] = set()
    for url in (each for pattern in urls for each in storage.find(pattern)):
        for labels in true_labels(read_columns_of(url, [truth])[truth], url):
            found.update(labels or ())
    return sorted(found)


def read_columns_of(url: str, names: Sequence[str], columns: TicketColumns | None = None) -> pa.Table:
    """Return the columns `names` of a Parquet file, and the texts of `columns`. Raises: SchemaMismatch."""
    problems = inspect_file(url, columns, ()).problems if columns is not None else ()
    if problems:
        raise SchemaMismatch(f"{url}: {'; '.join(what for _, what in problems)}", remedy="correct [[data]] columns")
    try:
        with storage.open_read(url) as file:
            parquet = pq.ParquetFile(file)
            missing = [name for name in names if name not in parquet.schema_arrow.names]
            if missing:
                known = ", ".join(parquet.schema_arrow.names)
                raise SchemaMismatch(f'{url}: column "{missing[0]}" is missing', remedy=f"the file has: {known}")
            texts = columns.present(parquet.schema_arrow) if columns is not None else ()
            return parquet.read(list(dict.fromkeys((*texts, *names))))
    except (pa.ArrowException, OSError) as error:
        raise SchemaMismatch(f"{url}: cannot be decoded: {error}", remedy="write the file again") from error


def _steps(root: Section) -> tuple[Step, ...]:
    steps = tuple(_step(each) for each in _tables(root, "step", 'kind = "tune"'))
    kinds = [step.kind for step in steps]
    for number, kind in enumerate(kinds):
        if "experts" in kinds[:number] and kind in ("prune", "experts"):
            raise SpecError(
                f'{root.file}: [[step]] {number + 1}, "{kind}", cannot be done to a model in experts',
                remedy='put [[step]] kind = "experts" behind it',
            )
    return steps


def _step(section: Section) -> Step:
    kind = section.one_of("kind", tuple(OPTIONS))
    section = replace(section, keys={**section.keys, "step": ("kind", *OPTIONS[kind])})
    section.check_keys()
    step = Step(kind=kind, options={key: _option(section, key, default) for key, default in OPTIONS[kind].items()})
    try:
        for options in step.is_told():
            step.only(options)
    except SpecError as error:
        raise SpecError(f"{section.where()}: {error.message}", remedy=error.remedy) from None
    return step


def _option(section: Section, key: str, default: Value) -> Value:
    if isinstance(default, str):
        return section.one_of(key, _CHOICES[key], default)
    if isinstance(default, int):
        return section.integer(key, default, least=0)
    value = section.real(key, default)
    if not 0 <= value < 1e9:
        raise section.wrong(key, "a number from 0 on")
    return value
