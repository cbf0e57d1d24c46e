"""What a person reads before deciding, and the local checks that come with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.approval import Review, offered, review
from client.guard import Guard
from common.errors import BudgetExhaustedError, ContractError, RefusedError, VerificationError
from common.privacy.filter import odometer
from tests.client.federation import ALLOW_WITHOUT_DP, WITHOUT_DP, Federation
from tests.federation import extract_rows

CANARY = "Zq7canary"


@pytest.fixture
def guard(federation: Federation) -> Iterator[Guard]:
    opened = federation.guard(1)
    yield opened
    opened.close()


def reviewed(
    federation: Federation, guard: Guard, members: tuple[int, ...] = (1, 2, 3), **changes: Any
) -> Review:
    return review(federation.sites[1], guard, federation.receive(1, federation.manifest(members, **changes)))


def test_a_person_reads_everything_that_is_asked_of_this_hospital(
    federation: Federation, guard: Guard
) -> None:
    found = reviewed(federation, guard, (1, 2, 3, 4), training__steps=7, purpose="Why it is done.")
    lines = found.text().splitlines()
    said = {line[:13].strip(): line[13:] for line in lines}
    assert said["study"] == "small"
    assert said["purpose"] == "Why it is done."
    assert said["legal basis"] == "synthetic data"
    assert said["contact"] == "tests"
    assert said["coordinator"] == federation.coordinator
    assert said["digest"] == found.digest == found.manifest.digest.hex()
    assert said["data"].startswith("extract -> csv:/")
    assert said["training"] == "3 rounds of 7 steps, local"
    assert said["model"] == "logistic_regression, 6 numbers"
    assert said["members"] == ", ".join(federation.name(n) for n in (1, 2, 3, 4))
    assert said["aggregation"] == "n = 4, t = 1, rho = 0, m = 3, n - m = 1"
    assert said["charges"] == "3 rounds as planned, at most 6: a lost round is computed and charged again"
    assert said["expires"] == "2099-12-31T23:59Z"
    assert any("rho = 0" in line and line.startswith("note") for line in lines)
    assert any("ready_s = 0" in line for line in lines)
    for number in (2, 3, 4):
        member = federation.verified_roster.member(number)
        assert sum(member.name in line and member.fingerprint in line for line in lines) == 1
    assert "WITHOUT" not in found.text()


def test_the_spending_that_is_shown_is_the_accountants(federation: Federation, guard: Guard) -> None:
    found = reviewed(federation, guard, training__rounds=2, aggregation__rounds_max=4)
    planned = [guard.plan(found.admitted, number) for number in (1, 2, 3, 4)]
    assert found.planned_epsilon == odometer(planned[:2], 1e-6, "t") > 0
    assert found.largest_epsilon == odometer(planned, 1e-6, "t") > found.planned_epsilon
    said = f"{found.planned_epsilon:.4f} as planned, at most {found.largest_epsilon:.4f}"
    assert said in found.text()
    assert found.rounds_left == guard.rounds_left(found.manifest, found.admitted)
    assert found.data() == {
        "digest": found.digest,
        "name": "small",
        "members": [federation.name(n) for n in (1, 2, 3)],
        "rounds": 2,
        "rounds_max": 4,
        "planned_epsilon": found.planned_epsilon,
        "largest_epsilon": found.largest_epsilon,
        "rounds_left": found.rounds_left,
        "new_fingerprints": {
            federation.name(n): federation.verified_roster.member(n).fingerprint for n in (2, 3)
        },
    }
    # Once accepted, nobody is asked to compare again; what was spent lowers what is left.
    guard.decide(found.manifest, found.roster, "approved", "read")
    guard.charge(found.manifest, found.admitted, 1)
    again = review(federation.sites[1], guard, found.digest)
    assert again.new_fingerprints == {}
    assert again.rounds_left == (found.rounds_left or 0) - 1
    assert again.planned_epsilon == found.planned_epsilon


def test_a_study_without_dp_says_so_first(template: Path, tmp_path: Path) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    guard = federation.guard(1)
    found = reviewed(federation, guard, privacy=WITHOUT_DP)
    assert found.text().splitlines()[0].startswith("WITHOUT DIFFERENTIAL PRIVACY")
    assert (found.planned_epsilon, found.rounds_left) == (float("inf"), None)
    found.check_approvable()
    guard.close()


def test_what_the_policy_refuses_can_be_seen_but_not_reviewed(federation: Federation, guard: Guard) -> None:
    manifest = federation.manifest(data="another")
    digest = federation.receive(1, manifest)
    assert offered(federation.sites[1], guard, digest) == (manifest, federation.verified_roster)
    with pytest.raises(RefusedError) as caught:
        review(federation.sites[1], guard, digest)
    assert caught.value.code == "policy.data"


def test_the_study_that_is_shown_is_the_one_that_was_named(federation: Federation, guard: Guard) -> None:
    manifest, other = federation.manifest(), federation.manifest(name="other")
    digest = federation.receive(1, manifest)
    federation.sites[1].study(digest).write_bytes(federation.document(other))
    for look in (offered, review):
        with pytest.raises(VerificationError) as caught:
            look(federation.sites[1], guard, digest)
        assert caught.value.code == "studies.changed"


def test_a_sound_study_is_approvable_and_asking_changes_nothing(federation: Federation, guard: Guard) -> None:
    found = reviewed(federation, guard)
    before = federation.entries(1)
    found.check_approvable()
    assert federation.entries(1) == before
    assert not federation.sites[1].pins.exists()


@pytest.mark.parametrize(
    ("header", "rows", "code"),
    [
        ("patient,age,readmitted", [("p", 50, "yes")], "source.column"),
        ("patient,age,bmi,readmitted", [], "contract.empty"),
        ("patient,age,bmi,readmitted", [("", 50, 25, "yes"), ("p", 50, 25, CANARY)], "contract.empty"),
        ("patient,age,bmi,readmitted", [("p", 50, 25, "yes"), (CANARY,)], "source.malformed"),
    ],
)
def test_an_extract_that_breaks_the_contract_is_named_without_a_value(
    federation: Federation, guard: Guard, header: str, rows: list[tuple[object, ...]], code: str
) -> None:
    federation.write_extract(1, rows, header)
    with pytest.raises(ContractError) as caught:
        reviewed(federation, guard).check_approvable()
    assert caught.value.code == code
    assert "extract.csv" in caught.value.problem
    assert CANARY not in caught.value.diagnostics() + repr(caught.value.fields) + repr(caught.value.__cause__)


def test_more_patients_than_the_study_allows_are_refused_without_a_count(
    federation: Federation, guard: Guard
) -> None:
    federation.write_extract(1, extract_rows(1, 21))
    found = reviewed(federation, guard, privacy__max_patients=20)
    with pytest.raises(ContractError) as caught:
        found.check_approvable()
    assert caught.value.code == "contract.max-patients"
    assert "21" not in caught.value.problem.replace(str(federation.sites[1].folder), "")
    federation.write_extract(1, extract_rows(1, 20))
    found.check_approvable()


def test_a_study_that_the_register_cannot_pay_for_is_refused(federation: Federation, guard: Guard) -> None:
    affordable = reviewed(federation, guard, training__rounds=1).rounds_left
    assert affordable is not None
    # The planned rounds must be affordable; those that may be lost are paid while the caps hold.
    reviewed(federation, guard, training__rounds=affordable, aggregation__rounds_max=500).check_approvable()
    with pytest.raises(BudgetExhaustedError) as caught:
        reviewed(federation, guard, training__rounds=affordable + 1).check_approvable()
    assert caught.value.fields == {"rounds_left": affordable}
