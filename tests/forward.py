"""Runs a decoder as tests need it: sequences packed into one step, and greedy decoding with a cache."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import TILE, DecodeGroup, Span, Step
from k2model.formats.checkpoint import open_checkpoint


def float_decoder(folder: Path) -> Decoder:
    """Return the decoder of a checkpoint with everything expanded to float32: the reference path."""
    source = open_checkpoint(str(folder))
    return Decoder.from_weights(source.config(), source.weights(), PRECISIONS["fp32"])


def stored_decoder(folder: Path) -> Decoder:
    """Return the decoder of a checkpoint that computes with its weights as they are stored, the rest in float32."""
    source = open_checkpoint(str(folder))
    return Decoder.from_weights(source.config(), source.weights(), replace(PRECISIONS["fp32"], expand=False))


@torch.inference_mode()
def packed_hidden(decoder: Decoder, prompts: list[list[int]]) -> Tensor:
    """Return the hidden states [sum T, D] of all sequences packed into one step."""
    step = Step([Span(tuple(ids)) for ids in prompts])
    return step.in_given_order(decoder.forward(step))


@torch.inference_mode()
def packed_logits(decoder: Decoder, prompts: list[list[int]]) -> Tensor:
    """Return the logits [sum T, V] of all sequences packed into one step."""
    return decoder.logits(packed_hidden(decoder, prompts))


@torch.inference_mode()
def forced(decoder: Decoder, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Return the logits [B, steps, V] before each token of `answers`, which are fed one at a time into caches."""
    steps = len(answers[0])
    kept = [decoder.allocate(0, len(ids)) for ids in prompts]
    step = Step([Span(tuple(ids), keep=kv) for ids, kv in zip(prompts, kept, strict=True)])
    hidden = decoder.forward(step)
    logits = [decoder.logits(torch.stack([hidden[rows.stop - 1] for rows in step.rows]))]
    slots = [decoder.allocate_slots(1, (len(ids) + steps) // TILE + 1) for ids in prompts]
    for own, kv in zip(slots, kept, strict=True):
        own.fill(0, [kv])
    for number, tokens in enumerate(torch.tensor(answers).unbind(1)[:-1]):
        groups = [DecodeGroup(own, torch.tensor([len(ids) + number])) for own, ids in zip(slots, prompts, strict=True)]
        fed = [(group, [token]) for group, token in zip(groups, tokens.tolist(), strict=True)]
        logits.append(decoder.logits(decoder.forward(Step([], fed))))
    return torch.stack(logits, dim=1)
