"""The training loop, and fine-tuning: a checkpoint and labelled examples to a checkpoint.

A step is a function that takes a folder and leaves a folder. Meanwhile `checkpoint/` in it holds what it needs to go on
after a kill, to the same weights: the same seed on as many threads of the same processor gives the same bits.
`curve.jsonl` has a line for each step of the optimizer.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from k2model.compress.examples import Batch, TrainingData, likeliest, path_to
from k2model.compress.student import Student
from k2model.compress.student_layers import bfloat16_product, float32_product
from k2model.compress.train_state import StateFolder, learned_parameters
from k2model.formats.checkpoint import fingerprint
from kernels import cpu
from schemas.errors import EnvironmentMismatch, K2Error, SpecError

Progress = Callable[[dict[str, Any]], None]
"""Told of every step; what it raises ends the training after all that was done is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """How a step is trained."""

    steps: int
    """Steps of the optimizer, at most."""
    learning_rate: float = 1e-4
    """At its highest; it rises over the warm-up and falls to 0 along a cosine."""
    warmup_share: float = 0.06
    """Of the steps."""
    weight_decay: float = 0.01
    """Of the linears' matrices; norms, biases and embeddings have none."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to it."""
    batches_per_step: int = 1
    """Batches whose gradients are averaged."""
    label_smoothing: float = 0.0
    """Share of a right answer that goes to all answers alike, so that it is not learned by heart (arXiv 1512.00567)."""
    freeze_layers: int = 0
    """The embedding and so many first layers stay as they are, and cost no backward pass."""
    validate_every: int = 0
    """Steps between validations; 0 for the first and the last alone."""
    patience: int = 0
    """Validations in a row without a better one before it stops; 0 never stops early."""
    checkpoint_every: int = 100
    """Steps that a kill may cost."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"steps": 1, "batches_per_step": 1, "checkpoint_every": 1, "validate_every": 0, "patience": 0}
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise SpecError(f"{name} is {getattr(self, name)}, expected {at_least} or more")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.warmup_share < 1 or self.weight_decay < 0:
            raise SpecError(f"{self.warmup_share=} is to be within [0, 1), {self.weight_decay=} 0 or more")
        if not 0 <= self.label_smoothing < 1:
            raise SpecError(f"label_smoothing is {self.label_smoothing}, expected a share below 1")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step `step`, 0 and up."""
        warmup = round(self.warmup_share * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))


class Loss(Protocol):
    """What a step makes smaller."""

    modules: Sequence[tuple[str, nn.Module]]
    """What it needs beside the student, each with a prefix for its parameters' names; those not frozen are learned."""

    def __call__(self, student: Student, batch: Batch) -> Tensor:
        """Return the mean over the examples of `batch`, a scalar."""
        ...


class LabelLoss:
    """-ln P(right answer), examples without one left out."""

    modules: Sequence[tuple[str, nn.Module]] = ()

    def __init__(self, smoothing: float = 0.0) -> None:
        """Learn labels, `smoothing` as of `surprise`."""
        self._smoothing = smoothing

    def __call__(self, student: Student, batch: Batch) -> Tensor:
        """Return the mean over the labelled examples; the forks on the right answer's way alone are computed."""
        labelled = tuple(example for example in batch.examples if example.truths is not None)
        if not labelled or not batch.tree.parents:
            raise SpecError("a batch has no labelled example, or a task has one label", remedy="give a truth column")
        return surprise(student, Batch(labelled), self._smoothing) / len(labelled)


def surprise(student: Student, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Return -ln P(right answers) summed over examples that all have some; the forks on their ways are computed.

    At each fork the right way has 1 - `smoothing` of what is asked for, and all that may follow share the rest alike.
    """
    tree = batch.tree
    forks = [path_to(tree, example.truths) for example in batch.examples if example.truths is not None]
    found = student.fork_logits(batch, forks)
    return -smoothed(torch.log_softmax(found.logits, dim=-1), found.truths, smoothing).sum()


def smoothed(logprobs: Tensor, truths: Tensor, smoothing: float) -> Tensor:
    """Return [N] the log-probability of `truths` [N] in `logprobs` [N, C], `smoothing` of it the mean of those there.

    -inf in `logprobs` is none of those.
    """
    right = logprobs.gather(1, truths[:, None]).squeeze(1)
    if not smoothing:
        return right
    is_one = logprobs > float("-inf")
    every = logprobs.masked_fill(~is_one, 0.0).sum(dim=1) / is_one.sum(dim=1)
    return right.lerp(every, smoothing)


def tune(source: str, target: Path, data: TrainingData, options: TrainingOptions, progress: Progress) -> dict[str, Any]:
    """Fine-tune checkpoint `source` on the labels of `data`; return the facts of it.

    Args:
        source: a dense checkpoint: a name, folder or URL.
        target: becomes a float32 checkpoint; empty, not there yet, or left by an interrupted call with the same rest.
        data: the examples.
        options: of the training.
        progress: told of every step.

    Raises: CheckpointError; SpecError, also if `target` holds anything else; K2Error if the loss is no number.
    """
    student = Student.open(source)
    state = StateFolder(target, made_of("tune", source, data, options))
    facts = train(student, LabelLoss(options.label_smoothing), data, options, state, progress)
    student.save(target)
    state.remove()
    return {"kind": "tune", **facts}


def made_of(kind: str, source: str, data: TrainingData, options: TrainingOptions, **more: Any) -> dict[str, Any]:
    """Return everything that the weights a step makes depend on."""
    chosen = {name: value for name, value in asdict(options).items() if name != "checkpoint_every"}
    return {"kind": kind, "source": fingerprint(source, "fp32"), "data": data.digest, "options": chosen, **more}


def train(
    student: Student, loss: Loss, data: TrainingData, options: TrainingOptions, state: StateFolder, progress: Progress
) -> dict[str, Any]:
    """Train `student` in place, to its best weights on the validation rows or, without any, its last; return the facts.

    Goes on from `state`. Raises: K2Error if the loss is no number; EnvironmentMismatch if the device is not there.
    """
    student.freeze(options.freeze_layers)
    try:
        student.to(options.device)
    except (AssertionError, RuntimeError) as error:  # torch was built without it; or it is not there
        remedy = 'give device = "cpu", or the name that torch has for a device of this machine'
        raise EnvironmentMismatch(f'device "{options.device}" cannot be used: {error}', remedy=remedy) from error
    if student.product is float32_product and has_bfloat16_product(options.device):
        student.product = bfloat16_product
    for _, module in loss.modules:
        module.to(options.device)
    training = _Training(student, loss, data, options, state)
    state.load(training.learned, training.optimizer)
    training.run(progress)
    place = training.place
    if place.best is not None and place.best_step != place.step:
        state.load_best(place, training.learned)
    student.cpu()
    return {
        "steps": place.step,
        "tokens": place.tokens,
        "seconds": place.seconds,
        "best_step": place.best_step if place.best is not None else place.step,
        "stopped_early": place.step < options.steps,
        **(place.best or {}),
    }


class _Training:
    """A training under way."""

    def __init__(
        self, student: Student, loss: Loss, data: TrainingData, options: TrainingOptions, state: StateFolder
    ) -> None:
        self.student, self.loss, self.data, self.options, self.state = student, loss, data, options, state
        self.learned = learned_parameters([("", student), *loss.modules])
        decayed = [p for name, p in self.learned.items() if p.ndim == 2 and not is_embedding(name)]
        others = [p for name, p in self.learned.items() if p.ndim != 2 or is_embedding(name)]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # fused: one pass over weights, gradients and moments; 135 M values in 0.3 s, one by one in ten times that.
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
        self.place = state.place
        self._validation = data.validation()

    def run(self, progress: Progress) -> None:
        """Take steps to the end."""
        place, options = self.place, self.options
        if place.step == 0 and place.best is None:
            self._report(self._validated({"step": 0, "tokens": 0}), progress)
        batches = self._batches()
        while place.step < options.steps and not self._is_waiting_too_long():
            line = self._step(batches)
            every = options.validate_every
            if place.step == options.steps or (every and place.step % every == 0):
                line = self._validated(line)
            self._report(line, progress)

    def _step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """Take one step and return its line of the curve."""
        place, options, started = self.place, self.options, time.perf_counter()
        rate = options.learning_rate_at(place.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for batch in itertools.islice(batches, options.batches_per_step):
            loss = self.loss(self.student, batch) / options.batches_per_step
            loss.backward()
            total += loss.item()
            place.tokens += batch.num_tokens
        norm = nn.utils.clip_grad_norm_(self.learned.values(), options.max_grad_norm).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise K2Error(
                f"at step {place.step + 1} the loss is {total}, its gradient {norm} long", remedy="lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        place.step += 1
        place.seconds += time.perf_counter() - started
        line = {"step": place.step, "tokens": place.tokens, "loss": total, "learning_rate": rate}
        return {**line, "gradient_norm": norm, "seconds": round(place.seconds, 3)}

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches from the place on, epoch after epoch."""
        place = self.place
        while True:
            used = place.batch
            for batch in itertools.islice(self.data.epoch(place.epoch), used, None):
                place.batch += 1
                yield batch
            if place.batch == 0:
                raise SpecError("there are no rows to train on")
            place.epoch, place.batch = place.epoch + 1, 0

    def _validated(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return `line` with what validation says, if there are rows for it; the best weights are kept."""
        if not self._validation:
            return line
        place, found = self.place, evaluate(self.student, self._validation, self.loss)
        if place.best is None or _goodness(found) > _goodness(place.best):
            place.best, place.best_step, place.waited = found, place.step, 0
            self.state.save_best(place, self.learned)
        else:
            place.waited += 1
        return {**line, **found}

    def _report(self, line: dict[str, Any], progress: Progress) -> None:
        """Log `line`, keep the state if it is time, and tell `progress`, whose error ends the training."""
        place = self.place
        is_last = place.step == self.options.steps or self._is_waiting_too_long()
        kept = place.best_step == place.step or place.step % self.options.checkpoint_every == 0 or is_last
        self.state.log(line)
        if kept:
            self.state.save(place, self.learned, self.optimizer)
        try:
            progress(line)
        except BaseException:
            if not kept:
                self.state.save(place, self.learned, self.optimizer)
            raise

    def _is_waiting_too_long(self) -> bool:
        return 0 < self.options.patience <= self.place.waited


def has_bfloat16_product(device: str) -> bool:
    """Return whether `device` has a bfloat16 product of its own; as a plain loop it takes six times float32's time."""
    return cpu.has_bfloat16_product() if device == "cpu" else torch.cuda.is_bf16_supported()


def is_embedding(name: str) -> bool:
    """Return whether parameter `name` is an embedding: rows that no token of a step met must not decay."""
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def _goodness(found: dict[str, float]) -> tuple[float, float]:
    return found.get("validation_accuracy", 0.0), -found["validation_loss"]


@torch.no_grad()
def evaluate(student: Student, batches: Sequence[Batch], loss: Loss) -> dict[str, float]:
    """Return the mean loss and accuracy of the labelled examples; without any, the mean of `loss` over batches."""
    count = 0
    total = right = 0.0
    for batch in batches:
        truths = [example.truths for example in batch.examples]
        if not any(truths):
            continue
        logprobs = student(batch).cpu()
        given = likeliest(logprobs, batch.examples[0].num_questions)
        total -= (
            torch.cat([row[list(wanted)] for row, wanted in zip(logprobs, truths, strict=True) if wanted]).sum().item()
        )
        for answers, wanted in zip(given, truths, strict=True):
            if wanted:
                right += len(set(wanted) & set(answers)) / len(wanted)
                count += 1
    if count:
        return {"validation_loss": total / count, "validation_accuracy": right / count}
    return {"validation_loss": sum(loss(student, batch).item() for batch in batches) / len(batches)}
