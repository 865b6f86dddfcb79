"""The decoder over packed tokens: one forward pass for every family. Knows tensors and positions, no request, no text.

Legend: T tokens of the step, D hidden_size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.decoder.attention import Attention, read_attention
from k2model.decoder.card import check_sizes, on_card
from k2model.decoder.card_step import CardStep
from k2model.decoder.feed_forward import FeedForward, MixtureOfExperts, read_feed_forward
from k2model.decoder.linear import LinearReader, normed, normed_sum
from k2model.decoder.mla import LatentAttention, read_latent_attention
from k2model.decoder.pages import PAGE, PagePool
from k2model.decoder.precision import PRECISIONS, Precision
from k2model.decoder.rope import cos_sin, inverse_frequencies
from k2model.decoder.step import Span, Step
from k2model.formats.weights import Weights
from k2model.parameters import parameters
from kernels import cpu_attention, ops

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and feed-forward, pre-norm, with residuals."""

    input_layernorm: Tensor
    attention: Attention | LatentAttention
    post_attention_layernorm: Tensor
    feed_forward: FeedForward | MixtureOfExperts
    eps: float

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        rope: tuple[Tensor, Tensor],
        step: Step,
        window: int | None,
        kv_dtype: torch.dtype,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output for x + added [T, D] as two terms, since the next norm sums them in passing.

        They are float32 [T, D], or of the tokens `read` alone [N, D]. Stores keys and values where the step keeps them.
        """
        if added is None:
            h = normed(self.attention.first, x, self.input_layernorm, self.eps)
        else:
            h, x = normed_sum(self.attention.first, x, added, self.input_layernorm, self.eps)
        attended = self.attention.forward(h, rope, step, window, kv_dtype, read)
        if read is not None:
            x = x[read]
            if not len(x):
                return x, x
        h, x = normed_sum(self.feed_forward.first, x, attended, self.post_attention_layernorm, self.eps)
        return x, self.feed_forward.forward(h)


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
    """What keys and values are rounded to."""
    frequencies: Tensor
    pool: PagePool
    """Where keys and values are."""
    is_on_card: bool = False

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        weights: Weights,
        precision: Precision = PRECISIONS["int8"],
        card: torch.device | None = None,
    ) -> "Decoder":
        """Return a decoder over `weights`.

        Args:
            config: the model's sizes.
            weights: of a checkpoint.
            precision: what linears, keys and values are rounded to; `fp32` is the reference.
            card: where to compute, if not in memory. Weights go there layer by layer.

        Raises: CheckpointError naming tensors that are missing, misshapen, or not part of the model; for a card, what
            its kernels do not compute.
        """
        weights.check(parameters(config), tied=config.tie_word_embeddings)
        if card is not None:
            check_sizes(config)

        def placed(part: T) -> T:
            return part if card is None else on_card(part, card)

        d, v = config.hidden_size, config.vocab_size
        embed_tokens = placed(weights.embedding(v, d))
        head = embed_tokens if weights.is_tied else placed(weights.float_weight("lm_head", v, d))
        attention = LinearReader(weights, precision.attention, precision.expand)
        feed_forward = LinearReader(weights, precision.feed_forward, precision.expand)
        return cls(
            config=config,
            embed_tokens=embed_tokens,
            layers=[
                placed(read_layer(config, index, attention, feed_forward)) for index in range(config.num_hidden_layers)
            ],
            norm=placed(weights.vector("model.norm.weight", d)),
            lm_head=head.to(precision.head),
            kv_dtype=precision.key_values,
            frequencies=placed(inverse_frequencies(config.rope)),
            pool=page_pool(config, precision.key_values, card),
            is_on_card=card is not None,
        )

    def step(self, spans: Sequence[Span]) -> Step:
        """Return what `forward` takes to compute `spans`, of which those that decode stand last."""
        return (CardStep if self.is_on_card else Step)(self.pool, spans)

    def forward(self, step: Step, read: Sequence[int] | None = None) -> Tensor:
        """Return hidden states after the final norm float32, and store what the step keeps.

        Those of the tokens `read` [N, D], whose last layer alone is computed to its end; or, in the step's order, of
        all of them [T, D]. A token's bits are the same.
        """
        rope = cos_sin(self.config.rope, self.frequencies, step.positions)
        x: Tensor = self.embed_tokens[step.token_ids].float()
        added: Tensor | None = None
        rows = None if read is None else torch.tensor(read, dtype=torch.int64, device=x.device)
        for layer, window in zip(self.layers, self.config.sliding_windows, strict=True):
            of = rows if layer is self.layers[-1] else None
            x, added = layer.forward(x, added, rope, step, window, self.kv_dtype, of)
        return ops.rms_norm(x if added is None else x + added, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [T, V] float32 logits of `hidden` [T, D], for measurement; scoring needs only some of them."""
        return ops.float_linear(hidden, self.lm_head)

    def forward_one(self, token_ids: Sequence[int]) -> Tensor:
        """Return the hidden states [T, D] of one sequence from its start."""
        return self.forward(self.step([Span(tuple(token_ids))]))


def page_pool(config: ModelConfig, kept: torch.dtype, card: torch.device | None = None, page: int = PAGE) -> PagePool:
    """Return the pages of a decoder, in memory or on a card, whose keys and values are rounded to `kept`."""
    attention = config.attention
    if isinstance(attention, LatentAttentionConfig):
        heads, sizes = 1, (attention.kv_lora_rank + attention.qk_rope_head_dim, attention.kv_lora_rank)
        width = sizes[0]  # a latent is its own key and value
    else:
        heads, sizes = attention.num_key_value_heads, (attention.head_dim, attention.head_dim)
        width = sum(sizes)
    if card is not None:
        return PagePool(config.num_hidden_layers, heads, width, kept, card, page)
    dtype = torch.bfloat16 if kept == torch.bfloat16 else torch.float32
    width = sum(cpu_attention.page_sizes(*sizes))
    return PagePool(config.num_hidden_layers, heads, width, dtype, torch.device("cpu"), page, is_zeroed=False)


def read_layer(
    config: ModelConfig,
    index: int,
    attention_reader: LinearReader,
    feed_forward_reader: LinearReader,
    experts: Sequence[FeedForward] | None = None,
) -> Layer:
    """Return layer `index`; with `experts` in place of those read here. Raises: CheckpointError."""
    name, d, vector = f"model.layers.{index}", config.hidden_size, attention_reader.weights.vector
    is_latent = isinstance(config.attention, LatentAttentionConfig)
    return Layer(
        input_layernorm=vector(f"{name}.input_layernorm.weight", d),
        attention=(read_latent_attention if is_latent else read_attention)(config, index, attention_reader),
        post_attention_layernorm=vector(f"{name}.post_attention_layernorm.weight", d),
        feed_forward=read_feed_forward(config, index, feed_forward_reader, experts),
        eps=config.rms_norm_eps,
    )
