"""Measurements: what the INT8 layers cost, and what they lose."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from jobs.spec import load_spec
from k2model.decoder.attention import Attention
from k2model.decoder.feed_forward import FeedForward
from k2model.decoder.linear import FloatLinear, Int8Linear
from k2model.decoder.model import Decoder
from k2model.engine.engine import load
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT
from pipelines import storage
from pipelines.prompts import Prompts
from schemas.errors import SpecError

_ROWS = (1, 8, 32, 128, 512, 1024)
_LAST_TOKENS = 64


def linear(checkpoint: str = DEFAULT_CHECKPOINT, rounds: int = 30) -> dict[str, Any]:
    """Return the time of each INT8 layer (quantize, multiply, scale) beside the same layer in bfloat16.

    The two are timed in turn, round by round, so that whatever else the machine does falls on both; medians.
    """
    decoder, _ = load(checkpoint)
    layer = decoder.layers[0]
    if not isinstance(layer.attention, Attention) or not isinstance(layer.feed_forward, FeedForward):
        raise SpecError(f"{checkpoint}: bench linear times dense layers", remedy="give a dense checkpoint")
    shapes = {
        "qkv_proj": layer.attention.qkv_proj,
        "o_proj": layer.attention.o_proj,
        "gate_up_proj": layer.feed_forward.gate_up_proj,
        "down_proj": layer.feed_forward.down_proj,
    }
    rows = []
    for (name, int8), tokens in itertools.product(shapes.items(), _ROWS):
        if not isinstance(int8, Int8Linear):
            raise SpecError(
                f"{checkpoint}: {name} is not INT8", remedy="give one whose linears are all INT8, or none is"
            )
        in_bfloat16 = FloatLinear((int8.weight.float() * int8.weight_scale[:, None]).bfloat16())
        x = torch.randn(tokens, int8.weight.shape[1])
        int8_s, bfloat16_s = _in_turn([lambda x=x, f=int8: f(x), lambda x=x, f=in_bfloat16: f(x)], rounds)  # type: ignore[misc]
        rows.append(
            {
                "layer": name,
                "tokens": tokens,
                "int8_us": round(int8_s * 1e6),
                "bfloat16_us": round(bfloat16_s * 1e6),
                "speedup": round(bfloat16_s / int8_s, 2),
            }
        )
    return {"checkpoint": checkpoint, "threads": torch.get_num_threads(), "rows": rows}


def quality(
    checkpoint: str = DEFAULT_CHECKPOINT, tickets: str = "", labels: str = "", n: int = 40, precision: str = "int8"
) -> dict[str, Any]:
    """Return how far the model in `precision` is from the checkpoint's own weights in float32.

    `kl_labels`: divergence in nats of the next-token distribution over the labels' first tokens, at the end of the
    prompt. `kl_vocabulary` and `top1_agreement`: over the whole vocabulary, at the last 64 tokens of each prompt.

    Args:
        checkpoint: what to measure.
        tickets: prompts of token ids, one JSON object a line with `prefix_ids` and `body_ids`; without it, the shipped
            moderation sweep over its samples.
        labels: JSON object of label to first token id, for `tickets`.
        n: prompts.
        precision: what is measured.
    """
    exact, tokenizer = load(checkpoint, "fp32")
    rounded, _ = load(checkpoint, precision)
    prompts, label_ids = _given_prompts(tickets, labels, n) if tickets else _sample_prompts(tokenizer, n)
    kl_labels, kl_vocabulary, agreement = [], [], []
    for ids in prompts:
        (p, p_labels), (q, q_labels) = _last_logits(exact, ids, label_ids), _last_logits(rounded, ids, label_ids)
        kl_labels.append(_divergence(p_labels, q_labels))
        kl_vocabulary.append(_divergence(p, q))
        agreement.append((p.argmax(-1) == q.argmax(-1)).float())
    return {
        "checkpoint": checkpoint,
        "precision": precision,
        "prompts": len(prompts),
        "labels": len(label_ids),
        "kl_labels": round(torch.cat(kl_labels).mean().item(), 5),
        "kl_labels_p90": round(torch.cat(kl_labels).quantile(0.9).item(), 5),
        "kl_vocabulary": round(torch.cat(kl_vocabulary).mean().item(), 5),
        "top1_agreement": round(torch.cat(agreement).mean().item(), 4),
    }


def as_text(facts: dict[str, Any]) -> str:
    """Return a measurement as lines: single figures first, then its table."""
    table = facts.get("rows", [])
    lines = [f"{key}: {value}" for key, value in facts.items() if key != "rows"]
    if table:
        lines.append("  ".join(f"{key:>12}" for key in table[0]))
        lines += ["  ".join(f"{value:>12}" for value in row.values()) for row in table]
    return "\n".join(lines)


@torch.inference_mode()
def _in_turn(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each call, called in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 3):
        for times, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            if number >= 3:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


@torch.inference_mode()
def _last_logits(decoder: Decoder, ids: list[int], label_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [64, V] of the last tokens, and the labels' [1, C] at the very last, in float32 as scored."""
    hidden = decoder.forward_one(ids)
    return decoder.logits(hidden[-_LAST_TOKENS:]), hidden[-1:] @ decoder.lm_head[label_ids].float().t()


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p ‖ q) in nats per row of logits [T, V]."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _given_prompts(tickets: str, labels: str, n: int) -> tuple[list[list[int]], list[int]]:
    lines = Path(tickets).read_text(encoding="utf-8").splitlines()[:n]
    rows = [json.loads(line) for line in lines]
    return [row["prefix_ids"] + row["body_ids"] for row in rows], list(json.loads(Path(labels).read_text()).values())


def _sample_prompts(tokenizer: Any, n: int) -> tuple[list[list[int]], list[int]]:
    """Return `n` prompts of the shipped moderation sweep, spread over its samples, and its labels' first tokens."""
    spec = load_spec("jobs/specs/moderation_sweep.toml", {})
    prompts = Prompts(spec.tasks, tokenizer, spec.max_prompt_tokens)
    texts: list[str] = []
    for url in spec.urls:
        for path in storage.find(url):
            column = pq.read_table(path, columns=["body"])["body"].cast("binary").to_pylist()
            texts += [value.decode(errors="replace") for value in column if value and 20 < len(value) < 1000]
    requests = [prompts.requests(text)[0] for text in texts[:: max(1, len(texts) // n)][:n]]
    first = dict.fromkeys(c.token_ids[-c.num_scored] for c in requests[0].candidates)
    return [list(request.prompt_ids) for request in requests], list(first)
