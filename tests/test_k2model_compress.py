"""Balancing outliers: the float model is unchanged, the INT8 one nearer to it."""

from pathlib import Path

import pytest
import torch

from k2model.compress.calibrate import calibration_ids, calibration_texts, channel_strength
from k2model.compress.quantize import quantize, quantize_weight, smooth
from k2model.decoder.model import Decoder
from k2model.formats.checkpoint import open_checkpoint
from k2model.tokenizer import Tokenizer
from tests.checkpoints import write_checkpoint

IDS = list(range(30, 90))


@torch.inference_mode()
def logits(config: object, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    decoder = Decoder.from_tensors(config, tensors, where="test", dtype=torch.float32, kv_dtype=torch.float32)  # type: ignore[arg-type]
    return decoder.logits(decoder.forward_one(IDS))


def test_smoothing_folds_away_and_brings_int8_nearer(tmp_path: Path) -> None:
    source = open_checkpoint(str(write_checkpoint(tmp_path, outlier=40.0)))
    config, tensors = source.config(), source.tensors()
    decoder = Decoder.from_tensors(config, tensors, where="test", dtype=torch.float32, kv_dtype=torch.float32)
    strengths = channel_strength(decoder, calibration_ids(Tokenizer.open(tmp_path))[:20])
    plain = logits(config, tensors)
    before = (logits(config, quantize(dict(tensors))) - plain).abs().mean()
    balanced = {name: tensor.clone() for name, tensor in tensors.items()}
    smooth(balanced, strengths, config)
    torch.testing.assert_close(logits(config, balanced), plain, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(balanced[name], tensors[name]) for name in tensors)
    after = (logits(config, quantize(balanced)) - plain).abs().mean()
    assert after < 0.7 * before


def test_strength_counts_every_token_alike(tmp_path: Path) -> None:
    source = open_checkpoint(str(write_checkpoint(tmp_path, outlier=40.0)))
    decoder = Decoder.from_tensors(
        source.config(), source.tensors(), where="t", dtype=torch.float32, kv_dtype=torch.float32
    )
    strengths = channel_strength(decoder, [IDS, IDS[:7]])
    assert len(strengths) == 2
    for layer in strengths:
        assert set(layer) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        for strength in layer.values():
            assert strength.square().mean().item() == pytest.approx(1.0, rel=1e-3)
    assert strengths[0]["qkv_proj"].argmax() == 5


def test_weights_quantize_to_half_a_step_per_channel() -> None:
    weight = torch.randn(8, 33)
    weight[3] = 0
    quantized, scale = quantize_weight(weight)
    assert ((quantized.float() * scale - weight).abs() <= 0.501 * scale).all()
    assert quantized[3].eq(0).all()
    assert scale.isfinite().all()


def test_the_shipped_texts_are_many_and_varied() -> None:
    texts = calibration_texts()
    assert len(texts) >= 200
    assert len(set(texts)) == len(texts)
    assert sum(not text.isascii() for text in texts) >= 20
