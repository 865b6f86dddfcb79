"""How likely a row finds the tokens it is asked about, without the logits of all the others in memory.

Legend: T tokens, D hidden_size, V vocabulary, C tokens asked for; BLOCK_* the part of each that one program holds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cpu import ShapeError
from kernels.language import NO_FUSION, dot, load_tile
from kernels.softmax import LOG2E
from kernels.tiles import compute_capability

LN_2 = tl.constexpr(0.6931471805599453)

GROUP_T = tl.constexpr(16)
"""Blocks of tokens that follow each other before the vocabulary advances: at D = 4096 their hidden rows are 16 MB of
L2, and every embedding row comes from memory once for 2048 tokens."""

LABEL_BLOCK_D = 1024
"""Columns of a step of one label's product: 8 in each thread of 4 warps, 16 bytes of bfloat16."""

TILES: dict[int, dict[str, Any]] = {
    90: {"TMA": True, "BLOCK_T": 128, "BLOCK_V": 256, "num_warps": 8, "num_stages": 4},
    80: {"TMA": False, "BLOCK_T": 128, "BLOCK_V": 128, "num_warps": 8, "num_stages": 3},
}
"""Blocks of the normalizer's product by compute capability; one each, as another could add in another order.

Few tokens fill it badly, but cost no time: padded to 128 rows, the embedding's 2 bytes a weight are still the longer
wait, 128 operations a byte where an H100 has 295. Without TMA, descriptors load through registers, hence pointers.
"""


@triton.jit
def _label_logits_kernel(
    hidden_ptr, head_ptr, token_ids_ptr, logits_ptr, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    hidden_ptr += t * D
    head_ptr += tl.load(token_ids_ptr + t * C + c).to(tl.int64) * D
    products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        products += hidden * tl.load(head_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(logits_ptr + t * C + c, tl.sum(products, axis=0))


def label_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return hidden @ head.T at `token_ids`, as [T, C] float32; only those rows of the embedding are read.

    Args:
        hidden: [T, D] after the final norm, contiguous; D a multiple of 16, so that every row is loaded, and its
            products added, in the same order wherever it lies.
        head: [V, D] the output embedding, contiguous.
        token_ids: [T, C] int64, each in [0, V).

    Raises: ShapeError if shapes differ, D is no multiple of 16, or a tensor is not contiguous.
    """
    _check("label_logits", hidden, head, token_ids)
    logits = torch.empty(token_ids.shape, dtype=torch.float32, device=hidden.device)
    if logits.numel():
        _label_logits_kernel[token_ids.shape](
            hidden, head, token_ids, logits, C=token_ids.shape[1], D=head.shape[1], BLOCK_D=LABEL_BLOCK_D, **NO_FUSION
        )
    return logits


@triton.jit
def _normalizer_kernel(
    hidden, head, partials_ptr, T, V, D: tl.constexpr,
    TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token_blocks, splits = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    block = tl.program_id(0)
    token_block, split = tl.swizzle2d(block // splits, block % splits, token_blocks, splits, GROUP_T)
    first_t, first_v = token_block * BLOCK_T, split * BLOCK_V
    logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        hidden_tile = load_tile(hidden, first_t, d, T, D, D, TMA, BLOCK_T, BLOCK_D)
        head_tile = load_tile(head, first_v, d, V, D, D, TMA, BLOCK_V, BLOCK_D)
        logits = dot(hidden_tile, head_tile.T, logits, FLOAT32="tf32")
    t, v = first_t + tl.arange(0, BLOCK_T), first_v + tl.arange(0, BLOCK_V)
    logits = tl.where((v < V)[None, :], logits * LOG2E, float("-inf"))
    largest = tl.max(logits, axis=1)
    total = tl.sum(tl.exp2(logits - largest[:, None]), axis=1)
    tl.store(partials_ptr + t.to(tl.int64) * splits + split, largest + tl.log2(total), mask=t < T)


def _normalizer_partials(hidden: Tensor, head: Tensor, tile: dict[str, Any]) -> Tensor:
    """Return log2 of the sum of exp(logit) over each block of the vocabulary, [T, blocks] float32."""
    (tokens, width), vocab_size = hidden.shape, head.shape[0]
    splits = triton.cdiv(vocab_size, tile["BLOCK_V"])
    partials = torch.empty((tokens, splits), dtype=torch.float32, device=hidden.device)
    block_d = 128 // head.element_size()  # the 128 bytes that a swizzled row of shared memory holds
    operands: tuple[Any, Any] = hidden, head
    if tile["TMA"]:
        operands = (
            TensorDescriptor.from_tensor(hidden, [tile["BLOCK_T"], block_d]),
            TensorDescriptor.from_tensor(head, [tile["BLOCK_V"], block_d]),
        )
    _normalizer_kernel[(triton.cdiv(tokens, tile["BLOCK_T"]) * splits,)](
        *operands, partials, tokens, vocab_size, D=width, BLOCK_D=block_d, **tile, **NO_FUSION
    )
    return partials


@triton.jit
def _logprobs_kernel(
    logits_ptr, partials_ptr, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + t * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    largest = tl.max(partials, axis=0)
    normalizer = (largest + tl.log2(tl.sum(tl.exp2(partials - largest), axis=0))) * LN_2
    c = tl.arange(0, BLOCK_C)
    logits = tl.load(logits_ptr + t * C + c, mask=c < C, other=0.0)
    tl.store(logits_ptr + t * C + c, logits - normalizer, mask=c < C)


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return log softmax(hidden @ head.T) at `token_ids`, as [T, C] float32.

    The logits of `token_ids` are summed in float32; the normalizer over the vocabulary is taken from products in the
    dtype of `head`, on tensor cores, which read float32 as TF32. One program multiplies a block of tokens by a block
    of the vocabulary and keeps one number a token, the log2 of the block's sum; those of a token are then added in the
    order of the vocabulary. No block's size depends on T, so neither do the bits of a row.

    Args:
        hidden: [T, D] after the final norm, contiguous; D a multiple of 16.
        head: [V, D] the output embedding, contiguous.
        token_ids: [T, C] int64, each in [0, V).

    Raises: ShapeError if shapes differ, D is no multiple of 16, or a tensor is not contiguous.
    Source: online normalizer, arXiv 1805.02867.
    """
    logits = label_logits(hidden, head, token_ids)
    if logits.numel():
        partials = _normalizer_partials(hidden.to(head.dtype), head, TILES[_architecture(head.device)])
        splits, labels = partials.shape[1], token_ids.shape[1]
        _logprobs_kernel[(len(hidden),)](
            logits, partials, C=labels, SPLITS=splits, BLOCK_C=triton.next_power_of_2(labels),
            BLOCK=triton.next_power_of_2(splits), **NO_FUSION,
        )  # fmt: skip
    return logits


def _architecture(device: torch.device) -> int:
    """Return the key of TILES for a card; the interpreter runs what Hopper runs."""
    return 90 if compute_capability(device) // 10 in (9, 10) else 80


def _check(function: str, hidden: Tensor, head: Tensor, token_ids: Tensor) -> None:
    """Raise ShapeError unless the tensors fit each other and lie as the kernels read them."""
    shapes = f"hidden {list(hidden.shape)}, head {list(head.shape)}, token_ids {list(token_ids.shape)}"
    if head.shape[1] % 16 or not head.numel() or hidden.shape[1:] != head.shape[1:]:
        raise ShapeError(f"{function}: {shapes} must be [T, D], [V, D], [T, C] with D a multiple of 16")
    if token_ids.dim() != 2 or len(token_ids) != len(hidden):
        raise ShapeError(f"{function}: {shapes} must ask for C tokens in each of T rows")
    if not (hidden.is_contiguous() and head.is_contiguous() and token_ids.is_contiguous()):
        raise ShapeError(f"{function}: {shapes} must each be contiguous")
