"""Turns what the scheduler chose into one forward pass, and reads the answers off its hidden states.

A batch is computed first and committed after, so that one that fails can be cut in two and computed again.

Legend: B sequences, D hidden_size, P forks of a candidate tree, C tokens that may follow one, U distinct ones of all.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.step import KeyValues, Span, Step
from k2model.engine.candidates import ROOT, CandidateTree
from k2model.engine.kv_cache import KvCache
from k2model.engine.prefix import Segment
from k2model.engine.request import Completion
from k2model.engine.sampler import SequenceSampler, next_tokens, prepare_masks
from k2model.engine.scheduler import Item, Sequence
from k2model.tokenizer import Tokenizer
from kernels import cpu


@dataclass(eq=False, slots=True)
class Generation:
    """A sequence that decodes."""

    sequence: Sequence
    sampler: SequenceSampler


@dataclass(slots=True)
class Batch:
    """What one forward pass computes."""

    items: list[Item]
    """To prefill."""
    rows: dict[int, range]
    """Block of the cache (its number of tiles) to the rows that get a token."""

    def __len__(self) -> int:
        return len(self.items) + sum(map(len, self.rows.values()))

    def halves(self) -> Iterator["Batch"]:
        """Yield two batches of half the work each."""
        every: list[Item | tuple[int, int]] = [*self.items]
        every += [(tiles, row) for tiles, rows in self.rows.items() for row in rows]
        half = len(every) // 2
        for part in (every[:half], every[half:]):
            rows: dict[int, range] = {}
            for entry in part:
                if isinstance(entry, tuple):
                    tiles, row = entry
                    rows[tiles] = range(rows[tiles].start if tiles in rows else row, row + 1)
            yield Batch([entry for entry in part if not isinstance(entry, tuple)], rows)


@dataclass(slots=True)
class Answers:
    """What a batch came to."""

    kept: list[KeyValues | None]
    """Item to the keys and values it leaves."""
    logprobs: dict[int, tuple[float, ...]]
    """Item that is scored to its candidates' log-probabilities."""
    started: list[tuple[int, Generation, int]]
    """Item that begins to generate, and its first token."""
    tokens: list[tuple[Generation, int]]
    """The next token of each sequence that decodes."""


class Runner:
    """Runs batches and holds what decodes between them."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.cache: KvCache[Generation] = KvCache(decoder.allocate_slots)
        self._new: list[tuple[Generation, list[KeyValues]]] = []
        self._ended: set[int] = set()
        # Masks of grammars are filled beside the forward pass; the library lets go of Python's lock.
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="k2batch-masks")

    @property
    def num_kv_tokens(self) -> int:
        """Key-value slots promised to sequences that decode."""
        return sum(g.sequence.num_kv_tokens for block in self.cache.blocks.values() for g in block.owners)

    def batch(self, items: list[Item]) -> Batch:
        """Return the batch that prefills `items` and adds a token to everything that decodes."""
        return Batch(items, {tiles: range(len(block.owners)) for tiles, block in self.cache.blocks.items()})

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Answers:
        """Return the answers of `batch`; nothing is changed that computing it again would not overwrite."""
        spans = [self._span(item) for item in batch.items]
        blocks = [(self.cache.blocks[tiles], rows) for tiles, rows in batch.rows.items() if rows]
        decoding = [[block.owners[row] for row in rows] for block, rows in blocks]
        groups = [block.group(rows) for block, rows in blocks]
        fed = [[generation.sampler.output_ids[-1] for generation in owners] for owners in decoding]
        starting = {
            index: Generation(item, SequenceSampler(item.request, self.tokenizer))
            for index, item in enumerate(batch.items)
            if isinstance(item, Sequence) and item.request.max_tokens
        }
        generations = [*starting.values(), *(generation for owners in decoding for generation in owners)]
        samplers = [generation.sampler for generation in generations]
        step = Step(spans, list(zip(groups, fed, strict=True)))
        hidden = self._forward(step, samplers)
        asked = [hidden[step.rows[index].stop - 1][None] for index in starting]
        asked += [hidden[group.tokens] for group in groups]
        tokens = next_tokens(torch.cat(asked), self.decoder.lm_head, samplers) if asked else []
        drawn = list(zip(generations, tokens, strict=True))
        return Answers(
            kept=[span.keep for span in spans],
            logprobs=self._scores(batch, spans, step, hidden),
            started=[(index, *pair) for index, pair in zip(starting, drawn, strict=False)],
            tokens=drawn[len(starting) :],
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
        for index, generation, token_id in answers.started:
            sequence, kept = generation.sequence, answers.kept[index]
            assert kept is not None
            if self._accept(generation, token_id):
                finished.append(sequence)
            else:
                past = [segment.kv for segment in sequence.parent.chain()] if sequence.parent else []
                self._new.append((generation, [*past, kept]))
        for generation, token_id in answers.tokens:
            generation.sequence.num_computed_tokens += 1
            if self._accept(generation, token_id):
                finished.append(generation.sequence)
                self._ended.add(id(generation))
        return finished

    def fail(self, batch: Batch, message: str) -> list[Sequence]:
        """End the one sequence of `batch` with an error, and return it; a segment has nobody to tell."""
        for tiles, rows in batch.rows.items():
            for row in rows:
                generation = self.cache.blocks[tiles].owners[row]
                self._ended.add(id(generation))
                generation.sequence.finish(Completion(error=message))
                return [generation.sequence]
        for item in batch.items:
            if isinstance(item, Sequence):
                item.finish(Completion(error=message))
                return [item]
        return []

    def settle(self) -> None:
        """Count the step's tokens: call once after every batch of a step."""
        self.cache.advance(self._ended)
        for generation, parts in self._new:
            self.cache.add(generation, parts)
        self._new, self._ended = [], set()

    def _forward(self, step: Step, samplers: list[SequenceSampler]) -> Tensor:
        """Return the step's hidden states; masks of grammars are filled meanwhile."""
        if not any(sampler.matcher for sampler in samplers):
            return self.decoder.forward(step)
        masks = self._masks.submit(prepare_masks, samplers)
        try:
            return self.decoder.forward(step)
        finally:
            masks.result()

    def _span(self, item: Item) -> Span:
        past = tuple(segment.kv for segment in item.parent.chain()) if item.parent else ()
        start = item.parent.end if item.parent else 0
        if isinstance(item, Segment):
            return Span(item.token_ids, past, keep=self.decoder.allocate(start, len(item.token_ids)))
        token_ids = item.request.prompt_ids[start:]
        if item.tree:
            return Span(token_ids, past, item.tree.branches)
        return Span(token_ids, past, keep=self.decoder.allocate(start, len(token_ids)))

    def _scores(self, batch: Batch, spans: list[Span], step: Step, hidden: Tensor) -> dict[int, tuple[float, ...]]:
        """Return each scored item's log-probabilities; those of one candidate tree are read off together."""
        by_tree: dict[CandidateTree, list[int]] = {}
        for index, item in enumerate(batch.items):
            if isinstance(item, Sequence) and item.tree:
                by_tree.setdefault(item.tree, []).append(index)
        logprobs: dict[int, tuple[float, ...]] = {}
        for tree, indices in by_tree.items():
            ends = torch.tensor([step.rows[index].start + len(spans[index].token_ids) for index in indices])
            logprobs.update(zip(indices, self._score(tree, hidden, ends), strict=True))
        return logprobs

    def _score(self, tree: CandidateTree, hidden: Tensor, ends: Tensor) -> list[tuple[float, ...]]:
        """Return the candidates' log-probabilities for each sequence.

        Args:
            tree: of all of them.
            hidden: [T, D] of the step.
            ends: [B] int64, the row behind each one's prompt, where its branches begin.
        """
        if not tree.parents:  # one candidate, or none that differ
            return [(0.0,) * tree.num_candidates] * len(ends)
        offsets = torch.tensor([-1 if parent == ROOT else parent for parent in tree.parents])
        asked = hidden[(ends[:, None] + offsets).view(-1)]
        token_ids = tree.token_ids
        logits = cpu.token_logits(asked, self.decoder.lm_head, torch.tensor(token_ids)).double()  # [B * P, U]
        width = max(map(len, tree.targets))
        place = {token_id: index for index, token_id in enumerate(token_ids)}
        columns = torch.tensor([[*map(place.__getitem__, ids), *[-1] * (width - len(ids))] for ids in tree.targets])
        logits = logits.view(len(ends), len(tree.parents), -1)
        logits = logits.gather(2, columns.clamp(min=0).expand(len(ends), -1, -1))  # [B, P, C]
        logprobs = torch.log_softmax(logits.masked_fill(columns < 0, float("-inf")), dim=-1)
        owner, parent, slot = torch.tensor(tree.edges).unbind(1)
        sums = torch.zeros(len(ends), tree.num_candidates, dtype=torch.float64)
        sums.index_add_(1, owner, logprobs[:, parent, slot])
        return [tuple(row) for row in sums.tolist()]

    def _accept(self, generation: Generation, token_id: int) -> bool:
        """Give a sequence its next token; finish it if it ends there, and return whether it did."""
        sequence, sampler = generation.sequence, generation.sampler
        try:
            reason = sampler.accept(token_id)
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
