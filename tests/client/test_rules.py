"""Every rule of a policy, at its edge and one past it."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from client.identity import load_policy
from client.rules import check_policy, check_window, recorded
from client.settings import Policy
from common.admissible import check
from common.errors import RefusedError, UsageError
from common.privacy.filter import odometer
from common.study import WITHOUT_MASKS
from tests.client.federation import WITHOUT_DP, Federation

Change = dict[str, Any]
SHARED: Change = {
    "training__mode": "shared-noise",
    "training__engine": "bookkeeping",
    "aggregation__codec__step": 0.001,
}
ALL = {"patient": "patient", "columns": ["age", "bmi", "readmitted"]}

# What is allowed by a policy, the same study one past it, and the code of the refusal.
RULES: list[tuple[Change, Change, Change, str]] = [
    ({}, {}, {"rules": {"coordinators": []}}, "policy.coordinator"),
    (
        {"privacy": WITHOUT_DP},
        {"rules": {"allow_studies_without_differential_privacy": True}},
        {},
        "policy.no-dp",
    ),
    (
        {"aggregation__masks": WITHOUT_MASKS},
        {"rules": {"allow_studies_whose_every_update_the_hub_sees": True}},
        {},
        "policy.no-masks",
    ),
    (
        SHARED | {"aggregation__colluders": 0, "aggregation__rollbacks": 0},
        {"rules": {"outsiders_only": True}},
        {},
        "policy.outsiders-only",
    ),
    (
        {},
        {"rules": {"minimum_hospitals": 3}},
        {"rules": {"minimum_hospitals": 4}},
        "policy.minimum-hospitals",
    ),
    (
        {"aggregation__deadline_s": 120},
        {"rules": {"max_round_minutes": 2}},
        {"rules": {"max_round_minutes": 1}},
        "policy.round-time",
    ),
    ({}, {"data": {"extract": ALL}}, {"data": {"other": ALL}}, "policy.data"),
    ({}, {"data": {"extract": ALL}}, {"data": {"extract": ALL | {"patient": "visit"}}}, "policy.patient"),
    (
        {},
        {"data": {"extract": ALL}},
        {"data": {"extract": ALL | {"columns": ["age", "bmi"]}}},
        "policy.columns",
    ),
    ({}, {"data": {"extract": ALL}}, {"data": {"extract": ALL | {"columns": []}}}, "policy.columns"),
]


def policy_of(federation: Federation, change: Change) -> Policy:
    """The federation's policy with tables changed; sources keep where their file is."""
    policy = load_policy(federation.sites[1])
    if "rules" in change:
        rules = policy.rules.model_copy(update=change["rules"])
        policy = policy.model_copy(update={"rules": rules})
    if "data" in change:
        source = policy.data["extract"]
        data = {name: source.model_copy(update=one) for name, one in change["data"].items()}
        policy = policy.model_copy(update={"data": data})
    return policy


@pytest.mark.parametrize(("study", "allowed", "refused", "code"), RULES)
def test_nothing_is_allowed_that_the_policy_does_not_name(
    federation: Federation, study: Change, allowed: Change, refused: Change, code: str
) -> None:
    manifest = federation.manifest(**study)
    admitted = check(manifest, None)
    check_policy(policy_of(federation, allowed), manifest, admitted)
    with pytest.raises(RefusedError) as caught:
        check_policy(policy_of(federation, refused), manifest, admitted)
    assert caught.value.code == code
    assert caught.value.remedy


def test_without_dp_all_members_are_in_every_round(federation: Federation) -> None:
    changes = {"privacy": WITHOUT_DP, "aggregation__rollbacks": 0}
    policy = policy_of(federation, {"rules": {"allow_studies_without_differential_privacy": True}})
    some = federation.manifest((1, 2, 3, 4), **changes)
    with pytest.raises(RefusedError) as caught:
        check_policy(policy, some, check(some, None))
    assert caught.value.code == "guard.no-dp-cohort"
    every = federation.manifest((1, 2, 3, 4), **changes, aggregation__minimum_hospitals=4)
    check_policy(policy, every, check(every, None))


@pytest.mark.parametrize("shared", [False, True])
def test_one_study_may_spend_its_cap_in_both_views(federation: Federation, shared: bool) -> None:
    manifest = federation.manifest(**(SHARED if shared else {}))
    admitted = check(manifest, None)
    rounds = [admitted.event("0" * 32, 1, 1, "0" * 32)] * manifest.study.aggregation.rounds_max
    most = max(odometer(rounds, 1e-6, view) for view in ("t", "w"))
    if shared:
        assert odometer(rounds, 1e-6, "t") < most
    check_policy(policy_of(federation, {"rules": {"epsilon_per_study": most}}), manifest, admitted)
    with pytest.raises(RefusedError, match="one study may spend") as caught:
        check_policy(policy_of(federation, {"rules": {"epsilon_per_study": most - 1e-6}}), manifest, admitted)
    assert caught.value.code == "policy.epsilon-per-study"


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("", ["00:00", "12:00", "23:59"], []),
        ("08:00-17:30", ["08:00", "12:00", "17:29"], ["07:59", "17:30", "00:00"]),
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
    ],
)
def test_no_round_begins_outside_the_window(
    federation: Federation, window: str, inside: list[str], outside: list[str]
) -> None:
    policy = policy_of(federation, {"rules": {"training_window": window}})
    here = datetime.now().astimezone()
    for minute in [*inside, *outside]:
        hour, minutes = map(int, minute.split(":"))
        now = here.replace(hour=hour, minute=minutes, second=30)
        # The same moment, told in another zone.
        for told in (now, now.astimezone(UTC), now.astimezone(timezone(timedelta(hours=9)))):
            if minute in inside:
                check_window(policy, told)
            else:
                with pytest.raises(RefusedError, match="no round begins here"):
                    check_window(policy, told)


@pytest.mark.parametrize(
    "rules",
    [
        {"training_window": "8:00-17:00"},
        {"training_window": "08:00-24:00"},
        {"training_window": "08:00"},
        {"epsilon_per_study": 0.0},
        {"epsilon_per_study": 21.0},
        {"minimum_patients": 0},
        {"columns": ["age"]},
    ],
)
def test_rules_out_of_range_are_refused(federation: Federation, rules: Change) -> None:
    federation.edit_policy(1, rules=rules)
    with pytest.raises(UsageError, match=rf"policy.toml: rules.{next(iter(rules))}"):
        load_policy(federation.sites[1])


def test_the_ledger_names_no_path(federation: Federation, tmp_path: Path) -> None:
    federation.edit_policy(
        1, data={"extract": ALL | {"source": "csv:/srv/secret.csv", "opt_out": "/srv/out.txt"}}
    )
    policy = load_policy(federation.sites[1])
    rules = recorded(policy)
    assert "/srv" not in rules.model_dump_json()
    assert [(s.name, s.patient, s.columns) for s in rules.sources] == [
        ("extract", "patient", ("age", "bmi", "readmitted"))
    ]
    for change in (
        {"data": {"extract": {"columns": ["age"]}}},
        {"rules": {"minimum_patients": 7}},
        {"rules": {"training_window": "20:00-06:00"}},
        {"rules": {"epsilon_per_study": 1.5}},
        {"rules": {"outsiders_only": True}},
        {"rules": {"officers": [federation.coordinator]}},
    ):
        assert recorded(policy_of(federation, change)) != rules


def test_too_few_patients_are_looked_at_by_a_person_only(federation: Federation) -> None:
    """An automatic refusal would tell the hub how many there are."""
    federation.edit_policy(1, rules={"minimum_patients": 1000})
    manifest = federation.manifest()
    check_policy(load_policy(federation.sites[1]), manifest, check(manifest, None))
