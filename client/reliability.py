"""A reliability plot: of each bin of a score, how often what it says came true.

Source: DeGroot and Fienberg, The Statistician 32 (1983). Rules: drawn from shares that were computed at this
hospital; SVG without a script, each point with its numbers as a title.
"""

from collections.abc import Mapping
from typing import Final

from markupsafe import Markup

from common.errors import RefusedError

SIZE_PX: Final = 320
MARGIN_PX: Final = 40
_COLOURS: Final = ("#4c72b0", "#c44e52", "#55a868")
_POINT: Final = Markup(
    '<circle cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: said {:.2f}, came true {:.2f}</title></circle>'
)


def drawn(models: Mapping[str, Mapping[str, float | None]]) -> str:
    """The plot of each model's shares ``bin 0`` ..., None where a bin is empty.

    Raises: RefusedError for a model whose scores have no bins.
    """
    inside = SIZE_PX - 2 * MARGIN_PX
    parts = [Markup('<path d="M {0} {1} L {1} {0}" stroke="#999" stroke-dasharray="4"/>').format(
        MARGIN_PX, SIZE_PX - MARGIN_PX
    )]  # fmt: skip
    for place, (name, shares) in enumerate(models.items()):
        bins = [shares[key] for key in (f"bin {at}" for at in range(len(shares))) if key in shares]
        if not bins:
            problem = "only a model that says yes or no has a reliability plot"
            raise RefusedError("benefit.plot", problem, remedy="Leave out --out.")
        known = [((at + 0.5) / len(bins), share) for at, share in enumerate(bins) if share is not None]
        points = [(MARGIN_PX + said * inside, SIZE_PX - MARGIN_PX - true * inside) for said, true in known]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks = Markup().join(
            _POINT.format(x, y, name, *pair) for (x, y), pair in zip(points, known, strict=True)
        )
        parts.append(
            Markup('<g fill="{0}" stroke="{0}"><polyline fill="none" points="{1}"/>{2}</g>').format(
                _COLOURS[place % len(_COLOURS)], line, marks
            )
            + Markup('<text x="{}" y="{}" fill="{}">{}</text>').format(
                MARGIN_PX + 8, MARGIN_PX + 14 * (place + 1), _COLOURS[place % len(_COLOURS)], name
            )
        )
    axes = Markup('<rect x="{0}" y="{0}" width="{1}" height="{1}" fill="none" stroke="#222"/>').format(
        MARGIN_PX, inside
    )
    words = Markup(
        '<text x="{}" y="{}">what the model says</text><text x="8" y="24">what came true</text>'
    ).format(SIZE_PX // 2 - 50, SIZE_PX - 12)
    opened = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="reliability" viewBox="0 0 {0} {0}" '
        'font-family="sans-serif" font-size="11">'
    ).format(SIZE_PX)
    return str(opened + axes + Markup().join(parts) + words + Markup("</svg>")) + "\n"
