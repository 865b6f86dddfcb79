"""From any checkpoint to the INT8 one the CPU runs: made once, kept by content, then opened like any other."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from k2model.compress.calibrate import calibration_ids, channel_strength
from k2model.compress.quantize import quantize, smooth
from k2model.decoder.model import Decoder
from k2model.formats import compressed_tensors
from k2model.formats.checkpoint import Checkpoint, cache_folder, fingerprint, open_checkpoint, publish
from k2model.tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def prepare_int8(name: str) -> Checkpoint:
    """Return the W8A8 checkpoint of `name`: itself if it is one, else its conversion, made on first use.

    The conversion is a compressed-tensors folder under the cache, named by the fingerprint of its source, so that two
    processes that convert at once make the same folder and one of them wins.

    Raises: CheckpointError.
    """
    source = open_checkpoint(name)
    if compressed_tensors.is_w8a8(source.config_json(), name):
        return source
    target = cache_folder() / "int8" / fingerprint(name, "cpu")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            write_int8(source, folder)
            publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return Checkpoint(name, target)


def write_int8(source: Checkpoint, folder: Path) -> None:
    """Write the balanced W8A8 conversion of `source` into the empty `folder`, as compressed-tensors."""
    from safetensors.torch import save_file

    copy_tokenizer(source, folder)
    tokenizer = Tokenizer.open(folder)
    tensors = balanced(source, tokenizer)
    stored = {name: _stored(name, tensor) for name, tensor in quantize(tensors).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**source.config_json(), "torch_dtype": "bfloat16"}
    config["quantization_config"] = compressed_tensors.quantization_config()
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def balanced(source: Checkpoint, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the float32 weights of `source` with outliers balanced over the calibration texts."""
    tensors = {key: tensor.float() for key, tensor in source.tensors().items()}
    config = source.config()
    decoder = Decoder.from_tensors(config, tensors, where=source.name, dtype=torch.float32, kv_dtype=torch.float32)
    smooth(tensors, channel_strength(decoder, calibration_ids(tokenizer)), config)
    return tensors


def copy_tokenizer(source: Checkpoint, folder: Path) -> None:
    """Write the tokenizer files of `source` into `folder`."""
    if source.is_gguf:
        from k2model.formats import gguf

        tokenizer, settings = gguf.read_tokenizer(source.path)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(source.config_json()), encoding="utf-8")
        return
    for name in _TOKENIZER_FILES:
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, folder / name)


def _stored(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor as it is kept: scales and norms in float32, the embedding in bfloat16, int8 as it is."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return tensor.to(torch.bfloat16).contiguous()
    return tensor.contiguous()
