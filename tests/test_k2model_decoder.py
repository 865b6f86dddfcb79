"""The decoder against reference logits computed by transformers, checkpoint by checkpoint."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from k2model.decoder.layers import Group, Step
from k2model.decoder.model import Decoder, causal
from k2model.formats import compressed_tensors
from k2model.formats.checkpoint import Checkpoint, open_checkpoint
from schemas.errors import CheckpointError
from tests.checkpoints import write_checkpoint

FIXTURES = Path(__file__).parents[2] / "shared/fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="needs the fixtures")


def float_decoder(checkpoint: Checkpoint) -> Decoder:
    return Decoder.from_tensors(
        checkpoint.config(), checkpoint.tensors(), where="test", dtype=torch.float32, kv_dtype=torch.float32
    )


@torch.inference_mode()
def ragged_logits(decoder: Decoder, reference: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return [sum T, V]: all ragged sequences packed into one step."""
    cu = reference["ragged.cu_seqlens"].tolist()
    lengths = [end - start for start, end in itertools.pairwise(cu)]
    groups = [Group(1, length, causal(length, 0)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return decoder.logits(decoder.forward(Step(reference["ragged.input_ids"], positions, groups)))


@needs_fixtures
@pytest.mark.parametrize("name", ["llama", "smollm2", "llama3_rope"])
def test_float_logits_are_the_reference(name: str) -> None:
    reference = load_file(FIXTURES / name / "reference.safetensors")
    decoder = float_decoder(open_checkpoint(str(FIXTURES / name)))
    tolerance = json.loads((FIXTURES / name / "meta.json").read_text())["tolerance_fp32"]
    torch.testing.assert_close(ragged_logits(decoder, reference), reference["ragged.logits"], rtol=0, atol=tolerance)


@needs_fixtures
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_gguf_logits_are_the_reference(kind: str) -> None:
    reference = load_file(FIXTURES / "llama_gguf" / "reference.safetensors")
    decoder = float_decoder(open_checkpoint(str(FIXTURES / "llama_gguf" / f"model-{kind}.gguf")))
    torch.testing.assert_close(ragged_logits(decoder, reference), reference[f"ragged.logits.{kind}"], rtol=0, atol=2e-4)


@needs_fixtures
def test_w8a8_logits_are_the_reference() -> None:
    """The rule for quantized activations: nearer to the scheme's own reference than the scheme is to float."""
    reference = load_file(FIXTURES / "llama_w8a8" / "reference.safetensors")
    checkpoint = open_checkpoint(str(FIXTURES / "llama_w8a8"))
    assert compressed_tensors.is_w8a8(checkpoint.config_json(), "test")
    got = ragged_logits(float_decoder(checkpoint), reference)
    variant = reference["ragged.logits.act_int8_vllm127"]
    error = (got - variant).abs()
    assert error.mean() <= 0.3 * (variant - reference["ragged.logits"]).abs().mean()
    assert (error.amax(dim=1) <= 0.05).float().mean() >= 0.9


@needs_fixtures
def test_cached_decoding_is_the_reference() -> None:
    reference = load_file(FIXTURES / "llama" / "reference.safetensors")
    decoder = float_decoder(open_checkpoint(str(FIXTURES / "llama")))
    cu = reference["ragged.cu_seqlens"].tolist()
    ids = reference["ragged.input_ids"][cu[0] : cu[1]]
    cache = decoder.allocate(1, len(ids) + 10)
    with torch.inference_mode():
        group = Group(1, len(ids), causal(len(ids), 0), cache=cache)
        hidden = decoder.forward(Step(ids, torch.arange(len(ids)), [group]))
        for step, token in enumerate(reference["greedy.tokens"][0].tolist()):
            logits = decoder.logits(hidden[-1:])[0]
            torch.testing.assert_close(logits, reference["greedy.logits"][0, step], rtol=0, atol=2e-4)
            assert logits.argmax() == token
            group = Group(1, 1, causal(1, cache.length), cache=cache)
            hidden = decoder.forward(Step(torch.tensor([token]), torch.tensor([cache.length]), [group]))


@pytest.mark.parametrize("split", [1, 4, 11])
def test_a_shared_prefix_gives_what_the_whole_prompt_gives(tmp_path: Path, split: int) -> None:
    decoder = float_decoder(open_checkpoint(str(write_checkpoint(tmp_path))))
    ids = list(range(40, 52))
    with torch.inference_mode():
        whole = decoder.forward_one(ids)
        prefix = decoder.allocate(1, split)
        group = Group(1, split, causal(split, 0), cache=prefix)
        decoder.forward(Step(torch.tensor(ids[:split]), torch.arange(split), [group]))
        rest = Group(1, 12 - split, causal(12 - split, split), prefix=prefix)
        tail = decoder.forward(Step(torch.tensor(ids[split:]), torch.arange(split, 12), [rest]))
    torch.testing.assert_close(tail, whole[split:], rtol=0, atol=2e-5)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path)))
    tensors = checkpoint.tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Decoder.from_tensors(checkpoint.config(), tensors, where="x", dtype=torch.float32, kv_dtype=torch.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \(3, 3\), expected \(96, 48\)"):
        Decoder.from_tensors(checkpoint.config(), tensors, where="x", dtype=torch.float32, kv_dtype=torch.float32)
