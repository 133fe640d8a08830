"""A small plot as SVG: a figure against a cost on a logarithmic axis, a line with error bars for each source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 42
COLOURS = 6

Point = tuple[float, float, float]
"""x above 0, y, and the standard error of y."""
Scale = Callable[[float], float]
"""A value to its place in pixels."""


def plot(
    title: str, axis: str, series: Mapping[str, Sequence[Point]], levels: Mapping[str, float], names: Sequence[str]
) -> str:
    """An <svg>.

    Args:
        title: of the plot.
        axis: what x is.
        series: points by the name of their line, in order of x.
        levels: horizontal dashed lines by name, e.g. of real images.
        names: of all lines of the page, whose place gives a line its colour.
    """
    points = [p for line in series.values() for p in line]
    low, high = _span([y + s * e for _, y, e in points for s in (-1, 1)] + list(levels.values()))
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)
    if last / first < 1.2:  # one x only
        first, last = first / 2, last * 2

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (0.04 + 0.92 * math.log(x / first) / math.log(last / first))

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [f'<text x="4" y="16" font-size="13" font-weight="600">{escape(title)}</text>']  # from the edge: long names
    for y in ticks(low, high):
        at = down(y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" font-size="11" text-anchor="end">{y:.6g}</text>')
    for x in _marks(first, last, sorted({x for x, _, _ in points})):
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" font-size="11" text-anchor="middle">{x:.3g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - BOTTOM + 32}" font-size="11" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    for name, y in levels.items():
        at = down(y)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--pale)" stroke-dasharray="5 4">'
            f"<title>{escape(name)}: {y:.6g}</title></line>"
        )
    for name, line in series.items():
        parts.append(_line(name, line, names.index(name), across, down))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {escape(axis)}">'
        + "".join(parts)
        + "</svg>"
    )


def _line(name: str, points: Sequence[Point], number: int, across: Scale, down: Scale) -> str:
    path, stroke = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, _ in points), colour(number)
    parts = [f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="1.8"{dashes(number)}/>']
    for x, y, error in points:
        at, top, bottom = across(x), down(y + error), down(y - error)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{stroke}"/>')
        parts.append(
            f'<circle cx="{at:.1f}" cy="{down(y):.1f}" r="3.5" fill="{stroke}">'
            f"<title>{escape(name)}: {y:.6g} ± {error:.2g} at {x:.4g}</title></circle>"
        )
    return "".join(parts)


def legend(names: Sequence[str]) -> str:
    """Names with the colours of their lines, as a paragraph."""
    drawn = (
        f'<svg width="26" height="10" aria-hidden="true" style="display: inline"><line x1="0" x2="26" y1="5" y2="5" '
        f'stroke="{colour(i)}" stroke-width="1.8"{dashes(i)}/><circle cx="13" cy="5" r="3.5" fill="{colour(i)}"/></svg> {escape(name)}'
        for i, name in enumerate(names)
    )
    return '<p class="legend">' + " &emsp; ".join(drawn) + "</p>"


def colour(number: int) -> str:
    """Of a line."""
    return f"var(--s{number % COLOURS})"


def dashes(number: int) -> str:
    """Of a line whose colour another has."""
    again = number // COLOURS
    return f' stroke-dasharray="{6 * again} 3"' if again else ""


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest with a margin."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers between low and high, 1, 2 or 5 times a power of ten apart, at most `wanted` + 1."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _marks(first: float, last: float, points: Sequence[float]) -> list[float]:
    """Values of x that are written under the axis: those of points that are apart enough."""
    kept: list[float] = []
    apart = 7 * max(len(f"{x:.3g}") for x in points) / (WIDTH - LEFT - RIGHT)  # of the axis: a text, and room
    for x in points:
        if not kept or math.log(x / kept[-1]) > max(0.15, apart) * math.log(last / first):
            kept.append(x)
    return kept
