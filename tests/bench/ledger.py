"""The ledger: an append with its fsync, verification of a long one, and a report over many studies."""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common.admissible import check
from common.audit.claims import read_facts
from common.audit.evidence import Evidence
from common.audit.report import render
from common.audit.verify import verify
from common.ledger.entries import Charge, Entry, Outcome, Pause, encode
from tests.bench.result import Result
from tests.common.audit.federation import Federation

APPENDS = 500
ENTRIES = 100_000
STUDIES = 20
ROUNDS = 10
LONG = {"training__rounds": ENTRIES // 12, "privacy__noise_multiplier": 1000.0}


def run() -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("appends", "entries", "report")]
        for folder in folders:
            folder.mkdir()
        appends, entries, report = folders
        return [
            Result("ledger.append with fsync, median", _append_ms(appends), "ms", 5),
            Result("ledger.100000 entries verified", _verify_s(entries), "s", 10),
            Result("ledger.report over 20 studies", _report_s(report), "s", 3),
        ]


def _append_ms(folder: Path) -> float:
    federation = Federation(folder)
    keeper, took = federation.keepers[1], []
    for number in range(APPENDS):
        decision = "resumed" if number % 2 else "paused"
        started = time.perf_counter()
        keeper.append(Pause, decision=decision, reason="A. Person: for the benchmark")
        took.append(time.perf_counter() - started)
    federation.close()
    return 1000 * statistics.median(took)


def long_evidence(federation: Federation) -> Evidence:
    """A hospital's evidence of four long studies; written to disk, its ledger would take minutes."""
    studies = [federation.submit(**LONG) for _ in range(4)]
    federation.cosign(studies[0], 1)
    keeper, evidence = federation.keepers[1], federation.evidence(1)
    leaves, actor = list(evidence.leaves), keeper.actor

    def add(entry: Entry) -> None:
        leaves.append(encode(entry.model_copy(update={"seq": len(leaves), "time": "2026-11-23T09:00Z"})))

    for study in studies:
        planned = check(study, None).event(keeper.register, 1, 1, "0" * 32).to_fields()
        for number in range(1, study.study.training.rounds + 1):
            event, ctx = f"{len(leaves):032x}", f"{len(leaves):064x}"
            add(Charge.model_construct(actor=actor, event={**planned, "event_id": event, "round": number}))
            for reason in ("upload_started", "completed"):
                said = {"event_id": event, "attempt": 1, "ctx": ctx, "reason": reason}
                add(Outcome.model_validate({"actor": actor, "state": "released", **said}))
    return replace(evidence, leaves=tuple(leaves), head=federation.head(1, leaves))


def _verify_s(folder: Path) -> float:
    federation = Federation(folder)
    data = long_evidence(federation).to_bytes()
    federation.close()
    started = time.perf_counter()
    found = verify([Evidence.from_bytes(data, "the evidence")], federation.trust)
    took = time.perf_counter() - started
    if not found.passed:
        raise RuntimeError(next(check.detail for check in found.checks if not check.passed))
    return took


def _report_s(folder: Path) -> float:
    """Every other study samples its patients, and no two of them alike."""
    federation = Federation(folder, epsilon=20)
    for number in range(STUDIES):
        sampled = {"training__sampling": "poisson", "training__sampling_rate": 0.1 + number / 100}
        study = federation.submit(
            name=f"study {number}", training__rounds=ROUNDS, **(sampled if number % 2 else {})
        )
        for turn in range(1, ROUNDS + 1):
            federation.round(study, turn)
        federation.end(study)
    evidences = federation.evidences()
    federation.close()
    started = time.perf_counter()
    found = verify(evidences, federation.trust)
    page = render(read_facts(found, federation.trust))
    took = time.perf_counter() - started
    if not found.passed or "</html>" not in page:
        raise RuntimeError("the report is not whole")
    return took
