"""A recipe from end to end on a tiny teacher: done once, gone on with after a stop, refused when it is another one."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import compress as compressing
from jobs.cli import main
from jobs.compress import compress
from jobs.compress_data import read_questions
from jobs.compress_measure import measure
from jobs.compress_recipe import load_recipe
from k2model.compress import calibrate
from k2model.compress.train import has_bfloat16_product
from k2model.compress.train_state import read_curve
from k2model.engine.engine import Engine
from k2model.formats.checkpoint import open_checkpoint
from pipelines.prompts import Prompts
from schemas.errors import RowError, SpecError
from tests.checkpoints import write_checkpoint
from tests.fakes import write_tickets
from tests.test_jobs_compress_data import LABELS, table

FLOATS = "bf16" if has_bfloat16_product("cpu") else "fp32"

RECIPE = f"""
[compress]
teacher = "teacher"
output = "out"
speed_rows = 0

[[data]]
name = "bank"
urls = ["train.parquet"]
columns = {{ id = "id", text = ["text"] }}

[[data.task]]
name = "intent"
kind = "choose"
truth = "label"
labels = {json.dumps(list(LABELS))}
label_sample = 4

[[step]]
kind = "tune"
steps = 2
batch_rows = 4

[[step]]
kind = "prune"
num_hidden_layers = 1
intermediate_size = 64
rows = 8

[[step]]
kind = "distill"
steps = 4
batch_rows = 4
validate_every = 2

[[step]]
kind = "quantize"
steps = 2
batch_rows = 4
"""
TEXTS = calibrate.calibration_texts()[::100]
"""Calibration takes a hundredth."""
STEPS = ["01-tune", "02-prune", "03-distill", "04-quantize"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a teacher, tickets, and a recipe that was followed to its end."""
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder / "teacher")
    write_tickets(folder, "train.parquet", table())
    (folder / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        _enter(folder, patch)
        facts, is_done = compress(load_recipe("recipe.toml"))
    assert is_done
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it where commands run."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    _enter(tmp_path, monkeypatch)
    return tmp_path


def _enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("K2BATCH_CACHE", str(folder / "cache"))
    patch.setattr(calibrate, "calibration_texts", lambda: TEXTS)
    patch.setattr(compressing, "_SAY_EVERY_S", 0.0)


def written(folder: Path) -> dict[str, bytes]:
    """Return the files of every checkpoint under an output."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors"}


def test_every_step_leaves_a_checkpoint_and_a_line_beside_the_teacher(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    assert [line["name"] for line in facts["steps"]] == ["teacher", *STEPS]
    assert facts["reference"] == "out/01-tune"
    assert ["retention" in line for line in facts["steps"]] == [False, True, True, True, True]
    assert facts["steps"][1]["retention"]["macro_f1"] in (1.0, None)
    assert [line["precision"] for line in facts["steps"]] == [*[FLOATS] * 4, "int8"]
    last = facts["steps"][-1]
    assert last["quality"]["bank/intent"]["rows"] == 6
    assert 0 < last["flops_saved"]["pruned"] < 1
    assert last["flops_saved"]["not_activated"] == last["flops_saved"]["vocabulary"] == 0
    assert json.loads(Path("out/report.json").read_text())["steps"] == facts["steps"]
    page = Path("out/report.html").read_text()
    assert page.count("<svg") == page.count("<polyline") == 9  # three of each step that trains
    Engine.open("out/04-quantize").close()


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    files = [path for path in (folder / "out").rglob("*") if path.is_file() and "report" not in path.name]
    before = {path: path.stat().st_mtime_ns for path in files}
    facts, is_done = compress(load_recipe("recipe.toml"))
    assert is_done
    assert facts == json.loads((folder / "facts.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_stop_is_gone_on_from_to_the_same_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").rename(folder / "expected")
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if "03-distill: step 3" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    facts, is_done = compress(load_recipe("recipe.toml"), stop)
    assert not is_done
    assert [line["name"] for line in facts["steps"]] == ["teacher", *STEPS[:2]]
    assert any("03-distill: step 2" in line and "validation accuracy" in line for line in lines)
    assert (folder / "out" / "03-distill" / "checkpoint" / "state.json").exists()
    assert main(["compress", "recipe.toml"]) == 0
    captured = capsys.readouterr()
    assert "step 3" not in captured.err
    assert "04-quantize" in captured.out
    assert written(folder / "out") == written(folder / "expected")


def test_steps_begin_from_a_student_made_before_and_the_teacher_teaches_it(folder: Path) -> None:
    steps = RECIPE[RECIPE.index('[[step]]\nkind = "distill"') :]
    again = RECIPE[: RECIPE.index("[[step]]")].replace('output = "out"', 'student = "out/02-prune"\noutput = "again"')
    (folder / "again.toml").write_text(again + steps)
    lines: list[str] = []
    facts, is_done = compress(load_recipe("again.toml"), lines.append)
    assert is_done
    assert "01-distill: from out/02-prune" in lines
    assert (facts["reference"], [line["name"] for line in facts["steps"]]) == (
        "teacher",
        ["teacher", "01-distill", "02-quantize"],
    )
    assert 0 < facts["steps"][1]["flops_saved"]["pruned"] < 1
    assert open_checkpoint("again/01-distill").config().num_hidden_layers == 1
    alone = measure("teacher", read_questions(load_recipe("again.toml")), 512)["quality"]
    assert facts["steps"][0]["quality"] == alone
    (folder / "again.toml").write_text((again + steps).replace("out/02-prune", "teacher"))
    with pytest.raises(SpecError, match=r"again/01-distill was made of other.*or student"):
        compress(load_recipe("again.toml"))


def test_ctrl_c_exits_with_5_and_the_handlers_are_what_they_were(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    shutil.rmtree("out")

    def interrupted(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments)

    monkeypatch.setattr("jobs.compress.measure", interrupted)
    assert main(["compress", "recipe.toml", "--json"]) == 5
    facts = json.loads(capsys.readouterr().out)
    assert (facts["done"], [line["name"] for line in facts["steps"]]) == (False, ["teacher"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_kill_after_the_last_byte_of_a_step_costs_nothing(folder: Path) -> None:
    weights = written(folder / "out")
    for name in STEPS[:2]:
        note = folder / "out" / f"{name}.json"
        note.write_text(json.dumps({"made_of": json.loads(note.read_text())["made_of"]}))
    lines: list[str] = []
    facts, _ = compress(load_recipe("recipe.toml"), lines.append)
    assert [line for line in lines if "step 0" in line or "rows 4" in line] == []
    assert written(folder / "out") == weights
    assert facts["steps"][1]["facts"] == {}


def test_a_question_with_calibration_is_judged_with_it(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole)
    calibrated = RECIPE.replace('truth = "label"', 'truth = "label"\ncalibrate = true')
    (whole / "calibrated.toml").write_text(calibrated)
    (question,) = read_questions(load_recipe("calibrated.toml"))
    engine = Engine.open("teacher", precision=FLOATS)
    try:
        prompts = Prompts([question.task], engine.tokenizer, 512)
        prompts.calibrate(engine)
        rows = prompts.requests_of([row.text for row in question.held_back])
        answers = [engine.submit(requests).result() for requests in rows if not isinstance(requests, RowError)]
    finally:
        engine.close()
    labels = prompts.columns_of(answers)["intent_label"].to_pylist()
    right = [LABELS[row.truth[0]] == label for row, label in zip(question.held_back, labels, strict=True) if row.truth]
    plain = replace(question, data=replace(question.data, task=replace(question.task, calibrate=False)))
    found = [measure("teacher", [one], 512)["quality"]["bank/intent"]["accuracy"] for one in (question, plain)]
    assert found[0] == round(sum(right) / len(right), 4)
    assert found[0] != found[1]  # of this model and these rows


@pytest.mark.parametrize(("old", "new"), [("steps = 2\n", "steps = 3\n"), ("label_sample = 4", "label_sample = 5")])
def test_steps_of_another_recipe_are_not_taken_for_its_own(folder: Path, old: str, new: str) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(SpecError, match="out/01-tune was made of other"):
        compress(load_recipe("recipe.toml"))
    (folder / "strange" / "01-tune").mkdir(parents=True)
    with pytest.raises(SpecError, match="strange/01-tune was made of other"):
        compress(load_recipe("recipe.toml", overrides={"output": "strange"}))


def test_quantizing_alone_trains_nothing_and_speeds_are_timed(folder: Path) -> None:
    shutil.rmtree("out")
    text = RECIPE[: RECIPE.index("[[step]]")].replace("speed_rows = 0", "speed_rows = 4")
    (folder / "recipe.toml").write_text(f'{text}[[step]]\nkind = "quantize"\nsteps = 0\n')
    facts, is_done = compress(load_recipe("recipe.toml"))
    assert is_done
    assert facts["reference"] == "teacher"
    assert not (folder / "out" / "01-quantize" / "curve.jsonl").exists()
    for line in facts["steps"]:
        assert line["tickets_per_second"] > 0
        assert 0.1 < line["ratio"] < 10  # of the same INT8 weights
    Engine.open("out/01-quantize").close()


def test_experts_and_a_vocabulary_are_steps_like_others(folder: Path) -> None:
    shutil.rmtree("out")
    steps = '[[step]]\nkind = "vocabulary"\n[[step]]\nkind = "experts"\nn_shared_experts = 2\nn_routed_experts = 4\n'
    steps += 'num_experts_per_tok = 1\nrows = 40\n[[step]]\nkind = "quantize"\nsteps = 0\n'
    (folder / "recipe.toml").write_text(RECIPE[: RECIPE.index("[[step]]")] + steps)
    facts, is_done = compress(load_recipe("recipe.toml"))
    assert is_done
    assert facts["reference"] == "out/01-vocabulary"
    saved = [line["flops_saved"] for line in facts["steps"]]
    assert [round(each["pruned"], 3) for each in saved] == [0, 0, 0, 0]
    assert saved[2]["vocabulary"] == saved[1]["vocabulary"] >= 0
    assert saved[3]["not_activated"] == saved[2]["not_activated"] > 0.2
    assert facts["steps"][2]["facts"]["n_routed_experts"] == 4
    Engine.open("out/03-quantize").close()


def test_other_seeds_learn_from_the_same_rows_and_their_spread_is_told(folder: Path) -> None:
    shutil.rmtree("out")
    text = RECIPE[: RECIPE.index('[[step]]\nkind = "prune"')].replace('output = "out"', 'output = "out"\nseeds = 2')
    (folder / "recipe.toml").write_text(text)
    facts, is_done = compress(load_recipe("recipe.toml"))
    assert (is_done, facts["seeds"]) == (True, 2)
    other = json.loads(Path("out/seed-1/report.json").read_text())
    assert (other["seed"], other["questions"]) == (1, facts["questions"])
    assert other["steps"][0]["quality"] == facts["steps"][0]["quality"]
    both = [each["steps"][1]["macro_average"]["accuracy"] for each in (facts, other)]
    assert facts["steps"][1]["over_seeds"]["accuracy"]["mean"] == pytest.approx(sum(both) / 2, abs=1e-4)
    assert facts["steps"][0]["over_seeds"]["accuracy"]["deviation"] == 0
    curves = [[line["loss"] for line in read_curve(Path(name))[1:]] for name in ("out/01-tune", "out/seed-1/01-tune")]
    assert curves[0] != curves[1]
    assert json.loads(Path("out/report.json").read_text()) == facts
