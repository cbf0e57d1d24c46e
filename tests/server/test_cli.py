"""Transcripts of ``wardround hub`` and ``wardround study``: what is printed, and the exit code."""

import json
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner, Result

from common.audit.cli import app as audit
from common.audit.trust import Trust
from common.enrolment import Admission
from common.identity import fingerprint
from common.secagg.codec import Layout
from common.study import Manifest, Study
from common.tasks.models.layout import layout
from common.tasks.state import state_bytes
from server.cli import hub, study
from server.payloads import Payloads
from server.store import Store
from tests.federation import small_study
from tests.server.conftest import RunningHub
from tests.server.hospitals import NAMES, complete, found, new_keys

runner = CliRunner()


def call(app: Any, *arguments: object) -> Result:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def envelope(result: Result, code: str = "ok") -> dict[str, Any]:
    """The one JSON line on standard output, and nothing beside it."""
    (line,) = result.stdout.splitlines()
    whole: dict[str, Any] = json.loads(line)
    assert set(whole) == {"schema", "status", "code", "data", "hint"}
    assert whole["schema"] == 1
    assert whole["code"] == code
    assert whole["status"] == ("ok" if result.exit_code == 0 else "error")
    data: dict[str, Any] = whole["data"]
    return data


def failed(app: Any, exit_code: int, code: str, *arguments: object) -> str:
    """Both forms of an error: text on standard error, and the envelope with --json."""
    text = call(app, *arguments)
    assert (text.exit_code, text.stdout) == (exit_code, "")
    assert text.stderr.startswith("error: ")
    assert f"[{code}]" in text.stderr
    machine = call(app, *arguments, "--json")
    assert machine.exit_code == exit_code
    envelope(machine, code)
    return text.stderr


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(small_study(list(NAMES[:3]), name="by command")), encoding="utf-8")
    return path


@pytest.fixture
def as_(running: RunningHub) -> Path:
    return running.founded.home.coordinator


def submitted(toml: Path, as_: Path) -> str:
    return str(envelope(call(study, "submit", toml, "--as", as_, "--json"))["digest"])


# -- hub -------------------------------------------------------------------------------------------------


def test_hub_init(tmp_path: Path) -> None:
    result = call(hub, "init", "--home", tmp_path / "one", "--address", "hub.example.org:8443")
    assert result.exit_code == 0
    assert "hub fingerprint" in result.stdout
    assert "compares it out of band" in result.stdout

    made = call(hub, "init", "--home", tmp_path / "two", "--address", "localhost:8443", "--json")
    data = envelope(made)
    assert set(data) == {"hub_key", "hub_fingerprint", "coordinator_key", "coordinator"}
    assert Path(data["coordinator"]).is_dir()

    again = failed(hub, 2, "hub.exists", "init", "--home", tmp_path / "two", "--address", "localhost:8443")
    assert "remedy: Choose a new folder." in again
    failed(hub, 2, "hub.address", "init", "--home", tmp_path / "three", "--address", "localhost")
    assert call(hub, "init", "--home", tmp_path / "three").exit_code == 2


def test_hub_admit(tmp_path: Path) -> None:
    founded = found(tmp_path, 0)
    keys = new_keys("St. Mary")
    request, out = tmp_path / "request.json", tmp_path / "admission.json"
    request.write_bytes(keys.request.to_bytes())
    home = founded.home.folder

    # An admission that cannot be written is not lost: the same command works when the folder is right.
    nowhere = tmp_path / "no" / "admission.json"
    failed(hub, 2, "output.file", "admit", request, "--home", home, "--out", nowhere)

    result = call(hub, "admit", request, "--home", home, "--out", out)
    assert result.exit_code == 0
    assert "St. Mary admitted as site 1" in result.stdout
    assert keys.request.fingerprint in result.stdout
    admission = Admission.from_bytes(out.read_bytes())
    admission.check_answers(keys.request)

    data = envelope(call(hub, "admit", request, "--home", home, "--out", out, "--json"))
    assert data == {
        "id": 1,
        "name": "St. Mary",
        "fingerprint": keys.request.fingerprint,
        "admission": str(out),
    }

    request.write_bytes(new_keys("st. mary").request.to_bytes())
    failed(hub, 3, "enrolment.duplicate", "admit", request, "--home", home, "--out", out)
    request.write_bytes(keys.request.to_bytes().replace(b"St. Mary", b"St. Mari"))
    failed(hub, 5, "identity.signature", "admit", request, "--home", home, "--out", out)
    failed(hub, 2, "hub.request", "admit", tmp_path / "none.json", "--home", home, "--out", out)
    failed(hub, 2, "settings.missing", "admit", request, "--home", tmp_path / "x", "--out", out)


def test_hub_run_refuses_a_folder_that_is_no_hub(tmp_path: Path) -> None:
    failed(hub, 2, "settings.missing", "run", "--home", tmp_path)


def test_hub_run_says_when_the_port_is_taken(running: RunningHub) -> None:
    result = call(hub, "run", "--home", running.founded.home.folder)
    assert result.exit_code == 1
    assert "cannot listen" in result.stderr
    assert "remedy: Choose a free port" in result.stderr


# -- study -----------------------------------------------------------------------------------------------


def test_study_submit_and_list(running: RunningHub, toml: Path, as_: Path) -> None:
    token = "5" * 32
    result = call(study, "submit", toml, "--as", as_, "--token", token)
    assert result.exit_code == 0
    assert "study 'by command' submitted" in result.stdout
    again = envelope(call(study, "submit", toml, "--as", as_, "--token", token, "--json"))
    assert again["digest"] in result.stdout
    assert set(again) == {"digest", "name", "status", "detail", "round", "rounds", "submitted"}

    listed = call(study, "list", "--as", as_)
    assert again["digest"][:12] in listed.stdout
    (entry,) = [
        s
        for s in envelope(call(study, "list", "--as", as_, "--json"))["studies"]
        if s["digest"] == again["digest"]
    ]
    assert (entry["name"], entry["round"], entry["rounds"]) == ("by command", 0, 3)


def test_study_submit_names_what_is_wrong(running: RunningHub, tmp_path: Path, toml: Path, as_: Path) -> None:
    failed(study, 2, "study.file", "submit", tmp_path / "none.toml", "--as", as_)
    failed(study, 2, "study.token", "submit", toml, "--as", as_, "--token", "short")
    failed(study, 2, "settings.missing", "submit", toml, "--as", tmp_path)
    toml.write_text(toml.read_text().replace("clip_norm = 1.0", "clip_norm = -1.0"))
    assert "privacy.clip_norm" in failed(study, 2, "study.privacy.clip_norm", "submit", toml, "--as", as_)
    toml.write_text("name = ")
    failed(study, 2, "study.toml", "submit", toml, "--as", as_)


def test_study_abort_and_watch(running: RunningHub, toml: Path, as_: Path) -> None:
    digest = submitted(toml, as_)
    failed(study, 3, "study.reason", "abort", digest, "--as", as_, "--reason", " ")
    assert call(study, "abort", digest, "--as", as_).exit_code == 2
    result = call(study, "abort", digest[:8], "--as", as_, "--reason", "wrong question")
    assert (result.exit_code, result.stdout) == (0, "study 'by command': aborted\n")
    failed(study, 3, "study.ended", "abort", digest, "--as", as_, "--reason", "again")
    failed(study, 2, "study.digest", "abort", "zzz", "--as", as_, "--reason", "x")

    watched = call(study, "watch", digest, "--as", as_)
    assert watched.exit_code == 1
    assert "by command: aborted, round 0 of 3" in watched.stdout
    assert "wrong question" in watched.stdout
    lines = call(study, "watch", digest, "--as", as_, "--json")
    assert lines.exit_code == 1
    (event,) = map(json.loads, lines.stdout.splitlines())
    assert (event["status"], event["detail"], event["cohort"]) == ("aborted", "wrong question", [])
    assert event["sites"][0] == {"id": 1, "name": "St. Mary", "decision": "", "online": False}


def test_study_watch_and_export_of_a_done_study(running: RunningHub, toml: Path, as_: Path) -> None:
    digest = submitted(toml, as_)
    out = toml.with_name("model.safetensors")
    failed(study, 3, "study.no-model", "export", digest, "--as", as_, "--out", out)
    store = running.hub.store
    rules = Study.from_toml(toml.read_text())
    tensors = layout(rules.model, rules.contract)
    models = [
        state_bytes({t.name: np.full(t.shape, number, np.float32) for t in tensors}, tensors)
        for number in (1, 2)
    ]
    for model in models:
        complete(store, digest, model)
    store.set_status(digest, "done")

    lines = call(study, "watch", digest, "--as", as_, "--json")
    assert lines.exit_code == 0
    events = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [event["round"] for event in events] == [1, 2]
    assert events[-1]["cohort"] == [1, 3]
    assert call(study, "watch", digest, "--as", as_).exit_code == 0

    found = envelope(call(study, "export", digest, "--as", as_, "--out", out, "--json"))
    assert (found["out"], found["bytes"]) == (str(out), len(models[1]))
    assert out.read_bytes() == models[1]
    assert Manifest.from_bytes(Path(found["manifest.json"]).read_bytes()).digest.hex() == digest
    assert "nothing is known" in Path(found["card.md"]).read_text()
    assert "no evaluation" in call(study, "results", digest, "--as", as_).stdout
    assert call(study, "export", digest, "--as", as_, "--out", out, "--round", 1).exit_code == 0
    assert out.read_bytes() == models[0]
    failed(study, 3, "study.no-model", "export", digest, "--as", as_, "--out", out, "--round", 9)
    failed(study, 2, "output.file", "export", digest, "--as", as_, "--out", toml / "x" / "y")


def test_study_show_tells_what_was_asked_and_what_became_of_it(
    running: RunningHub, toml: Path, as_: Path
) -> None:
    digest = submitted(toml, as_)
    store = running.hub.store
    store.lose_round(digest, store.start_round(digest), "site 2 'Northgate' did not open")
    complete(store, digest)
    store.start_round(digest)
    text = call(study, "show", digest[:8], "--as", as_).stdout
    for line in (
        f"  digest     {digest}",
        "  model      logistic_regression, local, fedavg at the hub",
        "  privacy    noise multiplier 8 in each of 1 steps a round",
        "  cohort     at least 3 of 3 hospitals, of which 1 may collude; 3 attempts a round, at most 6 rounds",
        "  site 2     Northgate: undecided, offline",
        "  lost       number 1: site 2 'Northgate' did not open",
        "  round 1    number 2, attempt 1, sites 1, 3, 0.500 s",
        "  now        number 3",
    ):
        assert line in text.splitlines()
    data = envelope(call(study, "show", digest, "--as", as_, "--json"))
    assert data["manifest"]["study"]["name"] == "by command"
    assert [(r["number"], r["step"], r["lost"]) for r in data["history"]] == [
        (1, None, "site 2 'Northgate' did not open"),
        (2, 1, ""),
        (3, None, ""),
    ]
    failed(study, 2, "study.digest", "show", "ffffffff", "--as", as_)


def test_hub_revoke_ends_an_admission_for_good(tmp_path: Path) -> None:
    founded = found(tmp_path)
    home = founded.home.folder
    data = envelope(
        call(hub, "revoke", "Northgate", "--home", home, "--reason", "its key was copied", "--json")
    )
    assert (data["id"], data["name"]) == (2, "Northgate")
    assert data["revoked"].endswith("Z its key was copied")
    assert [
        member.name for member in founded.signed_roster().verify(founded.admissions[1].hub_key).members
    ] == [
        "St. Mary",
        "Riverside",
    ]
    failed(hub, 3, "enrolment.unknown", "revoke", "Northgate", "--home", home, "--reason", "again")


def test_hub_roster_and_evidence_for_an_auditor(tmp_path: Path) -> None:
    founded = found(tmp_path, 3)
    home, roster, evidence = founded.home.folder, tmp_path / "roster.json", tmp_path / "hub.zip"
    data = envelope(call(hub, "roster", "--home", home, "--out", roster, "--json"))
    trusted = Trust.from_bytes(roster.read_bytes())
    assert data["hub_fingerprint"] == fingerprint(trusted.hub_key)
    assert data["fingerprints"] == {member.name: member.fingerprint for member in trusted.roster.members}
    text = call(hub, "roster", "--home", home, "--out", roster).stdout
    assert all(mark in text for mark in (data["hub_fingerprint"], *data["fingerprints"].values()))
    data = envelope(call(hub, "evidence", "--home", home, "--out", evidence, "--json"))
    assert data == {"evidence": str(evidence), "entries": 3, "studies": 0}
    checked = call(audit, "verify", evidence, "--trust", roster)
    assert checked.exit_code == 0, checked.stdout
    assert "no evidence was given of: St. Mary, Northgate, Riverside" in checked.stdout
    # A hospital that was admitted after the roster was handed out is no contradiction.
    founded.admit("Late")
    call(hub, "evidence", "--home", home, "--out", evidence)
    assert call(audit, "verify", evidence, "--trust", roster).exit_code == 0
    for command in ("roster", "evidence"):
        failed(hub, 2, "settings.missing", command, "--home", tmp_path / "none", "--out", tmp_path / "x")
        failed(hub, 2, "output.file", command, "--home", home, "--out", tmp_path / "none" / "x")


def test_hub_payloads_are_handed_over_and_erased(tmp_path: Path) -> None:
    founded = found(tmp_path, 3)
    home, out = founded.home.folder, tmp_path / "payloads.zip"
    with closing(Store.open(founded.home.database)) as store:
        digest = founded.store_study(store, founded.sign_study(aggregation__audit="payloads"))
        kept = Payloads(founded.home.payloads / digest, Layout(1, 0, 32)).attempt(1, 1)
        kept.write(2, 0, b"maskedma")
        kept.write(2, 1, b"maskedma")
        kept.seal([2])
        failed(hub, 3, "hub.payloads-in-use", "payloads", digest, "--home", home, "--erase")
        store.set_status(digest, "done")
    data = envelope(call(hub, "payloads", digest[:8], "--home", home, "--out", out, "--json"))
    assert data == {"study": digest, "rounds": 1, "out": str(out)}
    assert zipfile.ZipFile(out).read(f"payloads/{digest}/1/2") == b"maskedma" * 2
    failed(hub, 2, "output.file", "payloads", digest, "--home", home, "--out", out)
    failed(hub, 2, "hub.payloads", "payloads", digest, "--home", home)
    failed(hub, 2, "study.digest", "payloads", "ffffffff", "--home", home, "--erase")
    assert envelope(call(hub, "payloads", digest, "--home", home, "--erase", "--json"))["rounds"] == 1
    failed(hub, 3, "payloads.none", "payloads", digest, "--home", home, "--out", tmp_path / "other.zip")


def test_a_hub_that_is_down_is_exit_6(tmp_path: Path, toml: Path) -> None:
    coordinator = found(tmp_path, 0).home.coordinator
    text = failed(study, 6, "studies.unreachable", "list", "--as", coordinator)
    assert "try again" in text
    failed(study, 6, "studies.unreachable", "submit", toml, "--as", coordinator)


def test_a_roster_under_another_key_is_exit_5(
    running: RunningHub, tmp_path: Path, toml: Path, as_: Path
) -> None:
    settings = as_ / "coordinator.toml"
    text = settings.read_text()
    try:
        own = running.founded.coordinator.load_settings().hub_key
        settings.write_text(text.replace(own, found(tmp_path, 0).coordinator.load_settings().hub_key))
        failed(study, 5, "identity.signature", "submit", toml, "--as", as_)
    finally:
        settings.write_text(text)


def test_a_hub_without_hospitals_says_so(tmp_path: Path) -> None:
    from server.service import Hub

    founded = found(tmp_path, 0)
    service = Hub(founded.home)
    service.start()
    try:
        coordinator = founded.home.coordinator
        assert call(study, "list", "--as", coordinator).stdout == "no studies\n"
        path = tmp_path / "study.toml"
        path.write_text(tomli_w.dumps(small_study(list(NAMES[:3]))), encoding="utf-8")
        assert "hub admit" in failed(study, 3, "hub.no-sites", "submit", path, "--as", coordinator)
    finally:
        service.stop()
