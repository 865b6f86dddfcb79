"""Turns what the scheduler chose into one forward pass, and reads the answers off its hidden states.

A batch is computed first and committed after, so that one that fails can be cut in two and computed again.

Legend: B sequences, D hidden_size, P forks of a candidate tree, C tokens that may follow one, U distinct ones of all.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.step import KeyValues, Span, Step
from k2model.engine.candidates import ROOT, CandidateTree
from k2model.engine.prefix import Segment
from k2model.engine.request import Completion
from k2model.engine.sampler import Mask, SequenceSampler, next_tokens, prepare_masks
from k2model.engine.scheduler import Item, Sequence, num_tokens
from k2model.engine.scores import log_probabilities
from k2model.engine.speculation import Guesser, agreed
from k2model.tokenizer import Tokenizer
from kernels import ops


@dataclass(eq=False, slots=True)
class Generation:
    """A sequence that decodes."""

    sequence: Sequence
    sampler: SequenceSampler
    guesser: Guesser | None
    """None where tokens are drawn by chance."""

    @classmethod
    def of(cls, sequence: Sequence, tokenizer: Tokenizer) -> "Generation":
        """Return `sequence` before its first token. Raises: as `SequenceSampler`."""
        request = sequence.request
        guesser = None if request.sampling.temperature else Guesser(request.prompt_ids)
        return cls(sequence, SequenceSampler(request, tokenizer), guesser)

    def guess(self, limit: int, num_tokens: int) -> list[int]:
        """Return at most `limit` tokens that are worth trying in a step of `num_tokens` without them."""
        output_ids = self.sampler.output_ids
        limit = min(limit, self.sequence.request.max_tokens - len(output_ids) - 1)  # the model itself adds one
        if self.guesser is None or limit <= 0:
            return []
        return self.sampler.possible(self.guesser.guess(output_ids, limit, num_tokens))

    def unfed(self, num_filled: int) -> list[int]:
        """Return the tokens of its answer that stand behind its first `num_filled` slots."""
        return self.sampler.output_ids[num_filled - len(self.sequence.request.prompt_ids) :]


@dataclass(slots=True)
class Batch:
    """What one forward pass computes."""

    items: list[Item]
    """To prefill."""
    generations: list[Generation]
    """That get tokens."""
    guesses: dict[Generation, list[int]] = field(default_factory=dict)
    """What is tried behind a sequence's last token."""

    def __len__(self) -> int:
        return len(self.items) + len(self.generations) + len(self.guesses)

    def halves(self) -> Iterator["Batch"]:
        """Yield two batches of half the work each, or one of a single item; a guess may be at fault and is left out."""
        every: list[Item | Generation] = [*self.items, *self.generations]
        half = len(every) // 2
        for part in (every[:half], every[half:]):
            if part:
                yield Batch(
                    [entry for entry in part if not isinstance(entry, Generation)],
                    [entry for entry in part if isinstance(entry, Generation)],
                )


@dataclass(slots=True)
class Answers:
    """What a batch came to."""

    kept: list[KeyValues | None]
    """Item to the keys and values it leaves."""
    logprobs: dict[int, tuple[float, ...]]
    """Item that is scored to its candidates' log-probabilities."""
    started: dict[int, Generation]
    """Item that begins to generate."""
    fed: dict[Generation, int]
    """How many tokens of its answer each sequence that decodes was fed, without those guessed."""
    tokens: dict[Generation, list[int]]
    """What comes next, for those that a token was drawn for: not where the grammar leaves no choice of the first. With
    more than one, all but the last are fed, too: guessed right."""


class Runner:
    """Runs batches and holds what decodes between them."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.decoding: dict[Generation, KeyValues] = {}
        """What every sequence that decodes was fed so far. Slots filled behind that, by wrong guesses, are hidden from
        attention until they are filled again."""
        self.num_tokens = 0
        """Tokens that went through the decoder."""
        self.num_unread_tokens = 0
        """Of these, those whose last layer was not computed to its end, since nobody reads them there."""
        self._new: dict[Generation, KeyValues] = {}
        self._filled: dict[Generation, int] = {}
        # Masks of grammars are filled beside the forward pass; the library lets go of Python's lock.
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="k2batch-masks")

    @property
    def num_kv_tokens(self) -> int:
        """Key-value slots promised to sequences that decode."""
        return sum(generation.sequence.num_kv_tokens for generation in self.decoding)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens that sequences that decode take of the next step, without what is guessed."""
        return sum(len(generation.unfed(kv.end)) for generation, kv in self.decoding.items())

    def batch(self, items: list[Item], max_num_tokens: int) -> Batch:
        """Return the batch that prefills `items`, goes on with everything that decodes, and tries what may follow.

        Args:
            items: to prefill.
            max_num_tokens: what is guessed gives way where they are more.
        """
        guesses: dict[Generation, list[int]] = {}
        tokens = sum(map(num_tokens, items)) + self.num_decode_tokens
        for generation in self.decoding:
            if guess := generation.guess(max_num_tokens - tokens, tokens):
                guesses[generation] = guess
                tokens += len(guess)
        return Batch(items, [*self.decoding], guesses)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Answers:
        """Return the answers of `batch`; nothing is changed that computing it again would not overwrite."""
        spans = [self._span(item) for item in batch.items]
        fed = {generation: generation.unfed(self.decoding[generation].end) for generation in batch.generations}
        for generation, known in fed.items():
            token_ids = (*known, *batch.guesses.get(generation, []))
            spans.append(Span(token_ids, self.decoding[generation], decodes=True))
        step = self.decoder.step(spans)
        asked = {
            generation: [*range(rows.start + len(known) - 1, rows.stop)]
            for (generation, known), rows in zip(fed.items(), step.rows[len(batch.items) :], strict=True)
        }
        started = {
            index: Generation.of(item, self.tokenizer)
            for index, item in enumerate(batch.items)
            if isinstance(item, Sequence) and item.request.max_tokens
        }
        asked |= {g: [step.rows[index].stop - 1] for index, g in started.items() if not g.sampler.forced()}
        guesses = [batch.guesses.get(generation, []) for generation in asked]
        scored = self._scored(batch, spans, step)
        read = [*chain.from_iterable(asked.values()), *chain.from_iterable(places for _, places in scored.values())]
        hidden, masks = self._forward(step, read, [generation.sampler for generation in asked], guesses)
        samplers = [generation.sampler for generation, places in asked.items() for _ in places]
        drawn = iter(next_tokens(hidden[: len(samplers)], self.decoder.lm_head, samplers, masks) if samplers else [])
        tokens = [agreed(guess, [*islice(drawn, len(guess) + 1)]) for guess in guesses]
        return Answers(
            kept=[span.keep for span in spans[: len(batch.items)]],
            logprobs=self._scores(scored, hidden[len(samplers) :]),
            started=started,
            fed={generation: len(known) for generation, known in fed.items()},
            tokens=dict(zip(asked, tokens, strict=True)),
        )

    def commit(self, batch: Batch, answers: Answers) -> list[Sequence]:
        """Record `answers`; return the sequences that are finished."""
        finished = []
        for item, kept in zip(batch.items, answers.kept, strict=True):
            if isinstance(item, Segment):
                item.kv = kept
            else:
                item.num_computed_tokens += item.num_prefill_tokens
        for index, logprobs in answers.logprobs.items():
            sequence = batch.items[index]
            assert isinstance(sequence, Sequence)
            sequence.finish(Completion(logprobs=logprobs, computed_tokens=sequence.num_computed_tokens))
            finished.append(sequence)
        for index, generation in answers.started.items():
            sequence, kept = generation.sequence, answers.kept[index]
            assert kept is not None
            if self._accept(generation, answers.tokens.get(generation, [])):
                finished.append(sequence)
            else:
                self._new[generation] = kept
        for generation, count in answers.fed.items():
            token_ids = answers.tokens.get(generation, [])
            if generation.guesser is not None and generation in batch.guesses:
                generation.guesser.learn(len(batch.guesses[generation]), len(token_ids) - 1)
            generation.sequence.num_computed_tokens += count
            if self._accept(generation, token_ids):
                finished.append(generation.sequence)
            else:
                self._filled[generation] = count + max(0, len(token_ids) - 1)
        return finished

    def fail(self, batch: Batch, message: str) -> list[Sequence]:
        """End the one sequence of `batch` with an error, and return it; a segment has nobody to tell."""
        for generation in batch.generations:
            generation.sequence.finish(Completion(error=message))
            return [generation.sequence]
        for item in batch.items:
            if isinstance(item, Sequence):
                item.finish(Completion(error=message))
                return [item]
        return []

    def settle(self) -> None:
        """Count the step's tokens, and let go of what is finished: call once after every batch of a step."""
        going_on = [(generation, kv) for generation, kv in self.decoding.items() if generation in self._filled]
        self.decoding = {
            generation: KeyValues(kv.end + self._filled[generation], kv.pages) for generation, kv in going_on
        } | self._new
        self._new, self._filled = {}, {}

    def _forward(
        self, step: Step, read: list[int], samplers: list[SequenceSampler], guesses: list[list[int]]
    ) -> tuple[Tensor, list[Mask | None]]:
        """Return hidden states of the tokens `read`, and masks of grammars as `prepare_masks`, filled meanwhile."""
        self.num_tokens += len(step.token_ids)
        self.num_unread_tokens += len(step.token_ids) - len(read)
        masks = self._masks.submit(prepare_masks, samplers, guesses)
        try:
            return self.decoder.forward(step, read), masks.result()
        finally:
            masks.exception()

    def _span(self, item: Item) -> Span:
        past = item.parent.kv if item.parent else None
        if isinstance(item, Segment):
            return Span(item.token_ids, past, keep=KeyValues(item.end))
        prompt_ids = item.request.prompt_ids
        token_ids = prompt_ids[past.end if past else 0 :]
        if item.tree:
            return Span(token_ids, past, item.tree.branches)
        return Span(token_ids, past, keep=KeyValues(len(prompt_ids)))

    def _scored(self, batch: Batch, spans: list[Span], step: Step) -> dict[CandidateTree, tuple[list[int], list[int]]]:
        """Return, for each candidate tree, the items scored by it, and where in the step each one's forks stand."""
        by_tree: dict[CandidateTree, tuple[list[int], list[int]]] = {}
        for index, item in enumerate(batch.items):
            if isinstance(item, Sequence) and item.tree:
                end = step.rows[index].start + len(spans[index].token_ids)
                indices, places = by_tree.setdefault(item.tree, ([], []))
                indices.append(index)
                places.extend(end + (-1 if parent == ROOT else parent) for parent in item.tree.parents)
        return by_tree

    def _scores(
        self, scored: dict[CandidateTree, tuple[list[int], list[int]]], hidden: Tensor
    ) -> dict[int, tuple[float, ...]]:
        """Return each scored item's log-probabilities; those of one candidate tree are read off `hidden` together."""
        logprobs: dict[int, tuple[float, ...]] = {}
        parts = hidden.split([len(places) for _, places in scored.values()])
        for (tree, (indices, _)), own in zip(scored.items(), parts, strict=True):
            logprobs.update(zip(indices, self._score(tree, own, len(indices)), strict=True))
        return logprobs

    def _score(self, tree: CandidateTree, hidden: Tensor, count: int) -> list[tuple[float, ...]]:
        """Return the candidates' log-probabilities of each of `count` sequences; `hidden` is of their forks."""
        if not tree.parents:
            return [(0.0,) * tree.num_candidates] * count
        token_ids = tree.token_ids
        targets = torch.tensor(token_ids, device=hidden.device)
        logits = ops.token_logits(hidden, self.decoder.lm_head, targets).cpu().double()  # [B * P, U]
        width = max(map(len, tree.targets))
        place = {token_id: index for index, token_id in enumerate(token_ids)}
        columns = torch.tensor([[*map(place.__getitem__, ids), *[-1] * (width - len(ids))] for ids in tree.targets])
        logits = logits.view(count, len(tree.parents), -1)
        logits = logits.gather(2, columns.clamp(min=0).expand(count, -1, -1))  # [B, P, C]
        logprobs = log_probabilities(tree, logits.masked_fill(columns < 0, float("-inf")))
        return [tuple(row) for row in logprobs.tolist()]

    def _accept(self, generation: Generation, token_ids: list[int]) -> bool:
        """Give a sequence its next tokens, and then those that its grammar leaves no choice of.

        Finishes it if it ends among them, and returns whether it did.
        """
        sequence, sampler = generation.sequence, generation.sampler
        reason = None
        try:
            for place, token_id in enumerate(token_ids):
                sequence.num_computed_tokens += place > 0  # the one before it was fed, too
                if reason := sampler.accept(token_id):
                    break
            reason = reason or sampler.accept_forced()
        except ValueError as error:  # its grammar: nobody else's answer hangs on it
            sequence.finish(Completion(error=f"{type(error).__name__}: {error}"))
            return True
        if reason is None:
            return False
        sequence.finish(
            Completion(
                token_ids=tuple(sampler.output_ids),
                finish_reason=reason,
                computed_tokens=sequence.num_computed_tokens,
            )
        )
        return True

    def close(self) -> None:
        """Let the thread that fills masks go."""
        self._masks.shutdown()
