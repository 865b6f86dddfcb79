"""Safetensors: a header is believed only if every number in it holds."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.folder import local_folder
from k2model.formats.names import read
from k2model.formats.shards import INDEX, read_headers
from schemas.errors import CheckpointError
from tests.checkpoints import write_checkpoint


def entry(dtype: str, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write(folder: Path, header: object, data: bytes = b"", file: str = "model.safetensors") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def headers(folder: Path) -> Any:
    return read_headers(local_folder(folder, "here"))


def test_every_dtype_is_read_as_the_formats_own_library_reads_it(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8)
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 3), "bool": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = local_folder(tmp_path, "here")
    stored = read_headers(folder)
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        found = read(folder, stored[name])
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))
    assert read(folder, stored["t1"], 1).equal(tensors["t1"][1])


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "the header is not JSON"),
        (b"[]", b"", "holds a JSON list, expected an object"),
        (b'{"a": 1, "a": 2}', b"", "the key 'a' has two values"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "the header is not JSON"),
        ({"a": 3}, b"", "the header's entry of tensor a is malformed"),
        ({"a": entry("F32", [1], 0, 4)}, b"1234567", "has 3 bytes that belong to no tensor"),
        ({"a": entry("F32", [2], 0, 8)}, b"1234", "model.safetensors is shorter than it says"),
        ({"a": entry("F32", [2], 0, 4)}, b"1234", "tensor a is F32 .2., which 4 bytes cannot be"),
        ({"a": entry("F32", [1], 4, 8)}, b"12345678", "tensor a begins at byte 4 of the data, expected 0"),
        ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 2, 6)}, b"123456", "tensor b begins at byte 2"),
        ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [1], 5, 6)}, b"123456", "tensor b begins at byte 5"),
        ({"a": entry("F4", [8], 0, 4)}, b"1234", "tensor a has dtype F4, which is not read"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", "entry of tensor a is malformed"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"1234", "entry of tensor a is malformed"),
        ({"a": entry("F32", [True], 0, 4)}, b"1234", "entry of tensor a is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, NaN]}}', b"1234", "entry of tensor a is malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234", "entry of tensor a is malformed"),
        ({"a": entry("F32", [1], 4, 0)}, b"1234", "which -4 bytes cannot be"),
        ({"a": entry("F32", [2**62, 2**62], 0, 4)}, b"1234", "which 4 bytes cannot be"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        headers(write(tmp_path, header, data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is shorter than it says"),
        (b"1234567", "is shorter than it says"),
        (struct.pack("<Q", 100) + b"{}", "is shorter than it says"),
        (b"<!DOCTYPE html><html>", "is not safetensors: its header would have"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        headers(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is shorter than it says"):
        open_checkpoint(str(folder)).weights()


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    opened = open_checkpoint(str(folder)).weights()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is shorter than it says"):
        [opened.read(name) for name in opened.infos]


def sharded(folder: Path, weight_map: object) -> Path:
    write(folder, {"a": entry("I8", [1], 0, 1)}, b"1", "first.safetensors")
    write(folder, {"b": entry("I8", [1], 0, 1)}, b"2", "second.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    found = headers(sharded(tmp_path, {"a": "first.safetensors", "b": "second.safetensors"}))
    assert {name: stored.file for name, stored in found.items()} == {
        "a": "first.safetensors",
        "b": "second.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "second.safetensors", "b": "second.safetensors"}, "tensor a is not in second.safetensors"),
        ({"a": "second.safetensors", "b": "first.safetensors"}, "is in first.safetensors, and .* places it in second"),
        ({"a": "first.safetensors", "c": "second.safetensors"}, "tensor c is not in second.safetensors"),
        ({"a": "third.safetensors"}, "third.safetensors is missing, and .*index.json names it"),
        ({"a": "../../etc/passwd"}, "outside the checkpoint"),
        ({"a": "/etc/passwd"}, "outside the checkpoint"),
        ({"a": ".."}, "outside the checkpoint"),
        ({"a": 3}, "has no weight_map"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, weight_map: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        headers(sharded(tmp_path, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "first.safetensors", "b": "second.safetensors"})
    write(folder, {"a": entry("I8", [1], 0, 1)}, b"1", "second.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in first\.safetensors and again in second\.safetensors"):
        headers(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model-00001-of-00002.safetensors", "neither model.safetensors nor model.safetensors.index.json is there"),
        ("tf_model.h5", "its weights are tf_model.h5"),
        ("README.md", "holds no weights"),
    ],
)
def test_a_folder_without_its_weights_says_what_is_there(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        headers(tmp_path)
