"""Training a model that was cut into experts: the engine's answers, gradients of what was chosen, better answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.compress import calibrate
from k2model.compress.distill import DistillationLoss, Mix, distill
from k2model.compress.examples import Batch, path_to
from k2model.compress.experts import Cut, cut_experts
from k2model.compress.quantize_aware import quantize_aware
from k2model.compress.student import Student
from k2model.compress.student_layers import MixtureOfExperts, bfloat16_product, int8_product
from k2model.compress.train import TrainingOptions, tune
from k2model.formats.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.test_k2model_compress_quantize_aware import exported_from
from tests.test_k2model_compress_student import engine_logprobs
from tests.training import Rows, batch

DATA = Rows(rows=6, per_epoch=3)


def said(line: dict[str, Any]) -> None:
    pass


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Balance over every tenth of the shipped texts."""
    some = calibrate.calibration_texts()[::10]
    monkeypatch.setattr(calibrate, "calibration_texts", lambda: some)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "source")


@pytest.fixture(scope="module")
def cut(dense: Path) -> Path:
    """Return 96 neurons cut into two shared experts and two of six routed ones."""
    options = Cut(n_shared_experts=2, n_routed_experts=6, num_experts_per_tok=2, rows=12)
    cut_experts(str(dense), dense.parent / "cut", Rows(rows=4, per_epoch=3), options, said)
    return dense.parent / "cut"


def mixtures(student: Student) -> list[MixtureOfExperts]:
    return [layer.mlp for layer in student.model.layers if isinstance(layer.mlp, MixtureOfExperts)]


def loss(student: Student, asked: Batch) -> Tensor:
    found = student.fork_logits(asked, [path_to(asked.tree, example.truths or (0,)) for example in asked.examples])
    return -torch.log_softmax(found.logits, dim=-1).gather(1, found.truths[:, None]).mean()


def test_it_answers_as_the_engine_does_in_int8_to_the_bit(cut: Path) -> None:
    student, asked = Student.open(str(cut)), batch(11)
    assert len(mixtures(student)) == 2
    exact = engine_logprobs(cut, asked, "fp32")
    assert (student(asked) - exact).abs().max() < 1e-5
    student.product = bfloat16_product
    # Two layers of four linears in a row, and the head, each off by up to √2 2**-8 of its norm where errors are
    # independent; answers are sums of differences of logits.
    assert 0 < (student(asked) - exact).norm() / exact.norm() < (2 * 4 + 1) * 2**0.5 * 2**-8
    student.product = int8_product
    assert torch.equal(student(asked), engine_logprobs(exported_from(cut), asked, "int8"))


def test_gradients_are_those_of_differences_the_routers_too(cut: Path) -> None:
    student, asked = Student.open(str(cut)), batch(6)
    for mixture in mixtures(student):
        mixture.gate.e_score_correction_bias[1::3] = 10.0  # whatever a step does, these are chosen
    loss(student, asked).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            continue
        step = 3e-4 * parameter.grad / parameter.grad.norm()
        expected = 2 * float((step * parameter.grad).sum())
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.add_(step, alpha=sign)
                values.append(float(loss(student, asked)))
        assert values[0] - values[1] == pytest.approx(expected, rel=0.05, abs=2e-6), name
    router = student.get_parameter("model.layers.0.mlp.gate.weight").grad
    assert router is not None
    assert router.any()


def test_an_expert_that_nobody_chose_learns_nothing(cut: Path) -> None:
    student = Student.open(str(cut))
    for mixture in mixtures(student):
        mixture.gate.e_score_correction_bias[3] = -10.0
    loss(student, batch(6)).backward()
    for name, parameter in student.named_parameters():
        is_learned = parameter.grad is not None and bool(parameter.grad.any())
        assert is_learned != (".experts.3." in name) or name.endswith("gate.weight"), name


@torch.no_grad()
def test_imbalance_is_1_where_all_is_even_and_more_where_the_likely_are_chosen(dense: Path, cut: Path) -> None:
    student, asked = Student.open(str(cut)), batch(11)
    for mixture in mixtures(student):
        mixture.gate.weight.zero_()  # all alike: the first two are chosen, and none is likelier
    loss(student, asked)
    assert float(student.imbalance()) == pytest.approx(1.0)
    hidden: list[Tensor] = []
    hook = mixtures(student)[0].register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    loss(student, asked)
    hook.remove()
    mean = hidden[0].mean(dim=0)
    for mixture in mixtures(student)[:1]:
        mixture.gate.weight[:2] = 50 * mean / mean.norm()
    loss(student, asked)
    assert float(mixtures(student)[0].imbalance) > 1.1
    student = Student.open(str(dense))
    loss(student, asked)
    assert float(student.imbalance()) == 0.0


@pytest.mark.parametrize("kind", ["tune", "distill", "quantize"])
def test_every_way_to_train_leaves_a_checkpoint_of_experts_that_answers_better(
    kind: str, dense: Path, cut: Path, tmp_path: Path
) -> None:
    options = TrainingOptions(steps=25, learning_rate=3e-3, validate_every=25)
    target = tmp_path / "target"
    if kind == "tune":
        facts = tune(str(cut), target, DATA, options, said)
    elif kind == "distill":
        mix = Mix(label_share=1.0, hidden_weight=0.1, balance_weight=0.01)
        facts = distill(str(cut), target, DATA, options, said, teacher=str(dense), mix=mix)
    else:
        facts = quantize_aware(str(cut), target, DATA, options, said)
    config = open_checkpoint(str(target)).config()
    assert (config.family, config.is_moe) == ("glm4_moe", (True, True))
    asked = batch(40, -1)
    truths = torch.tensor([(example.truths or (0,))[0] for example in asked.examples])
    right = [
        (engine_logprobs(folder, asked, precision).argmax(dim=1) == truths).float().mean().item()
        for folder, precision in ((cut, "fp32"), (target, "int8" if kind == "quantize" else "fp32"))
    ]
    assert right[1] > right[0] + 0.2
    assert facts["steps"] == 25


def test_uneven_experts_cost_what_their_weight_says(dense: Path, cut: Path) -> None:
    teacher, student, asked = Student.open(str(dense)), Student.open(str(cut)), batch(6)
    with torch.no_grad():
        without, weighed = (
            float(DistillationLoss(teacher, student, Mix(balance_weight=weight))(student, asked))
            for weight in (0.0, 0.5)
        )
        assert weighed - without == pytest.approx(0.5 * float(student.imbalance()), rel=1e-4)
