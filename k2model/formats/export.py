"""Writes safetensors a tensor at a time: the header first, from shapes known beforehand, then the bytes as they come.

A shard appears under its name when it is whole, so what is there can be trusted by whoever goes on after a crash.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from k2model.formats.shards import INDEX
from k2model.formats.weights import DTYPES, TensorInfo

_HUB_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class ShardWriter:
    """A safetensors file under way: a context that publishes the file when it is left without an error."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self._waiting = list(infos)
        self._infos = infos
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in infos.items():
            start, end = end, end + _nbytes(info)
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = self._part.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append `tensor`, which must be the next of `infos`, in its dtype and shape."""
        info = self._infos[name]
        if self._waiting.pop(0) != name or tensor.dtype != DTYPES[info.dtype] or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} is not what the header of {self._path} says")
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if kind is not None or self._waiting:
                return
            file.flush()
            os.fsync(file.fileno())
        self._part.replace(self._path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as one safetensors file, which appears when it is whole."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    infos = {name: TensorInfo(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(path, infos) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor.detach().cpu())


def write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Write the index of `shards`, file name to the tensors in it, beside them."""
    total = sum(_nbytes(info) for infos in shards.values() for info in infos.values())
    weight_map = {name: shard for shard, infos in shards.items() for name in infos}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def hub_name(name: str, family: str) -> str:
    """Return the name that other engines expect of the model's tensor `name`; the inverse of names.canonical.

    gpt-oss keeps our names, one linear per expert: no other engine reads it quantized to INT8.
    """
    if family == "mixtral" and ".mlp." in name:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        return re.sub(r"\.(gate_proj|up_proj|down_proj)\.", lambda found: f".{_HUB_MIXTRAL[found[1]]}.", name)
    return name


def _nbytes(info: TensorInfo) -> int:
    size = DTYPES[info.dtype].itemsize
    for length in info.shape:
        size *= length
    return size
