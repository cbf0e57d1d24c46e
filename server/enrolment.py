"""Making a hub and admitting hospitals: the authority signs, the roster grows.

Source: DESIGN "Three people, one program"; PROTOCOL "Roster". Rules: a request is verified whole (three
distinct keys, a proof of possession for each) before anything is stored; the hub's private keys are made
here and stay in its folder; hospitals' private keys are never seen.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common import identity
from common.certificates import Authority, Peer, new_tls_key_and_csr
from common.enrolment import Admission, AdmissionRequest
from common.errors import RefusedError, UsageError, VerificationError
from common.ledger.entries import utc_minute
from common.ledger.store import Ledger
from common.roster import Member, Roster, SignedRoster
from server.home import CoordinatorHome, HubHome, HubSettings
from server.store import SiteRow, Store, duplicate


@dataclass(frozen=True, slots=True)
class NewHub:
    """What ``hub init`` prints."""

    hub_key: str
    hub_fingerprint: str
    coordinator_key: str


def create_hub(home: HubHome, *, address: str, listen: str, now: datetime) -> NewHub:
    """Make the folder of a hub and of its first coordinator.

    Raises: UsageError when it exists already or an address is malformed; nothing is made then.
    """
    if home.settings.exists():
        raise UsageError("hub.exists", f"{home.folder} holds a hub already", remedy="Choose a new folder.")
    settings = HubSettings.create(listen=listen, address=address)
    authority = Authority.create("wardround hub", now)
    key_pem, csr_pem = new_tls_key_and_csr("hub")
    host = settings.address.rpartition(":")[0].strip("[]").lower()
    hosts = tuple(dict.fromkeys((host, "localhost", "127.0.0.1")))
    certificate = authority.issue_server(csr_pem, hosts, now)
    for folder in (home.folder, home.server_key.parent, home.authority, home.coordinator):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority.save(home.authority)
    identity.write_secret(home.server_key, key_pem)
    home.server_certificate.write_bytes(certificate)
    hub_public = _new_key(home.hub_key)
    coordinator_key = _create_coordinator(home, authority, address, hub_public, now)
    Store.open(home.database).close()
    Ledger.open(home.ledger, identity.load_signing_key(home.hub_key), create=True).close()
    # The settings come last: a folder without them is not a hub, so a crash before this line loses nothing.
    text = f'listen = "{settings.listen}"\naddress = "{settings.address}"\n'
    home.settings.write_text(text, encoding="utf-8")
    return NewHub(identity.key_text(hub_public), identity.fingerprint(hub_public), coordinator_key)


def _create_coordinator(
    home: HubHome, authority: Authority, address: str, hub_public: bytes, now: datetime
) -> str:
    coordinator = CoordinatorHome(home.coordinator)
    key_pem, csr_pem = new_tls_key_and_csr("coordinator")
    identity.write_secret(coordinator.tls_key, key_pem)
    coordinator.certificate.write_bytes(authority.issue_client(csr_pem, "coordinator", 1, "coordinator", now))
    coordinator.authority.write_bytes(authority.certificate_pem)
    signing_key = _new_key(coordinator.signing_key)
    text = f'hub = "{address}"\nhub_key = "{identity.key_text(hub_public)}"\n'
    coordinator.settings.write_text(text, encoding="utf-8")
    return identity.key_text(signing_key)


def _new_key(path: Path) -> bytes:
    key = identity.new_signing_key()
    identity.save_signing_key(path, key)
    return identity.public_key(key)


def roster_of(sites: Sequence[SiteRow]) -> Roster:
    """The roster of the admitted sites, by id."""
    return Roster(tuple(Member(row.id, row.name, row.protocol_key, row.ledger_key) for row in sites))


def sign_roster(home: HubHome, sites: Sequence[SiteRow]) -> SignedRoster:
    """The current roster under the hub's signature. Raises RefusedError before the first admission."""
    if not sites:
        remedy = "Admit one with 'wardround hub admit'."
        raise RefusedError("hub.no-sites", "no hospital is admitted at this hub yet", remedy=remedy)
    return SignedRoster.create(roster_of(sites), identity.load_signing_key(home.hub_key))


def admit_site(home: HubHome, request_bytes: bytes, *, now: datetime) -> Admission:
    """Verify a request, certify its TLS key, store the site and return what goes back to it.

    The very request of an admitted site again gives its admission again, with a new certificate for the
    same key, so that an admission that was lost on the way costs nothing.

    Guarantee: the_roster_always_stands - no request is admitted that would make the next roster invalid.
    Raises: VerificationError for a bad request, RefusedError for a name or key that is known already.
    """
    settings = home.load_settings()
    request = AdmissionRequest.from_bytes(request_bytes)
    authority = Authority.load(home.authority)
    stored = ("name", "protocol_key", "ledger_key", "tls_fingerprint")
    named = {field: getattr(request, field) for field in stored}
    with closing(Store.open(home.database)) as store:
        sites = store.sites()
        same = [row for row in sites if all(getattr(row, key) == value for key, value in named.items())]
        site_id = same[0].id if same else store.next_site_id()
        certificate = authority.issue_client(request.csr_pem, "site", site_id, request.name, now)
        if not same:
            row = SiteRow(id=site_id, admitted=utc_minute(now), **named)
            # The roster's rules are stricter than the table's: names in any case, a key in either role.
            try:
                roster_of([*sites, row])
            except VerificationError as error:
                raise duplicate(row.name) from error
            store.add_site(row)
        signed = sign_roster(home, store.sites())
    return Admission(
        id=site_id,
        name=request.name,
        certificate_pem=certificate,
        ca_pem=authority.certificate_pem,
        hub_key=identity.public_key(identity.load_signing_key(home.hub_key)),
        address=settings.address,
        roster=signed.data,
        roster_signature=signed.signature,
    )


def admitted(store: Store, peer: Peer) -> None:
    """Whether a peer's certificate is that of an admitted site, key for key.

    Guarantee: only_the_roster_attaches - a certificate of the right authority with another key, id or name
    is refused.
    Raises: RefusedError saying which.
    """
    row = store.site(peer.number)
    if row is None:
        raise RefusedError("link.unknown-site", f"site {peer.number} is not on the roster")
    if row.name != peer.name:
        raise RefusedError("link.name", f"the certificate of site {peer.number} carries another name")
    if row.tls_fingerprint != peer.tls_fingerprint:
        problem = f"the certificate of site {peer.number} holds another key than admitted"
        raise RefusedError("link.wrong-key", problem)
