"""The report as a file: what stands where, that nobody's words are markup, and how a browser shows it."""

import json
import math
import re
import shutil
import struct
import subprocess
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final, get_args

import pytest
from typer.testing import CliRunner

from common.audit import charts
from common.audit.claims import Facts, read_facts
from common.audit.cli import app
from common.audit.evidence import Evidence, read_evidence
from common.audit.notices import Notice
from common.audit.report import ranges, render
from common.audit.verify import verify
from common.identity import fingerprint, public_key
from common.ledger.entries import Approval, Entry
from tests.common.audit.federation import Federation

PAGE: Final = Path(__file__).parents[3] / "common" / "AUDIT.md"
SECTIONS: Final = (
    "headline", "exceptions", "budgets", "epsilon", "studies", "claims", "integrity", "not-covered",
)  # fmt: skip
HOSTILE: Final = (
    """</title></style><script>alert('x')</script><img src=x onerror="alert(1)"> ' " {{ 7*7 }} &amp;"""
)
TAGS: Final = frozenset(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "h3",
        "span",
        "main",
        "section",
        "strong",
        "p",
        "code",
        "nav",
        "ol",
        "ul",
        "li",
        "a",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "div",
        "figure",
        "footer",
        "svg",
        "rect",
        "path",
        "text",
        "line",
        "circle",
    ]
)
TIMES: Final = frozenset({"time", "submitted", "ended", "expires", "first", "last", "opened", "kind"})


class Page(HTMLParser):
    """Every tag with its attributes, the ids in order, and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += data

    def count(self, tag: str, name: str) -> int:
        return sum(t == tag and name in (a.get("class") or "").split() for t, a in self.tags)


@pytest.fixture
def facts(ran: Federation, evidences: list[Evidence]) -> Facts:
    return read_facts(verify(evidences, ran.trust), ran.trust)


def private_only(facts: Facts) -> Facts:
    return replace(facts, studies=facts.studies[:1])


def test_sections_stand_in_their_order(facts: Facts) -> None:
    page = Page(render(facts))
    assert tuple(a["id"] for t, a in page.tags if t == "section") == SECTIONS
    assert page.tags[1] == ("html", {"lang": "en"}) or page.tags[0] == ("html", {"lang": "en"})
    assert re.search(
        r"<title>Privacy audit report, \d{4}-\d\d-\d\d \d\d:\d\d UTC: verified</title>", render(facts)
    )


def test_a_report_needs_nothing_else(facts: Facts) -> None:
    page = render(facts)
    for forbidden in (
        "http:",
        "https:",
        "<script",
        "url(",
        "@import",
        "javascript:",
        "<link",
        "<iframe",
        "<object",
    ):
        assert forbidden not in page.lower()
    assert "default-src 'none'" in page
    for tag, attributes in Page(page).tags:
        assert not {"src", "srcset", "data", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "a" or (attributes["href"] or "").startswith("#")
    assert "@media print" in page


def hostile(value: Any, name: str = "") -> Any:
    """The same facts with hostile words in every text but times, which the ledger's form admits nothing else as."""
    if isinstance(value, str):
        return value if name in TIMES else HOSTILE
    if isinstance(value, tuple):
        return tuple(hostile(inner, name) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: hostile(getattr(value, f.name), f.name) for f in fields(value) if f.name != "view"}
        return replace(value, **changed)
    return value


def test_words_in_a_ledger_are_never_markup(facts: Facts) -> None:
    page = render(hostile(facts))
    found = Page(page)
    assert {tag for tag, _ in found.tags} <= TAGS
    assert "<script" not in page.lower()
    assert "49" not in re.sub(r"[0-9.]*49[0-9.]+|[0-9.]+49[0-9.]*", "", found.text)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert HOSTILE in found.text
    # Everything that a person or a party may have written is shown, not dropped.
    assert found.text.count("alert('x')") > 100
    for study in facts.studies:
        assert charts.timeline(hostile(study)).count("<script") == 0


def test_signed_words_of_a_person_are_shown_as_they_are(ran: Federation, evidences: list[Evidence]) -> None:
    def spoken(entries: list[Entry]) -> None:
        at = next(i for i, entry in enumerate(entries) if isinstance(entry, Approval))
        entries[at] = entries[at].model_copy(update={"reason": "<script>alert(1)</script> & so on"})

    shown = [evidences[0], ran.rewritten(evidences[1], spoken)]
    page = render(read_facts(verify(shown, ran.trust), ran.trust))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in page


def test_each_chart_has_a_table_twin(facts: Facts) -> None:
    found = Page(render(facts))
    views = sum(len(register.accounts) for register in facts.registers)
    for name in ("spent", "reserved", "remaining"):
        assert found.count("rect", name) == views == found.count("tr", "bar")
    points = sum(len(register.points) for register in facts.registers)
    assert found.count("circle", "point") == points == found.count("tr", "point") > 0
    courses = [course for study in facts.studies for course in study.courses]
    assert found.count("rect", "charged") == sum(bool(course.charged) for course in courses) > 0
    assert found.count("tr", "course") == len(courses)
    marks = found.count("circle", "decision") + found.count("path", "decision")
    assert marks == sum(len(course.decisions) for course in courses) > 0
    drawings = sum(tag == "svg" for tag, _ in found.tags)
    assert drawings == 2 * len(facts.registers) + len(facts.studies)


def test_bars_add_up_to_the_cap(facts: Facts) -> None:
    account = facts.registers[0].accounts[0]
    for spent, reserved, parts in (
        (0.0, 0.0, (0.0, 0.0, 1.0)),
        (1.5, 0.75, (0.5, 0.25, 0.25)),
        (2.0, math.inf, (2 / 3, 1 / 3, 0.0)),
        (math.inf, 0.0, (1.0, 0.0, 0.0)),
        (9.0, 1.0, (1.0, 0.0, 0.0)),
    ):
        changed = replace(account, cap=3.0, spent=spent, reserved=reserved)
        drawing = charts.budget_bars(replace(facts.registers[0], accounts=(changed,)))
        widths = [float(width) for width in re.findall(r'<rect [^>]*width="([0-9.]+)"', drawing)]
        assert [width / sum(widths) for width in widths] == pytest.approx(parts, abs=1e-3)


def test_a_study_without_privacy_is_infinite_and_first(facts: Facts) -> None:
    found = Page(render(facts))
    before_exceptions = found.text[: found.text.index("1 Exceptions\n")]
    assert (
        "Without differential privacy, epsilon infinite for ever where charged: plain." in before_exceptions
    )
    rows = found.text[found.text.index("The gravest first") :]
    assert rows.index("no differential privacy") < rows.index("smaller cohort")
    assert "Epsilon is infinite for ever" in found.text
    assert "infinite" in charts.epsilon_steps(facts.registers[0])


def test_a_study_without_masks_is_the_first_line(facts: Facts) -> None:
    """Also of a report that failed."""
    assert "WITHOUT MASKS" not in Page(render(facts)).text
    unmasked = replace(
        facts, verdict="failed", studies=(replace(facts.studies[0], masked=False), *facts.studies[1:])
    )
    text = Page(render(unmasked)).text
    first = text[text.index("UTC", text.index("evidence as of")) :].split("\n", 1)[1].strip()
    assert first.startswith(f"WITHOUT MASKS, the hub sees every update of: {facts.studies[0].name}.")


def test_a_failed_report_says_so_first(facts: Facts) -> None:
    wrong = Notice("failed check", "hub", "", "tree: it does not hold")
    text = Page(render(replace(facts, verdict="failed", notices=(wrong, *facts.notices)))).text
    assert text.index("FAILED") < text.index("1 check against") < text.index("1 Exceptions")
    assert "Rely on nothing below" in text
    text = Page(render(replace(facts, verdict="self-consistent only", missing=("Holy Cross", "hub")))).text
    assert text.index("SELF-CONSISTENT ONLY") < text.index("No evidence was given of Holy Cross, hub")


def test_a_report_of_nothing(ran: Federation, facts: Facts) -> None:
    text = Page(render(replace(facts, notices=(), registers=(), studies=(), ledgers=()))).text
    for said in (
        "None.",
        "No hospital's evidence was given.",
        "Nothing was charged.",
        "No study is in this evidence.",
    ):
        assert said in text
    study = replace(facts.studies[0], submitted="", ended="", courses=())
    assert "nothing happened yet" in charts.timeline(study)
    only = replace(
        facts.registers[0], accounts=tuple(replace(a, cap=None) for a in facts.registers[0].accounts)
    )
    assert "no cap" in charts.budget_bars(only)
    assert "none" in Page(render(replace(facts, registers=(only,)))).text


def test_ranges_of_rounds() -> None:
    assert [ranges(numbers) for numbers in ((), (1,), (1, 2, 3), (1, 2, 4, 7, 8))] == [
        "",
        "1",
        "1-3",
        "1-2, 4, 7-8",
    ]


@pytest.mark.parametrize("top", [1e-9, 0.04, 0.7, 1.0, 3.0, 8.0, 99.0, 10_000.0])
def test_ticks_are_few_and_round(top: float) -> None:
    ticks = list(charts._ticks(top))
    assert 3 <= len(ticks) <= 7
    assert ticks[0] == 0
    assert ticks[-1] <= top * 1.000001


def test_the_same_facts_give_the_same_bytes(ran: Federation, evidences: list[Evidence], facts: Facts) -> None:
    again = read_facts(verify(list(reversed(evidences)), ran.trust), ran.trust)
    assert render(facts) == render(again)


# -- commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(evidences: list[Evidence], tmp_path: Path) -> list[str]:
    for evidence in evidences:
        (tmp_path / f"{evidence.party}.zip").write_bytes(evidence.to_bytes())
    return [str(tmp_path / f"{evidence.party}.zip") for evidence in evidences]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_report_command(ran: Federation, files: list[str], tmp_path: Path) -> None:
    trust, out = fingerprint(public_key(ran.hub_key)), tmp_path / "report.html"
    done = run("report", *files, "--trust", trust, "-o", str(out))
    exceptions = len(
        read_facts(verify([read_evidence(Path(f)) for f in files], ran.trust), ran.trust).notices
    )
    assert (done.exit_code, done.stdout) == (
        0,
        f"{out}: verified; studies: 2, exceptions: {exceptions}\n",
    )
    assert "VERIFIED" in out.read_text(encoding="utf-8")
    assert trust in out.read_text(encoding="utf-8")
    again = run("report", *files, "--trust", trust, "-o", str(out), "--json")
    assert (again.exit_code, json.loads(again.stdout)["code"]) == (3, "audit.out")
    done = run("report", *files, "-o", str(tmp_path / "untrusted.html"), "--json")
    envelope = json.loads(done.stdout)
    assert (done.exit_code, envelope["code"]) == (5, "audit.untrusted")
    assert {f.name for f in fields(Facts)} < set(envelope["data"])
    sheet = envelope["data"]["studies"][0]["sheet"]
    assert {"key", "label", "text"} == set(sheet[0])


def test_a_report_is_written_of_evidence_that_fails(
    ran: Federation, evidences: list[Evidence], files: list[str], tmp_path: Path
) -> None:
    broken = replace(evidences[1], leaves=evidences[1].leaves[:-1])
    Path(files[1]).write_bytes(broken.to_bytes())
    out = tmp_path / "report.html"
    done = run("report", *files, "--trust", fingerprint(public_key(ran.hub_key)), "-o", str(out))
    assert done.exit_code == 5
    assert ">FAILED<" in out.read_text(encoding="utf-8")


def test_budgets_command(ran: Federation, files: list[str]) -> None:
    trust = fingerprint(public_key(ran.hub_key))
    done = run("budgets", *files, "--trust", trust)
    assert done.exit_code == 0
    assert done.stdout.endswith("verified\n")
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["St. Mary", "Northgate", "Riverside", "Holy Cross"]
    assert [cell.strip() for cell in rows[0][2:]] == [
        "infinite / 3",
        "infinite / 3",
        "0.000001",
        "5",
        "0 like plain",
    ]
    done = run("budgets", *files[:3], "--json")
    data = json.loads(done.stdout)["data"]
    assert (done.exit_code, data["verdict"]) == (5, "self-consistent only")
    assert data["missing"] == ["Riverside", "Holy Cross"]
    assert data["registers"][0]["accounts"][0]["spent"] == "infinite"


# -- a browser ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_report(facts: Facts, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render(hostile(facts)), encoding="utf-8")

    def chromium(*arguments: str) -> str:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [*command, profile, *arguments, page.as_uri()], capture_output=True, timeout=120, check=True
        )
        return done.stdout.decode("utf-8")

    chromium("--window-size=1200,1600", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 1600)
    assert len(data) > 20_000
    dom = chromium("--dump-dom")
    assert 'class="verdict"' in dom
    assert "<script" not in dom
    assert "Every member" not in dom


# -- the auditor's page ------------------------------------------------------------------------------------


def entry_fields() -> dict[str, set[str]]:
    return {kind.model_fields["type"].default: set(kind.model_fields) for kind in get_args(Entry)}


def test_every_field_and_section_of_the_auditors_page_exists(facts: Facts) -> None:
    page = PAGE.read_text(encoding="utf-8")
    known = entry_fields()
    table = page[page.index("## Which field helps") :]
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)`", table)
    assert len(named) > 20
    for kind, field in named:
        assert field in known[kind], f"{kind}.{field}"
    assert {kind for kind, _ in named} == set(known)
    sections = re.findall(r"`#([a-z-]+)`", page)
    assert set(sections) == set(SECTIONS)
    assert set(sections) <= {a.get("id") for _, a in Page(render(facts)).tags}
    for rule in ("164.312(b)", "Art. 30", "Art. 35", "Art. 12", "11.10(e)", "800-226"):
        assert rule in table


def test_every_check_is_on_the_auditors_page(ran: Federation, evidences: list[Evidence]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = {check.name for check in verify(evidences, ran.trust).checks}
    # "sum" is what recompute checks.
    assert made | {"sum"} == set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE))
