"""Admitted hospitals in a folder, studies signed for them, and a hub in this process. For tests only.

The folders are made by the product's own enrolment; requests go straight into each hospital's Participation,
and the hub's side is the machines of ``common.secagg.hub``.
"""

import os
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from client.computation import Computation
from client.guard import Guard
from client.identity import SiteIdentity, create_site
from client.participation import Participation
from client.sources.source import DataSource
from client.state import SiteHome
from client.studies import StudyFolder
from client.worker import Worker
from common import identity, messages
from common.admissible import Admitted, check
from common.errors import FailureError
from common.ledger.entries import Entry
from common.ledger.store import Ledger
from common.messages import Kind, Reply, Request
from common.roster import Roster, SignedRoster
from common.run import run_params, study_document
from common.secagg import records
from common.secagg.hub import HubRound, HubSetup, Setup
from common.secagg.records import Record
from common.study import Manifest, Party, SignedManifest, Study
from common.tasks.models import initial_state
from common.tasks.state import model_digest, state_bytes
from server.enrolment import admit_site, create_hub, sign_roster
from server.home import CoordinatorHome, HubHome
from server.store import Store
from tests.federation import NAMES, extract_rows, small_study, source_of

ADDRESS = "127.0.0.1:9443"
WITHOUT_DP: dict[str, Any] = {"kind": "without_differential_privacy"}
ALLOW_WITHOUT_DP = {"allow_studies_without_differential_privacy": True}


class ComputedHere(Computation):
    """The worker's own code in this process: no process to start, and a test gives the entropy."""

    def __init__(
        self,
        manifest_bytes: bytes,
        source: DataSource,
        split_key: bytes,
        copies: Path,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        super().__init__(manifest_bytes, source, split_key, copies)
        self._worker = Worker(entropy)

    def warm(self) -> None:
        """There is nothing to start."""

    @property
    def running(self) -> bool:
        return not self.ended

    def started(self, timeout_s: float) -> bool:
        return not self.ended

    def compute(
        self, state: bytes, dim: int, timeout_s: float, cut: threading.Event | None = None
    ) -> NDArray[np.int64]:
        if self.ended or (cut is not None and cut.is_set()):
            raise FailureError("worker.ended", "the round was stopped before its computation began")
        self._worker.prepare(self.header(self._source), self._manifest_bytes)
        return np.frombuffer(self._worker.compute(state, self.opted_out), dtype="<i8").astype(np.int64)


def make(folder: Path, hospitals: int = 4) -> None:
    """Make a hub and admit hospitals, once; ``Federation`` works on copies."""
    now = datetime.now(UTC)
    hub = HubHome(folder / "hub")
    create_hub(hub, address=ADDRESS, listen=ADDRESS, now=now)
    homes = [SiteHome(folder / f"site{number}") for number in range(1, hospitals + 1)]
    requests = [create_site(home, name=name, hub=ADDRESS) for home, name in zip(homes, NAMES, strict=False)]
    for request in requests:
        admit_site(hub, request.to_bytes(), now=now)
    for home, request in zip(homes, requests, strict=True):
        # Admitted again: the same id, with the roster of all.
        home.admission.write_bytes(admit_site(hub, request.to_bytes(), now=now).to_bytes())


class Federation:
    """A copy of what ``make`` made, with policies and extracts."""

    def __init__(self, template: Path, folder: Path, *, epsilon: float = 3.0, **rules: Any) -> None:
        shutil.copytree(template, folder, dirs_exist_ok=True)
        self.hub = HubHome(folder / "hub")
        count = len(list(folder.glob("site*")))
        self.sites = {number: SiteHome(folder / f"site{number}") for number in range(1, count + 1)}
        # At which sizes of its ledger each hospital has shown a head.
        self.sizes: dict[int, set[int]] = {number: set() for number in self.sites}
        self.hub_key = identity.load_signing_key(self.hub.hub_key)
        coordinator = CoordinatorHome(self.hub.coordinator).signing_key
        self.coordinator_key = identity.load_signing_key(coordinator)
        store = Store.open(self.hub.database)
        try:
            self.roster = sign_roster(self.hub, store.sites())
        finally:
            store.close()
        for number, home in self.sites.items():
            self.write_extract(number, extract_rows(number))
            self.edit_policy(
                number,
                register={"epsilon_t": epsilon, "epsilon_w": epsilon},
                rules={"coordinators": [self.coordinator], **rules},
                data={"extract": source_of(home.folder / "extract.csv")},
            )

    @property
    def coordinator(self) -> str:
        """The coordinator's key, as policies name it."""
        return identity.key_text(identity.public_key(self.coordinator_key))

    @property
    def verified_roster(self) -> Roster:
        return self.roster.verify(identity.public_key(self.hub_key))

    def name(self, number: int) -> str:
        return self.verified_roster.member(number).name

    def write_extract(
        self, number: int, rows: Iterable[Sequence[object]], header: str = "patient,age,bmi,readmitted"
    ) -> None:
        lines = [header, *(",".join(map(str, row)) for row in rows)]
        (self.sites[number].folder / "extract.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def edit_policy(self, number: int, **tables: dict[str, Any]) -> None:
        """Change tables of a policy as a person would."""
        path = self.sites[number].policy
        policy = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, values in tables.items():
            policy.setdefault(name, {}).update(values)
        path.write_text(tomli_w.dumps(policy), encoding="utf-8")

    def manifest(self, members: Sequence[int] = (1, 2, 3), **changes: Any) -> Manifest:
        """A manifest of the small study; ``changes`` as in ``tests.federation.small_study``."""
        named = {number: self.name(number) for number in members}
        study = Study.from_toml(tomli_w.dumps(small_study(list(named.values()), **changes)))
        return Manifest.model_validate(
            {
                "schema": 1,
                "run": np.random.default_rng().bytes(16).hex(),
                "roster": self.roster.digest.hex(),
                "hub": identity.key_text(identity.public_key(self.hub_key)),
                "coordinator": self.coordinator,
                "members": tuple(Party(id=number, name=name) for number, name in sorted(named.items())),
                "study": study,
            }
        )

    def sign(self, manifest: Manifest, key: Ed25519PrivateKey | None = None) -> SignedManifest:
        return SignedManifest.sign(manifest, key or self.coordinator_key)

    def document(self, manifest: Manifest, roster: SignedRoster | None = None) -> bytes:
        """What the hub sends for a manifest that the coordinator signed."""
        return study_document(self.sign(manifest), roster or self.roster)

    def identity(self, number: int) -> SiteIdentity:
        return SiteIdentity.load(self.sites[number])

    def guard(self, number: int, now: datetime | None = None) -> Guard:
        return Guard(self.sites[number], self.identity(number), lambda: now or datetime.now(UTC))

    def receive(self, number: int, manifest: Manifest) -> str:
        """Put a study where a hospital keeps what the hub sent; the digest."""
        StudyFolder(self.sites[number]).add(manifest.digest, self.document(manifest))
        return manifest.digest.hex()

    def decide(self, number: int, manifest: Manifest, decision: str = "approved") -> None:
        """A person's decision."""
        self.receive(number, manifest)
        guard = self.guard(number)
        try:
            guard.decide(manifest, self.verified_roster, decision, "a tester: for the test")
        finally:
            guard.close()

    def entries(self, number: int) -> list[Entry]:
        """The ledger, verified."""
        with Ledger.open(self.sites[number].ledger) as ledger:
            ledger.verify()
            return list(ledger.entries())


@dataclass
class Hub:
    """The hub's side of one study, in this process. ``frames`` holds every reply that left a hospital."""

    federation: Federation
    manifest: Manifest
    sites: dict[int, Participation]
    round_number: int = 0
    frames: list[tuple[int, str, bytes, tuple[bytes, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admitted: Admitted = check(self.manifest, None)
        self.params = run_params(self.manifest, self.admitted, self.federation.verified_roster, 0)
        self.man = self.manifest.digest
        self.setup: Setup | None = None
        state = initial_state(self.manifest)
        self.model_digest = model_digest(state, self.admitted.layout)
        self.state = state_bytes(state, self.admitted.layout)

    def raw(
        self, number: int, kind: Kind, *parts: Record, document: bytes = b"", attachment: bytes = b""
    ) -> tuple[bytes, tuple[bytes, ...]]:
        body = messages.encode_request(Request(kind, self.man, parts, document))
        chunks = (attachment,) if attachment else ()
        reply, payload = self.sites[number].answer(kind.message_type, body, chunks)
        self.frames.append((number, kind.message_type, reply, payload))
        return reply, payload

    def ask(
        self, number: int, kind: Kind, *parts: Record, document: bytes = b"", attachment: bytes = b""
    ) -> Reply:
        reply, _ = self.raw(number, kind, *parts, document=document, attachment=attachment)
        return messages.decode_reply(kind.message_type, reply)

    def offer(self) -> dict[int, str]:
        """Offer the study; each hospital's decision, ``unavailable`` where it gave none."""
        document = self.federation.document(self.manifest)
        answers = {n: self.ask(n, messages.STUDY, document=document) for n in self.sites}
        return {n: reply.decision if reply.available else "unavailable" for n, reply in answers.items()}

    def joined(self) -> "Hub":
        """With everybody's approval and keys: ready for rounds."""
        for number in self.sites:
            self.federation.decide(number, self.manifest)
        assert set(self.offer().values()) == {"approved"}
        self.join()
        return self

    def join(self) -> Setup:
        """S1 to S4 with all hospitals."""
        setup = HubSetup(self.params)
        for number in self.sites:
            setup.on_announce(number, self.ask(number, messages.KEYS).records[0])  # type: ignore[arg-type]
        directory = setup.directory()
        for number in self.sites:
            setup.on_pair_seeds(number, self.ask(number, messages.DIRECTORY, directory).records)  # type: ignore[arg-type]
        for number in self.sites:
            reply = self.ask(number, messages.SEEDS, *setup.seeds_for(number))
            setup.on_confirm(number, reply.records[0])  # type: ignore[arg-type]
        for number in self.sites:
            assert self.ask(number, messages.CONFIRMS, *setup.confirms_for(number)).available
        self.setup = setup.outcome()
        return self.setup

    def start(self, number: int = 0, **changes: Any) -> HubRound:
        """R0 of the next round, or of round ``number``; ``changes`` are arguments of HubRound."""
        assert self.setup is not None
        self.round_number = number or self.round_number + 1
        arguments: dict[str, Any] = {
            "round": self.round_number,
            "state": records.state_digest(self.state),
            "model_digest": self.model_digest,
            "deadline": int(time.time()) + 60,
            "sign": self.federation.hub_key.sign,
        }
        self.cosign(self.round_number)
        return HubRound(self.params, self.setup, **{**arguments, **changes})

    def cosign(self, round_number: int) -> None:
        """L1 and L2 of all hospitals for a round; the hub's own head stays away."""
        heads: dict[int, Any] = {}
        for number in self.sites:
            sizes = self.federation.sizes[number]
            reply = self.ask(
                number, messages.HEAD, records.HeadPlease(round_number, tuple(sorted(sizes)[-60:]))
            )
            if reply.available:
                heads[number] = reply.records[0]
                sizes.add(heads[number].size)
        cosigns: dict[int, list[Record]] = {n: [] for n in heads}
        for number in heads:
            others = [head for other, head in heads.items() if other != number]
            reply = self.ask(number, messages.COSIGN, *others)
            for cosign in reply.records[0].cosigns if reply.available else ():  # type: ignore[attr-defined]
                for other, head in heads.items():
                    if records.head_digest(head) == cosign.head:
                        cosigns[other].append(cosign)
        for number, found in cosigns.items():
            self.ask(number, messages.COSIGNED, *found)

    def ready(self, round_: HubRound, *numbers: int) -> dict[int, bool]:
        """R1 from each hospital, once all that are here have cosigned; whether it was available."""
        self.cosign(round_.start.round)
        answers = {}
        for number in numbers or tuple(self.sites):
            reply = self.ask(number, messages.READY, round_.start, attachment=self.state)
            answers[number] = reply.available
            if reply.available:
                round_.on_ready(number, reply.records[0])  # type: ignore[arg-type]
        return answers

    def upload(self, round_: HubRound, cohort: records.Cohort) -> dict[int, bool]:
        """R2 and R3 from each hospital of the cohort; whether it was available."""
        answers = {}
        for number in cohort.ids:
            body, payload = self.raw(number, messages.UPLOAD, cohort)
            reply = messages.decode_reply(messages.UPLOAD.message_type, body)
            answers[number] = reply.available
            if reply.available:
                round_.on_upload(number, reply.records[0])  # type: ignore[arg-type]
                for index, chunk in enumerate(payload):
                    round_.on_chunk(number, index, chunk)
        return answers

    def finish(self, round_: HubRound, cohort: records.Cohort) -> NDArray[np.int64]:
        """R4 to R6; the sum in grid steps."""
        please = round_.open_please()
        for number in cohort.ids:
            round_.on_open(number, self.ask(number, messages.OPEN, please).records[0])  # type: ignore[arg-type]
        total = round_.finish().parameters
        result = round_.result(self.model_digest)
        for number in cohort.ids:
            assert self.ask(number, messages.RESULT, result).available
        return total

    def whole_round(self) -> NDArray[np.int64]:
        """A round in which everybody takes part."""
        round_ = self.start()
        assert all(self.ready(round_).values())
        cohort = round_.cohort()
        assert all(self.upload(round_, cohort).values())
        return self.finish(round_, cohort)

    def end(self) -> None:
        """Tell all that the study is over."""
        for number in self.sites:
            assert self.ask(number, messages.CLOSE).available
