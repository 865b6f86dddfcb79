"""What a checkpoint is, what it costs and where it fits, from config.json and headers: no byte of a weight is read.

Behind a URL that means a few range reads of each shard; nothing is downloaded.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.formats.checkpoint import locate, open_weights, wanted_files
from k2model.formats.folder import Folder
from k2model.formats.shards import BYTES
from k2model.parameters import Parameter, active_share, parameters
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    from k2model.formats.weights import Weights

PRECISIONS = {
    "bf16": "all bf16",
    "int8": "linears INT8",
    "int4": "experts INT4, rest bf16",
    "int4_int8": "experts INT4, rest INT8",
    "stored": "as stored",
}
"""What memory is told for. Embedding, output head, router and norms stay bf16; a dense model's every linear counts as
an expert. INT8 has one float32 scale a row, INT4 one bf16 scale for 32 columns."""

MACHINES = {
    "16 GB card": 16.0,
    "24 GB card": 24.0,
    "48 GB card": 48.0,
    "1 x H100 80 GB": 80.0,
    "1 x H200 141 GB": 141.0,
    "1 x MI300X 192 GB": 192.0,
    "2 x H200": 282.0,
    "4 x H200": 564.0,
    "8 x H100": 640.0,
    "8 x H200": 1128.0,
    "8 x MI300X": 1536.0,
}
"""Decimal GB by the makers' names, as of November 2026."""

OVERHEAD, KV_TOKENS = 1.05, 32_768
"""A machine holds a model if its memory is at least the weights, 5 % for buffers, and the KV cache of 32,768 tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A checkpoint, described. Bytes are of one copy of the model."""

    name: str
    family: str
    formats: dict[str, int]
    """Parameters of the model by how they are stored; empty where the weights cannot be seen."""
    total_parameters: int
    active_parameters: int
    """Those one token is multiplied with: without the experts it is not routed to, and without the embedding table."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    n_routed_experts: int
    """0 for a dense model."""
    num_experts_per_tok: int
    max_position_embeddings: int
    tokenizer: str
    """The file or kind it is in; "" for none."""
    download_bytes: int
    """Of every file that would be fetched."""
    memory_bytes: dict[str, int]
    """By precision, the keys of PRECISIONS; `stored` is missing where the weights cannot be seen."""
    kv_bytes_per_token: int
    """In bf16, with every layer keeping every token."""
    flops_per_token: int
    """2 for each active parameter; attention comes on top."""
    attention_flops_per_context_token: int
    """For each earlier token that the new one sees, over all layers."""
    machines: dict[str, list[str]]
    """By precision, who holds it, the smallest first: by the rule of OVERHEAD and KV_TOKENS."""
    problems: list[str]
    """Why it does not open; empty if it does."""


def inspect(name: str) -> Inspection:
    """Return what the checkpoint `name` is: a folder, a GGUF file, or an fsspec URL of either; config.json is enough.

    Raises: CheckpointError if there is none, or its config.json is of no model that is known here.
    """
    folder, gguf_file = locate(name)
    opened = _opened(folder, gguf_file)
    config = ModelConfig.from_dict(opened.config_json, name)
    weights, problems = _weights(opened, config)
    tokenizer = opened.tokenizer
    if not tokenizer:
        problems.append(f"{name}: no tokenizer.json, no tiktoken.model")
    sizes = [parameter for parameter in parameters(config) if parameter.role != "head" or not _is_tied(config, weights)]
    kv = kv_bytes_per_token(config)
    memory = {key: sum(_bytes(p, key, config) for p in sizes) for key in PRECISIONS if key != "stored"}
    if weights is not None:
        memory["stored"] = sum(_tensor_bytes(info.dtype, info.shape) for info in weights.infos.values())
    active = round(sum(p.size * active_share(config, p.role) for p in parameters(config) if p.role != "embedding"))
    return Inspection(
        name=name,
        family=config.family,
        formats=_formats(sizes, weights) if weights else {},
        total_parameters=sum(p.size for p in sizes),
        active_parameters=active,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.attention.num_attention_heads,
        vocab_size=config.vocab_size,
        n_routed_experts=config.moe.n_routed_experts if config.moe else 0,
        num_experts_per_tok=config.moe.num_experts_per_tok if config.moe else 0,
        max_position_embeddings=config.max_position_embeddings,
        tokenizer=tokenizer,
        download_bytes=_download_bytes(folder, gguf_file),
        memory_bytes=memory,
        kv_bytes_per_token=kv,
        flops_per_token=2 * active,
        attention_flops_per_context_token=_attention_flops(config),
        machines={key: holders(size, kv) for key, size in memory.items()},
        problems=problems,
    )


def holders(weight_bytes: int, kv_bytes: int) -> list[str]:
    """Return the machines that hold weights of so many bytes, this one first if it does, then the smallest."""
    needed = weight_bytes * OVERHEAD + kv_bytes * KV_TOKENS
    return [
        name
        for name, size in ({"this machine": memory_of_this_machine() / 1e9} | MACHINES).items()
        if size * 1e9 >= needed
    ]


def memory_of_this_machine() -> int:
    """Return bytes of main memory, or of the container's share of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    stated = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return min(total, int(stated)) if stated.isdigit() else total


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Return what the cache of one token takes in bf16: keys and values, or latent and rope key, of every layer."""
    attention = config.attention
    if isinstance(attention, LatentAttentionConfig):
        values = attention.kv_lora_rank + attention.qk_rope_head_dim
    else:
        values = 2 * attention.num_key_value_heads * attention.head_dim
    return 2 * values * config.num_hidden_layers


def as_text(found: Inspection) -> str:
    """Return the inspection for people: one fact a line."""
    experts = f"{found.n_routed_experts}, {found.num_experts_per_tok} per token" if found.n_routed_experts else "none"
    total, active = (short(n).replace("G", "B") for n in (found.total_parameters, found.active_parameters))
    flops, more = short(found.flops_per_token), short(found.attention_flops_per_context_token)
    lines = [
        ("checkpoint", found.name),
        ("family", found.family),
        ("parameters", f"{total}, {active} active per token"),
        ("layers", f"{found.num_hidden_layers}, {found.hidden_size} wide, {found.num_attention_heads} heads"),
        ("experts", experts),
        ("vocabulary", f"{found.vocab_size:,}; tokenizer: {found.tokenizer or 'none'}"),
        ("context", f"{found.max_position_embeddings:,} tokens"),
        ("formats", ", ".join(f"{kind}: {count:,}" for kind, count in found.formats.items()) or "not seen"),
        ("to fetch", f"{short(found.download_bytes)}B"),
        ("KV cache", f"{short(found.kv_bytes_per_token)}B per token in bf16"),
        ("arithmetic", f"{flops}FLOP per token, and {more}FLOP more for each token it looks back at"),
    ]
    for key, size in found.memory_bytes.items():
        held = ", ".join(found.machines[key][:3]) or "none of the machines known here"
        lines.append((PRECISIONS[key], f"{short(size)}B; fits {held}"))
    lines += [("problem", problem) for problem in found.problems] or [("opens", "yes")]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def short(value: float, digits: int = 4, largest: str = "G") -> str:
    """Return a number to `digits` digits, 3 or 4, with its decimal prefix up to `largest`, such as `1.234 M`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 1000 - 0.5 * 10 ** (3 - digits) or prefix == largest:
            break
        value /= 1000
    return f"{value:,.{digits}g} {prefix}"


@dataclass(frozen=True, slots=True)
class _Opened:
    config_json: Mapping[str, Any]
    tokenizer: str
    weights: "Callable[[], Weights]"


def _opened(folder: Folder, gguf_file: str) -> _Opened:
    """Return what both kinds of checkpoint tell alike; a GGUF header, some megabytes, is read once."""
    if gguf_file:
        from k2model.formats import gguf
        from k2model.formats.gguf_config import config_of
        from k2model.formats.gguf_file import read_gguf

        file = read_gguf(folder, gguf_file)
        kind, pre = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre", "default")
        return _Opened(config_of(file), f"GGUF {kind}, {pre}" if kind else "", partial(gguf.weights, file))
    tokenizer = next((file for file in ("tokenizer.json", "tiktoken.model") if file in folder.sizes), "")
    return _Opened(folder.json("config.json"), tokenizer, partial(open_weights, folder, ""))


def _weights(opened: _Opened, config: ModelConfig) -> "tuple[Weights | None, list[str]]":
    """Return the weights' headers, None if they cannot be read, and what is wrong with them."""
    try:
        weights = opened.weights()
    except CheckpointError as error:
        return None, [error.message]
    try:
        weights.check(parameters(config), tied=config.tie_word_embeddings)
    except CheckpointError as error:
        return weights, [error.message]
    return weights, []


def _is_tied(config: ModelConfig, weights: "Weights | None") -> bool:
    return config.tie_word_embeddings if weights is None else weights.is_tied


def _download_bytes(folder: Folder, gguf_file: str) -> int:
    try:
        return sum(folder.sizes[file] for file in ([gguf_file] if gguf_file else wanted_files(folder)))
    except CheckpointError:
        return 0


def _formats(sizes: list[Parameter], weights: "Weights") -> dict[str, int]:
    counts: Counter[str] = Counter()
    scheme = weights.scheme
    names = {
        "int8": "INT8",
        "int4": f"INT4 g{scheme.int4_group_size}",
        "fp8": f"FP8 {scheme.fp8_block[0]}x{scheme.fp8_block[1]}",
    }
    for parameter in sizes:
        linear = parameter.name.removesuffix(".weight")
        info = weights.infos.get(parameter.name)
        if f"{linear}.weight_packed" in weights:
            counts[names["int4"]] += 1
        elif info is not None:
            counts[{"I8": names["int8"], "F8_E4M3": names["fp8"]}.get(info.dtype, info.dtype)] += 1
    return dict(counts.most_common())


def _tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    values, size = 1, BYTES.get(dtype)
    for length in shape:
        values *= length
    if size is not None:
        return values * size
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    return values // block * block_bytes


def _bytes(parameter: Parameter, precision: str, config: ModelConfig) -> int:
    """Return the bytes of a parameter in a precision, its scales included."""
    if precision == "bf16" or not parameter.is_linear:
        return 2 * parameter.size
    n, k = parameter.shape
    if precision.startswith("int4") and (parameter.role == "expert" or config.moe is None):
        return n * (-(-k // 2) + 2 * -(-k // 32))
    return 2 * parameter.size if precision == "int4" else n * (k + 4)


def _attention_flops(config: ModelConfig) -> int:
    """Return FLOPs for one query against one key and value, all heads and layers; latent attention absorbed."""
    attention = config.attention
    if isinstance(attention, LatentAttentionConfig):
        width = 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    else:
        width = 2 * attention.head_dim
    return 2 * width * attention.num_attention_heads * config.num_hidden_layers
