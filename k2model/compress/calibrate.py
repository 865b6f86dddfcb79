"""Calibration: how strong each input channel of a linear layer is, over the shipped texts, a layer at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from k2model.config import ModelConfig
from k2model.decoder.feed_forward import FeedForward, MixtureOfExperts, read_expert
from k2model.decoder.linear import LinearReader
from k2model.decoder.model import Layer, page_pool, read_layer
from k2model.decoder.rope import cos_sin, inverse_frequencies
from k2model.decoder.step import Span, Step
from k2model.formats.checkpoint import calibration_path
from k2model.formats.weights import Weights
from k2model.parameters import layer_parameters
from k2model.tokenizer import Tokenizer
from kernels import rowwise

_MAX_TOKENS = 512
"""Of one text."""

_MAX_VALUES = 2**26
"""Hidden states kept, 256 MB: all 256 texts for SmolLM2, the first 9,000 tokens for a hidden size of 7168."""

_PROMPTS_AT_ONCE = 16
_TOKENS_AT_ONCE = 1024


@dataclass(slots=True)
class Strength:
    """The energy of each input channel of a linear, every token counted alike.

    Each token has its own scale at run time, so a channel matters as far as it outgrows the token's other channels.
    The largest |input|, as SmoothQuant takes it, is set by the few tokens that everything attends to.
    """

    energy: Tensor
    """[K] float32."""
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count the tokens of `x` [T, K]."""
        for block in x.split(_TOKENS_AT_ONCE):
            energy = block.square()
            self.energy += energy.div_(energy.mean(dim=1, keepdim=True).clamp_min_(1e-12)).sum(dim=0)
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the root mean square of each channel relative to its token's, 1 on average; 0 without tokens."""
        return (self.energy / max(self.tokens, 1)).sqrt()


@dataclass(slots=True)
class _Watching:
    """Reads linears that note the strength of their inputs under the names of all linears that share them."""

    reader: LinearReader
    strengths: dict[str, Strength] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return self.reader.weights

    def read(self, names: list[tuple[str, int]], k: int, **options: Any) -> Any:
        linear = self.reader.read(names, k, **options)
        strength = Strength(torch.zeros(k))
        self.strengths.update({name: strength for name, _ in names})

        def watched(x: Tensor) -> Tensor:
            strength.add(x)
            return linear(x)

        return watched


@dataclass(frozen=True, slots=True)
class _Experts(Sequence[FeedForward]):
    """A layer's experts, each read when its tokens come, so that one is in memory at a time."""

    config: ModelConfig
    layer: int
    reader: _Watching

    def __len__(self) -> int:
        assert self.config.moe is not None
        return self.config.moe.n_routed_experts

    def __getitem__(self, expert: Any) -> Any:
        reader: Any = self.reader
        return read_expert(self.config, self.layer, expert, reader)


@dataclass(slots=True)
class Calibration:
    """Hidden states of the calibration prompts, on their way through the layers of a model that need not fit memory."""

    config: ModelConfig
    weights: Weights
    prompts: list[list[int]]
    hidden: Tensor
    """[T, D] float32: what enters the next layer."""

    @torch.inference_mode()
    def run(self, index: int) -> dict[str, Tensor]:
        """Move the hidden states through layer `index`; return the strength of every linear's input channels [K].

        Linears in a layer that no token reached have strength 0.
        """
        watching = _Watching(LinearReader(self.weights, torch.float32, expand=True))
        reader: Any = watching
        experts = _Experts(self.config, index, watching) if self.config.is_moe[index] else None
        layer = read_layer(self.config, index, reader, reader, experts)
        entering = Strength(torch.zeros(self.config.hidden_size))
        self.attend(index, layer)
        # Each expert is read once a block, so there is but one.
        at_once = len(self.hidden) if isinstance(layer.feed_forward, MixtureOfExperts) else _TOKENS_AT_ONCE
        for block in self.hidden.split(at_once):
            h = rowwise.rms_norm(block, layer.post_attention_layernorm, layer.eps)
            entering.add(h)
            block += layer.feed_forward.forward(h)
        strengths = {name: strength.value() for name, strength in watching.strengths.items()}
        for parameter in layer_parameters(self.config, index):
            name = parameter.name.removesuffix(".weight")
            if parameter.is_linear and ".mlp." in name:
                if not name.endswith("down_proj"):
                    strengths[name] = entering.value()
                elif name not in strengths:
                    strengths[name] = torch.zeros(parameter.shape[1])
        return strengths

    def attend(self, index: int, layer: Layer) -> None:
        """Move the hidden states through the attention of `layer`, which is layer `index`."""
        for tokens, step in self._steps():
            x = self.hidden[tokens]
            h = rowwise.rms_norm(x, layer.input_layernorm, layer.eps)
            rope = cos_sin(self.config.rope, inverse_frequencies(self.config.rope), step.positions)
            window = self.config.sliding_windows[index]
            self.hidden[tokens] = x + layer.attention.forward(h, rope, step, window, torch.float32)

    def _steps(self) -> Iterator[tuple[slice, Step]]:
        """Yield every step, and where its tokens stand among all."""
        start, pool = 0, page_pool(self.config, torch.float32)
        for first in range(0, len(self.prompts), _PROMPTS_AT_ONCE):
            prompts = self.prompts[first : first + _PROMPTS_AT_ONCE]
            step = Step(pool, [Span(tuple(ids)) for ids in prompts])
            yield slice(start, start + len(step.token_ids)), step
            start += len(step.token_ids)


def start_calibration(config: ModelConfig, weights: Weights, prompts: list[list[int]]) -> Calibration:
    """Return the calibration before the first layer, with as many of `prompts` as are kept at this hidden size."""
    kept: list[list[int]] = []
    tokens = 0
    for ids in prompts:
        if kept and (tokens + len(ids)) * config.hidden_size > _MAX_VALUES:
            break
        kept.append(ids)
        tokens += len(ids)
    embedding = weights.embedding(config.vocab_size, config.hidden_size)
    hidden = embedding[torch.tensor([i for ids in kept for i in ids])].float()
    return Calibration(config, weights, kept, hidden)


def calibration_texts() -> list[str]:
    """Return the shipped calibration texts, each as one paragraph."""
    return [line for line in calibration_path().read_text(encoding="utf-8").splitlines() if line]


def calibration_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of the texts as users' prompts would hold them: each inside the chat template."""
    prompts = []
    for text in calibration_texts():
        rendered = tokenizer.render([{"role": "user", "content": text}])
        prompts.append(tokenizer.encode_markup(rendered)[:_MAX_TOKENS])
    return prompts
