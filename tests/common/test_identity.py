"""Keys, signatures, fingerprints, names and secret files: what is accepted, and everything that is not."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common import identity
from common.certificates import new_tls_key_and_csr
from common.encoding import labelled
from common.errors import RefusedError, UsageError, VerificationError

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493

Point = tuple[int, int]


def _add(a: Point, b: Point) -> Point:
    """RFC 8032 section 5.1.4, affine: slow and plain."""
    (x1, y1), (x2, y2) = a, b
    k = D * x1 * x2 * y1 * y2
    x3 = (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P
    return x3, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P


def _times(scalar: int, point: Point) -> Point:
    result: Point = (0, 1)
    while scalar:
        if scalar & 1:
            result = _add(result, point)
        point = _add(point, point)
        scalar >>= 1
    return result


def _points(first_y: int) -> list[Point]:
    """The points with that y coordinate, if any."""
    xx = (first_y * first_y - 1) * pow(D * first_y * first_y + 1, -1, P) % P
    x = pow(xx, (P + 3) // 8, P)
    if (x * x - xx) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return [(x, first_y)] if (x * x - xx) % P == 0 else []


def _small_order_keys() -> list[bytes]:
    """Encodings of the torsion subgroup, computed: random points times the order of the prime group."""
    torsion: set[Point] = set()
    y = 2
    while len(torsion) < 8:
        for point in _points(y):
            element = _times(GROUP_ORDER, point)
            torsion |= {_times(k, element) for k in range(8)}
        y += 1
    return [(y + ((x & 1) << 255)).to_bytes(32, "little") for x, y in torsion]


def test_small_order_keys_are_refused() -> None:
    keys = _small_order_keys()
    assert len(set(keys)) == 8
    for key in keys:
        with pytest.raises(VerificationError, match="not a usable"):
            identity.check_public_key(key, "key")
    # Why: under the identity element one signature fits every message.
    weak, signature = (1).to_bytes(32, "little"), (1).to_bytes(32, "little") + bytes(32)
    assert weak in keys
    Ed25519PublicKey.from_public_bytes(weak).verify(signature, b"any message")
    with pytest.raises(VerificationError, match="not a usable"):
        identity.verify(weak, signature, b"any message", "note")


@pytest.mark.parametrize("offset", range(19))
@pytest.mark.parametrize("sign", [0, 1 << 255])
def test_keys_with_a_second_encoding_are_refused(offset: int, sign: int) -> None:
    with pytest.raises(VerificationError):
        identity.check_public_key((P + offset + sign).to_bytes(32, "little"), "key")


def test_known_signature() -> None:
    """RFC 8032 section 7.1, test 2."""
    private = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert identity.public_key(private) == public
    assert identity.sign(private, b"\x72") == signature
    identity.verify(public, signature, b"\x72", "vector")


def test_forged_signatures_are_refused() -> None:
    key, other = identity.new_signing_key(), identity.new_signing_key()
    data = labelled("sig/note", b"content")
    signature = identity.sign(key, data)
    public = identity.public_key(key)
    identity.verify(public, signature, data, "note")
    flipped = [
        signature[:place] + bytes([signature[place] ^ 1]) + signature[place + 1 :] for place in range(64)
    ]
    wrong = [
        (identity.public_key(other), signature, data),
        (public, signature, labelled("sig/other", b"content")),
        (public, signature, data + b"\0"),
        (public, signature[:-1], data),
        (public, signature + b"\0", data),
        (public, b"", data),
        (public[:-1], signature, data),
        *((public, changed, data) for changed in flipped),
    ]
    for public_used, signature_used, data_used in wrong:
        with pytest.raises(VerificationError, match="note"):
            identity.verify(public_used, signature_used, data_used, "note")


def test_key_text_is_canonical() -> None:
    public = identity.public_key(identity.new_signing_key())
    text = identity.key_text(public)
    assert identity.key_bytes(text) == public
    assert len(text) == len("ed25519:") + 43
    last = text[-1]
    # 43 characters carry 258 bits: two spare bits give every key three other spellings.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spare = [text[:-1] + alphabet[alphabet.index(last) // 4 * 4 + bits] for bits in range(4)]
    wrong = [t for t in spare if t != text]
    assert len(wrong) == 3
    for bad in (
        *wrong,
        text[8:],
        text.upper(),
        text + "=",
        text + "\n",
        text + "AAAA",
        text[:-1],
        "ed25519:",
        "",
    ):
        with pytest.raises(VerificationError):
            identity.key_bytes(bad)
    with pytest.raises(VerificationError):
        identity.key_bytes("ed25519:" + "é" * 43)


@given(st.binary(max_size=40))
def test_base64url_round_trip(data: bytes) -> None:
    assert identity.base64url_bytes(identity.base64url(data), "data") == data


@settings(max_examples=200)
@given(st.text("AB-_+/= \n*", max_size=8))
def test_base64url_has_one_text(text: str) -> None:
    try:
        data = identity.base64url_bytes(text, "data")
    except VerificationError:
        return
    assert identity.base64url(data) == text


def test_fingerprints() -> None:
    # SHA-256 of "abc", FIPS 180-4: ba7816bf 8f01cfea 414140de 5dae2223...
    assert identity.fingerprint(b"abc") == "ba78-16bf-8f01-cfea-4141-40de-5dae-2223"
    parts = ("Mercy", b"p" * 32, b"l" * 32)
    base = identity.party_fingerprint(*parts)
    assert base == identity.party_fingerprint(*parts)
    others = {
        identity.party_fingerprint("Merci", b"p" * 32, b"l" * 32),
        identity.party_fingerprint("Mercy", b"l" * 32, b"p" * 32),
        identity.party_fingerprint("Mercy", b"p" * 32, b"p" * 32),
    }
    assert len(others) == 3
    assert base not in others


@pytest.mark.parametrize("name", ["A", "St. Mary's", "UZ-Gent_2", "a b c", "x" * 64])
def test_names_accepted(name: str) -> None:
    assert identity.check_name(name, "name") == name


@pytest.mark.parametrize(
    "name", ["", " A", "A ", "A  B", "A\tB", "A\n", "é", "A/B", "x" * 65, "A\u200bB", "A\u00a0B", "a,b", '"']
)
def test_names_refused(name: str) -> None:
    with pytest.raises(UsageError, match="hospital"):
        identity.check_name(name, "name of the hospital")


def test_secret_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    before = os.umask(0)
    try:
        identity.write_secret(path, b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert identity.read_secret(path) == b"content"


def test_secrets_are_never_overwritten(tmp_path: Path) -> None:
    path, target, link = tmp_path / "secret", tmp_path / "target", tmp_path / "link"
    identity.write_secret(path, b"first")
    with pytest.raises(RefusedError, match="exists already"):
        identity.write_secret(path, b"second")
    assert identity.read_secret(path) == b"first"
    link.symlink_to(target)
    with pytest.raises(RefusedError, match="exists already"):
        identity.write_secret(link, b"second")
    assert not target.exists()


def test_an_unfinished_secret_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            identity.write_secret(tmp_path / "secret", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, identity.MAX_SECRET_BYTES + 1])
def test_secret_sizes_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(RefusedError, match="bytes"):
        identity.write_secret(tmp_path / "made", bytes(size))
    path = tmp_path / "found"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(RefusedError, match="empty or longer"):
        identity.read_secret(path)


def test_exposed_secrets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    identity.write_secret(path, b"content")
    for mode in (0o600, 0o400, 0o700):
        path.chmod(mode)
        assert identity.read_secret(path) == b"content"
    for bits in range(1, 0o100):
        path.chmod(0o600 | bits)
        with pytest.raises(RefusedError, match="open to group or world") as caught:
            identity.read_secret(path)
        assert str(path) in caught.value.problem
        assert "chmod 600" in caught.value.remedy
    path.chmod(0o600)
    with monkeypatch.context() as patch:
        stranger = os.geteuid() + 1
        patch.setattr(os, "geteuid", lambda: stranger)
        with pytest.raises(RefusedError, match="another account"):
            identity.read_secret(path)
    assert identity.read_secret(path) == b"content"


def test_only_regular_files_are_secrets(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    for path in (pipe, folder):
        with pytest.raises(RefusedError, match="not a regular file"):
            identity.read_secret(path)
    with pytest.raises(RefusedError, match="cannot be read"):
        identity.read_secret(tmp_path / "missing")


def test_systemd_credentials_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    inside, outside = folder / "ledger.pem", tmp_path / "ledger.pem"
    for path in (inside, outside):
        path.write_bytes(b"content")
        path.chmod(0o440)
        with pytest.raises(RefusedError):
            identity.read_secret(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert identity.read_secret(inside) == b"content"
    with pytest.raises(RefusedError):
        identity.read_secret(outside)
    with pytest.raises(RefusedError):
        identity.read_secret(folder / ".." / "ledger.pem")


def test_signing_keys_in_files(tmp_path: Path) -> None:
    key = identity.new_signing_key()
    identity.save_signing_key(tmp_path / "key.pem", key)
    loaded = identity.load_signing_key(tmp_path / "key.pem")
    assert identity.public_key(loaded) == identity.public_key(key)
    tls_key, _ = new_tls_key_and_csr("A")
    identity.write_secret(tmp_path / "tls.pem", tls_key)
    identity.write_secret(tmp_path / "noise.pem", b"not a key")
    for name in ("tls.pem", "noise.pem"):
        with pytest.raises(VerificationError, match=name):
            identity.load_signing_key(tmp_path / name)
