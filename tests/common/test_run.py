"""From manifest and roster to one run: every value is theirs, and both sides get the same."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from common.admissible import check
from common.encoding import labelled
from common.errors import VerificationError
from common.roster import Roster, SignedRoster
from common.run import DOCUMENT_LABEL, SCALARS, read_study_document, run_params, study_document
from common.secagg.params import HUB, check_params
from common.study import Manifest, Party, SignedManifest
from tests.server.hospitals import Founded, found


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    folder: Path = tmp_path_factory.mktemp("run")
    return found(folder, 4)


def pieces(founded: Founded) -> tuple[Manifest, Roster]:
    hub_key = founded.admissions[1].hub_key
    return founded.manifest(), founded.signed_roster().verify(hub_key)


def test_every_value_is_the_manifests_or_the_rosters(founded: Founded) -> None:
    manifest, roster = pieces(founded)
    admitted = check(manifest, None)
    params = run_params(manifest, admitted, roster, 2)
    rules = manifest.study.aggregation
    assert params.man == manifest.digest
    assert (params.parameters, params.scalars) == (admitted.dim, SCALARS)
    assert (params.bits, params.step, params.range) == (rules.codec.bits, rules.codec.step, rules.codec.range)
    assert (params.me, params.members) == (2, (1, 2, 3, 4))
    assert params.keys == {member.id: member.protocol_key for member in roster.members}
    assert params.hub_key == founded.admissions[1].hub_key
    assert (params.m, params.t, params.rho) == (rules.minimum_hospitals, rules.colluders, rules.rollbacks)
    assert (params.attempts, params.rounds_max) == (rules.attempts, rules.rounds_max)
    assert (params.state_norm_bound, params.expiry) == (rules.state_norm_bound, manifest.study.expires)
    check_params(params)


def test_hub_and_site_differ_in_nothing_but_me(founded: Founded) -> None:
    manifest, roster = pieces(founded)
    hub = run_params(manifest, check(manifest, None), roster, HUB)
    site = run_params(manifest, check(manifest, None), roster, 3)
    assert replace(site, me=HUB) == hub
    assert {f.name for f in fields(hub) if getattr(hub, f.name) != getattr(site, f.name)} == {"me"}


def test_another_roster_is_refused(founded: Founded) -> None:
    manifest, roster = pieces(founded)
    fewer = Roster(roster.members[:3])
    with pytest.raises(VerificationError, match="another roster"):
        run_params(manifest, check(manifest, None), fewer, 1)


def test_a_member_under_another_id_is_refused(founded: Founded) -> None:
    manifest, roster = pieces(founded)
    names = [party.name for party in manifest.members]
    swapped = tuple(Party(id=i, name=n) for i, n in enumerate([names[1], names[0], *names[2:]], start=1))
    crossed = founded.manifest(_members=swapped)
    with pytest.raises(VerificationError, match="another name for site 1"):
        run_params(crossed, check(crossed, None), roster, 1)
    stranger = tuple(Party(id=i + 1, name=n) for i, n in enumerate(names, start=1))
    shifted = founded.manifest(_members=stranger)
    with pytest.raises(VerificationError):
        run_params(shifted, check(shifted, None), roster, 1)


def test_study_documents_are_read_exactly(founded: Founded) -> None:
    signed, roster = founded.sign_study(), founded.signed_roster()
    document = study_document(signed, roster)
    assert read_study_document(document) == (signed, roster)
    assert isinstance(read_study_document(document)[0], SignedManifest)
    assert isinstance(read_study_document(document)[1], SignedRoster)
    for other in (
        b"",
        document[:-1],
        document + b"\0",
        document + bytes(8),
        labelled(DOCUMENT_LABEL, b"a", b"b", b"c"),
        labelled("other", *[b"x"] * 4),
    ):
        with pytest.raises(VerificationError):
            read_study_document(other)
