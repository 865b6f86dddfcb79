"""The report of a recipe: one JSON and one HTML file, teacher beside every step, loss curves drawn in place.

The page holds no script and loads nothing, as that of a run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.report import render_page
from k2model.compress.train_state import read_curve

WIDTH, HEIGHT = 640, 180
"""Of a drawing, in its own units."""

_POINTS = 400
"""Drawn of a line; the mean of those that fall together."""

_DRAWN = ("loss", "validation_loss", "validation_accuracy")


@dataclass(frozen=True, slots=True)
class Line:
    """One drawn line of a curve, on a scale of its own."""

    name: str
    points: str
    """`x,y x,y ...` as SVG wants them."""
    first: float
    last: float
    low: float
    high: float


def write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write report.json and report.html into `folder`."""
    (folder / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    curves = {line["name"]: curve_lines(read_curve(folder / line["name"])) for line in facts["steps"]}
    (folder / "report.html").write_text(render(facts, curves), encoding="utf-8")


def render(facts: Mapping[str, Any], curves: Mapping[str, Sequence[Line]]) -> str:
    """Return the page."""
    return render_page(
        "compress.html.jinja",
        facts=facts,
        curves={name: lines for name, lines in curves.items() if lines},
        width=WIDTH,
        height=HEIGHT,
        percent=percent,
    )


def curve_lines(curve: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return what is drawn of a step's curve."""
    end = max((row["step"] for row in curve), default=0)
    lines = []
    for name in _DRAWN:
        values = [(row["step"], row[name]) for row in curve if name in row]
        if len(values) < 2 or not end:
            continue
        low, high = min(value for _, value in values), max(value for _, value in values)
        points = [
            f"{WIDTH * step / end:.1f},{HEIGHT - HEIGHT * (value - low) / (high - low or 1):.1f}"
            for step, value in _thinned(values)
        ]
        lines.append(Line(name.replace("_", " "), " ".join(points), values[0][1], values[-1][1], low, high))
    return lines


def _thinned(values: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return at most `_POINTS` points, each the mean of neighbours."""
    size = -(-len(values) // _POINTS)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def percent(value: float | None) -> str:
    """Return a share for people."""
    return "-" if value is None else f"{100 * value:.1f} %"


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the report as lines for a terminal."""
    rows = [("", "accuracy", "macro-F1", "retained", "MB", "FLOPs/token", "tickets/s", "× teacher")]
    for line in facts["steps"]:
        average = line["macro_average"]
        rows.append(
            (
                line["name"],
                percent(average["accuracy"]),
                percent(average["macro_f1"]),
                percent(line.get("retention", {}).get("accuracy")),
                f"{line['bytes'] / 1e6:,.1f}",
                f"{sum(line['flops_per_token'][part] for part in ('layers', 'head')):,.0f}",
                f"{line['tickets_per_second']:,.1f}" if "tickets_per_second" in line else "-",
                f"{line['ratio']:.2f}" if "ratio" in line else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" if not column else f"{cell:>{width}}" for column, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    for line in facts["steps"]:
        for name, spread in line.get("over_seeds", {}).items():
            told = f"{percent(spread['mean'])}, deviation {percent(spread['deviation'])}"
            lines.append(f"{line['name']}: {name.replace('_', '-')} over {facts['seeds']} seeds {told}")
    ending = "done" if facts["done"] else "stopped; the same command goes on"
    return "\n".join([*lines, f"{ending}; report: {facts['report']}"])
