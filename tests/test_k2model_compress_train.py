"""Training: it learns, the same seed makes the same bits, and neither a kill nor a stop shows in them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from k2model.compress.examples import Batch
from k2model.compress.student import Student
from k2model.compress.student_layers import bfloat16_product, int8_product
from k2model.compress.train import LabelLoss, TrainingOptions, evaluate, has_bfloat16_product, smoothed, tune
from k2model.compress.train_state import read_curve
from schemas.errors import EnvironmentMismatch, K2Error, SpecError
from tests.checkpoints import write_checkpoint
from tests.training import Rows, batch

OPTIONS = TrainingOptions(steps=7, learning_rate=3e-3, validate_every=3, checkpoint_every=2)
DATA = Rows()


class Stopped(Exception):
    pass


class Thrice(Rows):
    """The same batch three times."""

    def epoch(self, number: int) -> Iterator[Batch]:
        yield from [batch(6, number)] * 3


def said(line: dict[str, Any]) -> None:
    pass


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_equal(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_curve(folder)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tune") / "source"))


@pytest.fixture(scope="module")
def tuned(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tuned") / "target"
    tune(source, target, DATA, OPTIONS, said)
    return target


def test_tuning_learns_what_the_labels_say(source: str, tmp_path: Path) -> None:
    options = TrainingOptions(steps=25, learning_rate=3e-3)
    facts = tune(source, tmp_path / "target", Rows(rows=8, per_epoch=100), options, said)
    first, last = read_curve(tmp_path / "target")[0], read_curve(tmp_path / "target")[-1]
    assert first["validation_accuracy"] < 0.4
    assert facts["validation_accuracy"] == last["validation_accuracy"] > 0.6
    assert facts["validation_loss"] < 0.2 * first["validation_loss"]
    assert (facts["kind"], facts["steps"], facts["best_step"], facts["stopped_early"]) == ("tune", 25, 25, False)
    student = Student.open(str(tmp_path / "target"))
    if has_bfloat16_product("cpu"):
        student.product = bfloat16_product
    found = evaluate(student, Rows().validation(), LabelLoss())
    assert found == {key: facts[key] for key in found}, "what is written is what was measured"


def test_smoothing_is_a_share_of_all_that_may_follow() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [3.0, -1.0, float("-inf")]], requires_grad=True)
    logprobs, truths = torch.log_softmax(logits, dim=1), torch.tensor([0, 1])
    assert torch.equal(smoothed(logprobs, truths, 0.0), logprobs[[0, 1], truths])
    wanted = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.05, 0.95, 0.0]])
    expected = (wanted * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(dim=1)
    torch.testing.assert_close(smoothed(logprobs, truths, 0.1), expected)
    smoothed(logprobs, truths, 0.1).sum().backward()
    torch.testing.assert_close(logits.grad, wanted - torch.softmax(logits, dim=1))  # there it would be 0


def test_what_is_smoothed_is_learned_less_by_heart(source: str, tmp_path: Path) -> None:
    losses = []
    for smoothing in (0.0, 0.3):
        options = TrainingOptions(steps=25, learning_rate=3e-3, label_smoothing=smoothing)
        target = tmp_path / str(smoothing)
        losses.append(tune(source, target, Rows(rows=8, per_epoch=100), options, said)["validation_loss"])
    assert losses[0] < 0.9 * losses[1]
    with pytest.raises(SpecError, match=r"label_smoothing is 1\.0"):
        TrainingOptions(steps=1, label_smoothing=1.0)


def test_the_folder_holds_a_checkpoint_and_its_curve_alone(tuned: Path) -> None:
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "curve.jsonl"}
    assert {path.name for path in tuned.iterdir()} == names
    curve = read_curve(tuned)
    assert [line["step"] for line in curve] == list(range(8))
    assert [line["step"] for line in curve if "validation_loss" in line] == [0, 3, 6, 7]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in curve[1:])
    tokens = [sum(b.num_tokens for b in DATA.epoch(epoch)) for epoch in range(2)]
    assert curve[6]["tokens"] == sum(tokens)


def test_the_same_seed_makes_the_same_bits(source: str, tuned: Path, tmp_path: Path) -> None:
    tune(source, tmp_path / "again", DATA, OPTIONS, said)
    tune(source, tmp_path / "other", replace(DATA, seed=1), OPTIONS, said)
    assert is_equal(tmp_path / "again", tuned)
    assert not is_equal(tmp_path / "other", tuned)


def test_gradients_of_several_threads_are_the_same_every_time(source: str) -> None:
    """Enough tokens that each operator shares its work out: x[index] would add its gradient up as threads come."""
    student, asked = Student.open(source), batch(60)
    student.product = int8_product
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        grads = []
        for _ in range(3):
            student.zero_grad()
            student(asked).sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_whoever_stops_it_at_every_step_gets_the_same_bits(source: str, tuned: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def stop(line: dict[str, Any]) -> None:
        raise Stopped

    for step in range(8):
        with pytest.raises(Stopped):
            tune(source, target, DATA, OPTIONS, stop)
        assert len(read_curve(target)) == step + 1
    tune(source, target, DATA, OPTIONS, said)
    assert is_equal(target, tuned)
    assert without_seconds(target) == without_seconds(tuned)


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_k2model_compress_train import DATA, OPTIONS, tune
def kill(line):
    if line["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
tune(sys.argv[1], Path(sys.argv[2]), DATA, OPTIONS, kill)
"""


def test_a_killed_training_goes_on_to_the_same_bits(source: str, tuned: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", _KILLED, source, str(target)]
    killed = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((target / "checkpoint" / "state.json").read_text())["place"]["step"] == 4
    with (target / "curve.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    assert not (target / "model.safetensors").exists()
    tune(source, target, DATA, OPTIONS, said)
    assert is_equal(target, tuned)
    assert without_seconds(target) == without_seconds(tuned)


def test_another_step_is_not_gone_on_with(source: str, tuned: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def stop(line: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        tune(source, target, DATA, OPTIONS, stop)
    for data, options in ((DATA, replace(OPTIONS, learning_rate=1e-3)), (replace(DATA, seed=1), OPTIONS)):
        with pytest.raises(SpecError, match="the beginning of a step with another source, other data or other options"):
            tune(source, target, data, options, said)
    with pytest.raises(SpecError, match="holds a finished checkpoint"):
        tune(source, tuned, DATA, OPTIONS, said)
    tune(source, target, DATA, replace(OPTIONS, checkpoint_every=50), said)  # when it is kept is nobody's business
    assert is_equal(target, tuned)


def test_what_gets_worse_stops_early_and_leaves_the_best_weights(tuned: Path, tmp_path: Path) -> None:
    options = TrainingOptions(steps=50, learning_rate=0.3, validate_every=2, patience=3)
    facts = tune(str(tuned), tmp_path / "target", DATA, options, said)
    assert (facts["steps"], facts["best_step"], facts["stopped_early"]) == (6, 0, True)
    assert is_equal(tuned, tmp_path / "target")
    losses = [line["validation_loss"] for line in read_curve(tmp_path / "target") if "validation_loss" in line]
    assert facts["validation_loss"] == losses[0] == min(losses)


def test_a_loss_that_is_no_number_is_told(source: str, tmp_path: Path) -> None:
    with pytest.raises(K2Error, match=r"at step [23] the loss is .*nan") as caught:
        tune(source, tmp_path / "target", DATA, TrainingOptions(steps=30, learning_rate=1e30), said)
    assert caught.value.remedy == "lower learning_rate"


def test_gradients_of_several_batches_are_averaged(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the same batch is that batch; in float32, since a third of a gradient rounds to another bfloat16."""
    monkeypatch.setattr("k2model.compress.train.has_bfloat16_product", lambda device: False)
    for name, count in (("one", 1), ("three", 3)):
        options = TrainingOptions(steps=2, learning_rate=1e-3, batches_per_step=count)
        tune(source, tmp_path / name, Thrice(), options, said)
    one, three = read_curve(tmp_path / "one"), read_curve(tmp_path / "three")
    assert one[1]["loss"] == pytest.approx(three[1]["loss"], rel=1e-6)
    assert one[1]["gradient_norm"] == pytest.approx(three[1]["gradient_norm"], rel=1e-4)
    assert three[1]["tokens"] == 3 * one[1]["tokens"]


def test_frozen_layers_stay_and_others_learn(source: str, tmp_path: Path) -> None:
    tune(source, tmp_path / "target", DATA, replace(OPTIONS, freeze_layers=1), said)
    before, after = weights(Path(source)), weights(tmp_path / "target")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if ".layers.0." in name or "embed" in name} == set()
    assert {name for name in before if ".layers.1." in name} | {"model.norm.weight"} == changed


def test_matrices_decay_and_rows_of_tokens_that_no_step_met_do_not(source: str, tmp_path: Path) -> None:
    tune(source, tmp_path / "target", DATA, replace(OPTIONS, weight_decay=20.0), said)
    before, after = weights(Path(source)), weights(tmp_path / "target")
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name][200:], after[name][200:])
    assert not torch.equal(before[name][:70], after[name][:70])
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].norm() < 0.95 * before[name].norm()


def test_a_long_gradient_is_scaled_down(source: str, tmp_path: Path) -> None:
    """So far down, here, that AdamW's epsilon outweighs it."""
    options = replace(OPTIONS, max_grad_norm=1e-20, weight_decay=0.0)
    tune(source, tmp_path / "target", DATA, options, said)
    before, after = weights(Path(source)), weights(tmp_path / "target")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-6
    assert read_curve(tmp_path / "target")[1]["gradient_norm"] > 0.1, "as it was"


def test_the_rate_rises_and_falls() -> None:
    options = TrainingOptions(steps=100, learning_rate=1.0, warmup_share=0.1)
    rates = [options.learning_rate_at(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert TrainingOptions(steps=1).learning_rate_at(0) == 1e-4


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"patience": -1}, {"warmup_share": 1.0}])
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        TrainingOptions(**{"steps": 5, **wrong})


def test_a_device_that_is_not_there_is_told(source: str, tmp_path: Path) -> None:
    for name in ("cuda:77", "abacus"):
        with pytest.raises(EnvironmentMismatch, match=f'device "{name}" cannot be used'):
            tune(source, tmp_path / name, DATA, replace(OPTIONS, device=name), said)


def test_rows_that_teach_nothing_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no labelled example"):
        tune(source, tmp_path / "unlabelled", Rows(labelled=False, validated=0), OPTIONS, said)
    with pytest.raises(SpecError, match="no rows to train on"):
        tune(source, tmp_path / "none", Rows(per_epoch=0), OPTIONS, said)


def test_without_validation_the_last_weights_are_written(source: str, tuned: Path, tmp_path: Path) -> None:
    facts = tune(source, tmp_path / "target", Rows(validated=0), OPTIONS, said)
    assert facts["best_step"] == 7
    assert "validation_loss" not in facts
    best = read_curve(tuned)[-1]["validation_accuracy"] == max(
        line.get("validation_accuracy", 0) for line in read_curve(tuned)
    )
    assert is_equal(tmp_path / "target", tuned) or not best
