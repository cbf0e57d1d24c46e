"""Certificates: what the authority signs, who a certificate names, and real handshakes over loopback."""

import hashlib
import ipaddress
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import certificates
from common.certificates import Authority, new_tls_key_and_csr, peer_identity
from common.errors import RefusedError, UsageError, VerificationError

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
AUTHORITY = Authority.create("Test hub", NOW)
KEY_PEM, CSR_PEM = new_tls_key_and_csr("St. Mary's")


def _load(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def _extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    return certificate.extensions.get_extension_for_class(kind)


def test_authority_profile() -> None:
    certificate = AUTHORITY.certificate
    certificate.verify_directly_issued_by(certificate)
    constraints = _extension(certificate, x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = _extension(certificate, x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    lifetime = certificate.not_valid_after_utc - NOW
    assert timedelta(days=3650) < lifetime < timedelta(days=3660)
    assert isinstance(AUTHORITY.key.curve, ec.SECP256R1)


def test_server_profile() -> None:
    hosts = ("hub.example.org", "localhost", "127.0.0.1", "::1")
    certificate = _load(AUTHORITY.issue_server(CSR_PEM, hosts, NOW))
    certificate.verify_directly_issued_by(AUTHORITY.certificate)
    names = _extension(certificate, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("::1"),
    ]
    assert list(_extension(certificate, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert _extension(certificate, x509.BasicConstraints).value.ca is False
    assert certificate.not_valid_after_utc - NOW == timedelta(days=825)
    assert NOW - certificate.not_valid_before_utc == timedelta(hours=1) or (
        certificate.not_valid_before_utc == AUTHORITY.certificate.not_valid_before_utc
    )


def test_client_profile_and_identity() -> None:
    pem = AUTHORITY.issue_client(CSR_PEM, "site", 3, "St. Mary's", NOW)
    certificate = _load(pem)
    certificate.verify_directly_issued_by(AUTHORITY.certificate)
    names = _extension(certificate, x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["wardround:site:3"]
    peer = peer_identity(pem)
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert peer == certificates.Peer("site", 3, "St. Mary's", hashlib.sha256(spki).hexdigest())
    assert peer.tls_fingerprint == certificates.key_fingerprint(certificates.read_request(CSR_PEM))
    coordinator = peer_identity(AUTHORITY.issue_client(CSR_PEM, "coordinator", 1, "C", NOW))
    assert (coordinator.role, coordinator.number, coordinator.name) == ("coordinator", 1, "C")


def test_nothing_of_a_request_is_copied_but_its_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    uri = x509.UniformResourceIdentifier("wardround:coordinator:1")
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri, x509.DNSName("hub.example")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    pem = AUTHORITY.issue_client(request, "site", 5, "Five", NOW)
    peer = peer_identity(pem)
    assert (peer.role, peer.number, peer.name) == ("site", 5, "Five")
    plain = _load(AUTHORITY.issue_client(CSR_PEM, "site", 5, "Five", NOW))
    ours = _load(pem)
    for kind in (x509.BasicConstraints, x509.SubjectAlternativeName, x509.ExtendedKeyUsage, x509.KeyUsage):
        assert _extension(ours, kind).value == _extension(plain, kind).value
    assert len(list(ours.extensions)) == len(list(plain.extensions))
    assert ours.public_key() == key.public_key()


def _request(key: Any, algorithm: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    pem: bytes = builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)
    return pem


def _with_another_key(csr_pem: bytes) -> bytes:
    """The request with its public key replaced by another one, its signature left."""

    def point(pem: bytes) -> bytes:
        key = x509.load_pem_x509_csr(pem).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)

    der = x509.load_pem_x509_csr(csr_pem).public_bytes(serialization.Encoding.DER)
    _, other = new_tls_key_and_csr("Other")
    forged = der.replace(point(csr_pem), point(other))
    assert forged != der
    return x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM)


def test_forged_requests_are_refused() -> None:
    certificates.read_request(CSR_PEM)
    wrong = {
        "not signed by its key": _with_another_key(CSR_PEM),
        "EC P-256": _request(ed25519.Ed25519PrivateKey.generate(), None),
        "must be EC P-256": _request(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
        "be EC P-256": _request(rsa.generate_private_key(65537, 2048), hashes.SHA256()),
        "cannot be read": b"",
        "cannot be": CSR_PEM[:100],
        "exactly one PEM block": CSR_PEM + CSR_PEM,
        "one PEM block": b"comment\n" + CSR_PEM,
        "can.*not": CSR_PEM + b" " * certificates.MAX_PEM_BYTES,
    }
    for pattern, csr_pem in wrong.items():
        with pytest.raises(VerificationError, match=pattern):
            certificates.read_request(csr_pem)
        with pytest.raises(VerificationError, match=pattern):
            AUTHORITY.issue_client(csr_pem, "site", 1, "A", NOW)
        with pytest.raises(VerificationError, match=pattern):
            AUTHORITY.issue_server(csr_pem, ["localhost"], NOW)


@pytest.mark.parametrize(
    "host", ["", "*.example.org", "a b", "hub:443", "-a", "a-", "a..b", "x" * 64, "1.2.3", "1.2.3.400", "é"]
)
def test_bad_hosts_are_refused(host: str) -> None:
    with pytest.raises(UsageError, match="neither a host name nor an address"):
        AUTHORITY.issue_server(CSR_PEM, [host], NOW)


def test_host_lists_are_checked() -> None:
    for hosts in ([], ["localhost", "localhost"]):
        with pytest.raises(UsageError, match="each once"):
            AUTHORITY.issue_server(CSR_PEM, hosts, NOW)


@pytest.mark.parametrize(
    ("role", "number", "name"),
    [("site", 0, "A"), ("site", -1, "A"), ("site", 65536, "A"), ("admin", 1, "A"), ("site", 1, "A/B")],
)
def test_bad_parties_are_refused(role: Any, number: int, name: str) -> None:
    with pytest.raises(UsageError):
        AUTHORITY.issue_client(CSR_PEM, role, number, name, NOW)


def test_times_are_checked() -> None:
    for now in (NOW - timedelta(days=2), NOW + timedelta(days=3660)):
        with pytest.raises(VerificationError, match="not valid at this time"):
            AUTHORITY.issue_client(CSR_PEM, "site", 1, "A", now)
    with pytest.raises(UsageError, match="time zone"):
        AUTHORITY.issue_client(CSR_PEM, "site", 1, "A", NOW.replace(tzinfo=None))
    with pytest.raises(UsageError, match="time zone"):
        Authority.create("A", NOW.replace(tzinfo=None))
    late = _load(AUTHORITY.issue_client(CSR_PEM, "site", 1, "A", NOW + timedelta(days=3600)))
    assert late.not_valid_after_utc == AUTHORITY.certificate.not_valid_after_utc


def test_authority_in_files(tmp_path: Path) -> None:
    AUTHORITY.save(tmp_path)
    loaded = Authority.load(tmp_path)
    assert loaded.certificate == AUTHORITY.certificate
    assert loaded.key.private_numbers() == AUTHORITY.key.private_numbers()
    with pytest.raises(RefusedError, match="exists already"):
        Authority.create("Other", NOW).save(tmp_path)
    assert Authority.load(tmp_path).certificate == AUTHORITY.certificate
    (tmp_path / "authority.key").chmod(0o644)
    with pytest.raises(RefusedError, match="open to group or world"):
        Authority.load(tmp_path)
    (tmp_path / "authority.key").chmod(0o600)
    (tmp_path / "authority.pem").write_bytes(Authority.create("Other", NOW).certificate_pem)
    with pytest.raises(VerificationError, match="do not match"):
        Authority.load(tmp_path)
    os.unlink(tmp_path / "authority.pem")
    with pytest.raises(VerificationError, match="cannot be read"):
        Authority.load(tmp_path)


def _certificate(
    *,
    names: list[x509.GeneralName] | None = None,
    purposes: list[x509.ObjectIdentifier] | None = None,
    ca: bool = False,
    subject: list[x509.NameAttribute] | None = None,
    key: Any = None,
    without: type[x509.ExtensionType] | None = None,
) -> bytes:
    """A client certificate that differs from a good one in what is given."""
    key = key or AUTHORITY.key
    good: list[x509.GeneralName] = [x509.UniformResourceIdentifier("wardround:site:3")]
    builder = certificates._builder(
        x509.Name(subject if subject is not None else [x509.NameAttribute(NameOID.COMMON_NAME, "A")]),
        AUTHORITY.certificate.subject,
        key.public_key(),
        NOW,
        NOW + timedelta(days=1),
    )
    extensions: list[x509.ExtensionType] = [
        x509.BasicConstraints(ca=ca, path_length=None),
        x509.ExtendedKeyUsage(purposes or [ExtendedKeyUsageOID.CLIENT_AUTH]),
        x509.SubjectAlternativeName(names or good),
    ]
    for extension in extensions:
        if without is None or not isinstance(extension, without):
            builder = builder.add_extension(extension, critical=False)
    return builder.sign(AUTHORITY.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _uri(text: str) -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(text)]


def _cn(text: str) -> x509.NameAttribute:
    return x509.NameAttribute(NameOID.COMMON_NAME, text)


def test_only_client_certificates_name_a_peer() -> None:
    assert peer_identity(_certificate()).number == 3
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    wrong = [
        _certificate(ca=True),
        _certificate(purposes=[server]),
        _certificate(purposes=[client, server]),
        *(
            _certificate(names=_uri(text))
            for text in (
                "wardround:site:0",
                "wardround:site:03",
                "wardround:site:65536",
                "wardround:site:",
                "wardround:site:3:4",
                "wardround:hub:1",
                "wardround:Site:3",
                "https://wardround:site:3",
                "wardround:site:3 ",
            )
        ),
        _certificate(names=[*_uri("wardround:site:3"), *_uri("wardround:site:4")]),
        _certificate(names=[*_uri("wardround:site:3"), x509.DNSName("a.example")]),
        _certificate(names=[x509.DNSName("wardround")]),
        _certificate(subject=[]),
        _certificate(subject=[_cn("A"), _cn("B")]),
        _certificate(subject=[_cn("A"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "B")]),
        _certificate(subject=[x509.NameAttribute(NameOID.ORGANIZATION_NAME, "B")]),
        _certificate(subject=[_cn("A/B")]),
        _certificate(key=ec.generate_private_key(ec.SECP384R1())),
        _certificate(key=ed25519.Ed25519PrivateKey.generate()),
        *(
            _certificate(without=kind)
            for kind in (x509.BasicConstraints, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)
        ),
        AUTHORITY.certificate_pem,
        AUTHORITY.issue_server(CSR_PEM, ["localhost"], NOW),
        _certificate() + _certificate(),
        CSR_PEM,
        b"",
        b"x" * 100,
        _certificate() + b" " * certificates.MAX_PEM_BYTES,
    ]
    for pem in wrong:
        with pytest.raises(VerificationError):
            peer_identity(pem)


def test_issuer_is_checked() -> None:
    pem = AUTHORITY.issue_client(CSR_PEM, "site", 1, "A", NOW)
    certificates.check_issued(pem, AUTHORITY.certificate_pem)
    # The same name with another key is the interesting impostor.
    impostor = Authority.create("Test hub", NOW)
    for authority in (impostor.certificate_pem, pem):
        with pytest.raises(VerificationError, match="authority"):
            certificates.check_issued(pem, authority)


# --- real handshakes: what gRPC's TLS library makes of these certificates ---

Credentials = tuple[bytes, bytes]


def _server_credentials(authority: Authority, hosts: tuple[str, ...], now: datetime) -> Credentials:
    key_pem, csr_pem = new_tls_key_and_csr("hub")
    return key_pem, authority.issue_server(csr_pem, hosts, now)


def _client_credentials(authority: Authority, now: datetime, number: int = 3) -> Credentials:
    key_pem, csr_pem = new_tls_key_and_csr("A")
    return key_pem, authority.issue_client(csr_pem, "site", number, "A", now)


@contextmanager
def _serving(own: Credentials, trusted: Authority) -> Iterator[int]:
    """A server that answers with the role and number of its peer; yields its port."""

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        peer = peer_identity(context.auth_context()["x509_pem_cert"][0])
        return f"{peer.role} {peer.number} {peer.name}".encode()

    handler = grpc.method_handlers_generic_handler(
        "t.T", {"Who": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1), handlers=(handler,))
    credentials = grpc.ssl_server_credentials([own], trusted.certificate_pem, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def _call(host: str, port: int, trusted: Authority, own: Credentials | None) -> bytes:
    key, certificate = own or (None, None)
    credentials = grpc.ssl_channel_credentials(trusted.certificate_pem, key, certificate)
    with grpc.secure_channel(f"{host}:{port}", credentials) as channel:
        who: Callable[..., bytes] = channel.unary_unary("/t.T/Who")
        return who(b"", timeout=5)


def test_mutual_tls_over_loopback() -> None:
    now = datetime.now(UTC)
    authority = Authority.create("Test hub", now)
    impostor = Authority.create("Test hub", now)
    own = _server_credentials(authority, ("localhost", "127.0.0.1"), now)
    site = _client_credentials(authority, now)
    with _serving(own, authority) as port:
        for host in ("127.0.0.1", "localhost"):
            assert _call(host, port, authority, site) == b"site 3 A"
        refused: list[tuple[Authority, Credentials | None]] = [
            (authority, None),
            (authority, _client_credentials(impostor, now)),
            (authority, _client_credentials(authority, now - timedelta(minutes=1))[:1] + site[1:]),
            (authority, own),
            (impostor, site),
        ]
        for trusted, credentials in refused:
            with pytest.raises(grpc.RpcError) as caught:
                _call("127.0.0.1", port, trusted, credentials)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_servers_that_clients_refuse() -> None:
    now = datetime.now(UTC)
    authority = Authority.create("Test hub", now - timedelta(days=1000))
    site = _client_credentials(authority, now)
    hosts = ("127.0.0.1", "localhost")
    wrong = [
        _server_credentials(authority, ("hub.example.org", "127.0.0.2"), now),
        _server_credentials(authority, hosts, now - timedelta(days=900)),
        # A hospital that tries to stand in for the hub with its own certificate.
        _client_credentials(authority, now, number=4),
    ]
    for own in wrong:
        with _serving(own, authority) as port, pytest.raises(grpc.RpcError) as caught:
            _call("127.0.0.1", port, authority, site)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with _serving(_server_credentials(authority, hosts, now), authority) as port:
        expired = _client_credentials(authority, now - timedelta(days=900))
        with pytest.raises(grpc.RpcError):
            _call("127.0.0.1", port, authority, expired)
        assert _call("127.0.0.1", port, authority, site) == b"site 3 A"
