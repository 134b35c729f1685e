"""Line charts as inline SVG: no script, no network, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from plugins.text import printable

__all__ = ["Chart", "Series", "bar", "escape", "line_chart", "table"]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 16, 50
_TICKS, _X_LABELS = 6, 12
_APART = 3.0  # pixels: lines nearer than that look like one ...
_MOSTLY = 0.75  # ... where it is so at most positions


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: for the legend.
        style: its CSS class, "a" to "d", or "limit" for a limit (no markers).
        values: one per position; None leaves a gap and a cross at the upper edge.
    """

    label: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A chart's words and scale.

    Attributes:
        title, description: for screen readers; the description says what the lines show.
        unit: of the vertical axis.
        labels: of the positions on the horizontal axis.
        log: logarithmic vertical axis.
    """

    title: str
    description: str
    unit: str
    labels: Sequence[str]
    log: bool = False


def escape(text: str) -> str:
    """Any text as HTML that shows it, its control characters too."""
    return html.escape(printable(text))


def line_chart(chart: Chart, series: Sequence[Series], key: str) -> str:
    """A figure with the SVG and its legend; `key` makes element ids unique on the page."""
    low, high, ticks = _scale(
        [value for line in series for value in line.values if value is not None], chart.log
    )

    def x(position: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (position + 0.5) / len(chart.labels)

    def y(value: float) -> float:
        share = (
            (math.log10(max(value, 10**low)) - low) / (high - low)
            if chart.log
            else (value - low) / (high - low)
        )
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(share, 0.0), 1.0)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d">',
        f'<title id="{key}-t">{escape(chart.title)}</title><desc '
        f'id="{key}-d">{escape(chart.description)}</desc>',
    ]
    for tick in ticks:
        at = y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" '
            f'text-anchor="end">{_number(tick, chart.log)}</text>'
        )
    parts.append(
        f'<text class="axis" transform="translate(15 {(HEIGHT - BOTTOM + TOP) / 2:.0f}) '
        f'rotate(-90)" '
        f'text-anchor="middle">{escape(chart.unit)}</text>'
    )
    parts += _positions(chart.labels, x)
    over = _coinciding(series, y)
    for place, line in enumerate(series):
        parts += _line(line, chart, x, y, "under" if place in over.values() else "")
    legend = "".join(
        f'<li><svg viewBox="0 0 26 12" aria-hidden="true"><path class="line {line.style}" d="M1 6H25"/>'
        f"{'' if line.style == 'limit' else _marker(line.style, 13, 6)}</svg>{escape(line.label)}"
        f"{f' (lies on: {escape(series[over[place]].label)})' if place in over else ''}</li>"
        for place, line in enumerate(series)
    )
    return f'<figure>{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'


def _coinciding(series: Sequence[Series], y: Callable[[float], float]) -> dict[int, int]:
    """{a line: an earlier one that it mostly hides}; that one is then drawn broad."""

    def alike(one: float | None, other: float | None) -> bool:
        if one is None or other is None:
            return one is other
        return abs(y(one) - y(other)) < _APART

    found: dict[int, int] = {}
    for place, line in enumerate(series):
        for earlier in range(place):
            pairs = zip(line.values, series[earlier].values, strict=True)
            if sum(alike(*pair) for pair in pairs) >= _MOSTLY * len(line.values):
                found[place] = earlier
                break
    return found


def bar(share: float, label: str) -> str:
    """A horizontal bar that fills `share` of its cell."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<span class="bar" role="img" aria-label="{escape(label)}"><i '
        f'style="width:{width:.1f}%"></i></span>'
    )


def _scale(values: list[float], log: bool) -> tuple[float, float, list[float]]:
    """(low, high, ticks); low and high are powers of ten when log, and zeros lie a power below the rest."""
    if log:
        positive = [value for value in values if value > 0]
        bottom = math.floor(math.log10(min(positive))) if positive else -6
        zeros = len(positive) < len(values)
        top = max(math.ceil(math.log10(max(positive))) if positive else 0, bottom + (not zeros))
        powers = [10.0**power for power in range(bottom, top + 1)]
        return bottom - zeros, top, [0.0] * zeros + powers
    low, high = min([0.0, *values]), max([1.0, *values])
    step = 10 ** math.floor(math.log10((high - low) / _TICKS))
    step = next(
        step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= _TICKS
    )
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, high, [low + step * number for number in range(round((high - low) / step) + 1)]


def _number(value: float, log: bool) -> str:
    if not log or value == 0:
        return f"{value:g}"
    power = round(math.log10(value))
    return (
        f'10<tspan dy="-.45em" style="font-size:.75em">{str(power).replace("-", "−")}</tspan>'
        if power
        else "1"
    )


def _positions(labels: Sequence[str], x: object) -> list[str]:
    assert callable(x)
    every = max(1, math.ceil(len(labels) / _X_LABELS))
    shown = [
        number for number in range(len(labels)) if number % every == 0 or number == len(labels) - 1
    ]
    if len(shown) > 1 and shown[-1] - shown[-2] < max(every, 2) and len(labels) > _X_LABELS:
        del shown[-2]  # the last label is a long word
    texts = [
        f'<text class="tick" x="{x(number):.1f}" y="{HEIGHT - BOTTOM + 22}" '
        f'text-anchor="middle">{escape(labels[number])}</text>'
        for number in shown
    ]
    return [
        *texts,
        f'<text class="axis" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 5}" '
        f'text-anchor="middle">decoder layer</text>',
    ]


def _line(line: Series, chart: Chart, x: object, y: object, more: str = "") -> list[str]:
    assert callable(x) and callable(y)
    path, marks, pen = [], [], "M"
    for position, value in enumerate(line.values):
        where = (
            f"{escape(line.label)}, "
            f"{'layer ' if chart.labels[position].isdigit() else ''}{escape(chart.labels[position])}"
        )
        if value is None:
            pen = "M"
            if line.style != "limit":
                marks.append(
                    f'<g class="bad"><title>{where}: not finite or no '
                    f"value</title>{_cross(x(position), TOP + 6)}</g>"
                )
            continue
        path.append(f"{pen}{x(position):.1f} {y(value):.1f}")
        pen = "L"
        if line.style != "limit":
            marks.append(
                f"<g><title>{where}: {value:.3g}</title>{_marker(line.style, x(position), y(value))}</g>"
            )
    style = f"line {line.style} {more}".rstrip()
    return [f'<path class="{style}" d="{"".join(path)}"/>', *marks] if path else marks


def _marker(style: str, x: float, y: float) -> str:
    """A shape for each style, so that colour is not needed to tell lines apart."""
    if style in ("a", "c"):
        return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>'
    return (
        f'<rect class="mark {style}" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2"/>'
    )


def _cross(x: float, y: float) -> str:
    return f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], label: str) -> str:
    """Rows are (CSS class, cells); cells are HTML, the first is the row's heading."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr class="{style}"><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>"
        for style, cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(label)}"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
