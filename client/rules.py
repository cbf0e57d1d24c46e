"""What this hospital's policy asks of a study: every rule of ``policy.toml``, each refused by its name.

Source: PRIVACY "Registers, budget, filter"; PROTOCOL "A hospital itself refuses", I12. Rules: deny by
default; a pure function of policy, study and local time, so that what is approved, charged and recorded is
judged alike; nothing here depends on rows; what a policy allows goes into the ledger as ``recorded`` says.
"""

from collections.abc import Iterator
from datetime import datetime

from client.settings import Policy
from common.admissible import Admitted
from common.errors import RefusedError
from common.ledger.entries import Rules, Source
from common.privacy.decimals import text_of
from common.privacy.filter import VIEWS, odometer
from common.study import Manifest, NoDifferentialPrivacy

_NO_ID = "0" * 32


def check_policy(policy: Policy, manifest: Manifest, admitted: Admitted) -> None:
    """Refuse a study that the policy does not allow.

    Guarantee: nothing_is_allowed_that_the_policy_does_not_name - each rule at its edge, and one past it.
    Raises: RefusedError with the code of the first rule that does not hold.
    """
    check_coordinator(policy, manifest)
    for holds, code, problem, remedy in _rules(policy, manifest, admitted):
        if not holds:
            raise RefusedError(code, problem, remedy=remedy or "Deny the study, or change policy.toml.")


def check_coordinator(policy: Policy, manifest: Manifest) -> None:
    """Refuse a study of a coordinator that the policy does not name, so that none is even kept."""
    if manifest.coordinator not in policy.rules.coordinators:
        problem = f"the study is signed by {manifest.coordinator}, which the policy does not name"
        remedy = "Add that key to rules.coordinators in policy.toml if you know whose it is."
        raise RefusedError("policy.coordinator", problem, remedy=remedy)


def _rules(policy: Policy, manifest: Manifest, admitted: Admitted) -> Iterator[tuple[bool, str, str, str]]:
    """Whether each rule holds, its code, the problem and a remedy of its own."""
    rules, study = policy.rules, manifest.study
    aggregation = study.aggregation
    private = not isinstance(study.privacy, NoDifferentialPrivacy)
    problem = "the policy forbids studies without differential privacy"
    yield private or rules.allow_studies_without_differential_privacy, "policy.no-dp", problem, ""
    problem = "the policy forbids studies without masks, whose every update the hub sees"
    unmasked = rules.allow_studies_whose_every_update_the_hub_sees
    yield aggregation.masked or unmasked, "policy.no-masks", problem, ""
    # PROTOCOL I12: two cohorts that differ by one hospital would give away that hospital's sum.
    problem = "a study without differential privacy must have all of its members in every round"
    remedy = "Ask the coordinator for one whose minimum_hospitals is the number of its members."
    everyone = aggregation.minimum_hospitals == len(study.members)
    yield private or everyone, "guard.no-dp-cohort", problem, remedy
    problem = "the policy forbids t = 0: one curious hospital with the hub would see through the noise"
    yield aggregation.colluders > 0 or rules.outsiders_only, "policy.outsiders-only", problem, ""
    problem = f"the policy asks for at least {rules.minimum_hospitals} in a round"
    enough = aggregation.minimum_hospitals >= rules.minimum_hospitals
    yield enough, "policy.minimum-hospitals", problem, ""
    problem = f"a round may take {rules.max_round_minutes} minutes here"
    yield aggregation.deadline_s <= 60 * rules.max_round_minutes, "policy.round-time", problem, ""
    source = policy.source(study.data)
    # The unit is the register's: a study that counted visits would weigh a patient many times.
    problem = f"the study takes column {study.contract.patient!r} for the patient, the policy another"
    remedy = "Ask the coordinator for a study on the patient column that policy.toml names."
    yield source.patient == study.contract.patient, "policy.patient", problem, remedy
    beyond = study.contract.beyond(source.columns, source.form)
    problem = f"the policy does not name {beyond[0]!r} among columns of [data.{study.data}]" if beyond else ""
    remedy = f"Add it to columns of [data.{study.data}] in policy.toml, or deny the study."
    yield not beyond, "policy.columns", problem, remedy
    if private and rules.epsilon_per_study is not None:
        event = admitted.event(_NO_ID, 1, 1, _NO_ID)
        rounds, delta = [event] * aggregation.rounds_max, policy.privacy_register.delta
        most = max(odometer(rounds, delta, view) for view in VIEWS)
        problem = f"it may spend epsilon {most:.4f}, and one study may spend {rules.epsilon_per_study:g} here"
        remedy = "Ask for one with more noise, fewer rounds or a smaller rounds_max."
        yield most <= rules.epsilon_per_study, "policy.epsilon-per-study", problem, remedy


def check_window(policy: Policy, now: datetime) -> None:
    """Refuse a round outside the hospital's training window; one that has begun inside may end after it.

    ``now`` aware; the window is in the local time of this machine and may cross midnight.

    Guarantee: no_round_begins_outside_the_window - from its first minute on, until the minute it ends.
    Raises: RefusedError.
    """
    window = policy.rules.training_window
    if not window:
        return
    first, end = window.split("-")
    minute = now.astimezone().strftime("%H:%M")
    inside = first <= minute < end if first < end else minute >= first or minute < end
    if not inside:
        raise RefusedError("policy.training-window", f"no round begins here outside {window}")


def recorded(policy: Policy) -> Rules:
    """What the ledger is told of a policy: all but where files lie.

    Guarantee: the_ledger_names_no_path - nor anything that depends on a row.
    """
    rules, register = policy.rules, policy.privacy_register
    each = rules.epsilon_per_study
    return Rules(
        epsilon_t=text_of(register.epsilon_t),
        epsilon_w=text_of(register.epsilon_w),
        delta=text_of(register.delta),
        epsilon_per_study=None if each is None else text_of(each),
        minimum_hospitals=rules.minimum_hospitals,
        minimum_patients=rules.minimum_patients,
        max_round_minutes=rules.max_round_minutes,
        training_window=rules.training_window,
        outsiders_only=rules.outsiders_only,
        without_differential_privacy=rules.allow_studies_without_differential_privacy,
        without_masks=rules.allow_studies_whose_every_update_the_hub_sees,
        coordinators=tuple(rules.coordinators),
        officers=tuple(rules.officers),
        sources=tuple(
            Source(name=name, patient=source.patient, columns=tuple(source.columns))
            for name, source in sorted(policy.data.items())
        ),
    )
