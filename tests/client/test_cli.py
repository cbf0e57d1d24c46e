"""Transcripts of ``wardround site …``: what is printed, in text and JSON, and how each command ends."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from client.state import SiteHome
from common import messages
from common.audit.evidence import read_evidence
from common.ledger.entries import Approval, Consent, Pause, Restored
from common.ledger.store import Ledger
from tests.client.federation import ADDRESS, Federation
from tests.federation import extract_rows

CANARY = "Zq7canary"


def run(*arguments: str | Path, answer: str = "") -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    # Whatever happens, a person sees a sentence and never a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def data(*arguments: str | Path, code: int = 0, status: str = "ok") -> dict[str, Any]:
    """The envelope of a command with --json, checked; its data."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    (line,) = result.stdout.splitlines()
    envelope = json.loads(line)
    assert set(envelope) == {"schema", "status", "code", "data", "hint"}
    assert (envelope["schema"], envelope["status"]) == (1, status)
    if status == "ok":
        assert envelope["code"] == "ok"
    else:
        assert f"[{envelope['code']}]" in result.stderr
    found = envelope["data"]
    assert isinstance(found, dict)
    return found | ({"code": envelope["code"], "hint": envelope["hint"]} if status == "error" else {})


def failure(*arguments: str | Path, code: int) -> dict[str, Any]:
    """A command that fails: the same code in text and in JSON, and a remedy or a clear problem."""
    text = run(*arguments)
    assert text.exit_code == code, text.output
    assert text.stdout == ""
    assert text.stderr.startswith("error: ")
    envelope = data(*arguments, code=code, status="error")
    assert f"[{envelope['code']}]" in text.stderr
    return envelope


def decisions(federation: Federation) -> list[tuple[str, str]]:
    return [(e.decision, e.reason) for e in federation.entries(1) if isinstance(e, Approval)]


@pytest.fixture
def home(federation: Federation) -> Path:
    return federation.sites[1].folder


# -- init ------------------------------------------------------------------------------------------------


def test_init_tells_the_next_steps(tmp_path: Path) -> None:
    result = run("init", "--home", tmp_path / "a", "--name", "St. Mary", "--hub", ADDRESS)
    assert result.exit_code == 0
    for step in ("1. send", "2. put", "3. edit", "4. wardround site run"):
        assert step in result.stdout
    made = data("init", "--home", tmp_path / "b", "--name", "St. Mary", "--hub", ADDRESS)
    assert set(made) == {"request", "policy", "fingerprint"}
    assert Path(made["request"]).exists()
    assert SiteHome(tmp_path / "b").policy == Path(made["policy"])
    assert made["fingerprint"] not in result.stdout


def test_init_refuses_what_is_malformed_or_there_already(tmp_path: Path) -> None:
    site = ("init", "--home", tmp_path / "site")
    assert failure(*site, "--name", 'a"b', "--hub", ADDRESS, code=2)["code"] == "site.name"
    assert failure(*site, "--name", "St. Mary", "--hub", "nowhere", code=2)["code"] == "site.hub"
    assert run(*site, "--name", "St. Mary").exit_code == 2
    assert not (tmp_path / "site").exists()
    run(*site, "--name", "St. Mary", "--hub", ADDRESS)
    assert failure(*site, "--name", "St. Mary", "--hub", ADDRESS, code=2)["code"] == "site.exists"


# -- before and after admission --------------------------------------------------------------------------


def test_a_site_that_is_not_admitted_yet_is_told_so(tmp_path: Path) -> None:
    run("init", "--home", tmp_path, "--name", "St. Mary", "--hub", ADDRESS)
    for command in ("requests", "budget", "pause", "resume"):
        assert failure(command, "--home", tmp_path, code=3)["code"] == "site.not-admitted"


def test_a_folder_that_is_no_site_is_a_usage_error(tmp_path: Path) -> None:
    for command in ("requests", "budget"):
        assert failure(command, "--home", tmp_path, code=2)["code"] == "settings.missing"


def test_foreign_keys_fail_verification(federation: Federation, home: Path) -> None:
    federation.sites[1].ledger_key.write_bytes(federation.sites[2].ledger_key.read_bytes())
    assert failure("budget", "--home", home, code=5)["code"] == "site.foreign-keys"


def test_a_second_agent_on_a_folder_is_refused(
    federation: Federation, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.cli.log_to_stderr", lambda: None)
    with federation.sites[1].locked():
        assert failure("run", "--home", home, code=3)["code"] == "site.locked"


# -- approve ---------------------------------------------------------------------------------------------


def test_received_studies_are_listed_with_their_decision(federation: Federation, home: Path) -> None:
    assert run("requests", "--home", home).stdout == "no studies received\n"
    assert data("requests", "--home", home) == {"studies": []}
    first, second = federation.manifest(), federation.manifest(name="second")
    federation.receive(1, first)
    federation.decide(1, second, "denied")
    listed = data("requests", "--home", home)["studies"]
    assert {s["digest"]: (s["name"], s["decision"]) for s in listed} == {
        first.digest.hex(): ("small", "received"),
        second.digest.hex(): ("second", "denied"),
    }
    lines = run("requests", "--home", home).stdout.splitlines()
    assert f"{first.digest.hex()[:12]}  received  small" in lines
    assert f"{second.digest.hex()[:12]}  denied    second" in lines


def test_a_person_reads_and_says_yes(federation: Federation, home: Path) -> None:
    digest = federation.receive(1, federation.manifest())
    result = run("approve", digest[:8], "--home", home, "--by", "Dr. Roe", answer="y\n")
    assert result.exit_code == 0
    for shown in (digest, "purpose", "budget", "compare", "Approve it? [y/N]", f"approved: {digest}"):
        assert shown in result.stdout
    assert decisions(federation) == [("approved", "Dr. Roe: approved")]


@pytest.mark.parametrize("answer", ["n\n", "\n"])
def test_anything_but_yes_decides_nothing(federation: Federation, home: Path, answer: str) -> None:
    digest = federation.receive(1, federation.manifest())
    result = run("approve", digest, "--home", home, "--by", "Dr. Roe", answer=answer)
    assert result.exit_code == 2
    assert "[site.not-confirmed]" in result.stderr
    assert run("approve", digest, "--home", home, "--by", "Dr. Roe").exit_code == 1
    envelope = data("approve", digest, "--home", home, "--by", "Dr. Roe", code=2, status="error")
    assert envelope["code"] == "site.not-confirmed"
    assert decisions(federation) == []
    assert not federation.sites[1].pins.exists()


def test_a_script_says_yes_in_advance_and_reads_json(federation: Federation, home: Path) -> None:
    digest = federation.receive(1, federation.manifest())
    told = data(
        "approve",
        digest,
        "--home",
        home,
        "--yes",
        "--fingerprints-compared",
        "--by",
        "Dr. Roe",
        "--reason",
        "ethics 7/26",
    )
    assert (told["digest"], told["decision"], told["rounds"]) == (digest, "approved", 3)
    assert set(told["new_fingerprints"]) == {federation.name(2), federation.name(3)}
    assert decisions(federation) == [("approved", "Dr. Roe: ethics 7/26")]
    command = (digest, "--home", home, "--yes", "--by", "Dr. Roe")
    refusal = failure("approve", *command, "--fingerprints-compared", code=3)
    assert refusal["code"] == "site.decided"
    assert failure("deny", *command, "--reason", "no", code=3)["code"] == "site.decision"
    again = data("withdraw", *command, "--reason", "patients asked")
    assert again == {"digest": digest, "name": "small", "decision": "denied"}
    assert failure("withdraw", *command, "--reason", "again", code=3)["code"] == "site.decided"
    assert decisions(federation)[1:] == [("denied", "Dr. Roe: patients asked")]


def test_a_decision_names_who_took_it(
    federation: Federation, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = federation.receive(1, federation.manifest())
    monkeypatch.delenv("USER", raising=False)
    assert (
        failure("approve", digest, "--home", home, "--yes", "--fingerprints-compared", code=2)["code"]
        == "site.by"
    )
    assert (
        failure(
            "approve", digest, "--home", home, "--yes", "--fingerprints-compared", "--by", "a\nb", code=2
        )["code"]
        == "ledger.reason"
    )
    assert decisions(federation) == []
    monkeypatch.setenv("USER", "roe")
    assert run("approve", digest, "--home", home, "--yes", "--fingerprints-compared").exit_code == 0
    assert decisions(federation) == [("approved", "roe: approved")]


def test_a_study_is_shown_whole_and_compared(federation: Federation, home: Path) -> None:
    first = federation.manifest(consents=[federation.name(2)])
    old, new = first, federation.manifest(training__rounds=4, privacy__noise_multiplier=9.0)
    digest, later = federation.receive(1, old), federation.receive(1, new)
    text = run("show", digest, "--home", home).stdout
    for shown in ("legal basis", "n = 3, t = 1", "n - m = 0", "while at most t collude", "of 3 if all other",
                  f"consents     {federation.name(2)}", "more rounds like these", "decision     received"):  # fmt: skip
        assert shown in text, shown
    listed = run("show", digest, "--egress", "--home", home).stdout
    assert "train.upload" in listed
    assert digest in listed
    kinds = [one["message"] for one in data("show", digest, "--egress", "--home", home)["messages"]]
    assert kinds == list(messages.KINDS)
    told = data("show", digest, "--home", home)
    assert told["planned_epsilon"] <= told["largest_epsilon"]
    assert failure("diff", later, "--home", home, code=2)["code"] == "site.diff"
    federation.decide(1, old)
    found = data("diff", later, "--home", home)["changes"]
    paths = {change["path"]: (change["old"], change["new"]) for change in found}
    assert paths["training.rounds"] == (3, 4)
    assert paths["privacy.noise_multiplier"] == (8.0, 9.0)
    assert data("diff", later, digest, "--home", home)["changes"] == found
    assert run("diff", digest, digest, "--home", home).stdout == "no changes\n"


def test_an_unknown_digest_is_a_usage_error(home: Path) -> None:
    assert (
        failure("approve", "abcdef", "--home", home, "--yes", "--fingerprints-compared", code=2)["code"]
        == "site.digest"
    )


def test_what_the_policy_forbids_can_be_denied_only(federation: Federation, home: Path) -> None:
    digest = federation.receive(1, federation.manifest())
    federation.edit_policy(1, rules={"coordinators": []})
    command = ("approve", digest, "--home", home, "--yes", "--fingerprints-compared", "--by", "t")
    refusal = failure(*command, code=3)
    assert refusal["code"] == "policy.coordinator"
    assert "rules.coordinators" in refusal["hint"]
    assert decisions(federation) == []
    shown = data("show", digest, "--home", home)
    assert (shown["decision"], shown["refused"]) == ("received", "policy.coordinator")
    denial = ("deny", digest, "--home", home, "--by", "t")
    assert run(*denial, "--yes").exit_code == 2
    result = run(*denial, "--reason", "unknown", answer="y\n")
    assert result.exit_code == 0
    assert f"denied: {digest}" in result.stdout
    assert federation.coordinator in result.stdout
    assert decisions(federation) == [("denied", "t: unknown")]


def test_too_little_budget_is_exit_4(federation: Federation, home: Path) -> None:
    digest = federation.receive(1, federation.manifest())
    federation.edit_policy(1, register={"epsilon_t": 0.5, "epsilon_w": 0.5})
    refusal = failure(
        "approve", digest, "--home", home, "--yes", "--fingerprints-compared", "--by", "t", code=4
    )
    assert (refusal["code"], refusal["rounds_left"]) == ("budget.exhausted", 0)
    assert decisions(federation) == []


def test_an_altered_study_is_exit_5(federation: Federation, home: Path) -> None:
    digest = federation.receive(1, federation.manifest())
    path = federation.sites[1].study(digest)
    path.write_bytes(path.read_bytes().replace(b'"rounds":3', b'"rounds":9'))
    for verb in (("approve", "--fingerprints-compared"), ("deny", "--reason", "altered"), ("show",)):
        options = () if verb == ("show",) else ("--yes", "--by", "t")
        failure(verb[0], digest, "--home", home, *verb[1:], *options, code=5)
    assert decisions(federation) == []


def test_data_that_break_the_contract_are_exit_7(federation: Federation, home: Path) -> None:
    digest = federation.receive(1, federation.manifest())
    command = ("approve", digest, "--home", home, "--yes", "--fingerprints-compared", "--by", "t")
    federation.write_extract(1, [(CANARY, CANARY, CANARY)], "patient,age,readmitted")
    refusal = failure(*command, code=7)
    assert refusal["code"] == "source.column"
    federation.write_extract(1, [*extract_rows(1), (CANARY, 1)])
    assert failure(*command, code=7)["code"] == "source.malformed"
    for result in (run(*command), run(*command, "--json")):
        assert CANARY not in result.output
    assert decisions(federation) == []


# -- pause and resume ------------------------------------------------------------------------------------


def test_a_pause_is_written_down_and_ends(federation: Federation, home: Path) -> None:
    told = data("pause", "--home", home, "--by", "Dr. Roe", "--reason", "maintenance")
    assert told == {"paused": True}
    refusal = failure("pause", "--home", home, "--by", "Dr. Roe", code=3)
    assert refusal["code"] == "ledger.pause"
    # A person may read, decide and look at the budget all the same.
    digest = federation.receive(1, federation.manifest())
    command = ("approve", digest, "--home", home, "--yes", "--fingerprints-compared", "--by", "t")
    assert run(*command).exit_code == 0
    assert data("budget", "--home", home)["charges"] == 0
    result = run("resume", "--home", home, "--by", "Dr. Roe")
    assert (result.exit_code, result.stdout) == (0, f"resumed: the site in {home}\n")
    assert failure("resume", "--home", home, "--by", "Dr. Roe", code=3)["code"] == "ledger.pause"
    pauses = [(e.decision, e.reason) for e in federation.entries(1) if isinstance(e, Pause)]
    assert pauses == [("paused", "Dr. Roe: maintenance"), ("resumed", "Dr. Roe: resumed")]


def test_a_pause_names_who_takes_it(
    federation: Federation, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USER", raising=False)
    assert failure("pause", "--home", home, code=2)["code"] == "site.by"
    assert failure("pause", "--home", home, "--by", "a\nb", code=2)["code"] == "ledger.reason"
    assert not any(isinstance(entry, Pause) for entry in federation.entries(1))


# -- budget ----------------------------------------------------------------------------------------------


def test_budget_shows_both_views_and_both_caps(federation: Federation, home: Path) -> None:
    manifest = federation.manifest()
    guard = federation.guard(1)
    admitted = guard.check_runnable(manifest)
    empty = data("budget", "--home", home)
    assert (empty["epsilon_t"], empty["epsilon_w"], empty["charges"]) == (0.0, 0.0, 0)
    guard.charge(manifest, admitted, 1)
    federation.edit_policy(1, register={"epsilon_w": 2.0})
    spent = guard.budget()
    guard.close()
    assert data("budget", "--home", home) == {
        "register": guard.register_id,
        "epsilon_t": spent.epsilon_t,
        "cap_t": 3.0,
        "epsilon_w": spent.epsilon_w,
        "cap_w": 2.0,
        "delta": 1e-6,
        "charges": 1,
        "reserved": [],
        "more_rounds": 0,
        "like": "",
        "closed": False,
        "reopened": False,
    }
    text = run("budget", "--home", home).stdout
    assert f"register {guard.register_id}: 1 charges, delta 1e-06" in text
    assert f"epsilon {spent.epsilon_t:.4f} of 3" in text
    assert f"epsilon {spent.epsilon_w:.4f} of 2" in text


def test_budget_shows_what_is_reserved_and_how_many_rounds_are_left(
    federation: Federation, home: Path
) -> None:
    manifest = federation.manifest()
    federation.decide(1, manifest)
    found = data("budget", "--home", home)
    assert found["reserved"] == [{"study": "small", "rounds": 3}]
    text = run("budget", "--home", home).stdout
    assert "  reserved                 3 rounds of small\n" in text
    assert f"{found['more_rounds']} more rounds like those of small after the reserved ones" in text
    guard = federation.guard(1)
    assert guard.rounds_left(manifest, guard.check_runnable(manifest)) == found["more_rounds"] + 3
    guard.close()


def test_consent_is_given_and_withdrawn_without_the_hub(federation: Federation, home: Path) -> None:
    manifest = federation.manifest()
    digest = federation.receive(1, manifest)
    by = ("--by", "A. Person")
    assert failure("consent", digest, "--home", home, *by, code=3)["code"] == "guard.consent"
    assert failure("consent", "0" * 12, "--home", home, *by, code=2)["code"] == "site.digest"
    federation.decide(1, manifest)
    given = data("consent", digest[:8], "--home", home, *by, "--reason", "the report was read")
    assert given == {"digest": digest, "consent": "given"}
    assert failure("consent", digest, "--home", home, *by, code=3)["code"] == "guard.consent"
    assert run("consent", digest, "--home", home, *by, "--withdraw").stdout.startswith("consent withdrawn")
    said = [(e.decision, e.reason) for e in federation.entries(1) if isinstance(e, Consent)]
    assert said == [
        ("given", "A. Person: the report was read"),
        ("withdrawn", "A. Person: consent withdrawn"),
    ]


def test_a_raised_cap_is_exit_3_and_a_broken_policy_exit_2(federation: Federation, home: Path) -> None:
    run("budget", "--home", home)
    federation.edit_policy(1, register={"epsilon_t": 4.0})
    assert failure("budget", "--home", home, code=3)["code"] == "guard.cap-raised"
    federation.edit_policy(1, register={"epsilon": 4.0})
    assert failure("budget", "--home", home, code=2)["code"] == "settings.field"


def test_a_lost_ledger_is_exit_3(federation: Federation, home: Path) -> None:
    federation.sites[1].ledger.unlink()
    assert failure("budget", "--home", home, code=3)["code"] == "ledger.missing"


# -- evidence, backup and restore ------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_evidence_is_one_file_for_anyone(federation: Federation, home: Path, tmp_path: Path) -> None:
    digest = federation.manifest()
    federation.decide(1, digest)
    out = tmp_path / "evidence.zip"
    result = run("evidence", "--home", home, "--out", out)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"evidence written to {out}: {len(federation.entries(1))} ledger entries, 1 studies",
        "  anyone can check it: wardround audit verify",
    ]
    assert mode(out) & 0o044
    assert read_evidence(out).party == 1
    other = tmp_path / "other.zip"
    assert data("evidence", "--home", home, "--out", other) == {
        "evidence": str(other),
        "entries": len(federation.entries(1)),
        "studies": 1,
    }
    # It works beside the agent.
    with federation.sites[1].locked():
        assert run("evidence", "--home", home, "--out", tmp_path / "third.zip").exit_code == 0


def test_what_hinders_evidence_is_named(federation: Federation, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "evidence.zip"
    command = ("evidence", "--home", home, "--out", out)
    assert failure(*command, code=3)["code"] == "ledger.empty"
    manifest = federation.manifest()
    federation.decide(1, manifest)
    study = federation.sites[1].study(manifest.digest.hex())
    study.write_bytes(study.read_bytes()[:-1])
    assert failure(*command, code=5)["code"] == "evidence.study"
    study.unlink()
    assert (
        failure("evidence", "--home", home, "--out", tmp_path / "no" / "e.zip", code=2)["code"]
        == "output.file"
    )
    ledger = federation.sites[1].ledger
    assert failure("evidence", "--home", home, "--out", ledger, code=2)["code"] == "output.file"
    assert not out.exists()
    assert run(*command).exit_code == 0
    assert failure(*command, code=2)["code"] == "output.file"
    federation.sites[1].admission.unlink()
    assert (
        failure("evidence", "--home", home, "--out", tmp_path / "b.zip", code=3)["code"]
        == "site.not-admitted"
    )
    assert (
        failure("evidence", "--home", tmp_path, "--out", tmp_path / "b.zip", code=2)["code"]
        == "settings.missing"
    )
    assert not (tmp_path / "b.zip").exists()


def test_a_backup_says_what_it_holds(federation: Federation, home: Path, tmp_path: Path) -> None:
    federation.decide(1, federation.manifest())
    out = tmp_path / "backup.zip"
    with federation.sites[1].locked():
        result = run("backup", "--home", home, "--out", out)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"backup written to {out}: 11 files, {len(federation.entries(1))} ledger entries"
    assert "private keys" in lines[1]
    assert "budget is closed" in lines[2]
    assert mode(out) == 0o600
    other = tmp_path / "other.zip"
    told = data("backup", "--home", home, "--out", other)
    assert told == {"backup": str(other), "files": 11, "entries": len(federation.entries(1))}
    assert mode(other) == 0o600
    assert failure("backup", "--home", home, "--out", out, code=2)["code"] == "output.file"
    assert (
        failure("backup", "--home", tmp_path, "--out", tmp_path / "x", code=2)["code"] == "settings.missing"
    )
    federation.sites[1].ledger.unlink()
    assert failure("backup", "--home", home, "--out", tmp_path / "x", code=3)["code"] == "ledger.missing"
    assert not (tmp_path / "x").exists()


def test_a_person_restores_and_is_told_what_follows(
    federation: Federation, home: Path, tmp_path: Path
) -> None:
    manifest = federation.manifest()
    federation.decide(1, manifest)
    file, new = tmp_path / "backup.zip", tmp_path / "new"
    run("backup", "--home", home, "--out", file)
    command = ("restore", file, "--home", new, "--by", "Dr. Roe", "--reason", "disk lost")
    for answer in ("n\n", "\n", ""):
        result = run(*command, answer=answer)
        assert result.exit_code == (2 if answer else 1)
        assert not new.exists()
    envelope = data(*command, code=2, status="error")
    assert envelope["code"] == "site.not-confirmed"
    result = run(*command, answer="y\n")
    assert result.exit_code == 0
    for shown in (
        "St. Mary, backed up at",
        f"with {len(federation.entries(1))} ledger entries",
        f"are charged now: 6 of study {manifest.digest.hex()[:12]}",
        "its register is closed",
        "unless two officers reopen it",
        f"Restore it into {new}? [y/N]",
        f"restored: the site in {new}, closed",
    ):
        assert shown in result.stdout
    with Ledger.open(SiteHome(new).ledger) as ledger:
        last = ledger.entries()[-1]
    assert isinstance(last, Restored)
    assert last.reason == "Dr. Roe: disk lost"
    # What is there can be shown: the budget with the reservation, and evidence.
    assert data("budget", "--home", new)["charges"] == 6
    assert run("evidence", "--home", new, "--out", tmp_path / "e.zip").exit_code == 0
    assert failure(*command, "--yes", code=2)["code"] == "restore.folder"


def test_a_script_restores_and_reads_json(federation: Federation, home: Path, tmp_path: Path) -> None:
    manifest = federation.manifest()
    federation.decide(1, manifest)
    file = tmp_path / "backup.zip"
    run("backup", "--home", home, "--out", file)
    told = data("restore", file, "--home", tmp_path / "a", "--by", "Dr. Roe", "--yes")
    assert told.pop("time").endswith("Z")
    assert told == {
        "name": "St. Mary",
        "entries": len(federation.entries(1)),
        "reserved": {manifest.digest.hex(): 6},
        "charged": True,
    }
    run("pause", "--home", home, "--by", "Dr. Roe")
    run("backup", "--home", home, "--out", tmp_path / "paused.zip")
    result = run("restore", tmp_path / "paused.zip", "--home", tmp_path / "b", "--by", "Dr. Roe", "--yes")
    assert result.exit_code == 0
    assert "cannot be charged: the site was paused or closed: 6 of study" in result.stdout
    assert data("budget", "--home", tmp_path / "b")["charges"] == 0


def test_what_hinders_a_restore_is_named_and_changes_nothing(
    federation: Federation, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.guard(1).close()
    file, new = tmp_path / "backup.zip", tmp_path / "new"
    run("backup", "--home", home, "--out", file)
    options = ("--home", new, "--by", "Dr. Roe", "--yes")
    assert failure("restore", tmp_path / "none.zip", *options, code=2)["code"] == "restore.file"
    assert failure("restore", home / "policy.toml", *options, code=5)["code"] == "restore.backup"
    good = file.read_bytes()
    file.write_bytes(good[:-100])
    refusal = failure("restore", file, *options, code=5)
    assert (refusal["code"], "nothing was written" in refusal["hint"]) == ("restore.backup", True)
    file.write_bytes(good)
    assert failure("restore", file, "--home", home, "--by", "t", "--yes", code=2)["code"] == "restore.folder"
    assert failure("restore", file, "--home", new, "--by", "a\nb", "--yes", code=2)["code"] == "ledger.reason"
    assert run("restore", file, "--home", file, "--by", "t", "--yes").exit_code == 2
    monkeypatch.delenv("USER", raising=False)
    assert failure("restore", file, "--home", new, "--yes", code=2)["code"] == "site.by"
    assert not new.exists()


def test_the_command_line_imports_neither_torch_nor_flower() -> None:
    import subprocess
    import sys

    script = "import sys, client.cli; print({'torch', 'opacus', 'flwr', 'grpc'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "set()\n"
