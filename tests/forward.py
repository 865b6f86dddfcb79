"""Runs a decoder as tests need it: sequences packed into one step, and greedy decoding with a cache."""

from pathlib import Path

import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.step import Group, Step, causal
from k2model.formats.checkpoint import open_checkpoint


def float_decoder(folder: Path) -> Decoder:
    """Return the decoder of a checkpoint with everything expanded to float32: the reference path."""
    source = open_checkpoint(str(folder))
    return Decoder.from_weights(source.config(), source.weights(), dtype=torch.float32, expand=True)


def stored_decoder(folder: Path) -> Decoder:
    """Return the decoder of a checkpoint that computes with its weights as they are stored, the rest in float32."""
    source = open_checkpoint(str(folder))
    return Decoder.from_weights(source.config(), source.weights(), dtype=torch.float32)


@torch.inference_mode()
def packed_hidden(decoder: Decoder, prompts: list[list[int]]) -> Tensor:
    """Return the hidden states [sum T, D] of all sequences packed into one step."""
    positions = torch.cat([torch.arange(len(ids)) for ids in prompts])
    groups = [Group(1, len(ids), causal(len(ids), 0)) for ids in prompts]
    return decoder.forward(Step(torch.tensor([i for ids in prompts for i in ids]), positions, groups))


@torch.inference_mode()
def packed_logits(decoder: Decoder, prompts: list[list[int]]) -> Tensor:
    """Return the logits [sum T, V] of all sequences packed into one step."""
    return decoder.logits(packed_hidden(decoder, prompts))


@torch.inference_mode()
def forced(decoder: Decoder, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Return the logits [B, steps, V] before each token of `answers`, which are fed one at a time into caches."""
    steps = len(answers[0])
    caches = [decoder.allocate(1, len(ids) + steps) for ids in prompts]
    groups = [Group(1, len(ids), causal(len(ids), 0), cache=c) for ids, c in zip(prompts, caches, strict=True)]
    positions = torch.cat([torch.arange(len(ids)) for ids in prompts])
    hidden = decoder.forward(Step(torch.tensor([i for ids in prompts for i in ids]), positions, groups))
    logits = [decoder.logits(hidden[torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1])]
    for tokens in torch.tensor(answers).unbind(1)[:-1]:
        groups = [Group(1, 1, causal(1, cache.length), cache=cache) for cache in caches]
        positions = torch.tensor([cache.length for cache in caches])
        logits.append(decoder.logits(decoder.forward(Step(tokens, positions, groups))))
    return torch.stack(logits, dim=1)
