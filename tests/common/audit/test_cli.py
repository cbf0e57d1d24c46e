"""Transcripts of ``wardround audit …``: what is printed, in text and JSON, and how each command ends."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from common.audit.cli import ON_THE_HUBS_WORD, SELF_CONSISTENT, app
from common.audit.evidence import Evidence
from common.audit.payloads import member_name
from common.audit.proofs import own_key, verify_proof
from common.identity import fingerprint, public_key
from common.ledger.entries import Approval, Pause, PolicyChange, Restored, Rules, decode
from common.privacy import gate
from common.privacy.clipping import sanitise
from common.tasks import training
from tests.canary_study import make
from tests.common.audit.federation import Federation

RULES = Rules.model_validate(
    {
        "epsilon_t": "3",
        "epsilon_w": None,
        "delta": "0.000001",
        "minimum_hospitals": 3,
        "max_round_minutes": 60,
    }
    | {"without_differential_privacy": False, "without_masks": False, "coordinators": ()}
)
ROOT = Path(__file__).parents[3]


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    # Whatever happens, a person sees a sentence and never a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def data(*arguments: str | Path, code: int = 0, slug: str = "ok") -> dict[str, Any]:
    """The envelope of a command with --json, checked; its data."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    (line,) = result.stdout.splitlines()
    envelope = json.loads(line)
    assert set(envelope) == {"schema", "status", "code", "data", "hint"}
    assert (envelope["status"], envelope["code"]) == ("error" if code else "ok", slug)
    found = envelope["data"]
    assert isinstance(found, dict)
    return found


def failure(*arguments: str | Path, code: int, slug: str) -> str:
    """A command that fails, in text and in JSON with the same code; what it says."""
    text = run(*arguments)
    assert text.exit_code == code, text.output
    assert text.stdout == ""
    assert text.stderr.startswith("error: ")
    assert f"[{slug}]" in text.stderr
    data(*arguments, code=code, slug=slug)
    return text.stderr


@pytest.fixture
def files(ran: Federation, evidences: list[Evidence], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{evidence.name}.zip" for evidence in evidences]
    for path, evidence in zip(paths, evidences, strict=True):
        path.write_bytes(evidence.to_bytes())
    return paths


@pytest.fixture
def trust(ran: Federation, tmp_path: Path) -> Path:
    path = tmp_path / "trust.json"
    path.write_bytes(ran.trust.to_bytes())
    return path


# -- verify ------------------------------------------------------------------------------------------------


def test_verify_says_that_all_holds(ran: Federation, files: list[Path], trust: Path) -> None:
    for given in (trust, fingerprint(public_key(ran.hub_key))):
        result = run("verify", *files, "--trust", given)
        assert result.exit_code == 0
        *lines, last = result.stdout.splitlines()
        if given != trust:
            assert lines.pop() == ON_THE_HUBS_WORD
        assert last == f"all {len(lines)} checks hold"
        assert all(line.startswith("ok    ") for line in lines)
        assert (
            "ok    hub         tree                    the signed head is of exactly these entries" in lines
        )
    found = data("verify", *files, "--trust", trust)
    assert (found["trusted"], found["passed"], found["missing"]) == (True, True, [])
    assert len(found["checks"]) == len(lines)
    assert set(found["checks"][0]) == {"party", "name", "passed", "detail"}


def test_verify_without_trust_is_not_enough(files: list[Path]) -> None:
    result = run("verify", *files)
    assert result.exit_code == 5
    assert result.stdout.splitlines()[-1] == SELF_CONSISTENT
    assert SELF_CONSISTENT == "self-consistent only: the keys come from the evidence itself"
    found = data("verify", *files, code=5, slug="audit.untrusted")
    assert (found["trusted"], found["passed"]) == (False, True)


def test_verify_says_whose_evidence_is_missing(files: list[Path], trust: Path) -> None:
    result = run("verify", files[1], files[3], "--trust", trust)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2] == "no evidence was given of: hub, Northgate, Holy Cross"
    found = data("verify", files[1], files[3], "--trust", trust)
    assert found["missing"] == ["hub", "Northgate", "Holy Cross"]


def test_verify_names_what_does_not_hold(
    ran: Federation, evidences: list[Evidence], files: list[Path], trust: Path
) -> None:
    short = ran.rewritten(evidences[1], lambda entries: entries.__delitem__(slice(9, None)))
    files[1].write_bytes(short.to_bytes())
    result = run("verify", *files, "--trust", trust)
    assert result.exit_code == 5
    wrong = [line for line in result.stdout.splitlines() if line.startswith("FAIL  ")]
    assert all(line.split()[1:3] == ["St.", "Mary"] for line in wrong)
    assert any("older than Northgate saw it: 9 entries are there, not 15" in line for line in wrong)
    assert result.stdout.splitlines()[-1].startswith(f"{len(wrong)} of ")
    found = data("verify", *files, "--trust", trust, code=5, slug="audit.failed")
    assert found["passed"] is False
    # Without trust it says the same, and never that it is consistent.
    assert SELF_CONSISTENT not in run("verify", *files).stdout
    data("verify", *files, code=5, slug="audit.failed")


def test_verify_refuses_files_that_are_none(files: list[Path], trust: Path, tmp_path: Path) -> None:
    said = failure("verify", files[1], files[1], "--trust", trust, code=2, slug="audit.files")
    assert "the same party" in said
    failure("verify", tmp_path / "nothing.zip", "--trust", trust, code=2, slug="audit.file")
    failure("verify", trust, "--trust", trust, code=5, slug="audit.evidence")
    failure("verify", files[0], "--trust", tmp_path / "nothing", code=2, slug="audit.trust-file")
    failure("verify", files[0], "--trust", files[0], code=5, slug="encoding.json")
    failure("verify", files[0], "--trust", "-".join(["0000"] * 8), code=5, slug="audit.roster")
    assert run("verify").exit_code == 2


# -- log ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("kept"))
    federation.round(federation.submit(aggregation__audit="payloads"), 1)
    yield federation
    federation.close()


def handed_over(kept: Federation, folder: Path, **changes: bytes) -> tuple[Path, Path, Path]:
    """The hub's evidence, its payloads with those of some sites changed, and the trusted roster."""
    evidence, payloads, trust = (folder / name for name in ("kept.zip", "payloads.zip", "roster.json"))
    evidence.write_bytes(kept.evidence(0).to_bytes())
    trust.write_bytes(kept.trust.to_bytes())
    with zipfile.ZipFile(payloads, "w") as archive:
        for key, payload in kept.payloads.items():
            archive.writestr(member_name(*key), changes.get(f"site_{key[2]}", payload))
    return evidence, payloads, trust


def test_recompute_says_that_every_sum_is_right(kept: Federation, tmp_path: Path) -> None:
    evidence, payloads, trust = handed_over(kept, tmp_path)
    digest = next(iter(kept.manifests)).hex()[:12]
    result = run("recompute", evidence, payloads, "--trust", trust)
    assert result.exit_code == 0
    assert result.stdout == (
        f"ok    hub  sum  study {digest}, round 1: the sum of 4 hospitals, bit for bit\nall 1 sums with kept payloads are right\n"
    )
    found = data("recompute", evidence, payloads, "--trust", trust)
    assert (found["trusted"], found["passed"]) == (True, True)
    assert found["checks"][-1]["name"] == "sum"
    assert data("recompute", evidence, payloads, code=5, slug="audit.untrusted")["passed"]


def test_a_hubs_fingerprint_vouches_for_no_hospital(kept: Federation, tmp_path: Path) -> None:
    """A hub that holds its own key alone can sign a roster of hospitals that it invented."""
    evidence, payloads, _ = handed_over(kept, tmp_path)
    mark = fingerprint(kept.trust.hub_key)
    failure("recompute", evidence, payloads, "--trust", mark, code=2, slug="audit.hub-alone")
    result = run("verify", evidence, "--trust", mark)
    assert result.exit_code == 0
    assert ON_THE_HUBS_WORD in result.stdout
    assert ON_THE_HUBS_WORD not in run("verify", evidence, "--trust", tmp_path / "roster.json").stdout


def test_recompute_names_the_sum_that_is_not(kept: Federation, tmp_path: Path) -> None:
    other = next(data for key, data in kept.payloads.items() if key[2] == 3)
    evidence, payloads, trust = handed_over(kept, tmp_path, site_2=other)
    result = run("recompute", evidence, payloads, "--trust", trust)
    assert result.exit_code == 5
    assert result.stdout == "FAIL  hub  sum  chunk 0 of hospital 2 was altered\nnot every sum is right\n"
    data("recompute", evidence, payloads, "--trust", trust, code=5, slug="audit.failed")


def test_recompute_refuses_what_says_nothing(
    kept: Federation, files: list[Path], trust: Path, tmp_path: Path
) -> None:
    evidence, payloads, _ = handed_over(kept, tmp_path)
    hub, mary = files[:2]
    assert "no completed round of a study that keeps payloads" in failure(
        "recompute", hub, payloads, "--trust", trust, code=3, slug="audit.no-sums"
    )
    failure("recompute", mary, payloads, "--trust", trust, code=2, slug="audit.hub")
    failure("recompute", evidence, tmp_path / "none.zip", code=2, slug="audit.file")
    failure("recompute", evidence, evidence, code=5, slug="audit.payloads")
    # Evidence that fails is not computed upon: its failed checks are shown instead.
    result = run("recompute", evidence, payloads, "--trust", trust)
    assert result.exit_code == 5
    assert "FAIL  hub  identity" in result.stdout
    assert result.stdout.endswith("the evidence does not hold: no sum was computed\n")


def test_log_prints_an_entry_a_line(ran: Federation, files: list[Path]) -> None:
    lines = run("log", files[1]).stdout.splitlines()
    assert len(lines) == 18
    assert lines[0].startswith("     0  2026-11-23T08:02Z  opened      St. Mary  register ")
    assert lines[0].endswith("epsilon 3 (t collude), 3 (all do), delta 0.000001")
    digest = next(iter(ran.manifests)).hex()[:12]
    assert f"  approval    A. Person  approved {digest}: for the test" in lines[1]
    assert f"  charge      St. Mary  round 1 of {digest}" in lines[2]
    assert "  outcome     St. Mary  upload_started, attempt 1, event " in lines[3]
    hub = run("log", files[0]).stdout
    for said in (
        "admitted 4 Holy Cross, ",
        f"study {digest}",
        f"round 2 of {digest} over 1, 2, 3",
        f"done {digest}",
    ):
        assert said in hub
    found = data("log", files[1])
    assert (found["party"], len(found["entries"]), found["problem"]) == ("St. Mary", 18, "")
    assert found["entries"][2]["event"]["round"] == 1


def test_log_of_other_decisions(ran: Federation, files: list[Path], evidences: list[Evidence]) -> None:
    actor, time = ran.keepers[1].actor, "2099-01-01T00:00Z"
    more = ran.rewritten(
        evidences[1],
        lambda entries: entries.extend(
            [
                Pause(actor=actor, time=time, decision="paused", reason="B. Person: a machine moves: today"),
                PolicyChange(actor=actor, time=time, before=None, after=RULES),
                PolicyChange(
                    actor=actor, time=time, before=RULES, after=RULES.model_copy(update={"epsilon_t": "2"})
                ),
                Pause(actor=actor, time=time, decision="resumed", reason="without a name"),
                Restored(actor=actor, time=time, reason="B. Person: disk"),
            ]
        ),
    )
    files[1].write_bytes(more.to_bytes())
    *_, paused, policy, lowered, resumed, restored = run("log", files[1]).stdout.splitlines()
    assert paused.endswith("  pause       B. Person  paused: a machine moves: today")
    assert (
        "  policy      St. Mary  epsilon_t 3, epsilon_w None, delta 0.000001, epsilon_per_study None, "
        in policy
    )
    assert lowered.endswith("  policy      St. Mary  epsilon_t 2")
    assert resumed.endswith("  pause       St. Mary  resumed: without a name")
    assert restored.endswith("  restored    B. Person  disk")


def test_log_says_where_it_cannot_be_read(files: list[Path], evidences: list[Evidence]) -> None:
    leaves = (*evidences[1].leaves[:3], b"{}", *evidences[1].leaves[4:])
    files[1].write_bytes(replace(evidences[1], leaves=leaves).to_bytes())
    result = run("log", files[1])
    assert result.exit_code == 5
    assert len(result.stdout.splitlines()) == 4
    assert "cannot be read further: entry 3" in result.stdout
    found = data("log", files[1], code=5, slug="audit.leaves")
    assert len(found["entries"]) == 3


# -- prove -------------------------------------------------------------------------------------------------


def test_prove_writes_what_others_can_verify(
    evidences: list[Evidence], files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "approval.tlog-proof"
    result = run("prove", files[1], "1", "--out", out)
    assert result.exit_code == 0
    key = own_key(evidences[1])
    assert fingerprint(key) in result.stdout
    assert isinstance(verify_proof(out.read_text(encoding="utf-8"), key), Approval)
    assert b"\r" not in out.read_bytes()
    said = failure("prove", files[1], "1", "--out", out, code=3, slug="audit.out")
    assert "cannot be written" in said
    found = data("prove", files[1], "2", "--out", tmp_path / "two.tlog-proof")
    assert found == {
        "file": str(tmp_path / "two.tlog-proof"), "entry": 2, "party": "St. Mary", "ledger_key": fingerprint(key),
    }  # fmt: skip


def test_prove_refuses_what_is_not_there_or_not_so(
    evidences: list[Evidence], files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "x.tlog-proof"
    failure("prove", files[1], "18", "--out", out, code=2, slug="audit.entry")
    files[1].write_bytes(replace(evidences[1], leaves=evidences[1].leaves[:-1]).to_bytes())
    failure("prove", files[1], "1", "--out", out, code=5, slug="ledger.inclusion")
    assert not out.exists()
    assert run("prove", files[1], "-1", "--out", out).exit_code == 2


# -- diff --------------------------------------------------------------------------------------------------


@pytest.fixture
def older(ran: Federation, evidences: list[Evidence], tmp_path: Path) -> Path:
    leaves = evidences[1].leaves[:15]
    path = tmp_path / "older.zip"
    path.write_bytes(replace(evidences[1], leaves=leaves, head=ran.head(1, leaves)).to_bytes())
    return path


def test_diff_shows_what_was_added(files: list[Path], older: Path, evidences: list[Evidence]) -> None:
    result = run("diff", older, files[1])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["15", "16", "17"]
    assert lines[-1] == "from 15 entries to 18: nothing that was there has changed"
    found = data("diff", older, files[1])
    assert (found["party"], found["old"]["size"], found["new"]["size"]) == ("St. Mary", 15, 18)
    assert found["proof"]
    assert [entry["seq"] for entry in found["entries"]] == [15, 16, 17]
    assert found["entries"][0] == json.loads(json.dumps(decode(evidences[1].leaves[15]).model_dump()))
    assert run("diff", older, older).stdout == "from 15 entries to 15: nothing that was there has changed\n"


def test_diff_names_the_first_entry_that_differs(
    ran: Federation, files: list[Path], older: Path, evidences: list[Evidence]
) -> None:
    assert "it lacks entry 15" in failure("diff", files[1], older, code=5, slug="audit.diff")
    other = ran.rewritten(
        evidences[1], lambda e: e.__setitem__(1, e[1].model_copy(update={"reason": "B: no"}))
    )
    files[1].write_bytes(other.to_bytes())
    assert "entry 1 differs" in failure("diff", older, files[1], code=5, slug="audit.diff")
    failure("diff", older, files[2], code=2, slug="audit.files")


# -- canaries ----------------------------------------------------------------------------------------------


def test_canaries_pass_on_the_products_code(tmp_path: Path) -> None:
    make(tmp_path)
    result = run("canaries", tmp_path / "study.toml")
    assert result.exit_code == 0, result.output
    epsilon, sums, noise, label = result.stdout.splitlines()
    said = re.fullmatch(
        r"ok {4}epsilon  at least (\d+\.\d{4}) by 285 canaries, at most (\d\.\d{4}) by the accountant",
        epsilon,
    )
    assert said
    assert float(said[1]) < float(said[2])
    assert re.fullmatch(r"ok {4}sums +within \de-1\d clip norms of those computed patient by patient", sums)
    assert re.fullmatch(
        r"ok {4}noise    (0\.[89]|1\.[01])\d+ times the stated variance, over 760 numbers", noise
    )
    assert label == "code check on public data, 95 %: 20 of 20 rounds, delta 1e-06"


def test_canaries_say_all_of_it_in_json(tmp_path: Path) -> None:
    manifest = make(tmp_path, z=2.0)
    found = data("canaries", tmp_path / "study.toml", "--delta", "0.0001", "--seed", "4")
    assert found["label"] == "code check on public data, 95 %"
    assert found["manifest"] == manifest.digest.hex()
    assert (found["flags"], found["delta"], found["rounds"], found["planned_rounds"]) == ([], 1e-4, 20, 20)
    assert 0 <= found["lower"] < found["upper"]
    # Such a claim is above what that many canaries could contradict, which is said.
    assert found["upper"] > found["largest"]
    assert "the accountant, more than they can deny" in run("canaries", tmp_path / "study.toml").stdout


def test_canaries_flag_missing_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.setattr(gate, "discrete_gaussian", lambda _variance, size, _entropy: np.zeros(size, np.int64))
    result = run("canaries", tmp_path / "study.toml")
    assert result.exit_code == 5
    assert [line[:4] for line in result.stdout.splitlines()] == ["FAIL", "ok  ", "FAIL", "code"]
    found = data("canaries", tmp_path / "study.toml", code=5, slug="audit.canaries")
    assert found["flags"] == ["epsilon", "noise"]
    assert found["lower"] > found["upper"]


def test_canaries_flag_missing_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.setattr(training, "clip", lambda vectors, _norm: sanitise(vectors))
    found = data("canaries", tmp_path / "study.toml", code=5, slug="audit.canaries")
    assert set(found["flags"]) >= {"epsilon", "sums"}


def test_canaries_read_studies_out_of_evidence(ran: Federation, tmp_path: Path) -> None:
    """The private study's document runs; the other one claims nothing; broken ones are no studies."""
    private, plain = ran.documents
    for digest in (private, plain):
        (tmp_path / f"{digest.hex()}.study").write_bytes(ran.documents[digest])
    found = data("canaries", tmp_path / f"{private.hex()}.study")
    assert (found["manifest"], found["flags"]) == (private.hex(), [])
    failure("canaries", tmp_path / f"{plain.hex()}.study", code=2, slug="audit.no-privacy")
    (tmp_path / "cut.study").write_bytes(ran.documents[private][:-1])
    assert run("canaries", tmp_path / "cut.study").exit_code == 5


def test_canaries_refuse_what_is_no_study(tmp_path: Path) -> None:
    failure("canaries", tmp_path / "none.toml", code=2, slug="study.file")
    (tmp_path / "bad.toml").write_text("name = 1")
    assert run("canaries", tmp_path / "bad.toml").exit_code == 2
    make(tmp_path)
    failure("canaries", tmp_path / "study.toml", "--delta", "0", code=2, slug="privacy.delta")


# -- the group ---------------------------------------------------------------------------------------------


def test_verification_imports_none_of_what_a_federation_runs_on(files: list[Path], trust: Path) -> None:
    """Offline: no network library, no torch, no flwr; of full batches not even dp-accounting."""
    program = (
        "import sys, json, wardround\n"
        f"sys.argv = ['wardround', 'audit', 'verify', *{[str(path) for path in files]!r}, '--trust', {str(trust)!r}]\n"
        "try:\n    wardround.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(json.loads(result.stdout.splitlines()[-1]))
    assert "common" in modules
    unwanted = {
        "torch",
        "opacus",
        "flwr",
        "grpc",
        "sqlalchemy",
        "duckdb",
        "dp_accounting",
        "client",
        "server",
    }
    assert modules.isdisjoint(unwanted)
