"""Distillation: a student learns a teacher's answers, the labels, and the teacher's hidden states.

Legend: N forks of all examples, C tokens that may follow one, T packed tokens, D hidden_size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2model.compress.examples import Batch, Forks, TrainingData, likeliest, path_to, whole_tree
from k2model.compress.recipe import open_tokenizer
from k2model.compress.student import ForkLogits, Student
from k2model.compress.student_layers import bfloat16_product
from k2model.compress.train import LabelLoss, Progress, TrainingOptions, has_bfloat16_product, made_of, smoothed, train
from k2model.compress.train_state import StateFolder
from k2model.formats.checkpoint import fingerprint
from schemas.errors import SpecError

_WHOLE_TREE_TOKENS = 32
"""A larger tree is computed along one answer alone: banking77's 77 labels are more tokens than its tickets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """What a student learns from."""

    temperature: float = 2.0
    """Answers of both are compared as softmax(logits / temperature), arXiv 1503.02531."""
    label_share: float = 0.5
    """Of the right answers in the loss; the rest is the teacher's. Examples without one have the teacher's alone."""
    hidden_weight: float = 1.0
    """Of the hidden states' distance, relative to the teacher's length, so 1 is as far off as nothing at all."""
    balance_weight: float = 0.0
    """Of how unevenly experts are chosen (arXiv 2101.03961), which is 1 if they are evenly; none in a dense student."""

    def __post_init__(self) -> None:
        weights = self.hidden_weight, self.balance_weight
        if self.temperature <= 0 or not 0 <= self.label_share <= 1 or min(weights) < 0:
            raise SpecError(
                f"temperature {self.temperature} is to be above 0, label_share {self.label_share} within 0 and 1, "
                f"hidden_weight {self.hidden_weight} and balance_weight {self.balance_weight} 0 or more"
            )


class DistillationLoss:
    """The distance from the teacher's answers and hidden states, and from the right answers."""

    def __init__(self, teacher: Student, student: Student, mix: Mix, smoothing: float = 0.0) -> None:
        """Compare `student` with `teacher`; labels are learned with `smoothing`, as of `surprise`.

        Raises: SpecError if their token ids are not the same.
        """
        if open_tokenizer(teacher.source).markup.get_vocab() != open_tokenizer(student.source).markup.get_vocab():
            raise SpecError(
                f"the tokenizers of teacher {teacher.source.name} and student {student.source.name} differ",
                remedy="make the student of the teacher, or trim the vocabulary of both",
            )
        self.teacher, self._mix, self._smoothing = teacher.requires_grad_(False), mix, smoothing
        self._layers = mapped_layers(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        self._projections: list[nn.Linear] = []
        widths = student.config.hidden_size, teacher.config.hidden_size
        if mix.hidden_weight and widths[0] != widths[1]:
            self._projections = [projection(*widths) for _ in self._layers]
        self.modules: Sequence[tuple[str, nn.Module]] = [
            ("teacher.", teacher),
            *((f"projection.{index}.", module) for index, module in enumerate(self._projections)),
        ]

    def __call__(self, student: Student, batch: Batch) -> Tensor:
        """Return the mean over the examples of `batch`."""
        if not batch.is_taught:
            return LabelLoss(self._smoothing)(student, batch)
        mix, count = self._mix, len(batch.examples)
        own_layers, their_layers = zip(*self._layers, strict=True) if mix.hidden_weight else ((), ())
        with torch.no_grad():
            forks = self._forks(batch)
            taught = self.teacher.fork_logits(batch, forks, their_layers)
        found = student.fork_logits(batch, forks, own_layers)
        distance = _divergence(taught.logits, found.logits, mix.temperature) * _reached(taught, forks)
        of_labels = torch.zeros_like(distance)
        at = (found.truths >= 0).nonzero().flatten()
        logprobs = torch.log_softmax(found.logits, dim=-1).index_select(0, at)
        of_labels = of_labels.index_copy(0, at, -smoothed(logprobs, found.truths[at], self._smoothing))
        is_labelled = torch.tensor([example.truths is not None for example in batch.examples], device=distance.device)
        share = mix.label_share * is_labelled.double().index_select(0, found.rows)
        total: Tensor = ((1 - share) * distance + share * of_labels).sum() / count
        for index, (own, theirs) in enumerate(zip(found.states, taught.states, strict=True)):
            projected = self._projections[index](own) if self._projections else own
            total = total + mix.hidden_weight / len(self._layers) * _relative_distance(projected, theirs)
        return total + mix.balance_weight * student.imbalance() if mix.balance_weight else total

    def _forks(self, batch: Batch) -> list[Forks]:
        """Return what each example is asked: the whole tree if it is small, else the way to one answer.

        That is the right one; of an example without a label, the one that the teacher finds likeliest.
        """
        tree = batch.tree
        if not tree.parents:
            raise SpecError("a task has one label, which teaches nothing", remedy="give it two labels or more")
        if len(tree.branches.token_ids) <= _WHOLE_TREE_TOKENS:
            return [whole_tree(tree, example.truths) for example in batch.examples]
        unlabelled = tuple(example for example in batch.examples if example.truths is None)
        questions = batch.examples[0].num_questions
        taught = iter(likeliest(self.teacher(Batch(unlabelled)).cpu(), questions) if unlabelled else ())
        forks = []
        for example in batch.examples:
            asked = path_to(tree, next(taught) if example.truths is None else example.truths)
            forks.append(asked if example.truths is not None else _without_truth(asked))
        return forks


def distill(
    source: str,
    target: Path,
    data: TrainingData,
    options: TrainingOptions,
    progress: Progress,
    *,
    teacher: str,
    mix: Mix | None = None,
) -> dict[str, Any]:
    """Train checkpoint `source` to answer as checkpoint `teacher` does; return the facts of it.

    Args:
        source: the student: a dense checkpoint.
        target: as of `tune`.
        data: the examples, with or without labels.
        options: of the training.
        progress: told of every step.
        teacher: a dense checkpoint with the same tokenizer.
        mix: what is learned from.

    Raises: as `tune`.
    """
    mix = mix or Mix()
    student = Student.open(source)
    made = made_of("distill", source, data, options, teacher=fingerprint(teacher, "fp32"), mix=asdict(mix))
    loss = DistillationLoss(open_teacher(teacher, options), student, mix, options.label_smoothing)
    state = StateFolder(target, made)
    facts = train(student, loss, data, options, state, progress)
    student.save(target)
    state.remove()
    return {"kind": "distill", **facts}


def open_teacher(name: str, options: TrainingOptions) -> Student:
    """Return checkpoint `name` to be asked, in the products of `options.device`."""
    teacher = Student.open(name)
    if has_bfloat16_product(options.device):
        teacher.product = bfloat16_product
    return teacher


def mapped_layers(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return for each layer of the student the teacher's that it imitates, evenly spaced, the last by the last."""
    return [(index, (index + 1) * teacher // student - 1 if teacher >= student else index * teacher // student)
            for index in range(student)]  # fmt: skip


def projection(student_width: int, teacher_width: int) -> nn.Linear:
    """Return a learned map between widths, the same at every start: each value copied to where it comes to lie."""
    linear = nn.Linear(student_width, teacher_width, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        rows = torch.arange(teacher_width)
        linear.weight[rows, rows % student_width] = 1.0
    return linear


def _without_truth(forks: Forks) -> Forks:
    return Forks(forks.branches, forks.parents, forks.targets, (-1,) * len(forks.parents), forks.ways)


def _divergence(taught: Tensor, found: Tensor, temperature: float) -> Tensor:
    """Return KL(taught || found) at each fork [N], of logits [N, C], times temperature² so that gradients keep size."""
    target, own = (torch.log_softmax(logits / temperature, dim=-1) for logits in (taught, found))
    difference = (target - own).masked_fill(taught == float("-inf"), 0.0)
    return (target.exp() * difference).sum(dim=-1) * temperature**2


def _reached(taught: ForkLogits, forks: Sequence[Forks]) -> Tensor:
    """Return how likely the teacher comes to each fork [N]; so weighted, divergences add up to that of answers."""
    logprobs = torch.log_softmax(taught.logits, dim=-1)
    places: list[int] = []
    steps: list[int] = []
    start = 0
    for asked in forks:
        for fork, way in enumerate(asked.ways):
            places += [start + fork] * len(way)
            steps += [(start + before) * logprobs.shape[1] + slot for before, slot in way]
        start += len(asked.parents)
    sums, device = logprobs.new_zeros(len(logprobs)), logprobs.device
    of_steps = logprobs.flatten().index_select(0, torch.tensor(steps, dtype=torch.int64, device=device))
    return sums.index_add(0, torch.tensor(places, dtype=torch.int64, device=device), of_steps).exp()


def _relative_distance(own: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean over tokens [T, D] of |own - theirs|² / |theirs|²: some tokens are a thousand times longer."""
    return ((own - theirs).square().sum(dim=1) / theirs.square().sum(dim=1)).mean()
