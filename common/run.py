"""From a manifest and a roster to the parameters of one run of the secure sum, the same at hub and site.

Source: PROTOCOL "Manifest". Rules: nothing is decided here; every value is the manifest's or the roster's.
"""

from typing import Final

from common.admissible import Admitted
from common.encoding import labelled, split_labelled
from common.errors import VerificationError
from common.identity import key_bytes
from common.roster import Roster, SignedRoster
from common.secagg.params import RunParams
from common.study import Manifest, SignedManifest

SCALARS: Final = 0
DOCUMENT_LABEL: Final = "study-document"


def run_params(manifest: Manifest, admitted: Admitted, roster: Roster, me: int) -> RunParams:
    """The run as ``me`` sees it (0 is the hub). Raises VerificationError when roster and manifest differ."""
    if roster.digest.hex() != manifest.roster:
        raise VerificationError("run.roster", "the manifest was made for another roster")
    for party in manifest.members:
        if roster.member(party.id).name != party.name:
            raise VerificationError("run.member", f"the roster has another name for site {party.id}")
    aggregation = manifest.study.aggregation
    return RunParams(
        man=manifest.digest,
        parameters=admitted.dim,
        scalars=SCALARS,
        bits=aggregation.codec.bits,
        step=aggregation.codec.step,
        range=aggregation.codec.range,
        rounding=aggregation.codec.rounding,
        masked=aggregation.masked,
        me=me,
        members=tuple(party.id for party in manifest.members),
        keys={member.id: member.protocol_key for member in roster.members},
        hub_key=key_bytes(manifest.hub),
        t=aggregation.colluders,
        m=aggregation.minimum_hospitals,
        rho=aggregation.rollbacks,
        attempts=aggregation.attempts,
        rounds_max=aggregation.rounds_max,
        state_norm_bound=aggregation.state_norm_bound,
        expiry=manifest.study.expires,
        noise=admitted.shares,
    )


def study_document(manifest: SignedManifest, roster: SignedRoster) -> bytes:
    """What a site is sent to decide on: manifest and roster, each with its signature."""
    return labelled(
        DOCUMENT_LABEL, manifest.manifest_bytes, manifest.signature, roster.data, roster.signature
    )


def read_study_document(data: bytes) -> tuple[SignedManifest, SignedRoster]:
    """Read study_document strictly; nothing is verified yet. Raises VerificationError."""
    parts = split_labelled(DOCUMENT_LABEL, data, "study document")
    if len(parts) != 4:
        raise VerificationError("run.document", "a study document holds a manifest and a roster, each signed")
    return SignedManifest(parts[0], parts[1]), SignedRoster(parts[2], parts[3])
