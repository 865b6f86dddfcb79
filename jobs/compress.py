"""Makes a smaller model by a recipe: step after step, each from the folder of the one before to a folder of its own.

A step that is done is never done again; one that was interrupted goes on from what it kept. The JSON file beside its
folder says of what it is made, that it is done, and what it is worth on rows held back.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from types import FrameType
from typing import Any

from jobs.compress_data import Batches, Question, read_questions
from jobs.compress_measure import flops_saved, measure, speed
from jobs.compress_recipe import Recipe
from jobs.compress_report import write_report
from k2model.compress.distill import Mix, distill
from k2model.compress.experts import Cut, cut_experts
from k2model.compress.prune import Pruning, prune
from k2model.compress.quantize_aware import quantize_aware
from k2model.compress.recipe import convert_into, open_tokenizer
from k2model.compress.train import TrainingOptions, tune
from k2model.compress.vocabulary import Trim, trim_vocabulary
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from kernels.threads import in_thread_that_ends
from schemas.errors import SpecError
from schemas.runs import digest

Say = Callable[[str], None]

_TEACHER = "teacher.json"
"""What the teacher is worth, beside the steps."""

_PRUNED_BATCH_ROWS = 4
"""Of importance: gradients are summed within a batch, where they may cancel."""

_SAY_EVERY_S = 10.0

_SHRINKING = ("prune", "experts", "distill", "quantize")
"""What is retained is of the checkpoint before the first of these: a teacher that was tuned first, if one was."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; what was done is kept."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A recipe being followed."""

    recipe: Recipe
    questions: Sequence[Question]
    say: Say

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output)

    def target(self, number: int) -> Path:
        """Return the folder of step `number`, from 0."""
        return self.folder / f"{number + 1:02d}-{self.recipe.steps[number].kind}"

    def checkpoint(self, number: int) -> str:
        """Return the checkpoint that step `number` leaves; the teacher for -1."""
        return str(self.target(number)) if number >= 0 else self.recipe.teacher

    def source(self, number: int) -> str:
        """Return the checkpoint that step `number` begins from."""
        return self.recipe.student or self.recipe.teacher if number == 0 else self.checkpoint(number - 1)

    def reference(self) -> int:
        """Return the step whose checkpoint the later ones are to equal; -1 for the teacher.

        Steps that begin from a student of their own are its, not the teacher's.
        """
        if self.recipe.student:
            return -1
        kinds = [step.kind for step in self.recipe.steps]
        return next((number for number, kind in enumerate(kinds) if kind in _SHRINKING), 0) - 1

    def measured(self, number: int) -> dict[str, Any]:
        """Return what a checkpoint is worth."""
        recipe, name = self.recipe, self.checkpoint(number)
        self.say(f"  measuring {name}")
        found = measure(name, self.questions, recipe.max_prompt_tokens)
        if recipe.speed_rows:
            found |= speed(name, recipe.teacher, self.questions, recipe.speed_rows, recipe.max_prompt_tokens)
        return found


def compress(recipe: Recipe, say: Say = lambda line: None) -> tuple[dict[str, Any], bool]:
    """Follow `recipe` from where it was left; return the report, and whether every step is done.

    Raises: SpecError, also if the output holds a step of another recipe; SchemaMismatch; CheckpointError.
    """
    questions = read_questions(recipe)
    for question in questions:
        left_out = "".join(f", {count:,} left out ({reason})" for reason, count in question.left_out.items())
        say(f"{question.name}: {len(question.rows):,} rows, {len(question.held_back):,} held back{left_out}")
    with _listening(say) as check:
        first = _followed(_Run(recipe, questions, say), check)
        found = [first]
        for seed in range(recipe.seed + 1, recipe.seed + recipe.seeds):
            if found[-1]["done"]:
                say(f"seed {seed}")
                output = Path(recipe.output) / f"seed-{seed}"
                again = _Run(replace(recipe, seed=seed, output=str(output)), questions, say)
                output.mkdir(exist_ok=True)
                shutil.copyfile(Path(recipe.output) / _TEACHER, output / _TEACHER)
                found.append(_followed(again, check))
    first["done"] = all(facts["done"] for facts in found)
    if recipe.seeds > 1:
        _add_spread(first, found)
        write_report(Path(recipe.output), first)
    return first, first["done"]


def _followed(run: _Run, check: Callable[[], None]) -> dict[str, Any]:
    """Follow a recipe with one seed as far as it is not yet, and write its report; return what that says."""
    run.folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "teacher": run.recipe.teacher,
        "reference": run.checkpoint(run.reference()),
        "seed": run.recipe.seed,
        "seeds": 1,
        "questions": {e.name: {"rows": len(e.rows), "held_back": len(e.held_back)} for e in run.questions},
        "steps": [],
        "done": False,
        "report": str(run.folder / "report.html"),
    }
    with suppress(Stopped):
        for line in _lines(run, check):
            facts["steps"].append(line)
        facts["done"] = True
    _compare(facts, run.reference() + 1)
    write_report(run.folder, facts)
    return facts


def _add_spread(first: dict[str, Any], found: Sequence[dict[str, Any]]) -> None:
    """Add, to the lines of the first seed's report, mean and standard deviation over the seeds that are done."""
    done = [facts for facts in found if facts["done"]]
    first["seeds"] = len(done)
    for index, line in enumerate(first["steps"] if len(done) > 1 else ()):
        averages = [facts["steps"][index]["macro_average"] for facts in done]
        line["over_seeds"] = {
            name: {"mean": round(mean(values), 4), "deviation": round(stdev(values), 4)}
            for name in ("accuracy", "macro_f1")
            if None not in (values := [each[name] for each in averages])
        }


def _lines(run: _Run, check: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Yield the teacher's line of the report, then that of each step, done now or before."""
    recipe = run.recipe
    made_of = digest([fingerprint(recipe.teacher, "fp32"), [asdict(each) for each in run.questions]])
    shown = digest([made_of, recipe.speed_rows, recipe.max_prompt_tokens])
    kept = _read(run.folder / _TEACHER)
    if kept.get("made_of") != shown:
        kept = {"made_of": shown, "measures": run.measured(-1)}
        _write(run.folder / _TEACHER, kept)
    yield {"name": "teacher", "kind": "teacher", "checkpoint": recipe.teacher, **kept["measures"]}
    if recipe.student:
        made_of = digest([made_of, fingerprint(recipe.student, "fp32")])
    for number, step in enumerate(recipe.steps):
        check()
        made_of = digest([made_of, asdict(step), recipe.seed, recipe.max_prompt_tokens])
        target = run.target(number)
        kept = _done(run, number, made_of, check)
        line = {"name": target.name, "kind": step.kind, "options": step.options, "checkpoint": str(target)}
        yield line | {"facts": kept["facts"], **kept["measures"]}


def _done(run: _Run, number: int, made_of: str, check: Callable[[], None]) -> dict[str, Any]:
    """Do what is left of step `number`; return what its note then says."""
    target = run.target(number)
    note = target.with_name(f"{target.name}.json")  # not inside: the files of a checkpoint are its fingerprint
    kept = _read(note)
    if kept.get("made_of", made_of) != made_of or (target.exists() and not kept):
        raise SpecError(
            f"{target} was made of other data, options, steps before it, or another teacher or student",
            remedy="give another [compress] output, or remove that folder, the file beside it and those after it",
        )
    if not kept:
        kept = {"made_of": made_of}
        _write(note, kept)
    if "facts" not in kept:
        run.say(f"{target.name}: from {run.source(number)}")
        target.mkdir(exist_ok=True)
        # A kill between a step's last byte and its note leaves a checkpoint that is whole: config.json is its last, or
        # what it goes on from is there. A conversion, whose config.json is its first, finds by itself what is left.
        is_begun = (target / "checkpoint").exists() or (target / "k2batch.json").exists()
        is_whole = (target / "config.json").exists() and not is_begun
        progress = _Progress(f"  {target.name}", run.say, check)
        kept["facts"] = {} if is_whole else in_thread_that_ends(_do, run, number, progress)
        _write(note, kept)
    if "measures" not in kept:
        kept["measures"] = run.measured(number)
        _write(note, kept)
    run.say(f"{target.name}: done")
    return kept


def _do(run: _Run, number: int, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Do step `number`; return the facts of it."""
    step, source, target = run.recipe.steps[number], run.source(number), run.target(number)
    if step.kind == "prune":
        return prune(source, target, _batches(run, source, _PRUNED_BATCH_ROWS), step.only(Pruning), progress)
    if step.kind == "experts":
        return cut_experts(source, target, _batches(run, source), step.only(Cut), progress)
    if step.kind == "vocabulary":
        return trim_vocabulary(source, target, _batches(run, source), step.only(Trim), progress)
    if not step.options["steps"]:  # nothing is trained
        convert_into(source, target, embedding=step.options["embedding"], say=lambda line: run.say(f"  {line}"))
        return {}
    options = step.only(TrainingOptions)
    asked = _all_taught(run) if step.kind == "quantize" else run  # by itself, which knows all of them
    data = _batches(asked, source, step.options["batch_rows"], is_labelled=step.kind == "tune")
    if step.kind == "tune":
        return tune(source, target, data, options, progress)
    mix = step.only(Mix)
    if step.kind == "distill":
        teacher = run.checkpoint(run.reference())
        return distill(source, target, data, options, progress, teacher=teacher, mix=mix)
    embedding = step.options["embedding"]
    return quantize_aware(source, target, data, options, progress, teacher=source, mix=mix, embedding=embedding)


def _all_taught(run: _Run) -> _Run:
    return replace(run, questions=[replace(each, data=replace(each.data, taught=True)) for each in run.questions])


def _batches(run: _Run, source: str, batch_rows: int = 16, *, is_labelled: bool = False) -> Batches:
    return Batches(
        run.questions,
        open_tokenizer(open_checkpoint(source)),
        seed=run.recipe.seed,
        batch_rows=batch_rows,
        max_prompt_tokens=run.recipe.max_prompt_tokens,
        is_labelled=is_labelled,
    )


def _compare(facts: dict[str, Any], reference: int) -> None:
    """Add what each step saves and retains, to the lines of the report; averages are over what was learned."""
    lines = facts["steps"]
    learned = {name for name, question in facts["questions"].items() if question["rows"]}
    for line in lines:
        quality = [each for name, each in line["quality"].items() if name in learned]
        line["macro_average"] = {
            name: round(sum(each[name] for each in quality) / len(quality), 4) if quality else None
            for name in ("accuracy", "macro_f1")
        }
        line["bytes_saved"] = round(1 - line["bytes"] / line["bytes_float32"], 4)
        line["flops_saved"] = flops_saved(lines[0]["flops_per_token"], line["flops_per_token"])
    for line in lines[reference:] if reference < len(lines) else ():
        teacher = lines[reference]["macro_average"]
        line["retention"] = {
            name: round(value / teacher[name], 4) if value is not None and teacher[name] else None
            for name, value in line["macro_average"].items()
        }


class _Progress:
    """Says how far a step is: every while, and whenever something was validated."""

    def __init__(self, name: str, say: Say, check: Callable[[], None]) -> None:
        self._name, self._say, self._check = name, say, check
        self._said = 0.0

    def __call__(self, line: dict[str, Any]) -> None:
        """Say it. Raises: Stopped."""
        if time.monotonic() - self._said > _SAY_EVERY_S or any(key.startswith("validation") for key in line):
            self._said = time.monotonic()
            values = (
                f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in line.items()
            )
            self._say(f"{self._name}: {', '.join(values)}")
        self._check()


@contextmanager
def _listening(say: Say) -> Iterator[Callable[[], None]]:
    """Yield what raises Stopped once Ctrl-C or SIGTERM came; a second one leaves at once, as they do elsewhere."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        restore()
        say("stopping once the step under way can be gone on from; once more: leave at once")

    def check() -> None:
        if asked:
            raise Stopped

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may set these
        before = {}
    try:
        yield check
    finally:
        restore()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)
