"""A plot of benchmarks/gemm.py's results: speed-up over the number of tokens, and the share of the
roofline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.gemm_cases import TARGET_SHAPE

__all__ = ["plot"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 420, 300, 60, 40, 90
_COLOURS = ["#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#00798c", "#8d6b94", "#444444"]


def _panel(
    title: str, x0: int, series: dict[str, list[tuple[int, float]]], tick: Callable[[float], str]
) -> list[str]:
    """One panel: a line for each series of (tokens, value), tokens on a logarithmic axis."""
    tokens = sorted({m for points in series.values() for m, _ in points})
    most = max(value for points in series.values() for _, value in points) * 1.1
    low, high = math.log2(tokens[0]), max(math.log2(tokens[-1]), math.log2(tokens[0]) + 1)

    def place(m: float, value: float) -> str:
        return f"{x0 + (math.log2(m) - low) / (high - low) * _WIDTH:.1f},{_TOP + _HEIGHT - value / most * _HEIGHT:.1f}"

    parts = [
        f'<text x="{x0}" y="{_TOP - 15}" font-weight="bold">{escape(title)}</text>',
        f'<rect x="{x0}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        f'stroke="#999"/>',
    ]
    for m in tokens:
        x, _ = place(m, 0).split(",")
        parts.append(f'<text x="{x}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{m}</text>')
    for step in range(6):
        value = most * step / 5
        _, y = place(tokens[0], value).split(",")
        parts.append(f'<text x="{x0 - 6}" y="{y}" text-anchor="end">{tick(value)}</text>')
    for i, (name, points) in enumerate(series.items()):
        colour, line = (
            _COLOURS[i % len(_COLOURS)],
            " ".join(place(*point) for point in sorted(points)),
        )
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{x0 + _WIDTH + 6}" y="{_TOP + 14 * (i + 1)}" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    return parts


def _roofline_share(result: dict[str, Any], row: dict[str, Any]) -> float:
    """Time that bytes or operations need at the measured limits (int8 counts as twice fp16), over
    the time taken.
    """
    moved = row["gb_per_s"] / result["copy_gb_per_s"]
    return float(max(moved, row["tops"] / (2 * result["fp16_tflops"])))


def _series(
    rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        series.setdefault(row["scheme"], []).append((row["m"], value(row)))
    return series


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the SVG, for TARGET_SHAPE or else the first shape there is; nothing without rows."""
    rows = [row for row in result["rows"] if row.get("chosen")]
    if not rows:
        return
    shapes = {row["shape"] for row in rows}
    shape = TARGET_SHAPE if TARGET_SHAPE in shapes else rows[0]["shape"]
    rows = [row for row in rows if row["shape"] == shape]
    right = _LEFT + _WIDTH + _GAP + 90
    title = f"{result['device']}, {shape}: speed-up over fp16, by M"
    parts = _panel(title, _LEFT, _series(rows, lambda row: row["speedup"]), "{:.1f}".format)
    parts += _panel(
        "share of the roofline, by M",
        right,
        _series(rows, lambda row: _roofline_share(result, row)),
        "{:.0%}".format,
    )
    size = f'width="{right + _WIDTH + _GAP + 40}" height="{_TOP + _HEIGHT + 40}"'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n",
        encoding="utf-8",
    )
