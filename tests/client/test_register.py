"""A register is its patients', not a file's: nothing that a person changes around it gives budget back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.guard import Guard
from client.participation import Participation
from common.admissible import check
from common.errors import BudgetExhaustedError, RefusedError
from common.ledger.entries import Charge, OptOuts
from tests.client.federation import ComputedHere, Federation, Hub
from tests.federation import contribution, extract_rows, source_of

SHARED: dict[str, Any] = {
    "training__mode": "shared-noise",
    "training__engine": "bookkeeping",
    "training__rounds": 5,
    "aggregation__codec__step": 0.001,
}


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


def test_changed_opt_outs_are_recorded(template: Path, tmp_path: Path) -> None:
    """Before the charge of the round that leaves them out; the round is that of an extract without them."""
    federation = Federation(template, tmp_path / "federation", epsilon=20.0)
    lists = tmp_path / "out.txt"
    lists.write_text("# nobody yet\n")
    extract = source_of(federation.sites[1].folder / "extract.csv")
    federation.edit_policy(1, data={"extract": extract | {"opt_out": str(lists)}})
    manifest = federation.manifest(**SHARED)
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    hub = Hub(federation, manifest, sites).joined()
    hub.whole_round()
    gone = [str(row[0]) for row in extract_rows(1)[:12]]
    lists.write_text("\n".join(gone))
    worker = sites[1]._runs[hub.man].computation._worker
    totals: list[Any] = []
    original = worker.compute

    def watched(state: bytes, opted_out: Any = ()) -> bytes:
        totals.append(np.frombuffer(original(state, opted_out), "<i8"))
        return totals[-1].tobytes()

    worker.compute = watched  # type: ignore[method-assign]
    hub.whole_round()
    kept = [row for row in extract_rows(1) if row[0] not in gone]
    expected = contribution(1, rows=kept) / 0.001
    assert np.abs(totals[0] - expected).max() <= 0.5 + 1e-6
    story = [entry for entry in federation.entries(1) if isinstance(entry, OptOuts | Charge)]
    assert [entry.type for entry in story] == ["charge", "opt_outs", "charge"]
    # Another hospital's, or another key's, digest of the same list is another one.
    assert isinstance(story[1], OptOuts)
    assert story[1].source == "extract"
    # A list that is unclear stops the round before it is charged.
    lists.write_text("n/a\n")
    round_ = hub.start()
    assert hub.ready(round_) == {1: False, 2: True, 3: True}
    assert [e.type for e in federation.entries(1) if isinstance(e, OptOuts | Charge)] == [
        e.type for e in story
    ]
    for site in sites.values():
        site.close()
