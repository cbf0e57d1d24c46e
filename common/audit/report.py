"""The report as one HTML file that opens anywhere, prints, and needs nothing else.

Source: DESIGN "Ledger"; notes/users.md section 3.4. Rules: no script, no font, no image, no address outside
the file; every value is escaped, because a ledger's words are anybody's; no clock: the same facts give the
same bytes.
"""

from importlib.resources import files
from itertools import groupby

from jinja2 import Environment, StrictUndefined

from common.audit import charts
from common.audit.claims import Facts
from common.audit.sheet import down, up, when
from common.version import SOFTWARE_VERSION


def render(facts: Facts) -> str:
    """The page.

    Guarantee: words_in_a_ledger_are_never_markup - whatever stands in a reason, a name or a purpose.
    Guarantee: a_report_needs_nothing_else - it refers to no other file or address, and runs no script.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"up": up, "down": down, "rounds": ranges, "when": when}
    source = files("common.audit").joinpath("templates/report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(facts=facts, charts=charts, version=SOFTWARE_VERSION)


def ranges(numbers: tuple[int, ...]) -> str:
    """Rounds in print: "1-4, 6"."""
    steps = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in steps]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
