"""What parties say of each other: heads against the ledgers that they are of, the hub against the hospitals.

Source: PROTOCOL L1, L2, "Hub invariants"; PRIVACY "Rollback"; DESIGN "A round, end to end", step 7. Rules: an
older, forked or shortened ledger contradicts a head that somebody has seen; a sum that the hub opened was
charged by everyone in it; each rule returns the first problem, naming the parties, or an empty text.
"""

from common.audit.conduct import computed
from common.audit.party import Party, Roots, named_studies, studied
from common.audit.spending import round_of
from common.audit.trust import Trust
from common.ledger.entries import Charge, Completed, Membership, Outcome, Restored, Submission
from common.secagg import records


def tree(party: Party, roots: Roots) -> str:
    """The signed head is of exactly these leaves."""
    head, size = party.checkpoint, len(party.evidence.leaves)
    if head is None:
        return "there is no head to compare the entries with"
    if head.size != size:
        return f"{size} entries are there, the signed head is of {head.size}"
    return "" if roots[size] == head.root else "the entries are not those whose root was signed"


def cosignatures(party: Party, trust: Trust, roots: Roots) -> str:
    """The head that others cosigned is of this ledger, and what was done upon it had enough of them."""
    offer = party.cosigned
    if offer is None:
        done = [entry.seq for entry in (*party.of(Completed), *computed(party))]
        return f"entry {done[0]} was made without any head that others had cosigned" if done else ""
    head, study = offer.head, party.studies.get(offer.head.man.hex())
    if study is None:
        return "the head that others cosigned is of a study that is not there"
    manifest, roster, _ = study
    if head.id != party.id:
        return "the head that others cosigned is of another party"
    records.check_signature(head, head.man, trust.ledger_key(party.id), "its own ledger key")
    if roots.get(head.size) != head.root:
        return f"the head of {head.size} entries that others cosigned is not of this ledger"
    members = {member.id for member in manifest.members} - {party.id}
    for cosign in offer.cosigns.values():
        if cosign.id not in members or cosign.head != records.head_digest(head):
            return f"a cosignature of party {cosign.id} is of a stranger or of another head"
        key = roster.member(cosign.id).ledger_key
        records.check_signature(cosign, head.man, key, f"the ledger key of site {cosign.id}")
    needed = manifest.study.aggregation.colluders + 1
    # The rounds that a hospital computed, or the hub completed.
    rounds = {(entry.manifest, entry.round) for entry in party.of(Completed)}
    rounds |= {(studied(charge), round_of(charge)) for charge in computed(party)}
    if (head.man.hex(), head.round) in rounds and len(offer.cosigns) < needed:
        return f"round {head.round} was made with {len(offer.cosigns)} cosignatures, {needed} are needed"
    return ""


def as_seen(party: Party, witness: Party, roots: Roots) -> str:
    """The ledger of ``party`` begins with what ``witness`` saw of it; ``roots`` are of that ledger."""
    head, size = witness.seen[party.id], len(party.evidence.leaves)
    if head.size > size:
        wrong = f"this ledger is older than {witness.name} saw it: {size} entries are there, not {head.size}"
    elif roots[head.size] != head.root:
        wrong = f"this ledger is another than {witness.name} saw: its first {head.size} entries differ"
    else:
        return ""
    return f"{wrong}; it says that it was restored from a backup" if party.of(Restored) else wrong


def remembers(party: Party, other: Party) -> str:
    """What ``party`` cosigned of ``other``'s ledger, it shows to have seen."""
    offer, seen = other.cosigned, party.seen.get(other.id)
    if offer is None or (seen is not None and seen.size >= offer.head.size):
        return ""
    return f"it cosigned {offer.head.size} entries of {other.name}, and shows an older head of that ledger"


def memberships(party: Party, trust: Trust) -> str:
    """Every trusted hospital was admitted with its fingerprint."""
    admitted = admitted_fingerprints(party)
    for member in trust.roster.members:
        if admitted.get(member.id) != member.fingerprint:
            return f"the ledger does not say that {member.name} was admitted, or with other keys"
    return ""


def admitted_fingerprints(hub: Party) -> dict[int, str]:
    """The fingerprint of every hospital that the hub's ledger says was ever admitted, by id."""
    return {said.id: said.fingerprint for said in hub.of(Membership) if said.decision == "admitted"}


def members_known(party: Party, trust: Trust, hub: Party | None) -> str:
    """Every member of a study is in the trusted roster, or the hub's ledger admitted it with these keys."""
    trusted = {member.id for member in trust.roster.members}
    admitted = {} if hub is None else admitted_fingerprints(hub)
    for name, (manifest, roster, _) in party.studies.items():
        for member in manifest.members:
            if member.id not in trusted and admitted.get(member.id) != roster.member(member.id).fingerprint:
                unknown = "is neither in the trusted roster nor admitted in the hub's ledger"
                return f"{member.name} of study {name[:12]} {unknown}"
    return ""


def charged_as_completed(site: Party, hub: Party) -> str:
    """Every sum that the hub opened over this hospital was charged here, and its upload recorded."""
    rounds = {charge.event_id: (studied(charge), round_of(charge)) for charge in site.of(Charge)}
    charged = set(rounds.values())
    begun = (entry for entry in site.of(Outcome) if entry.reason == "upload_started")
    uploaded = {(rounds.get(entry.event_id), entry.ctx) for entry in begun}
    for entry in hub.of(Completed):
        if site.id in entry.cohort:
            done = (entry.manifest, entry.round)
            where = f"round {entry.round} of study {entry.manifest[:12]}, entry {entry.seq} of the hub"
            if done not in charged:
                return f"it charged nothing for {where}, or this evidence is older"
            if (done, entry.ctx) not in uploaded:
                return f"it recorded no such upload for {where}, or this evidence is older"
    return ""


def completed_as_said(site: Party, hub: Party) -> str:
    """The hub's ledger has every study that this hospital used, and every result that it had."""
    opened = {entry.ctx for entry in hub.of(Completed)}
    submitted = {entry.manifest for entry in hub.of(Submission)}
    for seq, name in named_studies(site.entries):
        if name not in submitted:
            return f"the hub's ledger does not have study {name[:12]} of entry {seq}, or is older"
    for entry in site.of(Outcome):
        if entry.reason == "completed" and entry.ctx not in opened:
            return f"the hub's ledger does not have the result of entry {entry.seq}, or is older"
    return ""
