"""What config.json says of a quantization: its numbers are read, and what is not computed here is refused by name.

Which tensors are quantized is never taken from here but from what the files hold (k2model/formats/weights.py): ignore
lists are written in several dialects, and K2-Thinking's own only works because of how one library matches it.

Sources: vllm-project/compressed-tensors, quantization/quant_args.py and quant_scheme.py, for the keys and what their
absence means; transformers' FineGrainedFP8Config and Mxfp4Config.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from k2model.formats.weights import Scheme, Storage, TensorInfo
from schemas.errors import CheckpointError

_REMEDY = "use a float checkpoint, or one in block FP8, or in compressed-tensors W8A8 or INT4 by group"

_TENSORS_REFUSED = {
    "input_scale": "static activation scales",
    "output_scale": "static activation scales",
    "weight_zero_point": "asymmetric weights",
    "input_zero_point": "asymmetric activations",
    "zero_point": "asymmetric weights",
    "qzeros": "GPTQ or AWQ weights",
    "qweight": "GPTQ or AWQ weights",
    "g_idx": "columns grouped out of order (act-order)",
    "weight_g_idx": "columns grouped out of order (act-order)",
    "k_scale": "a quantized KV cache",
    "v_scale": "a quantized KV cache",
    "absmax": "bitsandbytes weights",
    "SCB": "bitsandbytes weights",
}
"""Endings of tensors that mark quantizations which are not read."""

_KINDS = {"I8": "int8", "F8_E4M3": "fp8"}
"""Dtypes that only quantized weights have."""

_LAYOUTS = {"int-quantized": ("int8",), "pack-quantized": ("int4",), "mixed-precision": ("int8", "int4")}
"""What each compressed-tensors format may hold here."""


def declared(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json's quantization section, under any of its names, at the top or in `text_config`; {} if none."""
    inner = config_json.get("text_config")
    for raw in (config_json, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(raw.get(key), dict) and raw[key]:
                return dict(raw[key])
    return {}


def read_scheme(config_json: Mapping[str, Any], where: str) -> Scheme:
    """Return the numbers of the quantization that config.json declares. Raises: CheckpointError if it is not read."""
    return _read(declared(config_json), where)[0]


def check_declared(infos: Mapping[str, TensorInfo], config_json: Mapping[str, Any], where: str) -> None:
    """Compare the tensors' kinds with what config.json declares.

    Raises: CheckpointError for tensors of a quantization that is not read, and for quantized ones that config.json does
    not declare. Where it declares nothing at all, INT8 is W8A8: one scale a row leaves no other number open.
    """
    section = declared(config_json)
    kinds = _read(section, where)[1] if section else frozenset({"int8"})
    for name, info in infos.items():
        meaning = _TENSORS_REFUSED.get(name.rpartition(".")[2])
        if meaning:
            raise CheckpointError(f"{where}: tensor {name} means {meaning}, which is not read", remedy=_REMEDY)
        kind = "int4" if name.endswith(".weight_packed") else _KINDS.get(info.dtype)
        if kind is not None and kind not in kinds:
            raise CheckpointError(
                f"{where}: tensor {name} is {kind}, and config.json declares no such quantization",
                remedy="use the config.json that belongs to the weights",
            )


def _read(section: Mapping[str, Any], where: str) -> tuple[Scheme, frozenset[Storage]]:
    method = section.get("quant_method")
    if not section:
        return Scheme(), frozenset()
    if method in ("compressed-tensors", "sparseml") or (method is None and "config_groups" in section):
        return _compressed_tensors(section, where)
    if method == "fp8":
        return _block_fp8(section, where), frozenset({"fp8"})
    if method == "mxfp4":
        return Scheme(), frozenset()
    raise CheckpointError(f'{where}: quantization "{method}" is not read', remedy=_REMEDY)


def _block_fp8(section: Mapping[str, Any], where: str) -> Scheme:
    _only(section, "activation_scheme", ("dynamic", None), f"{where}: FP8 quantization_config")
    _only(section, "fmt", ("e4m3", None), f"{where}: FP8 quantization_config")
    block = section.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            f"{where}: FP8 quantization_config has weight_block_size = {block!r}, expected [rows, columns]",
            remedy=_REMEDY,
        )
    return Scheme(fp8_block=(block[0], block[1]))


def _compressed_tensors(section: Mapping[str, Any], where: str) -> tuple[Scheme, frozenset[Storage]]:
    layout = section.get("format")
    where = f"{where}: compressed-tensors quantization_config"
    if layout in ("dense", "fakequant", None):
        return Scheme(), frozenset()
    if layout not in _LAYOUTS:
        raise CheckpointError(
            f'{where} has format "{layout}", and these are read: {", ".join(_LAYOUTS)}', remedy=_REMEDY
        )
    for key in ("kv_cache_scheme", "transform_config"):
        if section.get(key):
            raise CheckpointError(f"{where} has a {key}, which is not computed here", remedy=_REMEDY)
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where} has a sparsity_config, and sparse files are not read", remedy=_REMEDY)
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where} has no config_groups", remedy=_REMEDY)
    kinds: set[Storage] = set()
    group_sizes = set()
    for name, group in groups.items():
        kind, group_size = _group(group, f"{where}.config_groups.{name}")
        if kind not in _LAYOUTS[layout] or (group.get("format") or layout) not in _LAYOUTS:
            raise CheckpointError(f'{where}: {name} is {kind}, which format "{layout}" does not hold', remedy=_REMEDY)
        kinds.add(kind)
        group_sizes |= {group_size} if group_size else set()
    if len(group_sizes) > 1:
        raise CheckpointError(f"{where} has INT4 groups of several sizes: {sorted(group_sizes)}", remedy=_REMEDY)
    return Scheme(int4_group_size=group_sizes.pop()) if group_sizes else Scheme(), frozenset(kinds)


def _group(group: Mapping[str, Any], where: str) -> tuple[Storage, int | None]:
    """Return how a config group stores weights, and its group size if by group; absent keys mean the library's own."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where} quantizes no weights, which is not computed here", remedy=_REMEDY)
    _integers(weights, f"{where}.weights")
    _only(weights, "dynamic", (False, None), f"{where}.weights")
    _only(weights, "actorder", (None, False, "weight", "static"), f"{where}.weights")
    if group.get("output_activations"):
        raise CheckpointError(f"{where} quantizes output activations, which is not computed here", remedy=_REMEDY)
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    by_default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or by_default
    if (bits, strategy) not in ((8, "channel"), (4, "group")):
        raise CheckpointError(
            f'{where}.weights has {bits} bits by "{strategy}", and 8 by channel or 4 by group are read', remedy=_REMEDY
        )
    is_looked_up = group.get("targets") == ["Embedding"]  # rows that nothing is multiplied with
    if activations is not None or (bits == 8 and not is_looked_up):
        _activations(activations, f"{where}.input_activations")
    if bits == 8:
        return "int8", None
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{where}.weights has group_size = {size!r}, expected a whole number above 0")
    return "int4", size


def _activations(activations: Any, where: str) -> None:
    if not isinstance(activations, dict):
        raise CheckpointError(f"{where} is {activations!r}: 8-bit weights are read with 8-bit activations only")
    _integers(activations, where)
    _only(activations, "num_bits", (8, None), where)
    _only(activations, "dynamic", (True,), where)
    _only(activations, "strategy", ("token", None), where)


def _integers(scheme: Mapping[str, Any], where: str) -> None:
    _only(scheme, "type", ("int", None), where)
    _only(scheme, "symmetric", (True, None), where)


def _only(section: Mapping[str, Any], key: str, allowed: Iterable[object], where: str) -> None:
    value = section.get(key)
    if value not in list(allowed):
        raise CheckpointError(f"{where} has {key} = {value!r}, which is not computed here", remedy=_REMEDY)
