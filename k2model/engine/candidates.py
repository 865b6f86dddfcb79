"""The candidates of a request as one tree of tokens, so that what they have in common is computed once."""

import functools
from dataclasses import dataclass

from k2model.engine.request import Candidate

ROOT = -1
"""The parent of a first token: the last token of the prompt."""


@dataclass(frozen=True, slots=True)
class CandidateTree:
    """Every token some later token is conditioned on, appended to the prompt as nodes; last tokens need no node."""

    token_ids: tuple[int, ...]
    """Node to token."""
    depths: tuple[int, ...]
    """Node to tokens before it, counted from the end of the prompt."""
    ancestors: tuple[frozenset[int], ...]
    """Node to the nodes it sees, itself included."""
    parents: tuple[int, ...]
    """The nodes (or ROOT) whose next-token distribution is asked for, ascending."""
    targets: tuple[tuple[int, ...], ...]
    """Per entry of `parents`: the tokens whose log-probability is asked for."""
    edges: tuple[tuple[int, int, int], ...]
    """(candidate, index into `parents`, index into that parent's `targets`): what each candidate's sum is made of."""
    num_candidates: int


@functools.lru_cache(maxsize=64)
def candidate_tree(candidates: tuple[Candidate, ...]) -> CandidateTree:
    """Return the tree of `candidates`, whose shared beginnings become shared nodes.

    Raises: ValueError if a candidate is empty or scores no token, or more tokens than it has.
    """
    nodes: dict[tuple[int, ...], int] = {}
    ancestors: list[frozenset[int]] = []
    scored: dict[int, list[int]] = {}
    pairs: list[tuple[int, int, int]] = []
    for number, candidate in enumerate(candidates):
        if not 0 < candidate.num_scored <= len(candidate.token_ids):
            raise ValueError(f"candidate {number} scores {candidate.num_scored} of {len(candidate.token_ids)} tokens")
        parent, seen = ROOT, frozenset[int]()
        for depth, token_id in enumerate(candidate.token_ids):
            if depth >= len(candidate.token_ids) - candidate.num_scored:
                targets = scored.setdefault(parent, [])
                if token_id not in targets:
                    targets.append(token_id)
                pairs.append((number, parent, targets.index(token_id)))
            if depth + 1 == len(candidate.token_ids):
                break
            path = candidate.token_ids[: depth + 1]
            if path not in nodes:
                nodes[path] = len(nodes)
                ancestors.append(seen | {nodes[path]})
            parent, seen = nodes[path], ancestors[nodes[path]]
    parents = sorted(scored)
    return CandidateTree(
        token_ids=tuple(path[-1] for path in nodes),
        depths=tuple(len(path) - 1 for path in nodes),
        ancestors=tuple(ancestors),
        parents=tuple(parents),
        targets=tuple(tuple(scored[parent]) for parent in parents),
        edges=tuple((number, parents.index(parent), slot) for number, parent, slot in pairs),
        num_candidates=len(candidates),
    )
