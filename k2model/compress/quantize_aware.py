"""Quantization-aware training: the forward pass is that of the INT8 checkpoint it becomes, to the bit.

Quantization without training is `k2batch models convert`; this begins where that ends, its balance included.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from k2model.compress.calibrate import calibration_ids, start_calibration
from k2model.compress.convert import Embedding, convert
from k2model.compress.distill import DistillationLoss, Mix, open_teacher
from k2model.compress.examples import TrainingData
from k2model.compress.recipe import copy_tokenizer, open_tokenizer
from k2model.compress.smooth import balance
from k2model.compress.student import Student
from k2model.compress.student_layers import int8_product
from k2model.compress.train import LabelLoss, Loss, Progress, TrainingOptions, made_of, train
from k2model.compress.train_state import StateFolder
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from k2model.formats.weights import in_memory
from k2model.parameters import layer_parameters


def quantize_aware(
    source: str,
    target: Path,
    data: TrainingData,
    options: TrainingOptions,
    progress: Progress,
    *,
    teacher: str | None = None,
    mix: Mix | None = None,
    embedding: Embedding = "bf16",
) -> dict[str, Any]:
    """Train checkpoint `source` under INT8 arithmetic and write it as W8A8 compressed-tensors; return the facts of it.

    Args:
        source: a dense checkpoint.
        target: as of `tune`, but becomes an INT8 checkpoint.
        data: the examples, labelled if there is no teacher.
        options: of the training.
        progress: told of every step.
        teacher: a dense checkpoint whose answers are learned; `source` itself is a good one. None for labels alone.
        mix: what is learned from, with a teacher.
        embedding: how the input embedding is stored, and computed from the first step on.

    Raises: as `tune`.
    """
    mix = mix or Mix(hidden_weight=0.0)
    taught_by = {"teacher": fingerprint(teacher, "fp32"), "mix": asdict(mix)} if teacher else {}
    state = StateFolder(target, made_of("quantize", source, data, options, embedding=embedding, **taught_by))
    student = Student.open(source)
    loss: Loss = LabelLoss(options.label_smoothing)
    if teacher:
        loss = DistillationLoss(open_teacher(teacher, options), student, mix, options.label_smoothing)
    balance_outliers(student)
    student.product, student.has_int8_embedding = int8_product, embedding == "int8"
    facts = train(student, loss, data, options, state, progress)
    student.save(state.folder / "float")
    copy_tokenizer(student.source, target)
    convert(open_checkpoint(str(state.folder / "float")), target, None, embedding=embedding, alpha=0.0)
    state.remove()
    return {"kind": "quantize", **facts}


@torch.no_grad()
def balance_outliers(student: Student) -> None:
    """Balance `student` as a conversion does (k2model/compress/smooth.py): it computes the same, and rounds better."""
    config, tensors = student.config, dict(student.state_dict())
    prompts = calibration_ids(open_tokenizer(student.source))
    calibration = start_calibration(config, in_memory(tensors, student.source.name), prompts)
    for index in range(config.num_hidden_layers):
        strengths = calibration.run(index)
        members = list(layer_parameters(config, index))
        reaches = {p.name.removesuffix(".weight"): tensors[p.name].abs().amax(dim=0) for p in members if p.is_linear}
        made = balance(config, index, strengths, reaches, set())
        for parameter in members:
            name, tensor = parameter.name, tensors[parameter.name]
            is_linear = parameter.is_linear
            balanced = made.weight(name.removesuffix(".weight"), tensor) if is_linear else made.vector(name, tensor)
            tensor.copy_(balanced)
