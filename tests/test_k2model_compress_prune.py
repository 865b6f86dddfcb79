"""Pruning: matrices shrink, what matters least leaves, and what is left computes what it computed."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.compress.examples import Batch, Example
from k2model.compress.prune import Pruning, choose, measure, prune, shrink
from k2model.compress.student import Student
from k2model.engine.engine import Engine
from k2model.engine.request import Candidate, Request
from schemas.errors import SpecError
from tests.checkpoints import write_checkpoint

CANDIDATES = (Candidate((10, 11, 12), 3), Candidate((10, 13), 2), Candidate((20,), 1))
LAYERS = 3


class Rows:
    """Twelve batches of four ragged prompts, drawn by a seed."""

    digest = "rows"

    def __init__(self, seed: int = 0, truths: bool = True) -> None:
        draw = random.Random(seed)
        prefix = tuple(draw.randrange(256) for _ in range(9))
        self.batches = []
        for _ in range(12):
            bodies = [tuple(draw.randrange(256) for _ in range(draw.randint(1, 30))) for _ in range(4)]
            answers = [draw.randrange(3) if truths else None for _ in bodies]
            examples = [
                Example(prefix + b, len(prefix), CANDIDATES, None if a is None else (a,))
                for b, a in zip(bodies, answers, strict=True)
            ]
            self.batches.append(Batch(tuple(examples)))

    def epoch(self, number: int) -> Iterator[Batch]:
        yield from self.batches

    def validation(self) -> Sequence[Batch]:
        return self.batches


def pruned(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    return prune(str(source), target, Rows(), Pruning(rows=16, **options), lambda facts: None)


def answers(folder: Path) -> list[tuple[float, ...]]:
    """Return what the engine says in float32."""
    engine = Engine.open(str(folder), precision="fp32")
    examples = [example for batch in Rows().batches for example in batch.examples]
    requests = [
        Request(prompt_ids=e.prompt_ids, num_prefix_tokens=e.num_prefix_tokens, candidates=e.candidates)
        for e in examples
    ]
    try:
        return [completion.logprobs for completion in engine.submit(requests).result()]
    finally:
        engine.close()


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", family=request.param, num_hidden_layers=LAYERS)


def test_with_nothing_pruned_every_bit_stays(source: Path, tmp_path: Path) -> None:
    facts = pruned(source, tmp_path / "same")
    assert facts["layers_kept"] == [0, 1, 2]
    assert facts["importance_kept"] == {"layers": 1.0, "heads": 1.0, "neurons": 1.0}
    assert answers(tmp_path / "same") == answers(source)


def test_matrices_shrink_and_other_engines_open_them(source: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 1, "intermediate_size": 60}
    assert pruned(source, tmp_path / "small", **sizes).items() >= sizes.items()
    student = Student.open(str(tmp_path / "small"))
    shapes = {name: tuple(weight.shape) for name, weight in student.state_dict().items()}
    head_dim = student.config_json["head_dim"]
    assert len([name for name in shapes if name.endswith("o_proj.weight")]) == 2
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (3 * head_dim, 48)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (head_dim, 48)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (48, 3 * head_dim)
    assert shapes["model.layers.1.mlp.gate_proj.weight"] == (60, 48)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (48, 60)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    engine = answers(tmp_path / "small")
    example = Rows().batches[0].examples[0]
    with torch.inference_mode():
        logits = theirs(torch.tensor([example.prompt_ids])).logits[0, -1].double()
    # The first fork is between tokens 10 and 20; that label's own probability is candidate 2's.
    expected = torch.log_softmax(logits[[10, 20]], dim=0)[1]
    assert float(expected) == pytest.approx(engine[0][2], abs=2e-5)


def test_neurons_that_reach_nothing_leave_first_and_change_nothing(tmp_path: Path) -> None:
    student = Student.open(str(write_checkpoint(tmp_path / "source", num_hidden_layers=LAYERS)))
    dead = {0: [1, 40, 95], 1: [0, 2, 3], 2: [50, 60, 70]}
    with torch.no_grad():
        for index, neurons in dead.items():
            student.get_parameter(f"model.layers.{index}.mlp.down_proj.weight")[:, neurons] = 0
    student.save(tmp_path / "dead")
    pruned(tmp_path / "dead", tmp_path / "small", intermediate_size=93)
    kept = Student.open(str(tmp_path / "small")).state_dict()
    for index, neurons in dead.items():
        name = f"model.layers.{index}.mlp.down_proj.weight"
        left = [neuron for neuron in range(96) if neuron not in neurons]
        assert torch.equal(kept[name], student.state_dict()[name][:, left])
    before, after = answers(tmp_path / "dead"), answers(tmp_path / "small")
    # Sums over 93 neurons instead of 96, in float32, differ in their order alone.
    assert max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)) < 2e-5


def test_importance_is_the_derivative_by_a_parts_own_scale(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", num_hidden_layers=LAYERS)
    rows = Rows()
    found = measure(Student.open(str(folder)), rows, 4, lambda facts: None)

    def loss(change: dict[str, Tensor]) -> float:
        student = Student.open(str(folder)).double()
        for name, scale in change.items():
            weight = student.get_parameter(name)
            weight.data *= scale
        batch = rows.batches[0]
        truths = [(example.truths or ())[0] for example in batch.examples]
        with torch.inference_mode():
            return -float(student(batch)[torch.arange(4), truths].sum())

    def slope(change: dict[str, Tensor]) -> float:
        step = 1e-3
        up, down = ({k: 1 + s * step * v for k, v in change.items()} for s in (1, -1))
        return abs(loss(up) - loss(down)) / (2 * step)

    o_proj, down_proj = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"
    second_group = torch.cat([torch.zeros(24), torch.ones(24)]).double()
    neuron = torch.zeros(96).double()
    neuron[7] = 1
    assert slope({o_proj: second_group}) == pytest.approx(float(found.groups[1, 1]), rel=0.02)
    assert slope({down_proj: neuron}) == pytest.approx(float(found.neurons[1, 7]), rel=0.02)
    whole = {o_proj: torch.ones(48).double(), down_proj: torch.ones(96).double()}
    assert slope(whole) == pytest.approx(float(found.layers[1]), rel=0.02)


def test_rows_without_a_label_count_by_the_models_own_answer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", num_hidden_layers=LAYERS)
    rows = Rows(truths=False)
    found = measure(Student.open(str(folder)), rows, 8, lambda facts: None)
    assert float(found.neurons.min()) >= 0
    assert float(found.layers.min()) > 0


def test_layers_leave_by_importance_or_from_the_end(tmp_path: Path) -> None:
    student = Student.open(str(write_checkpoint(tmp_path / "source", num_hidden_layers=LAYERS)))
    found = measure(student, Rows(), 16, lambda facts: None)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 96}
    least = int(found.layers.argmin())
    assert choose(found, **sizes).layers == tuple(layer for layer in range(LAYERS) if layer != least)
    kept = choose(found, **sizes, layers_by="depth")
    assert kept.layers == (0, 1)
    weights = shrink(student.state_dict(), student.config, choose(found, **sizes))
    last = f"model.layers.{2 if least < 2 else 1}.mlp.up_proj.weight"
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], student.get_parameter(last))


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source")
    with pytest.raises(SpecError, match="intermediate_size = 97, and the model has 96"):
        pruned(folder, tmp_path / "out", intermediate_size=97)
    with pytest.raises(SpecError, match="experts"):
        pruned(write_checkpoint(tmp_path / "moe", family="qwen3_moe"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_config_json_says_the_head_size_it_no_longer_follows(tmp_path: Path) -> None:
    pruned(write_checkpoint(tmp_path / "source"), tmp_path / "small", num_key_value_heads=1)
    raw = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]) == (3, 1, 8)
