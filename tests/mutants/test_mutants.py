"""The report on mutants is of the code that is there, and mutants are what they are said to be."""

from pathlib import Path

import pytest

from tests.mutants import report
from tests.mutants.report import Campaign, Change

ROOT = Path(__file__).parents[2]
SOURCE = """
class Site:
    @property
    def round(self) -> int | None:
        return self.state.round + 1

    def check(self, record: bytes) -> None:
        self.verify(
            record,
        )
        if record not in self.known:
            raise ValueError(f"{len(record) + 1} bytes")
"""


def test_every_survivor_is_of_the_code_that_is_there() -> None:
    campaigns = report.read(report.REPORT.read_text(encoding="utf-8"))
    assert len(campaigns) > 10
    for module, campaign in campaigns.items():
        source = (ROOT / module).read_text(encoding="utf-8")
        for change in campaign.survivors:
            assert report.is_current(change, source), f"{module}: {change}"


def test_a_report_is_read_as_written_and_keeps_explanations() -> None:
    change, other = Change("Site.round", "return 1", "return 2"), Change("Site", "@property", "")
    first = {
        "common/a.py": Campaign("0123abcd", 9, 8, 5, 1, {change: "as `good`", other: report.UNEXPLAINED}),
        "common/b.py": Campaign("00000000", 2, 2, 2, 0, {}),
    }
    text = report.write("# Title\n\nText.\n\n", first)
    assert report.read(text) == first
    assert report.write(text, first) == text
    assert "| `common/a.py` | 0123abcd | 9 | 8 | 5 | 1 | 1 | 1 | 83.3 % |" in text
    again = report.explained(
        Campaign("0123abcd", 9, 9, 7, 1, {change: report.UNEXPLAINED}), first["common/a.py"]
    )
    assert again.survivors == {change: "as `good`"}


def test_a_line_that_went_is_noticed() -> None:
    assert report.is_current(Change("Site.round", "@property", ""), SOURCE)
    assert report.is_current(Change("Site.check", "self.verify( record, )", "pass"), SOURCE)
    for stale in (
        Change("Site.check", "@property", ""),
        Change("Site.round", "return self.state", ""),
        Change("Sit", "@property", ""),
    ):
        assert not report.is_current(stale, SOURCE)


def test_the_mutants_of_a_module() -> None:
    pytest.importorskip("cosmic_ray")
    from tests.mutants.mutations import mutants

    found = mutants(SOURCE)
    changes = {mutant.change for mutant in found}
    assert changes >= {
        Change("Site.round", "@property", ""),
        Change("Site.round", "return self.state.round + 1", "return self.state.round - 1"),
        Change("Site.check", "self.verify( record, )", "pass"),
        Change("Site.check", "if record not in self.known:", "if record in self.known:"),
    }
    assert not any("int | None" in change.old or "raise" in change.old for change in changes)
    assert all(mutant.apply(SOURCE) != SOURCE for mutant in found)


def test_every_module_is_mutated_and_has_tests_of_its_own() -> None:
    pytest.importorskip("cosmic_ray")
    from tests.mutants.__main__ import mirror, modules

    assert {"common/secagg/site.py", "common/messages.py"} <= set(modules())
    for module in modules():
        assert (ROOT / module).exists()
        assert (ROOT / mirror(module)).exists()
