"""The findings on a hospital's data as one HTML file, for the hospital alone.

Source: notes/users.md section 1. Rules: no script, no font, no address outside the file; every value is
escaped, because names of columns are anybody's; it holds counts of records, and so says that it stays here.
"""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from client.quality import Report, Summary

WIDTH_PX, HEIGHT_PX = 240, 48
_BAR = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {}</title></rect>')


def render(report: Report, name: str) -> str:
    """The page on a source for the contract of ``name``.

    Guarantee: names_are_never_markup - whatever a column or a code is called.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("client").joinpath("templates/quality.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(report=report, name=name, bars=bars)


def bars(column: Summary) -> Markup:
    """A column's values as bars, each with its place and count as its title."""
    most = max((count for _, count in column.bars), default=0)
    if not most:
        return Markup()
    width = WIDTH_PX / len(column.bars)
    drawn = Markup().join(
        _BAR.format(
            place * width, HEIGHT_PX * (1 - count / most), max(width - 1, 0.5), HEIGHT_PX * count / most,
            escape(label), count,
        )
        for place, (label, count) in enumerate(column.bars)
    )  # fmt: skip
    opened = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">').format(
        column.name, WIDTH_PX, HEIGHT_PX
    )
    return opened + drawn + Markup("</svg>")
