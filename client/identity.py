"""Who this site is: made locally by ``site init``, completed by the hub's admission.

Source: DESIGN "Three people, one program". Rules: the three private keys and the split secret are made here
and never leave the folder; an admission is accepted only if it answers this folder's own request.
"""

import os
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.settings import Policy, SiteSettings, load, new_files
from client.state import SiteHome, write_durable
from common import identity
from common.certificates import new_tls_key_and_csr, private_key_fingerprint
from common.enrolment import Admission, AdmissionRequest
from common.errors import RefusedError, VerificationError
from common.ledger.store import Ledger


def create_site(home: SiteHome, *, name: str, hub: str) -> AdmissionRequest:
    """Make a site's folder: keys, settings, deny-by-default policy, admission request.

    Guarantee: private_keys_stay - the request holds public keys and proofs only.
    Raises: UsageError when the folder holds a site already or name or address are malformed.
    """
    texts = new_files(name, hub, os.urandom(16).hex())
    home.create_folders()
    key_pem, csr_pem = new_tls_key_and_csr(name)
    identity.write_secret(home.tls_key, key_pem)
    protocol, ledger = identity.new_signing_key(), identity.new_signing_key()
    identity.save_signing_key(home.protocol_key, protocol)
    identity.save_signing_key(home.ledger_key, ledger)
    identity.write_secret(home.split_secret, os.urandom(32))
    # Made here, once: wherever the ledger is missing later, it was lost, and nothing may be charged.
    Ledger.open(home.ledger, ledger, create=True).close()
    request = AdmissionRequest.create(name, csr_pem, protocol, ledger)
    write_durable(home.request, request.to_bytes(), 0o644)
    write_durable(home.policy, texts["policy.toml"].encode())
    # The settings come last: a folder without them is not a site, so a crash before this line loses nothing.
    write_durable(home.settings, texts["site.toml"].encode())
    return request


@dataclass(frozen=True, slots=True)
class SiteIdentity:
    """An admitted site's keys and what it knows of the hub. Never printed whole."""

    id: int
    name: str
    address: str
    hub_key: bytes
    certificate_pem: bytes
    authority_pem: bytes
    tls_key_pem: bytes = field(repr=False)
    protocol_key: Ed25519PrivateKey = field(repr=False)
    ledger_key: Ed25519PrivateKey = field(repr=False)
    split_secret: bytes = field(repr=False)

    @classmethod
    def load(cls, home: SiteHome) -> "SiteIdentity":
        """Read and cross-check keys, settings, request and admission.

        Raises: RefusedError when the site is not admitted yet or a secret file is open to others;
        VerificationError when the admission is another site's.
        """
        settings = load(home.settings, SiteSettings)
        try:
            admission = Admission.from_bytes(home.admission.read_bytes())
        except FileNotFoundError as error:
            problem = f"{home.admission} is missing: this site is not admitted yet"
            remedy = "Send request.json to the coordinator and put the admission that comes back there."
            raise RefusedError("site.not-admitted", problem, remedy=remedy) from error
        restore = "Restore the whole folder, or make a new site and have it admitted."
        try:
            request = AdmissionRequest.from_bytes(home.request.read_bytes())
        except FileNotFoundError as error:
            problem = f"{home.request} is missing: the admission cannot be checked without it"
            raise RefusedError("site.no-request", problem, remedy=restore) from error
        admission.check_answers(request)
        tls_key_pem = identity.read_secret(home.tls_key)
        protocol_key = identity.load_signing_key(home.protocol_key)
        ledger_key = identity.load_signing_key(home.ledger_key)
        own = (identity.public_key(protocol_key), identity.public_key(ledger_key))
        foreign = own != (request.protocol_key, request.ledger_key)
        if foreign or private_key_fingerprint(tls_key_pem) != request.tls_fingerprint:
            problem = f"the private keys in {home.tls_key.parent} are not those of {home.request.name}"
            raise VerificationError("site.foreign-keys", problem, remedy=restore)
        return cls(
            id=admission.id,
            name=admission.name,
            address=settings.hub,
            hub_key=admission.hub_key,
            certificate_pem=admission.certificate_pem,
            authority_pem=admission.ca_pem,
            tls_key_pem=tls_key_pem,
            protocol_key=protocol_key,
            ledger_key=ledger_key,
            split_secret=identity.read_secret(home.split_secret),
        )


def load_policy(home: SiteHome) -> Policy:
    """``policy.toml``. Raises UsageError."""
    return load(home.policy, Policy)
