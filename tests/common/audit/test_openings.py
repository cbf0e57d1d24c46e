"""Sums computed again from kept payloads: the right ones hold, and every false one is found."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.audit.evidence import Evidence
from common.audit.openings import opened_studies, openings, recomputed
from common.audit.party import Check, Party, read_party
from common.audit.payloads import kept_payloads, member_name
from common.errors import UsageError, VerificationError
from common.secagg import records
from common.study import Manifest
from tests.common.audit.federation import Federation


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A study that keeps payloads, then one that does not."""
    federation = Federation(tmp_path_factory.mktemp("ledgers"))
    study = federation.submit(aggregation__audit="payloads")
    federation.round(study, 1)
    federation.round(study, 3, cohort=(1, 2, 4))
    federation.round(federation.submit(), 1)
    yield federation
    federation.close()


def hub_of(federation: Federation, evidence: Evidence | None = None) -> Party:
    return read_party(evidence or federation.evidence(0), federation.trust)[0]


def study_of(federation: Federation) -> Manifest:
    return next(iter(federation.manifests.values()))


def again(federation: Federation, payloads: dict[tuple[str, int, int], bytes] | None = None) -> list[Check]:
    found = federation.payloads if payloads is None else payloads
    return list(recomputed(hub_of(federation), lambda digest, number, site: found[digest, number, site]))


def test_right_sums_are_computed_again(kept: Federation) -> None:
    checks = again(kept)
    assert [(check.party, check.name, check.passed) for check in checks] == [("hub", "sum", True)] * 2
    digest = study_of(kept).digest.hex()[:12]
    assert [check.detail for check in checks] == [
        f"study {digest}, round 1: the sum of 4 hospitals, bit for bit",
        f"study {digest}, round 3: the sum of 3 hospitals, bit for bit",
    ]
    assert openings(hub_of(kept)) == ""


def test_a_false_sum_is_found(kept: Federation) -> None:
    """By whoever kept other payloads, and by the hub itself, whose result names another sum."""
    digest = study_of(kept).digest.hex()
    for number, site in ((1, 2), (3, 4)):
        data = bytearray(kept.payloads[digest, number, site])
        data[5] ^= 1
        wrong = again(kept, {**kept.payloads, (digest, number, site): bytes(data)})
        assert [check.passed for check in wrong] == [number != 1, number != 3]
        assert [c.detail for c in wrong if not c.passed] == [f"chunk 0 of hospital {site} was altered"]
    man, first = study_of(kept).digest, kept.transcripts[study_of(kept).digest]
    result = records.signed(
        records.Result(first[0].ctx, bytes(32), first[0].result.model_digest), man, kept.hub_key.sign
    )
    lie = [
        type(first[0])(first[0].start, first[0].cohort, first[0].uploads, first[0].openings, result),
        first[1],
    ]
    evidence = kept.evidence(0)
    hub = hub_of(kept, Evidence.from_bytes(evidence.to_bytes(), "hub"))
    assert all(check.passed for check in recomputed(hub, lambda *key: kept.payloads[key]))
    rounds = {**evidence.rounds, man.hex(): kept.rounds(lie)}
    lying = hub_of(
        kept, Evidence(**{**{n: getattr(evidence, n) for n in evidence.__slots__}, "rounds": rounds})
    )
    checks = list(recomputed(lying, lambda *key: kept.payloads[key]))
    assert [check.passed for check in checks] == [False, True]
    assert "another sum than its payloads have" in checks[0].detail


def test_an_invented_sum_is_found(kept: Federation) -> None:
    """The table of test_tamper has more; here: nothing is said of a round whose transcript is missing."""
    evidence = kept.evidence(0)
    hub = hub_of(kept, Evidence(**{**{n: getattr(evidence, n) for n in evidence.__slots__}, "rounds": {}}))
    assert "has no transcript" in openings(hub)
    assert [study.transcripts for study in opened_studies(hub)] == [{}, {}]


# -- the file of payloads ------------------------------------------------------------------------------------


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_file_of_payloads_is_read_one_at_a_time(kept: Federation, tmp_path: Path) -> None:
    files = {member_name(*key): data for key, data in kept.payloads.items()}
    with kept_payloads(packed(tmp_path / "payloads.zip", files)) as payload:
        for key, data in kept.payloads.items():
            assert payload(*key) == data
        with pytest.raises(VerificationError, match=r"hospital 9 in round 1 .* is missing"):
            payload(study_of(kept).digest.hex(), 1, 9)
        assert all(check.passed for check in recomputed(hub_of(kept), payload))


GOOD = member_name("ab" * 32, 1, 1)

HOSTILE: list[tuple[str, Callable[[Path], Path]]] = [
    ("another name", lambda path: packed(path, {GOOD: b"x", "../../etc/passwd": b"x"})),
    ("round zero", lambda path: packed(path, {member_name("ab" * 32, 0, 1): b"x"})),
    ("compressed", lambda path: packed(path, {GOOD: bytes(1 << 20)}, zipfile.ZIP_DEFLATED)),
]


@pytest.mark.parametrize("make", [row[1] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_files_of_payloads_are_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "payloads.zip")
    with pytest.raises(VerificationError, match="no file of payloads"), kept_payloads(path):
        pytest.fail("it was opened")


def test_damaged_files_of_payloads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "payloads.zip"
    with pytest.raises(UsageError, match="cannot be read"), kept_payloads(path):
        pytest.fail("it was opened")
    path.write_bytes(b"no zip file")
    with pytest.raises(VerificationError, match="not a sound zip file"), kept_payloads(path):
        pytest.fail("it was opened")
    whole = packed(path, {GOOD: bytes(1000)}).read_bytes()
    path.write_bytes(whole.replace(bytes(1000), bytes(999) + b"x"))
    with kept_payloads(path) as payload, pytest.raises(VerificationError, match="is damaged"):
        payload("ab" * 32, 1, 1)
