"""The Llama decoder over packed tokens. Knows tensors and positions; knows no request and no text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k2model.config import ModelConfig
from k2model.decoder.layers import Group, KeyValues, Layer, Step
from k2model.decoder.linear import FloatLinear, Int8Linear, Linear, stack
from kernels import cpu
from schemas.errors import CheckpointError


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotation per position of each pair [head_dim / 2] float32.

    Source: arXiv 2104.09864; Llama 3 scaling as in transformers' `_compute_llama3_parameters`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, slowed)


def causal(length: int, past: int) -> Tensor:
    """Return the [length, past + length] bool mask: all of the past, and each token up to itself."""
    return torch.ones(length, past + length, dtype=torch.bool).tril(past)


@dataclass(slots=True)
class Decoder:
    """Weights and the forward pass."""

    config: ModelConfig
    embed_tokens: Tensor
    """[V, D]."""
    layers: list[Layer]
    norm: Tensor
    lm_head: Tensor
    """[V, D]; the embedding itself when tied."""
    kv_dtype: torch.dtype
    """Keys, values and attention products: float32, or bfloat16."""
    frequencies: Tensor

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        where: str,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> "Decoder":
        """Return a decoder over `tensors`, named as in a Hugging Face Llama checkpoint.

        Args:
            config: the model's sizes.
            tensors: weights; a linear with an int8 weight has a `.weight_scale` beside it.
            where: the checkpoint, for messages.
            dtype: of the float linears and the output embedding.
            kv_dtype: of keys, values and attention products.

        Raises: CheckpointError naming a tensor that is missing or has another shape.
        """
        take = _Taker(tensors, where, dtype)
        d, v = config.hidden_size, config.vocab_size
        embed_tokens = take.plain("model.embed_tokens.weight", (v, d))
        tied = "lm_head.weight" not in tensors
        if tied and not config.tie_word_embeddings:
            raise CheckpointError(f"{where}: tensor lm_head.weight is missing and tie_word_embeddings is false")
        lm_head = embed_tokens if tied else take.plain("lm_head.weight", (v, d))
        return cls(
            config=config,
            embed_tokens=embed_tokens,
            layers=[_layer(index, config, take) for index in range(config.num_hidden_layers)],
            norm=take.plain("model.norm.weight", (d,)).float(),
            lm_head=lm_head.to(dtype),
            kv_dtype=kv_dtype,
            frequencies=inverse_frequencies(config),
        )

    def forward(self, step: Step) -> Tensor:
        """Return hidden states after the final norm [T, D] float32, and grow each group's cache."""
        angles = step.positions[:, None].float() * self.frequencies
        rope = (angles.cos(), angles.sin())
        x = self.embed_tokens[step.token_ids].float()
        for layer in self.layers:
            x = layer.forward(x, rope, step.groups, self.config, self.kv_dtype)
        for group in step.groups:
            if group.cache is not None:
                group.cache.length += group.length + (group.prefix.length if group.prefix else 0)
        return cpu.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [T, V] float32 logits of `hidden` [T, D], for measurement; scoring needs only some of them."""
        return torch.mm(hidden.to(self.lm_head.dtype), self.lm_head.t()).float()

    def allocate(self, count: int, capacity: int) -> KeyValues:
        """Return empty keys and values for `count` sequences of up to `capacity` tokens."""
        shape = (count, self.config.num_key_value_heads, capacity, self.config.head_dim)
        layers = range(len(self.layers))
        return KeyValues(
            [torch.empty(shape, dtype=self.kv_dtype) for _ in layers],
            [torch.empty(shape, dtype=self.kv_dtype) for _ in layers],
            0,
        )

    def forward_one(self, token_ids: list[int]) -> Tensor:
        """Return the hidden states [T, D] of one sequence from its start."""
        length = len(token_ids)
        group = Group(1, length, causal(length, 0))
        return self.forward(Step(torch.tensor(token_ids), torch.arange(length), [group]))


@dataclass(frozen=True, slots=True)
class _Taker:
    """Takes tensors by name, checking shapes."""

    tensors: Mapping[str, Tensor]
    where: str
    dtype: torch.dtype

    def plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor {name} is missing", remedy="the download may be incomplete")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.where}: tensor {name} is {tuple(tensor.shape)}, expected {shape} by config.json"
            )
        return tensor

    def linear(self, name: str, n: int, k: int) -> Linear:
        weight = self.plain(f"{name}.weight", (n, k))
        if weight.dtype != torch.int8:
            return FloatLinear(weight.to(self.dtype))
        return Int8Linear(weight, self.plain(f"{name}.weight_scale", (n, 1)).float().squeeze(1))


def _layer(index: int, config: ModelConfig, take: _Taker) -> Layer:
    prefix = f"model.layers.{index}"
    d, ff, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention = [take.linear(f"{prefix}.self_attn.{name}_proj", n, d) for name, n in (("q", q), ("k", kv), ("v", kv))]
    feed_forward = [take.linear(f"{prefix}.mlp.{name}_proj", ff, d) for name in ("gate", "up")]
    return Layer(
        index=index,
        input_layernorm=take.plain(f"{prefix}.input_layernorm.weight", (d,)).float(),
        qkv_proj=stack(attention),
        o_proj=take.linear(f"{prefix}.self_attn.o_proj", d, q),
        post_attention_layernorm=take.plain(f"{prefix}.post_attention_layernorm.weight", (d,)).float(),
        gate_up_proj=stack(feed_forward),
        down_proj=take.linear(f"{prefix}.mlp.down_proj", d, ff),
    )
