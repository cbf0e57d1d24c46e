"""Keys, signatures, fingerprints and secret files.

Source: RFC 8032 (Ed25519). Rules: each key has one use (protocol, ledger, coordinator, hub); a secret is a
file of mode 0600 owned by this user, never a flag, a setting or an environment variable.
"""

import base64
import binascii
import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from common.errors import RefusedError, VerificationError

KEY_PREFIX: Final = "ed25519:"
KEY_SIZE_BYTES: Final = 32
MAX_SECRET_BYTES: Final = 1 << 16


def new_signing_key() -> Ed25519PrivateKey:
    """A fresh Ed25519 key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The raw public key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def key_text(public: bytes) -> str:
    """A raw public key as people and files write it: ``ed25519:`` and base64url without padding."""
    if len(public) != KEY_SIZE_BYTES:
        raise VerificationError("identity.key", "an Ed25519 public key has 32 bytes")
    return KEY_PREFIX + base64.urlsafe_b64encode(public).decode().rstrip("=")


def key_bytes(text: str) -> bytes:
    """The raw key behind key_text.

    Guarantee: key_text_is_canonical - only what key_text writes is read.
    Raises: VerificationError.
    """
    try:
        raw = base64.b64decode(text.removeprefix(KEY_PREFIX) + "=", altchars=b"-_", validate=True)
        Ed25519PublicKey.from_public_bytes(raw)
    except (binascii.Error, ValueError) as error:
        raise VerificationError("identity.key", "not an ed25519: key", remedy="Copy the key again.") from error
    if key_text(raw) != text:
        raise VerificationError("identity.key", "not an ed25519: key", remedy="Copy the key again.")
    return raw


def fingerprint(public: bytes) -> str:
    """What people compare: the first 16 bytes of SHA-256 in eight groups of four hex digits."""
    text = hashlib.sha256(public).hexdigest()[:32]
    return " ".join(text[i : i + 4] for i in range(0, 32, 4))


def verify(public: bytes, signature: bytes, data: bytes, what: str) -> None:
    """Check an Ed25519 signature. Raises VerificationError naming ``what``."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        raise VerificationError(
            "identity.signature", f"the signature on {what} does not verify", remedy="Ask its sender for it again."
        ) from error


def write_secret(path: Path, data: bytes) -> None:
    """Create a secret file of mode 0600, durable. Raises RefusedError when it exists already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise RefusedError(
            "identity.secret-exists", f"{path} exists already", remedy="A key is never overwritten; move it away."
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_secret(path: Path) -> bytes:
    """Read a secret file.

    Guarantee: open_secrets_are_refused - a file that others may read, of another owner, or a link.
    Raises: RefusedError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise RefusedError(
            "identity.secret-missing", f"{path} cannot be read", remedy="Restore it, or make a new identity."
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid != os.geteuid():
            raise RefusedError(
                "identity.secret-mode", f"{path} is open to other users", remedy=f"chmod 600 {path}; chown it to you."
            )
        return file.read(MAX_SECRET_BYTES)


def save_signing_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a private key as PKCS8 PEM in a new secret file."""
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises RefusedError or VerificationError naming the file."""
    try:
        key = load_pem_private_key(read_secret(path), password=None)
    except ValueError as error:
        raise VerificationError("identity.key-file", f"{path} holds no private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise VerificationError("identity.key-file", f"{path} holds another kind of key than Ed25519")
    return key
