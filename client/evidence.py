"""What this hospital shows an auditor: its ledger, the studies that it names, the heads that were cosigned.

Source: DESIGN "Ledger"; PROTOCOL L1, L2. Rules: no key, policy, extract or run file is opened; a study goes
in only when it verifies; everything is of one moment, also beside a running agent.
"""

from datetime import datetime

from client.state import SiteHome
from client.studies import StudyFolder
from common.audit.evidence import Evidence
from common.audit.party import studied
from common.enrolment import Admission
from common.errors import RefusedError, UsageError, VerificationError
from common.ledger.entries import utc_minute
from common.ledger.notes import open_note, origin_of, read_checkpoint
from common.ledger.store import Ledger
from common.roster import SignedRoster
from common.version import SOFTWARE_VERSION


def collect(home: SiteHome, now: datetime) -> Evidence:
    """The evidence of a site's folder at ``now`` (aware).

    Guarantee: site_evidence_holds_no_secret - only public documents and ledger leaves; nothing else in the
    folder is even opened.
    Raises: RefusedError before admission or while the ledger is empty; VerificationError when the ledger or a
    study that it names is damaged.
    """
    admission = _admission(home)
    public = admission.member().ledger_key
    with Ledger.open(home.ledger) as ledger:
        heads = _heads(home)
        head = ledger.checkpoint(public)
        # A charge follows the cosignatures that it needs: heads older than the ledger would lack them.
        while (later := _heads(home)) != heads:
            heads, head = later, ledger.checkpoint(public)
        size = read_checkpoint(open_note(head, origin_of(public), public)).size
        leaves, entries = ledger.leaves()[:size], ledger.entries()[:size]
    studies = dict[str, bytes]()
    rosters = [SignedRoster(admission.roster, admission.roster_signature)]
    for digest in dict.fromkeys(map(studied, entries)):
        if digest and home.study(digest).exists():
            studies[digest], roster = _study(home, digest)
            rosters.append(roster)
    return Evidence(
        party=admission.id,
        name=admission.name,
        time=utc_minute(now),
        version=SOFTWARE_VERSION,
        roster=_newest(rosters, admission.hub_key),
        hub_key=admission.hub_key,
        leaves=leaves,
        head=head,
        heads=heads,
        studies=studies,
    )


def _admission(home: SiteHome) -> Admission:
    try:
        return Admission.from_bytes(home.admission.read_bytes())
    except FileNotFoundError as error:
        problem = f"{home.admission} is missing: this site is not admitted yet and has nothing to show"
        remedy = "Put the admission that the coordinator sent there."
        raise RefusedError("site.not-admitted", problem, remedy=remedy) from error


def _heads(home: SiteHome) -> bytes:
    return home.heads.read_bytes() if home.heads.exists() else b""


def _study(home: SiteHome, digest: str) -> tuple[bytes, SignedRoster]:
    folder, man = StudyFolder(home), bytes.fromhex(digest)
    try:
        _, roster = folder.read(man)
    except (VerificationError, UsageError) as error:
        problem = f"{home.study(digest)} does not verify: {error.problem}"
        remedy = "Put it back from a backup, or move it away: an auditor is then told that it is missing."
        raise VerificationError("evidence.study", problem, remedy=remedy) from error
    return folder.load(man), roster


def _newest(rosters: list[SignedRoster], hub_key: bytes) -> SignedRoster:
    """A roster states no time: the one with the most members, and of those the one that came last."""
    sizes = {roster: len(roster.verify(hub_key).members) for roster in rosters}
    return max(reversed(rosters), key=sizes.__getitem__)
