"""Whole studies with real processes: the hub's command, the agents, their workers, over mutual TLS."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.ledger.entries import Approval, Charge, Closed, Opened, Outcome, PolicyChange
from common.ledger.store import Ledger
from common.study import Study
from server.processes import Processes
from tests.federation import Federation, extract_rows, small_study


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "logs") as running:
        yield running


def entries(federation: Federation, number: int) -> list[object]:
    with Ledger.open(federation.sites[number - 1].ledger) as ledger:
        ledger.verify()
        return list(ledger.entries())


def test_a_whole_study_with_differential_privacy(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    agents = federation.start()
    digest = federation.submit(small_study(federation.names))
    federation.approve_all(digest)
    events = federation.watch(digest)

    assert events[-1]["status"] == "done", federation.log("hub")
    told = [event["round"] for event in events if event["cohort"]]
    assert sorted(set(told)) == [1, 2, 3]
    assert events[-1]["cohort"] == [1, 2, 3]
    for agent in agents:
        assert agent.process.wait(20) == 0

    # Each hospital's ledger tells the same story: opened, approved, then a charge, what left and what it came to each round.
    for number in (1, 2, 3):
        story = entries(federation, number)
        kinds = [type(entry) for entry in story]
        # The hub's closing of the study may overtake the result of its last round.
        kinds.remove(Closed)
        assert kinds == [Opened, PolicyChange, Approval, *[Charge, Outcome, Outcome] * 3]
        rounds = [entry.event["round"] for entry in story if isinstance(entry, Charge)]
        assert rounds == [1, 2, 3]
        outcomes = [entry for entry in story if isinstance(entry, Outcome)]
        assert {outcome.state for outcome in outcomes} == {"released"}
        assert [outcome.reason for outcome in outcomes] == ["upload_started", "completed"] * 3
        budget = federation.budget(number)
        assert budget["charges"] == 3
        assert 0 < budget["epsilon_t"] <= budget["cap_t"] == 3.0

    # Private keys and the secrets of the run are closed to others, and the run is erased.
    for home in federation.sites:
        for path in (home.tls_key, home.protocol_key, home.ledger_key, home.split_secret, home.runs):
            assert path.stat().st_mode & 0o077 == 0

    out = tmp_path / "model.safetensors"
    processes.json("study", "export", digest, "--as", federation.coordinator, "--out", str(out))
    model = load_file(out)
    assert {name: array.shape for name, array in model.items()} == {"weight": (2, 2), "bias": (2,)}
    assert np.isfinite(model["weight"]).all()
    listed = processes.json("study", "list", "--as", federation.coordinator)["studies"]
    assert [(s["digest"], s["status"], s["round"]) for s in listed] == [(digest, "done", 3)]


def test_a_whole_study_with_shared_noise(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    agents = federation.start()
    study = small_study(
        federation.names,
        training__mode="shared-noise",
        training__engine="bookkeeping",
        training__average_last=2,
        training__server={"strategy": "fedavgm", "momentum": 0.5},
        aggregation__codec__step=0.001,
    )
    digest = federation.submit(study)
    federation.approve_all(digest)
    assert federation.watch(digest)[-1]["status"] == "done", federation.log("hub")
    for agent in agents:
        assert agent.process.wait(20) == 0

    for number in (1, 2, 3):
        story = entries(federation, number)
        events = [entry.event for entry in story if isinstance(entry, Charge)]
        assert [event["mode"] for event in events] == ["shared-noise"] * 3
        uploads = [entry for entry in story if isinstance(entry, Outcome) and entry.u_size]
        assert {(one.reason, one.u_size) for one in uploads} == {("upload_started", 3)}
        # Delta_g = 1003: each of two honest hospitals has half of the variance.
        assert {one.s_g_squared for one in uploads} == {(8**2 * 1003**2 + 4) // 2 + 4}
        budget = federation.budget(number)
        # One share alone has a noise smaller by the root of 2.
        assert 0 < budget["epsilon_t"] < budget["epsilon_w"] <= budget["cap_w"]

    out = tmp_path / "model.safetensors"
    processes.json("study", "export", digest, "--as", federation.coordinator, "--out", str(out))
    assert np.abs(load_file(out)["weight"]).max() > 0


def plain_fedavg(study: Study, hospitals: int, patients: int) -> dict[str, np.ndarray]:
    """FedAvg of full-batch softmax regression in float64, straight from the definition."""
    weight, bias = np.zeros((2, 2)), np.zeros(2)
    for _ in range(study.training.rounds):
        moved = []
        for site in range(1, hospitals + 1):
            rows = extract_rows(site, patients)
            x = np.array([[row[1] / 50 - 1, (row[2] - 10) / 20 - 1] for row in rows])
            y = np.array([["no", "yes"].index(row[3]) for row in rows])
            w, b = weight.copy(), bias.copy()
            for _ in range(study.training.steps):
                scores = x @ w.T + b
                p = np.exp(scores - scores.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                p[np.arange(len(y)), y] -= 1
                w = w - study.training.learning_rate * (p.T @ x) / len(y)
                b = b - study.training.learning_rate * p.mean(axis=0)
            moved.append((w, b))
        weight = np.mean([w for w, _ in moved], axis=0)
        bias = np.mean([b for _, b in moved], axis=0)
    return {"weight": weight, "bias": bias}


def test_without_dp_the_model_is_plain_fedavg(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes, rules={"allow_studies_without_differential_privacy": True})
    federation.start()
    plain = small_study(
        federation.names,
        privacy={"kind": "without_differential_privacy"},
        training__rounds=4,
        training__steps=3,
        training__learning_rate=2.0,
    )
    digest = federation.submit(plain)
    federation.approve_all(digest)
    assert federation.watch(digest)[-1]["status"] == "done", federation.log("hub")

    out = tmp_path / "model.safetensors"
    processes.json("study", "export", digest, "--as", federation.coordinator, "--out", str(out))
    model = load_file(out)
    study = Study.from_toml((tmp_path / "small.toml").read_text())
    reference = plain_fedavg(study, 3, federation.patients)
    # Nearest rounding moves an upload by at most half a step; the state is float32 between rounds.
    tolerance = study.training.rounds * (study.aggregation.codec.step + 2**-22)
    for name, expected in reference.items():
        assert np.abs(model[name] - expected).max() <= tolerance
        assert np.abs(expected).max() > 1000 * tolerance
    # Such a study makes the register's epsilon infinite for ever, and the command says so.
    assert federation.budget(1)["epsilon_t"] == "infinite"


def test_a_register_that_cannot_pay_refuses_to_approve(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes, epsilon=0.5)
    federation.start()
    digest = federation.submit(small_study(federation.names))
    federation.wait_for_offer(1, digest)
    home = str(federation.sites[0].folder)
    running = processes.start(
        "approve",
        "site",
        "approve",
        digest,
        "--home",
        home,
        "--yes",
        "--fingerprints-compared",
        "--by",
        "t",
        "--json",
    )
    lines = list(running.lines(30))
    assert running.process.wait(10) == 4
    assert '"budget.exhausted"' in lines[-1]
    assert [type(entry) for entry in entries(federation, 1)] == [Opened, PolicyChange]


def test_a_budget_lowered_after_approval_stops_before_computing(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    agents = federation.start()
    study = small_study(
        federation.names, training__rounds=2, aggregation__deadline_s=20, aggregation__quorum_s=2
    )
    digest = federation.submit(study)
    for number in (1, 2):
        federation.approve(number, digest)
    for number in (1, 2, 3):
        federation.wait_for_offer(number, digest)
    # Between this hospital's approval and round 1, its cap is lowered below what one round costs.
    federation.edit_policy(1, register={"epsilon_t": 0.01, "epsilon_w": 0.01})
    federation.approve(3, digest)
    last = federation.watch(digest)[-1]
    assert last["status"] == "failed"
    assert last["detail"] == "3 hospitals are needed; waiting for St. Mary was in vain"
    assert agents[0].process.wait(20) == 4
    assert not any(isinstance(entry, Charge) for entry in entries(federation, 1))
    assert "unavailable: the register can pay 0 more such rounds" in federation.log("site1")


def test_a_study_changed_after_approval_is_not_run(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    federation.start_hub()
    first = federation.start_site(1)
    federation.start_site(2)
    digest = federation.submit(small_study(federation.names, aggregation__quorum_s=5))
    federation.approve(1, digest)
    federation.approve(2, digest)
    # The coordinator submits the same study with more rounds: another digest, which nobody has approved.
    changed = federation.submit(small_study(federation.names, training__rounds=5))
    assert changed != digest
    # While the agent is down, the stored document of the approved study is replaced by another.
    first.end()
    stored = federation.sites[0].study(digest)
    altered = stored.read_bytes().replace(b'"rounds":3', b'"rounds":9')
    assert altered != stored.read_bytes()
    stored.write_bytes(altered)
    federation.start_site(1)
    federation.start_site(3)
    federation.approve(3, digest)
    federation.wait(lambda: "unavailable: " in federation.log("site1"), "the altered study was not refused")
    # Two of three hospitals are too few for this study's cohort, so it ends without a round.
    last = federation.watch(digest)[-1]
    assert (last["status"], last["round"]) == ("failed", 0)
    for number in (1, 2, 3):
        assert not any(isinstance(entry, Charge) for entry in entries(federation, number))


def test_a_denial_ends_the_study(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    federation.start()
    digest = federation.submit(small_study(federation.names))
    federation.approve(1, digest)
    federation.wait_for_offer(2, digest)
    home = str(federation.sites[1].folder)
    processes.json("site", "deny", digest, "--home", home, "--reason", "no legal basis", "--by", "t", "--yes")
    last = federation.watch(digest)[-1]
    assert last["status"] == "denied"
    assert "Northgate" in last["detail"]
    assert not any(isinstance(entry, Charge) for entry in entries(federation, 1))


def test_an_aborted_study_ends_and_says_why(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    federation.start()
    digest = federation.submit(small_study(federation.names))
    federation.wait_for_offer(1, digest)
    processes.json("study", "abort", digest, "--as", federation.coordinator, "--reason", "wrong question")
    last = federation.watch(digest)[-1]
    assert (last["status"], last["detail"]) == ("aborted", "wrong question")


def test_unknown_site_and_wrong_key_are_refused_at_the_link(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path, processes)
    federation.start_hub()
    with sqlite3.connect(federation.hub_home.database) as database:
        database.execute("DELETE FROM sites WHERE id = 1")
        database.execute("UPDATE sites SET tls_fingerprint = ? WHERE id = 2", ("0" * 64,))
    unknown, wrong = federation.start_site(1), federation.start_site(2)
    assert unknown.process.wait(30) == 3
    assert wrong.process.wait(30) == 3
    log = federation.log("hub")
    assert "site 1 is not on the roster" in log
    assert "site 2 holds another key than admitted" in log
    assert "is not on the roster" in federation.log("site1")


def test_a_site_of_another_hub_never_attaches(tmp_path: Path, processes: Processes) -> None:
    federation = Federation(tmp_path / "one", processes)
    (tmp_path / "two").mkdir()
    stranger = Federation(tmp_path / "two", processes)
    federation.start_hub()
    settings = stranger.sites[0].settings
    settings.write_text(settings.read_text().replace(stranger.address, federation.address))
    agent = processes.start("stranger", "site", "run", "--home", str(stranger.sites[0].folder))
    federation.wait(
        lambda: "cannot be reached" in (tmp_path / "logs" / "stranger.log").read_text(),
        "no refusal was logged",
    )
    assert agent.process.poll() is None
    assert "attached" not in (tmp_path / "logs" / "hub.log").read_text()


def test_studies_side_by_side_lose_no_round_and_verify_together(tmp_path: Path, processes: Processes) -> None:
    """Each ledger grows in the middle of another study's exchange of heads."""
    federation = Federation(tmp_path, processes, epsilon=20.0)
    federation.start_hub()
    for number in (1, 2, 3):
        federation.start_site(number, once=False)
    studies = [small_study(federation.names, name=f"study {n}", training__rounds=8) for n in (1, 2, 3)]
    digests = [federation.submit(study) for study in studies]
    for number in (1, 2, 3):
        for digest in digests:
            federation.approve(number, digest)
    for digest in digests:
        assert federation.watch(digest)[-1]["status"] == "done", federation.log("hub")
    assert " lost: " not in federation.log("hub")
    assert "with 2 hospitals" not in federation.log("hub")
    trust, files = str(tmp_path / "roster.json"), [str(tmp_path / "hub.zip")]
    home = ("--home", str(federation.hub_home.folder))
    processes.json("hub", "roster", *home, "--out", trust)
    processes.json("hub", "evidence", *home, "--out", files[0])
    for number, site in enumerate(federation.sites, start=1):
        files.append(str(tmp_path / f"{number}.zip"))
        processes.json("site", "evidence", "--home", str(site.folder), "--out", files[-1])
    checked = processes.json("audit", "verify", *files, "--trust", trust)
    assert checked["passed"]
    assert checked["missing"] == []
