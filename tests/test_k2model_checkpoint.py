"""Checkpoints: what opens, what is refused and in which words, before anything is fetched."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from k2model.config import ModelConfig
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, fingerprint, open_checkpoint
from k2model.parameters import parameters
from schemas.errors import CheckpointError
from tests.checkpoints import CONFIG, write_checkpoint

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, 'model_type is "mamba", which is not known'),
        ({"model_type": "kimi_linear", "auto_map": {"AutoConfig": "x.Y"}}, "brings its own Python code"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope type "longrope"'),
        ({"hidden_size": None}, 'no key "hidden_size"'),
        ({"hidden_size": "48"}, "hidden_size = '48'"),
    ],
)
def test_a_config_the_decoder_does_not_compute_is_refused(change: dict[str, object], message: str) -> None:
    raw = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(raw, "here")


def test_both_spellings_of_rope_are_one() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    hub = ModelConfig.from_dict({**CONFIG, "rope_theta": 5e5, "rope_scaling": scaling}, "hub")
    five = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    assert ModelConfig.from_dict({**five, "rope_parameters": {**scaling, "rope_theta": 5e5}}, "five") == hub


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_every_reference_checkpoint_opens_whole(path: Path) -> None:
    checkpoint = open_checkpoint(str(path.parent))
    config, weights = checkpoint.config(), checkpoint.weights()
    weights.check(parameters(config), tied=config.tie_word_embeddings)
    for parameter in parameters(config):
        if parameter.is_linear:
            weight = weights.float_weight(parameter.name.removesuffix(".weight"), *parameter.shape)
            assert tuple(weight.shape) == parameter.shape
            assert weight.isfinite().all()


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="neither a folder"):
        open_checkpoint(str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        open_checkpoint(str(broken)).config()
    with pytest.raises(CheckpointError, match="folder of GGUF files") as refused:
        open_checkpoint(str(tmp_path))
    assert str(broken) in refused.value.remedy


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("has_config", [True, False])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, file: str, has_config: bool) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb()))
    if not has_config:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"pickles .{file}.") as refused:
        open_checkpoint(str(folder)).weights()
    assert "safetensors" in refused.value.remedy
    with pytest.raises(CheckpointError, match="pickles"):
        fingerprint(str(folder), "int8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("[" * 100_000, "config.json is not JSON"),
        ('{"hidden_size": 1, "hidden_size": 2}', "the key 'hidden_size' has two values"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "config.json is not JSON"),
        ('{"model_type": "llama", "num_hidden_layers": NaN}', "num_hidden_layers = nan"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("\udcff", "config.json is not JSON"),
    ],
)
def test_a_config_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder)).config()


def test_the_fingerprint_follows_the_bytes_and_the_mode(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", seed=1)
    same = write_checkpoint(tmp_path / "b", seed=1)
    other = write_checkpoint(tmp_path / "c", seed=2)
    assert fingerprint(str(first), "int8") == fingerprint(str(same), "int8")
    assert fingerprint(str(first), "int8") != fingerprint(str(other), "int8")
    assert fingerprint(str(first), "int8") != fingerprint(str(first), "fp32")
    (same / "tiktoken.model").write_text("IQ== 0\n")
    assert fingerprint(str(first), "int8") != fingerprint(str(same), "int8")
    assert len(fingerprint(DEFAULT_CHECKPOINT, "int8")) == 16


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A memory store with a tiny checkpoint, a pickle and code at /models/tiny; the cache is empty."""
    monkeypatch.setenv("K2BATCH_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "source")
    (folder / "tiktoken.model").write_text("IQ== 0\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "modeling_x.py").write_text("raise SystemExit")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/models/tiny/{path.name}", path.read_bytes())
    yield memory
    memory.rm("/models", recursive=True)


def downloads(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("downloads/*/*"))


def test_a_remote_folder_is_fetched_once(tmp_path: Path, remote: Any) -> None:
    first = open_checkpoint("memory://models/tiny")
    assert first.config() == open_checkpoint(str(tmp_path / "source")).config()
    expected = {"config.json", "model.safetensors", "tiktoken.model", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in downloads(tmp_path)} == expected
    assert open_checkpoint("memory://models/tiny").path == first.path
    assert fingerprint("memory://models/tiny", "int8") == fingerprint(str(tmp_path / "source"), "int8")
    remote.rm_file("/models/tiny/model.safetensors")
    remote.pipe_file("/models/tiny/model.safetensors", (tmp_path / "source/model.safetensors").read_bytes())
    assert open_checkpoint("memory://models/tiny").path != first.path, "a file that changed is fetched again"


def test_a_remote_gguf_file_is_fetched_alone(tmp_path: Path, remote: Any) -> None:
    source = open_checkpoint(DEFAULT_CHECKPOINT).path
    remote.pipe_file("/models/tiny/some.gguf", source.read_bytes())
    assert open_checkpoint("memory://models/tiny/some.gguf").config().num_hidden_layers == 30
    assert [path.name for path in downloads(tmp_path)] == ["some.gguf"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "which is not known here"),
        ({"quantization_config": {"quant_method": "gptq"}}, 'quantization "gptq" is not read'),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_fetched(
    tmp_path: Path, remote: Any, config: dict[str, object], message: str
) -> None:
    remote.pipe_file("/models/tiny/config.json", json.dumps({**CONFIG, **config}).encode())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("memory://models/tiny")
    assert downloads(tmp_path) == []


def test_a_store_that_fails_is_reported_in_its_words() -> None:
    with pytest.raises(CheckpointError, match="cannot be listed"):
        open_checkpoint("memory://nowhere/at/all")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        open_checkpoint("nosuchstore://bucket/model")
