"""Attention: latents absorbed or expanded, windows whatever stands before a token, sinks, rope in two layouts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.decoder.attention import Attention
from k2model.decoder.linear import FloatLinear
from k2model.decoder.mla import LatentAttention
from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.rope import cos_sin, deinterleaved, inverse_frequencies
from k2model.decoder.step import KeyValues, Span
from k2model.formats.weights import in_memory
from kernels import cpu
from tests.checkpoints import config_json, random_tensors


def decoder_of(raw: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Decoder:
    weights = in_memory(random_tensors(raw) if tensors is None else tensors, "test")
    return Decoder.from_weights(ModelConfig.from_dict(raw, "test"), weights, PRECISIONS["fp32"])


LATENTS = [
    {},
    {"q_lora_rank": None, "v_head_dim": 20},
    {"qk_nope_head_dim": 10, "qk_rope_head_dim": 14, "kv_lora_rank": 33, "q_lora_rank": 31, "v_head_dim": 6},
    {"attention_bias": True, "rope_interleave": False, "num_attention_heads": 1},
]


@pytest.mark.parametrize("options", LATENTS)
@pytest.mark.parametrize("count", [1, 3])
def test_absorbed_attention_is_expanded_attention(options: dict[str, Any], count: int) -> None:
    """The last token of sequences, read after the others' latents were kept, against all of them read at once.

    Nothing is read that the sequences themselves did not store.
    """
    raw = config_json("deepseek_v3", **options)
    decoder, length = decoder_of(raw), 11
    config, attention = decoder.config, decoder.layers[0].attention
    assert isinstance(attention, LatentAttention)
    decoder.pool.give(decoder.pool.take(1))
    decoder.pool.pass_through(count)
    for pages in (decoder.pool.layers[0], decoder.pool.passing):
        pages.fill_(float("nan"))
    x = torch.randn(count, length, 48, generator=torch.Generator().manual_seed(1))
    cos, sin = cos_sin(config.rope, inverse_frequencies(config.rope), torch.arange(length))

    def run(tokens: slice, spans: list[Span]) -> Tensor:
        own = x[:, tokens].reshape(-1, 48)
        rope = (cos[tokens].repeat(count, 1), sin[tokens].repeat(count, 1))
        return attention.forward(own, rope, decoder.step(spans), None, torch.float32).view(count, -1, 48)

    with torch.inference_mode():
        whole = run(slice(None), [Span((0,) * length)] * count)
        kept = [KeyValues(10) for _ in range(count)]
        first = run(slice(0, 10), [Span((0,) * 10, keep=kv) for kv in kept])
        last = run(slice(10, 11), [Span((0,), kv, decodes=True) for kv in kept])
    torch.testing.assert_close(first, whole[:, :10], rtol=0, atol=1e-5)
    torch.testing.assert_close(last, whole[:, 10:], rtol=0, atol=1e-5)


def naive_latent_attention(raw: dict[str, Any], tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return layer 0's latent attention of x [T, D] from position 0, straight from the paper, in float64."""
    config = ModelConfig.from_dict(raw, "test")
    attention = config.attention
    assert isinstance(attention, LatentAttentionConfig)
    heads, nope, rope_dim = attention.num_attention_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim

    def get(name: str) -> Tensor:
        return tensors[f"model.layers.0.self_attn.{name}"].double()

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values / torch.sqrt(values.square().mean(-1, keepdim=True) + 1e-6) * weight

    cos, sin = (t.double() for t in cos_sin(config.rope, inverse_frequencies(config.rope), torch.arange(len(x))))

    def turn(pairs: Tensor) -> Tensor:
        first, second = pairs[..., 0::2], pairs[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)

    x = x.double()
    q = norm(x @ get("q_a_proj.weight").t(), get("q_a_layernorm.weight")) @ get("q_b_proj.weight").t()
    latent, k_rope = (x @ get("kv_a_proj_with_mqa.weight").t()).split([attention.kv_lora_rank, rope_dim], dim=-1)
    kv = norm(latent, get("kv_a_layernorm.weight")) @ get("kv_b_proj.weight").t()
    q, kv = q.view(len(x), heads, -1), kv.view(len(x), heads, -1)
    outs = []
    for head in range(heads):
        scores = q[:, head, :nope] @ kv[:, head, :nope].t() + turn(q[:, head, nope:]) @ turn(k_rope).t()
        scores = (scores * attention.softmax_scale).masked_fill(
            torch.ones(len(x), len(x)).triu(1).bool(), float("-inf")
        )
        outs.append(torch.softmax(scores, dim=-1) @ kv[:, head, nope:])
    return (torch.cat(outs, dim=-1) @ get("o_proj.weight").t()).float()


def test_latent_attention_is_what_the_paper_says() -> None:
    raw = config_json("deepseek_v3")
    tensors, x = random_tensors(raw), torch.randn(9, 48)
    decoder = decoder_of(raw, tensors)
    rope = cos_sin(decoder.config.rope, decoder.frequencies, torch.arange(9))
    with torch.inference_mode():
        step = decoder.step([Span((0,) * 9)])
        got = decoder.layers[0].attention.forward(x, rope, step, None, torch.float32)
    torch.testing.assert_close(got, naive_latent_attention(raw, tensors, x), rtol=0, atol=1e-5)


def test_both_rope_layouts_turn_the_same_pairs() -> None:
    x, angles = torch.randn(5, 3, 12), torch.randn(5, 6)
    halves = cpu.apply_rope(x[..., deinterleaved(12)], angles.cos(), angles.sin())
    pairs = torch.view_as_complex(x.view(5, 3, 6, 2)) * torch.polar(torch.ones(5, 6), angles)[:, None]
    torch.testing.assert_close(halves, torch.view_as_real(pairs).flatten(-2)[..., deinterleaved(12)])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2"])
def test_a_token_depends_on_exactly_what_its_windows_reach(family: str) -> None:
    """Two layers that see w keys each reach 2 (w - 1) tokens back; one that sees all reaches everything."""
    options: dict[str, Any] = {"sliding_window": 4}
    if family == "gpt_oss":
        options["layer_types"] = ["sliding_attention"] * 2
    if family == "qwen2":
        options |= {"use_sliding_window": True, "max_window_layers": 0}
    decoder = decoder_of(config_json(family, **options))
    ids = list(range(20, 40))
    with torch.inference_mode():
        last = decoder.forward_one(ids)[-1]
        for place in range(19):
            other = decoder.forward_one([*ids[:place], 250, *ids[place + 1 :]])[-1]
            # Experts share float products, whose rounding may depend on who shares them.
            assert torch.allclose(other, last, rtol=0, atol=1e-5) == (place < 19 - 2 * 3), place


def test_a_sink_of_each_head_weakens_that_head_alone() -> None:
    raw = config_json("gpt_oss", num_attention_heads=4, num_key_value_heads=2)
    tensors = random_tensors(raw)
    x = torch.randn(6, 48)
    out = {}
    with torch.inference_mode():
        for which in (None, 0, 3):
            sinks = torch.full((4,), -1e4)
            if which is not None:
                sinks[which] = 1e4
            decoder = decoder_of(raw, {**tensors, "model.layers.1.self_attn.sinks": sinks})
            attention = decoder.layers[1].attention
            assert isinstance(attention, Attention)
            attention = replace(attention, o_proj=FloatLinear(torch.eye(64)))
            rope = cos_sin(decoder.config.rope, decoder.frequencies, torch.arange(6))
            step = decoder.step([Span((0,) * 6)])
            out[which] = attention.forward(x, rope, step, None, torch.float32).view(6, 4, 16)
    for which in (0, 3):
        others = [head for head in range(4) if head != which]
        assert out[which][:, which].abs().max() == 0
        assert torch.equal(out[which][:, others], out[None][:, others])


def test_norms_of_query_and_key_come_before_rope_and_are_the_heads_own() -> None:
    """Scaling a query or key projection changes nothing under qk-norm; scaling the values does."""
    raw = config_json("qwen3", rms_norm_eps=1e-12)
    tensors, ids = random_tensors(raw), [5, 80, 7, 3, 99]
    with torch.inference_mode():
        plain = decoder_of(raw, tensors).forward_one(ids)
        for which, same in (("q", True), ("k", True), ("v", False)):
            name = f"model.layers.0.self_attn.{which}_proj.weight"
            other = decoder_of(raw, {**tensors, name: tensors[name] * 7}).forward_one(ids)
            assert torch.allclose(other, plain, rtol=0, atol=1e-4) == same, which
