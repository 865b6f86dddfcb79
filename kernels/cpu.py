"""The CPU's products: a result row depends on its own input row alone, to the bit, whatever is beside it.

What is done to rows between products is in kernels/rowwise.py, attention in kernels/cpu_attention.py.

Legend: T tokens, K in features, N out features, D head size, H heads, V vocabulary, C tokens asked for.
Each has its plain twin of the same name in kernels/reference.py.
"""

import functools
import math
import time

import torch
from torch import Tensor

from kernels import int16_pairs, rowwise
from kernels.dot_tiles import HAS_INT16_PAIRS

MAX_IN_FEATURES = (2**31 - 1) // 127**2
"""The widest int8 dot product that cannot overflow int32: 133,152 columns of ±127."""

_HEAD_BLOCK = 64
"""Rows per output-embedding product, so that [rows, vocab] logits stay near the cache."""

_WIDENED_HEAD_BLOCK = 256
"""The same where the embedding is widened to float32 for each product, which takes as long as 64 rows do."""

ARGMAX_SHORTLIST = 16
"""Tokens of highest rounded logits, whose exact ones are compared."""

_ROW_BLOCK = 16
"""Rows of a float32 product. BLAS takes other paths for other row counts: of 4,581 rows, 18 differed on one thread and
54 on two between a product of all and of some; in blocks of 16, none."""

_FLOAT16_MAX = torch.finfo(torch.float16).max

INT4_GROUP_SIZES = (32, 64, 128, 256)


class ShapeError(ValueError):
    """Tensors that do not fit together: a programmer's error, never a row's fate."""


@functools.cache
def has_int8_product() -> bool:
    """Return whether oneDNN's int8 product is exact and fast here, by trying it.

    Without VNNI it may multiply through int16, which overflows on inputs like these; or it is a plain loop, 3 GOP/s a
    core with AVX2 where float32 reaches 70 and pairs of int16 130. All are exact: the choice never shows in a bit.
    Each is timed five times, in turn: of a single time one that waited for a core is the slower, and a process that so
    took float32 ran at a fifth of its rate.
    """
    x = torch.full((64, 1536), 127, dtype=torch.int8)
    x[1::2] = -127
    weight = torch.full((512, 1536), -127, dtype=torch.int8)
    weight[::3] = 127
    ways = (_onednn_int8_matmul, _float_int8_matmul)
    is_exact, seconds = torch.equal(*(way(x, weight) for way in ways)), [math.inf, math.inf]
    for _ in range(5):
        for place, way in enumerate(ways):
            start = time.perf_counter()
            way(x, weight)
            seconds[place] = min(seconds[place], time.perf_counter() - start)
    return is_exact and seconds[0] < seconds[1]


def _onednn_int8_matmul(x_int8: Tensor, weight: Tensor) -> Tensor:
    """Return the exact product as int32 [T, N]; 88 % of the VNNI peak, where torch's quantized.linear reaches 70 %."""
    return torch._int_mm(x_int8, weight.t())


def _float_int8_matmul(x_int8: Tensor, weight: Tensor) -> Tensor:
    """Return the exact product as int32 or float32 [T, N].

    1024 * 128**2 = 2**24, so within blocks of 1024 columns every partial sum is a float32 integer, in whatever order.
    Weights are widened call by call, 60 µs of 10 ms at 512 tokens: wide they would take four times the memory.
    """
    blocks = [
        _few_rows_mm(x_part.float(), weight_part.float())
        for x_part, weight_part in zip(x_int8.split(1024, dim=1), weight.split(1024, dim=1), strict=True)
    ]
    if len(blocks) == 1:
        return blocks[0]
    acc = blocks[0].to(torch.int32)
    for block in blocks[1:]:
        acc += block.to(torch.int32)
    return acc


def _few_rows_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, K] @ weight [N, K].T; of few rows swapped, as threads share it better: 16 take half the time."""
    return torch.mm(x, weight.t()) if len(x) > 64 else torch.mm(weight, x.t()).t().contiguous()


def int8_matmul(x_int8: Tensor, weight: Tensor) -> Tensor:
    """Return x_int8 [T, K] @ weight [N, K].T, exact, as int32 or float32 [T, N]."""
    if has_int8_product():
        return _onednn_int8_matmul(x_int8, weight)
    return int16_pairs.matmul(x_int8, weight) if HAS_INT16_PAIRS else _float_int8_matmul(x_int8, weight)


def int8_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x @ weight.T + bias as [T, N], accumulated exactly.

    Args:
        x_int8: [T, K] int8, row-quantized activations.
        x_scale: [T] float32; x ≈ x_int8 * x_scale[:, None].
        weight: [N, K] int8.
        weight_scale: [N] float32.
        bias: [N] float32.
        out_dtype: of the result.

    Raises: ShapeError if K differs or could overflow int32.
    """
    _check_product("int8_linear", x_int8, weight)
    return rowwise.scaled(int8_matmul(x_int8, weight), x_scale, weight_scale, bias).to(out_dtype)


def int8_swiglu(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    alpha: float | None,
    limit: float | None,
) -> tuple[Tensor, Tensor]:
    """Return swiglu_quantize(int8_linear(...)) as int8 [T, N / 2] and its scales [T]. Raises: as `int8_linear`."""
    _check_product("int8_swiglu", x_int8, weight)
    return rowwise.scaled_swiglu_quantize(int8_matmul(x_int8, weight), x_scale, weight_scale, bias, alpha, limit)


def _check_product(name: str, x_int8: Tensor, weight: Tensor) -> None:
    if x_int8.shape[1] != weight.shape[1] or weight.shape[1] > MAX_IN_FEATURES:
        raise ShapeError(f"{name}: {tuple(x_int8.shape)=}, {tuple(weight.shape)=}, K at most {MAX_IN_FEATURES}")


@functools.cache
def has_bfloat16_product() -> bool:
    """Return whether products in bfloat16 go by oneDNN here; else they are a plain loop, a sixth of float32's rate."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as float32 [T, N], from values rounded to the dtype of `weight` and summed in float32.

    Where oneDNN has a bfloat16 product, its result is rounded to bfloat16 too. All others are in blocks of 64 rows, for
    `row_matmul`'s reason: 1024 tokens of SmolLM2 in float32 take 1.05 to 1.27 times as long, by 16 rows 1.25 to 1.8.

    Args:
        x: [T, K] float32.
        weight: [N, K] float32, bfloat16 or float16.
    """
    if weight.dtype == torch.bfloat16 and has_bfloat16_product():
        return torch.nn.functional.linear(x.to(torch.bfloat16), weight).float()
    return row_matmul(rounded(x, weight.dtype).float(), weight.float().t(), block=_HEAD_BLOCK)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`; for float16 clamped to ± 65504 first, since past it were infinity, and NaN after."""
    return (x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX) if dtype == torch.float16 else x).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [T, H, D] rotated by position, half-split layout; cos, sin [T, D / 2]. Source: arXiv 2104.09864."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half:])
    return out


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)).

    torch.sigmoid and silu compute the last values of a tensor, and of each thread's share of it, by another formula
    than the rest, so that on 5 threads rows of 1536 changed with their neighbours. exp does not. It takes twice the
    time, which a forward pass does not show: 0.87 s for 512 tokens on one core, 0.90 s before.
    """
    return torch.neg(x).exp_().add_(1).reciprocal_()


def row_matmul(x: Tensor, weight: Tensor, block: int = _ROW_BLOCK) -> Tensor:
    """Return x @ weight of x [*, T, K] and weight [*, K, N] float32, so that a row's bits are its own."""
    count = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -count % block))
    return torch.cat([torch.matmul(part, weight) for part in padded.split(block, dim=-2)], dim=-2)[..., :count, :]


def int4_pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and scales in the order `int4_linear` reads: half a byte a weight, 4 bytes a scale.

    Args:
        weight: [N, K] int8 in [-8, 7].
        weight_scale: [N, K / group] float32; rounded to bfloat16, in which the makers of INT4 checkpoints store it.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.to(torch.int32) + 8, 1)
    scale = weight_scale.t().contiguous().to(torch.bfloat16)
    return packed, torch.stack([scale, torch.zeros_like(scale)], dim=-1)


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return x @ weight.T as float32 [T, N]: W4A16, activations and results rounded to bfloat16, sums in float32.

    Args:
        x: [T, K] float32.
        packed: [N, K / 2] uint8, by `int4_pack`.
        scales: [K / group, N, 2] bfloat16, by `int4_pack`.
        group_size: columns that share a scale, one of INT4_GROUP_SIZES.
    """
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), packed, group_size, scales)
    return y.float()


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return log softmax(hidden @ head.T) at `token_ids`, as [T, C] float32.

    The logits of `token_ids` are summed in float32; the normalizer over the vocabulary is taken from products in the
    dtype of `head`, where bfloat16 beats INT8 on this shape (k2batch bench linear).

    Args:
        hidden: [T, D] float32, after the final norm.
        head: [V, D] the output embedding.
        token_ids: [T, C] int64.
    """
    blocks = []
    at_once = _HEAD_BLOCK if has_bfloat16_product() else _WIDENED_HEAD_BLOCK
    for rows, ids in zip(hidden.split(at_once), token_ids.split(at_once), strict=True):
        logits = float_linear(rows, head)
        # torch.logsumexp splits the vocabulary over threads when there is but one row; log_softmax never does.
        normalizer = logits.amax(dim=-1) - torch.log_softmax(logits, dim=-1).amax(dim=-1)
        blocks.append(_exact_logits(rows, head, ids) - normalizer[:, None])
    return torch.cat(blocks)


def token_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return the logits [T, U] of `token_ids` [U] alone, for hidden [T, D] and the output embedding [V, D]."""
    return row_matmul(hidden, head[token_ids].float().t())


def argmax_token(hidden: Tensor, head: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the token with the highest logit per row [T] int64; the lowest id wins a tie of up to 16.

    A shortlist in the dtype of `head`, then exact float32 logits: bfloat16 logits near 20 are 0.125 apart.

    Args:
        hidden: [T, D] float32, after the final norm.
        head: [V, D] the output embedding.
        allowed: [T, V] bool, at least one of each row; None for all.
    """
    blocks = []
    at_once = _HEAD_BLOCK if has_bfloat16_product() else _WIDENED_HEAD_BLOCK
    for start in range(0, len(hidden), at_once):
        rows = hidden[start : start + at_once]
        barred = None if allowed is None else ~allowed[start : start + at_once]
        logits = _near_logits(rows, head)
        if barred is not None:
            logits.masked_fill_(barred, float("-inf"))
        ids = logits.topk(min(ARGMAX_SHORTLIST, head.shape[0]), dim=-1).indices.sort(dim=-1).values
        exact = _exact_logits(rows, head, ids)
        if barred is not None:
            exact.masked_fill_(barred.gather(1, ids), float("-inf"))
        best = exact.argmax(dim=-1, keepdim=True)
        blocks.append(ids.gather(1, best).squeeze(1))
    return torch.cat(blocks)


def _near_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return logits [T, V] for a shortlist, whose last bits may depend on the rows beside; widened in blocks."""
    if head.dtype == torch.bfloat16 and has_bfloat16_product():
        return float_linear(hidden, head)
    x = hidden.to(head.dtype).float()
    return torch.cat([_few_rows_mm(x, rows.float()) for rows in head.split(4096)], dim=1)


def _exact_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return [T, C] float32 logits of `token_ids`, each one product and sum over its own row."""
    return (head[token_ids].float() * hidden[:, None, :]).sum(dim=-1)
