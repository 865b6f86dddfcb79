"""Structured pruning: key-value heads with their query heads, feed-forward neurons and layers leave, matrices shrink.

What leaves is what the loss would miss least, to first order: |Σ g w| over the weights by which a part reaches the
residual stream, which is the loss's derivative by that part's own scale, added up over batches (Taylor importance,
arXiv 1906.10771, with its groups). Every layer keeps the same number of each, as the config.json of Hugging Face and
every engine that reads it want; which ones, each layer chooses for itself.

Legend: L layers, G key-value heads, F neurons, D hidden_size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.compress.examples import Batch, TrainingData, likeliest
from k2model.compress.student import Student
from k2model.compress.train import surprise
from k2model.config import AttentionConfig, ModelConfig
from k2model.formats.finished import finished_folder
from schemas.errors import SpecError

_READ = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""The weights of a layer by which its parts reach the residual stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """What stays of each kind; 0 for all of it."""

    num_hidden_layers: int = 0
    num_key_value_heads: int = 0
    """Of each layer, with the query heads that read them."""
    intermediate_size: int = 0
    layers_by: str = "importance"
    """Which layers leave: `importance`, or `depth`, which keeps the first."""
    rows: int = 256
    """Rows that importance is measured on."""


@dataclass(frozen=True, slots=True)
class Importance:
    """What the loss would miss without each part."""

    layers: Tensor
    """[L]"""
    groups: Tensor
    """[L, G]: a key-value head, with the query heads that read it."""
    neurons: Tensor
    """[L, F]"""

    def plus(self, other: "Importance") -> "Importance":
        """Return the sum."""
        layers, groups, neurons = self.layers + other.layers, self.groups + other.groups, self.neurons + other.neurons
        return Importance(layers, groups, neurons)


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays, each ascending."""

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    """Of each layer that stays."""
    neurons: tuple[tuple[int, ...], ...]


def prune(
    source: str, target: Path, data: TrainingData, options: Pruning, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Write what stays of checkpoint `source` into the folder `target`; return its sizes and what was kept.

    Args:
        source: a dense checkpoint.
        target: empty or not there; appears when it is whole.
        data: what importance is measured on; rows without a truth count by the model's own answer.
        options: what stays.
        progress: told of each batch.

    Raises: CheckpointError; SpecError for a model with experts, or if more is to stay than there is.
    """
    student = Student.open(source)
    sizes = _sizes(student.config, options)
    importance = measure(student, data, options.rows, progress)
    kept = choose(importance, **sizes, layers_by=options.layers_by)
    weights = student.state_dict()
    config_json = shrunk(student.config_json, student.config, kept)
    with finished_folder(target) as folder:
        Student(config_json, shrink(weights, student.config, kept), student.source).save(folder)
    return {**sizes, "layers_kept": list(kept.layers), "importance_kept": _shares(importance, kept)}


def _sizes(config: ModelConfig, options: Pruning) -> dict[str, int]:
    """Return how many of each stay. Raises: SpecError."""
    attention = check_dense(config)
    whole = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": attention.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
    }
    wanted = {name: getattr(options, name) or size for name, size in whole.items()}
    for name, size in wanted.items():
        if size > whole[name]:
            raise SpecError(f"prune: {name} = {size}, and the model has {whole[name]}", remedy="0 keeps all")
    return wanted


def _shares(importance: Importance, kept: Kept) -> dict[str, float]:
    """Return the share of all importance that stays, by kind; of heads and neurons within the layers that stay."""
    layers = list(kept.layers)

    def share(values: Tensor, chosen: tuple[tuple[int, ...], ...]) -> float:
        some = sum(float(values[layer, list(places)].sum()) for layer, places in zip(layers, chosen, strict=True))
        return round(some / max(float(values[layers].sum()), 1e-30), 4)

    of_layers = float(importance.layers[layers].sum()) / max(float(importance.layers.sum()), 1e-30)
    return {
        "layers": round(of_layers, 4),
        "heads": share(importance.groups, kept.groups),
        "neurons": share(importance.neurons, kept.neurons),
    }


def measure(student: Student, data: TrainingData, rows: int, progress: Callable[[dict[str, Any]], None]) -> Importance:
    """Return the importances on the first `rows` training rows or a few more, one gradient a batch."""
    for name, weight in student.named_parameters():
        weight.requires_grad_(name.endswith(_READ))
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    total, done = None, 0
    for batch in _batches(data):
        loss = _loss(student, batch)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        with torch.no_grad():
            found = taylor(weights, gradients, student.config)
        total = found if total is None else total.plus(found)
        done += len(batch.examples)
        progress({"rows": done, "of": rows, "loss": float(loss.detach()) / len(batch.examples)})
        if done >= rows:
            return total
    raise AssertionError("unreachable")


def _batches(data: TrainingData) -> Iterator[Batch]:
    for number in count():
        yield from data.epoch(number)


def _loss(student: Student, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the true answers; of rows without one, of the likeliest."""
    if any(example.truths is None for example in batch.examples):
        with torch.no_grad():
            own = likeliest(student(batch).cpu(), batch.examples[0].num_questions)
        batch = Batch(tuple(replace(e, truths=e.truths or best) for e, best in zip(batch.examples, own, strict=True)))
    return surprise(student, batch)


def taylor(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], config: ModelConfig) -> Importance:
    """Return the importances by one batch's gradients of the loss. Both mappings have the model's own names."""
    attention = check_dense(config)
    layers, groups, neurons = [], [], []
    for index in range(config.num_hidden_layers):
        products = [
            (weights[name] * gradients[name]).sum(dim=0) for name in (f"model.layers.{index}.{part}" for part in _READ)
        ]
        layers.append((products[0].sum() + products[1].sum()).abs())
        groups.append(products[0].view(attention.num_key_value_heads, -1).sum(dim=1).abs())
        neurons.append(products[1].abs())
    return Importance(torch.stack(layers), torch.stack(groups), torch.stack(neurons))


def choose(
    importance: Importance,
    *,
    num_hidden_layers: int,
    num_key_value_heads: int,
    intermediate_size: int,
    layers_by: str = "importance",
) -> Kept:
    """Return what stays: so many of each, those of highest importance; of equals, the first.

    Args:
        importance: of every part.
        num_hidden_layers: layers that stay.
        num_key_value_heads: of each layer.
        intermediate_size: neurons of each layer.
        layers_by: `importance`, or `depth`, which keeps the first layers.
    """
    order = importance.layers if layers_by == "importance" else -torch.arange(len(importance.layers)).float()
    layers = _best(order, num_hidden_layers)
    return Kept(
        layers,
        tuple(_best(importance.groups[index], num_key_value_heads) for index in layers),
        tuple(_best(importance.neurons[index], intermediate_size) for index in layers),
    )


def _best(importance: Tensor, count: int) -> tuple[int, ...]:
    order = importance.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(int(index) for index in order))


def shrink(weights: Mapping[str, Tensor], config: ModelConfig, kept: Kept) -> dict[str, Tensor]:
    """Return the weights that stay, cut to what stays of them, by the names that they have then."""
    attention = check_dense(config)
    found = {name: weight for name, weight in weights.items() if not name.startswith("model.layers.")}
    per_group = attention.num_attention_heads // attention.num_key_value_heads * attention.head_dim
    for new, (old, groups, neurons) in enumerate(zip(kept.layers, kept.groups, kept.neurons, strict=True)):
        of_queries, of_keys = _spans(groups, per_group), _spans(groups, attention.head_dim)
        rows = {"q_proj": of_queries, "k_proj": of_keys, "v_proj": of_keys, "gate_proj": neurons, "up_proj": neurons}
        columns = {"o_proj": of_queries, "down_proj": neurons}
        prefix = f"model.layers.{old}."
        for name in (name for name in weights if name.startswith(prefix)):
            part, weight = name.rsplit(".", 2)[-2], weights[name]
            if part in rows:  # and its bias
                weight = weight[torch.tensor(rows[part])]
            elif part in columns and weight.ndim == 2:
                weight = weight[:, torch.tensor(columns[part])]
            found[f"model.layers.{new}.{name.removeprefix(prefix)}"] = weight.contiguous()
    return found


def _spans(groups: tuple[int, ...], size: int) -> list[int]:
    return [row for group in groups for row in range(group * size, (group + 1) * size)]


def shrunk(raw: Mapping[str, Any], config: ModelConfig, kept: Kept) -> dict[str, Any]:
    """Return config.json `raw` for what stays."""
    attention = check_dense(config)
    heads = len(kept.groups[0])
    sizes = {
        "num_hidden_layers": len(kept.layers),
        "num_attention_heads": heads * attention.num_attention_heads // attention.num_key_value_heads,
        "num_key_value_heads": heads,
        "head_dim": attention.head_dim,  # no longer hidden_size / num_attention_heads
        "intermediate_size": len(kept.neurons[0]),
    }
    windows = [config.sliding_windows[index] for index in kept.layers]
    if any(windows):  # else told by the number of a layer, which may be another one now
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {**raw, **sizes, "layer_types": types}
    return {**raw, **sizes}


def check_dense(config: ModelConfig) -> AttentionConfig:
    """Return the attention of a model that can be pruned. Raises: SpecError if it has experts or latent attention."""
    if any(config.is_moe) or not isinstance(config.attention, AttentionConfig):
        raise SpecError(
            f"prune: the {config.family} model has experts or latent attention",
            remedy="prune a dense model, before it is cut into experts",
        )
    return config.attention
