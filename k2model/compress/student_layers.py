"""The layers of a model that is trained. Plain PyTorch; names are the checkpoint's.

With INT8 products a forward pass gives the bits that the engine will give.

Legend: T packed tokens, D hidden_size, H heads, G key-value heads, E routed experts, A experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from k2model.compress.quantize import quantize_weight
from k2model.compress.student_attention import Packed
from k2model.config import AttentionConfig, ModelConfig, MoeConfig
from k2model.decoder import feed_forward
from kernels import cpu, ops, rowwise, training

Product = Callable[[Tensor, Sequence[nn.Linear]], Tensor]
"""Returns x [T, K] times each of several linears that share it, outputs side by side [T, sum of N]: float32, or, of
`bfloat16_product`, bfloat16."""


def float32_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Return the product in float32."""
    return functional.linear(x, *_joined(linears))


def bfloat16_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Return the product of bfloat16 values, in bfloat16; weights stay float32 where they are learned."""
    return functional.linear(x.bfloat16(), *_joined(linears, torch.bfloat16))


def int8_product(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Return the product as an INT8 checkpoint's engine computes it, to the bit; gradients pass the rounding."""
    return _applied(_Int8Product, x, *_joined(linears))


class _Int8Product(torch.autograd.Function):
    """W8A8 as k2model/decoder/linear.py; backward is that of the float product of the rounded values.

    Source: straight-through estimator, arXiv 1308.3432. Scales are absmax, so nothing is clipped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_int8, x_scale = ops.quantize_rows(x)
        weight_int8, weight_scale = quantize_weight(weight)
        ctx.save_for_backward(x_int8, x_scale, weight_int8, weight_scale)
        return ops.int8_linear(x_int8, x_scale, weight_int8, weight_scale.squeeze(1), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_int8, x_scale, weight_int8, weight_scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        is_fast = grads[0].device.type == "cpu" and cpu.has_bfloat16_product()
        dtype = torch.bfloat16 if is_fast else grads[0].dtype
        grad = grads[0].to(dtype)
        return (
            (grad @ (weight_int8 * weight_scale).to(dtype)).float() if needs_x else None,
            (grad.t() @ (x_int8 * x_scale[:, None]).to(dtype)).float() if needs_weight else None,
            grads[0].sum(dim=0) if needs_bias else None,
        )


class _StoredRows(torch.autograd.Function):
    """Rows of an embedding as an INT8 checkpoint has them, bfloat16 or made of INT8; gradients pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, is_int8: bool) -> Tensor:
        if is_int8:
            values, scale = quantize_weight(rows)
            rows = values.float() * scale
        return rows.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _is_compiled(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether kernels/rowwise.py or training.py computes it: elsewhere torch's operations come near enough."""
    return x.device.type == "cpu" and x.dtype in dtypes


class _RmsNorm(torch.autograd.Function):
    """RMSNorm as the engine computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        if _is_compiled(x, torch.float32):
            return rowwise.rms_norm(x, weight, eps)
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        if _is_compiled(x, torch.float32):
            return *training.rms_norm_gradient(x, weight, ctx.eps, grads[0]), None
        share = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + ctx.eps)
        normed, grad = x * share, grads[0] * weight
        of_weight = (grads[0] * normed).flatten(0, -2).sum(dim=0)
        return (grad - normed * (grad * normed).mean(dim=-1, keepdim=True)) * share, of_weight, None


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up as the engine computes it, with what it takes in alone kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if _is_compiled(gate_up, torch.float32):
            return rowwise.swiglu(gate_up)
        if _is_compiled(gate_up, torch.bfloat16):
            return training.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if _is_compiled(gate_up, torch.float32, torch.bfloat16):
            return training.swiglu_gradient(gate_up, grads[0])
        gate, up = gate_up.chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        silu = share * gate
        return torch.cat([grads[0] * up * (share + silu * (1 - share)), grads[0] * silu], dim=-1)


class _Rotated(torch.autograd.Function):
    """`kernels/training.py: rotated`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return training.rotated(x, cos, sin, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return training.rotated(grads[0], cos, -sin, ctx.heads), None, None, None


def rows_of(table: Tensor, token_ids: Tensor, product: Product, *, is_int8: bool) -> Tensor:
    """Return rows [T, D] of an embedding, rounded as the checkpoint that `product` is for stores them.

    With `is_int8`, an INT8 checkpoint has them in INT8, too, and else in bfloat16.
    """
    rows = functional.embedding(token_ids, table)
    return _applied(_StoredRows, rows, is_int8) if product is int8_product else rows


def _applied(function: Any, *inputs: Tensor | float | None) -> Tensor:
    y: Tensor = function.apply(*inputs)
    return y


def _joined(linears: Sequence[nn.Linear], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the weights of linears below each other, and their biases, as `dtype` if one is given."""
    weights = [linear.weight.to(dtype) for linear in linears]
    biases = [linear.bias.to(dtype) for linear in linears if linear.bias is not None]
    if len(linears) == 1:
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [*, size], normed."""
        return _applied(_RmsNorm, x, self.weight, self._eps)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: AttentionConfig, d: int, eps: float) -> None:
        super().__init__()
        self._config = config
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, d, bias=config.o_bias)
        self.q_norm = Norm(config.head_dim, eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, eps) if config.qk_norm else None

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        packed: Packed,
        window: int | None,
        product: Product,
        read: Tensor | None,
    ) -> Tensor:
        """Return [T, D] for normed `h` [T, D]; of the places `read` [N] alone, [N, D], if those are given."""
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = product(h, [self.q_proj, self.k_proj, self.v_proj])
        if product is bfloat16_product:
            q, kv = self._rotated_in_bfloat16(qkv, rope)
            attended = packed.attend_in_torch(q, kv, config, window)
        else:
            q, k, v = qkv.view(len(h), -1, config.head_dim).split([heads, kv_heads, kv_heads], dim=1)
            q, k = self._normed(q, k)
            q, kv = _rotated(q, *rope), torch.cat([_rotated(k, *rope), v], dim=-1)
            stored = torch.bfloat16 if product is int8_product else torch.float32
            attended = packed.attend(q, kv, config, window, stored)
        return product(attended if read is None else attended.index_select(0, read), [self.o_proj])

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _rotated_in_bfloat16(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return queries [T, H, head_dim], and keys and values [T, G, 2 * head_dim]."""
        config = self._config
        sizes = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        if _is_compiled(qkv, torch.bfloat16) and self.q_norm is None:
            qkv = _applied(_Rotated, qkv, *rope, sizes[0] + sizes[1])
            q, k, v = qkv.view(len(qkv), -1, config.head_dim).split(sizes, dim=1)
        else:
            q, k, v = qkv.view(len(qkv), -1, config.head_dim).split(sizes, dim=1)
            q, k = (_rotated(x, *rope).bfloat16() for x in self._normed(q.float(), k.float()))
        return q, torch.cat([k, v], dim=-1)


class FeedForward(nn.Module):
    """The gated feed-forward."""

    def __init__(self, d: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, h: Tensor, product: Product) -> Tensor:
        """Return [T, D] for normed `h` [T, D]."""
        return product(_applied(_Swiglu, product(h, [self.gate_proj, self.up_proj])), [self.down_proj])


class Router(nn.Module):
    """Scores experts for every token."""

    e_score_correction_bias: Tensor

    def __init__(self, d: int, n_routed_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_routed_experts, d))
        self.register_buffer("e_score_correction_bias", torch.empty(n_routed_experts))


class MixtureOfExperts(nn.Module):
    """Routed experts and a shared one, as `cut_experts` makes them, in the engine's order.

    Every token's experts are computed for it and no other, as in a run, so a step costs what its share of them does.
    Which are chosen has no gradient; what each weighs has one.
    """

    def __init__(self, d: int, config: MoeConfig) -> None:
        super().__init__()
        self._config = config
        self.gate = Router(d, config.n_routed_experts)
        self.experts = nn.ModuleList(
            FeedForward(d, config.moe_intermediate_size, False) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = FeedForward(d, config.shared_intermediate_size, False)
        self.imbalance = torch.zeros(())
        """How unevenly the last tokens chose: 1 if every expert is as likely and as often taken. arXiv 2101.03961."""

    def forward(self, h: Tensor, product: Product) -> Tensor:
        """Return [T, D] for normed `h` [T, D]."""
        moe = self._config
        expert_ids, weights = self._chosen(cpu.row_matmul(h, self.gate.weight.t()))
        slots = expert_ids.flatten().sort(stable=True).indices
        counts = torch.bincount(expert_ids.flatten(), minlength=moe.n_routed_experts)
        rows = slots // moe.num_experts_per_tok
        taken = h.index_select(0, rows).split(counts.tolist())
        outputs = [expert(x, product).to(h.dtype) for expert, x in zip(self.experts, taken, strict=True) if len(x)]
        weighed = torch.cat(outputs) * weights.flatten().index_select(0, slots)[:, None]
        out = torch.zeros_like(h).index_add(0, rows, weighed)  # in ascending order of the experts
        shared: Tensor = self.shared_experts(h, product).to(h.dtype)
        return out + shared

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token [T, A] int64, ascending, and what they weigh [T, A]."""
        moe = self._config
        router = feed_forward.Router(moe, self.gate.weight, None, self.gate.e_score_correction_bias)
        expert_ids, weights = router.choose(logits.detach())
        chosen, scores = expert_ids.long(), torch.sigmoid(logits)
        share = torch.bincount(chosen.flatten(), minlength=moe.n_routed_experts) / chosen.numel()
        likely = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
        self.imbalance = moe.n_routed_experts * (share * likely).sum()
        own = moe.routed_scaling_factor * scores.gather(1, chosen)
        return chosen, weights + (own - own.detach())  # the engine's bits, with a gradient


class Layer(nn.Module):
    """Attention and feed-forward, pre-norm, with residuals."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make layer `index`."""
        super().__init__()
        assert isinstance(config.attention, AttentionConfig)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(d, eps)
        self.self_attn = Attention(config.attention, d, eps)
        self.post_attention_layernorm = Norm(d, eps)
        self.mlp: FeedForward | MixtureOfExperts
        if config.is_moe[index]:
            assert config.moe is not None
            self.mlp = MixtureOfExperts(d, config.moe)
        else:
            self.mlp = FeedForward(d, config.intermediate_size, config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        packed: Packed,
        window: int | None,
        product: Product,
        read: Tensor | None,
    ) -> Tensor:
        """Return the layer's output [T, D] for `x` [T, D]; of the places `read` [N] alone, if those are given."""
        attended = self.self_attn(self.input_layernorm(x), rope, packed, window, product, read).to(x.dtype)
        x = (x if read is None else x.index_select(0, read)) + attended
        hidden: Tensor = x + self.mlp(self.post_attention_layernorm(x), product).to(x.dtype)
        return hidden


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what cpu.apply_rope does, which writes in place and so has no gradient."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
