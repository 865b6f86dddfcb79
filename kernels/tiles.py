"""Tiles of the INT8 kernels by card and shape: tables to read, and pure functions that look one up.

No card has measured these yet. They are chosen by machine code, which `python -m kernels.aot` makes without one and the
tests of each kernel check for every tile of its table (the right instructions, no spills, shared memory that fits), and
by counting what the busiest multiprocessor must fetch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """How one matrix product x [M, K] @ weight [N, K].T is cut."""

    block_m: int
    """Rows of x, tokens, per program."""
    block_n: int
    """Rows of weight, out features, per program."""
    block_k: int
    """Columns of both per step of the inner loop."""
    num_warps: int
    num_stages: int
    """Steps whose operands are in shared memory at once: one is multiplied while the others arrive."""
    programs_per_sm: int = 1
    """Programs that a persistent kernel starts per multiprocessor; registers and shared memory must hold them."""
    group_m: int = 8
    """Tiles of M that follow each other before N advances, so that they find their weights in L2."""
    swapped: bool = False
    """Whether weight is the left side of the product: wgmma wants 64 rows there, and a decode step has fewer tokens."""
    split_k: int = 1
    """Programs that share one output tile, each with its own part of K."""


# The dense product, kernels/int8_gemm.py. `pytest tests/test_kernels_int8_gemm.py -k machine` compiles all of these, in
# the form that reads by TMA and in the one that reads by cp.async. Beside each tile: registers of a thread and KB of
# shared memory by triton 3.9, TMA form on sm_90; 3.6 needs up to 12 registers more and spills none of them either.
#
# Few rows, by tokens up to the key, are all swapped. What counts is how much of the weights is in flight: 48 KB in each
# of two programs, where 23 KB per multiprocessor cover 4.3 TB/s at 700 ns. wgmma takes no less than 16 tokens here: for
# 8, Triton falls back to mma.sync.
DECODE_SM90: Mapping[int, Tile] = {
    16: Tile(block_m=16, block_n=64, block_k=256, num_warps=4, num_stages=4, swapped=True),  # 34, 80 KB
    32: Tile(block_m=32, block_n=64, block_k=256, num_warps=4, num_stages=4, swapped=True),  # 42, 96 KB
    64: Tile(block_m=64, block_n=64, block_k=256, num_warps=4, num_stages=3, swapped=True),  # 64, 96 KB
}

# Many rows: the tile with the fewest bytes for the busiest multiprocessor wins; of equals, the first. Each of them asks
# more of L2 than its some 27 bytes per cycle and multiprocessor (an estimate): a step of 128 x 256 x 128 takes 1,024
# cycles to multiply and 1,800 to fetch. Larger tiles spill: 256 x 256 with 8 warps, 128 x 256 with 4.
#
# Triton waits for the products of a step before it issues the next: it keeps wgmma in flight for float32 sums alone
# (rule 2.1 of its WGMMAPipeline.cpp; `wgmma.wait_group 0` in each step, by 3.6 and by 3.9). So two programs of
# 128 x 128 share a multiprocessor, and one multiplies while the other waits. To try first on a card: 128 x 256 x 256
# with 2 stages (254, 224 KB), which waits half as often.
DENSE_SM90: Sequence[Tile] = (
    Tile(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4),  # 243, 224 KB
    Tile(block_m=128, block_n=128, block_k=128, num_warps=4, num_stages=3, programs_per_sm=2),  # 233, 104 KB
    DECODE_SM90[64],
)

# mma.sync is as fast swapped as not. All stay below the 99 KB of sm_86, sm_89 and sm_120, which use these too.
DECODE_SM80: Mapping[int, Tile] = {
    16: Tile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4, swapped=True),  # 56, 30 KB
    32: Tile(block_m=32, block_n=64, block_k=128, num_warps=4, num_stages=4, swapped=True),  # 72, 36 KB
    64: Tile(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=4, swapped=True),  # 142, 48 KB
}
# With 4 warps, 128 x 128 stands at 255 registers: whether it spills changes with the version of Triton.
DENSE_SM80: Sequence[Tile] = (
    Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4),  # 250, 72 KB
    Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4),  # 170, 48 KB
    DECODE_SM80[64],
)

MIN_SPLIT_COLUMNS = 1024
"""The least part of K worth a program of its own: on sm_90 four steps, which fill the stages once."""


def compute_capability(device: torch.device) -> int:
    """Return 10 times a card's major capability plus its minor; under the interpreter, an H100's 90."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def is_hopper(capability: int) -> bool:
    """Return whether a card has wgmma, and TMA to feed it. Blackwell has no wgmma."""
    return 90 <= capability < 100


def dense_tile(capability: int, num_sms: int, m: int, n: int, k: int) -> Tile:
    """Return the tile for [m, k] @ [n, k].T on a card of this compute capability (90: H100) and size."""
    decode, dense = (DECODE_SM90, DENSE_SM90) if is_hopper(capability) else (DECODE_SM80, DENSE_SM80)
    few = [tile for tokens, tile in decode.items() if m <= tokens]
    tile = few[0] if few else min(dense, key=lambda tile: _busiest_rows(tile, num_sms, m, n))
    return replace(tile, split_k=_splits(_tiles(tile, m, n), num_sms, k)) if tile.swapped else tile


def _tiles(tile: Tile, m: int, n: int) -> int:
    return -(-m // tile.block_m) * -(-n // tile.block_n)


def _busiest_rows(tile: Tile, num_sms: int, m: int, n: int) -> int:
    """Return how many rows of x and weight the multiprocessor with the most tiles fetches."""
    return -(-_tiles(tile, m, n) // num_sms) * (tile.block_m + tile.block_n)


def _splits(tiles: int, num_sms: int, k: int) -> int:
    """Return the largest power of two of programs per tile that find a multiprocessor each and enough of K."""
    split_k = 1
    while 2 * split_k * tiles <= num_sms and 2 * split_k * MIN_SPLIT_COLUMNS <= k:
        split_k *= 2
    return split_k


# The experts' products, kernels/grouped_gemm.py: by slots per block. A block's slots have one expert, so few tokens
# mean small blocks: 256 tokens fill 33 % of blocks of 16 in Kimi-K2's 384 experts, 8 % of blocks of 64. x is gathered
# by cp.async, since TMA gathers on sm_100 only; weights come by TMA, one instruction a step where cp.async takes 8.

GROUPED_SM90: Mapping[int, Tile] = {
    16: Tile(block_m=16, block_n=128, block_k=128, num_warps=4, num_stages=5, swapped=True),
    32: Tile(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=5, swapped=True),
    64: Tile(block_m=64, block_n=128, block_k=128, num_warps=4, num_stages=4),
    128: Tile(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4),
}
GROUPED_SM80: Mapping[int, Tile] = {
    16: Tile(block_m=16, block_n=128, block_k=128, num_warps=4, num_stages=4),
    32: Tile(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=4),
    64: Tile(block_m=64, block_n=128, block_k=128, num_warps=4, num_stages=4),
    128: Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4),
}

# INT4: a step is a pair of groups of 32, 4 KB of weights, so more stages. Always swapped. Each product of 32 columns is
# scaled in registers, which hold a block of 64 x 128 twice; 128 x 128 compiles to 246 of 255.
GROUPED_INT4_SM90: Mapping[int, Tile] = {
    16: Tile(block_m=16, block_n=128, block_k=64, num_warps=4, num_stages=8, swapped=True),
    32: Tile(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=6, swapped=True),
    64: Tile(block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=6, swapped=True),
}
GROUPED_INT4_SM80: Mapping[int, Tile] = {
    16: Tile(block_m=16, block_n=128, block_k=64, num_warps=4, num_stages=6, swapped=True),
    32: Tile(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=6, swapped=True),
    64: Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=6, swapped=True),
}


def grouped_tile(capability: int, num_slots: int, num_experts: int) -> Tile:
    """Return the tile of `expert_linear`: the smallest block that holds a mean expert's slots, or the largest."""
    return _grouped(GROUPED_SM90 if is_hopper(capability) else GROUPED_SM80, num_slots, num_experts)


def grouped_int4_tile(capability: int, num_slots: int, num_experts: int) -> Tile:
    """Return the tile of `expert_linear_int4`, chosen likewise."""
    return _grouped(GROUPED_INT4_SM90 if is_hopper(capability) else GROUPED_INT4_SM80, num_slots, num_experts)


def _grouped(tiles: Mapping[int, Tile], num_slots: int, num_experts: int) -> Tile:
    fitting = [block for block in tiles if block * num_experts >= num_slots]
    return tiles[min(fitting, default=max(tiles))]
