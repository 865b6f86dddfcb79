"""Tickets and labels of a recipe, as prompts that a model learns from: the very prompts that a run would render.

A batch is of one set and one task. Its instructions may list other labels than the batch before, in another order, so
that a student learns to read them. Which rows and labels batch `step` has depends on the seed and the step alone, so
training that was interrupted goes on as if it had not been.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from jobs.compress_recipe import DataSet, DataTask, Recipe, read_columns_of
from jobs.evaluate import true_labels
from k2model.compress.examples import Batch, Example
from k2model.tokenizer import Tokenizer
from pipelines import storage
from pipelines.annotate import row_texts
from pipelines.prompts import Prompts
from schemas.errors import RowError, SchemaMismatch
from schemas.runs import Task, digest

WATCHED = 0.05
"""Share of the rows to learn from that watch a training."""


@dataclass(frozen=True, slots=True)
class Row:
    """A ticket, and the places of its labels among the task's; None where nobody said."""

    text: str
    truth: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One task of one set: rows to learn from, and rows held back."""

    name: str
    """`set/task`."""
    data: DataTask
    weight: float
    rows: tuple[Row, ...]
    watched: tuple[Row, ...]
    """Of the rows to learn from, those that say instead when a training is at its best: what is reported must not."""
    held_back: tuple[Row, ...]
    """Each with a truth. No text is in two of these three."""
    left_out: dict[str, int]
    """Reason to rows that were not used."""

    @property
    def task(self) -> Task:
        """The task, with all its labels."""
        return self.data.task


def read_questions(recipe: Recipe) -> list[Question]:
    """Return every task of every set, with its rows. Raises: SchemaMismatch, naming file and row; SpecError.

    Behind them come those that are learned in other words, too, to be judged by rows held back in such words.
    """
    found = [_question(recipe, each, data) for each in recipe.data for data in each.tasks]
    return [*found, *(_in_words_to_judge(each) for each in found if each.data.renamed and each.held_back)]


def _in_words_to_judge(question: Question) -> Question:
    draw = random.Random(f"{question.name} in other words")  # without the seed, as all that judges
    asked, rows = question.task, list(question.held_back)
    for _ in range(20):  # some labels are spelled one way only
        asked, rows = in_other_words(question.data, question.task, question.held_back, draw)
        if asked.labels.keys() != question.task.labels.keys():
            break
    return replace(
        question,
        name=f"{question.name}, in other words",
        data=replace(question.data, task=asked, renamed=0.0, names=(), also={}),
        rows=(),
        watched=(),
        held_back=tuple(rows),
        left_out={},
    )


def _question(recipe: Recipe, dataset: DataSet, data: DataTask) -> Question:
    name, left_out = f"{dataset.name}/{data.task.name}", Counter[str]()
    rows = list(_read(dataset.urls, dataset, data, left_out))
    draw = random.Random(name)  # without the seed: those of other seeds are judged by the same rows
    if dataset.validation:
        held_back = list(_read(dataset.validation, dataset, data, left_out))
        judged = {row.text for row in held_back}
        learned = [row for row in rows if row.text not in judged]
        left_out["held back, too"] = len(rows) - len(learned)
    else:
        held_back, learned = _split(rows, dataset.held_back, draw)
    watched, learned = _split(learned, WATCHED, draw)
    held_back = [row for row in held_back if row.truth is not None]
    if dataset.urls and not learned:
        raise SchemaMismatch(f"{name}: no row is left to learn from", remedy="give more [[data]] urls")
    return Question(
        name=name,
        data=data,
        weight=dataset.weight / len(dataset.tasks),
        rows=_some(learned, dataset.rows, draw),
        watched=_some(watched, recipe.watched_rows, draw),
        held_back=_some(held_back, recipe.validation_rows, draw),
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _split(rows: Sequence[Row], share: float, draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Return the rows of `share` of the labelled texts, and the others. A text that occurs twice is on one side."""
    texts = list(dict.fromkeys(row.text for row in rows if row.truth is not None))
    chosen = set(draw.sample(texts, max(1, round(len(texts) * share))) if texts else ())
    return [row for row in rows if row.text in chosen], [row for row in rows if row.text not in chosen]


def _some(rows: Sequence[Row], most: int, draw: random.Random) -> tuple[Row, ...]:
    return tuple(draw.sample(rows, most) if most and len(rows) > most else rows)


def _read(urls: Iterable[str], dataset: DataSet, data: DataTask, left_out: Counter[str]) -> Iterable[Row]:
    """Yield the rows of files that have a text, counting those that have none."""
    places = {label: place for place, label in enumerate(data.task.labels)}
    for url in (each for pattern in urls for each in storage.find(pattern)):
        table = read_columns_of(url, [data.truth] if data.truth else [], dataset.columns)
        truths = true_labels(table[data.truth], url) if data.truth else [None] * table.num_rows
        for number, (text, labels) in enumerate(zip(row_texts(table, dataset.columns), truths, strict=True)):
            if isinstance(text, RowError):
                left_out[text.code] += 1
                continue
            if labels is not None and not _is_answer(labels, places, data.task):
                raise SchemaMismatch(
                    f'{url} row {number}: column "{data.truth}" has {labels}, which task "{data.task.name}" does not '
                    "know",
                    remedy=f"known: {', '.join(places)}"[:500],
                )
            yield Row(text, None if labels is None else tuple(places[label] for label in labels))


def _is_answer(labels: Sequence[str], places: dict[str, int], task: Task) -> bool:
    return all(label in places for label in labels) and (len(labels) == 1 or task.kind == "choose_many")


class Batches:
    """Batches of all questions for one tokenizer: what the steps that train are given (`TrainingData`)."""

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        *,
        seed: int,
        batch_rows: int,
        max_prompt_tokens: int,
        is_labelled: bool,
    ) -> None:
        """Find out which rows fit.

        Args:
            questions: what is learned.
            tokenizer: of the model that learns; the ids of a batch are its.
            seed: decides which rows and labels a batch has.
            batch_rows: rows of a batch at most.
            max_prompt_tokens: rows whose prompt is longer, all labels listed, are left out.
            is_labelled: whether rows without a label are, too.

        Raises: SchemaMismatch if no row is left; SpecError if the instructions alone are too long.
        """
        self._tokenizer = tokenizer
        self._seed = seed
        self._batch_rows = batch_rows
        self._max_prompt_tokens = max_prompt_tokens
        self._is_labelled = is_labelled
        self._questions = [each for each in map(self._fitting, questions) if each is not None]
        if not self._questions:
            raise SchemaMismatch(
                f"no row{' with a label' if is_labelled else ''} has a prompt of {max_prompt_tokens} tokens at most",
                remedy="raise [compress] max_prompt_tokens, or give more [[data]]",
            )
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._rows_of: dict[str, dict[int, list[Row]]] = {}

    @cached_property
    def digest(self) -> str:
        """What names the rows, the prompts, the batch sizes and the seed."""
        prompts = [self._batch(each, 0).examples[0].prompt_ids for each in self._questions]
        rows = [asdict(each) for each in self._questions]
        return digest([rows, prompts, self._seed, self._batch_rows, self._max_prompt_tokens])

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch `number`: of every question as many rows as it has, times its weight."""
        counts = [max(1, round(len(each.rows) * each.weight / self._batch_rows)) for each in self._questions]
        order = [(index, number * count + k) for index, count in enumerate(counts) for k in range(count)]
        random.Random(f"{self._seed} epoch {number}").shuffle(order)
        for index, place in order:
            yield self._batch(self._questions[index], place)

    def validation(self) -> list[Batch]:
        """Return the rows that watch, all labels listed in the task's order, as a run lists them."""
        found = []
        for question in self._questions:
            prompts = self._prompts(question.task)
            for start in range(0, len(question.watched), self._batch_rows):
                found.append(_batch(prompts, question.task, question.watched[start : start + self._batch_rows]))
        return found

    def _batch(self, question: Question, place: int) -> Batch:
        """Return batch `place` of a question. Its rows come in an order that is drawn anew when all were had."""
        draw = random.Random(f"{self._seed} {question.name} {place}")
        total, size = len(question.rows), min(self._batch_rows, len(question.rows))
        if draw.random() < question.data.few_labels:
            rows = self._of_few_labels(question, size, draw)
        else:
            rows = [
                question.rows[self._order(question, at // total)[at % total]]
                for at in range(place * size, (place + 1) * size)
            ]
        rows = [_without_some_words(row, question.data.word_dropout, draw) for row in rows]
        task = question.task
        if task.kind == "choose":
            task, rows = _sampled(question, rows, draw)
        if question.data.renamed and draw.random() < question.data.renamed:
            task, rows = in_other_words(question.data, task, rows, draw)
        # Without a limit: all rows fit it with the task as it is, and other words may be a little longer.
        prompts = Prompts([task], self._tokenizer, sys.maxsize)
        most = question.data.label_sample if task.kind == "choose_many" else 0
        return replace(_batch(prompts, task, rows, most, draw), is_taught=question.data.taught)

    def _of_few_labels(self, question: Question, size: int, draw: random.Random) -> list[Row]:
        """Return up to `size` rows of 2 to `label_sample` labels, whichever are drawn of those that have rows."""
        if question.name not in self._rows_of:
            rows_of: dict[int, list[Row]] = {}
            for row in question.rows:
                for label in row.truth or ():
                    rows_of.setdefault(label, []).append(row)
            self._rows_of[question.name] = rows_of
        rows_of = self._rows_of[question.name]
        most = min(question.data.label_sample, len(rows_of))
        chosen = draw.sample(sorted(rows_of), draw.randint(min(2, most), most))
        rows = [row for label in chosen for row in rows_of[label]]
        return draw.sample(rows, min(size, len(rows)))

    def _order(self, question: Question, time: int) -> list[int]:
        """Return the order in which the rows are had for the `time`-th time; the last one is kept."""
        if self._orders.get(question.name, (-1, []))[0] != time:
            order = list(range(len(question.rows)))
            random.Random(f"{self._seed} {question.name} order {time}").shuffle(order)
            self._orders[question.name] = time, order
        return self._orders[question.name][1]

    def _prompts(self, task: Task) -> Prompts:
        return Prompts([task], self._tokenizer, self._max_prompt_tokens)

    def _fitting(self, question: Question) -> Question | None:
        """Return the question with the rows that can be learned from; None if there are none."""
        prompts = self._prompts(question.task)
        is_labelled = self._is_labelled or not question.data.taught
        rows, watched = (self._usable(side, prompts, is_labelled) for side in (question.rows, question.watched))
        if not rows:
            return None
        return replace(question, rows=rows, watched=watched, held_back=())

    def _usable(self, rows: Sequence[Row], prompts: Prompts, is_labelled: bool) -> tuple[Row, ...]:
        """Return the rows whose prompts fit, and that have a label if they must."""
        rows = [row for row in rows if row.truth is not None or not is_labelled]
        asked = prompts.requests_of([row.text for row in rows])
        return tuple(row for row, requests in zip(rows, asked, strict=True) if not isinstance(requests, RowError))


def in_other_words(data: DataTask, task: Task, rows: Sequence[Row], draw: random.Random) -> tuple[Task, list[Row]]:
    """Return `task`, `data.task` or one with some of its labels, called by other words, and the rows likewise.

    All labels are spelled in one way. Labels that come to be called alike become one, if another is left beside it;
    what they mean is told every other time.
    """
    count = max(map(len, data.also.values()), default=0)
    number, spell, is_told = draw.randint(0, count), draw.choice(_SPELLINGS), draw.random() < 0.5
    spelled = []
    for label in task.labels:
        words = (label, *data.also.get(label, ()))
        chosen = words[number % len(words)]
        spelled.append(spell(chosen) or chosen)
    place_of = {label: place for place, label in enumerate(dict.fromkeys(spelled))}
    if len(place_of) < 2:
        return task, list(rows)
    meanings: dict[str, dict[str, None]] = {label: {} for label in place_of}
    for label, meaning in zip(spelled, task.labels.values(), strict=True):
        if meaning and is_told:
            meanings[label][meaning] = None
    labels = {label: "; or ".join(meaning) for label, meaning in meanings.items()}
    name = draw.choice((task.name, *data.names))
    renamed = [
        row if row.truth is None else replace(row, truth=tuple(sorted({place_of[spelled[old]] for old in row.truth})))
        for row in rows
    ]
    return replace(task, name=name, labels=labels), renamed


def _words(label: str) -> list[str]:
    """Return the words of a label as people write them: `card_arrival`, `CardArrival` or `card arrival`."""
    parted = ""
    for before, char, behind in zip(f" {label}", label, f"{label[1:]} ", strict=False):
        begins = char.isupper() and (before.islower() or (before.isupper() and behind.islower()))
        parted += f" {char}" if begins else char
    return re.findall(r"[^\W\d_](?:[^\W\d_]|')*|\d+", parted)


# Empty for a label without letters and digits.
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda label: label,
    lambda label: " ".join(_words(label)).lower(),
    lambda label: "_".join(_words(label)).lower(),
    lambda label: "-".join(_words(label)).lower(),
    lambda label: " ".join(_words(label)).capitalize(),
    lambda label: " ".join(word.capitalize() for word in _words(label)),
    lambda label: "".join(word.capitalize() for word in _words(label)),
)


def _without_some_words(row: Row, share: float, draw: random.Random) -> Row:
    """Return `row` without about `share` of the words of its text, but not without all."""
    if not share:
        return row
    text = "".join(word for word in re.findall(r"\S+\s*", row.text) if draw.random() >= share)
    return replace(row, text=text) if text else row


def _sampled(question: Question, rows: Sequence[Row], draw: random.Random) -> tuple[Task, list[Row]]:
    """Return the task with some of its labels in a random order, those of `rows` among them, and the rows likewise."""
    most, labels = question.data.label_sample, list(question.task.labels.items())
    if not most:
        return question.task, list(rows)
    needed = sorted({place for row in rows for place in row.truth or ()})
    others = [place for place in range(len(labels)) if place not in needed]
    fewest = max(2, len(needed))
    count = draw.randint(fewest, max(fewest, min(most, len(labels))))
    chosen = needed + draw.sample(others, count - len(needed))
    draw.shuffle(chosen)
    new = {place: number for number, place in enumerate(chosen)}
    truths = [None if row.truth is None else tuple(new[place] for place in row.truth) for row in rows]
    task = replace(question.task, labels=dict(labels[place] for place in chosen))
    return task, [replace(row, truth=truth) for row, truth in zip(rows, truths, strict=True)]


def _batch(
    prompts: Prompts, task: Task, rows: Sequence[Row], most: int = 0, draw: random.Random | None = None
) -> Batch:
    """Return `rows` as examples: which label, or, for `choose_many`, whether or not each of all labels or of `most`."""
    is_many, count = task.kind == "choose_many", len(task.labels)
    examples = []
    for row, asked in zip(rows, prompts.requests_of([row.text for row in rows]), strict=True):
        assert not isinstance(asked, RowError)  # its prompt fits with all labels listed
        (request,) = asked
        truths = row.truth
        if truths is not None and is_many:
            others = [label for label in range(count) if label not in truths]
            if most and draw is not None:
                others = draw.sample(others, min(len(others), max(0, most - len(truths))))
            truths = tuple(2 * label + (label not in truths) for label in sorted([*truths, *others]))
        examples.append(
            Example(request.prompt_ids, request.num_prefix_tokens, request.candidates, truths, count if is_many else 1)
        )
    return Batch(tuple(examples))
