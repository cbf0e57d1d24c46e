"""Curves over a logarithmic axis of epsilon, several in a panel, as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PANEL, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500, 320, 52, 180, 34, 44
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#7b4b94", "#b08900", "#555555")


@dataclass(frozen=True)
class Curve:
    """Points by ascending x; dashed where ``dashed``, in the colour of that number."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    ticks: Sequence[float]
    curves: Sequence[Curve]


def drawing(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    body = "".join(f'<g transform="translate({at * PANEL} 0)">{_panel(p)}</g>' for at, p in enumerate(panels))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{PANEL * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    return f'{head} {style}><rect width="100%" height="100%" fill="white"/>{body}</svg>\n'


def _panel(panel: Panel) -> str:
    values = [y for curve in panel.curves for _, y in curve.points]
    unit = 10.0 ** math.floor(math.log10(max(values) - min(values)))
    if (max(values) - min(values)) / unit < 4:
        unit /= 2
    low, high = math.floor(min(values) / unit) * unit, math.ceil(max(values) / unit) * unit
    right, bottom = PANEL - RIGHT, HEIGHT - BOTTOM
    least, most = math.log(panel.ticks[0]), math.log(panel.ticks[-1])

    def x(value: float) -> float:
        return LEFT + (right - LEFT) * (math.log(value) - least) / (most - least)

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * (value - low) / (high - low)

    found = [f'<text x="8" y="18" font-weight="bold">{panel.title}</text>']
    for step in range(round((high - low) / unit) + 1):
        value = low + step * unit
        found.append(f'<path d="M{LEFT} {y(value):.1f}H{right}" stroke="#ddd"/>')
        found.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for tick in panel.ticks:
        found.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + right) / 2
    found.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{panel.x_label}</text>')
    for at, curve in enumerate(panel.curves):
        colour = COLOURS[curve.colour]
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"{dash}'
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in curve.points)
        found.append(f'<path d="M{path}" {stroke}/>')
        found += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in curve.points]
        line = TOP + 8 + 18 * at
        found.append(f'<path d="M{right + 12} {line}h22" {stroke}/>')
        found.append(f'<text x="{right + 39}" y="{line + 4}">{curve.label}</text>')
    return "".join(found)
