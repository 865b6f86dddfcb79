"""Turns scheduled groups into tensors, runs the decoder, and reads the answers off its hidden states.

Legend: B sequences of a group, L their packed tokens, P prefix tokens, D hidden_size, N asked nodes, C targets a node.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2model.decoder.model import Decoder
from k2model.decoder.step import Group, KeyValues, Step, causal
from k2model.engine.candidates import ROOT, CandidateTree, candidate_tree
from k2model.engine.request import Completion
from k2model.engine.scheduler import Sequence
from kernels import cpu, ops

_MAX_PREFIXES = 8


@dataclass(slots=True)
class Cohort:
    """Sequences of one length that decode together; they stay of one length until they end."""

    sequences: list[Sequence]
    cache: KeyValues

    @property
    def num_kv_tokens(self) -> int:
        """Key-value slots held."""
        return sum(sequence.num_kv_tokens for sequence in self.sequences)


@dataclass(slots=True)
class Runner:
    """Runs prefill and decode steps."""

    decoder: Decoder
    cohorts: list[Cohort] = field(default_factory=list)
    _prefixes: OrderedDict[tuple[int, ...], KeyValues] = field(default_factory=OrderedDict)

    @torch.inference_mode()
    def prefill(self, groups: list[list[Sequence]]) -> None:
        """Compute every prompt of `groups` in one step; finish what is only scored, start decoding the rest."""
        packed = [self._pack(sequences) for sequences in groups]
        token_ids = torch.tensor([i for _, ids, _ in packed for i in ids])
        positions = torch.tensor([i for _, _, places in packed for i in places])
        step = Step(token_ids, positions, [group for group, _, _ in packed])
        hidden = self.decoder.forward(step)
        start = 0
        for sequences, group in zip(groups, step.groups, strict=True):
            tokens = hidden[start : start + group.count * group.length].view(group.count, group.length, -1)
            start += group.count * group.length
            if sequences[0].request.candidates:
                self._score(sequences, tokens)
            else:
                assert group.cache is not None
                self._advance(Cohort(sequences, group.cache), tokens[:, -1])

    @torch.inference_mode()
    def decode(self) -> None:
        """Compute one token of every decoding sequence."""
        cohorts, self.cohorts = self.cohorts, []
        groups = [Group(len(c.sequences), 1, causal(1, c.cache.length), cache=c.cache) for c in cohorts]
        token_ids = torch.tensor([s.output_ids[-1] for c in cohorts for s in c.sequences])
        positions = torch.tensor([c.cache.length for c in cohorts for _ in c.sequences])
        hidden = self.decoder.forward(Step(token_ids, positions, groups))
        for cohort, rows in zip(cohorts, hidden.split([g.count for g in groups]), strict=True):
            self._advance(cohort, rows)

    def _pack(self, sequences: list[Sequence]) -> tuple[Group, list[int], list[int]]:
        """Return the group of `sequences`, its packed token ids and their positions."""
        request = sequences[0].request
        skip, end = request.num_prefix_tokens, len(request.prompt_ids)
        prefix = self._prefix(request.prompt_ids[:skip]) if skip else None
        visible = causal(end - skip, skip)
        node_ids: tuple[int, ...] = ()
        places = list(range(skip, end))
        if request.candidates:
            tree = candidate_tree(request.candidates)
            node_ids, visible = tree.token_ids, _with_tree(visible, tree)
            places += [end + depth for depth in tree.depths]
        cache = self.decoder.allocate(len(sequences), end + request.max_tokens) if request.max_tokens else None
        ids = [i for sequence in sequences for i in (*sequence.request.prompt_ids[skip:], *node_ids)]
        return Group(len(sequences), len(places), visible, prefix, cache), ids, places * len(sequences)

    def _prefix(self, token_ids: tuple[int, ...]) -> KeyValues:
        """Return keys and values of a shared beginning, computed alone on first use, so that its bits never vary."""
        if token_ids in self._prefixes:
            self._prefixes.move_to_end(token_ids)
            return self._prefixes[token_ids]
        cache = self.decoder.allocate(1, len(token_ids))
        group = Group(1, len(token_ids), causal(len(token_ids), 0), cache=cache)
        self.decoder.forward(Step(torch.tensor(token_ids), torch.arange(len(token_ids)), [group]))
        self._prefixes[token_ids] = cache
        if len(self._prefixes) > _MAX_PREFIXES:
            self._prefixes.popitem(last=False)
        return cache

    def _score(self, sequences: list[Sequence], hidden: Tensor) -> None:
        """Finish `sequences` with the log-probabilities of their candidates, read off `hidden` [B, L, D]."""
        tree = candidate_tree(sequences[0].request.candidates)
        last = hidden.shape[1] - len(tree.token_ids) - 1
        asked = hidden[:, [last if node == ROOT else last + 1 + node for node in tree.parents]]
        width = max(len(targets) for targets in tree.targets)
        targets = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in tree.targets])  # [N, C]
        logprobs = ops.token_logprobs(
            asked.reshape(-1, hidden.shape[2]), self.decoder.lm_head, targets.repeat(len(sequences), 1)
        ).view(len(sequences), len(tree.parents), width)
        owner, parent, slot = torch.tensor(tree.edges).unbind(1)
        sums = torch.zeros(len(sequences), tree.num_candidates, dtype=torch.float64)
        sums.index_add_(1, owner, logprobs[:, parent, slot].double())
        for sequence, row in zip(sequences, sums.tolist(), strict=True):
            sequence.finish(Completion(logprobs=tuple(row), computed_tokens=sequence.num_prefill_tokens))

    def _advance(self, cohort: Cohort, hidden: Tensor) -> None:
        """Give each sequence its next token from `hidden` [B, D]; finish those that end, keep the rest decoding."""
        keep = []
        token_ids = cpu.argmax_token(hidden, self.decoder.lm_head).tolist()
        for row, (sequence, token_id) in enumerate(zip(cohort.sequences, token_ids, strict=True)):
            request = sequence.request
            stopped = token_id in request.stop_ids
            if not stopped:
                sequence.output_ids.append(token_id)
            if not stopped and len(sequence.output_ids) < request.max_tokens:
                keep.append(row)
                continue
            sequence.finish(
                Completion(
                    token_ids=tuple(sequence.output_ids),
                    finish_reason="stop" if stopped else "length",
                    computed_tokens=sequence.num_prefill_tokens + max(0, len(sequence.output_ids) - 1 + stopped),
                )
            )
        if len(keep) < len(cohort.sequences):
            cohort.sequences = [cohort.sequences[row] for row in keep]
            cohort.cache.keep(torch.tensor(keep, dtype=torch.int64))
        if keep:
            self.cohorts.append(cohort)


def _with_tree(visible: Tensor, tree: CandidateTree) -> Tensor:
    """Return `visible` [L, S] grown by the tree's nodes: each sees the whole prompt and its own ancestors."""
    length, keys = visible.shape
    nodes = len(tree.token_ids)
    grown = torch.zeros(length + nodes, keys + nodes, dtype=torch.bool)
    grown[:length, :keys] = visible
    grown[length:, :keys] = True
    for node, ancestors in enumerate(tree.ancestors):
        grown[length + node, [keys + ancestor for ancestor in ancestors]] = True
    return grown
