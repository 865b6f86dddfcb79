"""The candidates of a request as one tree of tokens, so that what they have in common is computed once.

A candidate's probability is that of its tokens when, at every place, one of the candidates' tokens must follow: the
product over its forks. Where only one token can follow nothing is asked, so a set of 77 labels costs its forks, not its
tokens, and no product with the whole vocabulary.
"""

import functools
from dataclasses import dataclass

from k2model.decoder.branches import Branches
from k2model.engine.request import Candidate

ROOT = -1
"""The parent of a first token: the last token of the prompt."""


@dataclass(frozen=True, eq=False, slots=True)
class CandidateTree:
    """Every token that some fork is conditioned on, appended to the prompt as branches. Known by its identity."""

    branches: Branches
    parents: tuple[int, ...]
    """The forks: branches (or ROOT) after which more than one token is scored, ascending."""
    targets: tuple[tuple[int, ...], ...]
    """Per fork: the tokens that may follow."""
    edges: tuple[tuple[int, int, int], ...]
    """(candidate, index into `parents`, index into that fork's `targets`): what each candidate's sum is made of."""
    num_candidates: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every target, ascending."""
        return tuple(sorted({token_id for targets in self.targets for token_id in targets}))


@functools.lru_cache(maxsize=64)
def candidate_tree(candidates: tuple[Candidate, ...]) -> CandidateTree:
    """Return the tree of `candidates`.

    Raises: ValueError if a candidate is empty, scores no token or more tokens than it has, or is the beginning of
        another, which leaves open where it ends.
    """
    whole = {candidate.token_ids for candidate in candidates}
    scored: dict[tuple[int, ...], list[int]] = {}
    steps: list[tuple[int, tuple[int, ...], int]] = []
    for number, candidate in enumerate(candidates):
        if not 0 < candidate.num_scored <= len(candidate.token_ids):
            raise ValueError(f"candidate {number} scores {candidate.num_scored} of {len(candidate.token_ids)} tokens")
        for depth, token_id in enumerate(candidate.token_ids):
            path = candidate.token_ids[:depth]
            if path in whole:
                raise ValueError(f"candidate {number} begins with another one; end that with a stop token")
            if depth >= len(candidate.token_ids) - candidate.num_scored:
                targets = scored.setdefault(path, [])
                if token_id not in targets:
                    targets.append(token_id)
                steps.append((number, path, token_id))
    forks = {path: targets for path, targets in scored.items() if len(targets) > 1}
    # Shorter paths first, so that a branch comes after those it sees.
    needed = sorted(
        {fork[:end] for fork in forks for end in range(1, len(fork) + 1)}, key=lambda path: (len(path), path)
    )
    number_of = {path: number for number, path in enumerate(needed)} | {(): ROOT}
    parents = sorted(forks, key=lambda path: number_of[path])
    return CandidateTree(
        branches=Branches(
            token_ids=tuple(path[-1] for path in needed),
            depths=tuple(len(path) - 1 for path in needed),
            ancestors=tuple(frozenset(number_of[path[:end]] for end in range(1, len(path) + 1)) for path in needed),
        ),
        parents=tuple(number_of[path] for path in parents),
        targets=tuple(tuple(forks[path]) for path in parents),
        edges=tuple(
            (number, parents.index(path), forks[path].index(token_id))
            for number, path, token_id in steps
            if path in forks
        ),
        num_candidates=len(candidates),
    )
