"""The neurons of one dense feed-forward, shared out among experts by what they give on prompts.

Legend: T tokens, D hidden_size, F intermediate size, E routed experts, A experts per token, W neurons of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels import cpu, ops

GAIN = 2.0**-12
"""Of the router: an expert foretold to give one deviation more than the mean weighs 1.0001. Scores, near 0.5, are told
apart to 2**-24, a thousandth of a deviation."""

_BLOCK = 1024
"""Tokens at once."""

_COMPARED = 2048
"""Tokens that neurons are compared on."""

_ROUNDS = 8
"""Of balanced k-means."""

_ROUTER_RIDGE, _DOWN_RIDGE = 1e-2, 1e-1
"""Of the mean square of an input. Down: of 0.001, 0.01 and 0.1 the best on held-back tokens of SmolLM2."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense feed-forward, down(silu(gate x) * up x), in float32."""

    gate: Tensor
    """[F, D]"""
    up: Tensor
    """[F, D]"""
    down: Tensor
    """[D, F]"""

    def neurons(self, x: Tensor) -> Tensor:
        """Return what the neurons say [T, F] of `x` [T, D]."""
        return silu(x @ self.gate.t()) * (x @ self.up.t())


@dataclass(frozen=True, slots=True)
class Parts:
    """The same in parts: a shared expert, routed ones, and what routes to them."""

    shared: Tensor
    """[neurons] which of F every token passes, ascending."""
    routed: Tensor
    """[E, W] those of each routed expert, ascending; the expert that gives most is the first."""
    router: Tensor
    """[E, D]; logits are near 0."""
    correction_bias: Tensor
    """[E], what experts give whatever the token is, on the scale of the scores."""
    num_experts_per_tok: int

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts [T, A] of `x` [T, D] and their weights [T, A], near 1, as the decoder routes."""
        logits = cpu.row_matmul(x, self.router.t())
        ids, weights, _ = ops.route(
            logits,
            self.correction_bias,
            self.num_experts_per_tok,
            scoring="sigmoid",
            norm_topk_prob=False,
            routed_scaling_factor=2.0,
        )
        return ids.long(), weights

    def weights(self, x: Tensor, width: int) -> Tensor:
        """Return the weight of each of the `width` dense neurons [T, F]: 1 for shared ones, 0 where not routed to."""
        ids, weights = self.route(x)
        of_experts = x.new_zeros(len(x), len(self.routed)).scatter_(1, ids, weights)
        found = x.new_ones(len(x), width)
        found[:, self.routed.flatten()] = of_experts.repeat_interleave(self.routed.shape[1], dim=1)
        return found


def share_out(
    x: Tensor, dense: Dense, *, n_shared_experts: int, n_routed_experts: int, num_experts_per_tok: int
) -> Parts:
    """Return `dense` in parts of equal size, by what its neurons give on `x` [T, D].

    The shared ones are the neurons whose output is largest by mean square; those that are strong on the same tokens
    are one routed expert; the router is the linear function of x nearest to the size of each expert's output.
    """
    reach = dense.down.norm(dim=0)
    energy = sum((dense.neurons(block) * reach).square().sum(dim=0) for block in x.split(_BLOCK))
    assert isinstance(energy, Tensor)
    width = len(energy) // (n_shared_experts + n_routed_experts)
    order = energy.argsort(descending=True, stable=True)
    shared, rest = order[: n_shared_experts * width], order[n_shared_experts * width :]
    sampled = x[torch.linspace(0, len(x) - 1, min(len(x), _COMPARED)).long()]
    strength = (dense.neurons(sampled)[:, rest].abs() * reach[rest]).t()
    members = [rest[places].sort().values for places in balanced_clusters(_directions(strength), n_routed_experts)]
    members.sort(key=lambda neurons: -float(energy[neurons].sum()))
    routed = torch.stack(members)
    sizes = torch.cat([_sizes(block, dense, routed) for block in x.split(_BLOCK)])
    router, correction_bias = foretelling(x, sizes)
    return Parts(shared.sort().values, routed, router, correction_bias, num_experts_per_tok)


def balanced_clusters(points: Tensor, count: int) -> list[Tensor]:
    """Return the places of `points` [N, K] in `count` clusters of N / count each: k-means with equal sizes.

    Whoever is nearest to a centre that has room comes first. The first centres are points at equal distances in order.
    """
    size = len(points) // count
    centres = points[::size][:count]
    for _ in range(_ROUNDS):
        near = torch.cdist(points, centres)
        owner, room = [-1] * len(points), [size] * count
        for flat in near.flatten().argsort(stable=True).tolist():
            point, cluster = divmod(flat, count)
            if owner[point] < 0 and room[cluster]:
                owner[point] = cluster
                room[cluster] -= 1
        owners = torch.tensor(owner)
        centres = torch.stack([points[owners == cluster].mean(dim=0) for cluster in range(count)])
    return [(owners == cluster).nonzero().squeeze(1) for cluster in range(count)]


def fit_down(x: Tensor, dense: Dense, parts: Parts) -> Tensor:
    """Return the down projection [D, F] at which `parts` come nearest to the dense output on `x`, and near the old one.

    Least squares with a ridge: with every neuron active nothing is missing, and the old one is returned.
    """
    width = dense.down.shape[1]
    inner = torch.zeros(width, width, dtype=torch.float64)
    missing = torch.zeros(width, len(dense.down), dtype=torch.float64)
    for block in x.split(_BLOCK):
        neurons, weights = dense.neurons(block), parts.weights(block, width)
        active = neurons * weights
        inner += active.t() @ active
        missing += active.t() @ ((neurons * (weights == 0)) @ dense.down.t())
    inner.diagonal().add_(_DOWN_RIDGE * float(inner.diagonal().mean()) + 1e-30)
    change: Tensor = torch.cholesky_solve(missing, torch.linalg.cholesky(inner))
    return dense.down + change.t().float()


def kept(x: Tensor, dense: Dense, parts: Parts, down: Tensor) -> tuple[float, float]:
    """Return the share of the squared dense output that `parts` keep on `x`, and the most used expert's of tokens."""
    lost = whole = 0.0
    used = torch.zeros(len(parts.routed))
    for block in x.split(_BLOCK):
        neurons = dense.neurons(block)
        wanted = neurons @ dense.down.t()
        lost += float((wanted - (neurons * parts.weights(block, neurons.shape[1])) @ down.t()).square().sum())
        whole += float(wanted.square().sum())
        used += torch.bincount(parts.route(block)[0].flatten(), minlength=len(used))
    return 1 - lost / max(whole, 1e-30), float(used.max()) / len(x)


def _directions(strength: Tensor) -> Tensor:
    """Return rows without their mean, of length 1: distances between them tell how they go together."""
    centred = strength - strength.mean(dim=1, keepdim=True)
    length: Tensor = centred.norm(dim=1, keepdim=True)
    return centred / length.clamp_min(1e-30)


def _sizes(x: Tensor, dense: Dense, routed: Tensor) -> Tensor:
    """Return the length of what each expert gives [T, E]."""
    neurons = dense.neurons(x)
    return torch.stack([(neurons[:, own] @ dense.down[:, own].t()).norm(dim=1) for own in routed], dim=1)


def foretelling(x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the router [E, D] and the bias [E] whose scores rank experts by `sizes` [T, E], as far as a line can.

    On the scale of all sizes together, so that one deviation is a logit of GAIN; a sigmoid near 0 has the slope 1 / 4.
    """
    scaled = (sizes - sizes.mean()) / sizes.std().clamp_min(1e-30)
    mean, level = x.mean(dim=0), scaled.mean(dim=0)
    centred = (x - mean).double()
    inner = centred.t() @ centred
    inner.diagonal().add_(_ROUTER_RIDGE * float(inner.diagonal().mean()) + 1e-30)
    slope: Tensor = torch.cholesky_solve(centred.t() @ (scaled - level).double(), torch.linalg.cholesky(inner)).t()
    bias = level.double() - slope @ mean.double()
    return (slope * GAIN).float(), (bias * GAIN / 4).float()


def neurons_in(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Yield the feed-forwards of `parts` by name, and which neurons are in each."""
    for number, own in enumerate(parts.routed):
        yield f"experts.{number}", own
    yield "shared_experts", parts.shared
