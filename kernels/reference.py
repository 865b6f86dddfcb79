"""The naive twin of every kernel: slow, plain, and right. Oracles for tests; `int8_matmul` is also the exact fallback.

Legend: as kernels/cpu.py.
"""

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [T, K] as int8 in [-127, 127] and its row scales [T] float32, so that x ≈ x_int8 * x_scale[:, None].

    The scale is absmax / 127; an all-zero row has scale 1. Source: LLM.int8(), arXiv 2208.07339, vector-wise scaling.
    """
    x = x.to(torch.float32)
    x_scale = x.abs().amax(dim=1) / 127
    x_scale = torch.where(x_scale == 0, torch.ones_like(x_scale), x_scale)
    return torch.round(x / x_scale[:, None]).clamp(-127, 127).to(torch.int8), x_scale


def int8_matmul(x_int8: Tensor, weight: Tensor) -> Tensor:
    """Return x_int8 [T, K] @ weight [N, K].T as exact int32 [T, N].

    Summed in float32 over blocks of 1024 columns: 1024 * 128**2 = 2**24, so every partial sum is an exact integer.
    """
    acc = torch.zeros(x_int8.shape[0], weight.shape[0], dtype=torch.int32)
    for start in range(0, x_int8.shape[1], 1024):
        block = slice(start, start + 1024)
        acc += (x_int8[:, block].float() @ weight[:, block].float().t()).to(torch.int32)
    return acc


def int8_linear(x_int8: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return (x_int8 @ weight.T) * x_scale[:, None] * weight_scale as float32 [T, N]."""
    return int8_matmul(x_int8, weight).to(torch.float32) * x_scale[:, None] * weight_scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis [T, D]. Source: arXiv 1910.07467."""
    x = x.to(torch.float64)
    return (x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.double()).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [T, H, D] rotated by position, half-split layout; cos, sin [T, D / 2]. Source: arXiv 2104.09864."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return (1 / (1 + torch.exp(-x.double()))).float()


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of gate_up [T, 2 N], as [T, N]. Source: arXiv 2002.05202."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).float()


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Return (up + 1) * gate * sigmoid(alpha * gate), both halves clamped at `limit`, as [T, N]. Source: gpt-oss."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    gate, up = torch.minimum(gate, torch.tensor(limit)), torch.clamp(up, -limit, limit)
    return ((up + 1) * gate / (1 + torch.exp(-alpha * gate))).float()


def row_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight of x [*, T, K] and weight [*, K, N], summed in float64."""
    return (x.double() @ weight.double()).float()


def choose_experts(
    scores: Tensor, correction_bias: Tensor | None, num_experts: int, n_group: int, topk_group: int
) -> Tensor:
    """Return the experts with the highest scores, [T, A] int64 ascending, token by token; of equals, the lower id.

    Args:
        scores: [T, E].
        correction_bias: [E], added for choosing alone.
        num_experts: A.
        n_group: groups of neighbouring experts.
        topk_group: groups to choose from, by the sum of their two best scores.
    """
    chosen = []
    for row in (scores if correction_bias is None else scores + correction_bias).tolist():
        size = len(row) // n_group
        groups = [row[g * size : (g + 1) * size] for g in range(n_group)]
        order = sorted(range(n_group), key=lambda g, groups=groups: (-sum(sorted(groups[g])[-2:]), g))  # type: ignore[misc]
        experts = [e for g in order[:topk_group] for e in range(g * size, (g + 1) * size)]
        chosen.append(sorted(sorted(experts, key=lambda e, row=row: (-row[e], e))[:num_experts]))  # type: ignore[misc]
    return torch.tensor(chosen)


def int4_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return x @ (weight * scale).T as float32 [T, N], summed in float64.

    Args:
        x: [T, K].
        weight: [N, K] int8 in [-8, 7].
        weight_scale: [N, K / group].
    """
    group_size = weight.shape[1] // weight_scale.shape[1]
    return (x.double() @ (weight.double() * weight_scale.double().repeat_interleave(group_size, 1)).t()).float()


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ scale) v as [B, H, L, Dv], one query at a time, in float64.

    Args:
        q: [B, H, L, D].
        k: [B, G, S, D]; query head h reads key-value head h // (H / G).
        v: [B, G, S, Dv].
        visible: [L, S] bool; each query sees at least one key.
        scale: multiplies the scores.
        sinks: [H], one more score per head, which takes its share of the softmax and adds nothing.
    """
    out = torch.empty(*q.shape[:3], v.shape[3])
    shared = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys, values = k[b, h // shared, visible[i]].double(), v[b, h // shared, visible[i]].double()
                scores = keys @ q[b, h, i].double() * scale
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                out[b, h, i] = torch.softmax(scores, dim=0)[: len(values)] @ values
    return out


def token_logprobs(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return log softmax(hidden @ head.T) at `token_ids`, as [T, C] float32.

    Args:
        hidden: [T, D] after the final norm.
        head: [V, D] the output embedding.
        token_ids: [T, C] int64.
    """
    logits = hidden.double() @ head.double().t()
    return torch.log_softmax(logits, dim=-1).gather(1, token_ids).float()


def argmax_token(hidden: Tensor, head: Tensor) -> Tensor:
    """Return the token with the highest logit per row [T] int64; the lowest id wins a tie."""
    return (hidden.double() @ head.double().t()).argmax(dim=-1)
