"""Draws the next token of every sequence of a step, and knows when an answer ends.

What is drawn for a sequence is a function of its own hidden state, grammar, seed and number of tokens so far: neither
the sequences beside it nor their number move a bit.

Legend: B sequences, D hidden_size, V rows of the output embedding, R rows.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from k2model.engine.grammar import compile_grammar, fill_masks, vocabulary_of
from k2model.engine.request import Request, Sampling
from k2model.tokenizer import Tokenizer
from kernels import ops

FinishReason = Literal["stop", "length"]

_VOCAB_BLOCK = 1024
"""Rows of the output embedding widened to float32 at once: they stay in the cache, 2.4 MB at SmolLM2's width. For 32
sequences on one AVX2 core a step's logits take 70 ms, in blocks of 8,192 116 ms, all at once 150 ms."""

Weights = np.ndarray[tuple[int], np.dtype[np.float32]]
Mask = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""What may come next, a row of `fill_masks`."""


class SequenceSampler:
    """One answer in the making."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        """Stand before the first token. Raises: SpecError or CheckpointError if the grammar cannot be compiled."""
        self.request = request
        self.output_ids: list[int] = []
        """The answer so far. A stop token is no part of it, nor is a stop string or what its tokens bring behind it;
        letters before one, in the same token, are spelled anew."""
        self.matcher = compile_grammar(request.grammar, tokenizer) if request.grammar else None
        self._stop_ids = {*request.stop_ids, *(tokenizer.stop_ids if request.grammar else ())}
        self._tokenizer = tokenizer
        self._text = bytearray()
        """What `output_ids` say; only kept where there are stop strings."""
        self._stops = [stop.encode() for stop in request.stop_strings]

    def accept(self, token_id: int) -> FinishReason | None:
        """Add a token to the answer; return why the answer ends with it, or None if it goes on.

        Raises: ValueError if the grammar does not allow the token.
        """
        if token_id in self._stop_ids:
            return "stop"
        self.output_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self._stops and self._ends_at_stop_string():
            return "stop"
        if self.matcher is not None and self.matcher.is_finished():
            return "stop"
        return "length" if len(self.output_ids) >= self.request.max_tokens else None

    def forced(self) -> list[int]:
        """Return the tokens that its grammar leaves no choice of: none needs a model to be drawn."""
        return self.matcher.forced() if self.matcher is not None else []

    def possible(self, token_ids: list[int]) -> list[int]:
        """Return those of `token_ids`, from the first on, that the answer may go on with, and does not end at."""
        count = next((i for i, token_id in enumerate(token_ids) if token_id in self._stop_ids), len(token_ids))
        if self.matcher is not None and count:
            count = self.matcher.count_possible(token_ids[:count])
        return token_ids[:count]

    def accept_forced(self) -> FinishReason | None:
        """Add every token there is no choice of; return as `accept`."""
        while token_ids := self.forced():
            for token_id in token_ids:
                if reason := self.accept(token_id):
                    return reason
        return None

    def _ends_at_stop_string(self) -> bool:
        """Return whether the last token completed a stop string, and if so cut the answer before it.

        Of several the first to be complete counts, and of those the longest, however the text is cut into tokens.
        """
        vocabulary = vocabulary_of(self._tokenizer)
        begin = len(self._text)
        self._text += vocabulary.token_bytes(self.output_ids[-1])
        found = [(self._text.find(stop, max(0, begin - len(stop) + 1)), len(stop)) for stop in self._stops]
        places = [(start + length, start) for start, length in found if start >= 0]
        if not places:
            return False
        _, cut = min(places)
        kept = bytes(self._text[:cut])
        while len(self._text) > cut:
            size = len(vocabulary.token_bytes(self.output_ids.pop()))
            del self._text[len(self._text) - size :]
        if rest := kept[len(self._text) :]:
            self.output_ids += vocabulary.spell(rest)
        return True


def prepare_masks(samplers: Sequence[SequenceSampler], guesses: Sequence[Sequence[int]]) -> list[Mask | None]:
    """Return what may come next in each answer, and behind each token guessed of it; None where anything may.

    Filled outside Python's lock. May run in a thread beside the forward pass whose hidden states `next_tokens` gets,
    but not beside `accept`.

    Args:
        samplers: of the sequences.
        guesses: `possible` tokens of each.

    Raises: ValueError if a grammar proves too complex.
    """
    bound = [(s.matcher, guess) for s, guess in zip(samplers, guesses, strict=True) if s.matcher is not None]
    masks = iter(fill_masks(*zip(*bound, strict=True)) if bound else [])
    rows = [sampler for sampler, guess in zip(samplers, guesses, strict=True) for _ in range(len(guess) + 1)]
    return [None if sampler.matcher is None else next(masks) for sampler in rows]


def next_tokens(
    hidden: Tensor, lm_head: Tensor, samplers: Sequence[SequenceSampler], masks: Sequence[Mask | None]
) -> list[int]:
    """Return the next token of each row. Changes nothing: asked again, the answer is the same.

    Args:
        hidden: [R, D] float32, after the final norm.
        lm_head: [V, D] the output embedding.
        samplers: of the R rows; one with guesses has several.
        masks: of the R rows, by `prepare_masks`.
    """
    tokens = [0] * len(samplers)
    greedy = [i for i, sampler in enumerate(samplers) if not sampler.request.sampling.temperature]
    free = [i for i in greedy if masks[i] is None]
    bound = [i for i in greedy if masks[i] is not None]
    drawn = [i for i, sampler in enumerate(samplers) if sampler.request.sampling.temperature]
    if free:
        _put(tokens, free, ops.argmax_token(hidden[free], lm_head).tolist())
    if bound:
        allowed = torch.stack([_allowed(samplers[i], masks[i], len(lm_head)) for i in bound])
        _put(tokens, bound, ops.argmax_token(hidden[bound], lm_head, allowed.to(hidden.device)).tolist())
    if drawn:
        logits = _logits(hidden[drawn], lm_head).cpu()
        _put(tokens, drawn, [_draw(row, samplers[i], masks[i]) for row, i in zip(logits, drawn, strict=True)])
    return tokens


def _put(tokens: list[int], places: list[int], values: list[int]) -> None:
    for place, value in zip(places, values, strict=True):
        tokens[place] = value


def _allowed(sampler: SequenceSampler, mask: Mask | None, num_rows: int) -> Tensor:
    """Return [num_rows] bool: the tokens that may come next; never one that is only padding of the embedding."""
    assert mask is not None
    assert sampler.matcher is not None
    size = min(sampler.matcher.vocabulary.size, num_rows)
    bits = torch.from_numpy(np.unpackbits(mask, count=size, bitorder="little")).bool()
    return torch.nn.functional.pad(bits, (0, num_rows - size))


def _logits(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """Return [R, V] float32, each row's bits its own; of a head in bfloat16 a block is widened at a time."""
    return torch.cat([ops.row_matmul(hidden, rows.float().t()) for rows in lm_head.split(_VOCAB_BLOCK)], dim=1)


def _draw(logits: Tensor, sampler: SequenceSampler, mask: Mask | None) -> int:
    """Return a token drawn by its probability: one random number, and the inverse of the distribution function.

    In numpy, which computes on one thread: the order of a sum does not depend on how many there are.
    """
    if mask is not None:
        logits = logits.masked_fill(~_allowed(sampler, mask, len(logits)), float("-inf"))
    sampling = sampler.request.sampling
    values: Any = logits.numpy()
    weights = np.exp((values - values.max()) / np.float32(sampling.temperature))
    cumulative = np.cumsum(_nucleus(weights, sampling.top_p), dtype=np.float64)
    place = _uniform(sampling, len(sampler.output_ids)) * cumulative[-1]
    return int(np.searchsorted(cumulative, place, side="right"))  # the first above it, so never one of weight 0


def _nucleus(weights: Weights, top_p: float) -> Weights:
    """Return `weights` [V], 0 but for the fewest tokens, likeliest first, whose share of the sum reaches `top_p`.

    Of equal ones the lower ids come first. At least one stays. Source: arXiv 1904.09751.
    """
    if top_p >= 1:
        return weights
    total = float(np.sum(weights, dtype=np.float64))
    # All tokens below this weight together have a smaller share than 1 - top_p: only the others need be sorted.
    likely = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    shares = np.cumsum(weights[order], dtype=np.float64)
    kept = order[: int(np.searchsorted(shares, top_p * total, side="left")) + 1]
    nucleus = np.zeros_like(weights)
    nucleus[kept] = weights[kept]
    return nucleus


def _uniform(sampling: Sampling, num_tokens: int) -> float:
    """Return a number in [0, 1) that the seed and the number of tokens drawn before decide, on any machine."""
    digest = hashlib.sha256(f"{sampling.seed} {num_tokens}".encode()).digest()
    # 52 bits: with 53 the product with a sum can round up to the sum itself.
    return (int.from_bytes(digest[:8], "big") >> 12) / 2**52
