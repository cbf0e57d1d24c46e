"""Reserved rounds against a naive count, for any order of what a ledger can say of studies."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.identity import key_text, new_signing_key, public_key
from common.ledger.entries import Approval, Charge, Closed, Entry, Outcome
from common.ledger.reservations import reserved_rounds

ACTOR = key_text(public_key(new_signing_key()))
STUDIES = ["a" * 64, "b" * 64, "c" * 64]
PLANS = {STUDIES[0]: (3, 5), STUDIES[1]: (2, 2)}
LOST = ["round_lost", "left_out_of_cohort", "upload_not_made", "study_aborted", "site_stopped"]


def charge(study: str, number: int) -> Charge:
    fields: dict[str, Any] = {"event_id": f"{number:032x}", "register_id": "f" * 32, "manifest_digest": study}
    return Charge(actor=ACTOR, event=fields)


def outcome(number: int, reason: str) -> Outcome:
    fields = {"event_id": f"{number:032x}", "state": "charged", "attempt": 1, "ctx": None, "reason": reason}
    return Outcome.model_validate({"actor": ACTOR, **fields})


def said(study: str, decision: str) -> Approval:
    return Approval.model_validate(
        {"actor": ACTOR, "manifest": study, "decision": decision, "reason": "A. Person: so"}
    )


@given(st.lists(st.tuples(st.sampled_from(["approved", "denied", "closed", "lost", "completed", "going on"]),
                          st.sampled_from(STUDIES)), max_size=25))  # fmt: skip
def test_an_earlier_study_comes_first(story: list[tuple[str, str]]) -> None:
    entries: list[Entry] = []
    for number, (what, study) in enumerate(story):
        if what == "closed":
            entries.append(Closed(actor=ACTOR, manifest=study))
        elif what in ("approved", "denied"):
            entries.append(said(study, what))
        else:
            entries += [charge(study, number), outcome(number, "upload_started")]
            if what != "going on":
                entries.append(outcome(number, LOST[number % len(LOST)] if what == "lost" else what))
    last = {study: max((at for at, (w, s) in enumerate(story) if (w, s) == ("approved", study)), default=-1)
            for study in STUDIES}  # fmt: skip
    expected: dict[str, int] = {}
    for study in sorted(STUDIES, key=lambda study: last[study]):
        after = {w for at, (w, s) in enumerate(story) if s == study and at > last[study]}
        if last[study] < 0 or after & {"denied", "closed"} or study not in PLANS:
            continue
        rounds, most = PLANS[study]
        all_of = [w for w, s in story if s == study and w in ("lost", "completed", "going on")]
        left = min(rounds - len([w for w in all_of if w != "lost"]), most - len(all_of))
        if left > 0:
            expected[study] = left
    found = reserved_rounds(entries, PLANS.get)
    assert list(found.items()) == list(expected.items())
    for before in STUDIES:
        earlier = reserved_rounds(entries, PLANS.get, before)
        assert before not in earlier
        # Of those approved before it, the whole; of those after it, nothing.
        assert all(expected[study] == count and
                   (before not in expected or last[study] < last[before]) for study, count in earlier.items())  # fmt: skip
