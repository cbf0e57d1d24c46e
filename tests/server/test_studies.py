"""The coordinator's service over real gRPC and mutual TLS: who may call, what is accepted, what is told."""

import threading
from typing import Any

import grpc
import pytest

from common import identity, link_pb2, link_pb2_grpc
from common.errors import RefusedError, UnreachableError, UsageError, VerificationError, WardroundError
from common.study import Party, SignedManifest
from server import desk as desk_module
from server.desk import CoordinatorDesk
from server.rounds import StudyRun
from server.service import Hub
from server.studies import STATE_CHUNK_BYTES
from tests.conftest import Pki
from tests.server.conftest import RunningHub
from tests.server.hospitals import complete, found


def channel(running: RunningHub, key: bytes | None, certificate: bytes | None) -> grpc.Channel:
    authority = running.founded.coordinator.authority.read_bytes()
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(running.founded.coordinator.load_settings().hub, credentials)


def test_the_roster_is_the_hubs(running: RunningHub) -> None:
    signed, roster = running.desk.roster()
    assert signed == running.founded.signed_roster()
    assert [member.name for member in roster.members] == ["St. Mary", "Northgate", "Riverside"]


def test_a_study_is_submitted_once(running: RunningHub) -> None:
    signed = running.founded.sign_study(name="twice")
    first = running.desk.submit(signed.manifest_bytes, signed.signature)
    assert (first.name, first.round, first.rounds) == ("twice", 0, 3)
    assert first.digest == signed.verify().digest.hex()
    count = len(running.desk.studies())
    assert running.desk.submit(signed.manifest_bytes, signed.signature).digest == first.digest
    assert len(running.desk.studies()) == count
    assert running.desk.resolve(first.digest[:6]) == running.desk.resolve(first.digest) == first.digest


def refused(running: RunningHub, signed: SignedManifest, kind: type[WardroundError], problem: str) -> None:
    before = len(running.desk.studies())
    with pytest.raises(kind, match=problem) as caught:
        running.desk.submit(signed.manifest_bytes, signed.signature)
    assert caught.value.exit_code == kind.exit_code
    assert len(running.desk.studies()) == before


def test_a_manifest_is_checked_whole_before_it_is_stored(running: RunningHub) -> None:
    founded = running.founded
    good = founded.sign_study()
    other = identity.key_text(identity.public_key(identity.new_signing_key()))
    strangers = tuple(Party(id=i + 1, name=a.name) for i, a in founded.admissions.items())
    cases: list[tuple[SignedManifest, type[WardroundError], str]] = [
        (SignedManifest(good.manifest_bytes, bytes(64)), VerificationError, "manifest"),
        (SignedManifest(good.manifest_bytes + b" ", good.signature), VerificationError, "canonical"),
        (SignedManifest(b"", b""), VerificationError, "manifest"),
        (founded.sign(founded.manifest(_roster="ab" * 32)), RefusedError, "another roster"),
        (founded.sign(founded.manifest(_hub=other)), RefusedError, "another hub"),
        (founded.sign(founded.manifest(_members=strangers)), RefusedError, "not on the roster under id"),
        (founded.sign_study(expires="2020-01-01T00:00Z"), UsageError, "expired"),
        (founded.sign_study(privacy__grid_step=0.1), UsageError, "privacy.grid_step"),
    ]
    for signed, kind, problem in cases:
        refused(running, signed, kind, problem)


def test_errors_come_back_with_their_code_and_remedy(running: RunningHub) -> None:
    signed = running.founded.sign_study(privacy__grid_step=0.1)
    with pytest.raises(UsageError) as caught:
        running.desk.submit(signed.manifest_bytes, signed.signature)
    assert caught.value.code == "study.privacy.grid_step"
    assert caught.value.remedy


def call_all(running: RunningHub, stub: Any) -> list[grpc.RpcError]:
    """Call every method of the service; the error of each."""
    digest = "a" * 64
    errors: list[grpc.RpcError] = []
    for method, request in (
        ("Roster", link_pb2.Empty()),
        ("List", link_pb2.Empty()),
        ("Submit", link_pb2.Document()),
        ("Abort", link_pb2.AbortRequest(digest=digest, reason="x")),
        ("Watch", link_pb2.StudyReference(digest=digest)),
        ("Export", link_pb2.ExportRequest(digest=digest)),
    ):
        call = getattr(stub, method)
        streams = method in ("Watch", "Export")
        with pytest.raises(grpc.RpcError) as caught:
            next(call(request, timeout=10)) if streams else call(request, timeout=10)
        errors.append(caught.value)
    return errors


def test_a_hospital_cannot_manage_studies(running: RunningHub, caplog: pytest.LogCaptureFixture) -> None:
    keys, admission = running.founded.keys[1], running.founded.admissions[1]
    with channel(running, keys.tls_key_pem, admission.certificate_pem) as site:
        for error in call_all(running, link_pb2_grpc.StudiesStub(site)):
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "a site certificate may not manage studies" in error.details()
    assert sum("called the coordinator's service" in r.message for r in caplog.records) == 6


def test_strangers_do_not_get_past_the_handshake(running: RunningHub) -> None:
    stranger = Pki().client(1, "coordinator", "coordinator")
    for key, certificate in ((None, None), (stranger.key_pem, stranger.certificate_pem)):
        with channel(running, key, certificate) as outside:
            for error in call_all(running, link_pb2_grpc.StudiesStub(outside)):
                assert error.code() == grpc.StatusCode.UNAVAILABLE


def test_an_unknown_study_is_refused_by_every_method(running: RunningHub) -> None:
    digest = "0" * 64
    for call in (
        lambda: running.desk.abort(digest, "why"),
        lambda: list(running.desk.watch(digest)),
        lambda: running.desk.export(digest),
    ):
        with pytest.raises(RefusedError, match="there is no study 0000"):
            call()


def test_an_abort_needs_a_reason_and_a_running_study(running: RunningHub) -> None:
    digest = running.submit(name="to abort")
    for reason in ("", "   "):
        with pytest.raises(RefusedError, match="needs a reason"):
            running.desk.abort(digest, reason)
    info = running.desk.abort(digest, "wrong question")
    assert (info.status, info.detail) == ("aborted", "wrong question")
    with pytest.raises(RefusedError, match="ended already: aborted"):
        running.desk.abort(digest, "again")
    # A watcher of an ended study gets its last state and no more.
    (event,) = running.desk.watch(digest)
    assert (event.study.status, event.study.detail) == ("aborted", "wrong question")


def test_watch_tells_every_round_in_order(running: RunningHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # The rounds are this test's, not the hub's.
    monkeypatch.setattr(StudyRun, "run", lambda _self: None)
    digest = running.submit(name="to watch")
    store = running.hub.store
    events = running.desk.watch(digest)
    first = next(events)
    assert (first.study.name, first.study.round, list(first.cohort)) == ("to watch", 0, [])
    assert [(site.id, site.name, site.decision, site.online) for site in first.sites] == [
        (1, "St. Mary", "", False),
        (2, "Northgate", "", False),
        (3, "Riverside", "", False),
    ]

    store.set_decisions(digest, {1: "approved", 3: "denied"})
    assert [site.decision for site in next(events).sites] == ["approved", "", "denied"]

    def play() -> None:
        store.set_status(digest, "running")
        for _ in range(30):
            complete(store, digest)
        store.set_status(digest, "done")

    player = threading.Thread(target=play)
    player.start()
    told = list(events)
    player.join()
    rounds = [event.study.round for event in told if event.study.round]
    assert list(dict.fromkeys(rounds)) == list(range(1, 31))
    assert rounds == sorted(rounds)
    last = told[-1]
    assert (last.study.status, last.study.round, list(last.cohort), last.seconds) == ("done", 30, [1, 3], 7.5)


def test_a_model_is_exported_whole(running: RunningHub) -> None:
    digest = running.submit(name="to export")
    with pytest.raises(RefusedError, match="no such completed round"):
        running.desk.export(digest)
    large = bytes(range(256)) * (STATE_CHUNK_BYTES // 100)
    complete(running.hub.store, digest, b"first")
    complete(running.hub.store, digest, large)
    assert running.desk.export(digest) == running.desk.export(digest, 2) == large
    assert running.desk.export(digest, 1) == b"first"
    with pytest.raises(RefusedError, match="no such completed round"):
        running.desk.export(digest, 3)


def test_a_study_is_shown_with_every_round_that_was_started(running: RunningHub) -> None:
    signed = running.founded.sign_study(name="to show")
    digest = running.desk.submit(signed.manifest_bytes, signed.signature).digest
    store = running.hub.store
    store.lose_round(digest, store.start_round(digest), "two hospitals were silent")
    complete(store, digest)
    store.start_round(digest)
    manifest, detail = running.desk.show(digest)
    assert manifest == signed.verify()
    assert detail.study.name == "to show"
    assert [site.name for site in detail.sites] == ["St. Mary", "Northgate", "Riverside"]
    told = [(r.number, r.step, list(r.cohort), r.lost) for r in detail.rounds]
    assert told == [(1, 0, [], "two hospitals were silent"), (2, 1, [1, 3], ""), (3, 0, [], "")]
    with pytest.raises(RefusedError, match="there is no study"):
        running.desk.show("0" * 64)


def test_a_hub_that_is_stopped_but_not_gone_is_noticed(
    running: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = running.submit(name="to hear of")
    monkeypatch.setattr(desk_module, "SILENCE_S", 0.5)
    # Signs of life come less often than that now: to the watcher this is a hub that stands still.
    with pytest.raises(UnreachableError):
        list(running.desk.watch(digest))


def test_a_watcher_of_a_hub_that_stops_is_told_to_try_again(tmp_path: Any) -> None:
    founded = found(tmp_path)
    hub = Hub(founded.home)
    hub.start()
    with CoordinatorDesk(founded.coordinator) as desk:
        signed = founded.sign_study()
        events = desk.watch(desk.submit(signed.manifest_bytes, signed.signature).digest)
        next(events)
        hub.stop()
        with pytest.raises(UnreachableError) as caught:
            list(events)
        assert caught.value.exit_code == 6
        with pytest.raises(UnreachableError, match="cannot be reached"):
            desk.studies()
