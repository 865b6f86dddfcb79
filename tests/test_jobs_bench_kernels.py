"""The kernel benchmark: what it times is the same work as the peer's, and its figures follow from what it timed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import bench_kernels, kernel_cases
from jobs.cli import main
from jobs.kernel_cases import Case, Model

DENSE = Model("tiny", 64, {"qkv": (96, 64)}, 32, (4, 2, 16), vocab_size=97)
SPARSE = Model("sparse", 64, {"q": (48, 64)}, 32, None, 2, (6, 2))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "_TOKENS", {"cpu": (3, 64)})
    monkeypatch.setattr(kernel_cases, "_KEYS", {"cpu": (20,)})
    monkeypatch.setattr(bench_kernels, "MODELS", (DENSE, SPARSE))
    monkeypatch.setattr(bench_kernels, "_rates", lambda *_: dict.fromkeys(("int8", "float32", "bytes"), 1e9))


def every_case() -> list[Case]:
    return [case for model in (DENSE, SPARSE) for case in kernel_cases.cases(model, "cpu")]


@torch.inference_mode()
def test_ours_and_the_peer_do_the_same_work() -> None:
    compared = set()
    for case in every_case():
        ours: Any = case.ours()
        peer: Any = case.peer()
        if case.kernel.endswith("attention"):
            # SDPA in float32 too, in another order of its sums.
            torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4)
        elif case.kernel == "token_logprobs":
            torch.testing.assert_close(ours, peer, rtol=0, atol=0.5)  # the peer's logits, near 30, are bfloat16
        elif case.kernel.endswith("_quantize"):
            (x_int8, x_scale, *_), (peer_int8, peer_scale) = ours, peer
            torch.testing.assert_close(x_int8 * x_scale[:, None], peer_int8 * peer_scale[:, None], rtol=0, atol=0.1)
        else:
            continue
        compared.add(case.kernel)
    assert compared == {
        "prefill attention", "decode attention", "latent decode attention", "token_logprobs", "rms_norm_quantize",
        "swiglu_quantize",
    }  # fmt: skip


def test_figures_follow_from_the_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def timer(calls: list[Callable[[], object]], rounds: int) -> list[float]:
        return [2e-6, 6e-6]

    monkeypatch.setattr(bench_kernels, "_time_on_cpu", timer)
    assert main(["bench", "kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["kernel"] for row in rows} == {case.kernel for case in every_case()}
    row = next(row for row in rows if row["kernel"] == "int8_linear" and row["size"] == 64 and "tiny" in row["model"])
    operations, moved = 2 * 64 * 96 * 64, 96 * 64 + 64 * (64 + 96 * 4)
    assert row["gop_per_s"] == round(operations / 2e-6 / 1e9, 1)
    assert row["gb_per_s"] == round(moved / 2e-6 / 1e9, 1)
    assert (row["bound"], row["times_peer"]) == ("compute", 3.0)
    assert row["of_limit"] == round(operations / 1e9 / 2e-6, 3)


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    facts = bench_kernels.kernels(rounds=1, only="attention")
    bench_kernels.plot(facts, str(tmp_path / "kernels.svg"))
    assert "prefill attention" in bench_kernels.as_text(facts)
    assert (tmp_path / "kernels.svg").read_text().startswith("<?xml")
