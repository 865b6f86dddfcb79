"""From the names in safetensors files to the model's own (k2model/parameters.py), and fused experts to single ones."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from k2model.formats.folder import Folder
from k2model.formats.mxfp4 import BLOCK, expand_mxfp4
from k2model.formats.shards import Stored
from k2model.formats.weights import DTYPES, TensorInfo
from schemas.errors import CheckpointError

_SKIPPED = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|visual|mm_projector|multi_modal_projector)\."
    r"|.*\.rotary_emb\.inv_freq$"
)
"""What sees images, and constants that older files store."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")


@dataclass(frozen=True, slots=True)
class Readable:
    """A tensor under the model's name."""

    info: TensorInfo
    read: Callable[[], Tensor]


def canonical(name: str, num_hidden_layers: int) -> str | None:
    """Return the model's name of a file's tensor `name`; None for what the language model has no use for.

    Left out: vision towers and projectors, rope constants, and layers past `num_hidden_layers`, which predict further
    tokens (DeepSeek-V3's layer 61).
    """
    if _SKIPPED.match(name):
        return None
    inner = re.sub(r"^(?:model\.)?language_model\.", "", name)
    if inner != name and not inner.startswith(("model.", "lm_head.")):
        inner = f"model.{inner}"
    layer = _LAYER.match(inner)
    if layer and int(layer[1]) >= num_hidden_layers:
        return None
    inner = inner.replace(".mlp.router.", ".mlp.gate.")
    if ".block_sparse_moe." in inner:
        inner = inner.replace(".block_sparse_moe.", ".mlp.")
        inner = re.sub(r"(\.experts\.\d+\.)(w[123])\.", lambda found: f"{found[1]}{_MIXTRAL[found[2]]}.", inner)
    return inner


def readables(folder: Folder, stored: Mapping[str, Stored], family: str, num_hidden_layers: int) -> dict[str, Readable]:
    """Return the tensors of safetensors headers under the model's names, each with how to read it."""
    inner: dict[str, Stored] = {}
    for name, tensor in stored.items():
        made = canonical(name, num_hidden_layers)
        if made is not None and made in inner:
            raise CheckpointError(f"{folder.where}: two tensors are both {made}; one of them is {name}")
        if made is not None:
            inner[made] = tensor
    result: dict[str, Readable] = {}
    for name, tensor in inner.items():
        fused = _FUSED.fullmatch(name)
        if fused is None:
            result[name] = Readable(TensorInfo(tensor.dtype, tensor.shape), partial(read, folder, tensor))
        elif fused[3] != "_scales":
            scales = inner.get(f"{fused[1]}.{fused[2]}_scales") if fused[3] == "_blocks" else None
            result |= _experts(folder, fused, tensor, scales, family)
    return result


def read(folder: Folder, tensor: Stored, index: int | None = None) -> Tensor:
    """Return a tensor, or item `index` along its first dimension, without reading the others."""
    dtype = DTYPES[tensor.dtype]
    if index is None:
        return folder.tensor(tensor.file, tensor.start, dtype, tensor.shape)
    stride = dtype.itemsize
    for length in tensor.shape[1:]:
        stride *= length
    return folder.tensor(tensor.file, tensor.start + index * stride, dtype, tensor.shape[1:])


def _experts(
    folder: Folder, fused: re.Match[str], tensor: Stored, scales: Stored | None, family: str
) -> Iterator[tuple[str, Readable]]:
    """Yield each expert's part of a tensor [E, ...] that holds all experts of a layer.

    gpt-oss: `gate_up_proj` [E, D, 2 F] with gate and up in turn, `down_proj` [E, F, D], their biases [E, ...]; as MXFP4
    `_blocks` [E, N, K / 32, 16] and `_scales` [E, N, K / 32]. Others, as transformers 5 holds them in memory:
    `gate_up_proj` [E, 2 F, D] with all of gate first, `down_proj` [E, D, F].
    """
    experts, kind, suffix = fused[1], fused[2], fused[3]
    rank = {None: 3, "_bias": 2, "_blocks": 4}[suffix]
    bad = len(tensor.shape) != rank or (suffix is not None and family != "gpt_oss")
    if suffix == "_blocks":
        bad = bad or scales is None or scales.shape != tensor.shape[:3] or tensor.shape[3] * 2 != BLOCK
        bad = bad or {tensor.dtype, scales.dtype if scales else ""} != {"U8"}
    if bad:
        raise CheckpointError(f"{folder.where}: tensor {fused[0]} is {tensor.dtype} {tensor.shape}, which is not read")
    for part in ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",):
        rows = _rows(part, family, _width(tensor, suffix, family))
        width = len(range(*rows.indices(_width(tensor, suffix, family))))
        for expert in range(tensor.shape[0]):
            linear = f"{experts}.{expert}.{part}"
            if suffix == "_bias":
                info = TensorInfo(tensor.dtype, (width,))
                yield f"{linear}.bias", Readable(info, partial(_read_bias, folder, tensor, expert, rows))
            elif scales is not None:
                info = TensorInfo("MXFP4", (width, tensor.shape[2] * BLOCK))
                yield f"{linear}.weight", Readable(info, partial(_read_mxfp4, folder, tensor, scales, expert, rows))
            else:
                in_out = family == "gpt_oss"
                info = TensorInfo(tensor.dtype, (width, tensor.shape[1 if in_out else 2]))
                read_one = partial(_read_weight, folder, tensor, expert, rows, in_out)
                yield f"{linear}.weight", Readable(info, read_one)


def _width(tensor: Stored, suffix: str | None, family: str) -> int:
    """Return the output features of a fused tensor."""
    return tensor.shape[2 if suffix is None and family == "gpt_oss" else 1]


def _rows(part: str, family: str, width: int) -> slice:
    """Return which output features of `gate_up_proj` are gate's or up's; all of `down_proj`."""
    if part == "down_proj":
        return slice(None)
    if family == "gpt_oss":
        return slice(0 if part == "gate_proj" else 1, None, 2)
    return slice(None, width // 2) if part == "gate_proj" else slice(width // 2, None)


def _read_bias(folder: Folder, tensor: Stored, expert: int, rows: slice) -> Tensor:
    return read(folder, tensor, expert)[rows].contiguous()


def _read_weight(folder: Folder, tensor: Stored, expert: int, rows: slice, in_out: bool) -> Tensor:
    weight = read(folder, tensor, expert)
    return (weight.T if in_out else weight)[rows].contiguous()


def _read_mxfp4(folder: Folder, blocks: Stored, scales: Stored, expert: int, rows: slice) -> Tensor:
    return expand_mxfp4(read(folder, blocks, expert)[rows], read(folder, scales, expert)[rows])
