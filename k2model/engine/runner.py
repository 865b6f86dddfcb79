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
from k2model.decoder.step import DecodeGroup, KeyValues, Span, Step
from k2model.engine.candidates import ROOT, CandidateTree
from k2model.engine.kv_cache import Block, KvCache
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
    rows: dict[int, range]
    """Block of the cache (its number of tiles) to the rows that get tokens."""
    guesses: dict[Generation, list[int]] = field(default_factory=dict)
    """What is tried behind a sequence's last token."""

    def __len__(self) -> int:
        return len(self.items) + sum(map(len, self.rows.values())) + len(self.guesses)

    def halves(self) -> Iterator["Batch"]:
        """Yield two batches of half the work each, or one of a single item; a guess may be at fault and is left out."""
        every: list[Item | tuple[int, int]] = [*self.items]
        every += [(tiles, row) for tiles, rows in self.rows.items() for row in rows]
        half = len(every) // 2
        for part in (every[:half], every[half:]):
            rows: dict[int, range] = {}
            for entry in part:
                if isinstance(entry, tuple):
                    tiles, row = entry
                    rows[tiles] = range(rows[tiles].start if tiles in rows else row, row + 1)
            if part:
                yield Batch([entry for entry in part if not isinstance(entry, tuple)], rows)


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
    """What comes next, for those that a token was drawn for: not where the grammar leaves no choice, nor where more
    tokens are known than the step had slots for. With more than one, all but the last are fed, too: guessed right."""


class Runner:
    """Runs batches and holds what decodes between them."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.cache: KvCache[Generation] = KvCache(decoder.allocate_slots)
        self.num_tokens = 0
        """Tokens that went through the decoder."""
        self.num_unread_tokens = 0
        """Of these, those whose last layer was not computed to its end, since nobody reads them there."""
        self._new: list[tuple[Generation, list[KeyValues]]] = []
        self._filled: dict[Generation, int] = {}
        # Masks of grammars are filled beside the forward pass; the library lets go of Python's lock.
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="k2batch-masks")

    @property
    def num_kv_tokens(self) -> int:
        """Key-value slots promised to sequences that decode."""
        return sum(g.sequence.num_kv_tokens for block in self.cache.blocks.values() for g in block.owners)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens that sequences that decode take of the next step, without what is guessed."""
        blocks = self.cache.blocks.values()
        return sum(len(_unfed(block, row)) for block in blocks for row in range(len(block.owners)))

    def batch(self, items: list[Item], max_num_tokens: int) -> Batch:
        """Return the batch that prefills `items`, goes on with everything that decodes, and tries what may follow.

        Args:
            items: to prefill.
            max_num_tokens: what is guessed gives way where they are more.
        """
        rows = {tiles: range(len(block.owners)) for tiles, block in self.cache.blocks.items()}
        guesses: dict[Generation, list[int]] = {}
        tokens = sum(map(num_tokens, items)) + self.num_decode_tokens
        for block in self.cache.blocks.values():
            for row, generation in enumerate(block.owners):
                room = block.num_slots - block.lengths[row] - len(generation.unfed(block.lengths[row]))
                if guess := generation.guess(min(room, max_num_tokens - tokens), tokens):
                    guesses[generation] = guess
                    tokens += len(guess)
        return Batch(items, rows, guesses)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Answers:
        """Return the answers of `batch`; nothing is changed that computing it again would not overwrite."""
        spans = [self._span(item) for item in batch.items]
        blocks = [(self.cache.blocks[tiles], rows) for tiles, rows in batch.rows.items() if rows]
        groups, fed, asked = _decoding(blocks, batch.guesses, sum(span.size for span in spans))
        step = self.decoder.step(spans, groups)
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
            kept=[span.keep for span in spans],
            logprobs=self._scores(scored, hidden[len(samplers) :]),
            started=started,
            fed=fed,
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
                past = [segment.kv for segment in sequence.parent.chain()] if sequence.parent else []
                self._new.append((generation, [*past, kept]))
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
        for tiles, rows in batch.rows.items():
            for row in rows:
                generation = self.cache.blocks[tiles].owners[row]
                generation.sequence.finish(Completion(error=message))
                return [generation.sequence]
        for item in batch.items:
            if isinstance(item, Sequence):
                item.finish(Completion(error=message))
                return [item]
        return []

    def settle(self) -> None:
        """Count the step's tokens, and let go of what is finished: call once after every batch of a step."""
        self.cache.advance(self._filled)
        for generation, parts in self._new:
            self.cache.add(generation, parts)
        self._new, self._filled = [], {}

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
        past = tuple(segment.kv for segment in item.parent.chain()) if item.parent else ()
        start = item.parent.end if item.parent else 0
        if isinstance(item, Segment):
            return Span(item.token_ids, past, keep=self.decoder.allocate(start, len(item.token_ids)))
        token_ids = item.request.prompt_ids[start:]
        if item.tree:
            return Span(token_ids, past, item.tree.branches)
        return Span(token_ids, past, keep=self.decoder.allocate(start, len(token_ids)))

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


def _unfed(block: Block[Generation], row: int) -> list[int]:
    """Return what a step must feed to `row` of `block`: tokens of its answer, as many as its slots have room for."""
    length = block.lengths[row]
    return block.owners[row].unfed(length)[: block.num_slots - length]


def _decoding(
    blocks: list[tuple[Block[Generation], range]], guesses: dict[Generation, list[int]], offset: int
) -> tuple[list[tuple[DecodeGroup, list[int]]], dict[Generation, int], dict[Generation, list[int]]]:
    """Return what a step adds to rows of `blocks`.

    Args:
        blocks: with the rows of each.
        guesses: what follows the last token of some of them.
        offset: the first one's place among the step's tokens.

    Returns: groups and their tokens; how many of its answer each sequence is fed; and, if these are all that is known
        of it, where the last of them stands in the step, and what is guessed behind it.
    """
    groups: list[tuple[DecodeGroup, list[int]]] = []
    fed: dict[Generation, int] = {}
    asked: dict[Generation, list[int]] = {}
    for block, rows in blocks:
        token_ids = []
        behind = offset + len(rows)
        for place, row in enumerate(rows, offset):
            generation, known = block.owners[row], _unfed(block, row)
            token_ids.append([*known, *guesses.get(generation, [])])
            places = [place, *range(behind, behind + len(token_ids[-1]) - 1)]
            behind += len(places) - 1
            fed[generation] = len(known)
            if len(known) == len(generation.unfed(block.lengths[row])):
                asked[generation] = places[len(known) - 1 :]
        groups.append((block.group(rows), [ids[0] for ids in token_ids]))
        more = chain.from_iterable(ids[1:] for ids in token_ids)
        for group in block.behind(rows, [len(ids) - 1 for ids in token_ids]):
            groups.append((group, [*islice(more, len(group.lengths))]))
        offset = behind
    return groups, fed, asked
