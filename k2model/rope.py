"""The rotary position embedding a checkpoint asks for, in the spelling of the hub or of transformers 5."""

import math
from dataclasses import dataclass

from k2model.keys import Keys
from schemas.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3 frequency scaling: long wavelengths are slowed by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): slow dimensions interpolated, fast ones kept, a ramp between; at every length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the ends of the ramp are whole dimensions."""
    attention_factor: float
    """Multiplies cos and sin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding."""

    dim: int
    """Values rotated per head, in pairs."""
    theta: float
    interleaved: bool
    """Pairs are (x0, x1), (x2, x3), ...; else (x0, x[dim / 2]), ..."""
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None


def rope_keys(keys: Keys) -> Keys:
    """Return the rope's own keys: of `rope_parameters` (transformers 5) or `rope_scaling` (the hub), and the top's."""
    inner = keys.raw.get("rope_parameters") or keys.raw.get("rope_scaling") or {}
    if not inner and keys.raw.get("model_type") == "gpt_oss":
        inner = _GPT_OSS
    if any(isinstance(value, dict) for value in inner.values()):
        raise CheckpointError(f"{keys.where}: a rope of its own for each kind of layer is not computed here")
    return Keys({"rope_theta": keys.raw.get("rope_theta"), **inner}, f"{keys.where} rope")


_GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What gpt-oss means where config.json says nothing of rope, by its configuration class."""


def rope_type(rope: Keys) -> str:
    """Return the kind of scaling, `default` for none."""
    return str(rope.raw.get("rope_type") or rope.raw.get("type") or "default")


def read_rope(keys: Keys, dim: int, interleaved: bool) -> RopeConfig:
    """Return the rope over `dim` values a head. Raises: CheckpointError for a kind that is not computed here."""
    rope = rope_keys(keys)
    theta = {"mixtral": 1e6, "gpt_oss": 150000.0}.get(keys.raw["model_type"], 10000.0)
    if dim % 2:
        raise CheckpointError(f"{keys.where}: rope turns pairs, and {dim} values a head are odd")
    for settings in (keys, rope):
        settings.only("partial_rotary_factor", 1.0, None)
    return RopeConfig(
        dim=dim, theta=rope.number("rope_theta", theta), interleaved=interleaved, scaling=_scaling(keys, rope)
    )


def _scaling(keys: Keys, rope: Keys) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    kind = rope_type(rope)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=rope.number("factor"))
    if kind not in ("llama3", "yarn"):
        raise CheckpointError(
            f'{keys.where}: rope type "{kind}" is not computed here',
            remedy="use a checkpoint with rope type default, linear, llama3 or yarn",
        )
    original = rope.size("original_max_position_embeddings", keys.size("max_position_embeddings"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=original,
        )
    factor = rope.number("factor", keys.size("max_position_embeddings") / original)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", _attention_factor(rope, factor)),
    )


def _attention_factor(rope: Keys, factor: float) -> float:
    over, under = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if over and under:
        return mscale(factor, over) / mscale(factor, under)
    return mscale(factor, 1.0)


def mscale(factor: float, weight: float) -> float:
    """Return YaRN's temperature correction, 0.1 * weight * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
