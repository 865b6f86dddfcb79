"""Measurements of checkpoints: one true-size layer of Kimi-K2 on this machine, and a conversion in little memory."""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.compress.quantize import quantize_weight
from k2model.compress.recipe import copy_tokenizer
from k2model.config import ModelConfig
from k2model.decoder.feed_forward import MixtureOfExperts
from k2model.decoder.linear import LinearReader
from k2model.decoder.model import Layer, page_pool, read_layer
from k2model.decoder.rope import cos_sin, inverse_frequencies
from k2model.decoder.step import Span, Step
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, cache_folder, open_checkpoint
from k2model.formats.compressed_tensors import pack_int4, quantization_config
from k2model.formats.export import ShardWriter
from k2model.formats.weights import TensorInfo
from k2model.parameters import Parameter, parameters
from kernels import cpu, reference, rowwise

KIMI_K2_LAYER = {
    "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 64, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 384,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
    "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "vocab_size": 256,
    "max_position_embeddings": 262144, "tie_word_embeddings": True,
    "rope_scaling": {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
                     "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
"""One layer of Kimi-K2-Thinking, experts and attention at their true size; the vocabulary is left out."""

_SMALL_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 1024,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "rms_norm_eps": 1e-6, "vocab_size": 49152, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
_LAYER_BYTES = 2 * 32 * 3 * 1024 * 1024
"""Of its experts, in bfloat16."""


def layer(config_json: dict[str, Any] | None = None, rounds: int = 3) -> dict[str, Any]:
    """Return the time per token of one INT4 layer loaded from disk, beside what this machine's limits would allow.

    The limit of a step is the larger of its products at the bfloat16 rate and its weights at the read rate, both
    measured here. Weights are random; tokens are routed at random, as if texts were mixed well.
    """
    raw = config_json or KIMI_K2_LAYER
    config = ModelConfig.from_dict(raw, "bench")
    cache_folder().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache_folder()))
    try:
        start = time.perf_counter()
        _write_int4(folder, raw)
        written = time.perf_counter()
        checkpoint = open_checkpoint(str(folder))
        reader = LinearReader(checkpoint.weights(), torch.bfloat16, expand=False)
        read = read_layer(config, 0, reader, reader)
        loaded = time.perf_counter()
        stored = sum(path.stat().st_size for path in folder.iterdir())
    finally:
        shutil.rmtree(folder)
    rates = {"bfloat16_flops": _bfloat16_flops(), "read_bytes_per_s": _read_rate()}
    return {
        "checkpoint_bytes": stored,
        "write_s": round(written - start, 1),
        "load_s": round(loaded - written, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        **{key: round(rate) for key, rate in rates.items()},
        "rows": [_time_step(config, read, tokens, rounds, rates) for tokens in (1, 8, 64, 256)],
        "precision": _precision(config),
    }


@torch.inference_mode()
def _time_step(config: ModelConfig, read: Layer, tokens: int, rounds: int, rates: dict[str, float]) -> dict[str, Any]:
    moe = read.feed_forward
    assert isinstance(moe, MixtureOfExperts)
    hidden = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(tokens))
    step = Step(page_pool(config, torch.float32), [Span((0,) * tokens)])
    rope = cos_sin(config.rope, inverse_frequencies(config.rope), step.positions)
    normed = rowwise.rms_norm(hidden, read.input_layernorm, read.eps)
    whole_s = _median(lambda: read.forward(hidden, None, rope, step, None, torch.float32), rounds)
    experts_s = _median(lambda: moe.forward(normed), rounds)
    used = len(moe.router.choose(moe.router.logits(normed))[0].unique())
    flops, read_bytes = 0.0, 0.0
    for parameter in parameters(config):
        if parameter.role == "expert":
            per_expert = 1 / moe.router.config.n_routed_experts
            flops += 2 * parameter.size * tokens * moe.router.config.num_experts_per_tok * per_expert
            read_bytes += parameter.size * used * per_expert * (0.5 + 4 / 32)
        elif parameter.role in ("attention", "shared", "router"):
            flops += 2 * parameter.size * tokens
            read_bytes += 2 * parameter.size
    limit_s = max(flops / rates["bfloat16_flops"], read_bytes / rates["read_bytes_per_s"])
    return {
        "tokens": tokens,
        "experts_used": used,
        "ms_per_token": round(whole_s / tokens * 1e3, 2),
        "experts_ms_per_token": round(experts_s / tokens * 1e3, 2),
        "limit_ms_per_token": round(limit_s / tokens * 1e3, 2),
        "of_limit": round(limit_s / whole_s, 3),
        "gflops": round(flops / whole_s / 1e9),
    }


@torch.inference_mode()
def _precision(config: ModelConfig) -> dict[str, Any]:
    """Return, for one expert's matrix that was trained to INT4, what keeping it and making it INT8 cost."""
    assert config.moe is not None
    n, k = config.moe.moe_intermediate_size, config.hidden_size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    scale = (weight.unflatten(1, (-1, 32)).abs().amax(dim=2) / 7).bfloat16().float()
    int4 = (weight / scale.repeat_interleave(32, 1)).round().clamp(-8, 7).to(torch.int8)
    x = torch.randn(64, k, generator=generator)
    exact = reference.int4_linear(x, int4, scale)
    packed, scales = cpu.int4_pack(int4, scale)
    int8, int8_scale = quantize_weight(int4.float() * scale.repeat_interleave(32, 1))
    x_int8, x_scale = rowwise.quantize_rows(x)
    answers = {
        "int4_kept": (cpu.int4_linear(x, packed, scales, 32), packed.nbytes + scales.nbytes),
        "int8": (cpu.int8_linear(x_int8, x_scale, int8, int8_scale.squeeze(1)), int8.nbytes + int8_scale.nbytes),
    }
    return {
        name: {
            "bytes_per_weight": round(size / (n * k), 3),
            "relative_error": round(((got - exact).norm() / exact.norm()).item(), 5),
        }
        for name, (got, size) in answers.items()
    }


def conversion(limit_mb: int = 600, times: int = 3, balanced: bool = False) -> dict[str, Any]:
    """Return the peak memory of converting a generated checkpoint `times` larger than the memory its process may have.

    The limit is RLIMIT_DATA: every private page the process may write to, of libraries too. `balanced` calibrates as
    well, which takes minutes, and the dense part of one layer and the calibration texts' hidden states in memory.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache_folder()))
    try:
        layers = -(-limit_mb * 10**6 * times // _LAYER_BYTES)
        _write_float(folder / "source", {**_SMALL_MOE, "num_hidden_layers": layers})
        size = sum(path.stat().st_size for path in (folder / "source").glob("*.safetensors"))
        code = (
            "import json, sys; from jobs.bench_models import convert_within; convert_within(*json.loads(sys.argv[1]))"
        )
        arguments = json.dumps([str(folder / "source"), str(folder / "int8"), limit_mb * 10**6, balanced])
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
        return {
            "checkpoint_bytes": size,
            "limit_bytes": limit_mb * 10**6,
            "seconds": round(time.perf_counter() - start, 1),
            "exit_code": done.returncode,
            **(json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-500:]}),
        }
    finally:
        shutil.rmtree(folder)


def convert_within(source: str, target: str, limit: int, balanced: bool) -> None:
    """Convert in this process with at most `limit` bytes of memory, and print what was needed."""
    from k2model.compress.recipe import convert_into

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    shards: list[str] = []
    convert_into(source, Path(target), balanced=balanced, say=shards.append)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    written = sum(path.stat().st_size for path in Path(target).glob("*.safetensors"))
    print(json.dumps({"peak_rss_bytes": peak, "shards": len(shards), "int8_bytes": written}))


def as_text(facts: dict[str, Any]) -> str:
    """Return a measurement for people."""
    lines = [
        f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}"
        for key, value in facts.items()
        if key != "rows"
    ]
    return "\n".join(lines + ["  ".join(f"{k} {v}" for k, v in row.items()) for row in facts.get("rows", [])])


def _write_int4(folder: Path, raw: dict[str, Any]) -> None:
    """Write random weights as K2-Thinking is released: experts INT4 in groups of 32, the rest bfloat16."""
    config = ModelConfig.from_dict(raw, "bench")
    declared = quantization_config(["re:.*\\.experts\\..*"], 32, all_int4=True)
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": declared}), encoding="utf-8")
    infos: dict[str, TensorInfo] = {}
    stored = [parameter for parameter in parameters(config) if parameter.role != "head"]
    for parameter in stored:
        if parameter.role == "expert":
            n, k = parameter.shape
            linear = parameter.name.removesuffix(".weight")
            infos[f"{linear}.weight_packed"] = TensorInfo("I32", (n, k // 8))
            infos[f"{linear}.weight_scale"] = TensorInfo("BF16", (n, k // 32))
        else:
            infos[parameter.name] = TensorInfo("BF16", parameter.shape)
    generator = torch.Generator().manual_seed(0)
    words: dict[tuple[int, ...], Tensor] = {}
    with ShardWriter(folder / "model.safetensors", infos) as shard:
        for parameter in stored:
            for name, tensor in _int4_tensors(parameter, generator, words):
                shard.write(name, tensor)


def _int4_tensors(
    parameter: Parameter, generator: torch.Generator, words: dict[tuple[int, ...], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield random tensors of a parameter; experts of one shape share their words, rolled, since drawing is slow."""
    if parameter.role != "expert":
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        values = torch.ones_like(values) if parameter.role == "vector" else values / parameter.shape[-1] ** 0.5
        yield parameter.name, values.bfloat16()
        return
    n, k = parameter.shape
    if parameter.shape not in words:
        drawn = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        words[parameter.shape] = pack_int4(drawn)
    words[parameter.shape] = words[parameter.shape].roll(1, 0)
    linear = parameter.name.removesuffix(".weight")
    yield f"{linear}.weight_packed", words[parameter.shape]
    yield f"{linear}.weight_scale", torch.full((n, k // 32), 0.2 / k**0.5, dtype=torch.bfloat16)


def _write_float(folder: Path, raw: dict[str, Any]) -> None:
    folder.mkdir()
    config = ModelConfig.from_dict(raw, "bench")
    copy_tokenizer(open_checkpoint(DEFAULT_CHECKPOINT), folder)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    stored = [parameter for parameter in parameters(config) if parameter.role != "head"]
    generator = torch.Generator().manual_seed(0)
    infos = {parameter.name: TensorInfo("BF16", parameter.shape) for parameter in stored}
    with ShardWriter(folder / "model.safetensors", infos) as shard:
        for parameter in stored:
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            shard.write(parameter.name, (torch.ones_like(values) if parameter.role == "vector" else values).bfloat16())


def _median(call: Callable[[], object], rounds: int) -> float:
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _bfloat16_flops() -> float:
    """Return the rate of products of bfloat16 weights, by whatever way is the fastest here."""
    x, weight = torch.randn(512, 2048), torch.randn(2048, 2048).bfloat16()
    return 2 * 512 * 2048 * 2048 / _median(lambda: cpu.float_linear(x, weight), 3)


def _read_rate() -> float:
    values = torch.ones(2**28)
    return values.nbytes / _median(values.sum, 5)
