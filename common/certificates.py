"""X.509 for the link: the hub's own authority, its server certificate, and one certificate a party.

Source: RFC 5280 (profile), RFC 6125 (names of servers), RFC 2986 (requests), NIST FIPS 186-5 (P-256).
Rules: every key is EC P-256; the authority signs a request's public key and nothing else of it (what the
certificate says is decided by the hub alone); a party is named by exactly one URI, ``wardround:site:3``
or ``wardround:coordinator:1``; a client certificate cannot serve and a server certificate cannot call.
"""

import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import UsageError, VerificationError
from common.identity import (
    MAX_ID,
    check_name,
    name_problem,
    private_pem,
    read_private_pem,
    read_secret,
    write_secret,
)

Role = Literal["site", "coordinator"]

AUTHORITY_LIFETIME: Final = timedelta(days=3653)
LEAF_LIFETIME: Final = timedelta(days=825)
BACKDATED: Final = timedelta(hours=1)
"""Certificates begin in the past by this much, so that a clock a little behind accepts them."""
MAX_PEM_BYTES: Final = 1 << 16

_IDENTITY: Final = re.compile(r"wardround:(site|coordinator):([1-9][0-9]{0,4})")
_HOST_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"{_HOST_LABEL}(?:\.{_HOST_LABEL})*")
_SERVER_NAME: Final = "wardround hub"
_PEM: Final = serialization.Encoding.PEM
# What the library raises on a document that it cannot read, in one call or another.
_UNREADABLE: Final = (
    *(ValueError, TypeError, InternalError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion),
    *(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who a client certificate says it is. ``number`` is the site's or coordinator's id, 1 to 65535."""

    role: Role
    number: int
    name: str
    tls_fingerprint: str


@dataclass(frozen=True, slots=True)
class Authority:
    """The certificate authority of one hub."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The public certificate, which every party trusts for this hub alone."""
        return self.certificate.public_bytes(_PEM)

    @classmethod
    def create(cls, name: str, now: datetime) -> "Authority":
        """A new authority, valid ten years from ``now`` (aware). Raises UsageError on a bad name."""
        _check_aware(now)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _common_name(check_name(name, "name of the authority"))
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = _builder(subject, subject, key.public_key(), now - BACKDATED, now + AUTHORITY_LIFETIME)
        return cls(_signed(builder, key, x509.BasicConstraints(ca=True, path_length=0), identifier), key)

    def save(self, folder: Path) -> None:
        """Write ``authority.key`` (a secret) and ``authority.pem``. Raises RefusedError where a key is."""
        write_secret(folder / "authority.key", private_pem(self.key))
        with (folder / "authority.pem").open("wb") as file:
            file.write(self.certificate_pem)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Read what save wrote. Raises RefusedError or VerificationError."""
        try:
            key = read_private_pem(read_secret(folder / "authority.key"))
            certificate = read_certificate((folder / "authority.pem").read_bytes(), "authority certificate")
        except (OSError, *_UNREADABLE) as error:
            problem = f"the authority in {folder} cannot be read"
            remedy = "Restore authority.key and authority.pem from the backup of the hub's keys."
            raise VerificationError("certificates.authority-files", problem, remedy=remedy) from error
        if (
            not isinstance(key, ec.EllipticCurvePrivateKey)
            or certificate.public_key() != key.public_key()
            or not isinstance(key.curve, ec.SECP256R1)
        ):
            problem = f"authority.key and authority.pem in {folder} do not match"
            raise VerificationError("certificates.authority-key", problem)
        return cls(certificate, key)

    def issue_server(self, csr_pem: bytes, hosts: Sequence[str], now: datetime) -> bytes:
        """A server certificate (PEM) for the request's key, valid for each host name or address in ``hosts``.

        Raises: UsageError on a bad host or none; VerificationError on a bad request or expired authority.
        """
        if not hosts or len(set(hosts)) != len(hosts):
            problem = "the hosts of a server certificate are one or more, each once"
            raise UsageError("certificates.hosts", problem)
        names = x509.SubjectAlternativeName([_host_name(host) for host in hosts])
        return self._issue(csr_pem, _SERVER_NAME, names, ExtendedKeyUsageOID.SERVER_AUTH, now)

    def issue_client(self, csr_pem: bytes, role: Role, number: int, name: str, now: datetime) -> bytes:
        """A client certificate (PEM) that names the holder of the request's key as this party.

        Guarantee: nothing_of_a_request_is_copied_but_its_key - subject and extensions in it are ignored.
        Raises: UsageError on a bad role, number or name; VerificationError on a bad request or expired
        authority.
        """
        uri = f"wardround:{role}:{number}"
        if not _IDENTITY.fullmatch(uri) or number > MAX_ID:
            raise UsageError("certificates.identity", f"{role!r} with number {number} is not a party")
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        check_name(name, "name of the party")
        return self._issue(csr_pem, name, names, ExtendedKeyUsageOID.CLIENT_AUTH, now)

    def _issue(
        self,
        csr_pem: bytes,
        name: str,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        now: datetime,
    ) -> bytes:
        _check_aware(now)
        public = read_request(csr_pem)
        if not self.certificate.not_valid_before_utc <= now < self.certificate.not_valid_after_utc:
            problem = "the hub's authority is not valid at this time"
            remedy = "Check the clock; an expired authority must be made anew and sent to every party."
            raise VerificationError("certificates.authority-expired", problem, remedy=remedy)
        begins = max(now - BACKDATED, self.certificate.not_valid_before_utc)
        ends = min(now + LEAF_LIFETIME, self.certificate.not_valid_after_utc)
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        identifiers = (
            x509.SubjectKeyIdentifier.from_public_key(public),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
        )
        builder = _builder(_common_name(name), self.certificate.subject, public, begins, ends)
        purposes = x509.ExtendedKeyUsage([purpose])
        return _signed(builder, self.key, constraints, purposes, names, *identifiers).public_bytes(_PEM)


def new_tls_key_and_csr(name: str) -> tuple[bytes, bytes]:
    """A fresh P-256 key (PKCS #8 PEM, a secret) and a request for it (PEM) with ``name`` as common name."""
    check_name(name, "name in the certificate request")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(_common_name(name))
    return private_pem(key), builder.sign(key, hashes.SHA256()).public_bytes(_PEM)


def read_request(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request. Raises VerificationError.

    Guarantee: forged_requests_are_refused - the request must be one PEM block in its own encoding, signed
    by the key it holds, and that key must be EC P-256.
    """
    try:
        if len(csr_pem) > MAX_PEM_BYTES:
            raise ValueError("too long")
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        proven = request.is_signature_valid
    except _UNREADABLE as error:
        raise VerificationError("certificates.request", "the certificate request cannot be read") from error
    if request.public_bytes(_PEM) != csr_pem:
        problem = "the certificate request is not exactly one PEM block"
        raise VerificationError("certificates.request", problem)
    if not proven:
        problem = "the certificate request is not signed by its key"
        raise VerificationError("certificates.request-proof", problem)
    return _p256(key, "certificate request")


def read_certificate(certificate_pem: bytes, what: str) -> x509.Certificate:
    """Exactly one PEM certificate. Raises VerificationError naming ``what``."""
    try:
        if len(certificate_pem) > MAX_PEM_BYTES:
            raise ValueError("too long")
        certificates = x509.load_pem_x509_certificates(certificate_pem)
    except _UNREADABLE as error:
        raise VerificationError("certificates.pem", f"the {what} is not a PEM certificate") from error
    if len(certificates) != 1:
        raise VerificationError("certificates.pem", f"the {what} must be exactly one certificate")
    return certificates[0]


def peer_identity(certificate_pem: bytes) -> Peer:
    """The party that a client certificate names, read strictly. Raises VerificationError.

    Guarantee: only_client_certificates_name_a_peer - anything but one URI of the known form, one common
    name, the client purpose alone, no authority and a P-256 key is refused.
    Assumes: the TLS library has checked signature, authority and validity of the certificate.
    """
    certificate = read_certificate(certificate_pem, "peer's certificate")
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        purposes = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        subject = [attribute.value for attribute in certificate.subject]
        key = _p256(certificate.public_key(), "certificate")
    except _UNREADABLE as error:
        problem = "the peer's certificate lacks what a wardround client certificate has"
        raise VerificationError("certificates.peer", problem) from error
    if constraints.ca or purposes != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        problem = "the peer's certificate is not for clients alone"
        raise VerificationError("certificates.peer-purpose", problem)
    uri = names[0].value if len(names) == 1 and isinstance(names[0], x509.UniformResourceIdentifier) else ""
    match = _IDENTITY.fullmatch(uri)
    if match is None or int(match[2]) > MAX_ID:
        raise VerificationError("certificates.peer-name", "the peer's certificate names no wardround party")
    common_names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(subject) != 1 or len(common_names) != 1 or not isinstance(common_names[0].value, str):
        problem = "the peer's certificate must have one common name"
        raise VerificationError("certificates.peer-subject", problem)
    name = common_names[0].value
    if problem := name_problem(name, "common name of the peer's certificate"):
        raise VerificationError("certificates.peer-subject", problem)
    role: Role = "site" if match[1] == "site" else "coordinator"
    return Peer(role, int(match[2]), name, key_fingerprint(key))


def key_fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a key's subject public key info (DER), 64 hex digits, whoever certifies the key."""
    encoded = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def private_key_fingerprint(key_pem: bytes) -> str:
    """key_fingerprint of a private key in PEM. Raises VerificationError when it is no P-256 key."""
    try:
        key = read_private_pem(key_pem)
    except ValueError as error:
        raise VerificationError("certificates.key", "the private TLS key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise VerificationError("certificates.key", "the private TLS key is not an EC P-256 key")
    return key_fingerprint(_p256(key.public_key(), "private TLS key"))


def check_issued(certificate_pem: bytes, authority_pem: bytes) -> None:
    """Check that the authority's key signed the certificate. Raises VerificationError."""
    certificate = read_certificate(certificate_pem, "certificate")
    authority = read_certificate(authority_pem, "authority certificate")
    try:
        constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(authority)
    except _UNREADABLE as error:
        problem = "the certificate is not signed by the authority beside it"
        raise VerificationError("certificates.issuer", problem) from error
    if not constraints.ca:
        raise VerificationError("certificates.issuer", "the authority beside the certificate is no authority")


def _check_aware(now: datetime) -> None:
    if now.utcoffset() is None:
        raise UsageError("certificates.time", "the time of issue must carry its time zone")


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        # A numeric last label is a mistyped address, never a name (RFC 1123 section 2.1).
        if len(host) > 253 or not _HOST.fullmatch(host) or host.split(".")[-1].isdigit():
            problem = f"{host[:64]!r} is neither a host name nor an address"
            remedy = "Give plain names or addresses, without port and without wildcard."
            raise UsageError("certificates.host", problem, remedy=remedy) from None
        return x509.DNSName(host.lower())


def _p256(key: object, what: str) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise VerificationError("certificates.key-kind", f"the key of the {what} must be EC P-256")
    return key


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    constraints: x509.BasicConstraints,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    unused = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
    ca = constraints.ca
    usage = x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **unused)
    builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )
