"""FLOPs of a unit: those computed, and those that were not, each cause by its own name.

What is shared saves tokens, and is no sparsity: the same answers come of it, to the bit, from any model. Sparsity is
what a computed token does without: experts it is not routed to, and those that a router threshold drops.
"""

from k2model.engine.request import Work
from schemas.runs import ModelFlops

CAUSES = {
    "duplicates": "exact duplicates",
    "shared": "instructions and other shared beginnings",
    "earlier_runs": "answered in earlier runs",
    "unread": "the last layer of tokens behind which nothing is asked",
    "inactive_experts": "experts that tokens are not routed to, against all experts",
    "dropped_experts": "experts dropped by router thresholds",
}
"""Why something was not computed, and how people are told."""


def flops_of(model: ModelFlops, work: Work, saved_tokens: dict[str, int]) -> dict[str, int]:
    """Return FLOPs by name: `computed`, and those saved by each of CAUSES; nothing where the model's are not known.

    Args:
        model: FLOPs of a token.
        work: what the process computed since another unit was told last. Steps mix units, so it may be theirs in part;
            over all units of a process nothing is told twice. It holds what no row is billed for, too: instructions,
            once in each process, and calibration.
        saved_tokens: prompt tokens that were not computed, by cause: the first three of CAUSES.
    """
    if not model.token:
        return {}
    dropped, unread = work.dropped_experts * model.expert, work.unread_tokens * model.unread
    return {
        "computed": work.tokens * model.token - dropped - unread,
        **{cause: tokens * model.token for cause, tokens in saved_tokens.items()},
        "unread": unread,
        "inactive_experts": work.tokens * (model.all_experts - model.token),
        "dropped_experts": dropped,
    }
