"""Every family against transformers itself: tiny models of its own classes, saved, and opened here.

Sizes are chosen to differ wherever two of them could be mistaken for each other.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.check import check, forced_logits
from tests.forward import float_decoder, packed_logits

FIXTURES = Path(__file__).parents[2] / "shared/fixtures"
TOLERANCE = 2e-4
LENGTHS = (19, 1, 8)
STEPS = 7


def rope(theta: float = 10000.0, kind: str = "default", **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


SIZES: dict[str, Any] = {
    "vocab_size": 151,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA = {**SIZES, "hidden_size": 54, "intermediate_size": 70, "num_attention_heads": 6, "num_key_value_heads": 2,
         "head_dim": 14, **rope()}  # fmt: skip
QWEN = {**LLAMA, "num_hidden_layers": 3, **rope(1e6)}
QWEN2 = {**{key: value for key, value in QWEN.items() if key != "head_dim"}, "hidden_size": 60}
QWEN_MOE = {**QWEN, "moe_intermediate_size": 22, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}
GLM = {
    **LLAMA,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 22,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    **rope(partial_rotary_factor=1.0),
}
MIXTRAL = {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, **rope(1e6)}
YARN = rope(kind="yarn", factor=6.0, original_max_position_embeddings=24, beta_fast=6.0, beta_slow=1.0)
GPT_OSS = {**LLAMA, "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 30,
           "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
           **rope(5000.0, "yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=1.0,
                  truncate=False)}  # fmt: skip
LATENT = {**SIZES, "hidden_size": 52, "intermediate_size": 70, "moe_intermediate_size": 22, "num_hidden_layers": 3,
          "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 26, "kv_lora_rank": 18,
          "qk_nope_head_dim": 14, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 12,
          "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
          "routed_scaling_factor": 2.3, "norm_topk_prob": True, **rope(3000.0)}  # fmt: skip
MSCALE: dict[str, Any] = {"kind": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, biases, one key-value head": (
        "llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama, tied, linear rope": ("llama", {**LLAMA, "tie_word_embeddings": True, **rope(kind="linear", factor=3.0)}),
    "llama, llama3 rope": (
        "llama", {**LLAMA, **rope(5e5, "llama3", factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0,
                                  original_max_position_embeddings=32)}),
    "llama, yarn": ("llama", {**LLAMA, **YARN}),
    "llama, yarn with a factor of its own": (
        "llama", {**LLAMA, **rope(**MSCALE, attention_factor=1.3, truncate=False, beta_fast=4.0, beta_slow=2.0)}),
    "qwen2": ("qwen2", QWEN2),
    "qwen2, tied, window from layer 1": (
        "qwen2", {**QWEN2, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4,
                  "max_window_layers": 1}),
    "qwen3": ("qwen3", QWEN),
    "qwen3, biases, window by layer": (
        "qwen3", {**QWEN, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
                  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE),
    "qwen3_moe, not normalized, some layers dense": (
        "qwen3_moe", {**QWEN_MOE, "norm_topk_prob": False, "mlp_only_layers": [2], "decoder_sparse_step": 1}),
    "qwen3_moe, every second layer, top 1": (
        "qwen3_moe", {**QWEN_MOE, "decoder_sparse_step": 2, "num_experts_per_tok": 1, "norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", GLM),
    "glm4_moe, qk-norm, biases, not normalized": (
        "glm4_moe", {**GLM, "use_qk_norm": True, "attention_bias": True, "norm_topk_prob": False, "n_shared_experts": 1,
                     "first_k_dense_replace": 0}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral, window, top 3": ("mixtral", {**MIXTRAL, "sliding_window": 5, "num_experts_per_tok": 3}),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss, other clamp, ramp in whole dimensions, top 1": (
        "gpt_oss", {**GPT_OSS, "swiglu_limit": 0.7, "num_experts_per_tok": 1,
                    "rope_parameters": {**GPT_OSS["rope_parameters"], "truncate": True}}),
    "deepseek_v3, groups and yarn": (
        "deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 2, **rope(**MSCALE, mscale=1.0, mscale_all_dim=1.0)}),
    "deepseek_v3, other mscales": (
        "deepseek_v3", {**LATENT, **rope(**MSCALE, mscale=0.7, mscale_all_dim=1.2)}),
    "deepseek_v3, no mscale": ("deepseek_v3", {**LATENT, "n_group": 6, "topk_group": 5, **rope(**MSCALE)}),
    "deepseek_v3, no q_lora, two shared": (
        "deepseek_v3", {**LATENT, "q_lora_rank": None, "n_shared_experts": 2, "v_head_dim": 20}),
    "deepseek_v3, not normalized, no dense layer": (
        "deepseek_v3", {**LATENT, "norm_topk_prob": False, "first_k_dense_replace": 0, "n_group": 3, "topk_group": 1}),
    "deepseek_v3, biases, rope in halves": (
        "deepseek_v3", {**LATENT, "attention_bias": True, "rope_interleave": False}),
    "deepseek_v3, all dense, tied": (
        "deepseek_v3", {**LATENT, "first_k_dense_replace": 9, "tie_word_embeddings": True}),
    "kimi_k2, as the hub spells it": (
        "kimi_k2", {**LATENT, "rms_norm_eps": 1e-4,
                    **rope(50000.0, "yarn", factor=32.0, original_max_position_embeddings=64, beta_fast=1.0,
                           beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)}),
}  # fmt: skip


def redraw(model: Any, seed: int) -> None:
    """Give `model` weights at which every part of it shows in the logits; its own start out near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight") or "layernorm" in name:
            values = 0.5 + values.sigmoid()
        elif name.endswith("e_score_correction_bias"):
            values *= 0.12
        elif name.endswith("bias"):
            values *= 0.3
        elif not name.endswith("sinks"):
            in_out = type(model).__name__.startswith("GptOss") and ".experts." in name
            fan_in = tensor.shape[1] if in_out else tensor.shape[-1]
            values *= 0.6 if "embed" in name and not model.config.tie_word_embeddings else 1.5 / math.sqrt(fan_in)
        tensor.data.copy_(values)


def route_margin(router: Any, logits: Tensor) -> float:
    """Return the smallest gap between an expert (or group) that is chosen and one that is not."""
    scores, chosen = logits.float(), router.top_k
    gaps = [math.inf]
    if hasattr(router, "e_score_correction_bias"):
        scores = scores.sigmoid() + router.e_score_correction_bias
        groups = scores.unflatten(-1, (router.num_group, -1))
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1).sort(dim=-1, descending=True)
        if router.topk_group < router.num_group:
            gaps.append((best.values[:, router.topk_group - 1] - best.values[:, router.topk_group]).min().item())
            dropped = torch.ones_like(best.values, dtype=torch.bool)
            dropped.scatter_(1, best.indices[:, : router.topk_group], False)
            scores = groups.masked_fill(dropped[..., None], -10.0).flatten(1)
    ranked = scores.sort(dim=-1, descending=True).values
    if chosen < ranked.shape[-1]:
        gaps.append((ranked[:, chosen - 1] - ranked[:, chosen]).min().item())
    return min(gaps)


@torch.inference_mode()
def answers(model: Any, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the logits of each prompt alone, greedy tokens, their logits with a cache, and the smallest margin."""
    margins: list[float] = []
    routers = [module for module in model.modules() if "Router" in type(module).__name__]
    hooks = [r.register_forward_hook(lambda m, _, out: margins.append(route_margin(m, out[0]))) for r in routers]
    ragged = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts])
    tokens, logits = [], []
    for ids in prompts:
        step, past = torch.tensor([ids]), None
        for _ in range(STEPS):
            out = model(step, cache=past, use_cache=True)
            past, last = out.cache, out.logits[0, -1]
            step = last.argmax().view(1, 1)
            logits.append(last)
            tokens.append(int(step))
            best = last.topk(2).values
            margins.append(float(best[0] - best[1]) / 20)
    for hook in hooks:
        hook.remove()
    return ragged, torch.tensor(tokens).view(-1, STEPS), torch.stack(logits).view(len(prompts), STEPS, -1), min(margins)


def decided(config: Any, prompts: list[list[int]]) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """Return a model in which no choice is so near a tie that rounding could make it, and its answers."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32, **eager).eval()
    for seed in range(40):
        redraw(model, seed)
        ragged, tokens, logits, margin = answers(model, prompts)
        if margin > 1e-4:
            return model, (ragged, tokens, logits)
    pytest.fail(f"only near ties; the last margin was {margin}")


def hub_spelling(folder: Path, model_type: str) -> None:
    """Write config.json as the hub's older checkpoints have it."""
    raw = json.loads((folder / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw |= {"model_type": model_type, "torch_dtype": raw.pop("dtype"), "rope_theta": scaling.pop("rope_theta")}
    raw |= {"rope_scaling": {"type": scaling.pop("rope_type"), **scaling}, "auto_map": {"AutoConfig": "remote.Code"}}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    family, options = CASES[name]
    from transformers import AutoConfig

    config = AutoConfig.for_model("deepseek_v3" if family == "kimi_k2" else family, **options)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 151, (n,), generator=generator).tolist() for n in LENGTHS]
    model, (ragged, tokens, logits) = decided(config, prompts)
    model.save_pretrained(tmp_path)
    if family == "kimi_k2":
        hub_spelling(tmp_path, family)
    decoder = float_decoder(tmp_path)
    assert ragged.std() > 0.5
    torch.testing.assert_close(packed_logits(decoder, prompts), ragged, rtol=0, atol=TOLERANCE)
    got = forced_logits(decoder, prompts, tokens.tolist())
    torch.testing.assert_close(got, logits, rtol=0, atol=TOLERANCE)
    assert torch.equal(got.argmax(dim=-1), tokens)


def folders() -> list[Any]:
    found = sorted(folder for folder in FIXTURES.glob("*") if folder.is_dir())
    slow = {"smollm2_real": [pytest.mark.slow]}
    return [pytest.param(folder, id=folder.name, marks=slow.get(folder.name, [])) for folder in found]


@pytest.mark.parametrize("folder", folders())
def test_a_reference_fixture_is_reproduced(folder: Path) -> None:
    assert [found for found in check(folder) if not found.is_equal] == []
