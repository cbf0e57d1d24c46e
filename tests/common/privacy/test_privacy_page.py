"""PRIVACY.md beside the code: every test and Guarantee it names exists, and it leaves none of this package out."""

import pytest

from tests.common.secagg.test_protocol_page import check_test, places_of_guarantees, table, ticked
from tests.test_guarantees import ROOT

PAGE = (ROOT / "common" / "privacy" / "PRIVACY.md").read_text(encoding="utf-8")


def holds(page: str) -> None:
    rows = table(page, "What holds it", "Item")
    assert len({row[0] for row in rows}) == len(rows)
    places = places_of_guarantees()
    for item, held in rows:
        assert ticked(held), item
        for name in ticked(held):
            if "::" in name:
                check_test(name)
            else:
                assert name in places, f"{item}: {name}"
    named = set(ticked(page))
    here = {
        name for name, found in places.items() if any(place.startswith("common/privacy/") for place in found)
    }
    assert here - named == set()


def test_the_page_is_the_codes() -> None:
    holds(PAGE)


@pytest.mark.parametrize(
    "name", sorted({name for row in table(PAGE, "What holds it", "Item") for name in ticked(row[1])})
)
def test_a_renamed_test_or_guarantee_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        holds(PAGE.replace(f"`{name}`", f"`{name}_no_more`"))
