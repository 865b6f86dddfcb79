"""The naive twin of kernels/paged_prefill.py.

Legend: T tokens, B sequences, H heads, G key-value heads, D key size, Dv value size, N branches of the largest tree.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.reference import attention_state


def paged_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    ends: Tensor | None = None,
    positions: Tensor | None = None,
    ancestors: list[list[set[int]]] | None = None,
) -> Tensor:
    """Return attention of each query [T, H, D] over its sequence's keys up to its own, as [T, H, Dv].

    Args:
        q: [T, H, D].
        key_cache: [blocks, G, page, D].
        value_cache: [blocks, G, page, Dv].
        block_table: [B, max_blocks], the pages of each sequence.
        cu_seqlens: [B + 1], where each one's queries start.
        starts: [B], the slot of each one's first query.
        scale: multiplies the scores.
        window: how many positions a query sees.
        sinks: [H], one more score per head.
        ends: [B], the slot behind each prompt.
        positions: [T], of every token.
        ancestors: for each sequence and each of its branches, the branches it sees.
    """
    out = torch.zeros(*q.shape[:2], value_cache.shape[3])
    for b, (first, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        keys, values = (
            cache[block_table[b].long()].transpose(1, 2).flatten(0, 1) for cache in (key_cache, value_cache)
        )
        start = int(starts[b])
        end = start + stop - first if ends is None else int(ends[b])

        def position(slot: int, start: int = start, first: int = first) -> int:
            return slot if positions is None or slot < start else int(positions[first + slot - start])

        for t in range(first, stop):
            own = start + t - first
            seen = list(range(min(own + 1, end)))
            if own >= end and ancestors is not None:
                seen += sorted(end + other for other in ancestors[b][own - end])
            seen = [slot for slot in seen if window is None or position(slot) > position(own) - window]
            for h in range(q.shape[1]):
                g = h * keys.shape[1] // q.shape[1]
                sink = None if sinks is None else sinks[h]
                out[t, h], _ = attention_state(q[t, h], keys[seen, g], values[seen, g], scale, sink)
    return out
