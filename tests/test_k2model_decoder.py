"""The decoder of every family: packed, cached, behind a prefix and quantized, it computes one and the same function."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2model.check import forced_logits
from k2model.compress.quantize import quantize_weight
from k2model.config import ModelConfig
from k2model.decoder.linear import FloatLinear, Int4Linear, Int8Linear, LinearReader
from k2model.decoder.model import Decoder, page_pool
from k2model.decoder.pages import PAGE
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import KeyValues, Span
from k2model.formats.compressed_tensors import pack_int4
from k2model.formats.weights import in_memory
from k2model.parameters import Parameter, parameters
from schemas.errors import CheckpointError
from tests.checkpoints import FAMILIES, config_json, random_tensors
from tests.forward import packed_hidden, packed_logits

PROMPTS = [[*range(40, 57)], [3], [*range(200, 209)], [3, 3, 9]]


def decoder_of(raw: dict[str, Any], tensors: dict[str, Tensor], *, expand: bool = True) -> Decoder:
    precision = replace(PRECISIONS["fp32"], expand=expand)
    return Decoder.from_weights(ModelConfig.from_dict(raw, "test"), in_memory(tensors, "test"), precision)


@pytest.fixture(scope="module")
def decoders() -> dict[str, Decoder]:
    return {family: decoder_of(config_json(family), random_tensors(config_json(family))) for family in FAMILIES}


def linears(raw: dict[str, Any]) -> list[Parameter]:
    return [parameter for parameter in parameters(ModelConfig.from_dict(raw, "test")) if parameter.is_linear]


def as_w8a8(raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with every linear of the layers as int8 and its scale."""
    made = dict(tensors)
    for parameter in linears(raw):
        weight, scale = quantize_weight(tensors[parameter.name])
        made |= {parameter.name: weight, f"{parameter.name}_scale": scale}
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_each_sequence_alone(decoders: dict[str, Decoder], family: str) -> None:
    decoder = decoders[family]
    with torch.inference_mode():
        alone = torch.cat([decoder.forward_one(ids) for ids in PROMPTS])
    torch.testing.assert_close(packed_hidden(decoder, PROMPTS), alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("read", [[], [0], [29, 3, 3, 17], [*range(9)]])
def test_what_is_read_has_the_bits_it_has_among_all_and_everything_is_kept(
    decoders: dict[str, Decoder], family: str, read: list[int]
) -> None:
    found = []
    for rows in (None, read):
        decoder = replace(decoders[family], pool=page_pool(decoders[family].config, torch.float32))
        step = decoder.step([Span(tuple(ids), keep=KeyValues(len(ids))) for ids in PROMPTS])
        for layer in decoder.pool.layers:
            layer.zero_()
        with torch.inference_mode():
            found.append((decoder.forward(step, rows), decoder.pool.layers))
    (whole, expected), (some, kept) = found
    assert torch.equal(some, whole[read])
    for own, all_of_it in zip(kept, expected, strict=True):
        assert torch.equal(own, all_of_it)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_is_reading_the_whole(decoders: dict[str, Decoder], family: str) -> None:
    answers = [[7, 8, 100, 9, 40], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0], [9, 9, 3, 3, 3]]
    got = forced_logits(decoders[family], PROMPTS, answers)
    for ids, answer, logits in zip(PROMPTS, answers, got, strict=True):
        whole = packed_logits(decoders[family], [ids + answer[:-1]])
        torch.testing.assert_close(logits, whole[-len(answer) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [1, 4, 16])
def test_a_shared_prefix_gives_what_the_whole_prompt_gives(
    decoders: dict[str, Decoder], family: str, split: int
) -> None:
    """Three sequences behind one prefix, then a token more of each."""
    decoder, length = decoders[family], 17
    tails = [PROMPTS[0][split:], [5] * (length - split), list(range(90, 90 + length - split))]
    with torch.inference_mode():
        whole = [decoder.forward_one([*PROMPTS[0][:split], *tail, 11]) for tail in tails]
        prefix = KeyValues(split)
        decoder.forward(decoder.step([Span(tuple(PROMPTS[0][:split]), keep=prefix)]))
        kept = [KeyValues(length) for _ in tails]
        hidden = decoder.forward(
            decoder.step([Span(tuple(tail), prefix, keep=kv) for tail, kv in zip(tails, kept, strict=True)])
        )
        after = decoder.forward(decoder.step([Span((11,), kv, decodes=True) for kv in kept]))
    torch.testing.assert_close(hidden, torch.cat([w[split:length] for w in whole]), rtol=0, atol=3e-5)
    torch.testing.assert_close(after, torch.stack([w[-1] for w in whole]), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("family", "on_cpu", "on_card"),
    [
        ("llama", (2, PAGE, 8 + 16), (2, PAGE, 8 + 8)),  # on the CPU values take whole vectors of 16
        ("deepseek_v3", (1, PAGE, 32 + 8 + 32), (1, PAGE, 32 + 8)),  # where the latent stands as key and as value
    ],
)
def test_pages_hold_keys_and_values_or_one_latent_a_token(
    family: str, on_cpu: tuple[int, ...], on_card: tuple[int, ...]
) -> None:
    config = ModelConfig.from_dict(config_json(family), "test")
    for card, shape in ((None, on_cpu), (torch.device("cpu"), on_card)):
        pool = page_pool(config, torch.bfloat16, card)
        assert [tuple(layer.shape) for layer in pool.layers] == [(0, *shape)] * 2
        assert pool.slot_bytes == 2 * 2 * shape[0] * shape[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_int8_network_is_its_fake_quantized_twin(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 linears against float ones whose weights and inputs went through int8 and back."""
    raw = config_json(family)
    tensors = as_w8a8(raw, random_tensors(raw))
    stored = decoder_of(raw, tensors, expand=False)
    expanded = decoder_of(raw, tensors)
    plain = packed_logits(expanded, PROMPTS)
    call = FloatLinear.__call__

    def fake_quantized(self: FloatLinear, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        return call(self, torch.round(x / scale) * scale)

    monkeypatch.setattr(FloatLinear, "__call__", fake_quantized)
    twin = packed_logits(expanded, PROMPTS)
    got = packed_logits(stored, PROMPTS)
    assert (got - twin).abs().mean() < 1e-4
    assert (plain - twin).abs().mean() > 5e-3


def test_linears_compute_as_they_are_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    int4 = torch.randint(-8, 8, (48, 64), dtype=torch.int8, generator=generator)
    scale = torch.rand(48, 2, generator=generator).bfloat16()
    float_weight = torch.randn(48, 64, generator=generator)
    int8, int8_scale = quantize_weight(float_weight)
    tensors = {
        "a.weight": float_weight, "b.weight": int8, "b.weight_scale": int8_scale, "c.weight_packed": pack_int4(int4),
        "c.weight_scale": scale, "c.weight_shape": torch.tensor([48, 64]), "c.bias": torch.arange(48.0),
        "b.bias": torch.arange(48.0) / 7,
    }  # fmt: skip
    reader = LinearReader(in_memory(tensors, "test"), torch.float32, expand=False)
    x = torch.randn(5, 64, generator=generator)
    a, b, c = (reader.read([(name, 48)], 64, bias=name != "a") for name in "abc")
    assert [type(linear) for linear in (a, b, c)] == [FloatLinear, Int8Linear, Int4Linear]
    expanded = LinearReader(in_memory(tensors, "test"), torch.float32, expand=True)
    for name, linear in zip("abc", (a, b, c), strict=True):
        exact = expanded.read([(name, 48)], 64, bias=name != "a")
        assert isinstance(exact, FloatLinear)
        torch.testing.assert_close(linear(x), exact(x), rtol=0.02, atol=0.5)
        order = torch.randperm(48, generator=generator)
        shuffled = reader.read([(name, 48)], 64, bias=name != "a", rows=order)
        assert torch.equal(shuffled(x), linear(x)[:, order])
    mixed = reader.read([("a", 48), ("b", 48)], 64, bias=[False, True])
    assert isinstance(mixed, FloatLinear)
    joined = torch.cat([float_weight, int8.float() * int8_scale])
    bias = torch.cat([torch.zeros(48), tensors["b.bias"]])
    torch.testing.assert_close(mixed(x), x @ joined.t() + bias, rtol=1e-5, atol=1e-5)


def test_the_output_embedding_is_the_input_one_only_when_none_is_stored() -> None:
    raw = config_json("llama")
    tensors = random_tensors(raw)
    assert torch.equal(decoder_of(raw, tensors).lm_head, tensors["model.embed_tokens.weight"])
    head = torch.randn(272, 48)
    assert torch.equal(decoder_of(raw, {**tensors, "lm_head.weight": head}).lm_head, head)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        decoder_of({**raw, "tie_word_embeddings": False}, tensors)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("mixtral", "model.layers.1.mlp.experts.4.down_proj.weight"),
        ("gpt_oss", "model.layers.1.self_attn.sinks"),
        ("gpt_oss", "model.layers.0.mlp.experts.3.gate_proj.bias"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("kimi_k2", "model.layers.1.self_attn.kv_a_layernorm.weight"),
    ],
)
def test_a_missing_misshapen_or_foreign_tensor_is_named(family: str, name: str) -> None:
    raw = config_json(family)
    tensors = random_tensors(raw)
    right = tensors.pop(name)
    with pytest.raises(CheckpointError, match=rf"{name} is missing".replace(".", r"\.")):
        decoder_of(raw, tensors)
    wrong = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=rf"{name} is \(3, 3\), expected".replace(".", r"\.")):
        decoder_of(raw, {**tensors, name: wrong})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.g_proj\.weight is not part of the model"):
        decoder_of(raw, {**tensors, name: right, "model.layers.0.self_attn.g_proj.weight": wrong})
    if "proj" in name and name.endswith("weight"):
        with pytest.raises(CheckpointError, match=rf"{name} has dtype I32".replace(".", r"\.")):
            decoder_of(raw, {**tensors, name: right.to(torch.int32)})


def test_a_file_is_named_in_the_error(tmp_path: Path) -> None:
    from k2model.formats.checkpoint import open_checkpoint
    from tests.checkpoints import write_checkpoint

    folder = write_checkpoint(tmp_path / "broken", family="qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    source = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=r"broken: .*experts\.2\.up_proj\.weight is missing"):
        Decoder.from_weights(source.config(), source.weights())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_experts": 5}))
    with pytest.raises(CheckpointError, match=r"experts\.5\.gate_proj\.weight is not part of the model"):
        Decoder.from_weights(source.config(), source.weights())
