"""The sums that the hub opened, held against the signed records of every hospital in them.

Source: PROTOCOL.md C6, R0-R6, "Hub invariants"; DESIGN "A round, end to end". Rules: the hub's word for a sum
is not taken: each hospital of its cohort has signed the upload and the opening; a model is where the round
before left it; what is shown is neither more nor less than the hub's ledger says. With the kept payloads the
sum itself is computed again, bit for bit; that the next model follows from it is not checked here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from common.audit.party import Check, Party, checked
from common.errors import VerificationError
from common.ledger.entries import Completed, Submission
from common.run import run_params
from common.secagg.params import RunParams
from common.secagg.sums import recompute
from common.secagg.transcript import Transcript, read_transcripts
from common.study import Manifest
from common.tasks.models import initial_state
from common.tasks.models.layout import Layout
from common.tasks.state import model_digest

Payload = Callable[[str, int, int], bytes]
"""The kept payload of (study, round, hospital)."""


@dataclass(frozen=True, slots=True)
class OpenedStudy:
    """The rounds of one study whose sums the hub's ledger names, with the hub's transcripts, by round."""

    digest: str
    params: RunParams
    manifest: Manifest
    layout: Layout
    completed: Mapping[int, Completed]
    transcripts: Mapping[int, Transcript]

    def initial(self) -> bytes:
        """The digest of the public model before round 1, 32 bytes."""
        return model_digest(initial_state(self.manifest), self.layout)


def opened_studies(hub: Party) -> Iterator[OpenedStudy]:
    """Each study with a completed round that is there and can be run. Raises VerificationError."""
    for digest, (manifest, roster, admitted) in hub.studies.items():
        found = read_transcripts(hub.evidence.rounds[digest]) if digest in hub.evidence.rounds else ()
        completed = {e.round: e for e in hub.of(Completed) if e.manifest == digest}
        if admitted is not None and (found or completed):
            transcripts = {transcript.start.round: transcript for transcript in found}
            if len(transcripts) != len(found):
                problem = f"study {digest[:12]} has two transcripts of one round"
                raise VerificationError("audit.openings", problem)
            params = run_params(manifest, admitted, roster, 0)
            yield OpenedStudy(digest, params, manifest, admitted.layout, completed, transcripts)


def completions(hub: Party) -> str:
    """Studies were submitted by their own coordinators; sums were opened over cohorts that they allow."""
    last: dict[str, int] = {}
    for entry in hub.entries:
        if not isinstance(entry, Submission | Completed) or entry.manifest not in hub.studies:
            continue
        manifest = hub.studies[entry.manifest][0]
        if isinstance(entry, Submission):
            if entry.coordinator != manifest.coordinator:
                return f"entry {entry.seq} names another coordinator than signed the study"
            continue
        rules = manifest.study.aggregation
        allowed = {member.id for member in manifest.members}
        if not set(entry.cohort) <= allowed or len(entry.cohort) < rules.minimum_hospitals:
            return f"entry {entry.seq} opens a sum over hospitals that the study does not allow"
        follows = last.get(entry.manifest, 0) < entry.round <= rules.rounds_max
        if not follows or entry.attempt > rules.attempts:
            return f"entry {entry.seq} completes a round or attempt that the study does not have"
        last[entry.manifest] = entry.round
    return ""


def openings(hub: Party) -> str:
    """Every completed round was opened by each hospital of its cohort, under its own key.

    Guarantee: an_invented_sum_is_found - a completed round without the signatures of its hospitals.
    """
    for study in opened_studies(hub):
        model = directory = b""
        for number in sorted({*study.completed, *study.transcripts}):
            where = f"round {number} of study {study.digest[:12]}"
            entry, transcript = study.completed.get(number), study.transcripts.get(number)
            if entry is None or transcript is None:
                missing = "transcript" if transcript is None else "entry in the hub's ledger"
                return f"{where} has no {missing}"
            transcript.check(study.params)
            start, result = transcript.start, transcript.result
            said = (entry.ctx, entry.sum_digest, entry.model_digest, entry.cohort, entry.attempt)
            digests = (transcript.ctx.hex(), result.sum_digest.hex(), result.model_digest.hex())
            if said != (*digests, transcript.cohort.ids, transcript.cohort.attempt):
                return f"the transcript of {where} is not of what entry {entry.seq} says"
            # The initial model is as large as the study says: only after a signature of everybody.
            if start.model_digest != (model or study.initial()):
                return f"{where} did not begin with the model that the study or the round before left"
            if directory and start.dirh != directory:
                return f"{where} has another directory of keys than the rounds before"
            model, directory = result.model_digest, start.dirh
    return ""


def recomputed(hub: Party, kept: Payload) -> Iterator[Check]:
    """A check for every completed round of the studies that keep payloads: its sum, from ``kept``.

    ``openings`` must hold for these checks to say anything. Of other studies nothing is said.

    Guarantee: a_false_sum_is_found - one that is not that of the payloads which the hospitals signed.
    """
    for study in opened_studies(hub):
        if not keeps_payloads(hub, study.digest):
            continue
        for number, transcript in sorted(study.transcripts.items()):
            what = f"round {number}: the sum of {len(transcript.uploads)} hospitals, bit for bit"
            rule = partial(_differs, study, transcript, kept)
            yield checked(hub.name, "sum", f"study {study.digest[:12]}, {what}", rule)


def keeps_payloads(hub: Party, digest: str) -> bool:
    """Whether the manifest of a study that is there says that payloads are kept."""
    return digest in hub.studies and hub.studies[digest][0].study.aggregation.audit == "payloads"


def _differs(study: OpenedStudy, transcript: Transcript, kept: Payload) -> str:
    number = transcript.start.round
    headers = {header.id: header for header in transcript.uploads}
    opened = {opening.id: opening for opening in transcript.openings}

    def payload(member: int) -> bytes:
        return kept(study.digest, number, member)

    sums = recompute(study.params, transcript.cohort, transcript.ctx, headers, opened, payload)
    if sums.digest != transcript.result.sum_digest:
        return f"study {study.digest[:12]}, round {number}: the hub named another sum than its payloads have"
    return ""
