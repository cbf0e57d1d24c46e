"""Two runs frozen byte for byte: three hospitals, and four of whom one drops out before the second attempt.

A vector holds every message and every stored state. Only the sealed seeds cannot be derived again, as
HPKE draws from the operating system: they are fed from the vector, and must open to the right seeds.
To freeze anew after a change of the protocol: ``python -m tests.common.secagg.test_transcript``.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from common.secagg import joining, records
from common.secagg.pairing import SEED_BYTES, SetupKeys, pair_info, seal_seed, sender_of, unseal_seed
from common.secagg.records import Record, decode, encode
from tests.common.secagg.federation import MODEL, STATE, Counter, Federation, matches
from tests.common.secagg.reference import enc, hash_of, kdf, masked

VECTORS = Path(__file__).parents[2] / "vectors" / "secagg"
ATTEMPTS: dict[str, list[list[int]]] = {
    "three_hospitals": [[1, 2, 3]],
    "second_attempt": [[1, 2, 3, 4], [1, 2, 3]],
}
Seal = Callable[[bytes, bytes, bytes, bytes], bytes]


def transcript(name: str, seal: Seal) -> dict[str, Any]:
    """Run it, with ``seal`` in place of the library's."""
    federation = Federation(len(ATTEMPTS[name][0]), "frozen")
    messages: list[list[str]] = []

    def say(*found: Record) -> None:
        messages.extend([type(record).__name__, encode(record).hex()] for record in found)

    with mock.patch.object(joining, "seal_seed", seal):
        for i, site in federation.sites.items():
            say(site.announce())
            federation.hub.on_announce(i, site.announce())
        say(federation.hub.directory())
        for i, site in federation.sites.items():
            seeds = site.on_directory(federation.hub.directory())
            say(*seeds)
            federation.hub.on_pair_seeds(i, seeds)
    for i, site in federation.sites.items():
        confirm = site.on_pair_seeds(federation.hub.seeds_for(i))
        say(confirm)
        federation.hub.on_confirm(i, confirm)
    for i, site in federation.sites.items():
        site.on_confirms(federation.hub.confirms_for(i))
    federation.setup = federation.hub.outcome()
    hub = federation.round(2)
    say(hub.start, *federation.ready(hub).values())
    payloads = {}
    for ids in ATTEMPTS[name]:
        cohort = hub.cohort(without=set(federation.ids) - set(ids))
        say(cohort)
        for i in cohort.ids:
            header = federation.sites[i].on_cohort(cohort)
            say(header)
            payloads[f"{i}/{cohort.attempt}"] = federation.sites[i].payload().hex()
            federation.send_payload(hub, i, header)
    request = hub.open_please()
    say(request)
    for i in hub.accumulator.ids:
        opened = federation.sites[i].on_open_please(request)
        say(opened)
        hub.on_open(i, opened)
    say(hub.result(MODEL))
    sums = hub.finish()
    assert matches(federation, sums, 2)
    return {
        "man": federation.params.man.hex(),
        "messages": messages,
        "payloads": payloads,
        "states": {
            str(i): [hashlib.sha256(version).hexdigest() for version in disk.versions]
            for i, disk in federation.disks.items()
        },
        "sum": {"parameters": sums.parameters.tolist(), "scalars": sums.scalars.tolist()},
    }


def frozen(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return found


def messages(vector: dict[str, Any], name: str) -> list[bytes]:
    return [bytes.fromhex(data) for kind, data in vector["messages"] if kind == name]


def parts(data: bytes) -> list[bytes]:
    """The parts of an encoding, read without the code under test; the label is dropped."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    assert enc(*found) == data
    return found[1:]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_transcript_is_the_frozen_one(name: str) -> None:
    vector = frozen(name)
    sealed = {tuple(parts(data)[2:4]): parts(data)[4] for data in messages(vector, "PairSeed")}
    announced = {
        parts(data)[2]: SetupKeys.new(Counter(f"frozen/{i}"))
        for i, data in enumerate(messages(vector, "KeyAnnounce"), start=1)
    }
    man = bytes.fromhex(vector["man"])
    flat = [p for data in messages(vector, "KeyAnnounce") for p in (parts(data)[0], *parts(data)[2:4])]
    dirh = hash_of("dir", man, len(ATTEMPTS[name][0]).to_bytes(2, "little"), *flat)
    ids = ATTEMPTS[name][0]
    pair_of = {pair_info(man, dirh, i, j): (i, j) for i in ids for j in ids if i < j}

    def replay(seed: bytes, mlkem: bytes, x25519: bytes, info: bytes) -> bytes:
        i, j = pair_of[info]
        ct = sealed[i.to_bytes(2, "little"), j.to_bytes(2, "little")]
        assert unseal_seed(ct, announced[mlkem], info) == seed
        return ct

    assert transcript(name, replay) == vector


@pytest.mark.parametrize("name", ATTEMPTS)
def test_every_frozen_message_decodes_to_itself(name: str) -> None:
    for kind, data in frozen(name)["messages"]:
        record = decode(getattr(records, kind), bytes.fromhex(data))
        assert encode(record).hex() == data


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_frozen_payloads_are_those_of_the_reference(name: str) -> None:
    """From the seeds alone: pair keys, ratchet, context, commitments, masks, each by the reference."""
    vector = frozen(name)
    man = bytes.fromhex(vector["man"])
    flat = [p for data in messages(vector, "KeyAnnounce") for p in (parts(data)[0], *parts(data)[2:4])]
    dirh = hash_of("dir", man, len(ATTEMPTS[name][0]).to_bytes(2, "little"), *flat)
    held: dict[int, dict[int, bytes]] = {i: {} for i in ATTEMPTS[name][0]}
    drawn = {i: Counter(f"frozen/{i}") for i in held}
    for counter in drawn.values():
        SetupKeys.new(counter)
    for data in messages(vector, "PairSeed"):
        _, named, first, second, ct, _ = parts(data)
        assert named == dirh
        i, j = int.from_bytes(first, "little"), int.from_bytes(second, "little")
        seed = drawn[sender_of(i, j)](SEED_BYTES)
        key = kdf(seed, "pair", hash_of("pairbind", man, dirh, first, second, ct))
        key = kdf(kdf(key, "ratchet"), "ratchet")
        held[i][j] = held[j][i] = key
    nus = {data[0]: data[1] for data in ((parts(d)[1], parts(d)[4]) for d in messages(vector, "Ready"))}
    seeds = {i: counter(SEED_BYTES) for i, counter in drawn.items()}
    example = Federation(len(held), "frozen")
    for attempt, ids in enumerate(ATTEMPTS[name], start=1):
        numbers = [i.to_bytes(2, "little") for i in ids]
        members = [part for number in numbers for part in (number, nus[number])]
        ctx = hash_of(
            "ctx", man, dirh, b"\x02\0\0\0", bytes([attempt]), MODEL, len(ids).to_bytes(2, "little"), *members
        )
        for i in ids:
            params, scalars = (vector.tolist() for vector in example.vectors(i, 2))
            b = kdf(seeds[i], "self", ctx)
            expected = masked(params, 4, b, held[i], i, ids, b"params", ctx)
            expected += masked(scalars, 8, b, held[i], i, ids, b"scalars", ctx)
            assert vector["payloads"][f"{i}/{attempt}"] == expected.hex()
            header = next(
                p
                for p in map(parts, messages(vector, "Upload"))
                if p[0] == i.to_bytes(2, "little") and p[1] == ctx
            )
            assert header[2] == kdf(b, "commit", ctx, i.to_bytes(2, "little"))
            if attempt == len(ATTEMPTS[name]):
                opened = next(p for p in map(parts, messages(vector, "Open")) if p[0] == header[0])
                assert opened[1:3] == [ctx, b]
    start = parts(messages(vector, "RoundStart")[0])
    assert start[:6] == [man, dirh, b"\x02\0\0\0", STATE, MODEL, (1_900_000_000).to_bytes(8, "little")]


if __name__ == "__main__":
    for vector_name in ATTEMPTS:
        text = json.dumps(transcript(vector_name, seal_seed), indent=1) + "\n"
        (VECTORS / f"{vector_name}.json").write_text(text)
