"""Which rounds are spoken for: a matter of scheduling, derived from a hospital's ledger alone.

Source: PRIVACY "Registers, budget, filter". Rules: a study reserves from its approval until it is closed
here; what was approved first comes first, so that a study under way is not starved by a later one; a lost
round is computed again from the same reservation, which rounds_max ends.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from common.ledger.entries import Approval, Charge, Closed, Entry, Outcome


def reserved_rounds(
    entries: Iterable[Entry], plan: Callable[[str], tuple[int, int] | None], before: str = ""
) -> dict[str, int]:
    """How many rounds each open study has reserved, by digest, in the order of their latest approvals.

    ``plan`` gives a study's rounds and rounds_max, None for one that reserves nothing (expired, unknown); of
    the studies approved after ``before``, and of that one itself, nothing is counted.

    Guarantee: an_earlier_study_comes_first - what is reserved for a study never counts against those before.
    """
    studies = dict[str, None]()
    charged, lost, of = Counter[str](), Counter[str](), dict[str, str]()
    for entry in entries:
        if isinstance(entry, Approval):
            studies.pop(entry.manifest, None)
            if entry.decision == "approved":
                studies[entry.manifest] = None
        elif isinstance(entry, Closed):
            studies.pop(entry.manifest, None)
        elif isinstance(entry, Charge):
            name = of[entry.event_id] = str(entry.event.get("manifest_digest", ""))
            charged[name] += 1
        elif isinstance(entry, Outcome) and entry.reason not in ("upload_started", "completed"):
            lost[of.get(entry.event_id, "")] += 1
    found = dict[str, int]()
    for name in studies:
        if name == before:
            break
        if planned := plan(name):
            rounds, rounds_max = planned
            left = min(rounds - charged[name] + lost[name], rounds_max - charged[name])
            if left > 0:
                found[name] = left
    return found
