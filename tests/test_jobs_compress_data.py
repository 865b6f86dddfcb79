"""What a student learns from: prompts of a run to the token, other labels each time, no row on two sides."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.compress_data import Batches, Question, Row, in_other_words, read_questions
from jobs.compress_recipe import DataSet, DataTask, Recipe
from k2model.compress.examples import Batch, Example
from pipelines.prompts import Prompts
from schemas.errors import SchemaMismatch
from schemas.runs import Task
from schemas.tickets import TicketColumns
from tests.fakes import fake_tokenizer, write_tickets

LABELS = ("card", "cash", "transfer", "refund", "limit", "age")
INTENT = Task(name="intent", kind="choose", labels=dict.fromkeys(LABELS, ""))
TOPICS = Task(name="topics", kind="choose_many", labels=dict.fromkeys(LABELS, ""))
TOKENIZER = fake_tokenizer()


def table(rows: int = 60) -> pa.Table:
    return pa.table(
        {
            "id": [str(i) for i in range(rows)],
            "text": [f"ticket {i} about {LABELS[i % 6]}" for i in range(rows)],
            "label": [LABELS[i % 6] for i in range(rows)],
            "labels": [[LABELS[j] for j in range(6) if (i >> j) & 1] for i in range(rows)],
        }
    )


def recipe(
    tmp_path: Path,
    task: Task = INTENT,
    *,
    label_sample: int = 0,
    truth: str = "label",
    words: dict[str, Any] | None = None,
    watched_rows: int = 500,
    validation_rows: int = 500,
    **more: Any,
) -> Recipe:
    dataset = DataSet(
        name="bank",
        urls=(str(tmp_path / "train.parquet"),),
        validation=(),
        held_back=0.2,
        columns=TicketColumns(id="id", text=("text",)),
        weight=1.0,
        rows=0,
        tasks=(DataTask(task=task, truth=truth, label_sample=label_sample, **(words or {})),),
    )
    return Recipe(
        teacher="t",
        student="",
        output="o",
        seed=0,
        seeds=1,
        max_prompt_tokens=2048,
        watched_rows=watched_rows,
        validation_rows=validation_rows,
        speed_rows=0,
        data=(replace(dataset, **more),),
        steps=(),
    )


def question(tmp_path: Path, *arguments: Any, rows: pa.Table | None = None, **options: Any) -> Question:
    write_tickets(tmp_path, "train.parquet", table() if rows is None else rows)
    found, *_ = read_questions(recipe(tmp_path, *arguments, **options))
    return found


def batches(*questions: Question, **options: Any) -> Batches:
    given = {"seed": 0, "batch_rows": 4, "max_prompt_tokens": 2048, "is_labelled": False, **options}
    return Batches(questions, TOKENIZER, **given)


def body(example: Example) -> str:
    """Return the ticket in a prompt."""
    return TOKENIZER.decode(example.prompt_ids[example.num_prefix_tokens :]).partition("\n")[0]


def answer(example: Example) -> str:
    """Return the words of the right answer."""
    assert example.truths is not None
    (truth,) = example.truths
    return TOKENIZER.decode(example.candidates[truth].token_ids)


def listed(batch: Batch) -> list[str]:
    """Return the labels that the instructions list."""
    lines = TOKENIZER.decode(batch.prefix_ids).splitlines()
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def test_what_is_not_taught_has_labels(tmp_path: Path) -> None:
    rows = table()
    unlabelled = rows.slice(0, 6).set_column(rows.schema.get_field_index("label"), "label", pa.nulls(6, pa.string()))
    both = pa.concat_tables([unlabelled, rows.slice(6)])
    for is_taught in (True, False):
        asked = question(tmp_path, rows=both)
        asked = replace(asked, data=replace(asked.data, taught=is_taught))
        found = list(batches(asked).epoch(0))
        assert {batch.is_taught for batch in found} == {is_taught}
        assert any(example.truths is None for batch in found for example in batch.examples) == is_taught


def test_prompts_are_those_of_a_run_and_truths_are_theirs(tmp_path: Path) -> None:
    asked = question(tmp_path)
    truth_of = {row.text: row.truth for row in asked.rows}
    prompts = Prompts([INTENT], TOKENIZER, 2048)
    for batch in batches(asked).epoch(0):
        for example in batch.examples:
            (request,) = prompts.requests(body(example))
            assert (example.prompt_ids, example.candidates) == (request.prompt_ids, request.candidates)
            assert example.truths == truth_of[body(example)]
            assert body(example).endswith(f"about {answer(example)}")


def test_no_text_is_on_two_sides_and_every_row_is_had_each_epoch(tmp_path: Path) -> None:
    twice = pa.concat_tables([table(), table()])
    asked = question(tmp_path, rows=twice)
    sides = [{row.text for row in side} for side in (asked.rows, asked.watched, asked.held_back)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 60
    assert len(sides[2]) == 12
    for epoch in (0, 1, 7):
        had = [body(example) for batch in batches(asked).epoch(epoch) for example in batch.examples]
        assert sorted(had) == sorted(row.text for row in asked.rows)
    assert {body(e) for batch in batches(asked).validation() for e in batch.examples} == sides[1]


def test_those_that_watch_and_those_that_judge_are_limited_each(tmp_path: Path) -> None:
    many = table(200)
    asked = question(tmp_path, rows=many, watched_rows=3, validation_rows=7)
    assert (len(asked.watched), len(asked.held_back)) == (3, 7)
    asked = question(tmp_path, rows=many, watched_rows=0, validation_rows=0)
    assert (len(asked.watched), len(asked.held_back)) == (8, 40)


def test_files_of_their_own_judge_and_what_is_in_both_is_not_learned(tmp_path: Path) -> None:
    write_tickets(tmp_path, "validation.parquet", table(20))
    asked = question(tmp_path, validation=(str(tmp_path / "validation.parquet"),))
    assert len(asked.held_back) == 20
    assert asked.left_out == {"held back, too": 20}
    assert len(asked.rows) + len(asked.watched) == 40


def test_a_sample_of_labels_holds_the_truths_in_an_order_of_its_own(tmp_path: Path) -> None:
    asked = question(tmp_path, label_sample=5)
    lists, firsts = [], []
    for batch in batches(asked, batch_rows=2).epoch(0):
        labels = listed(batch)
        lists.append(tuple(labels))
        firsts.append(labels[0] in {answer(example) for example in batch.examples})
        assert 2 <= len(labels) == len(set(labels)) <= 5
        assert len(batch.examples[0].candidates) == len(labels)
        for example in batch.examples:
            assert body(example).endswith(f"about {answer(example)}")
            assert answer(example) in labels
    assert len(set(lists)) > len(lists) / 2
    assert not all(firsts)  # the place must not tell
    assert {len(labels) for labels in lists} > {2}
    assert all(tuple(listed(batch)) == LABELS for batch in batches(asked).validation())


def test_batches_of_few_labels_have_rows_of_those_alone(tmp_path: Path) -> None:
    asked = question(tmp_path, label_sample=3, words={"few_labels": 1.0})
    truth_of = {row.text: LABELS[row.truth[0]] for row in asked.rows if row.truth}
    found = [batch for number in range(4) for batch in batches(asked, batch_rows=8).epoch(number)]
    assert {len(listed(batch)) for batch in found} == {2, 3}
    for batch in found:
        assert len(batch.examples) == len({body(example) for example in batch.examples}) == 8
        assert all(truth_of[body(example)] == answer(example) for example in batch.examples)
    assert {answer(example) for batch in found for example in batch.examples} == set(LABELS)
    half = replace(asked, data=replace(asked.data, few_labels=0.5))
    counts = [len(listed(batch)) for number in range(4) for batch in batches(half, batch_rows=8).epoch(number)]
    assert min(counts) < 4 <= max(counts)  # 8 rows as they come are of 4 labels and more


def test_a_share_of_the_words_is_left_out_of_what_is_learned_and_of_nothing_else(tmp_path: Path) -> None:
    text = [f"ticket {i}   about\tthe {LABELS[i % 6]}, please" for i in range(60)]
    rows = table().set_column(1, "text", pa.array(text))
    asked = question(tmp_path, rows=rows, words={"word_dropout": 0.3})
    found = [body(example) for batch in batches(asked, batch_rows=60).epoch(0) for example in batch.examples]
    counts = [len(each.split()) for each in found]
    assert len(found) == len(asked.rows)
    assert min(counts) >= 1
    assert max(counts) <= 6
    assert 0.6 * 6 < sum(counts) / len(counts) < 0.8 * 6
    assert [*batches(asked).epoch(0)] == [*batches(asked).epoch(0)] != [*batches(asked).epoch(1)]
    assert {row.text for row in (*asked.rows, *asked.watched, *asked.held_back)} == set(text)
    every = replace(asked, data=replace(asked.data, word_dropout=1.0))
    assert {body(example) for batch in batches(every).epoch(0) for example in batch.examples} <= set(text)


ALSO = {"card": ("plastic",), "cash": ("notes", "money"), "transfer": ("sending", "money")}
"""Cash and transfers are one in the last words."""


@pytest.mark.parametrize(("task", "truth"), [(INTENT, "label"), (TOPICS, "labels")])
def test_other_words_mean_what_the_labels_did(task: Task, truth: str, tmp_path: Path) -> None:
    words = {"renamed": 0.5, "names": ("queue",), "also": ALSO}
    asked = question(tmp_path, task, truth=truth, label_sample=0, words=words)
    means = {word.lower(): label for label, also in ALSO.items() for word in also if word != "money"}
    means |= {label: label for label in LABELS}
    truth_of = {row.text: {LABELS[place] for place in row.truth or ()} for row in asked.rows}
    names, counts, spelled = set(), set(), set()
    for batch in (batch for number in range(6) for batch in batches(asked).epoch(number)):
        shown = TOKENIZER.decode(batch.prefix_ids)
        names.add("queue: " in shown)
        labels = listed(batch)
        counts.add(len(labels))
        assert len(set(labels)) == len(labels)
        for example in batch.examples:
            said = [TOKENIZER.decode(example.candidates[place].token_ids) for place in example.truths or ()]
            if task.kind == "choose_many":
                assert len(said) == len(labels)
                said = [line.removesuffix(": yes") for line in said if line.endswith(": yes")]
            spelled |= set(said)
            wanted = truth_of[body(example)]
            plain = {means.get(word.lower(), word.lower()) for word in said}
            assert plain - {"money"} == wanted - ({"cash", "transfer"} if "money" in plain else set())
            assert ("money" in plain) <= bool(wanted & {"cash", "transfer"})
            assert set(said) <= set(labels)
    assert names == {False, True}
    assert counts == {5, 6}  # two became one
    assert {"card", "Card", "plastic", "Plastic", "notes"} <= spelled


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("AddToPlaylist", "Add To Playlist"),
        ("lost_or_stolen_card?", "lost or stolen card"),
        ("can't log-in", "can't log in"),
        ("HTMLPage", "HTML Page"),
        ("rollover_401k", "rollover 401 k"),
        ("ÜberRückgabe", "Über Rückgabe"),
        ("Rückgabe später", "Rückgabe später"),
        ("退货", "退货"),
        ("?!", ""),
    ],
)
def test_words_of_a_label_in_any_alphabet(label: str, words: str) -> None:
    task = Task(name="t", kind="choose", labels={label: "", "other": ""})
    data = DataTask(task=task, truth="label", label_sample=0)
    spelled = {next(iter(in_other_words(data, task, [], random.Random(seed))[0].labels)) for seed in range(60)}
    assert {label, words.lower() or label, words.lower().replace(" ", "_") or label} <= spelled


def test_what_is_learned_in_other_words_is_judged_in_other_words_too(tmp_path: Path) -> None:
    write_tickets(tmp_path, "train.parquet", table())
    also = {label: (f"a {label}",) for label in LABELS}
    words = {"renamed": 0.5, "also": also}
    plain, other = read_questions(recipe(tmp_path, words=words))
    assert (other.name, other.rows, other.watched) == ("bank/intent, in other words", (), ())
    assert [row.text for row in other.held_back] == [row.text for row in plain.held_back]
    assert [*other.task.labels] != list(LABELS)
    assert [label.lower()[-3:] for label in other.task.labels] == [label[-3:] for label in LABELS]
    assert [row.truth for row in other.held_back] == [row.truth for row in plain.held_back]
    assert read_questions(recipe(tmp_path, words=words))[1] == other
    assert len(list(batches(plain, other).epoch(0))) == len(list(batches(plain).epoch(0)))
    assert len(read_questions(recipe(tmp_path, words={"also": also}))) == 1


def test_labels_are_spelled_as_people_spell_them_all_in_one_way() -> None:
    task = Task(name="intent", kind="choose", labels=dict.fromkeys(("AddToPlaylist", "lost_or_stolen_card?", "w2"), ""))
    data = DataTask(task=task, truth="label", label_sample=0, renamed=1.0)
    found = {tuple(in_other_words(data, task, [], random.Random(seed))[0].labels) for seed in range(60)}
    assert found == {
        ("AddToPlaylist", "lost_or_stolen_card?", "w2"),
        ("add to playlist", "lost or stolen card", "w 2"),
        ("add_to_playlist", "lost_or_stolen_card", "w_2"),
        ("add-to-playlist", "lost-or-stolen-card", "w-2"),
        ("Add to playlist", "Lost or stolen card", "W 2"),
        ("Add To Playlist", "Lost Or Stolen Card", "W 2"),
        ("AddToPlaylist", "LostOrStolenCard", "W2"),
    }


def test_labels_that_would_all_be_one_stay_as_they_are_and_what_is_merged_means_either() -> None:
    labels = {"hate": "attacks a group", "rude": "insults", "fine": ""}
    task = Task(name="policy", kind="choose", labels=labels)
    rows = [Row("a", (0,)), Row("b", (1,)), Row("c", (2,)), Row("d", None)]
    alike = DataTask(task=task, truth="label", label_sample=0, also=dict.fromkeys(labels, ("it",)))
    merged = DataTask(task=task, truth="label", label_sample=0, also={"hate": ("bad",), "rude": ("bad",)})
    seen = set()
    for seed in range(40):
        asked, same = in_other_words(alike, task, rows, random.Random(seed))
        assert len(asked.labels) == 3
        assert same == rows
        asked, same = in_other_words(merged, task, rows, random.Random(seed))
        if len(asked.labels) == 2:
            assert [row.truth for row in same] == [(0,), (0,), (1,), None]
            seen.add(next(iter(asked.labels.values())))
    assert seen == {"", "attacks a group; or insults"}


@pytest.mark.parametrize("most", [0, 1, 4])
def test_choose_many_asks_about_every_right_label_and_some_others_yes_or_no(most: int, tmp_path: Path) -> None:
    asked = question(tmp_path, TOPICS, truth="labels", label_sample=most)
    truth_of = {row.text: row.truth for row in asked.rows}
    seen = set()
    for batch in (*batches(asked).epoch(0), *batches(asked).epoch(1)):
        for example in batch.examples:
            assert (len(example.candidates), example.num_questions) == (12, 6)
            wanted = {LABELS[place] for place in truth_of[body(example)] or ()}
            said = [TOKENIZER.decode(example.candidates[truth].token_ids) for truth in example.truths or ()]
            assert {line.partition(": ")[0] for line in said if line.endswith(": yes")} == wanted
            assert len(said) == len(set(said)) == max(most or 6, len(wanted))
            seen |= set(said)
    assert len(seen) == 12 or most == 1
    (whole, *_) = batches(asked).validation()
    assert all(len(example.truths or ()) == 6 for example in whole.examples)


def test_rows_without_a_label_are_for_distilling_alone(tmp_path: Path) -> None:
    labels = [LABELS[i % 6] if i % 2 else None for i in range(60)]
    some = table().set_column(2, "label", pa.array(labels))
    asked = question(tmp_path, rows=some)
    every, labelled = (list(batches(asked, is_labelled=flag).epoch(0)) for flag in (False, True))
    assert any(example.truths is None for batch in every for example in batch.examples)
    assert all(example.truths is not None for batch in labelled for example in batch.examples)
    assert all(row.truth is not None for row in asked.held_back)
    unlabelled = question(tmp_path, truth="")
    assert (len(unlabelled.rows), unlabelled.watched, unlabelled.held_back) == (60, (), ())
    with pytest.raises(SchemaMismatch, match="no row with a label"):
        batches(unlabelled, is_labelled=True)


def test_the_seed_and_the_epoch_decide_everything(tmp_path: Path) -> None:
    asked = question(tmp_path, label_sample=4)
    first = list(batches(asked).epoch(3))
    assert first == list(batches(asked).epoch(3))
    assert first != list(batches(asked).epoch(4))
    assert first != list(batches(asked, seed=1).epoch(3))
    assert batches(asked).digest == batches(asked).digest
    others = [
        batches(asked, seed=1),
        batches(asked, batch_rows=5),
        batches(replace(asked, rows=asked.rows[1:])),
        batches(question(tmp_path, replace(INTENT, guidelines="Be kind."), label_sample=4)),
    ]
    assert len({batches(asked).digest, *(other.digest for other in others)}) == 5


def test_a_weight_says_how_often_the_rows_are_had(tmp_path: Path) -> None:
    asked = question(tmp_path)
    had = [body(example) for batch in batches(replace(asked, weight=2.0)).epoch(0) for example in batch.examples]
    assert len(had) == 2 * len(asked.rows)
    assert all(had.count(text) == 2 for text in set(had))


def test_prompts_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    long = table().set_column(1, "text", pa.array([f"{i} {'x' * (3000 if i % 3 else 1)}" for i in range(60)]))
    asked = question(tmp_path, rows=long)
    had = [body(example) for batch in batches(asked).epoch(0) for example in batch.examples]
    assert 0 < len(had) < len(asked.rows)
    assert all(len(text) < 10 for text in had)


def test_a_label_that_the_task_does_not_have_is_told(tmp_path: Path) -> None:
    odd = table().set_column(2, "label", pa.array(["crad", *LABELS * 9, *LABELS[:5]]))
    with pytest.raises(SchemaMismatch, match="row 0: column \"label\" has \\['crad'\\]"):
        question(tmp_path, rows=odd)
    with pytest.raises(SchemaMismatch, match="missing"):
        question(tmp_path, columns=TicketColumns(id="id", text=("txt",)))


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    blank = table().set_column(1, "text", pa.array([None, " ", *(f"t{i}" for i in range(58))]))
    assert question(tmp_path, rows=blank).left_out == {"null_text": 1, "blank_text": 1}
