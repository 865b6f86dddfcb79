"""From the logits at a candidate tree's forks to the candidates' probabilities: the engine's way, and a student's.

Not in k2model/engine/candidates.py: what makes prompts reads that, in drivers, too, which do without torch.
"""

import torch
from torch import Tensor

from k2model.engine.candidates import CandidateTree


def log_probabilities(tree: CandidateTree, logits: Tensor) -> Tensor:
    """Return each candidate's, [B, candidates] float64.

    Args:
        tree: it has a fork.
        logits: [B, forks, C] float64 of the tokens that may follow each fork, as in `targets`; -inf behind them.
    """
    logprobs = torch.log_softmax(logits, dim=-1).flatten(1)
    owner, fork, slot = torch.tensor(tree.edges, device=logits.device).unbind(1)
    sums = logits.new_zeros(len(logits), tree.num_candidates)
    return sums.index_add(1, owner, logprobs.index_select(1, fork * logits.shape[2] + slot))
