"""A checkpoint's weights by the model's own names, whatever each is stored as, read when asked for.

How a linear `name` [N, K] is stored is decided by what the file holds:

    float    name.weight in F32, BF16, F16, or a GGUF or MXFP4 type that is expanded on reading
    int8     name.weight I8 with name.weight_scale [N, 1]: W8A8
    int4     name.weight_packed I32 [N, K / 8] with name.weight_scale [N, K / group]
    fp8      name.weight F8_E4M3 with name.weight_scale_inv, one scale a block
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from k2model.formats.compressed_tensors import unpack_int4
from k2model.formats.fp8 import expand_fp8
from k2model.parameters import Parameter
from schemas.errors import CheckpointError

Storage = Literal["float", "int8", "int4", "fp8"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of torch by the names safetensors has for them."""

_NOT_FLOAT = ("I8", "I16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
"""Dtypes that are no numbers of the model by themselves; GGUF types, such as IQ4_NL, are."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    dtype: str
    """As safetensors spells it (F32, BF16, I8, F8_E4M3, ...), or a GGUF type, or MXFP4."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """The numbers of a quantization that a tensor alone does not tell."""

    fp8_block: tuple[int, int] = (128, 128)
    """Rows and columns that share a scale; blocks at the edges are smaller."""
    int4_group_size: int = 32
    """Columns that share a scale."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name, and how to read one."""

    where: str
    """The checkpoint, for messages."""
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    """Returns the tensor of a name in `infos`; types that torch has not, as float32."""
    scheme: Scheme = Scheme()

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint holds tensor `name`."""
        return name in self.infos

    @property
    def is_tied(self) -> bool:
        """Whether the output embedding is the input's: it is not stored, whatever config.json says of it."""
        return not any(name.startswith("lm_head.") for name in self.infos)

    def plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return tensor `name` as it is stored. Raises: CheckpointError if it is missing or has another shape."""
        info = self.infos.get(name)
        if info is None:
            raise CheckpointError(f"{self.where}: tensor {name} is missing", remedy="the download may be incomplete")
        if info.shape != shape:
            raise CheckpointError(f"{self.where}: tensor {name} is {info.shape}, expected {shape} by config.json")
        return self.read(name)

    def embedding(self, vocab_size: int, hidden_size: int) -> Tensor:
        """Return the input embedding [V, D] as stored if float, else expanded to bfloat16, in which it is computed."""
        table = self.float_weight("model.embed_tokens", vocab_size, hidden_size)
        return table if self.storage("model.embed_tokens") == "float" else table.to(torch.bfloat16)

    def expanded(self, parameter: Parameter) -> Tensor:
        """Return `parameter` in float32, whatever it is stored as. Raises: CheckpointError."""
        name, shape = parameter.name, parameter.shape
        if parameter.role == "embedding":
            return self.embedding(*shape).float()
        if parameter.is_linear or parameter.role == "head":
            return self.float_weight(name.removesuffix(".weight"), *shape).float()
        return self.plain(name, shape).float()

    def vector(self, name: str, size: int) -> Tensor:
        """Return a norm's weight or a bias as float32 [size]."""
        return self.plain(name, (size,)).float()

    def storage(self, linear: str) -> Storage:
        """Return how the linear `linear` is stored. Raises: CheckpointError if it is missing, or of another dtype."""
        if f"{linear}.weight_packed" in self.infos:
            return "int4"
        info = self.infos.get(f"{linear}.weight")
        if info is None:
            raise CheckpointError(
                f"{self.where}: tensor {linear}.weight is missing", remedy="the download may be incomplete"
            )
        if info.dtype in ("I8", "F8_E4M3"):
            return "int8" if info.dtype == "I8" else "fp8"
        if info.dtype in _NOT_FLOAT:
            raise CheckpointError(f"{self.where}: tensor {linear}.weight has dtype {info.dtype}, which is not read")
        return "float"

    def float_weight(self, linear: str, n: int, k: int) -> Tensor:
        """Return the weight [N, K]: as stored if float, else expanded to float32, its scales multiplied exactly."""
        storage = self.storage(linear)
        if storage == "int8":
            weight, scale = self.int8_weight(linear, n, k)
            return weight.float() * scale[:, None]
        if storage == "int4":
            packed, scale = self.int4_weight(linear, n, k)
            return unpack_int4(packed).float() * scale.repeat_interleave(k // scale.shape[1], dim=1)
        weight = self.plain(f"{linear}.weight", (n, k))
        if storage == "fp8":
            rows, columns = self.scheme.fp8_block
            scale = self.plain(f"{linear}.weight_scale_inv", (-(-n // rows), -(-k // columns)))
            return expand_fp8(weight, scale, self.scheme.fp8_block)
        return weight

    def int8_weight(self, linear: str, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Return the weight [N, K] int8 and its scales [N] float32, of a linear stored as int8."""
        scale = self.plain(f"{linear}.weight_scale", (n, 1))
        return self.plain(f"{linear}.weight", (n, k)), scale.float().squeeze(1)

    def int4_weight(self, linear: str, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Return the packed weight [N, K / 8] int32 and its scales [N, K / group] float32, of one stored as int4."""
        group = self.scheme.int4_group_size
        if k % group or k % 8:
            raise CheckpointError(f"{self.where}: {linear} has {k} columns, which groups of {group} do not divide")
        if f"{linear}.weight_shape" in self.infos:
            stated = tuple(self.plain(f"{linear}.weight_shape", (2,)).tolist())
            if stated != (n, k):
                raise CheckpointError(f"{self.where}: {linear}.weight_shape says {stated}, expected {(n, k)}")
        scale = self.plain(f"{linear}.weight_scale", (n, k // group))
        return self.plain(f"{linear}.weight_packed", (n, k // 8)), scale.float()

    def check(self, parameters: Iterable[Parameter], *, tied: bool) -> None:
        """Compare the header with what the model needs, before any weight is read.

        Args:
            parameters: of the model.
            tied: whether `lm_head.weight` may be absent.

        Raises: CheckpointError naming tensors that are missing, misshapen, of a dtype that is not read, or too many.
        """
        wrong: list[str] = []
        expected: set[str] = set()
        for parameter in parameters:
            shapes = self._stored_shapes(parameter)
            expected.update(shapes)
            if parameter.role == "head" and tied and self.is_tied:
                continue
            for name, shape in shapes.items():
                info = self.infos.get(name)
                if info is None:
                    if not name.endswith(".weight_shape"):
                        wrong.append(f"{name} is missing")
                elif info.shape != shape:
                    wrong.append(f"{name} is {info.shape}, expected {shape}")
                elif right := self._right_dtype(parameter, name):
                    wrong.append(f"{name} has dtype {info.dtype}, expected {right}")
        wrong += [f"{name} is not part of the model" for name in self.infos if name not in expected]
        if wrong:
            listed = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise CheckpointError(
                f"{self.where}: the weights are not those of config.json: {listed}",
                remedy="download the checkpoint again, or use the config.json that belongs to it",
            )

    def _right_dtype(self, parameter: Parameter, name: str) -> str:
        """Return what dtype tensor `name`, a part of `parameter`, has to have; "" if it has it."""
        dtype = self.infos[name].dtype
        if name.endswith(".weight_packed"):
            return "" if dtype == "I32" else "I32"
        if name.endswith(".weight_shape"):
            return "" if dtype in ("I32", "I64") else "I32 or I64"
        if name == parameter.name and len(self._stored_shapes(parameter)) > 1:
            return ""  # I8 or F8_E4M3: what made it more than one tensor
        return "a float" if dtype in _NOT_FLOAT else ""

    def _stored_shapes(self, parameter: Parameter) -> dict[str, tuple[int, ...]]:
        """Return the tensors that hold `parameter`, and their shapes."""
        if not parameter.is_linear and parameter.role not in ("head", "embedding"):
            return {parameter.name: parameter.shape}
        n, k = parameter.shape
        linear = parameter.name.removesuffix(".weight")
        if f"{linear}.weight_packed" in self.infos:
            group = self.scheme.int4_group_size
            scale = {f"{linear}.weight_scale": (n, k // group), f"{linear}.weight_shape": (2,)}
            return {f"{linear}.weight_packed": (n, k // 8), **scale}
        info = self.infos.get(parameter.name)
        if info is not None and info.dtype == "I8":
            return {parameter.name: (n, k), f"{linear}.weight_scale": (n, 1)}
        if info is not None and info.dtype == "F8_E4M3":
            rows, columns = self.scheme.fp8_block
            return {parameter.name: (n, k), f"{linear}.weight_scale_inv": (-(-n // rows), -(-k // columns))}
        return {parameter.name: (n, k)}


def in_memory(tensors: Mapping[str, Tensor], where: str, scheme: Scheme | None = None) -> Weights:
    """Return weights over `tensors` that are in memory already."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    infos = {name: TensorInfo(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Weights(where, infos, tensors.__getitem__, scheme or Scheme())
