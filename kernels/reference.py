"""The naive twin of every kernel: slow, plain, and right. Oracles for tests.

Legend: as kernels/cpu.py.
"""

import math
from itertools import pairwise

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


def int8_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return (x_int8 @ weight.T) * x_scale[:, None] * weight_scale + bias as [T, N], rounded once to `out_dtype`."""
    out = int8_matmul(x_int8, weight).to(torch.float32) * x_scale[:, None] * weight_scale
    return (out if bias is None else out + bias).to(out_dtype)


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


def weakest_experts(expert_weights: Tensor, threshold: float) -> Tensor:
    """Return which slots [T, A] bool follow, by descending weight, others that hold `threshold` of a token's weight."""
    weakest = []
    for row in expert_weights.tolist():
        order = sorted(range(len(row)), key=lambda slot, row=row: (-row[slot], slot))  # type: ignore[misc]
        held = [sum(row[slot] for slot in order[:rank]) for rank in range(len(row))]
        late = {slot for rank, slot in enumerate(order) if rank and held[rank] >= threshold * sum(row)}
        weakest.append([slot in late for slot in range(len(row))])
    return torch.tensor(weakest)


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


def argmax_token(hidden: Tensor, head: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the token with the highest logit per row [T] int64, of those `allowed`; the lowest id wins a tie."""
    logits = hidden.double() @ head.double().t()
    return (logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))).argmax(dim=-1)


def rms_norm_quantize(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMSNorm(x + residual) as int8 [T, D], its row scales [T] float32, and the sum [T, D] in the dtype of x."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    return *quantize_rows(rms_norm(total, weight, eps)), total


def swiglu_quantize(gate_up: Tensor, alpha: float | None = None, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the gated unit of gate_up [T, 2 F], clamped if there is a limit, as int8 [T, F] and its row scales [T]."""
    if alpha is None or limit is None:
        return quantize_rows(swiglu(gate_up))
    return quantize_rows(clamped_swiglu(gate_up, alpha, limit))


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> Tensor:
    """Return q [T, H, D] rotated; write k, rotated, and v into [blocks, G, page, D] at slot block * page + offset."""
    k = apply_rope(k.float(), cos, sin)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, key_cache.shape[2])
            key_cache[block, :, offset] = k[t].to(key_cache.dtype)
            value_cache[block, :, offset] = v[t].to(value_cache.dtype)
    return apply_rope(q.float(), cos, sin).to(q.dtype)


def label_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return hidden @ head.T at `token_ids` [T, C] as [T, C] float32."""
    return (hidden.double() @ head.double().t()).gather(1, token_ids).float()


def attention_state(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (softmax(k q scale) v [Dv], base-2 log-sum-exp []) of one query [D] over k [S, D], in float64.

    Zeros and -inf over no key; `sink` is one more score, which takes its share and adds nothing.
    """
    scores = k.double() @ q.double() * scale
    if sink is not None:
        scores = torch.cat([scores, sink.double().reshape(1)])
    if not len(scores):
        return torch.zeros(v.shape[1], dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)
    lse = torch.logsumexp(scores, dim=0)
    return torch.exp(scores - lse)[: len(v)] @ v.double(), lse / math.log(2)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out [T, H, Dv], base-2 lse [T, H]) of queries [T, H, D] that see all of k [S, G, D], v [S, G, Dv]."""
    out, lse = torch.empty(*q.shape[:2], v.shape[2]), torch.empty(q.shape[:2])
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            out[t, h], lse[t, h] = attention_state(q[t, h], k[:, g], v[:, g], scale)
    return out, lse


def packed_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [T, H, Dv], base-2 lse [T, H]) of causal attention within each sequence of `cu_seqlens` [B + 1].

    A query sees itself and, of the keys before, the last `window - 1` or all.
    """
    out, lse = torch.empty(*q.shape[:2], v.shape[2]), torch.empty(q.shape[:2])
    for start, end in pairwise(cu_seqlens.tolist()):
        for t in range(start, end):
            seen = slice(max(start, t + 1 - (window or max_seqlen)), t + 1)
            out[t : t + 1], lse[t : t + 1] = prefix_attention(q[t : t + 1], k[seen], v[seen], scale)
    return out, lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out [T, H, Dv], base-2 lse [T, H]) over the keys of both states; of no key, zeros and -inf."""
    lse = torch.logaddexp2(lse_a.double(), lse_b.double())
    shares = [torch.exp2(part.double() - lse).nan_to_num()[..., None] for part in (lse_a, lse_b)]
    return (out_a.double() * shares[0] + out_b.double() * shares[1]).float(), lse.float()


def paged_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention of one query per sequence [B, H, D] over its keys in pages, as [B, H, Dv].

    Args:
        q: [B, H, D].
        key_cache: [blocks, G, page, D].
        value_cache: [blocks, G, page, Dv].
        block_table: [B, max_blocks], the pages of each sequence.
        lens: [B], keys of each sequence.
        scale: multiplies the scores.
        window: how many of the last keys are visible.
        sinks: [H], one more score per head.
    """
    out = torch.zeros(*q.shape[:2], value_cache.shape[3])
    for b, length in enumerate(lens.tolist()):
        keys, values = (
            cache[block_table[b].long()].transpose(1, 2).flatten(0, 1) for cache in (key_cache, value_cache)
        )
        seen = slice(max(0, length - (window or length)), length)
        for h in range(q.shape[1]):
            g = h * keys.shape[1] // q.shape[1]
            sink = None if sinks is None else sinks[h]
            out[b, h], _ = attention_state(q[b, h], keys[seen, g], values[seen, g], scale, sink)
    return out


def mla_decode(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, lens: Tensor, scale: float, *, rank: int = 512
) -> Tensor:
    """Return absorbed latent attention [B, H, rank] over latents [blocks, page, rank + rope]: keys, in part values."""
    cache = latent_cache[:, None]
    return paged_decode(q, cache, cache[..., :rank], block_table, lens, scale)


def route(
    logits: Tensor,
    correction_bias: Tensor | None,
    num_experts_per_tok: int,
    *,
    scoring: str,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool,
    routed_scaling_factor: float = 1.0,
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return experts [T, A] int32 ascending, their weights [T, A], and how many are kept [T], one token at a time.

    Dropped ones, by `weakest_experts`, come last as expert E with weight 0.
    """
    tokens, experts = logits.shape
    scores = logits
    if scoring != "softmax_topk":
        scores = sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits.double(), dim=1).float()
    chosen = choose_experts(scores, correction_bias, num_experts_per_tok, n_group, topk_group)
    ids = torch.full((tokens, num_experts_per_tok), experts, dtype=torch.int32)
    weights, counts = torch.zeros(tokens, num_experts_per_tok), torch.zeros(tokens, dtype=torch.int32)
    for t in range(tokens):
        mine = scores[t, chosen[t]].double()
        if scoring == "softmax_topk":
            mine = torch.softmax(mine, dim=0)
        if norm_topk_prob:
            mine = mine / (mine.sum() + 1e-20)
        if threshold < 1:
            kept = ~weakest_experts(mine[None], threshold)[0]
        else:
            kept = torch.ones(num_experts_per_tok, dtype=torch.bool)
        mine = mine[kept]
        counts[t] = len(mine)
        ids[t, : len(mine)], weights[t, : len(mine)] = chosen[t][kept].int(), (mine * routed_scaling_factor).float()
    return ids, weights, counts


def align_tokens(expert_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return slots by expert, ascending, each expert's filled to whole blocks with S, and the expert of each block."""
    flat = expert_ids.flatten().tolist()
    slot_ids: list[int] = []
    block_experts: list[int] = []
    for expert in range(num_experts):
        mine = [slot for slot, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block_size)
        slot_ids += mine
        block_experts += [expert] * (len(mine) // block_size)
    return torch.tensor(slot_ids, dtype=torch.int32), torch.tensor(block_experts, dtype=torch.int32)


def expert_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    expert_ids: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return int8_linear of each slot's row by its expert, [S, N]; NaN for slots of expert E.

    Args:
        x_int8: [T, K] int8, or [S, K].
        x_scale: [T] or [S].
        weight: [E, N, K] int8.
        weight_scale: [E, N].
        expert_ids: [T, A].
        bias: [E, N].
        out_dtype: of the result.
    """
    out = torch.full((expert_ids.numel(), weight.shape[1]), torch.nan, dtype=out_dtype)
    for slot, expert in enumerate(expert_ids.flatten().tolist()):
        row = slot * len(x_int8) // len(out)
        if expert < len(weight):
            x = x_int8[row : row + 1], x_scale[row : row + 1]
            added = None if bias is None else bias[expert]
            out[slot] = int8_linear(*x, weight[expert], weight_scale[expert], added, out_dtype)[0]
    return out


def expert_linear_int4(
    x_int8: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, expert_ids: Tensor
) -> Tensor:
    """Return each slot's row by its expert's INT4 weights, [S, N] float32; NaN for slots of expert E.

    Groups of 32 are summed exactly, scaled, and added in float32, ascending.

    Args:
        x_int8: [T, K] int8, or [S, K].
        x_scale: [T] or [S].
        weight: [E, N, K] int8 in [-8, 7].
        weight_scale: [E, N, K / 32].
        expert_ids: [T, A].
    """
    out = torch.full((expert_ids.numel(), weight.shape[1]), torch.nan)
    for slot, expert in enumerate(expert_ids.flatten().tolist()):
        row = slot * len(x_int8) // len(out)
        if expert < len(weight):
            products = (weight[expert].float() * x_int8[row].float()).unflatten(1, (-1, 32)).sum(dim=2)
            total = torch.zeros(weight.shape[1])
            for group in range(products.shape[1]):
                total += products[:, group] * weight_scale[expert, :, group].float()
            out[slot] = total * x_scale[row]
    return out


def combine(y: Tensor, expert_weights: Tensor, counts: Tensor, shared: Tensor | None = None) -> Tensor:
    """Return each token's sum over its first counts[t] slots of y [S, D], weighted, + shared, as [T, D]."""
    tokens, per_token = expert_weights.shape
    out = torch.zeros(tokens, y.shape[1])
    for t, count in enumerate(counts.tolist()):
        for place in range(count):
            out[t] += y[t * per_token + place].float() * expert_weights[t, place]
    return (out if shared is None else out + shared.float()).to(y.dtype)
