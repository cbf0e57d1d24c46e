"""X.509 for the link: the hub's authority, its server certificate, and client certificates by role.

Source: RFC 5280; RFC 6125 (subject alternative names). Rules: EC P-256 keys; a client certificate carries
who it is as one URI, ``wardround:ROLE:NUMBER``, and nothing that a request asked for; times are arguments.
"""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import VerificationError
from common.identity import read_secret, write_secret

Role = Literal["site", "coordinator"]
ROLES: Final[tuple[Role, ...]] = ("site", "coordinator")
AUTHORITY_LIFETIME: Final = timedelta(days=3650)
LIFETIME: Final = timedelta(days=825)
BACKDATE: Final = timedelta(minutes=5)
NAME: Final = re.compile(r"[A-Za-z0-9 .'_-]{1,64}")
_IDENTITY: Final = re.compile(r"wardround:(site|coordinator):([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who a client certificate says the other end is; ``tls_fingerprint`` is SHA-256 of its public key."""

    role: str
    number: int
    name: str
    tls_fingerprint: str


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _spki_digest(public_key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def new_tls_key_and_csr(name: str) -> tuple[bytes, bytes]:
    """A fresh P-256 private key (PEM) and a request for it (PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(key, hashes.SHA256())
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        request.public_bytes(Encoding.PEM),
    )


def requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request whose own signature holds. Raises VerificationError."""
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, InvalidSignature) as error:
        raise VerificationError("certificates.request", "the certificate request is malformed") from error
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise VerificationError("certificates.request", "the certificate request is not signed by its P-256 key")
    return key


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """The hub's certificate authority.

    Guarantee: requests_choose_nothing - a certificate holds the request's key and nothing else of it.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls, name: str, now: datetime) -> "Authority":
        """A fresh authority, valid for ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_subject(name))
            .issuer_name(_subject(name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Read ``authority.pem`` and its key. Raises RefusedError or VerificationError."""
        try:
            key = load_pem_private_key(read_secret(folder / "authority-key.pem"), password=None)
            certificate = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
        except (OSError, ValueError) as error:
            raise VerificationError("certificates.authority", f"{folder} holds no authority") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise VerificationError("certificates.authority", f"the key in {folder} is not the authority's")
        return cls(key, certificate)

    def save(self, folder: Path) -> None:
        """Write the certificate and, as a secret, its key."""
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_secret(folder / "authority-key.pem", pem)
        (folder / "authority.pem").write_bytes(self.certificate_pem)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's certificate."""
        return self._certificate.public_bytes(Encoding.PEM)

    def issue_server(self, csr_pem: bytes, hosts: Sequence[str], now: datetime) -> bytes:
        """A server certificate (PEM) for host names and addresses."""
        return self._issue(csr_pem, "hub", [_general_name(h) for h in hosts], ExtendedKeyUsageOID.SERVER_AUTH, now)

    def issue_client(self, csr_pem: bytes, role: Role, number: int, name: str, now: datetime) -> bytes:
        """A client certificate (PEM) for a role, its number from 1 to 65535, and a name."""
        uri = f"wardround:{role}:{number}"
        if not _IDENTITY.fullmatch(uri) or not 1 <= number <= 65535 or not NAME.fullmatch(name):
            raise VerificationError("certificates.name", "a certificate needs a known role, a number and a name")
        return self._issue(
            csr_pem, name, [x509.UniformResourceIdentifier(uri)], ExtendedKeyUsageOID.CLIENT_AUTH, now
        )

    def _issue(
        self,
        csr_pem: bytes,
        name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        now: datetime,
    ) -> bytes:
        key = requested_key(csr_pem)
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_subject(name))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def tls_fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of the certificate's public key (SubjectPublicKeyInfo), hex."""
    return peer_identity(certificate_pem).tls_fingerprint


def peer_identity(certificate_pem: bytes) -> Peer:
    """Read who a client certificate is for, strictly.

    Assumes: TLS has verified the chain to the hub's authority and the dates.
    Raises: VerificationError when it is not exactly one of our client certificates.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        common_names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = certificate.public_key()
    except (ValueError, x509.ExtensionNotFound) as error:
        raise VerificationError("certificates.peer", "the peer's certificate is not one of this hub's") from error
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    match = _IDENTITY.fullmatch(uris[0]) if len(uris) == 1 and len(list(names)) == 1 else None
    if (
        match is None
        or list(usage) != [ExtendedKeyUsageOID.CLIENT_AUTH]
        or len(common_names) != 1
        or not isinstance(key, ec.EllipticCurvePublicKey)
    ):
        raise VerificationError("certificates.peer", "the peer's certificate is not a client certificate of ours")
    name = common_names[0].value
    if not isinstance(name, str) or not NAME.fullmatch(name) or int(match[2]) > 65535:
        raise VerificationError("certificates.peer", "the peer's certificate carries a malformed name")
    return Peer(match[1], int(match[2]), name, _spki_digest(key))
