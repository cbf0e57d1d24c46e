"""The coordinator's end of the Studies service: a blocking client over mutual TLS.

Rules: the hub's roster is verified under the key in ``coordinator.toml``; errors of the hub come back as
the same error types with the same exit codes.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

import grpc

from common import link_pb2, link_pb2_grpc
from common.errors import FailureError, UnreachableError, UsageError, VerificationError, WardroundError
from common.identity import key_bytes
from common.roster import Roster, SignedRoster
from common.study import Manifest, SignedManifest
from server.home import CoordinatorHome

TIMEOUT_S: Final = 30.0
SILENCE_S: Final = 12.0
BY_EXIT_CODE: Final = {kind.exit_code: kind for kind in WardroundError.__subclasses__()}
SILENT: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


def _raised(error: grpc.RpcError, address: str) -> WardroundError:
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        try:
            sent = json.loads(details)
            kind: type[WardroundError] = BY_EXIT_CODE.get(sent["exit"], FailureError)
            return kind(str(sent["code"]), str(sent["problem"]), remedy=str(sent["remedy"]))
        except (ValueError, KeyError, TypeError):
            return FailureError("studies.error", "the hub answered with an error that cannot be read")
    if code.name not in SILENT:
        remedy = "See the hub's log; trying again does not help."
        return FailureError("studies.error", f"the hub at {address} failed ({code.name})", remedy=remedy)
    problem = f"the hub at {address} cannot be reached ({code.name})"
    remedy = "Check the address and that 'wardround hub run' is up, then try again."
    return UnreachableError("studies.unreachable", problem, remedy=remedy)


def named(prefix: str, digests: Sequence[str]) -> str:
    """The one digest that starts with ``prefix`` (at least 6 hex digits). Raises UsageError."""
    found = [digest for digest in digests if len(prefix) >= 6 and digest.startswith(prefix)]
    if len(found) != 1:
        remedy = "Give the digest or its first 6 or more digits, as 'wardround study list' shows it."
        raise UsageError("study.digest", f"{prefix!r} names {len(found)} studies", remedy=remedy)
    return found[0]


class CoordinatorDesk:
    """A connection to the hub as a coordinator. Use as a context manager."""

    def __init__(self, home: CoordinatorHome) -> None:
        self._settings = home.load_settings()
        credentials = grpc.ssl_channel_credentials(*home.load_credentials())
        self._channel = grpc.secure_channel(self._settings.hub, credentials)
        self._stub: Any = link_pb2_grpc.StudiesStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    @property
    def hub_key(self) -> bytes:
        """The hub's raw verify key, 32 bytes."""
        return key_bytes(self._settings.hub_key)

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _raised(error, self._settings.hub) from error

    def _stream(self, method: str, request: Any) -> Iterator[Any]:
        """The messages of a stream. A hub that is stopped but not gone says nothing: that ends it too."""
        call = getattr(self._stub, method)(request)
        try:
            while True:
                silence = threading.Timer(SILENCE_S, call.cancel)
                silence.start()
                try:
                    message = next(call, None)
                finally:
                    silence.cancel()
                if message is None:
                    return
                yield message
        except grpc.RpcError as error:
            raise _raised(error, self._settings.hub) from error

    def roster(self) -> tuple[SignedRoster, Roster]:
        """The hub's current roster, verified. Raises VerificationError."""
        document = self._call("Roster", link_pb2.Empty())
        signed = SignedRoster(document.data, document.signature)
        return signed, signed.verify(self.hub_key)

    def submit(self, manifest: bytes, signature: bytes) -> link_pb2.StudyInfo:
        """Hand in a signed manifest; the same one twice is the same study."""
        info: link_pb2.StudyInfo = self._call("Submit", link_pb2.Document(data=manifest, signature=signature))
        return info

    def studies(self) -> list[link_pb2.StudyInfo]:
        """All studies of the hub."""
        return list(self._call("List", link_pb2.Empty()).studies)

    def resolve(self, prefix: str) -> str:
        """The full digest that starts with ``prefix`` (at least 6 hex digits). Raises UsageError."""
        return named(prefix, [info.digest for info in self.studies()])

    def show(self, digest: str) -> tuple[Manifest, link_pb2.StudyDetail]:
        """A study's manifest, verified, and what the hub says of it. Raises VerificationError."""
        detail: link_pb2.StudyDetail = self._call("Show", link_pb2.StudyReference(digest=digest))
        manifest = SignedManifest(detail.manifest.data, detail.manifest.signature).verify()
        if manifest.digest.hex() != digest:
            raise VerificationError("studies.digest", "the hub showed another study than was asked for")
        return manifest, detail

    def abort(self, digest: str, reason: str) -> link_pb2.StudyInfo:
        """End a study for good."""
        info: link_pb2.StudyInfo = self._call("Abort", link_pb2.AbortRequest(digest=digest, reason=reason))
        return info

    def watch(self, digest: str) -> Iterator[link_pb2.StudyEvent]:
        """Each change until the study has ended."""
        last = None
        for event in self._stream("Watch", link_pb2.StudyReference(digest=digest)):
            if event != last:
                yield event
            last = event

    def export(self, digest: str, round_number: int = 0) -> bytes:
        """The safetensors file after a completed round, 0 for the last."""
        request = link_pb2.ExportRequest(digest=digest, round=round_number)
        return b"".join(document.data for document in self._stream("Export", request))
