"""Runs a decoder as tests need it: sequences packed into one step."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import Span
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
    return decoder.forward(decoder.step([Span(tuple(ids)) for ids in prompts]))


@torch.inference_mode()
def packed_logits(decoder: Decoder, prompts: list[list[int]]) -> Tensor:
    """Return the logits [sum T, V] of all sequences packed into one step."""
    return decoder.logits(packed_hidden(decoder, prompts))
