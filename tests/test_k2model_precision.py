"""Precisions: as near float32 as their rounding says, as small as their dtypes, and a row keeps its bits in each."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import spec
from k2model.config import ModelConfig
from k2model.decoder.attention import Attention
from k2model.decoder.feed_forward import FeedForward, MixtureOfExperts
from k2model.decoder.linear import FloatLinear, Int8Linear
from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS, find_precision
from k2model.engine.engine import Engine
from k2model.engine.request import Candidate, Request
from k2model.formats.checkpoint import fingerprint
from k2model.formats.weights import in_memory
from schemas.errors import SpecError
from tests.checkpoints import config_json, random_tensors, write_checkpoint
from tests.forward import packed_hidden
from tests.test_k2model_decoder import as_w8a8

FLOATS = ("mixed", "bf16", "fp32")
FAMILIES = ("llama", "qwen3_moe", "deepseek_v3")
PROMPTS = [[*range(40, 97)], [3], [*range(200, 233)], [3, 3, 9]]
HALF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""The largest relative error of rounding."""


def decoder_of(family: str, name: str) -> Decoder:
    raw = config_json(family)
    return Decoder.from_weights(
        ModelConfig.from_dict(raw, "test"), in_memory(random_tensors(raw), "test"), PRECISIONS[name]
    )


def test_the_job_files_words_are_the_tables() -> None:
    assert spec.PRECISIONS == tuple(PRECISIONS)
    with pytest.raises(SpecError, match='no precision "fp8"') as caught:
        find_precision("fp8")
    assert "int8, mixed, bf16, fp32" in caught.value.remedy


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_is_off_by_the_rounding_of_its_two_sides(family: str, name: str) -> None:
    """|fl(x) · fl(w) - x · w| <= (2 u + u²) |x| · |w|, and K roundings of float32 in the sum."""
    exact, rounded = decoder_of(family, "fp32").layers[1], decoder_of(family, name).layers[1]
    precision = PRECISIONS[name]
    pairs = [
        (exact.attention.first, rounded.attention.first, precision.attention),
        (exact.attention.o_proj, rounded.attention.o_proj, precision.attention),
    ]
    for one, other in zip(experts(exact.feed_forward), experts(rounded.feed_forward), strict=True):
        pairs.append((one.gate_up_proj, other.gate_up_proj, precision.feed_forward))
        pairs.append((one.down_proj, other.down_proj, precision.feed_forward))
    for plain, own, dtype in pairs:
        assert isinstance(plain, FloatLinear)
        assert isinstance(own, FloatLinear)
        assert own.weight.dtype == dtype
        x = torch.randn(70, plain.weight.shape[1], generator=torch.Generator().manual_seed(4))
        reach = x.abs() @ plain.weight.abs().t()
        unit = HALF[dtype]
        bound = (2 * unit + unit**2 + 2 * x.shape[1] * 2**-24) * reach
        assert ((own(x) - plain(x)).abs() <= bound).all()


def experts(feed_forward: FeedForward | MixtureOfExperts) -> list[FeedForward]:
    if isinstance(feed_forward, FeedForward):
        return [feed_forward]
    return [*feed_forward.experts, *([feed_forward.shared] if feed_forward.shared else [])]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_is_near_float32_and_nearer_with_more_bits(family: str) -> None:
    exact = packed_hidden(decoder_of(family, "fp32"), PROMPTS)
    off = {name: relative(packed_hidden(decoder_of(family, name), PROMPTS), exact) for name in ("mixed", "bf16")}
    # Two layers of four linears in a row, each off by up to √2 u of its norm where errors are independent. The median:
    # a token at a router's tie may go to another expert, and is then off by far more.
    assert 0 < off["mixed"] < off["bf16"] < 8 * 2**0.5 * HALF[torch.bfloat16]


def relative(values: Tensor, exact: Tensor) -> float:
    return float(((values - exact).norm(dim=1) / exact.norm(dim=1)).median())


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_as_the_dtypes_say(family: str, name: str) -> None:
    decoder, plain, precision = decoder_of(family, name), decoder_of(family, "fp32"), PRECISIONS[name]
    assert decoder.lm_head.nbytes == plain.lm_head.numel() * precision.head.itemsize
    for layer, full in zip(decoder.layers, plain.layers, strict=True):
        own, whole = layer.attention.first, full.attention.first
        assert isinstance(own, FloatLinear)
        assert isinstance(whole, FloatLinear)
        assert own.weight.nbytes == whole.weight.numel() * precision.attention.itemsize
        stored = [linear.weight.nbytes for e in experts(layer.feed_forward) for linear in floats(e)]
        counts = [linear.weight.numel() for e in experts(full.feed_forward) for linear in floats(e)]
        assert stored == [count * precision.feed_forward.itemsize for count in counts]
        if isinstance(layer.feed_forward, MixtureOfExperts):
            assert layer.feed_forward.router.weight.dtype == torch.float32
    kept = torch.bfloat16 if precision.key_values == torch.bfloat16 else torch.float32  # as attention reads them
    assert {pages.dtype for pages in decoder.pool.layers} == {kept}
    assert decoder.pool.slot_bytes * 4 == plain.pool.slot_bytes * kept.itemsize


def floats(feed_forward: FeedForward) -> list[FloatLinear]:
    linears = [feed_forward.gate_up_proj, feed_forward.down_proj]
    assert all(isinstance(linear, FloatLinear) for linear in linears)
    return [linear for linear in linears if isinstance(linear, FloatLinear)]


@pytest.mark.parametrize("name", PRECISIONS)
def test_quantized_weights_stay_so_in_int8_alone(name: str) -> None:
    raw = config_json("llama")
    weights = in_memory(as_w8a8(raw, random_tensors(raw)), "test")
    attention = Decoder.from_weights(ModelConfig.from_dict(raw, "test"), weights, PRECISIONS[name]).layers[0].attention
    assert isinstance(attention, Attention)
    if name == "int8":
        assert isinstance(attention.qkv_proj, Int8Linear)
    else:
        assert isinstance(attention.qkv_proj, FloatLinear)
        assert attention.qkv_proj.weight.dtype == PRECISIONS[name].attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_checkpoint(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_keeps_its_bits_among_others(folders: dict[str, Path], family: str, name: str) -> None:
    engine = Engine.open(str(folders[family]), precision=name)
    prompts = [tuple((7 * i + j * j) % 250 for j in range(3 + 11 * i)) for i in range(9)]
    candidates = (Candidate((65,), 1), Candidate((66, 67), 2))
    requests = [Request(prompt_ids=ids, candidates=candidates) for ids in prompts]
    requests += [Request(prompt_ids=ids, max_tokens=9) for ids in prompts]
    whole = engine.submit(requests).result()
    assert all(not completion.error for completion in whole)
    assert [engine.submit([request]).result()[0] for request in requests] == whole
    assert engine.submit(requests[::-1]).result()[::-1] == whole
    engine.close()
    assert any(completion.token_ids for completion in whole)


def test_every_precision_is_another_model(folders: dict[str, Path]) -> None:
    names = {fingerprint(str(folders["qwen3_moe"]), name) for name in PRECISIONS}
    thresholds = [(1.0, 0.5), (0.5, 1.0)]
    names |= {fingerprint(str(folders["qwen3_moe"]), "int8", values) for values in thresholds}
    assert len(names) == len(PRECISIONS) + 2
