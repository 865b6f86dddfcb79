"""GGUF files: fields and tensor table from the header alone, then one tensor, or one expert of it, expanded at a time.

Source: the GGUF specification, ggml-org/ggml docs/gguf.md; the block types are expanded by gguf-py.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from k2model.formats.folder import GIT_LFS, Folder, lfs_pointer
from schemas.errors import CheckpointError

READ_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""Tensor types that are expanded; each exactly as its definition says, into float32."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Struct codes of the specification's value types."""
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

_FIRST_READ, _NEXT_READ = 1 << 16, 1 << 20
"""Bytes; a header with a vocabulary of 150,000 tokens has some 5 MB."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor's bytes are."""

    start: int
    """Offset of its first byte in the file."""
    dtype: str
    """Name of the ggml type."""
    shape: tuple[int, ...]
    """Rows first, the reverse of how the file lists it."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's header, and how to read its tensors."""

    folder: Folder
    file: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return tensor `name` as float32, or item `index` along its first dimension without reading the others."""
        tensor = self.tensors[name]
        shape = tensor.shape if index is None else tensor.shape[1:]
        size = _byte_shape(tensor.dtype, shape)
        start = tensor.start + (index or 0) * math.prod(size)
        raw = self.folder.tensor(self.file, start, torch.uint8, size).numpy()
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(raw, kind))).reshape(shape)


def read_gguf(folder: Folder, file: str) -> GgufFile:
    """Return the header of `file`. Raises: CheckpointError if it is no GGUF, is truncated, or has unread types."""
    try:
        return _parse(_Cursor(folder, file))
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{folder.where}: {file} is not a readable GGUF file: {error}", remedy="download it again"
        ) from error


class _Cursor:
    """Reads forward through a file, fetching no more of it than is asked for."""

    def __init__(self, folder: Folder, file: str) -> None:
        self.folder = folder
        self.file = file
        self.at = 0
        self._data = bytearray()

    def take(self, size: int) -> bytes:
        length = self.folder.sizes.get(self.file, 0)
        if size > length - self.at:
            raise self.folder.truncated(self.file)
        while self.at + size > len(self._data):
            start = len(self._data)
            self._data += self.folder.read(
                self.file, start, min(start + (_NEXT_READ if start else _FIRST_READ), length)
            )
        self.at += size
        return bytes(self._data[self.at - size : self.at])

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


def _parse(cursor: _Cursor) -> GgufFile:
    folder, file = cursor.folder, cursor.file
    where = f"{folder.where}: {file}"
    magic = cursor.take(4)
    if magic == GIT_LFS[:4]:
        raise lfs_pointer(where)
    if magic != b"GGUF":
        raise CheckpointError(f"{where} is not a readable GGUF file", remedy="download it again")
    version = cursor.number("I")
    if version not in (2, 3):
        kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{where} is not a readable GGUF file: {kind}, and versions 2 and 3, little-endian, are read"
        )
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text()
        if key in fields:
            raise CheckpointError(f'{where}: the field "{key}" is there twice')
        fields[key] = _value(cursor, cursor.number("I"), f'{where}: field "{key}"')
    entries = [_entry(cursor, where) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise CheckpointError(f"{where}: general.alignment is {alignment!r}")
    data_start = -(-cursor.at // alignment) * alignment
    return GgufFile(folder, file, fields, _placed(folder, file, entries, data_start))


def _value(cursor: _Cursor, kind: int, where: str) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        item, length = cursor.number("I"), cursor.number("Q")
        if item == _STRING:
            return [cursor.text() for _ in range(length)]
        if item in _SCALARS:
            code = _SCALARS[item]
            return [value for (value,) in struct.iter_unpack(f"<{code}", cursor.take(length * struct.calcsize(code)))]
        raise CheckpointError(f"{where} is an array of type {item}, which is not read")
    if kind not in _SCALARS:
        raise CheckpointError(f"{where} has type {kind}, which is not of the specification")
    value = cursor.number(_SCALARS[kind])
    # 1e-5 was written as the nearest float32: its shortest decimal is what the maker's config.json says.
    return float(str(np.float32(value))) if kind == _FLOAT32 else value


def _entry(cursor: _Cursor, where: str) -> tuple[str, str, tuple[int, ...], int]:
    name, rank = cursor.text(), cursor.number("I")
    if rank > 4:
        raise CheckpointError(f"{where}: tensor {name} has {rank} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(rank)]))
    kind, offset = cursor.number("I"), cursor.number("Q")
    try:
        dtype = gguf.GGMLQuantizationType(kind).name
    except ValueError:
        dtype = f"number {kind}"
    if dtype not in READ_TYPES:
        raise CheckpointError(
            f"{where}: tensor {name} has type {dtype}, which is not read", remedy=f"use one of {', '.join(READ_TYPES)}"
        )
    return name, dtype, shape, offset


def _placed(
    folder: Folder, file: str, entries: list[tuple[str, str, tuple[int, ...], int]], data_start: int
) -> dict[str, GgufTensor]:
    """Return the tensors by name, their places checked against each other and the file's end."""
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for name, dtype, shape, offset in sorted(entries, key=lambda entry: entry[3]):
        where = f"{folder.where}: {file}: tensor {name}"
        if name in tensors:
            raise CheckpointError(f"{where} is there twice")
        try:
            size = math.prod(_byte_shape(dtype, shape))
        except (ValueError, IndexError):
            raise CheckpointError(f"{where} is {shape}, which blocks of {dtype} do not divide") from None
        if offset < end:
            raise CheckpointError(f"{where} begins inside another tensor")
        end = offset + size
        if data_start + end > folder.sizes[file]:
            raise folder.truncated(file)
        tensors[name] = GgufTensor(data_start + offset, dtype, shape)
    return tensors


def _byte_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    kind = gguf.GGMLQuantizationType[dtype]
    made: Callable[..., tuple[int, ...]] = gguf.quants.quant_shape_to_byte_shape
    return tuple(int(length) for length in made(shape, kind))
