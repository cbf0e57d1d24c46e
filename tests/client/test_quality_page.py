"""The page of a data check: whole, for the hospital alone, and without anything that could run."""

import re
from xml.etree import ElementTree

from client.quality import Finding, Report, Summary
from client.quality_page import bars, render

ODD = '<script>alert("x")</script> & \'"'
REPORT = Report(
    "csv:/srv/a.csv", 10, 8,
    [Finding("conformance", True, ODD, "rule " + ODD, 3, "remedy " + ODD), Finding("plausibility", False, "age", "r", 1, "m")],
    [Summary(ODD, "1, 0 to 1", 2, ((ODD, 5), ("b", 3), ("c", 0))), Summary("empty", "words", 10, ())],
)  # fmt: skip


def test_names_are_never_markup() -> None:
    page = render(REPORT, ODD)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    for forbidden in ("http://", "https://", "src=", "@import", "javascript:"):
        assert forbidden not in page


def test_the_page_says_what_was_found_and_that_it_stays() -> None:
    page = render(REPORT, "study")
    assert "does not leave the hospital" in page
    assert "1 errors" in page
    assert "20.0 %" in page
    assert re.findall(r'<tr class="(\w+)"', page) == ["error", "note"]
    holds = render(Report("a", 1, 1), "study")
    assert "the contract holds" in holds


def test_bars_are_drawn_to_the_counts() -> None:
    drawing = ElementTree.fromstring(str(bars(REPORT.columns[0])))  # noqa: S314 - drawn just now
    heights = [float(bar.attrib["height"]) for bar in drawing]
    assert heights[0] == 48
    assert heights[1] == round(48 * 3 / 5, 1)
    assert heights[2] == 0
    assert drawing[0][0].text == f"{ODD}: 5"
    assert bars(REPORT.columns[1]) == ""
