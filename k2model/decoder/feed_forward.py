"""Feed-forward kinds: dense, and routed experts with or without a shared one.

Legend: T tokens of the step, D hidden_size, F intermediate size, E experts, A experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2model.config import ModelConfig, MoeConfig
from k2model.decoder.linear import Int8Linear, Linear, LinearReader, Quantized, gated
from kernels import ops

_ROWS_AT_ONCE = 512
"""Tokens of one expert at once: beyond that its int32 products leave the cache, and a popular expert would need much
memory."""


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(activation(gate_up(x))): a dense layer, an expert, or the shared expert."""

    gate_up_proj: Linear
    down_proj: Linear
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0

    @property
    def first(self) -> Linear:
        """The layer that takes the input."""
        return self.gate_up_proj

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """Return [T, D] float32 for `x` [T, D]."""
        return self.down_proj(gated(self.gate_up_proj, self.down_proj, x, self.swiglu_alpha, self.swiglu_limit))


@dataclass(frozen=True, slots=True)
class Router:
    """Picks experts for every token, in float32."""

    config: MoeConfig
    weight: Tensor
    """[E, D] float32."""
    bias: Tensor | None
    correction_bias: Tensor | None
    threshold: float = 1.0
    """A token's weakest experts are dropped when those before them hold this share of its weight; at 1 none is."""
    dropped: Tensor | None = None
    """[] int64, counts the slots that were dropped; one for all layers, added to without waiting for the device."""

    def logits(self, x: Tensor) -> Tensor:
        """Return [T, E] float32."""
        logits = ops.row_matmul(x, self.weight.t())
        return logits if self.bias is None else logits + self.bias

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token [T, A] int32, ascending, and their weights [T, A] float32.

        E, which is no expert, stands last for those that were dropped, with weight 0. The weights of the others stay as
        they are: on random layers of 32 experts, 8 of them chosen, at a threshold of 0.7 the output is then off by 35 %
        (softmax) and 42 % (sigmoid, groups), 48 and 51 % where what is left is scaled up to the whole weight. No
        trained one was measured.
        """
        expert_ids, expert_weights, _ = self.route(logits)
        return expert_ids, expert_weights

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `choose` does, and how many experts of each token are kept [T] int32."""
        config = self.config
        expert_ids, expert_weights, counts = ops.route(
            logits,
            self.correction_bias,
            config.num_experts_per_tok,
            scoring=config.scoring_func,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            threshold=self.threshold,
        )
        if self.dropped is not None:
            self.dropped.add_(expert_ids.numel() - counts.sum())
        return expert_ids, expert_weights, counts


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Routed experts, and the shared one if there is one."""

    router: Router
    experts: Sequence[FeedForward]
    shared: FeedForward | None

    @property
    def first(self) -> Router:
        """What takes the input, in float32; experts quantize it once for all of them."""
        return self.router

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """Return [T, D] float32 for `x` [T, D] float32. Whoever shares its experts, a token's bits are its own."""
        assert isinstance(x, Tensor)  # see `first`
        out = run_experts(self.experts, x, *self.router.choose(self.router.logits(x)))
        return out if self.shared is None else out.add_(self.shared.forward(x))


def run_experts(experts: Sequence[FeedForward], x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts [T, D] float32, in ascending order, computed expert by expert.

    Args:
        experts: all of the layer.
        x: [T, D] float32.
        expert_ids: [T, A] int32, ascending; slots whose id is no expert's are not computed.
        expert_weights: [T, A] float32.
    """
    out = torch.zeros_like(x)
    # While calibrating, each expert is read when its tokens come, so that they cannot be asked before.
    is_int8 = isinstance(experts, list) and all(isinstance(expert.first, Int8Linear) for expert in experts)
    quantized = Quantized(*ops.quantize_rows(x)) if is_int8 else None
    slots = expert_ids.view(-1).sort(stable=True).indices
    counts = torch.bincount(expert_ids.view(-1), minlength=len(experts) + 1).tolist()
    for expert, mine in enumerate(slots.split(counts)[:-1]):
        if not len(mine):
            continue
        feed_forward = experts[expert]
        for part in mine.split(_ROWS_AT_ONCE):
            rows = part // expert_ids.shape[1]
            # INT8 rows are gathered as such: a quarter of the copy, and quantized once, not once an expert.
            taken = Quantized(quantized.values[rows], quantized.scale[rows]) if quantized else x[rows]
            out.index_add_(0, rows, feed_forward.forward(taken).mul_(expert_weights.view(-1)[part, None]))
    return out


def read_feed_forward(
    config: ModelConfig, index: int, reader: LinearReader, experts: Sequence[FeedForward] | None = None
) -> FeedForward | MixtureOfExperts:
    """Return the feed-forward of layer `index`; with `experts` in place of those read here. Raises: CheckpointError."""
    name, d, moe = f"model.layers.{index}.mlp", config.hidden_size, config.moe
    if not config.is_moe[index]:
        return _read(reader, name, d, config.intermediate_size, config.mlp_bias)
    assert moe is not None
    vector, size = reader.weights.vector, moe.n_routed_experts
    router = Router(
        config=moe,
        weight=reader.weights.plain(f"{name}.gate.weight", (size, d)).float(),
        bias=vector(f"{name}.gate.bias", size) if moe.bias else None,
        correction_bias=vector(f"{name}.gate.e_score_correction_bias", size) if moe.correction_bias else None,
    )
    if experts is None:
        experts = [read_expert(config, index, expert, reader) for expert in range(size)]
    shared_size = moe.shared_intermediate_size
    shared = _read(reader, f"{name}.shared_experts", d, shared_size, False) if shared_size else None
    return MixtureOfExperts(router, experts, shared)


def read_expert(config: ModelConfig, index: int, expert: int, reader: LinearReader) -> FeedForward:
    """Return expert `expert` of layer `index`. Raises: CheckpointError."""
    moe = config.moe
    assert moe is not None
    name = f"model.layers.{index}.mlp.experts.{expert}"
    made = _read(reader, name, config.hidden_size, moe.moe_intermediate_size, moe.bias)
    return replace(made, swiglu_limit=moe.swiglu_limit, swiglu_alpha=moe.swiglu_alpha)


def _read(reader: LinearReader, name: str, d: int, width: int, bias: bool) -> FeedForward:
    gate_up = reader.read([(f"{name}.gate_proj", width), (f"{name}.up_proj", width)], d, bias=bias)
    return FeedForward(gate_up, reader.read([(f"{name}.down_proj", d)], width, bias=bias))
