"""The report of a recipe: names are data, curves are drawn whole, numbers are what they are called."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.compress_measure import flops_per_token, flops_saved
from jobs.compress_report import HEIGHT, WIDTH, as_text, curve_lines, percent, render, write_report
from k2model.config import ModelConfig
from tests.checkpoints import config_json

EVIL = '<script>alert("1")</script>'


def line(name: str, **more: Any) -> dict[str, Any]:
    quality = {EVIL: {"rows": 4, "accuracy": 0.5, "macro_f1": 0.25}}
    average = {"accuracy": 0.5, "macro_f1": 0.25}
    return {
        "name": name,
        "kind": name,
        "checkpoint": EVIL,
        "precision": "fp32",
        "quality": quality,
        "macro_average": average,
        "bytes": 1_000_000,
        "bytes_float32": 4_000_000,
        "bytes_saved": 0.75,
        "parameters": 1_000_000,
        "flops_per_token": {"layers": 100, "not_activated": 0, "head": 20},
        "flops_saved": {"pruned": 0.1, "not_activated": 0.0, "vocabulary": 0.0},
        **more,
    }


def facts(**more: Any) -> dict[str, Any]:
    steps = [
        line("teacher"),
        line("01-tune", options={"a": EVIL}, facts={}, retention={"accuracy": 0.9, "macro_f1": None}),
    ]
    questions = {EVIL: {"rows": 3, "held_back": 4}, "unlabelled": {"rows": 9, "held_back": 0}}
    return {
        "teacher": EVIL,
        "reference": EVIL,
        "seed": 0,
        "seeds": 1,
        "report": "report.html",
        "questions": questions,
        "steps": steps,
        "done": True,
        **more,
    }


def test_whatever_is_named_on_the_page_is_escaped() -> None:
    page = render(facts(), {"01-tune": curve_lines([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])})
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert "90.0 %" in page
    assert '<polyline points="320.0,0.0 640.0,180.0"/>' in page


def test_curves_fit_their_frame_and_long_ones_are_thinned() -> None:
    curve = [
        {"step": step, "loss": 5.0 - step / 1000, **({"validation_loss": 1.0} if step % 500 == 0 else {})}
        for step in range(1, 3001)
    ]
    loss, validation = curve_lines(curve)
    points = [tuple(map(float, point.split(","))) for point in loss.points.split()]
    assert len(points) <= 400
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert points == sorted(points)
    assert (loss.first, loss.last, loss.low, loss.high) == (4.999, 2.0, 2.0, 4.999)
    assert len(validation.points.split()) == 6
    assert curve_lines([]) == curve_lines([{"step": 0}]) == []


def test_a_line_a_step_in_the_terminal(tmp_path: Path) -> None:
    told = facts()
    write_report(tmp_path, told)
    text = as_text(told)
    assert re.search(r"01-tune +50\.0 % +25\.0 % +90\.0 % +1\.0 +120 +- +-", text)
    assert "done; report: " in text
    assert "goes on" in as_text({**told, "done": False})
    assert json.loads((tmp_path / "report.json").read_text())["teacher"] == EVIL
    assert percent(None) == "-"


def test_the_spread_over_seeds_stands_beside_the_first_seeds_figure() -> None:
    told = facts(seeds=3)
    told["steps"][1]["over_seeds"] = {"accuracy": {"mean": 0.48, "deviation": 0.02}}
    assert "01-tune: accuracy over 3 seeds 48.0 %, deviation 2.0 %" in as_text(told)
    page = render(told, {})
    assert "50.0 %<br>48.0 % ± 2.0 %" in page
    assert "over 3 seeds" in page


def flops(family: str = "llama", **options: Any) -> dict[str, int]:
    return flops_per_token(ModelConfig.from_dict(config_json(family, **options), "test"))


def test_flops_are_saved_by_the_cause_that_saves_them() -> None:
    dense = flops()
    attention, feed_forward = 48 * (48 + 2 * 16 + 48), 3 * 48 * 96
    assert dense == {"layers": 2 * 2 * (attention + feed_forward), "not_activated": 0, "head": 2 * 272 * 48}
    whole = dense["layers"] + dense["head"]
    assert flops_saved(dense, dense) == {"pruned": 0, "not_activated": 0, "vocabulary": 0}
    pruned = flops_saved(dense, flops(num_hidden_layers=1, vocab_size=136))
    assert pruned["pruned"] == pytest.approx(dense["layers"] / 2 / whole, abs=1e-4)
    assert pruned["vocabulary"] == pytest.approx(dense["head"] / 2 / whole, abs=1e-4)
    # Six experts of 32 neurons, two of them active: as wide as before while all are, and the router on top.
    routed = flops("qwen3_moe", intermediate_size=192, head_dim=8, tie_word_embeddings=True)
    wide = flops(intermediate_size=192)
    saved = flops_saved(wide, routed)
    experts, router = 2 * 2 * 3 * 48 * 192, 2 * 2 * 6 * 48
    assert saved["pruned"] == 0
    assert saved["not_activated"] == pytest.approx(
        (experts * 4 / 6 - router) / (wide["layers"] + wide["head"]), abs=1e-4
    )
