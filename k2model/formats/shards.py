"""Safetensors files: headers checked to the last offset before anything is read, then one tensor at a time.

Source: huggingface/safetensors, README "Format": 8 bytes of header length, a JSON header, the tensors back to back.
As there, holes and overlaps are refused.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from k2model.formats.folder import GIT_LFS, Folder, lfs_pointer, parse_object
from schemas.errors import CheckpointError

BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
"""The dtypes a header may name here, and the size of one value."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the format's own library."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHERS = (".h5", ".msgpack", ".onnx", ".npz", ".tflite")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes are."""

    file: str
    start: int
    """Offset of its first byte in the file."""
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Folder) -> dict[str, Stored]:
    """Return every tensor of the folder's safetensors, by the names in the files.

    Raises: CheckpointError if files are missing, not safetensors, truncated, or contradict the index or each other.
    """
    stored: dict[str, Stored] = {}
    placed = _weight_map(folder) if INDEX in folder.sizes else {}
    for file in shard_files(folder):
        for name, tensor in _header(folder, file):
            if name in stored:
                raise CheckpointError(f"{folder.where}: tensor {name} is in {stored[name].file} and again in {file}")
            stored[name] = tensor
    for name, file in placed.items():
        if name not in stored:
            raise CheckpointError(
                f"{folder.where}: tensor {name} is not in {file}, where {INDEX} places it",
                remedy="the index and the files are of different versions: download all again",
            )
        if stored[name].file != file:
            raise CheckpointError(
                f"{folder.where}: tensor {name} is in {stored[name].file}, and {INDEX} places it in {file}",
                remedy="the index and the files are of different versions: download all again",
            )
    return stored


def shard_files(folder: Folder) -> list[str]:
    """Return the names of the safetensors that make up the model. Raises: CheckpointError if there are none."""
    if INDEX in folder.sizes:
        files = sorted(set(_weight_map(folder).values()))
    elif SINGLE in folder.sizes:
        files = [SINGLE]
    else:
        raise _no_weights(folder)
    for file in files:
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f'{folder.where}: {INDEX} names a file outside the checkpoint: "{file}"')
        if file not in folder.sizes:
            raise CheckpointError(
                f"{folder.where}: {file} is missing, and {INDEX} names it", remedy="the download may be incomplete"
            )
    return files


def _weight_map(folder: Folder) -> dict[str, str]:
    placed = folder.json(INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{folder.where}: {INDEX} has no weight_map of tensor names to file names")
    return placed


def _no_weights(folder: Folder) -> CheckpointError:
    def those(*suffixes: str) -> list[str]:
        return sorted(file for file in folder.sizes if file.endswith(suffixes))

    if found := those(*_PICKLES):
        return CheckpointError(
            f"{folder.where}: its weights are Python pickles ({found[0]}), which can run code and are never opened",
            remedy="convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(other_folder) of transformers writes safetensors",
        )
    if found := those(".gguf"):
        return CheckpointError(
            f"{folder.where} is a folder of GGUF files", remedy=f"give one file: {folder.where.rstrip('/')}/{found[0]}"
        )
    if found := those(".safetensors"):
        return CheckpointError(
            f"{folder.where}: neither {SINGLE} nor {INDEX} is there, only {', '.join(found[:3])}",
            remedy=f"fetch {INDEX} too: it says which files make up the model",
        )
    if found := those(*_OTHERS):
        return CheckpointError(f"{folder.where}: its weights are {found[0]}, and only safetensors and GGUF are read")
    return CheckpointError(
        f"{folder.where} holds no weights", remedy=f"fetch {SINGLE}, or its shards and their {INDEX}"
    )


def _header(folder: Folder, file: str) -> Iterator[tuple[str, Stored]]:
    where, size = f"{folder.where}: {file}", folder.sizes[file]
    head = folder.read(file, 0, min(size, len(GIT_LFS)))
    if head == GIT_LFS:
        raise lfs_pointer(where)
    if size < 8:
        raise folder.truncated(file)
    (length,) = struct.unpack("<Q", head[:8])
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{where} is not safetensors: its header would have {length} bytes", remedy="fetch the file again"
        )
    data_start = 8 + length
    if size < data_start:
        raise folder.truncated(file)
    tensors = parse_object(folder.read(file, 8, data_start), f"{where}: the header")
    tensors.pop("__metadata__", None)
    spans = []
    for name, entry in tensors.items():
        start, stop, tensor = _entry(where, file, name, entry, data_start)
        spans.append((start, stop, name))
        yield name, tensor
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise CheckpointError(f"{where}: tensor {name} begins at byte {start} of the data, expected {end}")
        end = stop
    if data_start + end > size:
        raise folder.truncated(file)
    if data_start + end < size:
        raise CheckpointError(f"{where} has {size - data_start - end} bytes that belong to no tensor")


def _entry(where: str, file: str, name: str, entry: Any, data_start: int) -> tuple[int, int, Stored]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: the header's entry of tensor {name} is malformed: {str(entry)[:200]}")
    if dtype not in BYTES:
        raise CheckpointError(f"{where}: tensor {name} has dtype {dtype}, which is not read")
    start, stop = offsets
    if stop - start != math.prod(shape) * BYTES[dtype]:
        raise CheckpointError(f"{where}: tensor {name} is {dtype} {shape}, which {stop - start} bytes cannot be")
    return start, stop, Stored(file, data_start + start, dtype, tuple(shape))


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
