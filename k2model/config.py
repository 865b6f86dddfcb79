"""The shape of a model, read from a checkpoint's config.json. Field names are the checkpoint's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from schemas.errors import CheckpointError

FAMILIES = ("llama",)
"""`model_type` values that open. SmolLM2 is `llama`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3 frequency scaling: long wavelengths are slowed by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder's sizes and constants."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Return the config in `raw`, the parsed config.json of checkpoint `where`.

        Both spellings of the rope keys are read: `rope_theta` and `rope_scaling` at the top (the hub), or inside
        `rope_parameters` (transformers 5).

        Raises: CheckpointError naming the key, if one is missing or asks for what this decoder does not compute.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(
                f'{where}: model_type is "{family}", and this version opens {", ".join(FAMILIES)}',
                remedy="use a Llama-family checkpoint, such as the default model",
            )
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                raise CheckpointError(f"{where}: config.json sets {key}, which the llama decoder does not compute")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f'{where}: hidden_act is "{raw["hidden_act"]}", expected "silu"')
        rope = {**raw, **(raw.get("rope_parameters") or {})}
        try:
            heads = raw["num_attention_heads"]
            return cls(
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                vocab_size=raw["vocab_size"],
                max_position_embeddings=raw["max_position_embeddings"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta", 10000.0)),
                rope_scaling=_rope_scaling(raw, where),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise CheckpointError(
                f"{where}: config.json has no key {error}", remedy="use the config.json that belongs to the weights"
            ) from None


def _rope_scaling(raw: Mapping[str, Any], where: str) -> RopeScaling | None:
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f'{where}: rope type "{kind}" is not computed by this version, only "llama3" and none')
    return RopeScaling(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
    )
