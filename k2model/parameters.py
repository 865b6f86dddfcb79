"""The parameters a model has, by name and shape, from its config alone: what a checkpoint must hold, no more, no less.

Names are those of Hugging Face's DeepSeek-V3 checkpoints for every family; k2model/formats maps a file's own to them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from k2model.config import AttentionConfig, LatentAttentionConfig, ModelConfig, MoeConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    role: str
    """`embedding`, `head`, `attention`, `dense`, `shared`, `expert`, `router`, or `vector`."""

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix [N, K] of a layer's linear, which is what INT8 conversion quantizes."""
        return self.role in ("attention", "dense", "shared", "expert")

    @property
    def size(self) -> int:
        """Values in it."""
        size = 1
        for length in self.shape:
            size *= length
        return size


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Yield every parameter in the order of computation; `lm_head.weight` too, though a tied model stores none."""
    d = config.hidden_size
    yield Parameter("model.embed_tokens.weight", (config.vocab_size, d), "embedding")
    for index in range(config.num_hidden_layers):
        yield from layer_parameters(config, index)
    yield Parameter("model.norm.weight", (d,), "vector")
    yield Parameter("lm_head.weight", (config.vocab_size, d), "head")


def layer_parameters(config: ModelConfig, index: int) -> Iterator[Parameter]:
    """Yield the parameters of layer `index`."""
    layer, d, attention = f"model.layers.{index}", config.hidden_size, config.attention
    yield Parameter(f"{layer}.input_layernorm.weight", (d,), "vector")
    if isinstance(attention, LatentAttentionConfig):
        yield from _latent_attention(f"{layer}.self_attn", d, attention)
    else:
        yield from _attention(f"{layer}.self_attn", d, attention)
    yield Parameter(f"{layer}.post_attention_layernorm.weight", (d,), "vector")
    if config.is_moe[index]:
        assert config.moe is not None
        yield from _moe(f"{layer}.mlp", d, config.moe)
    else:
        yield from _feed_forward(f"{layer}.mlp", d, config.intermediate_size, config.mlp_bias, "dense")


def active_share(config: ModelConfig, role: str) -> float:
    """Return the share of a role's parameters that one token meets: 1, but for experts."""
    if role != "expert" or config.moe is None:
        return 1.0
    return config.moe.num_experts_per_tok / config.moe.n_routed_experts


def _linear(name: str, n: int, k: int, bias: bool, role: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (n, k), role)
    if bias:
        yield Parameter(f"{name}.bias", (n,), "vector")


def _attention(name: str, d: int, attention: AttentionConfig) -> Iterator[Parameter]:
    q = attention.num_attention_heads * attention.head_dim
    kv = attention.num_key_value_heads * attention.head_dim
    for kind, n in (("q", q), ("k", kv), ("v", kv)):
        yield from _linear(f"{name}.{kind}_proj", n, d, attention.qkv_bias, "attention")
    if attention.qk_norm:
        yield Parameter(f"{name}.q_norm.weight", (attention.head_dim,), "vector")
        yield Parameter(f"{name}.k_norm.weight", (attention.head_dim,), "vector")
    if attention.sinks:
        yield Parameter(f"{name}.sinks", (attention.num_attention_heads,), "vector")
    yield from _linear(f"{name}.o_proj", d, q, attention.o_bias, "attention")


def _latent_attention(name: str, d: int, attention: LatentAttentionConfig) -> Iterator[Parameter]:
    heads, rank = attention.num_attention_heads, attention.kv_lora_rank
    q = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    if attention.q_lora_rank is None:
        yield from _linear(f"{name}.q_proj", q, d, False, "attention")
    else:
        yield from _linear(f"{name}.q_a_proj", attention.q_lora_rank, d, attention.bias, "attention")
        yield Parameter(f"{name}.q_a_layernorm.weight", (attention.q_lora_rank,), "vector")
        yield from _linear(f"{name}.q_b_proj", q, attention.q_lora_rank, False, "attention")
    latent = rank + attention.qk_rope_head_dim
    yield from _linear(f"{name}.kv_a_proj_with_mqa", latent, d, attention.bias, "attention")
    yield Parameter(f"{name}.kv_a_layernorm.weight", (rank,), "vector")
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield from _linear(f"{name}.kv_b_proj", expanded, rank, False, "attention")
    yield from _linear(f"{name}.o_proj", d, heads * attention.v_head_dim, attention.bias, "attention")


def _moe(name: str, d: int, moe: MoeConfig) -> Iterator[Parameter]:
    yield Parameter(f"{name}.gate.weight", (moe.n_routed_experts, d), "router")
    if moe.bias:
        yield Parameter(f"{name}.gate.bias", (moe.n_routed_experts,), "vector")
    if moe.correction_bias:
        yield Parameter(f"{name}.gate.e_score_correction_bias", (moe.n_routed_experts,), "vector")
    for expert in range(moe.n_routed_experts):
        yield from _feed_forward(f"{name}.experts.{expert}", d, moe.moe_intermediate_size, moe.bias, "expert")
    if moe.shared_intermediate_size:
        yield from _feed_forward(f"{name}.shared_experts", d, moe.shared_intermediate_size, False, "shared")


def _feed_forward(name: str, d: int, width: int, bias: bool, role: str) -> Iterator[Parameter]:
    yield from _linear(f"{name}.gate_proj", width, d, bias, role)
    yield from _linear(f"{name}.up_proj", width, d, bias, role)
    yield from _linear(f"{name}.down_proj", d, width, bias, role)
