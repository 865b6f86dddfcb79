"""Distillation: the distance is the one that is meant, and training makes it smaller."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from k2model.compress import distill as distilling
from k2model.compress.distill import DistillationLoss, Mix, _relative_distance, distill, mapped_layers
from k2model.compress.examples import Batch, Example
from k2model.compress.student import Student
from k2model.compress.train import LabelLoss, TrainingOptions
from k2model.compress.train_state import read_curve
from k2model.engine.request import Candidate
from schemas.errors import SpecError
from tests.checkpoints import write_checkpoint
from tests.test_k2model_compress_student import LABELS
from tests.training import CANDIDATES, Rows, batch

ANSWERS = Mix(temperature=1.0, label_share=0.0, hidden_weight=0.0)


def said(line: dict[str, Any]) -> None:
    pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher", seed=1, num_hidden_layers=3)


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pupil") / "pupil", seed=2)


@pytest.mark.parametrize("labels", ["four", "thirty"])
@torch.no_grad()
def test_forks_add_up_to_the_divergence_of_whole_answers(labels: str, teacher: Path, pupil: Path) -> None:
    one, other = Student.open(str(teacher)), Student.open(str(pupil))
    whole = tuple(Candidate(c.token_ids, len(c.token_ids)) for c in (CANDIDATES if labels == "four" else LABELS))
    asked = Batch(tuple(Example((*range(n), 9), 0, whole, None) for n in range(3, 40, 5)))
    found = DistillationLoss(one, other, ANSWERS)(other, asked)
    target, own = one(asked), other(asked)
    assert found == pytest.approx(float((target.exp() * (target - own)).sum() / len(asked.examples)), rel=1e-4)
    assert DistillationLoss(one, one, Mix(label_share=0.0))(one, asked) == pytest.approx(0.0, abs=1e-9)


@torch.no_grad()
def test_a_large_tree_is_compared_on_the_way_to_one_answer(
    teacher: Path, pupil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Student.open(str(teacher)), Student.open(str(pupil))
    asked = Batch(
        tuple(Example((*range(n), 9), 0, LABELS, None if n % 2 else (n % len(LABELS),)) for n in range(3, 40, 3))
    )
    whole = [len(f.branches.token_ids) for f in DistillationLoss(one, other, ANSWERS)._forks(asked)]
    monkeypatch.setattr(distilling, "_WHOLE_TREE_TOKENS", 4)
    forks = DistillationLoss(one, other, ANSWERS)._forks(asked)
    assert {len(f.branches.token_ids) for f in forks} == {7}
    assert set(whole) == {9}
    likeliest = one(asked).argmax(dim=1).tolist()
    for example, best, fork in zip(asked.examples, likeliest, forks, strict=True):
        answer = LABELS[best if example.truths is None else example.truths[0]].token_ids
        assert fork.branches.token_ids == answer[: len(fork.branches.token_ids)]
        assert (set(fork.truths) == {-1}) == (example.truths is None)


@torch.no_grad()
def test_labels_have_their_share(teacher: Path, pupil: Path) -> None:
    one, other = Student.open(str(teacher)), Student.open(str(pupil))
    asked = batch(7)
    of_labels = LabelLoss()(other, asked)
    of_teacher = DistillationLoss(one, other, ANSWERS)(other, asked)
    for share in (0.0, 0.25, 1.0):
        mixed = DistillationLoss(one, other, replace(ANSWERS, label_share=share))(other, asked)
        assert mixed == pytest.approx(float(share * of_labels + (1 - share) * of_teacher), rel=1e-5)
    unlabelled = DistillationLoss(one, other, replace(ANSWERS, label_share=1.0))(other, batch(7, labelled=False))
    assert unlabelled == pytest.approx(float(of_teacher), rel=1e-5)


@torch.no_grad()
def test_labels_are_smoothed_with_a_teacher_as_without(teacher: Path, pupil: Path) -> None:
    one, other = Student.open(str(teacher)), Student.open(str(pupil))
    asked, mix = batch(7), replace(ANSWERS, label_share=1.0)
    plain = [float(loss(other, asked)) for loss in (DistillationLoss(one, other, mix), LabelLoss())]
    smooth = [float(loss(other, asked)) for loss in (DistillationLoss(one, other, mix, 0.2), LabelLoss(0.2))]
    assert smooth[0] == pytest.approx(smooth[1], rel=1e-5)
    assert smooth[0] != pytest.approx(plain[0], rel=1e-3)


@torch.no_grad()
def test_what_is_not_taught_is_learned_from_labels_and_the_teacher_is_not_asked(
    teacher: Path, pupil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Student.open(str(teacher)), Student.open(str(pupil))
    loss, asked = DistillationLoss(one, other, Mix()), replace(batch(7), is_taught=False)
    monkeypatch.setattr(one, "fork_logits", None)
    assert loss(other, asked) == LabelLoss()(other, asked)


@torch.no_grad()
def test_a_temperature_softens_answers_and_keeps_the_size_of_gradients(teacher: Path, pupil: Path) -> None:
    one, other, asked = Student.open(str(teacher)), Student.open(str(pupil)), batch(7)
    found = [float(DistillationLoss(one, other, replace(ANSWERS, temperature=t))(other, asked)) for t in (1, 50, 100)]
    assert found[1] == pytest.approx(found[2], rel=0.2)  # of small logits it is the square of their distance
    assert found[1] > found[0]


@torch.no_grad()
def test_hidden_states_count_relative_to_the_teachers_length(teacher: Path, pupil: Path) -> None:
    one, other, asked = Student.open(str(teacher)), Student.open(str(pupil)), batch(7)
    losses = [float(DistillationLoss(one, other, replace(ANSWERS, hidden_weight=w))(other, asked)) for w in (0, 1, 3)]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]))
    assert 0.5 < losses[1] - losses[0] < 4  # two random vectors of about the same length: 2
    assert float(_relative_distance(torch.zeros(5, 8), torch.randn(5, 8))) == 1.0


@pytest.mark.parametrize("width", [48, 24])
def test_distilling_brings_answers_and_states_nearer(width: int, teacher: Path, tmp_path: Path) -> None:
    pupil = write_checkpoint(tmp_path / "pupil", 2, hidden_size=width, num_attention_heads=2, head_dim=8)
    options = TrainingOptions(steps=20, learning_rate=3e-3, validate_every=10)
    data = Rows(rows=8, per_epoch=100, labelled=False)
    facts = distill(str(pupil), tmp_path / "target", data, options, said, teacher=str(teacher))
    curve = [line["validation_loss"] for line in read_curve(tmp_path / "target") if "validation_loss" in line]
    assert facts["validation_loss"] == curve[-1] < 0.6 * curve[0]
    assert (facts["kind"], facts["best_step"]) == ("distill", 20)
    assert Student.open(str(tmp_path / "target")).config.hidden_size == width


def test_a_stopped_distillation_goes_on_with_its_projections(teacher: Path, tmp_path: Path) -> None:
    pupil = write_checkpoint(tmp_path / "pupil", hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
    options = TrainingOptions(steps=4, learning_rate=3e-3)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        distill(str(pupil), tmp_path / "stopped", Rows(), options, stop, teacher=str(teacher))
    kept = load_file(tmp_path / "stopped" / "checkpoint" / "state-00000002.safetensors")
    for index in range(2):
        assert kept[f"weight.projection.{index}.weight"].shape == (48, 24)
        assert kept[f"exp_avg.projection.{index}.weight"].any(), "it is learned"
    with pytest.raises(SpecError, match="the beginning of a step with another"):
        distill(str(pupil), tmp_path / "stopped", Rows(), options, said, teacher=str(pupil))
    for name in ("stopped", "whole"):
        distill(str(pupil), tmp_path / name, Rows(), options, said, teacher=str(teacher))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole"))
    assert one == other


def test_layers_are_imitated_evenly_and_the_last_by_the_last() -> None:
    assert mapped_layers(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert [theirs for _, theirs in mapped_layers(12, 30)] == [1, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 29]
    assert mapped_layers(2, 2) == [(0, 0), (1, 1)]
    assert [theirs for _, theirs in mapped_layers(4, 2)] == [0, 0, 1, 1]


def test_another_tokenizer_is_refused(teacher: Path, pupil: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["!"], vocab["?"] = vocab["?"], vocab["!"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(SpecError, match=r"the tokenizers of teacher .* differ"):
        distill(str(other), tmp_path / "target", Rows(), TrainingOptions(steps=1), said, teacher=str(teacher))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"label_share": 1.5}, {"hidden_weight": -1.0}])
def test_a_mix_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        Mix(**wrong)
