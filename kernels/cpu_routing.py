"""Routing on the CPU: which experts a token visits, and with what weights.

Legend: T tokens, E experts, A experts per token.
"""

import torch
from torch import Tensor

from kernels.cpu import sigmoid


def route(
    logits: Tensor,
    correction_bias: Tensor | None,
    num_experts_per_tok: int,
    scoring: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the experts of each token [T, A] int32, their weights [T, A], and how many are kept [T] int32.

    The arguments, and what is kept, as `kernels.ops.route` tells.
    """
    scores = logits
    if scoring != "softmax_topk":
        scores = sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, dim=-1)
    ids = choose_experts(scores, correction_bias, num_experts_per_tok, n_group, topk_group)
    weights = scores.gather(1, ids)
    if scoring == "softmax_topk":
        weights = torch.softmax(weights, dim=-1)
    elif norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * routed_scaling_factor
    ids = ids.to(torch.int32)
    counts = ids.new_full((len(ids),), num_experts_per_tok)
    if threshold >= 1:
        return ids, weights, counts
    dropped = weakest_experts(weights, threshold)
    ids, order = ids.masked_fill_(dropped, logits.shape[1]).sort(dim=-1, stable=True)
    weights = weights.masked_fill_(dropped, 0).gather(1, order)
    return ids, weights, counts.sub_(dropped.sum(dim=-1))


def choose_experts(
    scores: Tensor, correction_bias: Tensor | None, num_experts: int, n_group: int, topk_group: int
) -> Tensor:
    """Return the experts with the highest scores, [T, A] int64 ascending; of equals, the lower id.

    Args:
        scores: [T, E] float32.
        correction_bias: [E], added for choosing alone (arXiv 2408.15664).
        num_experts: A.
        n_group: groups of neighbouring experts.
        topk_group: groups to choose from, by the sum of their two best scores (arXiv 2412.19437, section 2.1.2).
    """
    scores = scores if correction_bias is None else scores + correction_bias
    if n_group > topk_group:
        grouped = scores.unflatten(-1, (n_group, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        keep = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, keep, False)
        scores = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_experts].sort(dim=-1).values


def weakest_experts(expert_weights: Tensor, threshold: float) -> Tensor:
    """Return which slots [T, A] bool follow, by descending weight, others that hold `threshold` of a token's weight.

    Never the strongest one; of equals, the first counts as the stronger. After arXiv 2403.07652, section 3.1.
    """
    ranked, order = expert_weights.sort(dim=-1, descending=True, stable=True)
    reached = ranked.cumsum(dim=-1)
    follow = torch.nn.functional.pad(reached[:, :-1] >= threshold * reached[:, -1:], (1, 0))
    return torch.empty_like(follow).scatter_(1, order, follow)
