"""Dense feed-forwards cut into a shared and routed experts, by what their neurons do on prompts.

Nothing is trained here; `tune`, `distill` and `quantize` train what it leaves (student_layers.py).

After CMoE (arXiv 2502.04416), but for three choices that keep more of SmolLM2's output at equal arithmetic
(BENCHMARKS.md): the shared expert is of the neurons that give most output, not of those that are most often among the
strongest; the router is the linear function that best foretells what each expert gives, not one neuron of each; and
down projections are fitted again, so that the experts a token meets make good what the others would have given.

The result is a `glm4_moe`, whose experts weigh 2 sigmoid(logit) here. Logits are near 0, so every weight is near 1, as
a neuron's is in a dense layer: with all experts active the layer computes what the dense one did, to within GAIN.
transformers and vLLM open the family; vLLM does not tie its head, so a tied one has to be written out for it.

Legend: T tokens, D hidden_size, F intermediate size, E routed experts, A experts per token.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.compress.calibrate import Calibration, start_calibration
from k2model.compress.convert import hub_config
from k2model.compress.examples import TrainingData
from k2model.compress.neurons import Dense, fit_down, kept, neurons_in, share_out
from k2model.compress.recipe import copy_tokenizer
from k2model.config import AttentionConfig, ModelConfig
from k2model.decoder.linear import LinearReader
from k2model.decoder.model import read_layer
from k2model.flops import token_flops
from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.export import ShardWriter
from k2model.formats.finished import finished_folder
from k2model.formats.weights import TensorInfo
from k2model.parameters import parameters
from kernels import rowwise
from schemas.errors import SpecError

_HELD_BACK = 5
"""One prompt of so many is not fitted to."""

_MAX_EXPERTS = 512
"""Of a router on a card (kernels/routing.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How every feed-forward is cut: into experts of intermediate_size / (n_shared_experts + n_routed_experts)."""

    n_shared_experts: int = 4
    """Parts that every token passes; together they are one feed-forward."""
    n_routed_experts: int = 12
    num_experts_per_tok: int = 4
    rows: int = 128
    """Prompts that neurons are watched on; every fifth is held back, to measure what is kept."""

    def __post_init__(self) -> None:
        shared, routed, active = self.n_shared_experts, self.n_routed_experts, self.num_experts_per_tok
        if shared < 1 or not 2 <= routed <= _MAX_EXPERTS or not 1 <= active <= routed or self.rows < _HELD_BACK:
            raise SpecError(
                f"{shared} shared experts and {active} of {routed} routed ones cannot be made of {self.rows} prompts",
                remedy=f"give a shared one or more, 2 to {_MAX_EXPERTS} routed ones, 1 of them or more per token, and "
                f"{_HELD_BACK} prompts or more",
            )


def cut_experts(
    source: str, target: Path, data: TrainingData, options: Cut, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Write checkpoint `source`, its feed-forwards cut into experts, into the folder `target`, in float32.

    Args:
        source: a dense llama, qwen2 or qwen3 checkpoint, in any format.
        target: empty or not there; appears when it is whole.
        data: whose prompts neurons are watched on.
        options: how it is cut.
        progress: told of each layer.

    Returns: sizes, FLOPs of a token before and after, and by layer the share of its squared output that is `kept` and
    the largest share of tokens that one expert takes (`load`), both on prompts that nothing was fitted to.
    Raises: CheckpointError; SpecError for a model or sizes that cannot be cut so.
    """
    checkpoint = open_checkpoint(source)
    config, weights = checkpoint.config(), checkpoint.weights()
    weights.check(parameters(config), tied=config.tie_word_embeddings)
    config_json = cut_config(checkpoint.config_json(), config, options, source) | {
        "tie_word_embeddings": weights.is_tied,
        "torch_dtype": "float32",
    }
    new = ModelConfig.from_dict(config_json, source)
    prompts, watched, held_back = _prompts(data, options.rows)
    calibration = start_calibration(config, weights, prompts)
    tokens = len(calibration.hidden)
    fitted, judged = (watched & ~held_back)[:tokens], (watched & held_back)[:tokens]
    if not judged.any():
        raise SpecError(f"{len(prompts)} prompts are too few to hold one back", remedy=f"give at least {_HELD_BACK}")
    stored = [p for p in parameters(new) if p.role != "head" or not weights.is_tied]
    layers: list[dict[str, float]] = []
    made: dict[str, Tensor] = {}
    with finished_folder(target) as folder:
        copy_tokenizer(checkpoint, folder)
        (folder / "config.json").write_text(json.dumps(config_json, indent=1), encoding="utf-8")
        infos = {parameter.name: TensorInfo("F32", parameter.shape) for parameter in stored}
        with ShardWriter(folder / "model.safetensors", infos) as shard:
            for parameter in stored:
                if parameter.name == f"model.layers.{len(layers)}.input_layernorm.weight":
                    made, facts = _cut_layer(calibration, len(layers), options, fitted, judged)
                    layers.append(facts)
                    progress({"layer": len(layers), "of": config.num_hidden_layers, **facts})
                found = made.get(parameter.name)
                shard.write(parameter.name, weights.expanded(parameter) if found is None else found)
    before, after = token_flops(config)["token"], token_flops(new)["token"]
    return {
        "n_shared_experts": options.n_shared_experts,
        "n_routed_experts": options.n_routed_experts,
        "num_experts_per_tok": options.num_experts_per_tok,
        "moe_intermediate_size": config_json["moe_intermediate_size"],
        "flops_per_token": {"before": before, "after": after},
        "kept": round(sum(layer["kept"] for layer in layers) / len(layers), 4),
        "layers": layers,
    }


def cut_config(raw: Mapping[str, Any], config: ModelConfig, options: Cut, name: str) -> dict[str, Any]:
    """Return config.json `raw` of the dense model `config` for the same one in experts. Raises: SpecError."""
    attention, parts = config.attention, options.n_shared_experts + options.n_routed_experts
    if (
        not isinstance(attention, AttentionConfig)
        or config.family not in ("llama", "qwen2", "qwen3")
        or (attention.o_bias or config.mlp_bias or any(config.sliding_windows))
    ):
        raise SpecError(
            f"{name}: this {config.family} model cannot be cut into experts",
            remedy="give a dense llama, qwen2 or qwen3 one, without biases behind attention and without windows",
        )
    if config.intermediate_size % parts:
        possible = [count for count in range(3, config.intermediate_size) if config.intermediate_size % count == 0]
        raise SpecError(
            f"{name}: intermediate_size {config.intermediate_size} is not {parts} equal experts",
            remedy=f"n_shared_experts + n_routed_experts may be {', '.join(map(str, possible[:12]))}",
        )
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope = {"rope_type": rope.get("type", "default"), **rope}
    return {
        **hub_config(raw),
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta, "partial_rotary_factor": 1.0},
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "n_shared_experts": options.n_shared_experts,
        "n_routed_experts": options.n_routed_experts,
        "num_experts_per_tok": options.num_experts_per_tok,
        "moe_intermediate_size": config.intermediate_size // parts,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    }


def _prompts(data: TrainingData, rows: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Return `rows` prompts of `data`, which of their tokens [T] count, and which are of prompts held back.

    Instructions count once a batch, as they are computed.
    """
    prompts: list[list[int]] = []
    counts: list[bool] = []
    held_back: list[bool] = []
    for batch in data.epoch(0):
        for number, example in enumerate(batch.examples[: rows - len(prompts)]):
            size, is_held_back = len(example.prompt_ids), len(prompts) % _HELD_BACK == _HELD_BACK - 1
            skipped = example.num_prefix_tokens if number else 0
            prompts.append(list(example.prompt_ids))
            counts += [False] * skipped + [True] * (size - skipped)
            held_back += [is_held_back] * size
        if len(prompts) >= rows:
            break
    return prompts, torch.tensor(counts), torch.tensor(held_back)


@torch.inference_mode()
def _cut_layer(
    calibration: Calibration, index: int, options: Cut, fitted: Tensor, judged: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the parts of layer `index` and what is kept; moves the hidden states through the dense layer."""
    config, weights, name = calibration.config, calibration.weights, f"model.layers.{index}.mlp"
    f, d = config.intermediate_size, config.hidden_size
    reader = LinearReader(weights, torch.float32, expand=True)
    layer = read_layer(config, index, reader, reader)
    calibration.attend(index, layer)
    x = rowwise.rms_norm(calibration.hidden, layer.post_attention_layernorm, layer.eps)
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    dense = Dense(
        **{part: weights.float_weight(f"{name}.{part}_proj", *shape).float() for part, shape in shapes.items()}
    )
    parts = share_out(
        x[fitted],
        dense,
        n_shared_experts=options.n_shared_experts,
        n_routed_experts=options.n_routed_experts,
        num_experts_per_tok=options.num_experts_per_tok,
    )
    down = fit_down(x[fitted], dense, parts)
    share, load = kept(x[judged], dense, parts, down)
    for tokens in torch.arange(len(x)).split(1024):
        calibration.hidden[tokens] += dense.neurons(x[tokens]) @ dense.down.t()
    made = {f"{name}.gate.weight": parts.router, f"{name}.gate.e_score_correction_bias": parts.correction_bias}
    for part, own in neurons_in(parts):
        made[f"{name}.{part}.gate_proj.weight"] = dense.gate[own]
        made[f"{name}.{part}.up_proj.weight"] = dense.up[own]
        made[f"{name}.{part}.down_proj.weight"] = down[:, own]
    return made, {"kept": round(share, 4), "load": round(load, 4)}
