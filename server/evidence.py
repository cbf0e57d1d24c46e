"""What the hub shows an auditor: its ledger, its studies, and the heads it has seen, in one file.

Source: DESIGN "Ledger". Rules: the hub may run meanwhile; what the tables say stands in the ledger first; no
model, no payload and no key is in it.
"""

import base64
import json
from contextlib import closing
from datetime import datetime

from common import identity
from common.audit.evidence import Evidence
from common.audit.trust import Trust
from common.ledger.entries import Completed, utc_minute
from common.ledger.notes import open_note, origin_of, read_checkpoint
from common.ledger.store import Ledger
from common.roster import SignedRoster
from common.run import study_document
from common.secagg import records
from common.secagg.records import Cosign, Head
from common.secagg.transcript import write_transcripts
from common.study import SignedManifest
from common.version import SOFTWARE_VERSION
from common.witness import HUB, Offer, Witness
from server.enrolment import sign_roster
from server.home import HubHome
from server.ledger import HubLedger
from server.store import HeadRow, Store, StudyRow

NAME = "hub"


def trust(home: HubHome) -> Trust:
    """The roster to give to auditors, signed by the hub key. Raises RefusedError before any admission."""
    key = identity.load_signing_key(home.hub_key)
    with closing(Store.open(home.database)) as store:
        return Trust(identity.public_key(key), sign_roster(home, store.sites()))


def collect(home: HubHome, now: datetime) -> Evidence:
    """The hub's evidence. Raises RefusedError before the first admission."""
    signed = trust(home)
    with closing(Store.open(home.database)) as store:
        with closing(HubLedger(home, store)) as books:
            books.catch_up()
        # The tables only grow: what is read after the ledger has all that it names.
        with closing(Ledger.open(home.ledger)) as ledger:
            head = ledger.checkpoint(signed.hub_key)
            size = read_checkpoint(open_note(head, origin_of(signed.hub_key), signed.hub_key)).size
            leaves, entries = ledger.leaves()[:size], ledger.entries()[:size]
        studies = {row.digest: _document(store.study(row.digest)) for row in store.studies()}
        opened = {digest: store.transcripts(digest) for digest in studies}
        heads = store.heads()
    completed = {(entry.manifest, entry.round) for entry in entries if isinstance(entry, Completed)}
    rounds = {}
    for digest, found in opened.items():
        if shown := [data for number, data in found.items() if (digest, number) in completed]:
            rounds[digest] = write_transcripts(shown)
    own = HUB, NAME, utc_minute(now), SOFTWARE_VERSION, signed.signed, signed.hub_key
    return Evidence(*own, leaves, head, _heads({row.party: row for row in heads}), studies, rounds)


def _document(row: StudyRow) -> bytes:
    roster = SignedRoster(row.roster, row.roster_signature)
    return study_document(SignedManifest(row.manifest, row.signature), roster)


def _heads(rows: dict[int, HeadRow]) -> bytes:
    witness = Witness(HUB, lambda _: None)
    witness.seen = {party: records.decode(Head, row.head) for party, row in rows.items() if party != HUB}
    if own := rows.get(HUB):
        cosigns = [records.decode(Cosign, base64.b64decode(text)) for text in json.loads(own.cosigns)]
        witness.cosigned = Offer(records.decode(Head, own.head), {cosign.id: cosign for cosign in cosigns})
    return witness.to_bytes()
