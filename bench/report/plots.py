"""Plots as SVG, written by hand: no library, and readable in any light.

The colours are those of Okabe and Ito, which people with any colour vision can tell
apart, and no plot relies on them: every bar and line has its name beside it. A plot
brings its own ground, dark where the reader's system is.
"""

__all__ = ["Bar", "Line", "bars", "lines"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.report.results import Spread

_WIDTH = 760
_LABELS = 250
_ROW = 26
_STYLE = """<style>
.ground{fill:#fff}.text{fill:#222}.quiet{fill:#666}.axis{stroke:#bbb}
.ours{fill:#0072b2}.other{fill:#8a8a8a}.limit{fill:#e69f00}
.whisker{stroke:#222;stroke-width:1.5}
.line{fill:none;stroke-width:2.5}
.c0{stroke:#0072b2;fill:#0072b2}.c1{stroke:#e69f00;fill:#e69f00}
.c2{stroke:#009e73;fill:#009e73}.c3{stroke:#cc79a7;fill:#cc79a7}
.c4{stroke:#d55e00;fill:#d55e00}.c5{stroke:#f0e442;fill:#f0e442}
text{font:13px system-ui,sans-serif}.title{font-weight:600;font-size:14px}
@media (prefers-color-scheme:dark){
.ground{fill:#1d1f27}.text{fill:#e6e6e6}.quiet{fill:#a0a0a0}.axis{stroke:#555}
.ours{fill:#56b4e9}.other{fill:#8f8f8f}.whisker{stroke:#e6e6e6}
.c0{stroke:#56b4e9;fill:#56b4e9}}
</style>"""
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5", "12 6")


@dataclass(frozen=True)
class Bar:
    """One contender.

    Attributes:
        name: What stands beside it.
        spread: Its repeats.
        kind: `ours`, `other` or `limit`.
    """

    name: str
    spread: Spread
    kind: str


@dataclass(frozen=True)
class Line:
    """One contender over a size.

    Attributes:
        name: What stands at its end.
        points: Size and figure, in order of size.
    """

    name: str
    points: Sequence[tuple[float, float]]


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Medians as bars, with a stroke from the least to the greatest.

    On a logarithmic scale where the largest is more than thirty times the smallest.
    """
    least = min(row.spread.median for row in rows)
    most = max(row.spread.most for row in rows)
    is_log = least > 0 and most / least > 30
    floor = 10 ** math.floor(math.log10(least)) if is_log else 0.0
    room = _WIDTH - _LABELS - 90

    def x(value: float) -> float:
        if is_log:
            share = math.log(max(value, floor) / floor) / math.log(most / floor)
        else:
            share = value / most
        return _LABELS + room * share

    parts = []
    for index, row in enumerate(rows):
        y = 40 + index * _ROW
        end, (left, right) = (
            x(row.spread.median),
            (x(row.spread.least), x(row.spread.most)),
        )
        middle = y + 9
        parts += [
            (
                f'<text class="text" x="{_LABELS - 8}" y="{y + 14}" text-anchor="end">'
                f"{escape(row.name)}</text>"
            ),
            (
                f'<rect class="{row.kind}" x="{_LABELS}" y="{y}" height="18" '
                f'width="{max(end - _LABELS, 1):.1f}"/>'
            ),
            (
                f'<line class="whisker" x1="{left:.1f}" x2="{right:.1f}" '
                f'y1="{middle}" y2="{middle}"/>'
            ),
            (
                f'<text class="text" x="{max(right, end) + 6:.1f}" y="{y + 14}">'
                f"{_short(row.spread.median)}</text>"
            ),
        ]
    scale = ", logarithmic" if is_log else ""
    return _drawing(f"{title} ({unit}{scale})", 52 + len(rows) * _ROW, parts)


def lines(title: str, units: tuple[str, str], series: Sequence[Line]) -> str:
    """Figures over sizes, both on logarithmic scales."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    height, left, right = 340, 70, _WIDTH - 190
    low, high = min(ys) / 1.3, max(ys) * 1.3

    def at(point: tuple[float, float]) -> tuple[float, float]:
        wide = math.log(point[0] / min(xs)) / math.log(max(xs) / min(xs))
        tall = math.log(point[1] / low) / math.log(high / low)
        return left + (right - left) * wide, height - 50 - (height - 100) * tall

    parts = [
        (
            f'<line class="axis" x1="{left}" x2="{right}" y1="{height - 50}" '
            f'y2="{height - 50}"/>'
        ),
        (
            f'<text class="quiet" x="{(left + right) / 2}" y="{height - 14}" '
            f'text-anchor="middle">{escape(units[0])}, logarithmic</text>'
        ),
    ]
    for value in sorted(set(xs)):
        x, _ = at((value, low))
        parts.append(
            f'<text class="quiet" x="{x:.1f}" y="{height - 32}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    for value in _ticks(low, high):
        _, y = at((min(xs), value))
        parts.append(
            f'<line class="axis" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke-dasharray="2 4"/>'
            f'<text class="quiet" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{value:g}</text>"
        )
    taken: list[float] = []
    for index, line in enumerate(series):
        points = [at(point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line c{index}" fill-opacity="0" points="{path}" '
            f'stroke-dasharray="{_DASHES[index]}"/>'
        )
        parts += [_mark(index, x, y) for x, y in points]
        x, y = points[-1]
        while any(abs(y - other) < 15 for other in taken):
            y += 15
        taken.append(y)
        parts.append(
            f'<text class="text" x="{x + 10:.1f}" y="{y + 4:.1f}">'
            f"{escape(line.name)}</text>"
        )
    return _drawing(f"{title} ({units[1]}, logarithmic)", height, parts)


def _mark(index: int, x: float, y: float) -> str:
    """A disc, a square, a diamond: lines differ in more than their colour."""
    if index % 3 == 0:
        return f'<circle class="c{index}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if index % 3 == 2 else ""
    return (
        f'<rect class="c{index}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        f"{turn}/>"
    )


def _ticks(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    steps = (1, 2, 5)
    values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [value for value in values if low <= value <= high]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _drawing(title: str, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{escape(title)}">\n{_STYLE}\n'
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="6"/>\n'
        f'<text class="text title" x="16" y="24">{escape(title)}</text>\n'
        f"{body}\n</svg>\n"
    )
