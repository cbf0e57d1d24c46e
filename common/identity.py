"""Names, Ed25519 keys and signatures, fingerprints for people, and secrets kept in files.

Source: RFC 8032 (Ed25519), RFC 5208 (PKCS #8), PROTOCOL "Bytes", DESIGN "Three people, one program".
Rules: a key is 32 raw bytes inside the program and ``ed25519:`` text in documents; a public key outside
the prime-order group is refused before it verifies anything; signed bytes carry a label (common.encoding),
so one key's signature never means two things; a secret is a file of mode 0600 owned by whoever runs.
"""

import base64
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from common.encoding import digest
from common.errors import RefusedError, UsageError, VerificationError

KEY_SIZE_BYTES: Final = 32
SIGNATURE_SIZE_BYTES: Final = 64
MAX_SECRET_BYTES: Final = 1 << 16
MAX_ID: Final = 65535

_KEY_PREFIX: Final = "ed25519:"
_NAME: Final = re.compile(r"[A-Za-z0-9._'-]+(?: [A-Za-z0-9._'-]+)*")
_FIELD_PRIME: Final = 2**255 - 19
_ORDER_8_Y: Final = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_SMALL_ORDER_Y: Final = frozenset({0, 1, _FIELD_PRIME - 1, _ORDER_8_Y, _FIELD_PRIME - _ORDER_8_Y})
"""The y coordinates of the eight points whose order divides the cofactor 8."""


def name_problem(name: str, what: str) -> str:
    """Why ``name`` is no party's name, naming ``what``; empty when it is 1-64 of letters, digits, single
    spaces and . ' _ -

    Two names that people would read alike ("A  B" and "A B", or with a space at an end) cannot both exist.
    """
    if len(name) <= 64 and _NAME.fullmatch(name):
        return ""
    return f"the {what} is not a name: 1-64 letters, digits, single spaces and . ' _ - are allowed"


def check_name(name: str, what: str) -> str:
    """``name`` itself when it is a name of a party. Raises UsageError naming ``what``."""
    if problem := name_problem(name, what):
        raise UsageError("identity.name", problem, remedy="Choose a name of those characters.")
    return name


def new_signing_key() -> Ed25519PrivateKey:
    """A fresh Ed25519 key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def public_key(private: Ed25519PrivateKey) -> bytes:
    """The public half, 32 raw bytes."""
    return private.public_key().public_bytes_raw()


def check_public_key(public: bytes, what: str) -> bytes:
    """``public`` itself when it can be somebody's key: 32 bytes, canonical, not of small order.

    Guarantee: small_order_keys_are_refused - under such a key one signature would fit many messages.
    Raises: VerificationError naming ``what``.
    """
    if len(public) != KEY_SIZE_BYTES:
        raise VerificationError("identity.key-size", f"the {what} must have {KEY_SIZE_BYTES} bytes")
    y = int.from_bytes(public, "little") & ((1 << 255) - 1)
    if y >= _FIELD_PRIME or y in _SMALL_ORDER_Y:
        raise VerificationError("identity.weak-key", f"the {what} is not a usable Ed25519 key")
    return public


def key_text(public: bytes) -> str:
    """``ed25519:`` and 43 characters of unpadded base64url, as documents state a public key."""
    return _KEY_PREFIX + base64url(check_public_key(public, "key"))


def key_bytes(text: str, what: str = "key") -> bytes:
    """The 32 raw bytes of ``key_text``. Raises VerificationError naming ``what``.

    Guarantee: key_text_is_canonical - only the text that key_text makes is accepted.
    """
    if not text.startswith(_KEY_PREFIX):
        raise VerificationError("identity.key-text", f"the {what} does not begin with {_KEY_PREFIX!r}")
    return check_public_key(base64url_bytes(text[len(_KEY_PREFIX) :], what), what)


def base64url(data: bytes) -> str:
    """Unpadded base64url (RFC 4648 section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def base64url_bytes(text: str, what: str) -> bytes:
    """The bytes of ``base64url``, canonical only. Raises VerificationError naming ``what``."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as error:
        raise VerificationError("identity.base64", f"the {what} is not base64url") from error
    # The decoder skips foreign characters and ignores spare bits: only a round trip is exact.
    if base64url(data) != text:
        raise VerificationError("identity.base64", f"the {what} is not in canonical base64url")
    return data


def fingerprint(raw: bytes) -> str:
    """The first 16 bytes of SHA-256 as eight groups of four hex digits, for comparing by voice or eye.

    128 bits: nobody finds a second key for a given fingerprint; an owner of two keys who makes them collide
    (2^64 work) misleads nobody about another hospital.
    """
    text = hashlib.sha256(raw).hexdigest()[:32]
    return "-".join(text[start : start + 4] for start in range(0, 32, 4))


def party_fingerprint(name: str, protocol_key: bytes, ledger_key: bytes) -> str:
    """One fingerprint for a hospital: over its name and both of its public keys, in this order."""
    return fingerprint(digest("party", name.encode("ascii"), protocol_key, ledger_key))


def sign(private: Ed25519PrivateKey, data: bytes) -> bytes:
    """An Ed25519 signature, 64 bytes. Assumes: ``data`` begins with a label of its own (encoding)."""
    return private.sign(data)


def verify(public: bytes, signature: bytes, data: bytes, what: str) -> None:
    """Check an Ed25519 signature. Raises VerificationError naming ``what``.

    Guarantee: forged_signatures_are_refused - another key, message, label or signature does not verify.
    """
    check_public_key(public, f"key of the {what}")
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        problem = f"the signature of the {what} does not verify"
        remedy = "Compare the key's fingerprint with its owner out of band; do not use this document."
        raise VerificationError("identity.signature", problem, remedy=remedy) from error


def write_secret(path: Path, data: bytes) -> None:
    """Create a file of mode 0600 holding ``data``, durable when this returns.

    Guarantee: secrets_are_never_overwritten - an existing path, also a link, is refused and left alone.
    Raises: RefusedError when the path exists or ``data`` is empty or longer than read_secret reads.
    """
    if not 0 < len(data) <= MAX_SECRET_BYTES:
        raise RefusedError("identity.secret-size", f"a secret has 1 to {MAX_SECRET_BYTES} bytes")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError as error:
        problem = f"{path} exists already; a secret is never overwritten"
        remedy = "Keep it, or move it away first if it is really no longer needed."
        raise RefusedError("identity.secret-exists", problem, remedy=remedy) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask and default ACLs say
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_secret(path: Path) -> bytes:
    """Read a secret that nobody else can read or replace. Raises RefusedError naming the path and the rule.

    Guarantee: exposed_secrets_are_refused - a file of another owner, with any permission for group or
    world, or that is not a regular file, is not used.
    """
    try:
        # Without O_NONBLOCK a pipe put in place of the file would block the agent for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        problem = f"the secret {path} cannot be read: {error.strerror}"
        remedy = "Check that the file exists and belongs to the account that runs wardround."
        raise RefusedError("identity.secret-unreadable", problem, remedy=remedy) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError("identity.secret-kind", f"the secret {path} is not a regular file")
        # systemd keeps a credential in memory, read-only, for this service alone, and marks it with an access
        # list that looks like a group's permission: it is taken as it is.
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if not credentials or path.parent != Path(credentials):
            _check_private(path, status)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    finally:
        os.close(descriptor)
    if not 0 < len(data) <= MAX_SECRET_BYTES:
        problem = f"the secret {path} is empty or longer than {MAX_SECRET_BYTES} bytes"
        remedy = "Restore it from the backup of the keys, or make a new identity."
        raise RefusedError("identity.secret-size", problem, remedy=remedy)
    return data


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        problem = f"the secret {path} belongs to another account"
        remedy = "Run wardround as the owner of its files, or change the file's owner."
        raise RefusedError("identity.secret-owner", problem, remedy=remedy)
    if status.st_mode & 0o077:
        problem = f"the secret {path} is open to group or world (mode {stat.S_IMODE(status.st_mode):04o})"
        remedy = f"Run 'chmod 600 {path}', and consider whether someone has read it."
        raise RefusedError("identity.secret-mode", problem, remedy=remedy)


def sync_folder(folder: Path) -> None:
    """Write the folder itself to disk: until then a new name in it is not durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_signing_key(path: Path, private: Ed25519PrivateKey) -> None:
    """Write an Ed25519 key as PKCS #8 PEM by write_secret. Raises RefusedError when the path exists."""
    write_secret(path, private_pem(private))


def private_pem(key: PrivateKeyTypes) -> bytes:
    """PKCS #8 PEM, unencrypted: goes only into write_secret and the TLS library."""
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, plain)


def read_private_pem(pem: bytes) -> PrivateKeyTypes:
    """The key in an unencrypted PKCS #8 PEM. Raises ValueError, whatever is wrong with it."""
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (TypeError, UnsupportedAlgorithm, InternalError) as error:
        raise ValueError("not a private key that can be read") from error


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read what save_signing_key wrote. Raises RefusedError, or VerificationError when it is no such key."""
    try:
        private = read_private_pem(read_secret(path))
    except ValueError as error:
        raise VerificationError("identity.key-file", f"{path} holds no readable private key") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise VerificationError("identity.key-kind", f"{path} holds a private key that is not Ed25519")
    return private
