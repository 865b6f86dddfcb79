"""Calibration: how strong each input channel of a linear layer is, over the shipped texts."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from k2model.decoder.layers import Group, Step
from k2model.decoder.linear import Linear
from k2model.decoder.model import Decoder, causal
from k2model.formats.checkpoint import calibration_path
from k2model.tokenizer import Tokenizer

STACKED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linears of a layer that share no input: what is calibrated."""

_MAX_TOKENS = 512


@dataclass(slots=True)
class _Watched:
    """A linear that sums the energy of each input channel, every token counted alike.

    Each token has its own scale at run time, so a channel matters as far as it outgrows the token's other channels.
    The largest |input|, as SmoothQuant takes it, is set by the few tokens that everything attends to.
    """

    linear: Linear
    energy: Tensor | None = None
    tokens: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        energy = x.square()
        energy = (energy / energy.mean(dim=1, keepdim=True).clamp_min(1e-12)).sum(dim=0)
        self.energy = energy if self.energy is None else self.energy + energy
        self.tokens += x.shape[0]
        return self.linear(x)


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


@torch.inference_mode()
def channel_strength(decoder: Decoder, prompts: list[list[int]]) -> list[dict[str, Tensor]]:
    """Return, per layer and each of STACKED, the strength of every input channel [K] over `prompts`.

    The strength is the root mean square of the channel relative to its token's, 1 on average. `decoder` is left as is.
    """
    layers: list[dict[str, Any]] = [
        {name: _Watched(getattr(layer, name)) for name in STACKED} for layer in decoder.layers
    ]
    watched = replace(
        decoder, layers=[replace(layer, **watch) for layer, watch in zip(decoder.layers, layers, strict=True)]
    )
    for start in range(0, len(prompts), 16):
        _forward(watched, prompts[start : start + 16])
    return [
        {name: (w.energy / w.tokens).sqrt() for name, w in layer.items() if w.energy is not None} for layer in layers
    ]


def _forward(decoder: Decoder, prompts: list[list[int]]) -> None:
    groups = [Group(1, len(ids), causal(len(ids), 0)) for ids in prompts]
    token_ids = torch.tensor([i for ids in prompts for i in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids in prompts])
    decoder.forward(Step(token_ids, positions, groups))
