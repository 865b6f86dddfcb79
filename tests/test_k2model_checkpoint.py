"""Checkpoints: what opens, what is refused and in which words."""

import json
from pathlib import Path

import fsspec
import pytest

from k2model.config import ModelConfig
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, fingerprint, open_checkpoint
from schemas.errors import CheckpointError
from tests.checkpoints import CONFIG, write_checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, 'model_type is "mamba"'),
        ({"attention_bias": True}, "sets attention_bias"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_scaling": {"rope_type": "yarn"}}, 'rope type "yarn"'),
        ({"hidden_size": None}, None),
    ],
)
def test_a_config_the_decoder_does_not_compute_is_refused(change: dict[str, object], message: str | None) -> None:
    raw = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message or "no key 'hidden_size'"):
        ModelConfig.from_dict(raw, "here")


def test_both_spellings_of_rope_are_one() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    hub = ModelConfig.from_dict({**CONFIG, "rope_theta": 5e5, "rope_scaling": scaling}, "hub")
    five = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    assert ModelConfig.from_dict({**five, "rope_parameters": {**scaling, "rope_theta": 5e5}}, "five") == hub


@pytest.mark.parametrize("layout", ["sparse", "unknown"])
def test_other_quantizations_are_refused_not_guessed(tmp_path: Path, layout: str) -> None:
    from k2model.compress.recipe import prepare_int8

    folder = write_checkpoint(tmp_path)
    declared = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"g": {}}}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": declared}))
    with pytest.raises(CheckpointError, match=f'with format "{layout}"'):
        prepare_int8(str(folder))


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="neither a folder"):
        open_checkpoint(str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        open_checkpoint(str(broken)).config()


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(str(folder)).tensors()


def test_an_index_cannot_reach_outside_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(str(folder)).tensors()


def test_the_fingerprint_follows_the_bytes_and_the_mode(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", seed=1)
    same = write_checkpoint(tmp_path / "b", seed=1)
    other = write_checkpoint(tmp_path / "c", seed=2)
    assert fingerprint(str(first), "cpu") == fingerprint(str(same), "cpu")
    assert fingerprint(str(first), "cpu") != fingerprint(str(other), "cpu")
    assert fingerprint(str(first), "cpu") != fingerprint(str(first), "float32")
    assert len(fingerprint(DEFAULT_CHECKPOINT, "cpu")) == 16


def test_a_remote_folder_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2BATCH_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "source")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/models/tiny/{path.name}", path.read_bytes())
    first = open_checkpoint("memory://models/tiny")
    assert first.config() == open_checkpoint(str(folder)).config()
    memory.rm_file("/models/tiny/model.safetensors")
    memory.pipe_file("/models/tiny/model.safetensors", (folder / "model.safetensors").read_bytes())
    assert len(list((tmp_path / "cache" / "downloads").iterdir())) >= 1
