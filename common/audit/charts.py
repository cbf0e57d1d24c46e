"""The three charts of a report, as SVG inside the page.

Source: notes/users.md section 3.4. Rules: each mark has a row in the table beside it and a class that says
what it is; solid, striped and empty, and full and broken lines, tell apart what colour tells apart; nothing
refers to anything outside the drawing; text is escaped by the tree that it is put into.
"""

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from common.audit.claims import Account, Register, StudyFacts
from common.audit.sheet import down, up, when

WIDTH: Final = 960
_LEFT: Final = 190
_RIGHT: Final = 24
_ROW: Final = 30
_BAR: Final = 18
_STRIPE: Final = 6
_PLOT_HEIGHT: Final = 220
_MINUTE: Final = "%Y-%m-%dT%H:%MZ"


def budget_bars(register: Register) -> Markup:
    """Spent, reserved and remaining of a register's caps, a bar a view."""
    drawing = _drawing(f"Budget of {register.hospital}", len(register.accounts) * 46 + 6)
    for row, account in enumerate(register.accounts):
        _bar(drawing, account, 4 + row * 46)
    return _markup(drawing)


def _bar(drawing: Element, account: Account, top: float) -> None:
    label = "at most t collude" if account.view == "t" else "all others collude"
    _text(drawing, 0, top + 14, label)
    if account.cap is None:
        _text(drawing, _LEFT, top + 14, "no cap")
        return
    span = WIDTH - _LEFT - _RIGHT
    spent = min(account.spent / account.cap, 1.0) * span
    reserved = min((account.spent + account.reserved) / account.cap, 1.0) * span - spent
    remaining = span - spent - reserved
    _rectangle(drawing, "spent", _LEFT, top, spent)
    _rectangle(drawing, "reserved", _LEFT + spent, top, reserved)
    stripes = range(1, int(reserved // _STRIPE) + 1)
    path = "".join(f"M{_n(_LEFT + spent + i * _STRIPE)} {_n(top)}v{_BAR}" for i in stripes)
    SubElement(drawing, "path", {"class": "stripes", "d": path or "M0 0"})
    _rectangle(drawing, "remaining", _LEFT + spent + reserved, top, remaining)
    said = f"spent {up(account.spent)}, reserved {up(account.reserved)}, remaining {down(account.remaining)}"
    _text(drawing, _LEFT, top + 33, f"{said} of {account.cap:g}", "small")


def epsilon_steps(register: Register) -> Markup:
    """The odometer over the charges of a register, a full line for the t view, a broken one for the other."""
    points = register.points
    drawing = _drawing(f"Epsilon of {register.hospital} over its charges", _PLOT_HEIGHT + 44)
    caps = [account.cap for account in register.accounts if account.cap is not None]
    finite = [e for p in points for e in (p.epsilon.t, p.epsilon.w) if e < math.inf]
    top = max([*caps, *finite, 1e-9]) * 1.08
    left, right = 56.0, float(WIDTH - _RIGHT)
    last = max((point.charge for point in points), default=1)

    def x(charge: int) -> float:
        return left + (right - left) * charge / last

    def y(epsilon: float) -> float:
        return 8 + _PLOT_HEIGHT * (1 - min(epsilon, top) / top)

    for tick in _ticks(top / 1.08):
        _line(drawing, "grid", left, y(tick), right, y(tick))
        _text(drawing, left - 6, y(tick) + 4, f"{tick:g}", "small end")
    for account in register.accounts:
        if account.cap is not None:
            _line(drawing, f"cap {account.view}", left, y(account.cap), right, y(account.cap))
    for view in ("w", "t"):
        path, values = f"M{_n(left)} {_n(y(0))}", [getattr(point.epsilon, view) for point in points]
        for point, value in zip(points, values, strict=True):
            path += f"H{_n(x(point.charge))}V{_n(y(value))}"
        SubElement(drawing, "path", {"class": f"course {view}", "d": path})
    for point in points:
        place = {"cx": _n(x(point.charge)), "cy": _n(y(point.epsilon.t))}
        SubElement(drawing, "circle", {"class": "point", "r": "2.5", **place})
    if len(finite) < 2 * len(points):
        _text(drawing, right, 20, "infinite", "small end")
    _text(drawing, left, _PLOT_HEIGHT + 26, "charge 0", "small")
    _text(drawing, right, _PLOT_HEIGHT + 26, f"charge {last}", "small end")
    return _markup(drawing)


def timeline(study: StudyFacts) -> Markup:
    """A study over time, a row a hospital: decisions as marks, from the first to the last charge as a bar."""
    times = [
        *(time for time in (study.submitted, study.ended) if time),
        *(d.time for course in study.courses for d in course.decisions),
        *(time for course in study.courses for time in (course.first, course.last) if time),
    ]
    drawing = _drawing(f"{study.name} over time", len(study.courses) * _ROW + 40)
    if not times:
        _text(drawing, 0, 20, "nothing happened yet")
        return _markup(drawing)
    minutes = {time: datetime.strptime(time, _MINUTE).replace(tzinfo=UTC).timestamp() for time in times}
    start, end = min(minutes.values()), max(minutes.values())
    span = max(end - start, 60.0)

    def x(time: str) -> float:
        return _LEFT + 10 + (WIDTH - _LEFT - _RIGHT - 20) * (minutes[time] - start) / span

    bottom = len(study.courses) * _ROW + 6
    for name, time in (("submitted", study.submitted), ("ended", study.ended)):
        if time:
            _line(drawing, f"mark {name}", x(time), 2, x(time), bottom)
    for row, course in enumerate(study.courses):
        middle = 6 + row * _ROW + _ROW / 2
        _text(drawing, 0, middle + 4, course.hospital)
        _line(drawing, "grid", _LEFT, middle, WIDTH - _RIGHT, middle)
        if course.first:
            width = max(x(course.last) - x(course.first), 3)
            _rectangle(drawing, "charged", x(course.first), middle - 5, width, 10)
        for decision in course.decisions:
            _decision(drawing, decision.decision, x(decision.time), middle)
    _text(drawing, _LEFT, bottom + 18, when(min(times)), "small")
    if end > start:
        _text(drawing, WIDTH - _RIGHT, bottom + 18, when(max(times)), "small end")
    return _markup(drawing)


def _decision(drawing: Element, decision: str, x: float, y: float) -> None:
    if decision == "approved":
        SubElement(drawing, "circle", {"class": "decision approved", "cx": _n(x), "cy": _n(y), "r": "7"})
    elif decision == "denied":
        cross = f"M{_n(x - 6)} {_n(y - 6)}l12 12m0 -12l-12 12"
        SubElement(drawing, "path", {"class": "decision denied", "d": cross})


def _ticks(top: float) -> Iterable[float]:
    """Round steps from 0 to ``top``, at most six."""
    unit = 10.0 ** math.floor(math.log10(top))
    step = next(unit * k for k in (0.2, 0.5, 1.0, 2.0) if top / (unit * k) <= 6)
    return [step * i for i in range(int(top / step + 1e-9) + 1)]


def _drawing(title: str, height: float) -> Element:
    drawing = Element("svg", {"viewBox": f"0 0 {WIDTH} {_n(height)}", "role": "img"})
    SubElement(drawing, "title").text = title
    return drawing


def _rectangle(drawing: Element, name: str, x: float, y: float, width: float, height: float = _BAR) -> None:
    place = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height)}
    SubElement(drawing, "rect", {"class": name, **place})


def _line(drawing: Element, name: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2)}
    SubElement(drawing, "line", {"class": name, **ends})


def _text(drawing: Element, x: float, y: float, text: str, name: str = "label") -> None:
    SubElement(drawing, "text", {"class": name, "x": _n(x), "y": _n(y)}).text = text


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _markup(drawing: Element) -> Markup:
    return Markup(tostring(drawing, encoding="unicode"))  # noqa: S704 - a tree, escaped when it was written
