"""Change bytes without losing their outer form: parts, JSON, PEM, DER, zip and text inside one another.

Rules: reproducible from the seed; what is changed is written anew with right lengths, so that a mutation
gets past the first check; now and then only bytes are changed, so that the first checks are met too.
"""

import base64
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import rfc8785

INTEGERS = (0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 127, 128, 255, 256, 65535, 65536, 1 << 31, (1 << 32) - 1)
LARGE = (1 << 32, (1 << 53) - 1, 1 << 53, 1 << 63, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, *INTEGERS, (1 << 53) - 1, 0.5, 1.5, 1e-9, 1e300, -0.5),
    *(
        "",
        "a",
        "0",
        "01",
        "1.0",
        "NaN",
        " ",
        "\n",
        "é",
        "\u202e",
        "../..",
        "ed25519:",
        "dp",
        "2099-12-31T23:59Z",
    ),
    *([], {}, [[]], {"": None}),
)
PREFIX = b"wardround/v1/"
PEM_BEGIN = b"-----BEGIN "
DEPTH = 6

Words = Sequence[bytes]
"""Other inputs, from which parts are taken."""


def mutated(data: bytes, rng: random.Random, words: Words = (), depth: int = DEPTH) -> bytes:
    """``data`` with one to three changes somewhere inside."""
    for _ in range(1 + (rng.random() < 0.3) + (rng.random() < 0.1)):
        data = _once(data, rng, words, depth)
    return data


def _once(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    change = _form(data) if depth and rng.random() < 0.85 else None
    return change(data, rng, words, depth - 1) if change else _bytes(data, rng, words)


def _form(data: bytes) -> "Callable[[bytes, random.Random, Words, int], bytes] | None":
    if data[8:9] == b"{" and 8 + int.from_bytes(data[:8], "little") <= len(data):
        return _headed
    if split(data) is not None:
        return _parts
    if data[:1] in (b"{", b"[") and _json_value(data) is not None:
        return _json
    if data.startswith(PEM_BEGIN):
        return _pem
    if data.startswith(b"PK\x03\x04"):
        return _zip
    if data[:1] == b"\x30" and len(data) > 8 and _der_items(data) is not None:
        return _der
    if b"\n" in data and 32 <= data[0] < 127:
        return _lines
    return None


# -- bytes -------------------------------------------------------------------------------------------------


def _bytes(data: bytes, rng: random.Random, words: Words) -> bytes:
    at = rng.randrange(len(data) + 1)
    size = min(len(data) - at, rng.choice((1, 1, 2, 4, 8, 32)))
    number = rng.choice(INTEGERS + LARGE) & ((1 << 8 * max(size, 1)) - 1)
    match rng.randrange(9):
        case 0 if size:
            flipped = data[at] ^ (1 << rng.randrange(8))
            return data[:at] + bytes([flipped]) + data[at + 1 :]
        case 1:
            return data[:at] + number.to_bytes(max(size, 1), "little") + data[at + max(size, 1) :]
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 32))) + data[at:]
        case 4:
            return data[:at]
        case 5:
            return data[:at] + data[at : at + size] + data[at:]
        case 6 if words:
            other = rng.choice(words)
            return data[:at] + other[rng.randrange(len(other) + 1) :]
        case 7:
            return bytes(len(data)) if rng.random() < 0.5 else b"\xff" * len(data)
        case _:
            return data[:at] + rng.randbytes(size) + data[at + size :]


# -- length-prefixed parts -------------------------------------------------------------------------------------


def split(data: bytes) -> list[bytes] | None:
    """The parts of a labelled encoding, whatever its label; None when it is none."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        if at + 8 > len(data) or at + 8 + size > len(data):
            return None
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return parts if parts and (parts[0].startswith(PREFIX) or len(parts) > 1) else None


def join(parts: Sequence[bytes]) -> bytes:
    """Parts, each behind its length."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _parts(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    return join(_listed(split(data) or [], rng, words, lambda part: _once(part, rng, words, depth)))


def _listed(items: list[Any], rng: random.Random, words: Words, change: Callable[[Any], Any]) -> list[Any]:
    """One change of a list: mostly inside an item, else among them."""
    if not items:
        return [rng.choice(words)] if words else items
    at, other = rng.randrange(len(items)), rng.randrange(len(items))
    match rng.randrange(12):
        case 0:
            return items[:at] + items[at + 1 :]
        case 1:
            return [*items[:at], items[other], *items[at:]]
        case 2:
            items[at], items[other] = items[other], items[at]
        case 3:
            items[at] = items[other]
        case 4 if words and isinstance(items[0], bytes):
            found = split(rng.choice(words)) or [b""]
            items[at] = rng.choice(found)
        case 5 if words and isinstance(items[0], bytes):
            found = split(rng.choice(words)) or [b""]
            begin = rng.randrange(len(found))
            return items[:at] + found[begin : begin + rng.randrange(1, 5)] + items[at:]
        case _:
            items[at] = change(items[at])
    return items


def _headed(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    """JSON behind its length, then the rest: safetensors."""
    stop = 8 + int.from_bytes(data[:8], "little")
    header, rest = data[8:stop], data[stop:]
    if rng.random() < 0.5:
        return data[:stop] + _bytes(rest, rng, words)
    header = _once(header.rstrip(b" "), rng, words, depth)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + rest


# -- JSON, and what stands in its strings --------------------------------------------------------------------


def _json_value(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _json(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    value = changed(_json_value(data), rng, words, depth)
    try:
        return rfc8785.dumps(value)
    except (ValueError, RecursionError, rfc8785.CanonicalizationError):
        return json.dumps(value).encode()


def changed(value: Any, rng: random.Random, words: Words, depth: int) -> Any:
    """A JSON value with one change somewhere inside."""
    if rng.random() < 0.06:
        return rng.choice(VALUES)
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        match rng.randrange(10):
            case 0:
                return {n: v for n, v in value.items() if n != name}
            case 1:
                return {
                    **value,
                    rng.choice(("", "a", "schema", name + "x", name.upper())): rng.choice(VALUES),
                }
            case 2:
                other = rng.choice(sorted(value))
                return {**value, name: value[other], other: value[name]}
            case 3:
                return {
                    (rng.choice(("01", "+1", "1", "-1", n)) if n == name else n): v for n, v in value.items()
                }
            case _:
                return {**value, name: changed(value[name], rng, words, depth)}
    if isinstance(value, list):
        return _listed(list(value), rng, (), lambda item: changed(item, rng, words, depth)) or [
            rng.choice(VALUES)
        ]
    if isinstance(value, str):
        return _text(value, rng, words, depth)
    if type(value) is int:
        return rng.choice((value + 1, value - 1, -value, float(value), value * 2, str(value), *INTEGERS))
    if isinstance(value, float):
        return rng.choice(
            (value * 2, -value, value / 3, int(value) if abs(value) < 1e9 else 0, 0.0, 1e15, 1e16)
        )
    return rng.choice(VALUES)


def _text(value: str, rng: random.Random, words: Words, depth: int) -> Any:
    if depth and rng.random() < 0.7:
        for read, write in _INSIDE:
            try:
                inner = read(value)
            except ValueError:
                continue
            return write(_once(inner, rng, words, depth - 1))
    at = rng.randrange(len(value) + 1)
    letter = rng.choice('0aZ-_=+/. \té\u202e\x00{["')
    return rng.choice((value[:at] + letter + value[at:], value[:at] + letter + value[at + 1 :], value[:at], value * 2,
                       value.upper(), value + " "))  # fmt: skip


def _read_base64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if len(text) < 16:
        raise ValueError("too short to tell")
    return data


def _read_base64url(text: str) -> bytes:
    if len(text) < 43 or not set(text) <= _URL_ALPHABET:
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _read_pem(text: str) -> bytes:
    if not text.startswith(PEM_BEGIN.decode()):
        raise ValueError("not PEM")
    return text.encode("ascii")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


_URL_ALPHABET = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_INSIDE: tuple[tuple[Callable[[str], bytes], Callable[[bytes], str]], ...] = (
    (_read_pem, lambda data: data.decode("latin-1")),
    (bytes.fromhex, bytes.hex),
    (_read_base64url, _base64url),
    (_read_base64, lambda data: base64.b64encode(data).decode()),
)


# -- PEM and DER -------------------------------------------------------------------------------------------


def _pem(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    lines = data.split(b"\n")
    try:
        der = base64.b64decode(b"".join(lines[1:-2]))
    except ValueError:
        return _bytes(data, rng, words)
    text = base64.b64encode(_once(der, rng, (), depth))
    body = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([lines[0], *body, *lines[-2:]])


def _der_items(data: bytes) -> list[tuple[int, bytes]] | None:
    items, at = [], 0
    while at < len(data):
        if at + 2 > len(data):
            return None
        tag, size, at = data[at], data[at + 1], at + 2
        if size & 0x80:
            more = size & 0x7F
            size, at = int.from_bytes(data[at : at + more], "big"), at + more
        if at + size > len(data):
            return None
        items.append((tag, data[at : at + size]))
        at += size
    return items


def _der(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    def change(item: tuple[int, bytes]) -> tuple[int, bytes]:
        tag, content = item
        if rng.random() < 0.08:
            return rng.choice(
                (0x02, 0x03, 0x04, 0x05, 0x06, 0x0C, 0x13, 0x30, 0x31, 0x80, 0xA0, 0xA3)
            ), content
        # Constructed, or an OCTET STRING that holds DER.
        inner = _der_items(content) if tag & 0x20 or tag == 0x04 else None
        if inner and rng.random() < 0.93:
            return tag, _der(content, rng, words, depth)
        return tag, _bytes(content, rng, ())

    return b"".join(_der_item(*item) for item in _listed(_der_items(data) or [], rng, (), change))


def _der_item(tag: int, content: bytes) -> bytes:
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + content


# -- zip and lines -------------------------------------------------------------------------------------------


def unzipped(data: bytes) -> dict[str, bytes]:
    """The files of a zip; empty when it cannot be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {
                info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 1 << 20
            }
    except Exception:
        # Whatever zipfile raises on what was made up before: the readers under test are to tell it apart.
        return {}


def zipped(files: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these files, a name twice if it is there twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            if name not in archive.NameToInfo:
                archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def _zip(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    def change(item: tuple[str, bytes]) -> tuple[str, bytes]:
        name, content = item
        if rng.random() < 0.1:
            return rng.choice(
                (name.upper(), "../" + name, name + "/", "x", "studies/" + "0" * 64 + ".study")
            ), content
        return name, _once(content, rng, words, depth)

    files = list(unzipped(data).items())
    if not files or rng.random() < 0.15:
        return _bytes(data, rng, words)
    method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2))
    return zipped(_listed(files, rng, (), change), method)


def _lines(data: bytes, rng: random.Random, words: Words, depth: int) -> bytes:
    def change(line: bytes) -> bytes:
        name, equals, _ = line.partition(b" = ")
        if equals and rng.random() < 0.7:
            return name + equals + rng.choice(_TOML_VALUES)
        return _once(line, rng, (), depth)

    return b"\n".join(_listed(data.split(b"\n"), rng, (), change))


_TOML_VALUES = (
    *(b"0", b"1", b"-1", b"1.0", b"1e400", b"nan", b"-inf", b"true", b'""', b"''", b"[]", b"{}", b"9" * 5000),
    *(
        b'"\\u0000"',
        b'"\\uD800"',
        b'"\\U00110000"',
        b"1979-05-27",
        b"9999-99-99",
        b"0x10",
        b"[" * 2000,
        b"{a=" * 2000,
    ),
    *(b'"2099-12-31T23:59Z"', b'["a", "a", "b"]', b"9223372036854775808", b"1_000", b'"\xc3\xa9"', b'"\xff"'),
)
