"""Two hospitals come to share a key: hybrid post-quantum setup keys, one sealed seed a pair.

Source: PROTOCOL.md S1-S3; RFC 9180 (HPKE, base mode, empty aad) with the KEM MLKEM768-X25519, HKDF-SHA256
and AES-256-GCM; FIPS 203. Rules: who of a pair sends follows from the ids; the seed is sealed to
the peer's announced keys under info that names manifest, directory and pair.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.encoding import digest, u16
from common.errors import VerificationError
from common.secagg.records import KEY_BYTES, SEALED_SEED_BYTES

MLKEM_SEED_BYTES: Final = 64
SEED_BYTES: Final = 32
_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True)
class SetupKeys:
    """The private setup keys of one hospital for one manifest, as seeds (64 and 32 bytes). Never printed."""

    mlkem_seed: bytes = field(repr=False)
    x25519_key: bytes = field(repr=False)

    @classmethod
    def new(cls, entropy: Callable[[int], bytes]) -> "SetupKeys":
        """Fresh keys from ``entropy``."""
        return cls(fresh(entropy, MLKEM_SEED_BYTES), fresh(entropy, KEY_BYTES))

    def private(self) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
        """The private keys of both halves."""
        x25519 = X25519PrivateKey.from_private_bytes(self.x25519_key)
        return MLKEM768PrivateKey.from_seed_bytes(self.mlkem_seed), x25519

    def public(self) -> tuple[bytes, bytes]:
        """The raw public keys: ML-KEM-768 (1184 bytes) and X25519 (32 bytes)."""
        mlkem, x25519 = self.private()
        return mlkem.public_key().public_bytes_raw(), x25519.public_key().public_bytes_raw()

    def __reduce__(self) -> str:
        raise TypeError("setup keys are not pickled")


def fresh(entropy: Callable[[int], bytes], size_bytes: int) -> bytes:
    """``size_bytes`` from the source. Raises VerificationError when it gives another length or zeros."""
    drawn = entropy(size_bytes)
    if type(drawn) is not bytes or len(drawn) != size_bytes or not any(drawn):
        raise VerificationError("secagg.entropy", "the source of randomness is broken")
    return drawn


def sender_of(i: int, j: int) -> int:
    """Which of the pair i < j seals the seed: the lower id where j - i is odd, else the higher."""
    return i if (j - i) % 2 else j


def pair_info(man: bytes, dirh: bytes, i: int, j: int) -> bytes:
    """The HPKE info of the pair i < j."""
    return digest("pair", man, dirh, u16(i), u16(j))


def seal_seed(seed: bytes, mlkem: bytes, x25519: bytes, info: bytes) -> bytes:
    """Seal a seed (32 bytes) to announced keys: enc followed by the sealed seed, 1168 bytes.

    The encapsulation's randomness is the library's own, from the operating system.
    Raises: VerificationError when the announced keys are no public keys.
    """
    try:
        halves = MLKEM768PublicKey.from_public_bytes(mlkem), X25519PublicKey.from_public_bytes(x25519)
        ct = _SUITE.encrypt(seed, hpke.MLKEM768X25519PublicKey(*halves), info=info)
    except ValueError:
        raise VerificationError("secagg.pairing.key", "an announced setup key is not a public key") from None
    if len(ct) != SEALED_SEED_BYTES:
        raise VerificationError("secagg.pairing.length", "the cryptographic library has another HPKE format")
    return ct


def unseal_seed(ct: bytes, keys: SetupKeys, info: bytes) -> bytes:
    """The sealed seed, 32 bytes. Raises VerificationError when it was sealed to other keys or info."""
    key = hpke.MLKEM768X25519PrivateKey(*keys.private())
    try:
        seed = _SUITE.decrypt(ct, key, info=info)
    except (InvalidTag, ValueError):
        seed = b""
    if len(seed) != SEED_BYTES:
        raise VerificationError("secagg.pairing.seal", "a sealed seed does not open")
    return seed
