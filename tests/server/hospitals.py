"""Hubs in a folder, hospitals without torch, and a Grid in this process. For tests only.

A hospital here is the real machine of the secure sum behind the real messages; what it contributes is a
vector that the test knows, so that sums can be checked exactly.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from common import flower, identity, messages
from common.admissible import Admitted, check
from common.certificates import new_tls_key_and_csr
from common.enrolment import Admission, AdmissionRequest
from common.errors import WardroundError
from common.ledger.tree import leaf_hash
from common.messages import Reply, Request
from common.roster import SignedRoster
from common.run import read_study_document, run_params
from common.secagg import records
from common.secagg.codec import quantise
from common.secagg.params import RunParams
from common.secagg.site import Site
from common.study import Manifest, Party, SignedManifest, Study
from common.tasks.state import load_state, model_digest
from common.witness import HUB, Witness
from server.enrolment import admit_site, create_hub, sign_roster
from server.home import CoordinatorHome, HubHome
from server.memory import MemoryGrid
from server.processes import free_port
from server.store import Checkpoint, Store, StudyRow
from tests.federation import small_study

NAMES = (
    "St. Mary",
    "Northgate",
    "Riverside",
    "Holy Cross",
    "Eastfield",
    "Westfield",
    "Southgate",
    "Hilltop",
    "Lakeside",
    "Old Mill",
)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
WITHOUT_DP = {"kind": "without_differential_privacy"}

Update = Callable[[int, int, dict[str, NDArray[np.float32]]], NDArray[np.float64]]
Answer = tuple[bytes, tuple[bytes, ...]]
Meddle = Callable[[int, str, bytes, tuple[bytes, ...]], Answer | None]


@dataclass
class Keys:
    """A hospital's private keys and the request it sends."""

    tls_key_pem: bytes
    protocol: Ed25519PrivateKey
    ledger: Ed25519PrivateKey
    request: AdmissionRequest


def new_keys(name: str) -> Keys:
    key_pem, csr_pem = new_tls_key_and_csr(name)
    protocol, ledger = identity.new_signing_key(), identity.new_signing_key()
    return Keys(key_pem, protocol, ledger, AdmissionRequest.create(name, csr_pem, protocol, ledger))


@dataclass
class Founded:
    """A hub's folder with admitted hospitals."""

    home: HubHome
    keys: dict[int, Keys] = field(default_factory=dict)
    admissions: dict[int, Admission] = field(default_factory=dict)

    @property
    def coordinator(self) -> CoordinatorHome:
        return CoordinatorHome(self.home.coordinator)

    def admit(self, name: str) -> Admission:
        keys = new_keys(name)
        admission = admit_site(self.home, keys.request.to_bytes(), now=datetime.now(UTC))
        self.keys[admission.id], self.admissions[admission.id] = keys, admission
        return admission

    def signed_roster(self) -> SignedRoster:
        store = Store.open(self.home.database)
        try:
            return sign_roster(self.home, store.sites())
        finally:
            store.close()

    def sign_study(self, **changes: Any) -> SignedManifest:
        """A study of all admitted hospitals, signed by the coordinator; changes as for small_study."""
        return self.sign(self.manifest(**changes))

    def manifest(self, **changes: Any) -> Manifest:
        overrides = {key[1:]: changes.pop(key) for key in list(changes) if key.startswith("_")}
        names = [admission.name for admission in self.admissions.values()]
        study = Study.from_toml(tomli_w.dumps(small_study(names, **changes)))
        coordinator = identity.load_signing_key(self.coordinator.signing_key)
        values = {
            "schema": 1,
            "run": os.urandom(16).hex(),
            "roster": self.signed_roster().digest.hex(),
            "hub": self.coordinator.load_settings().hub_key,
            "coordinator": identity.key_text(identity.public_key(coordinator)),
            "members": tuple(Party(id=a.id, name=a.name) for a in self.admissions.values()),
            "study": study,
        }
        return Manifest.model_validate(values | overrides)

    def sign(self, manifest: Manifest) -> SignedManifest:
        return SignedManifest.sign(manifest, identity.load_signing_key(self.coordinator.signing_key))

    def store_study(self, store: Store, signed: SignedManifest) -> str:
        """Put a study into the hub's table as Submit does; its digest."""
        manifest, roster = signed.verify(), self.signed_roster()
        row = StudyRow(
            digest=manifest.digest.hex(),
            name=manifest.study.name,
            manifest=signed.manifest_bytes,
            signature=signed.signature,
            roster=roster.data,
            roster_signature=roster.signature,
            status="queued",
            rounds=manifest.study.training.rounds,
            submitted="2026-01-01T00:00Z",
        )
        assert store.add_study(row)
        return manifest.digest.hex()


def found(folder: Path, hospitals: int = 3) -> Founded:
    """A new hub on a free port of loopback with that many admitted hospitals."""
    address = f"127.0.0.1:{free_port()}"
    founded = Founded(HubHome(folder / "hub"))
    create_hub(founded.home, address=address, listen=address, now=datetime.now(UTC))
    for name in NAMES[:hospitals]:
        founded.admit(name)
    return founded


def complete(store: Store, digest: str, state: bytes = b"model") -> None:
    """One more completed round."""
    number, step = store.start_round(digest), store.study(digest).round + 1
    digests = (b"c" * 32, b"s" * 32, b"m" * 32)
    store.complete_round(digest, Checkpoint(number, step, 1, (1, 3), *digests, state, b"", b"", number / 4))


def known_update(site: int, round_number: int, state: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """What a hospital adds in a round: irrational-looking, and never the same twice."""
    size = sum(value.size for value in state.values())
    return np.sin(np.arange(1, size + 1) * site + 0.1 * round_number)


class Hospital:
    """One hospital's end: its machine, what it was asked, what it decided."""

    def __init__(self, founded: Founded, site_id: int, update: Update = known_update) -> None:
        self.id = site_id
        self.decision = "approved"
        self.asked: list[str] = []
        self.states: list[dict[str, NDArray[np.float32]]] = []
        self.results: list[records.Result] = []
        self.site: Site | None = None
        self._sign = founded.keys[site_id].protocol.sign
        self.ledger_sign = founded.keys[site_id].ledger.sign
        self.witness = Witness(site_id, lambda _state: None)
        self.leaf_hashes = [leaf_hash(b"%d" % site_id)]
        self._ledger_keys: dict[int, bytes] = {}
        self._hub_key = founded.admissions[site_id].hub_key
        self._update = update
        self._manifest: Manifest | None = None
        self._admitted: Admitted | None = None
        self._params: RunParams | None = None

    @property
    def man(self) -> bytes:
        """The study that runs here."""
        assert self._params is not None
        return self._params.man

    def answer(self, message_type: str, body: bytes, attachment: Sequence[bytes]) -> Answer:
        """The reply to a request: ``unavailable`` for whatever the machine refuses."""
        self.asked.append(message_type)
        kind = messages.kind_of(message_type)
        try:
            request = messages.decode_request(message_type, body)
            reply, payload = self._handle(request, b"".join(attachment))
        except WardroundError:
            reply, payload = Reply(kind, available=False), ()
        return messages.encode_reply(reply), payload

    def answer_message(self, message: flower.Message) -> flower.Message:
        """The same, as a ClientApp would be asked."""
        body, payload = self.answer(
            message.metadata.message_type, flower.body_of(message), flower.attachment_of(message)
        )
        return flower.reply(message, body, payload)

    def _handle(self, request: Request, attachment: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        kind, found = request.kind, request.records
        if kind is messages.STUDY:
            self._join(request)
            return Reply(kind, True, (), self.decision), ()
        if kind is messages.CONSENT:
            return Reply(kind, True, (), self.decision), ()
        if self.site is None or self._params is None:
            return Reply(kind, available=kind is messages.CLOSE), ()
        if kind is messages.KEYS:
            return Reply(kind, True, (self.site.announce(),)), ()
        if kind is messages.DIRECTORY:
            return Reply(kind, True, self.site.on_directory(found[0])), ()  # type: ignore[arg-type]
        if kind is messages.SEEDS:
            return Reply(kind, True, (self.site.on_pair_seeds(found),)), ()  # type: ignore[arg-type]
        if kind is messages.CONFIRMS:
            self.site.on_confirms(found)  # type: ignore[arg-type]
        elif kind in (messages.HEAD, messages.COSIGN, messages.COSIGNED):
            return Reply(kind, True, self._heads(request)), ()
        elif kind is messages.READY:
            return Reply(kind, True, (self._ready(found[0], attachment),)), ()  # type: ignore[arg-type]
        elif kind is messages.UPLOAD:
            header = self.site.on_cohort(found[0])  # type: ignore[arg-type]
            payload = self.site.payload()
            spans = self._params.layout.spans
            return Reply(kind, True, (header,)), tuple(payload[s.start : s.stop] for s in spans)
        elif kind is messages.OPEN:
            return Reply(kind, True, (self.site.on_open_please(found[0]),)), ()  # type: ignore[arg-type]
        elif kind is messages.RESULT:
            assert isinstance(found[0], records.Result)
            self.site.on_result(found[0])
            self.results.append(found[0])
        elif kind is messages.CLOSE:
            self.site.close()
        return Reply(kind), ()

    def _join(self, request: Request) -> None:
        signed, signed_roster = read_study_document(request.document)
        manifest = signed.verify()
        assert manifest.digest == request.man
        if self.site is None or self._manifest != manifest:
            roster = signed_roster.verify(self._hub_key)
            self._manifest, self._admitted = manifest, check(manifest, None)
            self._params = run_params(manifest, self._admitted, roster, self.id)
            self._ledger_keys = {member.id: member.ledger_key for member in roster.members}
            self._ledger_keys[HUB] = self._hub_key
            self.site = Site(self._params, persist=lambda _state: None, entropy=os.urandom, sign=self._sign)

    def _heads(self, request: Request) -> tuple[records.Record, ...]:
        man, found = request.man, request.records
        if request.kind is messages.HEAD:
            please: Any = found[0]
            nonce, sign = os.urandom(32), self.ledger_sign
            return (self.witness.offer(man, please, nonce, self.leaf_hashes, sign),)
        if request.kind is messages.COSIGN:
            return (self.witness.cosign(man, found, self._ledger_keys, self.ledger_sign),)  # type: ignore[arg-type]
        self.witness.take(man, found, self._ledger_keys)  # type: ignore[arg-type]
        return ()

    def _ready(self, start: records.RoundStart, state_file: bytes) -> records.Ready:
        assert self.site is not None
        assert self._manifest is not None
        assert self._admitted is not None
        assert records.state_digest(state_file) == start.state
        aggregation = self._manifest.study.aggregation
        state = load_state(state_file, self._admitted.layout, aggregation.state_norm_bound)
        digest = model_digest(state, self._admitted.layout)
        assert self._params is not None
        self.witness.spend(self._params.man, start.round, self._params.t + 1)
        self.site.on_round_start(start)
        # The charge.
        self.leaf_hashes.append(leaf_hash(b"%d of %d" % (start.round, self.id)))
        self.states.append(state)
        codec = aggregation.codec
        q = quantise(self._update(self.id, start.round, state), codec.step, codec.range)
        return self.site.ready(q, np.zeros(0, dtype=np.int64), digest)


class Room(MemoryGrid):
    """A Grid whose nodes are hospitals in this process.

    ``meddle`` sees each reply (site, message type, body, payload) and gives what the hub gets instead;
    None is silence. ``before`` is called with each message type before a hospital is asked.
    """

    def __init__(self, hospitals: Iterable[Hospital]) -> None:
        super().__init__({})
        self.hospitals = {hospital.id: hospital for hospital in hospitals}
        self.meddle: Meddle = lambda _site, _type, body, payload: (body, payload)
        self.before: Callable[[int, str], None] = lambda _site, _type: None

    def get_node_ids(self) -> list[int]:
        return sorted(self.hospitals)

    def push_messages(self, messages: Iterable[flower.Message]) -> list[str]:
        message_ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            flower.with_id(message, message_id)
            message_ids.append(message_id)
            site, message_type = message.metadata.dst_node_id, message.metadata.message_type
            if site not in self.hospitals:
                continue
            self.before(site, message_type)
            body, payload = self.hospitals[site].answer(
                message_type, flower.body_of(message), flower.attachment_of(message)
            )
            given = self.meddle(site, message_type, body, payload)
            if given is not None:
                self._replies[message_id] = flower.reply(message, *given)
        return message_ids

    def wait(self, message_ids: Sequence[str], timeout_s: float) -> None:
        """Every reply has come while its message was pushed."""
        if not set(message_ids) & set(self._replies):
            time.sleep(min(timeout_s, 0.01))
