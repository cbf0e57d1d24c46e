"""Heads of ledgers, carried between the hospitals of a study before each of its rounds.

Source: PROTOCOL L1, L2; DESIGN "A round, end to end", step 7. Rules: the hub only carries: a hospital counts
the cosignatures itself, and takes part in no round without them; the hub's own head goes along, and its last
cosigned head and everybody's last are kept as evidence.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Final

from common import messages
from common.encoding import base64_text
from common.errors import VerificationError
from common.messages import Kind, Request
from common.roster import Roster
from common.secagg import records
from common.secagg.params import RunParams
from common.secagg.records import Cosign, Head, HeadPlease, Record
from common.study import Aggregation
from common.witness import HUB, MAX_SINCE, Witness
from server.exchange import Exchange, Take, only
from server.ledger import HubLedger
from server.store import HeadRow

log = logging.getLogger("wardround.hub.rounds")

TRIES: Final = 5
SPARE_COSIGNERS: Final = 2
LATE_S: Final = 5.0
KEPT_SIZES: Final = 48


class Heads:
    """The heads of one study's parties."""

    def __init__(
        self, exchange: Exchange, params: RunParams, timing: Aggregation, roster: Roster, ledger: HubLedger
    ) -> None:
        self._exchange, self._params, self._timing = exchange, params, timing
        self._ledger, self._store = ledger, ledger.store
        self._keys = {member: roster.member(member).ledger_key for member in params.members}
        self._witness = Witness(HUB, lambda _: None)
        self._witness.seen = {
            row.party: records.decode(Head, row.head)
            for row in self._store.heads()
            if row.party in self._keys
        }
        self._sizes: defaultdict[int, list[int]] = defaultdict(list)

    def cosigned(self, number: int, sites: Collection[int]) -> set[int]:
        """Let ``sites`` cosign each other's heads for a round; who has enough cosignatures, and was told.

        Asked again, with the proofs that were missing, when somebody remembers another size than expected:
        another study of the same hospitals may have shown a later head meanwhile.
        """
        for row in self._store.heads():
            self._sizes[row.party] = [*self._sizes[row.party][-KEPT_SIZES:], row.size]
        heads: dict[int, Head] = {}
        cosigns: dict[int, dict[int, Cosign]] = {}
        for _ in range(TRIES):
            heads = self._heads(number, sites)
            cosigns, refused = self._cosigns(heads)
            if not any(refused.values()):
                break
            for party, sizes in refused.items():
                # Who claims to have seen more than a ledger has is not believed: it would be asked for it.
                self._sizes[party] += sorted(size for size in sizes if size <= heads[party].size)
        self._keep(heads, cosigns)
        enough = {site for site in heads if site and len(cosigns[site]) > self._params.t}
        for site in enough:
            self._exchange.tell(messages.COSIGNED, [site], *cosigns[site].values())
        return enough

    def _heads(self, number: int, sites: Collection[int]) -> dict[int, Head]:
        """L1 of the hub, under 0, and of each site that answers."""
        heads: dict[int, Head] = {}

        def take(site: int, found: tuple[Record, ...]) -> None:
            head = only(found, Head)
            if (head.id, head.round) == (site, number):
                _, remembered = self._witness.see(self._params.man, (head,), self._keys)
                if self._witness.contradicted:
                    log.warning("%s: its ledger is older or another than before", self._exchange.name(site))
                self._sizes[site] += [size for _, size in remembered]
                heads[site] = head

        asked = {s: self._exchange.request(messages.HEAD, self._please(number, s)) for s in sites}
        self._collect(messages.HEAD, asked, take)
        please, leaves = self._please(number, HUB), self._ledger.ledger.leaf_hashes()
        heads[HUB] = self._witness.offer(self._params.man, please, os.urandom(32), leaves, self._ledger.sign)
        for party, head in heads.items():
            self._sizes[party] = list(dict.fromkeys([*self._sizes[party], head.size]))[-KEPT_SIZES:]
        return heads

    def _please(self, number: int, party: int) -> HeadPlease:
        newest = list(dict.fromkeys(reversed(self._sizes[party])))[:MAX_SINCE]
        return HeadPlease(number, tuple(sorted(newest)))

    def _cosigns(self, heads: Mapping[int, Head]) -> tuple[dict[int, dict[int, Cosign]], dict[int, set[int]]]:
        """L2 by subject and cosigner, and the sizes that cosigners remember of heads they refused."""
        ring = sorted(site for site in heads if site != HUB)
        each = min(len(ring) - 1, self._params.t + 1 + SPARE_COSIGNERS)
        shown = {
            site: {HUB} | {ring[(at + k) % len(ring)] for k in range(1, each + 1)}
            for at, site in enumerate(ring)
        }
        requests = {
            site: self._exchange.request(messages.COSIGN, *(heads[party] for party in sorted(parties)))
            for site, parties in shown.items()
        }
        subjects = {records.head_digest(head): party for party, head in heads.items()}
        cosigns: dict[int, dict[int, Cosign]] = {party: {} for party in heads}
        refused: defaultdict[int, set[int]] = defaultdict(set)

        def take(site: int, found: tuple[Record, ...]) -> None:
            answer = only(found, records.Cosigned)
            for cosign in answer.cosigns:
                if cosign.id == site and cosign.head in subjects:
                    records.check_signature(cosign, self._params.man, self._keys[site], "its ledger key")
                    cosigns[subjects[cosign.head]][site] = cosign
            remembered = dict(answer.remembered)
            if len(remembered) < len(answer.remembered) or not set(remembered) <= shown[site]:
                # Each size is a proof to ask for: nobody may fill up another hospital's questions.
                raise VerificationError("heads.remembered", "it remembers heads that it was not shown")
            for party, size in remembered.items():
                refused[party].add(size)

        self._collect(messages.COSIGN, requests, take)
        return cosigns, refused

    def _collect(self, kind: Kind, requests: Mapping[int, Request], take: Take) -> None:
        """Ask; once m have answered, the others have the stragglers' time, at most LATE_S."""
        answered, m = set[int](), self._timing.minimum_hospitals

        def taken(site: int, found: tuple[Record, ...]) -> None:
            answered.add(site)
            take(site, found)

        self._exchange.collect(
            kind,
            requests,
            self._timing.deadline_s,
            taken,
            enough=lambda: len(answered) >= m,
            least=m,
            late_s=min(self._timing.straggler_s, LATE_S),
        )

    def _keep(self, heads: Mapping[int, Head], cosigns: Mapping[int, Mapping[int, Cosign]]) -> None:
        rows = []
        for party, head in heads.items():
            signed = json.dumps([base64_text(records.encode(c)) for c in cosigns[party].values()])
            rows.append(HeadRow(party=party, size=head.size, head=records.encode(head), cosigns=signed))
        self._store.keep_heads(rows)
