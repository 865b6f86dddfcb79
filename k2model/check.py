"""Compares our forward pass with what a checkpoint's makers computed, from a folder of reference fixtures.

A fixture is a folder a user would point the loader at, and beside it the answers:

    reference.safetensors       logits of ragged, padded and cached decoding; hidden states; router choices
    tokenizer_reference.json    texts and their ids, a conversation and its rendering
    units.safetensors           one linear layer under every quantization, to the integer
    reference.json              prompts and greedy texts of the embedded model
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.decoder.feed_forward import MixtureOfExperts, Router
from k2model.decoder.linear import FloatLinear, Linear, LinearReader
from k2model.decoder.model import Decoder, Layer
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import KeyValues, Span
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from k2model.formats.compressed_tensors import unpack_int4
from k2model.formats.weights import in_memory
from k2model.tokenizer import Tokenizer
from kernels import cpu, rowwise
from schemas.errors import CheckpointError

TOLERANCE = 2e-4
"""Of float32 logits with a standard deviation near 1.5: between two right implementations 5e-5 are seen."""

_WHOLE_TOLERANCE = 2e-3
"""Of the embedded model's logits, 30 layers deep and ten times as large."""

_ACT_INT8_SHARE, _ACT_INT8_ROW, _ACT_INT8_ROWS = 0.3, 0.05, 0.9
"""Activations in int8: the mean distance to the scheme's own reference is at most this share of the scheme's distance
to float activations, and this share of rows is within 0.05. Single rows may take another route, so no maximum."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One of our answers beside the reference's."""

    what: str
    difference: float
    """The largest absolute difference, or the number of wrong ones where answers are not numbers."""
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


@torch.inference_mode()
def check(folder: Path) -> list[Comparison]:
    """Return every comparison that the fixture `folder` allows. Raises: CheckpointError if it holds no reference."""
    found: list[Comparison] = []
    reference = _load(folder / "reference.safetensors") if (folder / "reference.safetensors").exists() else {}
    if reference and (folder / "config.json").exists():
        found += _check_model(open_checkpoint(str(folder)), reference, _tolerance(folder))
    for path in sorted(folder.glob("*.gguf")):
        logits = reference[f"ragged.logits.{path.stem.rpartition('-')[2]}"]
        decoder = _float_decoder(open_checkpoint(str(path)))
        found.append(_compare(path.name, _ragged(decoder, reference)[0], logits, TOLERANCE))
    if (folder / "tokenizer_reference.json").exists():
        found += _check_tokenizer(Tokenizer.open(folder), _read_json(folder / "tokenizer_reference.json"))
    if (folder / "units.safetensors").exists():
        found += _check_units(_load(folder / "units.safetensors"))
    if (folder / "reference.json").exists():
        found += _check_embedded(_read_json(folder / "reference.json"), reference)
    if not found:
        raise CheckpointError(
            f"{folder}: no reference to compare with",
            remedy="give a folder with reference.safetensors, tokenizer_reference.json or units.safetensors",
        )
    return found


def _check_model(checkpoint: Checkpoint, reference: dict[str, Tensor], tolerance: float) -> Iterator[Comparison]:
    decoder = _float_decoder(checkpoint)
    watched, hidden, routes = _watched(decoder)
    logits, normed = _ragged(watched, reference)
    yield _compare("ragged", logits, reference["ragged.logits"], tolerance)
    length = int(reference["ragged.cu_seqlens"][1])
    hidden[-1] = normed
    embedded = decoder.embed_tokens[reference["ragged.input_ids"]].float()
    for index, state in enumerate([embedded, *hidden]):
        if f"seq0.hidden.{index}" not in reference:
            continue
        yield _compare(f"hidden.{index}", state[:length], reference[f"seq0.hidden.{index}"], tolerance)
    for index, (logits, expert_ids, expert_weights) in routes.items():
        if f"seq0.router.{index}.topk_ids" not in reference:
            continue
        name = f"seq0.router.{index}"
        yield _count(f"router.{index} ids", expert_ids[:length], reference[f"{name}.topk_ids"])
        yield _compare(f"router.{index} weights", expert_weights[:length], reference[f"{name}.topk_weights"], tolerance)
        yield _compare(f"router.{index} logits", logits[:length], reference[f"{name}.logits"], tolerance)
    for side in ("batch_right", "batch_left"):
        if f"{side}.input_ids" in reference:
            padded = _padded(decoder, reference, side)
            yield _compare(side, padded, reference["ragged.logits"], tolerance)
    if "greedy.tokens" in reference:
        greedy = _greedy(decoder, reference)
        yield _count("greedy tokens", greedy.argmax(dim=-1), reference["greedy.tokens"])
        yield _compare("greedy logits", greedy, reference["greedy.logits"], tolerance)
    yield from _check_int8(checkpoint, reference)


def _check_int8(checkpoint: Checkpoint, reference: dict[str, Tensor]) -> Iterator[Comparison]:
    """The INT8 path, where the checkpoint is W8A8: scales are absmax / 127, as vLLM's kernels take them."""
    variant = reference.get("ragged.logits.act_int8_vllm127")
    if variant is None:
        return
    config, weights = checkpoint.config(), checkpoint.weights()
    scheme = (variant - reference["ragged.logits"]).abs().mean().item()
    whole = Decoder.from_weights(config, weights, replace(PRECISIONS["fp32"], expand=False))
    head: Linear = FloatLinear(whole.lm_head)
    if not weights.is_tied:  # the head, too, may be quantized; the engine expands it
        head = LinearReader(weights, torch.float32, False).read([("lm_head", config.vocab_size)], config.hidden_size)
    error = (head(_ragged(whole, reference)[1]) - variant).abs()
    what = "int8"
    if config.moe is not None:
        # Some references quantize what enters each nn.Linear; transformers' experts are none, and their inputs stay
        # float there. The two schemes are further apart than either tolerance.
        plain = head(_ragged(_with_float_experts(whole, _float_decoder(checkpoint)), reference)[1])
        if (plain - variant).abs().mean() < error.mean():
            error, what = (plain - variant).abs(), "int8, experts' inputs float"
    yield Comparison(f"{what}: mean", error.mean().item(), _ACT_INT8_SHARE * scheme)
    far = (error.amax(dim=1) > _ACT_INT8_ROW).float().mean().item()
    yield Comparison(f"{what}: rows beyond 0.05", far, 1 - _ACT_INT8_ROWS)


def _with_float_experts(decoder: Decoder, floats: Decoder) -> Decoder:
    layers = []
    for layer, other in zip(decoder.layers, floats.layers, strict=True):
        mine, theirs = layer.feed_forward, other.feed_forward
        if isinstance(mine, MixtureOfExperts) and isinstance(theirs, MixtureOfExperts):
            layer = replace(layer, feed_forward=replace(mine, experts=theirs.experts))
        layers.append(layer)
    return replace(decoder, layers=layers)


def _check_tokenizer(tokenizer: Tokenizer, reference: dict[str, Any]) -> Iterator[Comparison]:
    ids = [tokenizer.encode_markup(text) for text in reference["texts"]]
    wrong = sum(got != expected for got, expected in zip(ids, reference["ids"], strict=True))
    yield Comparison("texts", wrong, 0)
    rendered = tokenizer.render(reference["messages"])
    yield Comparison("chat text", float(rendered != reference["chat_text"]), 0)
    yield Comparison("chat ids", float(tokenizer.encode_markup(rendered) != reference["chat_ids"]), 0)
    marked = [text for text in reference["texts"] if not tokenizer.control_ids.isdisjoint(tokenizer.encode(text))]
    yield Comparison("control tokens from ticket text", len(marked), 0)


def _check_units(units: dict[str, Tensor]) -> Iterator[Comparison]:
    x_int8, x_scale = rowwise.quantize_rows(units["x"])
    yield _count("int8 activations", x_int8, units["a8_127_xq"])
    ones = torch.ones(len(units["w8_q"]))
    sums = cpu.int8_linear(x_int8, torch.ones(len(x_int8)), units["w8_q"], ones)
    yield _count("int32 sums", sums.to(torch.int32), units["a8_127_acc_int32"])
    y = cpu.int8_linear(x_int8, x_scale, units["w8_q"], units["w8_scale"].squeeze(1))
    yield _relative("W8A8", y, units["a8_127_y"])
    yield _count("int4 unpacked", unpack_int4(units["w4_packed"]), units["w4_q"])
    n, k = units["w4_q"].shape
    names = {"weight_packed": "w4_packed", "weight_scale": "w4_scale", "weight_shape": "w4_shape"}
    weights = in_memory({f"linear.{name}": units[key] for name, key in names.items()}, "units")
    yield _compare("int4 expanded", weights.float_weight("linear", n, k), units["w4_dequant"], 0)
    weights = in_memory({"linear.weight": units["w8_q"], "linear.weight_scale": units["w8_scale"]}, "units")
    yield _relative("W8A16", units["x"] @ weights.float_weight("linear", n, k).t(), units["w8a16_y"])


def _check_embedded(reference: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Comparison]:
    decoder = _float_decoder(open_checkpoint(DEFAULT_CHECKPOINT))
    for number, prompt in enumerate(reference["prompts"]):
        logits = decoder.logits(decoder.forward_one(prompt["ids"]))
        yield _compare(f"prompt {number}", logits[-1], tensors[f"p{number}.last_logits"], _WHOLE_TOLERANCE)
        expected = torch.tensor([prompt["greedy"]])
        tokens = forced_logits(decoder, [prompt["ids"]], [prompt["greedy"]]).argmax(dim=-1)
        yield _count(f"greedy {number}", tokens, expected)


def _float_decoder(checkpoint: Checkpoint) -> Decoder:
    return Decoder.from_weights(checkpoint.config(), checkpoint.weights(), PRECISIONS["fp32"])


@dataclass(slots=True)
class _WatchedLayer:
    layer: Layer
    hidden: list[Tensor]

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, added = self.layer.forward(*arguments)
        self.hidden.append(x + added)
        return x, added


@dataclass(slots=True)
class _WatchedRouter:
    router: Router
    index: int
    routes: dict[int, tuple[Tensor, Tensor, Tensor]]

    def logits(self, x: Tensor) -> Tensor:
        return self.router.logits(x)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.router.choose(logits)
        self.routes[self.index] = (logits, *chosen)
        return chosen


def _watched(decoder: Decoder) -> tuple[Decoder, list[Tensor], dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """Return the decoder with its layers' outputs and its routers' choices noted in the two collections."""
    hidden: list[Tensor] = []
    routes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    layers: list[Any] = []
    for index, layer in enumerate(decoder.layers):
        feed_forward: Any = layer.feed_forward
        if isinstance(feed_forward, MixtureOfExperts):
            router: Any = _WatchedRouter(feed_forward.router, index, routes)
            feed_forward = replace(feed_forward, router=router)
        layers.append(_WatchedLayer(replace(layer, feed_forward=feed_forward), hidden))
    return replace(decoder, layers=layers), hidden, routes


def _ragged(decoder: Decoder, reference: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits [sum T, V] and final hidden states of all sequences, packed into one step."""
    lengths = [end - start for start, end in itertools.pairwise(reference["ragged.cu_seqlens"].tolist())]
    step = decoder.step([Span(tuple(ids.tolist())) for ids in reference["ragged.input_ids"].split(lengths)])
    hidden = decoder.forward(step)
    return decoder.logits(hidden), hidden


def _padded(decoder: Decoder, reference: dict[str, Tensor], side: str) -> Tensor:
    """Return the logits [sum T, V] of a padded batch's own tokens, which the decoder packs."""
    ids, mask = reference[f"{side}.input_ids"], reference[f"{side}.attention_mask"].bool()
    step = decoder.step([Span(tuple(row[kept].tolist())) for row, kept in zip(ids, mask, strict=True)])
    return decoder.logits(decoder.forward(step))


def _greedy(decoder: Decoder, reference: dict[str, Tensor]) -> Tensor:
    cu = reference["ragged.cu_seqlens"].tolist()
    prompts = [reference["ragged.input_ids"][start:end].tolist() for start, end in itertools.pairwise(cu)]
    return forced_logits(decoder, prompts, reference["greedy.tokens"].tolist())


@torch.inference_mode()
def forced_logits(decoder: Decoder, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Return the logits [B, steps, V] before each token of `answers`, which are fed one at a time into a cache.

    Where the best of them is the answer's token at every step, greedy decoding gives that answer.
    """
    kept = [KeyValues(len(ids)) for ids in prompts]
    step = decoder.step([Span(tuple(ids), keep=kv) for ids, kv in zip(prompts, kept, strict=True)])
    hidden = decoder.forward(step)
    logits = [decoder.logits(torch.stack([hidden[rows.stop - 1] for rows in step.rows]))]
    for tokens in list(zip(*answers, strict=True))[:-1]:
        step = decoder.step([Span((token,), kv, decodes=True) for token, kv in zip(tokens, kept, strict=True)])
        logits.append(decoder.logits(decoder.forward(step)))
        kept = [KeyValues(kv.end + 1, kv.pages) for kv in kept]
    return torch.stack(logits, dim=1)


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> Comparison:
    if got.shape != expected.shape:
        return Comparison(f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}", float("inf"), tolerance)
    difference = (got.float() - expected.float()).abs().nan_to_num(nan=float("inf")).max().item()
    return Comparison(what, difference, tolerance)


def _relative(what: str, got: Tensor, expected: Tensor) -> Comparison:
    """One rounding of float32 a step apart, at the size of the largest value."""
    return _compare(what, got, expected, 1e-6 * expected.abs().max().item())


def _count(what: str, got: Tensor, expected: Tensor) -> Comparison:
    return Comparison(what, float((got != expected).sum().item()) if got.shape == expected.shape else float("inf"), 0)


def _tolerance(folder: Path) -> float:
    path = folder / "meta.json"
    return float(_read_json(path).get("tolerance_fp32", TOLERANCE)) if path.exists() else TOLERANCE


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
