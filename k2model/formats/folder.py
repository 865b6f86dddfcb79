"""The files of a checkpoint, on this machine or behind a URL: listed, and read by byte range.

Reading is by range and into memory of its own, never by mapping: pages of a mapped file count as this process's memory,
and a checkpoint larger than the memory limit has to convert within it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from schemas.errors import CheckpointError
from schemas.urls import refuse_secrets, without_secrets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GIT_LFS = b"version https://git-lfs"
"""How the text begins that git leaves where a large file was not fetched."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder's files, those of its subfolders left out."""

    where: str
    """The checkpoint as the user wrote it, for messages."""
    root: str
    sizes: Mapping[str, int]
    """Bytes of each file, by name."""
    fs: Any = None
    """An fsspec filesystem; None for a folder of this machine."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What the store says changes with a file's content, by name."""

    def read(self, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes [start, stop) of `file`. Raises: CheckpointError if it is missing, unreadable or shorter."""
        size = self.sizes.get(file)
        if size is None:
            raise CheckpointError(f"{self.where}: {file} is missing", remedy="the download may be incomplete")
        stop = size if stop is None else stop
        try:
            if self.fs is not None:
                data = bytes(self.fs.cat_file(f"{self.root}/{file}", start=start, end=stop)) if stop > start else b""
            else:
                with (Path(self.root) / file).open("rb") as opened:
                    opened.seek(start)
                    data = opened.read(stop - start)
        except Exception as error:  # each store has its own kinds of error
            raise CheckpointError(f"{self.where}: {file} cannot be read: {error}") from error
        if len(data) != stop - start:
            raise self.truncated(file)
        return data

    def tensor(self, file: str, start: int, dtype: "torch.dtype", shape: Sequence[int]) -> "Tensor":
        """Return the tensor whose bytes begin at `start` of `file`, in memory of its own."""
        import torch

        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        view = raw.numpy().data
        if self.fs is not None:
            view[:] = self.read(file, start, start + len(view))
        else:
            self._read_into(view, file, start)
        return raw.view(dtype).reshape(tuple(shape))

    def _read_into(self, view: memoryview, file: str, start: int) -> None:
        try:
            with (Path(self.root) / file).open("rb", buffering=0) as opened:
                opened.seek(start)
                done = 0
                while done < len(view):  # one call returns at most 2 GiB
                    got = opened.readinto(view[done:])
                    if not got:
                        raise self.truncated(file)
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self.where}: {file} cannot be read: {error}") from error

    def fetch(self, file: str, target: Path) -> None:
        """Copy `file` to `target` on this machine. Raises: CheckpointError if it cannot be read whole."""
        try:
            self.fs.get_file(f"{self.root}/{file}", str(target))
        except Exception as error:  # each store has its own kinds of error
            raise CheckpointError(f"{self.where}: {file} cannot be read: {error}") from error
        if target.stat().st_size != self.sizes[file]:
            raise self.truncated(file)

    def json(self, file: str) -> dict[str, Any]:
        """Return the object in `file`. Raises: CheckpointError if it is missing or holds anything else."""
        return parse_object(self.read(file), f"{self.where}: {file}")

    def truncated(self, file: str) -> CheckpointError:
        """Return the error that says `file` ends early."""
        return CheckpointError(
            f"{self.where}: {file} is shorter than it says: {self.sizes.get(file)} bytes",
            remedy="the download was cut off: fetch the file again",
        )


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object `data`. Raises: CheckpointError for anything else, or a key that has two values."""
    if data.startswith(GIT_LFS):
        raise lfs_pointer(where)
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}", remedy="fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        repeated = next(key for key, value in pairs if made[key] is not value and made[key] != value)
        raise ValueError(f"the key {repeated!r} has two values")
    return made


def lfs_pointer(where: str) -> CheckpointError:
    """Return the error for a file that git did not fetch."""
    return CheckpointError(
        f"{where} is a git-lfs pointer, not the file itself", remedy="run `git lfs pull` in the checkpoint's folder"
    )


def local_folder(path: Path, where: str) -> Folder:
    """Return the folder at `path`. Raises: CheckpointError if it cannot be listed."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.is_file()}
    except OSError as error:
        raise CheckpointError(f"{where}: {path} cannot be listed: {error}") from error
    return Folder(where, str(path), sizes)


def remote_folder(url: str) -> Folder:
    """Return the folder at fsspec URL `url`, or of the GGUF file there.

    Raises: CheckpointError if it is not listed; SpecError if the URL holds credentials.
    """
    refuse_secrets(url)
    try:
        fs, root = fsspec.core.url_to_fs(url)
        if root.endswith(".gguf"):
            root, entries = root.rpartition("/")[0], [fs.info(root)]
        else:
            entries = fs.ls(root, detail=True)
        files = {e["name"].rstrip("/").rpartition("/")[2]: e for e in entries if e.get("type") == "file"}
        for file, entry in files.items():
            if entry.get("size") is None:  # a web server's listing
                files[file] = fs.info(entry["name"])
    except Exception as error:  # each store has its own kinds of error
        raise CheckpointError(
            without_secrets(f'checkpoint "{url}" cannot be listed: {error}'),
            remedy="check the URL and your credentials",
        ) from error
    sizes = {file: entry.get("size") or 0 for file, entry in files.items()}
    versions = {file: _version(entry) for file, entry in files.items()}
    return Folder(url, root.rstrip("/"), sizes, fs, versions)


def _version(entry: Mapping[str, Any]) -> str:
    return str(next((entry[key] for key in ("ETag", "etag", "blob_id", "mtime", "created") if entry.get(key)), ""))
