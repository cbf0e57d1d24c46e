"""A hub and hospitals that only keep ledgers and cosign heads: what evidence is made of. For tests only.

Every entry goes through the product's Ledger and every head through its Witness; no rows, no sums, no processes.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import identity
from common.admissible import check
from common.audit.evidence import Evidence
from common.audit.trust import Trust
from common.identity import key_text, new_signing_key, public_key
from common.ledger.entries import (
    Approval,
    Charge,
    Completed,
    Ended,
    Entry,
    Membership,
    Opened,
    Outcome,
    Submission,
    decode,
    encode,
)
from common.ledger.notes import Checkpoint, origin_of, sign_note
from common.ledger.store import Ledger
from common.ledger.tree import leaf_hash, root
from common.roster import Member, Roster, SignedRoster
from common.run import run_params, study_document
from common.secagg import keys
from common.secagg.codec import with_one
from common.secagg.masks import apply_keystreams, chunk_digests
from common.secagg.records import (
    Cohort,
    Cosign,
    Head,
    HeadPlease,
    Open,
    Result,
    RoundStart,
    Upload,
    context,
    head_digest,
    payload_digest,
    signed,
)
from common.secagg.sums import Accumulator
from common.secagg.transcript import Transcript, write_transcripts
from common.study import Manifest, Party, SignedManifest, Study
from common.tasks.models import initial_state
from common.tasks.state import model_digest
from common.version import SOFTWARE_VERSION
from common.witness import HUB, Witness
from tests.federation import NAMES, small_study

START = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
SHARED: dict[str, Any] = {
    "name": "shared",
    "training__mode": "shared-noise",
    "training__engine": "bookkeeping",
    "aggregation__codec__step": 0.001,
    "privacy__noise_multiplier": 30.0,
}
WITHOUT_DP: dict[str, Any] = {
    "name": "plain",
    "privacy": {"kind": "without_differential_privacy"},
    "aggregation__minimum_hospitals": 4,
}


@dataclass
class Keeper:
    """Whoever keeps a ledger: a hospital, or the hub with id 0."""

    id: int
    name: str
    protocol: Ed25519PrivateKey
    key: Ed25519PrivateKey
    ledger: Ledger
    register: str = field(default_factory=lambda: os.urandom(16).hex())

    def __post_init__(self) -> None:
        self.witness = Witness(self.id, lambda _: None)
        self.actor = key_text(public_key(self.key))

    @property
    def member(self) -> Member:
        return Member(self.id, self.name, public_key(self.protocol), public_key(self.key))

    def append(self, entry_type: type[Any], **fields: Any) -> int:
        return self.ledger.append(entry_type.model_validate({"actor": self.actor, **fields}))


class Federation:
    """The hub is 0, hospitals count from 1. A minute passes with each entry."""

    def __init__(self, folder: Path, hospitals: int = 4, epsilon: float = 3.0) -> None:
        self.now = START
        self.hub_key, self.coordinator = new_signing_key(), new_signing_key()
        self.manifests: dict[bytes, Manifest] = {}
        self.documents: dict[bytes, bytes] = {}
        self.keepers: dict[int, Keeper] = {}
        self.transcripts: dict[bytes, list[Transcript]] = {}
        self.payloads: dict[tuple[str, int, int], bytes] = {}
        for number, name in enumerate(("hub", *NAMES)[: hospitals + 1]):
            key = new_signing_key() if number else self.hub_key
            path = folder / f"{number}.db"
            ledger = Ledger.open(path, key, create=True, clock=self.clock)
            self.keepers[number] = Keeper(number, name, new_signing_key(), key, ledger)
        for hospital in self.hospitals.values():
            decided = {"fingerprint": hospital.member.fingerprint, "decision": "admitted"}
            self.hub.append(Membership, id=hospital.id, name=hospital.name, **decided)
            caps = {"epsilon_t": f"{epsilon:g}", "epsilon_w": f"{epsilon:g}", "delta": "0.000001"}
            hospital.append(Opened, register_id=hospital.register, **caps)

    def close(self) -> None:
        for keeper in self.keepers.values():
            keeper.ledger.close()

    def clock(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now

    @property
    def hub(self) -> Keeper:
        return self.keepers[HUB]

    @property
    def hospitals(self) -> dict[int, Keeper]:
        return {number: keeper for number, keeper in self.keepers.items() if number != HUB}

    @cached_property
    def roster(self) -> Roster:
        return Roster(tuple(hospital.member for hospital in self.hospitals.values()))

    @cached_property
    def signed_roster(self) -> SignedRoster:
        return SignedRoster.create(self.roster, self.hub_key)

    @property
    def trust(self) -> Trust:
        return Trust(public_key(self.hub_key), self.signed_roster)

    # -- what happens ----------------------------------------------------------------------------------------

    def manifest(self, roster: Roster | None = None, **changes: Any) -> Manifest:
        study = Study.from_toml(tomli_w.dumps(small_study([m.name for m in self.roster.members], **changes)))
        return Manifest.model_validate(
            {
                "schema": 1,
                "run": os.urandom(16).hex(),
                "roster": (roster or self.roster).digest.hex(),
                "hub": key_text(public_key(self.hub_key)),
                "coordinator": key_text(public_key(self.coordinator)),
                "members": tuple(Party(id=m.id, name=m.name) for m in self.roster.members),
                "study": study,
            }
        )

    def document(self, manifest: Manifest, roster: SignedRoster | None = None) -> bytes:
        return study_document(SignedManifest.sign(manifest, self.coordinator), roster or self.signed_roster)

    def submit(self, **changes: Any) -> Manifest:
        """A study of all hospitals, submitted and approved by all."""
        manifest = self.manifest(**changes)
        digest = manifest.digest.hex()
        self.manifests[manifest.digest] = manifest
        self.documents[manifest.digest] = self.document(manifest)
        self.hub.append(Submission, manifest=digest, coordinator=manifest.coordinator)
        for hospital in self.hospitals.values():
            hospital.append(Approval, manifest=digest, decision="approved", reason="A. Person: for the test")
        return manifest

    def cosign(self, manifest: Manifest, number: int) -> None:
        """L1 and L2 of everybody for a round."""
        man, keys = manifest.digest, {m.id: m.ledger_key for m in self.roster.members}
        keys[HUB] = public_key(self.hub_key)
        heads: dict[int, Head] = {}
        for keeper in self.keepers.values():
            known = {
                k.witness.seen[keeper.id].size for k in self.keepers.values() if keeper.id in k.witness.seen
            }
            please = HeadPlease(number, tuple(sorted(known)))
            hashes = keeper.ledger.leaf_hashes()
            heads[keeper.id] = keeper.witness.offer(man, please, os.urandom(32), hashes, keeper.key.sign)
        cosigns: list[Cosign] = []
        for hospital in self.hospitals.values():
            others = [head for party, head in heads.items() if party != hospital.id]
            cosigns += hospital.witness.cosign(man, others, keys, hospital.key.sign).cosigns
        self.hub.witness.see(man, [head for party, head in heads.items() if party != HUB], keys)
        for keeper in self.keepers.values():
            mine = [cosign for cosign in cosigns if cosign.head == head_digest(heads[keeper.id])]
            keeper.witness.take(man, mine, keys)

    def round(self, manifest: Manifest, number: int, cohort: Sequence[int] = (1, 2, 3, 4)) -> None:
        """A completed round: heads, charges, uploads, the sum."""
        self.cosign(manifest, number)
        admitted, events = check(manifest, None), {}
        for member in cohort:
            keeper = self.keepers[member]
            event = admitted.event(keeper.register, number, 1, os.urandom(16).hex())
            events[member] = event.event_id
            keeper.append(Charge, event=event.to_fields())
        step = 1 + sum(
            isinstance(e, Completed) and e.manifest == manifest.digest.hex()
            for e in self.hub.ledger.entries()
        )
        transcript = self.opened(manifest, number, tuple(cohort))
        ctx, result = transcript.ctx.hex(), transcript.result
        said: dict[str, Any] = {"state": "released", "attempt": 1, "ctx": ctx}
        share = {"U_size": len(cohort), "s_g_squared": admitted.shares[len(cohort) - admitted.minimum]} if (
            admitted.shared
        ) else {}  # fmt: skip
        for member in cohort:
            left = {"event_id": events[member], "reason": "upload_started", **share, **said}
            self.keepers[member].append(Outcome, **left)
        digests = {
            "sum_digest": result.sum_digest.hex(),
            "model_digest": result.model_digest.hex(),
            "ctx": ctx,
        }
        fields = {"manifest": manifest.digest.hex(), "round": number, "step": step, "attempt": 1}
        self.hub.append(Completed, cohort=tuple(cohort), **fields, **digests)
        for member in cohort:
            self.keepers[member].append(Outcome, event_id=events[member], reason="completed", **said)

    def opened(self, manifest: Manifest, number: int, ids: tuple[int, ...]) -> Transcript:
        """A real sum of random vectors; without pair masks, which cancel in it anyway."""
        man, earlier = manifest.digest, self.transcripts.setdefault(manifest.digest, [])
        admitted = check(manifest, None)
        initial = model_digest(initial_state(manifest), admitted.layout)
        began = earlier[-1].result.model_digest if earlier else initial
        params = run_params(manifest, admitted, self.roster, HUB)
        start = RoundStart(man, bytes(range(32)), number, os.urandom(32), began, 1)
        cohort = Cohort(number, 1, tuple((member, os.urandom(32)) for member in ids))
        ctx = context(man, start.dirh, began, cohort)
        accumulator, uploads, openings = Accumulator(params, cohort, ctx), list[Upload](), list[Open]()
        for member in ids:
            b, sign = os.urandom(32), self.keepers[member].protocol.sign
            vectors = (
                np.frombuffer(os.urandom(params.parameters * params.bits // 8), f"<u{params.bits // 8}"),
                np.zeros(params.scalars, "<u8"),
            )
            masked = [with_one(words) for words in vectors]
            for vector, words in zip(keys.VECTORS, masked, strict=True):
                apply_keystreams(words, [keys.self_mask_key(b, vector, ctx)])
            payload = b"".join(words.tobytes() for words in masked)
            self.payloads[man.hex(), number, member] = payload
            digests = chunk_digests(payload, params.layout)
            commit = keys.commitment(b, ctx, member)
            uploads.append(signed(Upload(member, ctx, commit, payload_digest(digests), digests), man, sign))
            openings.append(signed(Open(member, ctx, b), man, sign))
            accumulator.add_header(member, uploads[-1])
            for index, span in enumerate(params.layout.spans):
                accumulator.add_chunk(member, index, payload[span.start : span.stop])
        for opening in openings:
            accumulator.open(opening.id, opening)
        result = Result(ctx, accumulator.finish().digest, os.urandom(32))
        start, result = (signed(record, man, self.hub_key.sign) for record in (start, result))
        earlier.append(Transcript(start, cohort, tuple(uploads), tuple(openings), result))
        return earlier[-1]

    def end(self, manifest: Manifest) -> None:
        self.hub.append(Ended, manifest=manifest.digest.hex(), status="done")

    # -- what is shown ---------------------------------------------------------------------------------------

    def evidence(self, party: int) -> Evidence:
        keeper = self.keepers[party]
        return Evidence(
            party=party,
            name=keeper.name,
            time=(self.now + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%MZ"),
            version=SOFTWARE_VERSION,
            roster=self.signed_roster,
            hub_key=public_key(self.hub_key),
            leaves=keeper.ledger.leaves(),
            head=keeper.ledger.checkpoint(public_key(keeper.key)),
            heads=keeper.witness.to_bytes(),
            studies={digest.hex(): document for digest, document in self.documents.items()},
            rounds={}
            if party
            else {man.hex(): self.rounds(found) for man, found in self.transcripts.items()},
        )

    def rounds(self, transcripts: Sequence[Transcript]) -> bytes:
        return write_transcripts([transcript.to_bytes() for transcript in transcripts])

    def evidences(self) -> list[Evidence]:
        return [self.evidence(party) for party in self.keepers]

    # -- what a forger who holds a ledger's key can do ------------------------------------------------------

    def head(self, party: int, leaves: Iterable[bytes]) -> str:
        """A head over any leaves, signed as it should be."""
        key, hashes = self.keepers[party].key, [leaf_hash(leaf) for leaf in leaves]
        public = public_key(key)
        body = Checkpoint(origin_of(public), len(hashes), root(hashes)).body()
        return sign_note(body, origin_of(public), public, lambda data: identity.sign(key, data))

    def rewritten(self, evidence: Evidence, change: Callable[[list[Entry]], Any]) -> Evidence:
        """The evidence with other entries, numbered anew and signed anew by their owner."""
        entries = [decode(leaf) for leaf in evidence.leaves]
        change(entries)
        leaves = tuple(encode(e.model_copy(update={"seq": seq})) for seq, e in enumerate(entries))
        return replace(evidence, leaves=leaves, head=self.head(evidence.party, leaves))


def charged(entry: Entry, **changes: str | int | None) -> Entry:
    """A charge with other event fields; None takes one away."""
    assert isinstance(entry, Charge)
    fields = {name: value for name, value in {**entry.event, **changes}.items() if value is not None}
    return entry.model_copy(update={"event": fields})


def flipped(data: bytes, generator: np.random.Generator) -> bytes:
    """One bit changed, somewhere."""
    place = int(generator.integers(len(data)))
    return data[:place] + bytes([data[place] ^ (1 << int(generator.integers(8)))]) + data[place + 1 :]
