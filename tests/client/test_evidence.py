"""What a hospital shows an auditor: everything that can be verified, and nothing else of its folder."""

import io
import json
import sqlite3
import threading
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.evidence import collect
from client.guard import Guard
from client.participation import Participation
from client.state import SiteHome
from common.audit.evidence import Evidence, read_evidence
from common.audit.trust import Trust
from common.audit.verify import verify
from common.errors import RefusedError, VerificationError
from common.identity import new_signing_key, public_key
from common.ledger.entries import Approval, Charge, decode
from common.ledger.notes import open_note, origin_of, read_checkpoint
from common.ledger.store import Ledger
from common.ledger.tree import leaf_hash, root
from common.roster import Member, Roster, SignedRoster
from common.version import SOFTWARE_VERSION
from common.witness import Witness
from tests.client.federation import ComputedHere, Federation, Hub
from tests.client.test_identity import private_parts

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
MARK = "Zq7canary"
SECRET = b"the state of a run, in its file"


def enlarged(federation: Federation, name: str = "Eastfield") -> SignedRoster:
    """The roster with one more hospital, signed by the hub."""
    keys = (public_key(new_signing_key()), public_key(new_signing_key()))
    members = federation.verified_roster.members
    return SignedRoster.create(
        Roster((*members, Member(members[-1].id + 1, name, *keys))), federation.hub_key
    )


def charge(federation: Federation, guard: Guard, rounds: int = 1) -> str:
    """Approve a study and charge rounds of it; its digest."""
    manifest = federation.manifest()
    federation.receive(1, manifest)
    guard.decide(manifest, federation.verified_roster, "approved", "a tester: for the test")
    for number in range(1, rounds + 1):
        guard.charge(manifest, guard.check_runnable(manifest), number)
    return manifest.digest.hex()


def test_it_is_what_the_ledger_names_and_nothing_else(federation: Federation) -> None:
    home = federation.sites[1]
    guard = federation.guard(1)
    charged = charge(federation, guard, 2)
    guard.close()
    denied = federation.manifest(name="denied")
    federation.decide(1, denied, "denied")
    federation.receive(1, federation.manifest(name="waiting"))
    found = collect(home, NOW)
    assert (found.party, found.name, found.time) == (1, "St. Mary", "2026-03-04T05:06Z")
    assert (found.version, found.hub_key) == (SOFTWARE_VERSION, public_key(federation.hub_key))
    assert [decode(leaf) for leaf in found.leaves] == federation.entries(1)
    assert found.studies == {name: home.study(name).read_bytes() for name in (charged, denied.digest.hex())}
    assert found.heads == b""
    assert found.roster == federation.roster
    assert Evidence.from_bytes(found.to_bytes(), "it") == found
    assert collect(home, NOW) == found


def test_site_evidence_holds_no_secret(federation: Federation, tmp_path: Path) -> None:
    home = federation.sites[1]
    guard = federation.guard(1)
    charge(federation, guard)
    guard.close()
    federation.write_extract(1, [(MARK, 50, 25, "yes")])
    for path in (home.policy, home.settings):
        path.write_text(path.read_text() + f"\n# {MARK}\n", encoding="utf-8")
    for path in (home.pins, home.ledger_mark, home.folder / "studies" / "notes.txt", home.folder / "x.json"):
        path.write_text(MARK)
    home.runs.write_bytes(SECRET)
    secrets = [*private_parts(home), SECRET, MARK.encode(), home.folder.name.encode(), b"csv:"]
    data = collect(home, NOW).to_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (study,) = (name for name in content if name.startswith("studies/"))
    assert set(content) == {"evidence.json", "ledger.jsonl", "ledger.head", "heads.json", study}
    for text in (data, *content.values()):
        assert not any(secret in text or secret.hex().encode() in text for secret in secrets)
    assert set(json.loads(content["evidence.json"])) == {
        "schema", "party", "name", "time", "version", "hub_key", "roster", "roster_signature",
    }  # fmt: skip
    # Not one of those files is even needed.
    for path in (*home.tls_key.parent.iterdir(), home.policy, home.settings, home.runs, home.pins):
        path.unlink()
    (tmp_path / "e.zip").write_bytes(collect(home, NOW).to_bytes())
    assert read_evidence(tmp_path / "e.zip").to_bytes() == data


def test_it_is_of_one_moment_while_the_agent_writes(federation: Federation) -> None:
    guard, ended = federation.guard(1), threading.Event()
    public = federation.verified_roster.member(1).ledger_key

    def agent() -> None:
        while not ended.is_set():
            guard.pause("paused", "a tester: for the test")
            guard.pause("resumed", "a tester: for the test")

    thread = threading.Thread(target=agent)
    thread.start()
    try:
        sizes = []
        for _ in range(20):
            found = collect(federation.sites[1], NOW)
            checkpoint = read_checkpoint(open_note(found.head, origin_of(public), public))
            assert checkpoint.size == len(found.leaves)
            assert checkpoint.root == root([leaf_hash(leaf) for leaf in found.leaves])
            sizes.append(checkpoint.size)
    finally:
        ended.set()
        thread.join()
        guard.close()
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1


def test_no_charge_is_shown_without_the_heads_that_came_before_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, guard = federation.sites[1], federation.guard(1)
    written = [Witness(1, lambda _: None).to_bytes()]
    checkpoint = Ledger.checkpoint

    def meanwhile(ledger: Ledger, public: bytes) -> str:
        # What an agent does in between: cosigned heads first, then the charge that they allow.
        if written:
            home.heads.write_bytes(written.pop())
            charge(federation, guard)
        return checkpoint(ledger, public)

    monkeypatch.setattr(Ledger, "checkpoint", meanwhile)
    found = collect(home, NOW)
    assert found.heads == home.heads.read_bytes()
    assert [type(decode(leaf)) for leaf in found.leaves[-2:]] == [Approval, Charge]
    guard.close()


def test_an_auditor_can_verify_it(federation: Federation) -> None:
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    hub = Hub(federation, federation.manifest(), sites).joined()
    hub.whole_round()
    # In the middle of a study, while the agents hold the ledgers open.
    shown = [collect(home, NOW) for number, home in federation.sites.items() if number in sites]
    for site in sites.values():
        site.close()
    assert all(evidence.heads for evidence in shown)
    found = verify(shown, Trust(public_key(federation.hub_key), federation.roster))
    assert [check for check in found.checks if not check.passed] == []
    assert found.missing == ("hub", federation.name(4))


def test_the_newest_roster_is_shown(federation: Federation) -> None:
    federation.guard(1).close()
    first = federation.roster
    assert collect(federation.sites[1], NOW).roster == first
    federation.roster = enlarged(federation)
    federation.receive(1, federation.manifest(name="waiting"))
    assert collect(federation.sites[1], NOW).roster == first
    federation.decide(1, federation.manifest(), "denied")
    larger, federation.roster = federation.roster, first
    federation.decide(1, federation.manifest(name="another"), "denied")
    assert collect(federation.sites[1], NOW).roster == larger
    # Of two with as many members the one that came last.
    federation.roster = enlarged(federation, "Westfield")
    federation.decide(1, federation.manifest(name="a third"), "denied")
    assert collect(federation.sites[1], NOW).roster == federation.roster


def test_what_does_not_verify_is_not_shown(federation: Federation, tmp_path: Path) -> None:
    home = federation.sites[1]
    manifest = federation.manifest()
    federation.decide(1, manifest)
    study = home.study(manifest.digest.hex())
    good = study.read_bytes()
    study.write_bytes(federation.document(federation.manifest(name="another")))
    with pytest.raises(VerificationError) as caught:
        collect(home, NOW)
    assert caught.value.code == "evidence.study"
    assert str(study) in caught.value.problem
    study.write_bytes(b"damaged")
    with pytest.raises(VerificationError) as caught:
        collect(home, NOW)
    assert caught.value.code == "evidence.study"
    # A study that is gone is the auditor's business: the ledger names it.
    study.unlink()
    assert collect(home, NOW).studies == {}
    study.write_bytes(good)
    home.admission.write_bytes(federation.sites[2].admission.read_bytes())
    with pytest.raises(VerificationError):
        collect(home, NOW)


def test_before_admission_and_before_the_first_entry_there_is_nothing(federation: Federation) -> None:
    home = federation.sites[1]
    with pytest.raises(RefusedError) as caught:
        collect(home, NOW)
    assert caught.value.code == "ledger.empty"
    home.admission.unlink()
    with pytest.raises(RefusedError) as caught:
        collect(home, NOW)
    assert caught.value.code == "site.not-admitted"


def test_a_damaged_ledger_is_named(federation: Federation) -> None:
    home: SiteHome = federation.sites[1]
    federation.guard(1).close()
    with sqlite3.connect(home.ledger) as connection:
        connection.executescript("DROP TRIGGER no_update; UPDATE entries SET leaf = x'00';")
    connection.close()
    with pytest.raises(VerificationError):
        collect(home, NOW)
