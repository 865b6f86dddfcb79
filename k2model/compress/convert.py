"""Any checkpoint to the INT8 one that k2batch runs, a tensor at a time: larger than memory, and resumable.

One shard a layer. A layer is calibrated (its dense part in memory, and one expert), then each tensor is read, balanced,
quantized and written. The hidden states of the calibration prompts are kept beside the shards, so that a conversion
that was killed goes on at the layer it was in and makes the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from k2model.compress.calibrate import Calibration, calibration_ids, start_calibration
from k2model.compress.quantize import quantize_weight
from k2model.compress.smooth import ALPHA, Balance, balance
from k2model.config import ModelConfig, text_config
from k2model.formats.checkpoint import Checkpoint
from k2model.formats.compressed_tensors import quantization_config
from k2model.formats.export import ShardWriter, hub_name, write_index
from k2model.formats.weights import TensorInfo, Weights
from k2model.parameters import Parameter, layer_parameters, parameters
from k2model.tokenizer import Tokenizer

Int4 = Literal["keep", "int8"]
"""What becomes of INT4 weights: kept as they are, which loses nothing and takes half the memory, or made INT8."""

Embedding = Literal["bf16", "int8"]
"""How the input embedding is stored. INT8 rows with a scale each are half as large, and expanded when it is opened:
by k2batch, not by transformers 5.24, and by vLLM 0.32 in another layout and without a tied head alone."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One conversion: what is read, where it goes, and how."""

    source: Checkpoint
    config: ModelConfig
    weights: Weights
    folder: Path
    int4: Int4
    embedding: Embedding
    alpha: float
    """Of the balance; 0 leaves weights as they are, and needs no calibration."""

    def kept(self, parameter_names: list[str]) -> set[str]:
        """Return the linears among tensors `parameter_names` that stay as they are stored."""
        linears = [name.removesuffix(".weight") for name in parameter_names]
        storages = {linear: self.weights.storage(linear) for linear in linears}
        return {linear for linear, s in storages.items() if s == "int8" or (s == "int4" and self.int4 == "keep")}


def convert(
    source: Checkpoint,
    folder: Path,
    tokenizer: Tokenizer | None,
    *,
    int4: Int4 = "keep",
    embedding: Embedding = "bf16",
    alpha: float = ALPHA,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the W8A8 conversion of `source` into `folder`, going on with what is there already.

    Args:
        source: any checkpoint that opens.
        folder: exists; empty, or left by an interrupted conversion of the same source with the same settings.
        tokenizer: of the source; without one nothing is calibrated and outliers stay unbalanced.
        int4: what becomes of INT4 weights.
        embedding: how the input embedding is stored.
        alpha: share of the difficulty of outliers moved to the weights.
        say: told of each layer done.

    Raises: CheckpointError.
    """
    config, weights = source.config(), source.weights()
    weights.check(parameters(config), tied=config.tie_word_embeddings)
    conversion = Conversion(source, config, weights, folder, int4, embedding, alpha if tokenizer else 0.0)
    shards = {shard: _infos(conversion, members) for shard, members in _shards(config, weights)}
    calibration: Calibration | None = None
    for number, (shard, members) in enumerate(_shards(config, weights)):
        if (folder / shard).exists():
            continue
        made = Balance()
        if members[0].name.startswith("model.layers.") and tokenizer is not None and conversion.alpha:
            index = number - 1
            calibration = calibration or _resumed(conversion, index, tokenizer)
            made = _balance(conversion, index, calibration)
            _keep_hidden(folder, index + 1, calibration.hidden)
        _write_shard(conversion, folder / shard, shards[shard], members, made)
        say(f"{shard}: {len(members):,} tensors")
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(_config_json(conversion), indent=1), encoding="utf-8")
    for hidden in folder.glob("hidden-*"):
        hidden.unlink()


def _shards(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, list[Parameter]]]:
    """Yield the files of the conversion and the parameters in each: the embedding, each layer, the end."""
    total = config.num_hidden_layers + 2
    groups = [layer_parameters(config, index) for index in range(config.num_hidden_layers)]
    outside = [p for p in parameters(config) if not p.name.startswith("model.layers.")]
    end = [p for p in outside[1:] if p.role != "head" or not weights.is_tied]
    for number, members in enumerate([outside[:1], *(list(group) for group in groups), end], 1):
        yield f"model-{number:05d}-of-{total:05d}.safetensors", members


def _infos(conversion: Conversion, members: list[Parameter]) -> dict[str, TensorInfo]:
    """Return the tensors that `members` become, in the order they are written."""
    infos: dict[str, TensorInfo] = {}
    kept = conversion.kept([p.name for p in members if p.is_linear])
    for parameter in members:
        name, linear = parameter.name, parameter.name.removesuffix(".weight")
        is_int8_embedding = parameter.role == "embedding" and conversion.embedding == "int8"
        if not parameter.is_linear and not is_int8_embedding:
            dtype = "BF16" if parameter.role in ("embedding", "head") else "F32"
            infos[name] = TensorInfo(dtype, parameter.shape)
            continue
        n, k = parameter.shape
        if linear in kept and conversion.weights.storage(linear) == "int4":
            infos[f"{linear}.weight_packed"] = TensorInfo("I32", (n, k // 8))
            infos[f"{linear}.weight_scale"] = conversion.weights.infos[f"{linear}.weight_scale"]
            infos[f"{linear}.weight_shape"] = TensorInfo("I64", (2,))
        else:
            infos[name] = TensorInfo("I8", (n, k))
            infos[f"{linear}.weight_scale"] = TensorInfo("F32", (n, 1))
    return {hub_name(name, conversion.config.family): info for name, info in infos.items()}


def _write_shard(
    conversion: Conversion, path: Path, infos: dict[str, TensorInfo], members: list[Parameter], made: Balance
) -> None:
    kept = conversion.kept([p.name for p in members if p.is_linear])
    with ShardWriter(path, infos) as shard:
        for parameter in members:
            for name, tensor in _converted(conversion, parameter, made, kept):
                shard.write(hub_name(name, conversion.config.family), tensor)


@torch.inference_mode()
def _converted(
    conversion: Conversion, parameter: Parameter, made: Balance, kept: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that one parameter becomes."""
    weights, name, shape = conversion.weights, parameter.name, parameter.shape
    linear = name.removesuffix(".weight")
    if parameter.role == "embedding" and conversion.embedding == "int8":
        rows, scale = quantize_weight(weights.embedding(*shape))
        yield name, rows
        yield f"{linear}.weight_scale", scale
    elif parameter.role == "embedding":
        yield name, weights.embedding(*shape).to(torch.bfloat16)
    elif parameter.role == "head":
        yield name, weights.float_weight(linear, *shape).to(torch.bfloat16)
    elif parameter.role == "router":
        yield name, made.weight(linear, weights.plain(name, shape).float())
    elif not parameter.is_linear:
        yield name, made.vector(name, weights.plain(name, shape).float())
    elif linear in kept and weights.storage(linear) == "int4":
        yield f"{linear}.weight_packed", weights.int4_weight(linear, *shape)[0]
        yield f"{linear}.weight_scale", weights.read(f"{linear}.weight_scale")
        yield f"{linear}.weight_shape", torch.tensor(shape)
    elif linear in kept:
        weight, scale = weights.int8_weight(linear, *shape)
        yield name, weight
        yield f"{linear}.weight_scale", scale[:, None]
    else:
        weight, scale = quantize_weight(made.weight(linear, weights.float_weight(linear, *shape).float()))
        yield name, weight
        yield f"{linear}.weight_scale", scale


def _balance(conversion: Conversion, index: int, calibration: Calibration) -> Balance:
    members = [p for p in layer_parameters(conversion.config, index) if p.is_linear]
    kept = conversion.kept([p.name for p in members])
    strengths = calibration.run(index)
    reaches = {}
    for parameter in members:
        linear = parameter.name.removesuffix(".weight")
        if linear not in kept:
            weight = conversion.weights.float_weight(linear, *parameter.shape)
            reaches[linear] = weight.abs().amax(dim=0).float()
    return balance(conversion.config, index, strengths, reaches, kept, conversion.alpha)


def _resumed(conversion: Conversion, index: int, tokenizer: Tokenizer) -> Calibration:
    """Return the calibration as it was before layer `index`."""
    start = start_calibration(conversion.config, conversion.weights, calibration_ids(tokenizer))
    path = conversion.folder / _hidden_name(index)
    if path.exists():
        start.hidden = load_file(path)["hidden"]
        return start
    for done in range(index):
        start.run(done)
    return start


def _keep_hidden(folder: Path, index: int, hidden: Tensor) -> None:
    """Keep what enters layer `index`, and what entered the one before until its shard is there."""
    with ShardWriter(folder / _hidden_name(index), {"hidden": TensorInfo("F32", tuple(hidden.shape))}) as shard:
        shard.write("hidden", hidden)
    (folder / _hidden_name(index - 2)).unlink(missing_ok=True)


def _hidden_name(index: int) -> str:
    return f"hidden-{index:05d}"


def hub_config(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's own `config_json`, without quantization or dtype: it needs nobody's Python code."""
    left_out = ("quantization_config", "compression_config", "auto_map", "dtype")
    config = {k: v for k, v in text_config(config_json).items() if k not in left_out}
    if config["model_type"] == "kimi_k2":  # the same computation, under the name that needs no code of its own
        config["model_type"] = "deepseek_v3"
    # GGUF names no class, and vLLM's guess for Qwen3 is an embedding model; Kimi's own class needs its makers' code.
    config["architectures"] = [_ARCHITECTURES[str(config["model_type"])]]
    return config


def _config_json(conversion: Conversion) -> dict[str, object]:
    """Return config.json of the conversion."""
    config = hub_config(conversion.source.config_json())
    linears = [p for p in parameters(conversion.config) if p.is_linear]
    int4 = [p for p in linears if conversion.int4 == "keep" and _linear_storage(conversion, p) == "int4"]
    group_size = conversion.weights.scheme.int4_group_size
    quantization = quantization_config(
        _targets(int4, linears),
        group_size,
        all_int4=len(int4) == len(linears),
        int8_embedding=conversion.embedding == "int8",
    )
    return {**config, "torch_dtype": "bfloat16", "quantization_config": quantization}


def _linear_storage(conversion: Conversion, parameter: Parameter) -> str:
    return conversion.weights.storage(parameter.name.removesuffix(".weight"))


def _targets(some: list[Parameter], linears: list[Parameter]) -> list[str]:
    """Return patterns that match the linears `some` and no other: a role's where all of it is there, else names."""
    names = {parameter.name for parameter in some}
    targets = []
    for role, pattern in _PATTERNS.items():
        of_role = [p.name for p in linears if p.role == role]
        if of_role and names.issuperset(of_role):
            targets.append(pattern)
        else:
            targets += [name.removesuffix(".weight") for name in of_role if name in names]
    return targets


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""The class that opens each model_type, in transformers and in vLLM."""

_PATTERNS = {
    "attention": "re:.*self_attn\\..*",
    "dense": "re:.*mlp\\.(gate|up|down)_proj$",
    "shared": "re:.*shared_experts\\..*",
    "expert": "re:.*\\.experts\\..*",
}
"""Of every linear of a role, by its module name."""
