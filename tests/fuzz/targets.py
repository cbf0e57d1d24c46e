"""The table of what is fuzzed: whatever this program reads that somebody else can have written.

A target is a name, one execution with its oracle, and seeds made of real objects; ``repair`` makes what was
mutated pass the outer checks (digests, signatures of keys that the other side holds). A new message or
document is one more row.
"""

import dataclasses
import hashlib
import io
import json
import random
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from client import backup
from client.backup import FACTS, Backup
from client.frames import read_frame, write_frame
from client.settings import Policy, SiteSettings, load, new_files
from common import certificates, flower, identity, link_pb2, messages
from common.admissible import check
from common.audit.evidence import Evidence
from common.audit.trust import Trust
from common.certificates import Authority, peer_identity, read_request
from common.contract import Contract
from common.encoding import canonical_json, labelled, parse_canonical_json
from common.enrolment import Admission, AdmissionRequest
from common.errors import VerificationError, WardroundError
from common.ledger import entries
from common.ledger.notes import open_note, read_checkpoint, sign_note
from common.ledger.store import Ledger
from common.messages import Reply, Request
from common.roster import Member, Roster, SignedRoster
from common.run import read_study_document, study_document
from common.secagg import records
from common.secagg.state import RunState
from common.secagg.transcript import Transcript, read_transcripts, write_transcripts
from common.study import Manifest, Party, SignedManifest, Study
from common.tasks.models import initial_state
from common.tasks.models.layout import Layout
from common.tasks.state import load_state, state_bytes
from common.witness import Offer, Witness, read_state
from tests.common.secagg.federation import public, signing_key
from tests.common.secagg.strategies import ALL
from tests.federation import NAMES, small_study
from tests.fuzz import machines
from tests.fuzz.mutation import mutated, split, unzipped, zipped
from tests.fuzz.oracles import Run, exact, require, stable

NOW = datetime(2030, 1, 1, tzinfo=UTC)
WHAT = "the input"


@dataclass(frozen=True)
class Target:
    """One row. ``largest`` bounds the inputs of a campaign, in bytes."""

    name: str
    run: Run
    seeds: Callable[[], Iterable[bytes]]
    repair: Callable[[bytes], bytes] | None = None
    largest: int = 1 << 14

    def mutant(self, data: bytes, seed: int, words: tuple[bytes, ...]) -> bytes:
        """Another input near ``data``; the same for the same seed."""
        rng = random.Random(seed)
        found = mutated(data, rng, words)
        return self.repair(found) if self.repair is not None and rng.random() < 0.7 else found


# -- records, requests, replies, states ----------------------------------------------------------------------


@cache
def _records() -> dict[str, list[bytes]]:
    """Encoded records by name: those of a round, and the ones that only ledgers exchange."""
    world, found = machines.world(), {record_type.__name__: list[bytes]() for record_type in ALL}
    for data in (*world.requests, *world.replies):
        for part in split(data) or ():
            inner = split(part)
            name = inner[0].decode("ascii", "replace").removeprefix("wardround/v1/record/") if inner else ""
            if name in found:
                found[name].append(part)
    head = machines._head(2, 9, (5, 3))
    more: list[records.Record] = [
        world.directory,
        head,
        *head.extensions,
        records.HeadPlease(3, (1, 2, 5)),
        records.Cosigned((machines._cosign(3, head), machines._cosign(4, head)), ((1, 5), (2, 1 << 40))),
        machines._cosign(2, head),
    ]
    for record in more:
        found[type(record).__name__].append(records.encode(record))
    return found


def _record_target(record_type: type[records.Record]) -> Target:
    name = record_type.__name__
    run = exact(lambda data: records.decode(record_type, data), records.encode)
    return Target(f"record-{name}", run, lambda: _records()[name])


def _with_kind(decode: Callable[[str, bytes], Any], word: str) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        kind = machines.kind_in(data, word)
        # What names no kind is offered to one all the same.
        return decode(kind.message_type if kind else messages.OPEN.message_type, data)

    return read


def _requests() -> Iterator[bytes]:
    man = machines.world().man
    yield from machines.world().requests
    for part in machines.witness_seeds():
        yield from (split(part) or [])[1:]
    yield messages.encode_request(Request(messages.STUDY, man, (), b"document"))
    yield from (messages.encode_request(Request(kind, man)) for kind in (messages.KEYS, messages.CLOSE))


def _replies() -> Iterator[bytes]:
    for part in machines.world().replies:
        if machines.kind_in(part, "reply") is not None:
            yield part
    for decision in messages.DECISIONS:
        yield messages.encode_reply(Reply(messages.STUDY, True, (), decision))
    head = machines._head(2, 9, (5,))
    cosigned = records.Cosigned((machines._cosign(3, head),), ((1, 5),))
    yield messages.encode_reply(Reply(messages.HEAD, True, (head,)))
    yield messages.encode_reply(Reply(messages.COSIGN, True, (cosigned,)))
    yield messages.encode_reply(Reply(messages.CLOSE))
    yield from (messages.encode_reply(Reply(kind, available=False)) for kind in messages.KINDS.values())


def _states() -> Iterator[bytes]:
    for disk in machines.world().federation.disks.values():
        yield from disk.versions
    state = machines.world().federation.disks[1].state
    yield state.ended().to_bytes()
    yield dataclasses.replace(state, setup=None, announce=None, confirm=None, sent=()).to_bytes()


def _transcripts() -> Iterator[bytes]:
    made = machines.transcript()
    made.check(machines.world().federation.params)
    yield write_transcripts([made.to_bytes()])
    yield write_transcripts([made.to_bytes(), made.to_bytes()])
    yield write_transcripts([])


def _checked_transcripts(data: bytes) -> tuple[Transcript, ...]:
    found = read_transcripts(data)
    for one in found:
        with suppress(WardroundError):
            one.check(machines.world().federation.params)
            require(one.ctx == machines.transcript().ctx, "a round that nobody opened was believed")
    return found


def _repair_transcripts(data: bytes) -> bytes:
    """With the signatures of the hub and of the hospitals that the records name."""
    try:
        found = read_transcripts(data)
    except WardroundError:
        return data
    man, signed = machines.world().man, []
    for one in found:
        hub = signing_key("hub").sign
        again = Transcript(
            records.signed(one.start, man, hub),
            one.cohort,
            tuple(
                records.signed(record, man, signing_key(f"site {record.id}").sign) for record in one.uploads
            ),
            tuple(
                records.signed(record, man, signing_key(f"site {record.id}").sign) for record in one.openings
            ),
            records.signed(one.result, man, hub),
        )
        signed.append(again.to_bytes())
    return write_transcripts(signed)


# -- studies, manifests, rosters -------------------------------------------------------------------------------


@cache
def _roster() -> SignedRoster:
    members = (Member(i, NAMES[i - 1], public(f"site {i}"), public(f"ledger {i}")) for i in (1, 2, 3))
    return SignedRoster.create(Roster(tuple(members)), signing_key("hub"))


STUDIES: tuple[dict[str, Any], ...] = (
    {},
    {"model": {"kind": "mlp", "hidden": [8, 4], "activation": "tanh"}},
    {"privacy": {"kind": "without_differential_privacy"}, "aggregation__codec__rounding": "dither"},
    {"training__server": {"strategy": "fedadam", "tau": 0.001}, "training__sampling": "poisson",
     "training__sampling_rate": 0.25},
)  # fmt: skip


@cache
def _manifests() -> tuple[Manifest, ...]:
    names = [member.name for member in Roster.from_bytes(_roster().data).members]
    return tuple(
        Manifest.model_validate(
            {
                "schema": 1,
                "run": f"{number:032x}",
                "roster": _roster().digest.hex(),
                "hub": identity.key_text(public("hub")),
                "coordinator": identity.key_text(public("coordinator")),
                "members": tuple(Party(id=i, name=name) for i, name in enumerate(names, start=1)),
                "study": Study.from_toml(tomli_w.dumps(small_study(names, **changes))),
            }
        )
        for number, changes in enumerate(STUDIES)
    )


def _documents() -> Iterator[bytes]:
    for manifest in _manifests():
        yield study_document(SignedManifest.sign(manifest, signing_key("coordinator")), _roster())


def _document(data: bytes) -> tuple[SignedManifest, SignedRoster]:
    """Read as a hospital reads it, and verified as far as it goes."""
    manifest, roster = read_study_document(data)
    verified = manifest.verify()
    require(verified.to_bytes() == manifest.manifest_bytes, "the manifest is not what was signed")
    roster.verify(identity.key_bytes(verified.hub))
    return manifest, roster


def _repair_document(data: bytes) -> bytes:
    parts = split(data) or []
    if len(parts) != 5:
        return data
    manifest = signing_key("coordinator").sign(labelled("sig/manifest", parts[1]))
    roster = signing_key("hub").sign(labelled("sig/roster", parts[3]))
    return labelled("study-document", parts[1], manifest, parts[3], roster)


@cache
def _layout() -> Layout:
    return check(_manifests()[0], None).layout


def _model_states() -> Iterator[bytes]:
    state = initial_state(_manifests()[0])
    yield state_bytes(state, _layout())
    yield state_bytes({name: values + np.float32(0.25) for name, values in state.items()}, _layout())


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # Every reader of a text decodes first, and refuses what is none.
        raise VerificationError("fuzz.text", "not UTF-8") from error


def _studies() -> Iterator[bytes]:
    for changes in STUDIES:
        yield tomli_w.dumps(small_study(list(NAMES[:3]), **changes)).encode()
    template = Path(__file__).parents[1] / "vectors/studies/breast_cancer.toml"
    yield template.read_bytes()


def _study_text(study: Study) -> str:
    return tomli_w.dumps(json.loads(study.model_dump_json(exclude_none=True)))


def _contract(data: bytes) -> Contract:
    try:
        return Contract.model_validate(parse_canonical_json(data, WHAT))
    except ValueError as error:
        raise VerificationError("fuzz.contract", "not a contract") from error


def _contracts() -> Iterator[bytes]:
    for manifest in _manifests()[:1]:
        yield _json_of(manifest.study.contract)
    yield _json_of(Study.from_toml(list(_studies())[-1].decode()).contract)


def _json_of(model: Any) -> bytes:
    return canonical_json(model.model_dump(mode="json", by_alias=True))


# -- certificates, admission -------------------------------------------------------------------------------


def _ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    secret = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") >> 1
    return ec.derive_private_key(secret, ec.SECP256R1())


@cache
def _authority() -> Authority:
    return Authority.create("test hub", NOW)


@cache
def _request() -> AdmissionRequest:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAMES[0])])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(_ec_key("tls"), hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM)
    return AdmissionRequest.create(NAMES[0], pem, signing_key("site 1"), signing_key("ledger 1"))


@cache
def _admission() -> Admission:
    certificate = _authority().issue_client(_request().csr_pem, "site", 1, NAMES[0], NOW)
    return Admission(
        *(1, NAMES[0], certificate, _authority().certificate_pem, public("hub")),
        *("127.0.0.1:8443", _roster().data, _roster().signature),
    )


def _repair_request(data: bytes) -> bytes:
    """With the proofs of both keys."""
    try:
        fields = json.loads(data)
        csr, name = fields["csr"].encode("ascii"), fields["name"]
        read_request(csr)
        return AdmissionRequest.create(name, csr, signing_key("site 1"), signing_key("ledger 1")).to_bytes()
    except (ValueError, KeyError, TypeError, AttributeError, WardroundError):
        return data


def _repair_admission(data: bytes) -> bytes:
    """With the roster signed by the hub key in it, where that is the test's."""
    try:
        fields = json.loads(data)
        roster = identity.base64url_bytes(fields["roster"], WHAT)
        fields["roster_signature"] = identity.base64url(
            signing_key("hub").sign(labelled("sig/roster", roster))
        )
        return canonical_json(fields)
    except (ValueError, KeyError, TypeError, AttributeError, WardroundError):
        return data


def _pems() -> Iterator[bytes]:
    yield _admission().certificate_pem
    yield _authority().issue_client(_request().csr_pem, "coordinator", 7, "Dr. Roe", NOW)
    yield _authority().certificate_pem
    yield _authority().issue_server(_request().csr_pem, ["localhost", "127.0.0.1"], NOW)


def _issued(data: bytes) -> bool:
    """A client's certificate, an authority's, and both together in an admission."""
    found = []
    for read in (
        peer_identity,
        lambda pem: certificates.check_issued(pem, _authority().certificate_pem),
        lambda pem: certificates.check_issued(_admission().certificate_pem, pem),
    ):
        try:
            read(data)
            found.append(True)
        except WardroundError:
            found.append(False)
    return any(found)


def _csr(data: bytes) -> bool:
    try:
        key = read_request(data)
    except WardroundError:
        return False
    require(len(certificates.key_fingerprint(key)) == 64, "a key without fingerprint")
    issued = _authority().issue_client(data, "site", 3, NAMES[0], NOW)
    require(
        peer_identity(issued).tls_fingerprint == certificates.key_fingerprint(key),
        "another key was certified",
    )
    return True


# -- ledgers, heads, evidence, backups ------------------------------------------------------------------------


@cache
def _ledger() -> tuple[tuple[bytes, ...], str, bytes]:
    """(leaves, head, the file) of a small ledger with an entry of most kinds."""
    actor = identity.key_text(public("ledger 1"))
    said: dict[str, Any] = {"actor": actor, "version": "1"}
    admitted = check(_manifests()[0], None)
    event = admitted.event("ab" * 16, 1, 1, "cd" * 16)
    rules: dict[str, Any] = {
        "epsilon_t": "3",
        "epsilon_w": "3",
        "delta": "0.000001",
        "minimum_hospitals": 3,
        "max_round_minutes": 60,
        "without_differential_privacy": False,
        "without_masks": False,
        "coordinators": (actor,),
    }
    site: list[entries.Entry] = [
        entries.Opened(**said, register_id="ab" * 16, epsilon_t="3", epsilon_w="3", delta="0.000001"),
        entries.PolicyChange(**said, before=None, after=entries.Rules(**rules)),
        entries.Approval(**said, manifest="1" * 64, decision="approved", reason="Dr. Roe: for the test"),
        entries.Charge(**said, event=event.to_fields()),
        entries.Outcome(
            **said, event_id="cd" * 16, state="released", attempt=1, ctx="2" * 64, reason="upload_started"
        ),
        entries.Outcome(
            **said, event_id="cd" * 16, state="released", attempt=1, ctx="2" * 64, reason="completed"
        ),
        entries.Pause(**said, decision="paused", reason="Dr. Roe: for the test"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        with Ledger.open(path, signing_key("ledger 1"), create=True, clock=lambda: NOW) as ledger:
            for entry in site:
                ledger.append(entry)
            leaves, head = ledger.leaves(), ledger.checkpoint(public("ledger 1"))
        return leaves, head, path.read_bytes()


def _leaves() -> Iterator[bytes]:
    yield from _ledger()[0]
    said: dict[str, Any] = {"actor": identity.key_text(public("hub")), "seq": 0, "time": "2030-01-01T00:00Z"}
    fingerprint = "-".join(["0123"] * 8)
    rest: list[entries.Entry] = [
        entries.Membership(**said, id=1, name=NAMES[0], fingerprint=fingerprint, decision="admitted"),
        entries.Submission(**said, manifest="1" * 64, coordinator=said["actor"]),
        entries.Ended(**said, manifest="1" * 64, status="done"),
        entries.Restored(**said, reason="Dr. Roe: the disk was lost"),
        entries.Completed(
            **said, manifest="1" * 64, round=1, step=1, attempt=1, cohort=(1, 2, 3),
            ctx="2" * 64, sum_digest="3" * 64, model_digest="4" * 64,
        ),
    ]  # fmt: skip
    yield from map(entries.encode, rest)


def _witness_states() -> Iterator[bytes]:
    yield machines._remembered()[0]
    yield Witness(1, lambda data: None).to_bytes()


def _witness_bytes(state: tuple[dict[int, records.Head], Offer | None]) -> bytes:
    witness = Witness(1, lambda data: None)
    witness.seen, witness.cosigned = state
    return witness.to_bytes()


def _evidence() -> Iterator[bytes]:
    leaves, head, _ = _ledger()
    documents = {m.digest.hex(): d for m, d in zip(_manifests(), _documents(), strict=True)}
    whole = Evidence(
        1, NAMES[0], "2030-01-01T00:00Z", "1", _roster(), public("hub"), leaves, head, next(_witness_states()),
        dict(list(documents.items())[:1]), {digest: next(_transcripts()) for digest in list(documents)[:1]},
    )  # fmt: skip
    yield whole.to_bytes()
    yield dataclasses.replace(whole, party=0, name="hub", leaves=(), heads=b"", studies={}).to_bytes()


def _note(data: bytes) -> object:
    return read_checkpoint(open_note(_utf8(data), _ORIGIN, public("ledger 1")))


_ORIGIN = "wardround/ledger/" + identity.fingerprint(public("ledger 1"))


def _repair_note(data: bytes) -> bytes:
    """With the signature of the ledger's key over whatever stands above it."""
    body, _, _ = data.rpartition(b"\n\n")
    try:
        return sign_note(
            body.decode() + "\n", _ORIGIN, public("ledger 1"), signing_key("ledger 1").sign
        ).encode()
    except UnicodeDecodeError:
        return data


@cache
def _backup() -> bytes:
    leaves, _, ledger = _ledger()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(ledger)
        with Ledger.open(path) as opened:
            head = opened.head()
    texts = new_files(NAMES[0], "127.0.0.1:8443", "ab" * 16)
    private = identity.private_pem(signing_key("ledger 1"))
    names = {
        "ledger.db": ledger, "site.toml": texts["site.toml"].encode(), "policy.toml": texts["policy.toml"].encode(),
        "request.json": _request().to_bytes(), "admission.json": _admission().to_bytes(),
    }  # fmt: skip
    files = {name: names.get(Path(name).name, private) for name in sorted(backup._REQUIRED)}
    found = Backup(NAMES[0], "2030-01-01T00:00Z", head, files)
    require(len(leaves) == head.size, "the ledger is not the one that was written")
    return found.to_bytes()


def _repair_backup(data: bytes) -> bytes:
    """With the digests of its files."""
    files = unzipped(data)
    try:
        facts = json.loads(files[FACTS])
        facts["files"] = {n: hashlib.sha256(c).hexdigest() for n, c in files.items() if n != FACTS}
        files[FACTS] = canonical_json(facts)
    except (ValueError, KeyError, TypeError, WardroundError):
        return data
    return zipped(list(files.items()))


# -- settings, frames, the link --------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    return Path(_KEPT.name)


_KEPT = tempfile.TemporaryDirectory(prefix="wardround-fuzz-")


def _settings(model: type[Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        path = _folder() / "settings.toml"
        path.write_bytes(data)
        return load(path, model)

    return read


def _settings_bytes(model: Any) -> bytes:
    # TOML has no null: what is absent is left out.
    return tomli_w.dumps(json.loads(model.model_dump_json(by_alias=True, exclude_none=True))).encode()


def _policies() -> Iterator[bytes]:
    text = new_files(NAMES[0], "127.0.0.1:8443", "ab" * 16)["policy.toml"]
    policy = tomllib.loads(text)
    policy["rules"]["coordinators"] = [identity.key_text(public("coordinator"))]
    policy["rules"] |= {"epsilon_per_study": 1.5, "training_window": "20:00-06:00"}
    source = {
        "source": "csv:/srv/extract.csv",
        "patient": "patient_id",
        "columns": ["age"],
        "opt_out": "/srv/out.txt",
    }
    policy["data"] = {"extract": source}
    yield text.encode()
    yield tomli_w.dumps(policy).encode()


def _frames_of(data: bytes) -> list[tuple[dict[str, Any], bytes]]:
    stream, found = io.BytesIO(data), []
    while (frame := read_frame(stream)) is not None:
        found.append(frame)
    return found


def _frames_bytes(frames: list[tuple[dict[str, Any], bytes]]) -> bytes:
    stream = io.BytesIO()
    for header, blob in frames:
        write_frame(stream, header, blob)
    return stream.getvalue()


def _frame_seeds() -> Iterator[bytes]:
    yield _frames_bytes([({"op": "compute"}, bytes(40))])
    yield _frames_bytes(
        [({"ok": True, "version": 1}, b""), ({"code": "contract.column", "problem": "x"}, b"abc")]
    )


def _site_frame(data: bytes) -> bool:
    """A frame of a site, through what the hub does with it before any machine sees it."""
    try:
        frame = link_pb2.SiteFrame.FromString(data)
    except DecodeError:
        return False
    if frame.WhichOneof("frame") != "reply":
        return frame.WhichOneof("frame") is not None
    flower.assume_identity(flower.HUB_NODE_ID)
    message = flower.instruction(1, "query.keys", b"", ttl_s=60)
    reply = flower.reply(message, frame.reply.body)
    return _ours(reply, frame.reply.body)


def _hub_frame(data: bytes) -> bool:
    """A frame of the hub, through what an agent does with it."""
    try:
        frame = link_pb2.HubFrame.FromString(data)
    except DecodeError:
        return False
    if frame.WhichOneof("frame") != "request":
        return frame.WhichOneof("frame") is not None
    envelope = frame.request
    attachment = [envelope.body] if envelope.attachment_bytes else []
    try:
        message = flower.received(
            envelope.message_id, 1, envelope.message_type, envelope.body,
            group=envelope.group, attachment=attachment, created_at=0.0, ttl_s=envelope.ttl_s,
        )  # fmt: skip
    except WardroundError:
        return False
    return _ours(message, envelope.body)


def _ours(message: flower.Message, body: bytes) -> bool:
    try:
        require(flower.body_of(message) == body, "another body came out")
        require(all(flower.attachment_of(message)), "an empty chunk")
    except WardroundError:
        return False
    return True


def _envelope(**changes: Any) -> link_pb2.Envelope:
    values = {"message_id": "0" * 32, "message_type": "query.keys", "group": "ab" * 32, "ttl_s": 60.0}
    return link_pb2.Envelope(**{**values, "body": next(iter(_requests())), **changes})


def _site_frames() -> Iterator[bytes]:
    chunk = link_pb2.Chunk(message_id="0" * 32, index=1, data=b"data")
    yield link_pb2.SiteFrame(reply=_envelope()).SerializeToString()
    yield link_pb2.SiteFrame(reply=_envelope(attachment_bytes=9)).SerializeToString()
    yield link_pb2.SiteFrame(chunk=chunk).SerializeToString()
    yield link_pb2.SiteFrame(greeting=link_pb2.Greeting(protocol_version=1)).SerializeToString()


def _hub_frames() -> Iterator[bytes]:
    yield link_pb2.HubFrame(request=_envelope()).SerializeToString()
    yield link_pb2.HubFrame(request=_envelope(attachment_bytes=9)).SerializeToString()
    yield link_pb2.HubFrame(want=link_pb2.Want(message_id="0" * 32, indices=[0, 1, 2])).SerializeToString()


# -- the table -------------------------------------------------------------------------------------------------

LARGE = 1 << 16

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *map(_record_target, ALL),
        Target("request", exact(_with_kind(messages.decode_request, "request"), messages.encode_request), _requests),
        Target("reply", exact(_with_kind(messages.decode_reply, "reply"), messages.encode_reply), _replies),
        Target("run-state", exact(RunState.from_bytes, RunState.to_bytes), _states),
        Target("transcripts", exact(_checked_transcripts, lambda found: write_transcripts([t.to_bytes() for t in found])),
               _transcripts, _repair_transcripts),
        Target("roster", exact(Roster.from_bytes, Roster.to_bytes), lambda: [_roster().data]),
        Target("manifest", exact(Manifest.from_bytes, Manifest.to_bytes),
               lambda: [m.to_bytes() for m in _manifests()]),
        Target("study-document", exact(_document, lambda pair: study_document(*pair)), _documents, _repair_document),
        Target("model-state", exact(lambda data: load_state(data, _layout(), 100.0), lambda s: state_bytes(s, _layout())),
               _model_states),
        Target("trust", exact(Trust.from_bytes, Trust.to_bytes), lambda: [Trust(public("hub"), _roster()).to_bytes()]),
        Target("study-toml", stable(lambda data: Study.from_toml(_utf8(data)), lambda s: _study_text(s).encode()),
               _studies),
        Target("contract", stable(_contract, _json_of), _contracts),
        Target("certificate", _issued, _pems),
        Target("certificate-request", _csr, lambda: [_request().csr_pem]),
        Target("admission-request", exact(AdmissionRequest.from_bytes, AdmissionRequest.to_bytes),
               lambda: [_request().to_bytes()], _repair_request),
        Target("admission", exact(Admission.from_bytes, Admission.to_bytes),
               lambda: [_admission().to_bytes()], _repair_admission),
        Target("leaf", exact(entries.decode, entries.encode), _leaves),
        Target("head", stable(_note, lambda head: _repair_note(head.body().encode() + b"\n")),
               lambda: [_ledger()[1].encode()], _repair_note),
        Target("witness-state", exact(read_state, _witness_bytes), _witness_states),
        Target("evidence", stable(lambda data: Evidence.from_bytes(data, WHAT), Evidence.to_bytes), _evidence,
               largest=LARGE),
        Target("backup", stable(lambda data: Backup.from_bytes(data, WHAT), Backup.to_bytes), lambda: [_backup()],
               _repair_backup, largest=LARGE),
        Target("policy-toml", stable(_settings(Policy), _settings_bytes), _policies),
        Target("site-toml", stable(_settings(SiteSettings), _settings_bytes),
               lambda: [new_files(NAMES[0], "127.0.0.1:8443", "ab" * 16)["site.toml"].encode()]),
        Target("worker-frames", exact(_frames_of, _frames_bytes), _frame_seeds),
        Target("site-frame", _site_frame, _site_frames),
        Target("hub-frame", _hub_frame, _hub_frames),
        Target("site-in-a-round", machines.in_a_round, machines.site_seeds, machines.repair_request, LARGE),
        Target("site-joining", machines.while_joining, machines.joining_seeds, machines.repair_request, LARGE),
        Target("hub-setup", machines.hub_setup, machines.setup_seeds, machines.repair_reply, LARGE),
        Target("hub-round", machines.hub_round, machines.round_seeds, machines.repair_reply, LARGE),
        Target("witness", machines.witness, machines.witness_seeds, machines.repair_heads, LARGE),
    )
}  # fmt: skip
