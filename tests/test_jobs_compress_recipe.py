"""Recipes are read strictly: what is misspelled, impossible or without data is told before anything is computed."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.compress_recipe import OPTIONS, Recipe, load_recipe
from k2model.compress.train import TrainingOptions
from schemas.errors import K2Error, SchemaMismatch, SpecError
from tests.fakes import write_tickets

RECIPE = """
[compress]
output = "out/"

[[data]]
name = "bank"
urls = ["train.parquet"]
columns = { id = "id", text = ["text"] }

[[data.task]]
name = "intent"
kind = "choose"
truth = "label"
labels = ["a", "b"]

[[step]]
kind = "tune"
steps = 3
"""
ROOT = Path(__file__).parents[1]
LABELLED = pa.table({"id": ["1", "2", "3"], "text": ["x", "y", "z"], "label": ["b", None, "a"]})


def load(tmp_path: Path, *changes: tuple[str, str], **options: Any) -> Recipe:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "recipe.toml").write_text(text)
    return load_recipe(str(tmp_path / "recipe.toml"), **options)


def test_other_words_for_labels_are_read(tmp_path: Path) -> None:
    words = 'labels = ["a", "b"]\nrenamed = 0.5\nnames = ["queue"]\nalso = { a = ["x", "y"], b = "z" }'
    (task,) = load(tmp_path, ('labels = ["a", "b"]', words)).data[0].tasks
    assert (task.renamed, task.names, task.also) == (0.5, ("queue",), {"a": ("x", "y"), "b": ("z",)})
    (tmp_path / "words.toml").write_text('a = ["x", "y"]\nb = "z"\n')
    words = words.replace('{ a = ["x", "y"], b = "z" }', '"words.toml"')
    assert load(tmp_path, ('labels = ["a", "b"]', words)).data[0].tasks[0] == task
    (tmp_path / "words.toml").write_text('c = ["x"]\n')
    with pytest.raises(SpecError, match=r'words.toml: .*"c" is no label of task'):
        load(tmp_path, ('labels = ["a", "b"]', words))


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert (recipe.teacher, recipe.seed) == ("smollm2-135m-instruct", 0)
    assert [step.kind for step in recipe.steps] == ["tune"]
    assert recipe.steps[0].only(TrainingOptions) == TrainingOptions(steps=3)
    assert recipe.data[0].tasks[0].task.labels == {"a": "", "b": ""}


def test_the_command_line_wins(tmp_path: Path) -> None:
    assert load(tmp_path, overrides={"output": "there/", "teacher": "m"}).output == "there/"


def test_relative_urls_are_in_the_folder_of_the_data(tmp_path: Path) -> None:
    urls = ('urls = ["train.parquet"]', 'urls = ["train.parquet", "/abs/a.parquet", "s3://b/c.parquet"]')
    recipe = load(tmp_path, urls, data="s3://sets")
    assert recipe.data[0].urls == ("s3://sets/train.parquet", "/abs/a.parquet", "s3://b/c.parquet")


def test_labels_can_come_from_the_truth(tmp_path: Path) -> None:
    write_tickets(tmp_path, "train.parquet", LABELLED)
    from_truth = ('labels = ["a", "b"]', 'labels_from = "truth"')
    assert list(load(tmp_path, from_truth, data=str(tmp_path)).data[0].tasks[0].task.labels) == ["a", "b"]
    with pytest.raises(SpecError, match="needs truth, and no labels"):
        load(tmp_path, ('labels = ["a", "b"]', 'labels = ["a", "b"]\nlabels_from = "truth"'), data=str(tmp_path))
    with pytest.raises(SchemaMismatch, match='column "lable" is missing') as raised:
        load(tmp_path, from_truth, ('truth = "label"', 'truth = "lable"'), data=str(tmp_path))
    assert "label" in raised.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "message", "remedy"),
    [
        ("output =", "ouput =", 'compress] has no key "ouput"', 'did you mean "output"'),
        ('output = "out/"', "", "output is missing", "add: output"),
        ('output = "out/"', 'output = "s3://b/out"', "expected a folder of this machine", ""),
        ("[[data]]", "[[dta]]", "no section [dta]", '"data"'),
        ("[[data]]", "[data]", "[data] must be written [[data]]", ""),
        ('urls = ["train.parquet"]', "", "urls is missing", ""),
        ('urls = ["train.parquet"]', 'urls = ["t"]\nheld_back = 1', "held_back is 1, expected", ""),
        ('urls = ["train.parquet"]', 'urls = ["t"]\nweight = 0', "weight is 0, expected", ""),
        ("truth =", "thruth =", 'has no key "thruth"', '"truth"'),
        ('kind = "choose"', 'kind = "generate"', "expected one of: choose, choose_many", ""),
        ('labels = ["a", "b"]', 'labels = ["a"]', "expected at least 2 labels", ""),
        ('labels = ["a", "b"]', 'labels = ["a", "b"]\nlabel_sample = 1', "label_sample is 1, expected", ""),
        (
            'labels = ["a", "b"]',
            'labels = ["a", "b"]\nfew_labels = 0.5',
            "few_labels is 0.5, expected none without",
            "",
        ),
        ('labels = ["a", "b"]', 'labels = ["a", "b"]\nword_dropout = 2', "word_dropout is 2, expected", ""),
        ('labels = ["a", "b"]', 'labels = ["a", "b"]\nrenamed = 2', "renamed is 2, expected", ""),
        ('labels = ["a", "b"]', 'labels = ["a", "b"]\nalso = ["x"]', "also is ['x'], expected a table", ""),
        (
            'labels = ["a", "b"]',
            'labels = ["a", "b"]\nalso = "words.toml"',
            "expected the name of a file beside the recipe",
            "",
        ),
        ('labels = ["a", "b"]', 'labels = ["a", "b"]\nalso = { c = ["x"] }', '"c" is no label', "known: a, b"),
        ('labels = ["a", "b"]', 'labels = ["a", "b"]\nalso = { a = [""] }', "a list of strings that are not blank", ""),
        ('kind = "tune"', 'kind = "tuen"', 'kind is "tuen"', '"tune"'),
        ('kind = "tune"', 'kind = "prune"', 'has no key "steps"', ""),
        ("steps = 3", "setps = 3", 'has no key "setps"', '"steps"'),
        ("steps = 3", "steps = 0", "[[step]] number 1: steps is 0", ""),
        ("steps = 3", "steps = 3\nlearning_rate = -1", "learning_rate is -1, expected", ""),
        ("steps = 3", 'steps = 3\ndevice = "tpu"', "expected one of: cpu, cuda", ""),
        ('[[step]]\nkind = "tune"\nsteps = 3', "", "there is no [[step]]", ""),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, old: str, new: str, message: str, remedy: str) -> None:
    with pytest.raises(SpecError) as raised:
        load(tmp_path, (old, new))
    assert message in raised.value.message
    assert remedy in raised.value.remedy


def test_two_sets_need_two_names(tmp_path: Path) -> None:
    data = RECIPE[RECIPE.index("[[data]]") : RECIPE.index("[[step]]")]
    with pytest.raises(SpecError, match="two \\[\\[data\\]\\] have one name"):
        load(tmp_path, ("[[step]]", f"{data}[[step]]"))


def test_quantizing_needs_no_training(tmp_path: Path) -> None:
    assert load(tmp_path, ("tune", "quantize"), ("steps = 3", "steps = 0")).steps[0].options["steps"] == 0


def test_a_model_in_experts_is_trained_and_not_cut_again_and_that_is_told_first(tmp_path: Path) -> None:
    experts = 'kind = "experts"\n[[step]]\nkind = "vocabulary"\n[[step]]\n'
    for step in ('kind = "tune"', 'kind = "distill"', 'kind = "quantize"'):
        assert len(load(tmp_path, ('kind = "tune"\nsteps = 3', experts + step)).steps) == 3
    for step in ('kind = "prune"', 'kind = "experts"'):
        with pytest.raises(SpecError, match=r"\[\[step\]\] 3.*cannot be done to a model in experts"):
            load(tmp_path, ('kind = "tune"\nsteps = 3', experts + step))


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "jobs/recipes").glob("*.toml")))
def test_the_recipes_that_are_shipped_are_read(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    try:
        recipe = load_recipe(str(ROOT / "jobs/recipes" / name), data=str(tmp_path) if name != "tiny.toml" else "")
    except K2Error as error:
        assert "no input file matches" in error.message  # noqa: PT017 - the user's own sets, read for their labels
    else:
        assert {step.kind for step in recipe.steps} <= set(OPTIONS)
