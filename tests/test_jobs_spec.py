"""The job file: what it says, and how it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.spec import RUNNERS, JobSpec, load_spec
from schemas.errors import SpecError
from schemas.tickets import TicketColumns

ROOT = Path(__file__).parents[1]

MINIMAL = """
[job]
name = "sweep"
[input]
urls = ["tickets/*.parquet"]
columns = { id = "ticket_id", text = ["subject?", "body"] }
[output]
url = "out/"
[[task]]
name = "policy"
kind = "choose"
labels = { "safe" = "ordinary talk", "yes" = "" }
"""


def load(tmp_path: Path, text: str, **overrides: dict[str, Any]) -> JobSpec:
    path = tmp_path / "job.toml"
    path.write_text(text, encoding="utf-8")
    return load_spec(str(path), overrides)


def refuse(tmp_path: Path, text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, text)
    assert "job.toml" in caught.value.message
    return caught.value


def test_minimal_job_has_the_documented_defaults(tmp_path: Path) -> None:
    spec = load(tmp_path, MINIMAL)
    assert spec.columns == TicketColumns(id="ticket_id", text=("subject", "body"), optional=("subject",))
    assert spec.tasks[0].labels == {"safe": "ordinary talk", "yes": ""}
    assert (spec.mode, spec.runner, spec.workers, spec.on_bad_file) == ("cpu", "local", 1, "reject")
    assert (spec.unit_rows, spec.max_prompt_tokens, spec.max_reject_rate) == (2048, 2048, 0.01)
    assert spec.checkpoint == "smollm2-135m-instruct"
    assert (spec.precision, spec.router_thresholds) == ("int8", ())


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, "the path of a file that exists"),
        ("[0.5]", "a file that k2batch sparsify wrote"),
        ("{", "a file that k2batch sparsify wrote"),
        ('{"thresholds": [0.5, 0]}', "numbers above 0, up to 1"),
        ('{"thresholds": [0.5, "1"]}', "numbers above 0, up to 1"),
        ('{"thresholds": 0.5}', "numbers above 0, up to 1"),
    ],
)
def test_thresholds_are_read_from_what_sparsify_wrote(tmp_path: Path, written: str | None, expected: str) -> None:
    path = tmp_path / "thresholds.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(SpecError, match=expected) as caught:
        load(tmp_path, MINIMAL, model={"router_thresholds": str(path)})
    assert "k2batch sparsify" in caught.value.remedy
    path.write_text('{"thresholds": [1, 0.25]}')
    assert load(tmp_path, MINIMAL, model={"router_thresholds": str(path)}).router_thresholds == (1.0, 0.25)


def test_precisions_are_four_words(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, model={"precision": "mixed"}).precision == "mixed"
    with pytest.raises(SpecError, match='precision is "fp16", expected one of: int8, mixed, bf16, fp32'):
        load(tmp_path, MINIMAL, model={"precision": "fp16"})


def test_label_order_is_the_files_order_and_a_list_of_labels_is_enough(tmp_path: Path) -> None:
    spec = load(tmp_path, MINIMAL.replace('{ "safe" = "ordinary talk", "yes" = "" }', '["zebra", "ape", "no"]'))
    assert list(spec.tasks[0].labels.items()) == [("zebra", ""), ("ape", ""), ("no", "")]


def test_overrides_win_and_may_supply_what_the_file_lacks(tmp_path: Path) -> None:
    text = MINIMAL.replace('[output]\nurl = "out/"\n', "")
    spec = load(tmp_path, text, output={"url": "s3://b/o"}, input={"urls": ["x.parquet"]}, deploy={"workers": 2})
    assert (spec.output, spec.urls, spec.workers) == ("s3://b/o", ("x.parquet",), 2)


@pytest.mark.parametrize(
    ("old", "new", "says", "remedy"),
    [
        ('url = "out/"', 'ulr = "out/"', '[output] has no key "ulr"', 'did you mean "url"?'),
        ("[output]", "[outptu]", "there is no section [outptu]", 'did you mean "output"?'),
        ("[job]", "[limits]\nmax_rejects = 4\n[job]", '[limits] has no key "max_rejects"', "max_reject_rate"),
        ("[job]", "[review]\nbudget = 4\n[job]", "no section [review]", "limits"),
        ('kind = "choose"', 'kind = "chose"', '[[task]] number 1 kind is "chose"', 'did you mean "choose"?'),
        ('kind = "choose"', 'kind = "choose"\nthreshold = 0.2', "threshold does not go with", "choose_many"),
        ('name = "policy"', 'name = "my policy"', 'name is "my policy"', ""),
        ('name = "policy"\n', "", "[[task]] number 1 name is missing", "add: name ="),
        ('name = "sweep"', 'name = "../up"', '[job] name is "../up"', ""),
        ('"yes" = ""', '" yes" = ""', 'labels has " yes"', "no space"),
        (', "yes" = ""', "", "labels is {'safe': 'ordinary talk'}, expected at least 2", ""),
        ('{ "safe" = "ordinary talk", "yes" = "" }', '["a", "a"]', "expected each label once", ""),
        ('{ "safe" = "ordinary talk", "yes" = "" }', "3", "labels is 3, expected", ""),
        ('id = "ticket_id", ', "", "[input.columns] id is missing", "ticket_id"),
        ('["subject?", "body"]', '["body?"]', "at least one column that every file has", ""),
        ('["subject?", "body"]', '["body", "body"]', "each column once", ""),
        ('"tickets/*.parquet"', "", "[input] urls is missing", "add: urls"),
        ('url = "out/"', 'url = "out/"\nprefix = "a-"', '[output] prefix is "a-"', ""),
        ('url = "out/"', "url = 3", "[output] url is 3, expected a string in quotes", ""),
        ("[job]", "[limits]\nmax_reject_rate = 1.5\n[job]", "max_reject_rate is 1.5", ""),
        ("[job]", "[limits]\nmax_prompt_tokens = true\n[job]", "max_prompt_tokens is True", ""),
        ("[job]", '[deploy]\nmode = "cuda"\n[job]', 'mode is "cuda", expected one of: cpu, gpu', ""),
        ("[job]", '[deploy]\nrunner = "daks"\n[job]', 'runner is "daks"', 'did you mean "dask"?'),
        ("[job]", "[deploy]\nworkers = 0\n[job]", "workers is 0", ""),
        ("[job]\n", 'model = "x"\n[job]\n', 'model is "x", expected a table', "[model]"),
        ("[[task]]", "[task]", "must be written [[task]]", ""),
        ("[job]", "[job", "not TOML", ""),
    ],
)
def test_error_names_the_place_the_value_and_the_remedy(
    tmp_path: Path, old: str, new: str, says: str, remedy: str
) -> None:
    assert old in MINIMAL
    error = refuse(tmp_path, MINIMAL.replace(old, new, 1))
    assert says in error.message
    assert remedy in error.remedy


def test_no_task_two_tasks_of_a_name_and_an_instruction_that_is_missing(tmp_path: Path) -> None:
    task = MINIMAL[MINIMAL.index("[[task]]") :]
    assert "there is no task" in refuse(tmp_path, MINIMAL.replace(task, "")).message
    assert '[[task]] number 2 name is "policy"' in refuse(tmp_path, MINIMAL + task).message
    generate = '[[task]]\nname = "gist"\nkind = "generate"\n'
    assert "number 2 instruction is missing" in refuse(tmp_path, MINIMAL + generate).message


GENERATE = """[[task]]
name = "fields"
kind = "generate"
instruction = "Say who asks for what."
"""


def test_a_generate_task_says_what_it_matches_and_how_it_is_drawn(tmp_path: Path) -> None:
    plain = load(tmp_path, MINIMAL + GENERATE).tasks[1]
    assert (plain.json_schema, plain.regex, plain.choices, plain.stop) == ("", "", (), ())
    assert (plain.temperature, plain.top_p, plain.seed, plain.samples) == (0.0, 1.0, 0, 1)
    drawn = 'temperature = 1\ntop_p = 0.9\nseed = 7\nsamples = 3\nstop = ["\\n\\n", "END"]\nchoices = ["a", "b"]\n'
    task = load(tmp_path, MINIMAL + GENERATE + drawn).tasks[1]
    assert (task.temperature, task.top_p, task.seed, task.samples) == (1.0, 0.9, 7, 3)
    assert (task.stop, task.choices) == (("\n\n", "END"), ("a", "b"))
    assert load(tmp_path, MINIMAL + GENERATE + "regex = '\\d{3}'\n").tasks[1].regex == r"\d{3}"


def test_a_json_schema_is_a_table_or_a_file_and_keeps_the_order_of_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = """[task.json_schema]
type = "object"
required = ["z", "a"]
[task.json_schema.properties]
z = { type = "string", description = "café" }
a = { enum = ["x", 1, true] }
"""
    schema = load(tmp_path, MINIMAL + GENERATE + table).tasks[1].json_schema
    assert list(json.loads(schema)["properties"]) == ["z", "a"]
    assert "café" in schema
    Path("fields.json").write_text(json.dumps(json.loads(schema), indent=2), encoding="utf-8")
    assert load(tmp_path, MINIMAL + GENERATE + 'json_schema = "fields.json"\n').tasks[1].json_schema == schema


@pytest.mark.parametrize(
    ("lines", "says", "remedy"),
    [
        ("regex = '('", 'number 2 regex is "(", expected what an answer can follow: unclosed group', "llguidance"),
        (r"regex = '[^\s\S]'", "nothing matches it", "correct it"),
        ('regex = ""', 'regex is "", expected a string that is not empty', ""),
        ('choices = ["a"]', "choices is ['a'], expected at least 2 different strings", ""),
        ('choices = ["a", "a"]', "expected at least 2 different strings", ""),
        ('choices = ["a", "b"]\nregex = "a"', "number 2 choices does not go with regex", "keep one"),
        ('regex = "a"\njson_schema = {}', "number 2 regex does not go with json_schema", "keep one"),
        ('json_schema = { type = "strin" }', "expected what an answer can follow: Invalid type: strin", "correct it"),
        ("json_schema = { uniqueItems = true }", "Unimplemented keys", "JSON Schema"),
        ('json_schema = "absent.json"', 'json_schema is "absent.json", expected the path of a .json file', ""),
        ('json_schema = "job.toml"', "expected a file of JSON in UTF-8: Expecting value", "mend the file"),
        ("json_schema = 3", "json_schema is 3, expected a JSON schema that is an object", ""),
        ("json_schema = { default = 2020-01-01 }", "expected what JSON can say", "dates as strings"),
        ("json_schema = { minimum = nan }", "expected what JSON can say", ""),
        ("temperature = -1", "temperature is -1, expected 0, which takes the likeliest token, or a number from", ""),
        ("temperature = 0.001", "temperature is 0.001, expected 0", ""),
        ("temperature = nan", "temperature is nan, expected 0", ""),
        ("temperature = true", "temperature is True, expected 0", ""),
        ("temperature = 1\ntop_p = 0", "top_p is 0, expected a number above 0, up to 1", ""),
        ('top_p = "1"', 'top_p is "1", expected a number above 0', ""),
        ("seed = -1", "seed is -1, expected a whole number from 0", ""),
        ("seed = 9223372036854775808", "expected a whole number from 0", ""),
        (
            "samples = 2",
            "samples is 2, expected 1: without a temperature every sample is the same",
            "temperature = 0.7",
        ),
        ("samples = 0", "samples is 0, expected a whole number from 1", ""),
        ('stop = "END"', 'stop is "END", expected a list of strings', ""),
        ('stop = [""]', "stop is [''], expected a list of strings that are not empty", ""),
    ],
)
def test_what_an_answer_cannot_be_made_of_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, says: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refuse(tmp_path, MINIMAL + GENERATE + lines + "\n")
    assert says in error.message
    assert remedy in error.remedy


def test_drawing_belongs_to_generate(tmp_path: Path) -> None:
    error = refuse(tmp_path, MINIMAL + 'stop = ["x"]\n')
    assert 'stop does not go with kind = "choose"' in error.message


def test_a_file_that_is_not_there_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such job file") as caught:
        load_spec(str(tmp_path / "absent.toml"))
    assert "moderation_sweep.toml" in caught.value.remedy
    (tmp_path / "latin.toml").write_bytes(b'[job]\nname = "caf\xe9"\n')
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(str(tmp_path / "latin.toml"))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "specs").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_specs_load_and_find_their_samples(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = load_spec(str(path))
    assert len(list(ROOT.glob(spec.urls[0]))) == 3


def test_runners_are_those_of_the_flow() -> None:
    from pipelines import runners

    assert runners.RUNNERS == RUNNERS


def test_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(tmp_path, MINIMAL)
    for name in ("K2BATCH_CHECKPOINT", "K2BATCH_OUTPUT", "K2BATCH_RUNNER", "K2BATCH_WORKERS"):
        monkeypatch.setenv(name, "9")
    assert load(tmp_path, MINIMAL) == before
