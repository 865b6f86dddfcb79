"""Dynamic sparsity: which experts a token can do without, layer by layer.

Top-p routing (arXiv 2403.07652) within the experts that the router chose: of a token's experts, by descending weight,
one is left out when those before it already hold the layer's threshold of all their weight. A layer's threshold is set
by the share of its droppable slots (all but each token's strongest) that it drops; shares are found by trying.

Legend: L layers, T tokens, A experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from k2model.config import ModelConfig
from k2model.decoder.feed_forward import MixtureOfExperts, Router
from k2model.decoder.model import Decoder
from k2model.flops import token_flops
from k2model.formats.checkpoint import check_router_thresholds

_BINS = 10_000
"""Thresholds are rounded up to whole bins, so a report says them exactly."""

_TRIAL = 0.5
"""Share of a layer's droppable slots that is dropped to see what the layer is worth."""

SHARES_TRIED = 7
"""Halvings of the interval in which the share of dropped slots lies: to within a hundredth."""


@dataclass(slots=True)
class Routing:
    """What the tokens of one layer had experts for."""

    reached: Tensor = field(default_factory=lambda: torch.zeros(_BINS + 1, dtype=torch.int64))
    """Droppable slots by the share of the token's weight before them, in bins."""
    tokens: int = 0
    slots: int = 0
    """Experts computed, of all tokens."""

    def add(self, expert_ids: Tensor, weights: Tensor, num_experts: int) -> None:
        """Count tokens with `expert_ids` and `weights` [T, A]."""
        sums = weights.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        bins = (sums[:, :-1] / sums[:, -1:] * _BINS).long().clamp_(max=_BINS)
        self.reached += torch.bincount(bins.flatten(), minlength=_BINS + 1)
        self.tokens += len(expert_ids)
        self.slots += int((expert_ids < num_experts).sum())

    def threshold(self, drop: float) -> float:
        """Return the lowest threshold that drops at most the share `drop` of the droppable slots."""
        if not drop:
            return 1.0
        after = self.reached.flip(0).cumsum(0).flip(0)  # slots in this bin and those above
        few = (after[1:] <= drop * int(after[0])).nonzero()
        return (int(few[0]) + 1) / _BINS if len(few) else 1.0


@dataclass(frozen=True, slots=True)
class _WatchedRouter(Router):
    """A router that counts what it chooses."""

    routing: Routing = field(default_factory=Routing)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the router returns."""
        expert_ids, weights = Router.choose(self, logits)
        self.routing.add(expert_ids, weights, logits.shape[1])
        return expert_ids, weights


def with_thresholds(decoder: Decoder, thresholds: Sequence[float]) -> Decoder:
    """Return `decoder` with the router threshold of each layer, 1 where nothing is dropped; itself without any.

    Its routers count what they drop, for `dropped_experts`.

    Raises: SpecError if the model has no experts, or another number of layers.
    """
    if not thresholds:
        return decoder
    check_router_thresholds(decoder.config, "the checkpoint", len(thresholds))
    dropped: list[Tensor] = []

    def change(index: int, router: Router) -> Router:
        if not dropped:
            dropped.append(torch.zeros((), dtype=torch.int64, device=router.weight.device))
        return replace(router, threshold=thresholds[index], dropped=dropped[0])

    return _with_routers(decoder, change)


def dropped_experts(decoder: Decoder) -> int:
    """Return how many experts of tokens were dropped since `decoder` got its thresholds; waits for the device."""
    moes = (layer.feed_forward for layer in decoder.layers if isinstance(layer.feed_forward, MixtureOfExperts))
    first = next(moes, None)
    return 0 if first is None or first.router.dropped is None else int(first.router.dropped)


def watched(decoder: Decoder) -> tuple[Decoder, dict[int, Routing]]:
    """Return `decoder` with routers that count what they choose, and their counts by layer."""
    routings = {index: Routing() for index, is_moe in enumerate(decoder.config.is_moe) if is_moe}

    def watch(index: int, router: Router) -> Router:
        values = {name: getattr(router, name) for name in Router.__slots__}
        return _WatchedRouter(**values, routing=routings[index])

    return _with_routers(decoder, watch), routings


def _with_routers(decoder: Decoder, change: Callable[[int, Router], Router]) -> Decoder:
    layers = []
    for index, layer in enumerate(decoder.layers):
        moe = layer.feed_forward
        if isinstance(moe, MixtureOfExperts):
            layer = replace(layer, feed_forward=replace(moe, router=change(index, moe.router)))
        layers.append(layer)
    return replace(decoder, layers=layers)


@dataclass(frozen=True, slots=True)
class Search:
    """Finds the thresholds that drop most at a stated agreement.

    Costs L + SHARES_TRIED + 1 passes over the tuning rows at most: `loss` once a layer with experts, `agreement` for
    the rest.
    """

    num_layers: int
    routings: dict[int, Routing]
    """By layer, with all experts."""
    loss: Callable[[tuple[float, ...]], float]
    """How far the answers are from those with all experts."""
    agreement: Callable[[tuple[float, ...]], float]
    """Share of the tuning rows that are answered as with all experts."""

    def sensitivities(self) -> dict[int, float]:
        """Return what dropping half of each layer's droppable slots, and nothing else, does to the answers."""
        return {index: max(self.loss(self._thresholds({index: _TRIAL})), 1e-9) for index in self.routings}

    def at_share(self, share: float, sensitivities: dict[int, float]) -> tuple[float, ...]:
        """Return thresholds that drop `share` of all droppable slots, most where least is lost.

        Every slot saves the same FLOPs, and a loss Σ s_l d_l² that grows with the square of what layer l drops is least
        for a given Σ d_l where d_l is as 1 / s_l, and at most 1.
        """
        worth = {index: 1 / sensitivity for index, sensitivity in sensitivities.items()}
        left, total, drops = share * len(worth), sum(worth.values()), {}
        for index in sorted(worth, key=worth.__getitem__, reverse=True):
            drops[index] = min(1.0, left * worth[index] / total) if left > 0 else 0.0
            if drops[index] == 1:
                left, total = left - 1, total - worth[index]
        return self._thresholds(drops)

    def best_share(self, wanted: float, sensitivities: dict[int, float]) -> float:
        """Return the largest share in [0, 1] found at which the tuning rows agree as `wanted`."""
        low, high = 0.0, 1.0
        if self.agreement(self.at_share(high, sensitivities)) >= wanted:
            return high
        for _ in range(SHARES_TRIED):
            middle = (low + high) / 2
            if self.agreement(self.at_share(middle, sensitivities)) >= wanted:
                low = middle
            else:
                high = middle
        return low

    def _thresholds(self, drops: dict[int, float]) -> tuple[float, ...]:
        """Return one threshold per layer, 1 where nothing is to be dropped."""
        return tuple(
            self.routings[index].threshold(drops[index]) if index in drops else 1.0 for index in range(self.num_layers)
        )


def flops_per_token(config: ModelConfig, routings: dict[int, Routing]) -> dict[str, float]:
    """Return FLOPs of a token's routed experts, and of all that `token_flops` counts."""
    assert config.moe is not None
    flops = token_flops(config)
    routed = config.moe.num_experts_per_tok * flops["expert"] * sum(config.is_moe)
    experts = flops["expert"] * sum(routing.slots / max(routing.tokens, 1) for routing in routings.values())
    return {"experts": experts, "model": flops["token"] - routed + experts}
