"""Shared fixtures: an authority with certificates, made once a session."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from common.certificates import Authority, Role, new_tls_key_and_csr


@dataclass(frozen=True)
class Credentials:
    """One end of a connection."""

    key_pem: bytes
    certificate_pem: bytes
    authority_pem: bytes


class Pki:
    """An authority that certifies whoever a test needs."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.authority = Authority.create("test hub", self.now)

    def server(self) -> Credentials:
        key, csr = new_tls_key_and_csr("hub")
        certificate = self.authority.issue_server(csr, ["localhost", "127.0.0.1"], self.now)
        return Credentials(key, certificate, self.authority.certificate_pem)

    def client(self, number: int, name: str = "St. Mary", role: Role = "site") -> Credentials:
        key, csr = new_tls_key_and_csr(name)
        certificate = self.authority.issue_client(csr, role, number, name, self.now)
        return Credentials(key, certificate, self.authority.certificate_pem)


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki()
