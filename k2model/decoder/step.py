"""The shape of a step: packed tokens, their groups, and what earlier steps left of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class KeyValues:
    """What attention keeps of tokens, for sequences of one length: the shared prefix, or a group that decodes."""

    layers: list[Tensor]
    """Per layer [B, G, capacity, width]: keys and values side by side, or the latent and the rotated key."""
    length: int
    """Positions filled."""

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows` [n] int64."""
        self.layers = [layer[rows] for layer in self.layers]


@dataclass(slots=True)
class Group:
    """Sequences of one shape that stand back to back in a packed step, sequence by sequence."""

    count: int
    """B: sequences."""
    length: int
    """L: tokens of each in this step."""
    visible: Tensor
    """[L, S] bool: the keys each token sees."""
    prefix: KeyValues | None = None
    """Read before the group's own keys, the same for all its sequences."""
    cache: KeyValues | None = None
    """Keys of earlier steps; the step's own are appended. When there is one, it holds the prefix already."""

    @property
    def is_decode(self) -> bool:
        """Whether each sequence adds one token to what is cached."""
        return self.length == 1 and self.cache is not None and self.cache.length > 0


@dataclass(slots=True)
class Step:
    """One forward pass: packed tokens without padding."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    groups: list[Group]

    def visible(self, window: int | None) -> list[Tensor]:
        """Return per group the keys each token sees [L, S] bool, when it sees no further back than `window` keys."""
        if window is None:
            return [group.visible for group in self.groups]
        masks, start = [], 0
        for group in self.groups:
            own = self.positions[start : start + group.length]
            past = group.visible.shape[1] - group.length
            distances = own[:, None] - torch.cat([torch.arange(past), own])
            masks.append(group.visible & (distances < window))
            start += group.count * group.length
        return masks


def causal(length: int, past: int) -> Tensor:
    """Return the [length, past + length] bool mask: all of the past, and each token up to itself."""
    return torch.ones(length, past + length, dtype=torch.bool).tril(past)


def with_past(new: Tensor, group: Group, layer: int) -> Tensor:
    """Return `new` [B, G, L, width] of layer `layer` behind what the group's sequences hold, and cache it."""
    if group.prefix is not None:
        past = group.prefix.layers[layer][:, :, : group.prefix.length]
        new = torch.cat([past.expand(group.count, -1, -1, -1), new], dim=2)
    if group.cache is None:
        return new
    end = group.cache.length + new.shape[2]
    group.cache.layers[layer][:, :, group.cache.length : end] = new
    return group.cache.layers[layer][:, :, :end]
