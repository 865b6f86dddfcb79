"""Quantization-aware training: what it computes is what the engine computes of the checkpoint it writes, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from k2model.compress import calibrate
from k2model.compress.convert import Embedding, convert
from k2model.compress.examples import Batch, Example
from k2model.compress.quantize_aware import quantize_aware
from k2model.compress.recipe import copy_tokenizer, is_quantized
from k2model.compress.student import Student
from k2model.compress.student_layers import int8_product
from k2model.compress.train import TrainingOptions
from k2model.compress.train_state import read_curve
from k2model.formats.checkpoint import open_checkpoint
from k2model.tokenizer import Tokenizer
from tests.checkpoints import write_checkpoint
from tests.test_k2model_compress_student import DENSE, LABELS, engine_logprobs
from tests.test_k2model_export import from_transformers, quantized, stored
from tests.training import Rows, batch


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Balance over every tenth of the shipped texts."""
    some = calibrate.calibration_texts()[::10]
    monkeypatch.setattr(calibrate, "calibration_texts", lambda: some)


def said(line: dict[str, Any]) -> None:
    pass


def exported_from(folder: Path, embedding: Embedding = "bf16") -> Path:
    """Return the INT8 checkpoint made of a float one as it is, unbalanced."""
    exported = folder.with_name("exported")
    exported.mkdir()
    copy_tokenizer(open_checkpoint(str(folder)), exported)
    convert(open_checkpoint(str(folder)), exported, None, embedding=embedding, alpha=0.0)
    return exported


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("num_prefix", [0, 9, 40])
def test_a_forward_pass_is_the_engines_of_the_exported_folder(family: str, num_prefix: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", family=family, outlier=20.0)
    student, exported = Student.open(str(folder)), exported_from(folder)
    student.product = int8_product
    for seed in range(2):
        asked = batch(11, seed, prefix=range(100, 100 + num_prefix))
        assert torch.equal(student(asked), engine_logprobs(exported, asked, "int8"))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_an_int8_embedding_are_the_engines_too(tied: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", outlier=20.0, tie_word_embeddings=tied)
    student, exported = Student.open(str(folder)), exported_from(folder, "int8")
    student.product, student.has_int8_embedding = int8_product, True
    asked = batch(11, 0, prefix=range(100, 109))
    assert torch.equal(student(asked), engine_logprobs(exported, asked, "int8"))
    student.has_int8_embedding = False
    assert not torch.equal(student(asked), engine_logprobs(exported, asked, "int8"))


@pytest.mark.parametrize(("family", "embedding"), [("llama", "bf16"), ("llama", "int8"), ("qwen3", "bf16")])
def test_what_was_validated_is_what_the_engine_says_of_the_folder(
    family: str, embedding: Embedding, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", family=family, outlier=20.0)
    target, data = tmp_path / "target", Rows()
    options = TrainingOptions(steps=4, learning_rate=1e-3, validate_every=2)
    facts = quantize_aware(str(source), target, data, options, said, embedding=embedding)
    assert facts["best_step"] in (2, 4)
    (validated,) = data.validation()
    logprobs = engine_logprobs(target, validated, "int8")
    truths = torch.tensor([example.truths for example in validated.examples])
    assert facts["validation_loss"] == -logprobs.gather(1, truths).sum().item() / len(truths)
    assert is_quantized(open_checkpoint(str(target)))
    assert not (target / "checkpoint").exists()
    if embedding == "int8":
        return  # which transformers does not expand
    theirs = from_transformers(target)
    with torch.no_grad():
        logits = theirs(torch.tensor([validated.examples[0].prompt_ids]), use_cache=False).logits[0, -1, [10, 20]]
    assert logits.isfinite().all()


def test_it_begins_where_a_conversion_ends(tmp_path: Path) -> None:
    """Steps that make it worse leave the conversion itself: nothing answers as its teacher does but that."""
    source = write_checkpoint(tmp_path / "source", outlier=20.0)
    options = TrainingOptions(steps=3, learning_rate=10.0)
    data = Rows(labelled=False)
    facts = quantize_aware(str(source), tmp_path / "target", data, options, said, teacher=str(source))
    assert facts["best_step"] == 0
    converted = tmp_path / "converted"
    converted.mkdir()
    convert(open_checkpoint(str(source)), converted, Tokenizer.open(source))
    ours, theirs = quantized(tmp_path / "target"), quantized(converted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert stored(tmp_path / "target").keys() == stored(converted).keys()


def test_a_teacher_pulls_it_back_to_its_own_answers(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", outlier=20.0)
    options = TrainingOptions(steps=10, learning_rate=3e-5)
    data = Rows(rows=16, per_epoch=100, labelled=False)
    quantize_aware(str(source), tmp_path / "target", data, options, said, teacher=str(source))
    curve = [line["validation_loss"] for line in read_curve(tmp_path / "target") if "validation_loss" in line]
    assert curve[-1] < 0.6 * curve[0]


def test_thirty_labels_at_the_width_of_the_default_model_are_scored_to_the_bit_too(tmp_path: Path) -> None:
    """Sums of 1,536 products go by two blocks; some batches fill more than one step of the engine."""
    sizes: Any = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    folder = write_checkpoint(tmp_path / "source", **sizes)
    student, exported = Student.open(str(folder)), exported_from(folder)
    student.product = int8_product
    asked = Batch(tuple(Example((*range(50), *range(n), 9), 50, LABELS, (0,)) for n in range(20, 90, 3)))
    assert torch.equal(student(asked), engine_logprobs(exported, asked, "int8"))
