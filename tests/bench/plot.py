"""Straight lines on logarithmic axes: one small panel a series, as SVG."""

import math
from collections.abc import Sequence

PANEL, HEIGHT, LEFT, TOP, BOTTOM = 250, 230, 46, 34, 30
WIDTH = PANEL - LEFT - 14


def log_log(sizes: Sequence[int], series: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """A panel for each (title, values); ``label`` names the common axis of ``sizes``."""
    panels = "".join(_panel(at * PANEL, sizes, *one, label) for at, one in enumerate(series))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{PANEL * len(series)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    return f'{head} {style}><rect width="100%" height="100%" fill="white"/>{panels}</svg>\n'


def _panel(left: float, sizes: Sequence[int], title: str, values: Sequence[float], label: str) -> str:
    def x(size: float) -> float:
        low, high = math.log10(sizes[0]), math.log10(sizes[-1])
        return LEFT + WIDTH * (math.log10(size) - low) / (high - low)

    bottom, top = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - math.log10(value)) / (top - bottom)

    found = [f'<text x="8" y="16" font-weight="bold">{title}</text>']
    for power in range(bottom, top + 1):
        at = y(10**power)
        found.append(f'<path d="M{LEFT} {at:.1f}h{WIDTH}" stroke="#ccc"/>')
        found.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for size in sizes:
        found.append(f'<text x="{x(size):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{size}</text>')
    found.append(f'<text x="{LEFT + WIDTH / 2}" y="{HEIGHT - 2}" text-anchor="middle">{label}</text>')
    points = [(x(size), y(value)) for size, value in zip(sizes, values, strict=True)]
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    found.append(f'<path d="M{path}" fill="none" stroke="#1f6f8b" stroke-width="2"/>')
    found += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="#1f6f8b"/>' for a, b in points]
    return f'<g transform="translate({left} 0)">{"".join(found)}</g>'
