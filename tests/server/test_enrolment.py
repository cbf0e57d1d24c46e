"""Making a hub and admitting hospitals: what goes on the roster, and what never does."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common import identity
from common.certificates import Peer, peer_identity
from common.enrolment import AdmissionRequest
from common.errors import RefusedError, UsageError, VerificationError
from server.enrolment import admit_site, admitted, create_hub, sign_roster
from server.home import CoordinatorHome, HubHome
from server.store import Store
from tests.server.hospitals import Founded, found, new_keys

NOW = datetime.now(UTC)


@pytest.fixture
def founded(tmp_path: Path) -> Founded:
    return found(tmp_path, 0)


def test_a_new_hub_and_its_first_coordinator(tmp_path: Path) -> None:
    home = HubHome(tmp_path / "deep" / "hub")
    made = create_hub(home, address="Hub.Example.org:8443", listen="0.0.0.0:8443", now=NOW)
    assert made.hub_key == identity.key_text(identity.public_key(identity.load_signing_key(home.hub_key)))
    assert made.hub_fingerprint == identity.fingerprint(identity.key_bytes(made.hub_key))
    coordinator = CoordinatorHome(home.coordinator)
    assert coordinator.load_settings().hub_key == made.hub_key
    signing = identity.load_signing_key(coordinator.signing_key)
    assert made.coordinator_key == identity.key_text(identity.public_key(signing))
    assert made.coordinator_key != made.hub_key
    peer = peer_identity(coordinator.certificate.read_bytes())
    assert (peer.role, peer.number) == ("coordinator", 1)


def test_a_hub_is_made_once(founded: Founded) -> None:
    before = founded.home.hub_key.read_bytes()
    with pytest.raises(UsageError, match="holds a hub already") as caught:
        create_hub(founded.home, address="h:1", listen="h:1", now=NOW)
    assert caught.value.remedy
    assert founded.home.hub_key.read_bytes() == before


@pytest.mark.parametrize(
    ("address", "listen"),
    [
        ("hub", "h:1"),
        ("h:1", "hub"),
        ("h:0", "h:0"),
        ("h:70000", "h:1"),
        ("-bad-:1", "h:1"),
        ("10.1:1", "h:1"),
    ],
)
def test_a_bad_address_leaves_no_half_made_hub(tmp_path: Path, address: str, listen: str) -> None:
    home = HubHome(tmp_path / "hub")
    with pytest.raises(UsageError):
        create_hub(home, address=address, listen=listen, now=NOW)
    assert not home.folder.exists()
    create_hub(home, address="h:1", listen="h:1", now=NOW)


def test_admitted_sites_are_numbered_certified_and_on_the_roster(founded: Founded) -> None:
    first, second = founded.admit("St. Mary"), founded.admit("Northgate")
    assert (first.id, second.id) == (1, 2)
    for site_id, admission in founded.admissions.items():
        admission.check_answers(founded.keys[site_id].request)
        peer = peer_identity(admission.certificate_pem)
        assert (peer.role, peer.number, peer.name) == ("site", site_id, admission.name)
    hub_key = second.hub_key
    assert [member.id for member in founded.signed_roster().verify(hub_key).members] == [1, 2]
    # An admission holds the roster as it then was.
    assert [member.id for member in first.verified_roster().members] == [1]


def test_a_lost_admission_is_given_again(founded: Founded) -> None:
    first = founded.admit("St. Mary")
    founded.admit("Northgate")
    again = admit_site(founded.home, founded.keys[1].request.to_bytes(), now=NOW)
    again.check_answers(founded.keys[1].request)
    assert (again.id, again.name) == (first.id, first.name)
    assert len(again.verified_roster().members) == 2


@pytest.mark.parametrize("name", ["St. Mary", "ST. MARY", "st. mary"])
def test_a_name_belongs_to_one_hospital(founded: Founded, name: str) -> None:
    founded.admit("St. Mary")
    with pytest.raises(RefusedError, match="admitted already") as caught:
        founded.admit(name)
    assert caught.value.remedy
    founded.admit("Northgate")


def test_the_roster_always_stands(founded: Founded) -> None:
    founded.admit("St. Mary")
    known, fresh = founded.keys[1], new_keys("Northgate")
    csr = fresh.request.csr_pem
    taken = [
        AdmissionRequest.create("Northgate", csr, known.protocol, fresh.ledger),
        AdmissionRequest.create("Northgate", csr, fresh.protocol, known.ledger),
        # The same keys, each in the other's place.
        AdmissionRequest.create("Northgate", csr, known.ledger, fresh.ledger),
        AdmissionRequest.create("Northgate", csr, fresh.protocol, known.protocol),
        # The TLS key of another hospital.
        AdmissionRequest.create("Northgate", known.request.csr_pem, fresh.protocol, fresh.ledger),
    ]
    for request in taken:
        with pytest.raises(RefusedError, match="admitted already"):
            admit_site(founded.home, request.to_bytes(), now=NOW)
        hub_key = founded.admissions[1].hub_key
        assert [m.name for m in founded.signed_roster().verify(hub_key).members] == ["St. Mary"]
    admit_site(founded.home, fresh.request.to_bytes(), now=NOW)


@pytest.mark.parametrize("forged", ["protocol_proof", "ledger_proof"])
def test_a_request_that_does_not_verify_leaves_no_trace(founded: Founded, forged: str) -> None:
    request = replace(new_keys("St. Mary").request, **{forged: bytes(64)})
    with pytest.raises(VerificationError):
        admit_site(founded.home, request.to_bytes(), now=NOW)
    with pytest.raises(VerificationError):
        admit_site(founded.home, b"{}", now=NOW)
    store = Store.open(founded.home.database)
    assert store.sites() == []
    store.close()


def test_a_hub_without_sites_says_what_to_do(founded: Founded) -> None:
    with pytest.raises(RefusedError, match="no hospital is admitted") as caught:
        sign_roster(founded.home, [])
    assert "hub admit" in caught.value.remedy


def test_only_the_roster_attaches(founded: Founded) -> None:
    founded.admit("St. Mary")
    peer = peer_identity(founded.admissions[1].certificate_pem)
    store = Store.open(founded.home.database)
    admitted(store, peer)
    strangers: list[tuple[Peer, str]] = [
        (replace(peer, number=2), "site 2 is not on the roster"),
        (replace(peer, name="Northgate"), "carries another name"),
        (replace(peer, tls_fingerprint="0" * 64), "holds another key than admitted"),
    ]
    for stranger, problem in strangers:
        with pytest.raises(RefusedError, match=problem):
            admitted(store, stranger)
    store.close()
