"""A register is its patients', not a file's: nothing that a person changes around it gives budget back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.guard import Guard
from client.participation import Participation
from common.admissible import check
from common.errors import BudgetExhaustedError, RefusedError
from tests.client.federation import ComputedHere, Federation, Hub
from tests.federation import extract_rows


@pytest.fixture
def guard(federation: Federation) -> Iterator[Guard]:
    found = federation.guard(1)
    yield found
    found.close()


def renamed(federation: Federation) -> dict[str, Any]:
    """The same file under another name, the old one gone."""
    path = federation.sites[1].policy
    text = path.read_text(encoding="utf-8").replace("data.extract]", "data.cohort]")
    path.write_text(text, encoding="utf-8")
    return {"data": "cohort"}


def extracted_anew(federation: Federation) -> dict[str, Any]:
    federation.write_extract(1, reversed(extract_rows(1)))
    return {}


def with_another_contract(federation: Federation) -> dict[str, Any]:
    return {"contract__rows_per_patient": 7, "contract__holdout": 0.3}


def with_withdrawn_patients(federation: Federation) -> dict[str, Any]:
    federation.write_extract(1, extract_rows(1)[:5])
    return {}


CHANGES: list[Callable[[Federation], dict[str, Any]]] = [
    lambda _: {},
    lambda _: {"name": "another study", "purpose": "Something else."},
    renamed,
    extracted_anew,
    with_another_contract,
    with_withdrawn_patients,
    lambda _: {"members": (1, 2, 3, 4)},
    lambda _: {"training__mode": "local", "privacy__noise_multiplier": 16.0},
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_register_survives_new_contracts_names_and_extracts(
    federation: Federation, guard: Guard, change: Callable[[Federation], dict[str, Any]]
) -> None:
    first = federation.manifest(training__rounds=5)
    for number in range(1, 6):
        guard.charge(first, check(first, None), number)
    spent = guard.budget()
    later = federation.manifest(**change(federation))
    again = federation.guard(1)
    assert again.budget() == spent
    again.charge(later, check(later, None), 1)
    after = again.budget()
    again.close()
    assert after.charges == 6
    assert after.epsilon_t > spent.epsilon_t
    assert after.epsilon_w > spent.epsilon_w


def test_budget_never_goes_down(federation: Federation, guard: Guard) -> None:
    """Whatever is tried between two charges."""
    manifest = federation.manifest(training__rounds=500)
    admitted = check(manifest, None)
    before, number = guard.budget(), 0
    tries: list[Callable[[], object]] = [
        lambda: guard.settle(manifest.digest, "round_lost"),
        lambda: guard.settle(manifest.digest, "site_stopped"),
        lambda: guard.closed(manifest.digest),
        lambda: federation.decide(1, manifest, "denied"),
        lambda: federation.decide(1, manifest),
        lambda: federation.edit_policy(1, register={"epsilon_t": 2.9}),
        lambda: federation.edit_policy(1, register={"epsilon_t": 3.0}),
        lambda: extracted_anew(federation),
        lambda: guard.pause("paused", "t: for the test"),
        lambda: guard.pause("resumed", "t: for the test"),
    ]
    while True:
        tries[number % len(tries)]()
        number += 1
        found = guard.budget()
        assert (found.epsilon_t, found.epsilon_w, found.charges) >= (
            before.epsilon_t,
            before.epsilon_w,
            before.charges,
        )
        before = found
        try:
            guard.charge(manifest, admitted, number)
        except BudgetExhaustedError:
            break
        except RefusedError:
            continue
    assert before.epsilon_t <= 3.0
    assert number > 20


def test_lower_noise_is_another_study_that_nobody_approved(template: Path, tmp_path: Path) -> None:
    federation = Federation(template, tmp_path / "federation", epsilon=20.0)
    manifest = federation.manifest()
    for changed in ({"privacy__noise_multiplier": 7.9}, {"training__rounds": 4}, {"training__steps": 2}):
        other = federation.manifest(**changed)
        sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
        for number in sites:
            federation.decide(number, manifest)
            assert Hub(federation, other, sites).offer()[number] == "received"
            # An approval is of one digest: for another it does nothing.
            assert sites[number]._guard.decision(manifest.digest) == "approved"
            assert sites[number]._guard.decision(other.digest) == ""
        for site in sites.values():
            site.close()
