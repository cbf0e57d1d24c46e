"""Verify evidence offline: each ledger by itself, against its studies, and against the others' evidence.

Source: DESIGN "Ledger"; notes/users.md section 3.4. Rules: no network, no clock, no key but public ones;
every check is made, also after another failed; keys that come from the evidence itself prove nothing; whose
evidence is missing is said.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from common.audit import conduct, crosscheck
from common.audit.evidence import Evidence
from common.audit.party import HUB_NAME, Check, Party, Roots, checked, read_party, roots
from common.audit.trust import Trust, claimed
from common.errors import UsageError
from common.witness import HUB

Rule = tuple[str, str, Callable[[], str]]
"""A slug, what is said when it holds, and the rule itself."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Every check that was made.

    ``trusted`` is whether the keys came from elsewhere than the evidence; ``missing`` names the members of
    the roster, and "hub", whose evidence was not given: nothing is said of them.
    """

    trusted: bool
    checks: tuple[Check, ...]
    parties: tuple[Party, ...]
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """In words: verified, failed or self-consistent only."""
        if not self.passed:
            return "failed"
        return "verified" if self.trusted else "self-consistent only"


def verify(evidences: Sequence[Evidence], trust: Trust | None) -> Verification:
    """Verify the evidence of one federation; without ``trust``, against the keys that it states itself.

    Guarantee: tampering_is_found - every kind of change to what is signed or counted fails a check.
    Raises: UsageError when there is none, or two of one party; VerificationError when no roster is signed.
    """
    ids = [evidence.party for evidence in evidences]
    if not ids or len(set(ids)) != len(ids):
        problem = "there is no evidence" if not ids else "two files hold evidence of the same party"
        raise UsageError("audit.files", problem, remedy="Give one file for each party; compare two by diff.")
    believed = trust or claimed(evidences)
    roster = believed.roster
    read = [read_party(evidence, believed) for evidence in sorted(evidences, key=lambda e: e.party)]
    parties = tuple(party for party, _ in read)
    by_size = {party.id: _roots(party, parties) for party in parties}
    checks: list[Check] = []
    for party, first in read:
        checks += first
        checks += _checks(party, parties, believed, by_size[party.id])
    missing = [HUB_NAME] * (HUB not in ids) + [m.name for m in roster.members if m.id not in ids]
    return Verification(trust is not None, tuple(checks), parties, tuple(missing))


def _roots(party: Party, parties: Sequence[Party]) -> Roots:
    """The roots of a party's ledger at every size that anybody speaks of, in one pass."""
    heads = [other.seen[party.id] for other in parties if party.id in other.seen]
    if party.cosigned is not None:
        heads.append(party.cosigned.head)
    return roots(party.evidence.leaves, {len(party.evidence.leaves), *(head.size for head in heads)})


def _checks(party: Party, parties: Sequence[Party], trust: Trust, by_size: Roots) -> Iterator[Check]:
    hub = next((other for other in parties if other.id == HUB), None)
    for name, good, rule in _rules(party, hub, trust, by_size):
        yield checked(party.name, name, good, rule)
    for other in (other for other in parties if other.id != party.id):
        if party.id in other.seen:
            good = f"it begins with the {other.seen[party.id].size} entries that {other.name} saw"
            yield checked(party.name, "as-seen", good, partial(crosscheck.as_seen, party, other, by_size))
        if other.cosigned is not None and party.id in other.cosigned.cosigns:
            good = f"it shows what it cosigned of {other.name}"
            yield checked(party.name, "remembers", good, partial(crosscheck.remembers, party, other))


def _rules(party: Party, hub: Party | None, trust: Trust, by_size: Roots) -> Iterator[Rule]:
    """The checks of one party, in the order in which they are printed."""
    yield "tree", "the signed head is of exactly these entries", partial(crosscheck.tree, party, by_size)
    whole = "the head that others cosigned is of this ledger, with enough signatures"
    yield "cosignatures", whole, partial(crosscheck.cosignatures, party, trust, by_size)
    known = "every member of its studies has the trusted keys"
    yield "study-members", known, partial(crosscheck.members_known, party, trust, hub)
    if party.id == HUB:
        joined = "every trusted hospital was admitted with its fingerprint"
        yield "membership", joined, partial(crosscheck.memberships, party, trust)
    for name, good, rule in conduct.HUB_RULES if party.id == HUB else conduct.SITE_RULES:
        yield name, good, partial(rule, party)
    if hub is not None and party.id != HUB:
        paid = "every sum that the hub opened over it was charged and uploaded"
        yield "charged-as-completed", paid, partial(crosscheck.charged_as_completed, party, hub)
        said = "the hub's ledger has every study and result of it"
        yield "completed-as-said", said, partial(crosscheck.completed_as_said, party, hub)
