"""What a model is trained on: prompts as a run renders them, with the answers they could be given.

Legend: P forks, C tokens that may follow one.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from k2model.decoder.branches import Branches
from k2model.engine.candidates import ROOT, CandidateTree, candidate_tree
from k2model.engine.request import Candidate


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one ticket. Several tasks of a ticket are several examples."""

    prompt_ids: tuple[int, ...]
    num_prefix_tokens: int
    """The first tokens of the prompt, which all examples of a batch share: instructions."""
    candidates: tuple[Candidate, ...]
    """Every answer that may be given, in a fixed order, those of one question beside each other."""
    truths: tuple[int, ...] | None
    """The index of the right one of each question that is asked, ascending; None for a ticket without labels."""
    num_questions: int = 1
    """Questions that the candidates answer, each as many; more than one where every label is asked about by itself."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples that share their instructions, which are computed once, and their candidates."""

    examples: tuple[Example, ...]
    is_taught: bool = True
    """Whether a distillation asks its teacher; else the right answers alone are learned."""

    def __post_init__(self) -> None:
        first = self.examples[0]
        for example in self.examples:
            if example.prompt_ids[: example.num_prefix_tokens] != self.prefix_ids:
                raise ValueError("examples of a batch begin with the same num_prefix_tokens tokens")
            if len(example.prompt_ids) <= example.num_prefix_tokens:
                raise ValueError(f"{example.num_prefix_tokens=} must leave a token of {len(example.prompt_ids)=}")
            if example.candidates != first.candidates:
                raise ValueError("examples of a batch have the same candidates")

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens all prompts begin with."""
        return self.examples[0].prompt_ids[: self.examples[0].num_prefix_tokens]

    @property
    def tree(self) -> CandidateTree:
        """The candidates as one tree. Raises: ValueError as `candidate_tree`."""
        return candidate_tree(self.examples[0].candidates)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts, those of the instructions once."""
        return len(self.prefix_ids) + sum(len(e.prompt_ids) - e.num_prefix_tokens for e in self.examples)


class TrainingData(Protocol):
    """Where batches come from. The same batches in the same order whenever it is asked: a step may be resumed."""

    @property
    def digest(self) -> str:
        """What names the rows, the prompts, the batch sizes and the seed: a step is resumed only with the same."""
        ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the training batches of epoch `number`, 0 and up, in an order of its own; at least one."""
        ...

    def validation(self) -> Sequence[Batch]:
        """Return the held-back batches, none of whose rows is trained on; may be empty."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Forks:
    """The forks of a candidate tree that one example is asked at. Known by its identity."""

    branches: Branches
    """Tokens computed behind the prompt."""
    parents: tuple[int, ...]
    """[P] the branch, or ROOT, behind which each fork stands."""
    targets: tuple[tuple[int, ...], ...]
    """[P] the tokens that may follow."""
    truths: tuple[int, ...]
    """[P] which of them the right answer takes; -1 where it does not pass."""
    ways: tuple[tuple[tuple[int, int], ...], ...]
    """[P] the forks before, and the slot taken at each: how likely the fork is reached. Empty on one answer's way."""


@functools.lru_cache(maxsize=4096)
def whole_tree(tree: CandidateTree, truths: tuple[int, ...] | None = None) -> Forks:
    """Return every fork of `tree`."""
    slots = [-1] * len(tree.parents)
    ways: list[tuple[tuple[int, int], ...]] = [()] * len(tree.parents)
    passed: dict[int, tuple[tuple[int, int], ...]] = {}
    for candidate, fork, slot in sorted(tree.edges):
        ways[fork] = passed.get(candidate, ())
        passed[candidate] = (*ways[fork], (fork, slot))
        if candidate in (truths or ()):
            slots[fork] = slot
    return Forks(tree.branches, tree.parents, tree.targets, tuple(slots), tuple(ways))


@functools.lru_cache(maxsize=4096)
def path_to(tree: CandidateTree, answers: tuple[int, ...]) -> Forks:
    """Return the forks that candidates `answers`, one of each of some questions, pass.

    The log-probability of each is the sum over its own, without any other's tokens: one or two tokens behind the prompt
    in place of a whole tree, of 77 labels 60 and more.
    """
    passed = sorted((fork, slot) for owner, fork, slot in tree.edges if owner in answers)
    ancestors = tree.branches.ancestors
    parents = {tree.parents[fork] for fork, _ in passed} - {ROOT}
    needed = sorted(set[int]().union(*(ancestors[parent] for parent in parents)))
    place = {branch: number for number, branch in enumerate(needed)} | {ROOT: ROOT}
    branches = Branches(
        token_ids=tuple(tree.branches.token_ids[branch] for branch in needed),
        depths=tuple(tree.branches.depths[branch] for branch in needed),
        ancestors=tuple(frozenset(place[before] for before in ancestors[branch]) for branch in needed),
    )
    return Forks(
        branches=branches,
        parents=tuple(place[tree.parents[fork]] for fork, _ in passed),
        targets=tuple(tree.targets[fork] for fork, _ in passed),
        truths=tuple(slot for _, slot in passed),
        ways=((),) * len(passed),
    )


def likeliest(logprobs: Tensor, num_questions: int) -> list[tuple[int, ...]]:
    """Return for each row of `logprobs` [B, C] the likeliest candidate of every question."""
    best = logprobs.view(len(logprobs), num_questions, -1).argmax(dim=-1)
    return [tuple(row) for row in (best + torch.arange(num_questions) * (logprobs.shape[1] // num_questions)).tolist()]
