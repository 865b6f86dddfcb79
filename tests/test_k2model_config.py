"""config.json of every family: both spellings, the makers' defaults, and refusals that name the key."""

import math
from typing import Any

import pytest
import torch

from k2model.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from k2model.decoder.rope import cos_sin, inverse_frequencies
from k2model.formats.export import hub_name
from k2model.formats.names import canonical
from k2model.parameters import active_share, parameters
from schemas.errors import CheckpointError
from tests.checkpoints import FAMILIES, config_json

YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
K2: dict[str, Any] = {
    "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.827, "rope_theta": 50000, "vocab_size": 163840, "max_position_embeddings": 131072,
    "rope_scaling": {**YARN, "factor": 32, "beta_fast": 1.0, "beta_slow": 1.0}, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
K2_THINKING = {**K2, "rope_scaling": {**YARN, "factor": 64, "beta_fast": 32.0, "beta_slow": 1.0}}
DEEPSEEK = {
    **K2, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "num_attention_heads": 128, "n_routed_experts": 256,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "vocab_size": 129280, "rope_theta": 10000,
    "rope_scaling": {**YARN, "factor": 40, "beta_fast": 32, "beta_slow": 1},
}  # fmt: skip
MOONLIGHT = {
    **K2, "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "rope_scaling": None, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
    "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072,
}  # fmt: skip


def read(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(raw, "test")


@pytest.mark.parametrize(
    ("raw", "total", "active"),
    [(K2, 1026, 31.7), (DEEPSEEK, 671, 36.6), (MOONLIGHT, 16.0, 2.6), (QWEN3_30B, 30.5, 3.0), (MIXTRAL, 46.7, 12.8),
     (GPT_OSS_20B, 20.9, 3.6), ({**GPT_OSS_20B, "num_hidden_layers": 36, "num_local_experts": 128}, 117, 5.1)],
)  # fmt: skip
def test_released_models_have_the_parameters_their_makers_state(
    raw: dict[str, Any], total: float, active: float
) -> None:
    """In units of 1e9; active counts leave the input embedding out, as their makers do."""
    config = read(raw)
    sizes: dict[str, float] = {}
    for parameter in parameters(config):
        sizes[parameter.role] = sizes.get(parameter.role, 0.0) + parameter.size / 1e9
    assert sum(sizes.values()) == pytest.approx(total, rel=0.01)
    met = {role: size * active_share(config, role) for role, size in sizes.items()}
    assert sum(met.values()) - met["embedding"] == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize(
    ("raw", "scale"), [(K2, 0.1309), (K2_THINKING, 0.1447), (DEEPSEEK, 0.1352), (MOONLIGHT, 192**-0.5)]
)
def test_the_softmax_scale_has_mscale_squared(raw: dict[str, Any], scale: float) -> None:
    attention = read(raw).attention
    assert isinstance(attention, LatentAttentionConfig)
    assert attention.softmax_scale == pytest.approx(scale, abs=5e-5)
    assert attention.latent_norm_eps == 1e-6


def test_yarn_of_released_models_slows_the_dimensions_it_should() -> None:
    """K2-Instruct's ramp is a step after dimension 19 of 32; gpt-oss multiplies cosines, Kimi does not."""
    rope = read(K2).rope
    plain = inverse_frequencies(read({**K2, "rope_scaling": None}).rope)
    ratio = inverse_frequencies(rope) / plain
    assert ratio[:20].eq(1).all()
    torch.testing.assert_close(ratio[20:], torch.full((12,), 1 / 32))
    ratio = inverse_frequencies(read(K2_THINKING).rope) / plain
    assert ratio[:9].eq(1).all()
    torch.testing.assert_close(ratio[20:], torch.full((12,), 1 / 64))
    assert ((ratio[9:20] < 1) & (ratio[9:20] > 1 / 64)).all()
    at_0 = torch.zeros(1)
    assert cos_sin(rope, plain, at_0)[0].eq(1).all()
    cos = cos_sin(read(GPT_OSS_20B).rope, plain, at_0)[0]
    torch.testing.assert_close(cos, torch.full((1, 32), 0.1 * math.log(32) + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_are_one_config(family: str) -> None:
    hub = config_json(family)
    ours = {key: value for key, value in hub.items() if key not in ("rope_theta", "rope_scaling", "num_experts")}
    scaling = {"rope_type" if key == "type" else key: value for key, value in hub.get("rope_scaling", {}).items()}
    ours["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": hub["rope_theta"]}
    if "num_experts" in hub:
        ours["num_local_experts"] = hub["num_experts"]
    assert read(ours) == read(hub)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hubs_names_are_the_models_own_and_back(family: str) -> None:
    config = read(config_json(family))
    names = [parameter.name for parameter in parameters(config)]
    assert len(set(names)) == len(names)
    assert [canonical(hub_name(name, family), config.num_hidden_layers) for name in names] == names


@pytest.mark.parametrize("wrapper", ["kimi_k25", "kimi_vl"])
def test_a_language_model_inside_a_wrapper_is_found(wrapper: str) -> None:
    assert read({"model_type": wrapper, "text_config": config_json("kimi_k2"), "tie_word_embeddings": True}) == read(
        config_json("kimi_k2")
    )


def without(family: str, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config_json(family).items() if key not in keys}


def test_what_a_config_leaves_out_is_what_its_makers_class_says() -> None:
    config = read(without("llama", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"))
    assert isinstance(config.attention, AttentionConfig)
    assert (config.attention.num_key_value_heads, config.attention.head_dim) == (6, 8)
    assert (config.rms_norm_eps, config.rope.theta, config.tie_word_embeddings) == (1e-6, 10000.0, False)
    for family, head_dim in (("qwen2", 8), ("qwen3", 128), ("mixtral", 8), ("gpt_oss", 64)):
        attention = read(without(family, "head_dim")).attention
        assert isinstance(attention, AttentionConfig)
        assert attention.head_dim == head_dim
    moe = read(without("qwen3_moe", "norm_topk_prob")).moe
    assert moe is not None
    assert not moe.norm_topk_prob
    moe = read(without("deepseek_v3", "norm_topk_prob", "routed_scaling_factor")).moe
    assert moe is not None
    assert (moe.norm_topk_prob, moe.routed_scaling_factor) == (True, 2.5)
    gpt_oss = read(without("gpt_oss", "rope_theta", "rope_scaling", "layer_types", "sliding_window", "rms_norm_eps"))
    assert gpt_oss.rope == read({**GPT_OSS_20B, "head_dim": 16}).rope
    assert (gpt_oss.sliding_windows, gpt_oss.rms_norm_eps) == ((128, None), 1e-5)
    assert read(without("mixtral", "rope_theta", "sliding_window")).rope.theta == 1e6
    assert read(config_json("deepseek_v3")).rope.interleaved
    assert not read(config_json("deepseek_v3", rope_interleave=False)).rope.interleaved


@pytest.mark.parametrize(
    ("family", "options", "windows"),
    [
        ("qwen2", {"sliding_window": 4, "max_window_layers": 0}, (None, None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, (None, 4, 4)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, (None, None, None)),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, (4, 4, 4)),
        ("mixtral", {"sliding_window": None}, (None, None, None)),
        ("mixtral", {"sliding_window": 9}, (9, 9, 9)),
        ("gpt_oss", {"layer_types": None}, (5, None, 5)),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (None, 5, None)),
        ("llama", {"sliding_window": 4, "use_sliding_window": True}, (None, None, None)),
    ],
)
def test_windows_by_layer(family: str, options: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(config_json(family, num_hidden_layers=3, **options)).sliding_windows == windows


@pytest.mark.parametrize(
    ("options", "is_moe"),
    [
        ({}, (True,) * 4),
        ({"mlp_only_layers": [0, 2]}, (False, True, False, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (False, False, False, True)),
    ],
)
def test_layers_with_experts(options: dict[str, Any], is_moe: tuple[bool, ...]) -> None:
    assert read(config_json("qwen3_moe", num_hidden_layers=4, **options)).is_moe == is_moe


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"model_type": "mamba"}, 'model_type is "mamba", which is not known'),
        ("llama", {"model_type": "new", "auto_map": {"AutoConfig": "x.Y"}}, "its own Python code .* never run"),
        ("llama", {"model_type": None}, 'model_type is "None"'),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ("llama", {"hidden_size": None}, 'no key "hidden_size"'),
        ("llama", {"hidden_size": "48"}, "hidden_size = '48', expected a whole number"),
        ("llama", {"vocab_size": True}, "vocab_size = True"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads = 4, expected a divisor"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes', expected true or false"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 4}}, 'rope type "longrope"'),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4}}, 'rope type "dynamic"'),
        ("llama", {"rope_scaling": {"type": "linear"}}, 'no key "factor"'),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'no key "low_freq_factor"'),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"head_dim": 7}, "7 values a head are odd"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope of its own"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ("gpt_oss", {"layer_types": ["sliding_attention", "chunked_attention"]}, "layer_types"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"n_group": 3}, "n_group = 3, expected a divisor of n_routed_experts = 8"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group = 5, expected at most n_group = 4"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5, expected at most the 4 experts"),
        ("deepseek_v3", {"kv_lora_rank": None}, 'no key "kv_lora_rank"'),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok = 6"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**config_json(family), **options})
