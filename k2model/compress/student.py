"""A model that is trained: made of a dense checkpoint, or one cut into experts, and written as a Hugging Face folder.

Legend: T packed tokens, D hidden_size, V vocabulary, N forks of all examples, C tokens that may follow one,
U distinct ones of all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from k2model.compress.convert import hub_config
from k2model.compress.examples import Batch, Forks, whole_tree
from k2model.compress.recipe import copy_tokenizer
from k2model.compress.student_attention import Packed
from k2model.compress.student_layers import Layer, MixtureOfExperts, Norm, Product, float32_product, rows_of
from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.rope import cos_sin, inverse_frequencies
from k2model.engine.candidates import ROOT
from k2model.engine.scores import log_probabilities
from k2model.formats.checkpoint import Checkpoint, open_checkpoint
from k2model.formats.export import write_tensors
from k2model.parameters import parameters
from kernels import cpu
from schemas.errors import SpecError


@dataclass(frozen=True, slots=True)
class ForkLogits:
    """What a student says at forks."""

    logits: Tensor
    """[N, C] float64; -inf where a fork has fewer than C."""
    rows: Tensor
    """[N] int64: the example each fork is of."""
    truths: Tensor
    """[N] int64: which token the right answer takes; -1 where it does not pass."""
    states: list[Tensor]
    """[T, D] what leaves each layer that was asked for, before the final norm."""


class Student(nn.Module):
    """Weights that learn. `state_dict` has the names of a checkpoint's tensors."""

    def __init__(self, config_json: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Checkpoint) -> None:
        """Make a student.

        Args:
            config_json: a config.json without quantization; sizes are the same in all layers, as other engines expect.
            tensors: every tensor by the model's names (k2model/parameters.py), float32; `lm_head.weight` unless tied.
            source: a checkpoint whose tokenizer goes with it.

        Raises: SpecError for other routed experts, or latent attention; RuntimeError for tensors that do not fit.
        """
        super().__init__()
        self.config_json = dict(config_json)
        self.config = config = ModelConfig.from_dict(config_json, source.name)
        if not isinstance(config.attention, AttentionConfig) or not _has_experts_as_cut_here(config):
            what = "other routed experts" if isinstance(config.attention, AttentionConfig) else "latent attention"
            raise SpecError(
                f"{source.name}: a {config.family} model has {what}, and dense ones and those cut here are trained",
                remedy="give a llama, qwen2 or qwen3 checkpoint, or one of the step `experts`",
            )
        self.source = source
        self.product: Product = float32_product
        """How linears are computed."""
        self.has_int8_embedding = False
        """Whether the INT8 checkpoint that `int8_product` is for has the embedding's rows in INT8."""
        with torch.device("meta"):
            self.model = _Model(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.load_state_dict(dict(tensors), assign=True)
        self._frequencies = inverse_frequencies(config.rope)

    @classmethod
    def open(cls, name: str) -> Self:
        """Return the model of checkpoint `name`, expanded to float32. Raises: CheckpointError; SpecError."""
        source = open_checkpoint(name)
        config, weights = source.config(), source.weights()
        weights.check(parameters(config), tied=config.tie_word_embeddings)
        stored = (each for each in parameters(config) if each.role != "head" or not weights.is_tied)
        tensors = {parameter.name: weights.expanded(parameter) for parameter in stored}
        tied = {"tie_word_embeddings": weights.is_tied, "torch_dtype": "float32"}
        return cls({**hub_config(source.config_json()), **tied}, tensors, source)

    def save(self, folder: Path) -> None:
        """Write a checkpoint of float32 weights into `folder`; the weights last, so that what opens is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(self.source, folder)
        (folder / "config.json").write_text(json.dumps(self.config_json, indent=1), encoding="utf-8")
        write_tensors(folder / "model.safetensors", self.state_dict())

    def freeze(self, num_layers: int) -> None:
        """Keep the embedding and the first `num_layers` layers as they are, and compute no gradient there; 0 for none.

        A head that is tied to the embedding stays with it.
        """
        if not 0 <= num_layers <= self.config.num_hidden_layers:
            count = self.config.num_hidden_layers
            raise SpecError(f"freeze_layers is {num_layers}, and the model has {count} layers")
        if num_layers:
            self.model.embed_tokens.requires_grad_(False)
        for layer in self.model.layers[:num_layers]:
            layer.requires_grad_(False)

    @property
    def head(self) -> Tensor:
        """The output embedding [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def imbalance(self) -> Tensor:
        """Return how unevenly experts were chosen in the last pass, a scalar, at least about 1; 0 without experts."""
        layers = [layer.mlp.imbalance for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        return torch.stack(layers).mean() if layers else self.head.new_zeros(())

    def forward(self, batch: Batch) -> Tensor:
        """Return the log-probability of every candidate [examples, candidates] float64, as the engine scores them."""
        tree = batch.tree
        if not tree.parents:  # one candidate, or none that differ
            return torch.zeros(len(batch.examples), tree.num_candidates, dtype=torch.float64)
        found = self.fork_logits(batch, [whole_tree(tree)] * len(batch.examples))
        return log_probabilities(tree, found.logits.unflatten(0, (len(batch.examples), -1)))

    def fork_logits(self, batch: Batch, forks: Sequence[Forks], keep: Sequence[int] = ()) -> ForkLogits:
        """Return the logits of the tokens that may follow at every example's forks.

        Args:
            batch: the examples.
            forks: of each example; at least one in all.
            keep: layers whose output is wanted, ascending.
        """
        device = self.head.device
        packed = Packed(batch, forks, device)
        asked: list[int] = []
        rows: list[int] = []
        targets: list[tuple[int, ...]] = []
        truths: list[int] = []
        for row, (end, asks) in enumerate(zip(packed.ends.tolist(), forks, strict=True)):
            asked += [end + (-1 if parent == ROOT else parent) for parent in asks.parents]
            rows += [row] * len(asks.parents)
            targets += asks.targets
            truths += asks.truths
        token_ids = sorted({token_id for ids in targets for token_id in ids})
        place = {token_id: index for index, token_id in enumerate(token_ids)}
        width = max(map(len, targets))
        columns = [[*map(place.__getitem__, ids), *[-1] * (width - len(ids))] for ids in targets]
        columns_on = torch.tensor(columns, device=device)
        hidden, states = self.hidden(packed, torch.tensor(asked, device=device), keep)
        is_int8 = self.has_int8_embedding and self.config.tie_word_embeddings
        head = rows_of(self.head, torch.tensor(token_ids, device=device), self.product, is_int8=is_int8)
        logits = cpu.row_matmul(hidden, head.t()).double()  # [N, U]
        logits = logits.gather(1, columns_on.clamp(min=0)).masked_fill(columns_on < 0, float("-inf"))
        return ForkLogits(logits, torch.tensor(rows, device=device), torch.tensor(truths, device=device), states)

    def hidden(self, packed: Packed, asked: Tensor, keep: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return what stands at places `asked` [N] after the final norm [N, D], and what leaves layers `keep` [T, D].

        The last layer is computed to its end for those places alone, unless it is kept.
        """
        frequencies = self._frequencies.to(packed.positions.device)
        rope = cos_sin(self.config.rope, frequencies, packed.positions)
        table, is_int8 = self.model.embed_tokens.weight, self.has_int8_embedding
        x = rows_of(table, packed.token_ids, self.product, is_int8=is_int8)
        states, last = [], self.config.num_hidden_layers - 1
        for index, (layer, window) in enumerate(zip(self.model.layers, self.config.sliding_windows, strict=True)):
            read = asked if index == last and last not in keep else None
            x = layer(x, rope, packed, window, self.product, read)
            if index in keep:
                states.append(x)
        return self.model.norm(x.index_select(0, asked) if last in keep else x), states


def _has_experts_as_cut_here(config: ModelConfig) -> bool:
    """Return whether the experts of `config`, if it has any, are as `cut_experts` makes them."""
    moe = config.moe
    return moe is None or (config.family == "glm4_moe" and moe.n_group == 1 and not moe.norm_topk_prob)


class _Model(nn.Module):
    """Everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
