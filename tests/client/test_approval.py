"""What a person reads before deciding, and the local checks that come with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.approval import Change, Review, offered, review
from client.guard import Guard
from client.participation import Participation
from client.pins import Pins
from common import messages
from common.errors import BudgetExhaustedError, ContractError, RefusedError, VerificationError
from common.identity import new_signing_key, public_key
from common.privacy.filter import odometer
from common.roster import Member, Roster, SignedRoster
from common.run import study_document
from common.study import WITHOUT_MASKS
from tests.client.federation import ALLOW_WITHOUT_DP, WITHOUT_DP, ComputedHere, Federation, Hub
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
    assert found.planned_epsilon == tuple(odometer(planned[:2], 1e-6, view) for view in ("t", "w"))
    assert found.largest_epsilon == tuple(odometer(planned, 1e-6, view) for view in ("t", "w"))
    assert 0 < found.planned_epsilon[0] < found.largest_epsilon[0]
    said = (
        f"epsilon {found.planned_epsilon[0]:.4f}, {found.largest_epsilon[0]:.4f} of 3 while at most t collude"
    )
    assert said in found.text()
    assert found.rounds_left == guard.rounds_left(found.manifest, found.admitted)
    assert found.data() == {
        "digest": found.digest,
        "name": "small",
        "members": [federation.name(n) for n in (1, 2, 3)],
        "rounds": 2,
        "rounds_max": 4,
        "planned_epsilon": found.planned_epsilon[0],
        "planned_epsilon_w": found.planned_epsilon[1],
        "largest_epsilon": found.largest_epsilon[0],
        "largest_epsilon_w": found.largest_epsilon[1],
        "consents": [],
        "rounds_left": found.rounds_left,
        "new_fingerprints": {
            federation.name(n): federation.verified_roster.member(n).fingerprint for n in (2, 3)
        },
        "earlier": "",
        "changes": [],
    }
    # Once accepted, nobody is asked to compare again; what was spent lowers what is left.
    guard.decide(found.manifest, found.roster, "approved", "read")
    guard.charge(found.manifest, found.admitted, 1)
    again = review(federation.sites[1], guard, found.digest)
    assert again.new_fingerprints == {}
    assert again.rounds_left == (found.rounds_left or 0) - 1
    assert again.planned_epsilon == found.planned_epsilon
    assert again.earlier == ""


def test_a_study_without_dp_says_so_first(template: Path, tmp_path: Path) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    guard = federation.guard(1)
    found = reviewed(federation, guard, privacy=WITHOUT_DP)
    assert found.text().splitlines()[0].startswith("WITHOUT DIFFERENTIAL PRIVACY")
    assert (found.planned_epsilon, found.rounds_left) == ((float("inf"), float("inf")), None)
    found.check_approvable()
    guard.close()


def test_a_study_without_masks_says_so_first(federation: Federation, guard: Guard) -> None:
    federation.edit_policy(1, rules={"allow_studies_whose_every_update_the_hub_sees": True})
    found = reviewed(federation, guard, aggregation__masks=WITHOUT_MASKS)
    assert found.text().splitlines()[0] == "WITHOUT MASKS: the hub sees every update of this hospital"


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
        ("patient,age,bmi,readmitted", [], "contract.quality"),
        (
            "patient,age,bmi,readmitted",
            [("p", 50, 25, "yes"), ("q", 50, 25, "no")],
            "contract.minimum-patients",
        ),
        (
            "patient,age,bmi,readmitted",
            [("", 50, 25, "yes"), ("p", 50, 25, CANARY)],
            "contract.quality",
        ),
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


def test_an_assumption_of_the_arithmetic_is_named(federation: Federation, guard: Guard) -> None:
    assert "f32_assumed" not in reviewed(federation, guard).text()
    lines = reviewed(federation, guard, privacy__arithmetic="f32_assumed").text().splitlines()
    assert sum(line.startswith("note") and "f32_assumed: assumes that" in line for line in lines) == 1


# -- what has changed since ------------------------------------------------------------------------------------


def approve(federation: Federation, guard: Guard, **changes: Any) -> Review:
    found = reviewed(federation, guard, **changes)
    guard.decide(found.manifest, found.roster, "approved", "a tester: for the test")
    return found


def renewed(federation: Federation, *members: Member) -> None:
    """The hub signs another roster: these members in place of, or beside, those of the same id."""
    kept = {member.id: member for member in (*federation.verified_roster.members, *members)}
    roster = Roster(tuple(kept[number] for number in sorted(kept)))
    federation.roster = SignedRoster.create(roster, federation.hub_key)


def hospital(number: int, name: str) -> Member:
    """A hospital with new keys."""
    return Member(number, name, public_key(new_signing_key()), public_key(new_signing_key()))


def test_a_first_study_changes_nothing(federation: Federation, guard: Guard) -> None:
    found = reviewed(federation, guard)
    assert (found.earlier, found.changes) == ("", ())
    assert "since" not in found.text()


def test_a_new_version_is_shown_as_what_changed(federation: Federation, guard: Guard) -> None:
    first = approve(federation, guard)
    found = reviewed(
        federation,
        guard,
        training__rounds=2,
        privacy__noise_multiplier=9.5,
        permit="ethics 7/26",
        contract__label={"name": "readmitted", "classes": ["no", "maybe", "yes"]},
    )
    assert found.earlier == first.digest
    assert sorted(found.changes, key=lambda change: change.path) == [
        Change("aggregation.rounds_max", 6, 5),
        Change("contract.label.classes", ["no", "yes"], ["no", "maybe", "yes"]),
        Change("permit", "", "ethics 7/26"),
        Change("privacy.noise_multiplier", 8.0, 9.5),
        Change("training.rounds", 3, 2),
    ]
    text = found.text()
    assert f"since        {first.digest}, approved here before:" in text
    for line in (
        "  training.rounds: 3 -> 2",
        "  permit: none -> ethics 7/26",
        "  contract.label.classes: no, yes -> no, maybe, yes",
    ):
        assert line in text.splitlines()
    told = found.data()
    assert told["earlier"] == first.digest
    assert {"path": "training.rounds", "old": 3, "new": 2} in told["changes"]
    assert len(told["changes"]) == 5


def test_columns_and_models_that_come_and_go_are_named(federation: Federation, guard: Guard) -> None:
    approve(federation, guard)
    features = [{"kind": "number", "name": "age", "unit": "a", "minimum": 0.0, "maximum": 100.0}]
    found = reviewed(
        federation,
        guard,
        contract__features=features,
        model={"kind": "mlp", "hidden": [4]},
        privacy__arithmetic="f32_assumed",
    )
    lines = found.text().splitlines()
    assert "  contract.features[bmi].maximum: 50.0 -> none" in lines
    assert "  model.kind: logistic_regression -> mlp" in lines
    assert "  model.hidden: none -> 4" in lines
    assert "  privacy.arithmetic: f64_bounded -> f32_assumed" in lines


def test_it_is_compared_with_the_last_one_approved(federation: Federation, guard: Guard) -> None:
    approve(federation, guard)
    second = approve(federation, guard, training__rounds=4)
    approve(federation, guard, name="another", training__rounds=5)
    denied = reviewed(federation, guard, training__rounds=6)
    guard.decide(denied.manifest, denied.roster, "denied", "a tester: for the test")
    found = reviewed(federation, guard, training__rounds=7)
    assert found.earlier == second.digest
    assert Change("training.rounds", 4, 7) in found.changes
    # The same study again, and one of another coordinator, are no new versions of anything.
    assert reviewed(federation, guard, name="a third").earlier == ""
    again = review(federation.sites[1], guard, second.digest)
    assert (again.earlier, again.changes) == ("", ())
    federation.coordinator_key = new_signing_key()
    federation.edit_policy(1, rules={"coordinators": [federation.coordinator]})
    assert reviewed(federation, guard, training__rounds=7).earlier == ""


def test_an_identical_study_of_a_new_run_has_no_changes(federation: Federation, guard: Guard) -> None:
    first = approve(federation, guard)
    found = reviewed(federation, guard)
    assert (found.earlier, found.changes) == (first.digest, ())
    assert found.text().splitlines()[-2:] == [
        f"since        {first.digest}, approved here before:",
        "  no changes",
    ]


def test_a_changed_roster_is_a_new_approval(federation: Federation, guard: Guard) -> None:
    """A hospital joins: what was approved does not run with it, and only the new one is pinned anew."""
    site = Participation(federation.sites[1], computation=ComputedHere)
    first = approve(federation, guard)
    old_roster, pins = federation.roster, federation.sites[1].pins.read_bytes()
    renewed(federation, hospital(5, "Eastfield"))
    manifest = federation.manifest((1, 2, 3, 5))
    # The old approval is of the old members under the old roster, and of nothing else.
    with pytest.raises(VerificationError) as caught:
        guard.check_offer(first.manifest, federation.roster)
    assert caught.value.code == "guard.roster"
    old = study_document(federation.sign(first.manifest), federation.roster)
    hub = Hub(federation, manifest, {1: site})
    assert hub.offer() == {1: "received"}
    assert not hub.ask(1, messages.KEYS).available
    hub.man = first.manifest.digest
    assert not hub.ask(1, messages.STUDY, document=old).available
    assert hub.ask(1, messages.KEYS).available
    # What a person reads, and what saying yes does.
    found = review(federation.sites[1], guard, manifest.digest.hex())
    eastfield = federation.verified_roster.member(5)
    assert found.new_fingerprints == {"Eastfield": eastfield.fingerprint}
    names = [federation.name(n) for n in (1, 2, 3)]
    assert found.changes[0] == Change("members", sorted(names), sorted([*names, "Eastfield"]))
    assert found.changes[-2:] == (
        Change("roster", old_roster.digest.hex(), federation.roster.digest.hex()),
        Change("roster[Eastfield]", None, eastfield.fingerprint),
    )
    lines = found.text().splitlines()
    assert f"  roster[Eastfield] was added: {eastfield.fingerprint}" in lines
    assert any(line.startswith("  roster changed: ") for line in lines)
    assert federation.sites[1].pins.read_bytes() == pins
    guard.decide(manifest, found.roster, "approved", "a tester: for the test")
    assert Pins(federation.sites[1]).unpinned(manifest, found.roster, 1) == {}
    added = federation.sites[1].pins.read_bytes()
    assert len(added) > len(pins)
    assert all(federation.verified_roster.member(n).fingerprint.encode() in added for n in (2, 3, 5))
    hub.man = manifest.digest
    assert hub.ask(1, messages.KEYS).available
    site.close()


def test_a_changed_key_of_a_pinned_hospital_is_refused_and_named(
    federation: Federation, guard: Guard
) -> None:
    approve(federation, guard)
    name, old = federation.name(2), federation.verified_roster.member(2).fingerprint
    renewed(federation, hospital(2, name))
    manifest = federation.manifest()
    digest = federation.receive(1, manifest)
    before, pins = federation.entries(1), federation.sites[1].pins.read_bytes()
    for action in (
        lambda: review(federation.sites[1], guard, digest),
        lambda: guard.decide(manifest, federation.verified_roster, "approved", "t: t"),
    ):
        with pytest.raises(VerificationError) as caught:
            action()
        assert caught.value.code == "roster.pin-changed"
        assert name in caught.value.problem
    assert (federation.entries(1), federation.sites[1].pins.read_bytes()) == (before, pins)
    # Without the pin, which a person removes after a call, the change itself is shown.
    federation.sites[1].pins.unlink()
    found = review(federation.sites[1], guard, digest)
    new = federation.verified_roster.member(2).fingerprint
    assert Change(f"roster[{name}]", old, new) in found.changes
    assert f"  roster[{name}] changed: {old} -> {new}" in found.text().splitlines()


def test_a_hospital_that_left_is_named(federation: Federation, guard: Guard) -> None:
    approve(federation, guard)
    members = federation.verified_roster.members
    gone = members[-1]
    federation.roster = SignedRoster.create(Roster(members[:-1]), federation.hub_key)
    found = reviewed(federation, guard)
    assert [change.path for change in found.changes] == ["roster", f"roster[{gone.name}]"]
    assert found.changes[1] == Change(f"roster[{gone.name}]", gone.fingerprint, None)
    assert f"  roster[{gone.name}] was removed" in found.text().splitlines()
