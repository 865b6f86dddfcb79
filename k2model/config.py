"""The shape of a model, read from a checkpoint's config.json. Field names are the checkpoint's own.

A model is an attention kind, a feed-forward kind per layer and a rope; a family only says which. Where a key is absent,
the default is that of the family's own configuration class, and sizes have none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from k2model.keys import Keys
from k2model.rope import RopeConfig, mscale, read_rope, rope_keys, rope_type
from schemas.errors import CheckpointError

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "mixtral", "gpt_oss", "deepseek_v3", "kimi_k2")
"""`model_type` values that open. SmolLM2 is `llama`, Moonlight `deepseek_v3`; `kimi_k2` computes what that does.
`glm4_moe`, grouped-query attention over DeepSeek-V3's experts, is what dense models are cut into."""

WRAPPERS = ("kimi_k25", "kimi_vl")
"""`model_type` values whose language model stands under `text_config`; what they see of images is skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Grouped-query attention, arXiv 2305.13245."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    """RMSNorm over each head's query and key, before rope."""
    sinks: bool
    """One more score per head takes part in the softmax and carries no value."""

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttentionConfig:
    """Multi-head latent attention, arXiv 2405.04434: keys and values of all heads from one latent per token."""

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool
    """On q_a_proj, kv_a_proj_with_mqa and o_proj."""
    latent_norm_eps: float
    """Of q_a_layernorm and kv_a_layernorm: 1e-6 in the makers' code, whatever rms_norm_eps says."""
    softmax_scale: float
    """(nope + rope) ** -0.5, times YaRN's mscale squared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """Routed experts: a router picks `num_experts_per_tok` feed-forwards per token."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    """Width of the feed-forward that every token passes; 0 for none."""
    scoring_func: str
    """`sigmoid`, `softmax` over all experts, or `softmax_topk` over the chosen ones."""
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    correction_bias: bool
    """Added to the scores for choosing, not for weighing (arXiv 2408.15664)."""
    bias: bool
    """On the router and on the experts."""
    swiglu_limit: float | None
    """Clamp of gate and up in gpt-oss's activation; None is plain SwiGLU."""
    swiglu_alpha: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder's sizes and constants."""

    family: str
    hidden_size: int
    intermediate_size: int
    """Of the dense feed-forwards."""
    mlp_bias: bool
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    attention: AttentionConfig | LatentAttentionConfig
    sliding_windows: tuple[int | None, ...]
    """Per layer: the last keys a token sees, itself included; None for all."""
    moe: MoeConfig | None
    is_moe: tuple[bool, ...]
    """Per layer: routed experts, or a dense feed-forward."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Return the config in `raw`, the parsed config.json of checkpoint `where`.

        Both spellings are read: the hub's (`rope_theta`, `rope_scaling`, `num_experts`) and that of transformers 5
        (`rope_parameters`, `num_local_experts`).

        Raises: CheckpointError naming the key, if one is missing, malformed, or asks for what is not computed here.
        """
        raw = text_config(raw)
        keys = Keys(raw, where)
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise _unknown_family(raw, where)
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise CheckpointError(f'{where}: hidden_act is "{raw["hidden_act"]}", expected "silu"')
        num_hidden_layers = keys.size("num_hidden_layers")
        moe, is_moe = _moe(family, keys, num_hidden_layers)
        latent = family in ("deepseek_v3", "kimi_k2")
        attention = _latent_attention(keys) if latent else _attention(family, keys)
        dim = attention.qk_rope_head_dim if isinstance(attention, LatentAttentionConfig) else attention.head_dim
        if family == "glm4_moe":
            _check_rotary(keys)
        return cls(
            family=family,
            hidden_size=keys.size("hidden_size"),
            intermediate_size=keys.size("intermediate_size"),
            mlp_bias=family == "llama" and keys.flag("mlp_bias", False),
            num_hidden_layers=num_hidden_layers,
            vocab_size=keys.size("vocab_size"),
            max_position_embeddings=keys.size("max_position_embeddings"),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-5 if family in ("mixtral", "gpt_oss", "glm4_moe") else 1e-6),
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            rope=read_rope(keys, dim, latent and keys.flag("rope_interleave", True)),
            attention=attention,
            sliding_windows=_sliding_windows(family, keys, num_hidden_layers),
            moe=moe,
            is_moe=is_moe,
        )


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of config.json `raw`: all of it, or what stands under `text_config`."""
    if raw.get("model_type") not in WRAPPERS or not isinstance(raw.get("text_config"), dict):
        return raw
    return {"quantization_config": raw.get("quantization_config"), **raw["text_config"]}


def _unknown_family(raw: Mapping[str, Any], where: str) -> CheckpointError:
    remedy = f"use a checkpoint of one of these: {', '.join((*FAMILIES, *WRAPPERS))}"
    if raw.get("auto_map"):
        return CheckpointError(
            f'{where}: model_type "{raw.get("model_type")}" brings its own Python code (auto_map), which is never run',
            remedy=remedy,
        )
    return CheckpointError(f'{where}: model_type is "{raw.get("model_type")}", which is not known here', remedy=remedy)


def _attention(family: str, keys: Keys) -> AttentionConfig:
    heads = keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", {"qwen3_moe": 4, "glm4_moe": 8}.get(family, heads))
    default_dim = {"qwen3": 128, "gpt_oss": 64}.get(family, keys.size("hidden_size") // heads)
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    bias = keys.flag("attention_bias", family == "gpt_oss")
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=keys.size("head_dim", default_dim),
        qkv_bias=family == "qwen2" or (bias and family != "mixtral"),
        o_bias=bias and family not in ("qwen2", "mixtral", "glm4_moe"),
        qk_norm=family in ("qwen3", "qwen3_moe") or (family == "glm4_moe" and keys.flag("use_qk_norm", False)),
        sinks=family == "gpt_oss",
    )


def _check_rotary(keys: Keys) -> None:
    """Refuse a model that rotates only part of each head, as GLM-4.5 does; it says so in either of two places."""
    factor = rope_keys(keys).raw.get("partial_rotary_factor", keys.raw.get("partial_rotary_factor", 0.5))
    if factor != 1:
        what = f"config.json has partial_rotary_factor = {factor!r} (0.5 if absent)"
        raise CheckpointError(f"{keys.where}: {what}, and this decoder rotates whole heads: 1")


def _latent_attention(keys: Keys) -> LatentAttentionConfig:
    nope, rope_dim = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
    scale = (nope + rope_dim) ** -0.5
    rope = rope_keys(keys)
    mscale_all_dim = rope.number("mscale_all_dim", 0.0)
    if rope_type(rope) != "default" and mscale_all_dim:
        scale *= mscale(rope.number("factor"), mscale_all_dim) ** 2
    return LatentAttentionConfig(
        num_attention_heads=keys.size("num_attention_heads"),
        q_lora_rank=None if keys.raw.get("q_lora_rank") is None else keys.size("q_lora_rank"),
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=keys.size("v_head_dim"),
        bias=keys.flag("attention_bias", False),
        latent_norm_eps=1e-6,
        softmax_scale=scale,
    )


def _sliding_windows(family: str, keys: Keys, num_hidden_layers: int) -> tuple[int | None, ...]:
    switched = family in ("qwen2", "qwen3", "qwen3_moe")
    everywhere = family in ("mixtral", "qwen3_moe")
    never = family in ("llama", "deepseek_v3", "kimi_k2", "glm4_moe")
    if never or (switched and not keys.flag("use_sliding_window", False)):
        return (None,) * num_hidden_layers
    window = keys.raw.get("sliding_window", _WINDOWS[family])
    window = None if window is None else keys.size("sliding_window", window)
    if window is None or everywhere:
        return (window,) * num_hidden_layers
    types = keys.raw.get("layer_types")
    if types is None:
        first = keys.raw.get("max_window_layers", 28)
        slides = [i >= first if switched else i % 2 == 0 for i in range(num_hidden_layers)]
    elif len(types) != num_hidden_layers or set(types) - {"sliding_attention", "full_attention"}:
        raise keys.fail("layer_types", f"sliding_attention or full_attention for each of {num_hidden_layers} layers")
    else:
        slides = [kind == "sliding_attention" for kind in types]
    return tuple(window if slide else None for slide in slides)


_WINDOWS = {"qwen2": 4096, "qwen3": 4096, "qwen3_moe": 4096, "gpt_oss": 128, "mixtral": None}
"""The window where the key is absent."""


def _moe(family: str, keys: Keys, num_hidden_layers: int) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    layers = range(num_hidden_layers)
    if family in ("llama", "qwen2", "qwen3"):
        return None, (False,) * num_hidden_layers
    if family in ("deepseek_v3", "kimi_k2", "glm4_moe"):
        first = int(keys.number("first_k_dense_replace", 1 if family == "glm4_moe" else 3))
        moe = _sigmoid_moe(family, keys)
        return moe, tuple(i >= first for i in layers)
    experts = "num_local_experts" if keys.raw.get("num_local_experts") is not None else "num_experts"
    n_routed_experts = keys.size(experts, {"qwen3_moe": 128, "mixtral": 8, "gpt_oss": 128}[family])
    is_qwen, is_gpt_oss = family == "qwen3_moe", family == "gpt_oss"
    moe = MoeConfig(
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=keys.size("num_experts_per_tok", {"qwen3_moe": 8, "mixtral": 2, "gpt_oss": 4}[family]),
        moe_intermediate_size=keys.size("moe_intermediate_size" if is_qwen else "intermediate_size"),
        shared_intermediate_size=0,
        scoring_func="softmax_topk" if is_gpt_oss else "softmax",
        norm_topk_prob=keys.flag("norm_topk_prob", False) if is_qwen else family == "mixtral",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        correction_bias=False,
        bias=is_gpt_oss,
        swiglu_limit=keys.number("swiglu_limit", 7.0) if is_gpt_oss else None,
        swiglu_alpha=keys.number("swiglu_alpha", 1.702) if is_gpt_oss else 1.0,
    )
    _check_choice(keys, moe)
    dense = set(keys.raw.get("mlp_only_layers") or ()) if is_qwen else set()
    step = keys.size("decoder_sparse_step", 1) if is_qwen else 1
    return moe, tuple(i not in dense and (i + 1) % step == 0 for i in layers)


def _sigmoid_moe(family: str, keys: Keys) -> MoeConfig:
    n_group, topk_group, factor = (1, 1, 1.0) if family == "glm4_moe" else (8, 4, 2.5)
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    keys.only("moe_layer_freq", 1)
    width = keys.size("moe_intermediate_size")
    moe = MoeConfig(
        n_routed_experts=keys.size("n_routed_experts"),
        num_experts_per_tok=keys.size("num_experts_per_tok", 8),
        moe_intermediate_size=width,
        shared_intermediate_size=width * int(keys.number("n_shared_experts", 1)),
        scoring_func="sigmoid",
        norm_topk_prob=keys.flag("norm_topk_prob", True),
        n_group=keys.size("n_group", n_group),
        topk_group=keys.size("topk_group", topk_group),
        routed_scaling_factor=keys.number("routed_scaling_factor", factor),
        correction_bias=True,
        bias=False,
        swiglu_limit=None,
        swiglu_alpha=1.0,
    )
    _check_choice(keys, moe)
    return moe


def _check_choice(keys: Keys, moe: MoeConfig) -> None:
    if moe.n_routed_experts % moe.n_group:
        raise keys.fail("n_group", f"a divisor of n_routed_experts = {moe.n_routed_experts}")
    if moe.topk_group > moe.n_group:
        raise keys.fail("topk_group", f"at most n_group = {moe.n_group}")
    reachable = moe.n_routed_experts // moe.n_group * moe.topk_group
    if moe.num_experts_per_tok > reachable:
        raise keys.fail("num_experts_per_tok", f"at most the {reachable} experts it can reach")
