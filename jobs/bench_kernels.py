"""Every kernel beside its limit and beside what one would otherwise call, on a CPU or a card.

The limit of a call is the larger of its operations at the machine's rate and its bytes at the machine's bandwidth, both
measured in the same run. On a card it needs nothing but torch, triton and this repository:

    python -m jobs.bench_kernels > kernels.json
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from jobs.kernel_cases import MODELS, Case, cases, random_int8
from kernels import cpu

_L2_BYTES = 256 * 2**20
"""Overwritten between two calls on a card, so that weights come from memory as they would in a model."""


def kernels(rounds: int = 7, only: str = "") -> dict[str, Any]:
    """Return the time of every kernel over the shapes of four models, on the card if there is one.

    Args:
        rounds: timed calls, ours and the peer's in turn; medians.
        only: leave out kernels whose name does not contain this.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timer = partial(_time_on_card if device == "cuda" else _time_on_cpu, rounds=rounds)
    with torch.inference_mode():
        rates = _rates(device, timer)
        rows = [_row(case, timer, rates) for model in MODELS for case in cases(model, device) if only in case.kernel]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        **{f"{name}_per_s": round(rate) for name, rate in rates.items()},
        "rows": rows,
    }


def _row(case: Case, timer: Callable[..., list[float]], rates: dict[str, float]) -> dict[str, Any]:
    ours_s, peer_s = timer([case.ours, case.peer])
    compute_s = case.operations / rates[case.rate] if case.operations else 0.0
    memory_s = case.bytes / rates["bytes"]
    return {
        "kernel": case.kernel,
        "model": case.model,
        "shape": case.shape,
        "size": case.size,
        "us": round(ours_s * 1e6, 1),
        "gop_per_s": round(case.operations / ours_s / 1e9, 1),
        "gb_per_s": round(case.bytes / ours_s / 1e9, 1),
        "bound": "compute" if compute_s > memory_s else "memory",
        "of_limit": round(max(compute_s, memory_s) / ours_s, 3),
        "peer": case.peer_name,
        "times_peer": round(peer_s / ours_s, 2),
    }


def _rates(device: str, timer: Callable[..., list[float]]) -> dict[str, float]:
    """Return what this machine does at best, in operations and bytes per second."""
    n = 8192 if device == "cuda" else 1024
    a, b = random_int8(device, n, n), random_int8(device, n, n)
    one = torch.ones(n, device=device)
    wide = [a.bfloat16(), b.bfloat16(), a.float(), b.float()]
    int8 = (lambda: torch._int_mm(a, b.t())) if device == "cuda" else (lambda: cpu.int8_linear(a, one, b, one))
    source = torch.ones(2**28 if device == "cuda" else 2**27, device=device)
    target = torch.empty_like(source)
    move = (lambda: target.copy_(source)) if device == "cuda" else (lambda: source.sum())
    calls = [int8, lambda: wide[0] @ wide[1].t(), lambda: wide[2] @ wide[3].t(), move]
    int8_s, bfloat16_s, float32_s, move_s = timer(calls)
    moved = source.nbytes * (2 if device == "cuda" else 1)
    flops = 2 * n**3
    return {
        "int8": flops / int8_s, "bfloat16": flops / bfloat16_s, "float32": flops / float32_s, "bytes": moved / move_s,
    }  # fmt: skip


def _time_on_cpu(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each call, called in turn, after one that is not timed."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for times, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            if number:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def _time_on_card(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The same by CUDA events, with the L2 cache overwritten before each."""
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 3):
        for times, call in zip(seconds, calls, strict=True):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= 3:
                times.append(start.elapsed_time(end) / 1e3)
    return [statistics.median(times) for times in seconds]


def plot(facts: dict[str, Any], path: str) -> None:
    """Write a picture of every kernel's share of its limit against its size. Raises: EnvironmentMismatch."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        from schemas.errors import EnvironmentMismatch

        raise EnvironmentMismatch("a plot needs matplotlib", remedy="pip install matplotlib") from error
    names = list(dict.fromkeys(row["kernel"] for row in facts["rows"]))
    figure = Figure(figsize=(4 * min(4, len(names)), 3 * -(-len(names) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False, sharey=True)
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.set_visible(False)
            continue
        rows = [row for row in facts["rows"] if row["kernel"] == name]
        for model in dict.fromkeys(row["model"] for row in rows):
            points = [(row["size"], row["of_limit"]) for row in rows if row["model"] == model]
            axis.plot(*zip(*points, strict=True), marker="o", label=model)
        axis.set(title=name, xscale="log", ylim=(0, 1.1), xlabel="keys" if "decode" in name else "tokens")
        axis.legend(fontsize=6)
    figure.supylabel("share of the measured limit")
    figure.savefig(path)


def as_text(facts: dict[str, Any]) -> str:
    """Return the measurement for people."""
    lines = [f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}" for key, value in facts.items()
             if key != "rows"]  # fmt: skip
    lines.append(f"{'kernel':24} {'model':32} {'shape':36} {'µs':>10} {'GOP/s':>9} {'GB/s':>7} {'limit':>7}  x peer")
    for row in facts["rows"]:
        lines.append(
            f"{row['kernel']:24} {row['model']:32} {row['shape']:36} {row['us']:>10,.1f} {row['gop_per_s']:>9,.1f}"
            f" {row['gb_per_s']:>7,.1f} {row['of_limit']:>7.1%}  {row['times_peer']} ({row['peer']})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(kernels()))
