"""Tiles of the attention kernels by card, head size and dtype; never by how many tokens there are, so bits stay.

No measurement stands behind these numbers yet: they are chosen by machine code, which must not spill a register (the
tests compile every tile of the tables).
"""

from dataclasses import dataclass

import torch

from kernels.cpu import ShapeError
from kernels.tiles import compute_capability


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTile:
    """How attention is cut."""

    block_m: int
    """Rows of a program: (token, head) pairs, or heads."""
    block_n: int
    """Keys per step of the loop."""
    num_warps: int
    num_stages: int
    """Steps in flight. A page per key is an indirection, which Triton overlaps from 3 stages on (triton pull 4721)."""


ATTENTION_TILES = {
    (90, 64): AttentionTile(block_m=128, block_n=128, num_warps=8, num_stages=3),
    (90, 128): AttentionTile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (90, 192): AttentionTile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (90, 256): AttentionTile(block_m=64, block_n=64, num_warps=8, num_stages=2),
    (80, 64): AttentionTile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (80, 128): AttentionTile(block_m=128, block_n=32, num_warps=8, num_stages=3),
    (80, 192): AttentionTile(block_m=64, block_n=64, num_warps=8, num_stages=3),
    (80, 256): AttentionTile(block_m=64, block_n=32, num_warps=8, num_stages=2),
}
"""By capability and the widest key or padded value."""

DECODE_TILES = {
    (90, 16): AttentionTile(block_m=16, block_n=64, num_warps=4, num_stages=3),
    (90, 64): AttentionTile(block_m=64, block_n=64, num_warps=8, num_stages=3),
    (80, 16): AttentionTile(block_m=16, block_n=64, num_warps=8, num_stages=3),
    (80, 64): AttentionTile(block_m=64, block_n=32, num_warps=8, num_stages=3),
}
"""By capability and the query heads of one key-value head."""

LATENT_TILES = {
    (90, 16): AttentionTile(block_m=16, block_n=32, num_warps=8, num_stages=3),
    (90, 64): AttentionTile(block_m=64, block_n=32, num_warps=8, num_stages=3),
    (80, 16): AttentionTile(block_m=16, block_n=32, num_warps=8, num_stages=3),
}
"""By capability and heads."""

FLOAT32_TILE = AttentionTile(block_m=32, block_n=32, num_warps=4, num_stages=2)
"""For exact comparisons: twice the bytes fit nowhere else."""


def capability(device: torch.device) -> int:
    """Return the kind of card: 90 is Hopper and later, 80 the rest. Without a card the interpreter takes any tile."""
    return 90 if compute_capability(device) >= 90 else 80


def attention_tile(card: int, width: int, dtype: torch.dtype) -> AttentionTile:
    """Return the tile for many queries. Raises: ShapeError if keys or values are wider than 256."""
    return _fitting(ATTENTION_TILES, card, width, dtype, "head size")


def decode_tile(card: int, group: int, dtype: torch.dtype) -> AttentionTile:
    """Return the tile for one query per sequence, of `group` heads that read one key-value head."""
    return _fitting(DECODE_TILES, card, min(group, 64), dtype, "heads")


def latent_tile(card: int, heads: int, dtype: torch.dtype) -> AttentionTile:
    """Return the tile for one query per sequence over latents."""
    return _fitting(LATENT_TILES, card, min(heads, 64 if card == 90 else 16), dtype, "heads")


def _fitting(
    table: dict[tuple[int, int], AttentionTile], card: int, size: int, dtype: torch.dtype, what: str
) -> AttentionTile:
    """Return the tile of the smallest size in `table` that is at least `size`."""
    sizes = [limit for kind, limit in table if kind == card and limit >= size]
    if not sizes:
        raise ShapeError(f"attention: {what} {size} is more than {max(limit for _, limit in table)}")
    return FLOAT32_TILE if dtype == torch.float32 else table[card, min(sizes)]
