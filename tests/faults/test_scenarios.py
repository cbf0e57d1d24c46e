"""What people and machines do in the middle of a study: one federation of four, one study, one thing after another.

Order matters: a late site, a silent site, a silent hub, an older copy, a pause, a withdrawal, at last an abort.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.ledger.entries import Approval, Charge
from common.ledger.store import Ledger
from server.desk import CoordinatorDesk
from server.home import CoordinatorHome
from server.processes import Processes
from tests.faults.driver import GONE_S, Rig, Run, faulty_study, within
from tests.faults.proxy import DOWN, UP, Fault

BACK_S = 45.0
SILENT_S = 8.0
LOOK_S = 3.0
SLOW_S = 3.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("scenarios")
    with Processes(folder / "logs") as processes, Rig(folder, processes, hospitals=4, epsilon=20.0) as rig:
        for proxy in rig.proxies.values():
            proxy.pace_s = 0.1
        study = faulty_study(rig.names, "scenarios", plain=False, rounds=900)
        running = Run(rig, study)
        # The fourth hospital shares its keys with everybody and is gone before the first round.
        left = rig.proxies[4].arm(
            Fault(UP, "reply", "query.confirms", 1, "call", late=True, then=lambda: rig.kill_agent(4))
        )
        running.begin()
        assert left.fired.is_set()
        yield running


@pytest.fixture(autouse=True)
def sound(run: Run) -> Iterator[None]:
    """Each scenario begins with a study that goes on, and leaves nothing behind that must not be."""
    if run.ended():
        pytest.fail(run.why("not tried, for the study has ended"))
    yield
    assert run.violations() == [], run.why("an invariant is broken")


def cohorts(run: Run, after: int) -> list[list[int]]:
    """The cohorts of the rounds completed past step ``after``."""
    return [json.loads(row.cohort) for row in run.completed()[after:]]


def wait_for_cohort(run: Run, wanted: list[int], why: str, seconds: float = BACK_S) -> float:
    """Wait until a round is completed over just these sites; how long it took."""
    began, after = time.monotonic(), len(run.completed())
    assert within(seconds, lambda: wanted in cohorts(run, after) or run.ended(), 0.1), run.why(why)
    assert not run.ended(), run.why(why)
    return time.monotonic() - began


def told(run: Run) -> dict[int, tuple[bool, str]]:
    """What the coordinator is told of each site: whether it is online, and its decision."""
    with CoordinatorDesk(CoordinatorHome(run.rig.hub_home.coordinator)) as desk:
        event = next(iter(desk.watch(run.digest)))
        return {site.id: (site.online, site.decision) for site in event.sites}


def site_command(run: Run, number: int, *arguments: str) -> None:
    """A command of a site's command line, as a person runs it."""
    home = str(run.rig.sites[number - 1].folder)
    command, *rest = arguments
    run.rig.processes.json("site", command, *rest, "--home", home, "--by", "a tester")


def held_at_upload(run: Run, number: int, direction: str = DOWN) -> None:
    """Return in the middle of a round: a site's upload is asked for, or answered, and that is held for 3 s."""
    kind = "request" if direction == DOWN else "reply"
    fault = run.rig.proxies[number].arm(Fault(direction, kind, "train.upload", 1, "delay", 3.0))
    assert fault.fired.wait(20), run.why("no upload was asked for")


def test_a_late_site_catches_up(run: Run) -> None:
    wait_for_cohort(run, [1, 2, 3], "the study did not go on without the fourth")
    assert within(20, lambda: len(run.completed()) >= 4), run.why("too few rounds")
    assert all(4 not in cohort for cohort in cohorts(run, 0))
    run.rig.up()
    wait_for_cohort(run, [1, 2, 3, 4], "the late site is in no cohort")


def test_a_silent_site_is_shown_and_comes_back(run: Run) -> None:
    assert told(run) == dict.fromkeys((1, 2, 3, 4), (True, "approved"))
    run.rig.stop(run.rig.agents[2])
    try:
        assert within(SILENT_S + LOOK_S, lambda: not told(run)[2][0], 0.2), run.why(
            "shown as online all the time"
        )
        wait_for_cohort(run, [1, 3, 4], "the study did not go on without the silent site")
    finally:
        run.rig.go_on()
    wait_for_cohort(run, [1, 2, 3, 4], "the site is not back")


def test_a_silent_hub_is_noticed_and_found_again(run: Run) -> None:
    before = [run.rig.log(f"site{number}").count("attached to the hub") for number in (1, 2, 3, 4)]
    run.rig.stop(run.rig.hub)
    try:
        time.sleep(SILENT_S + LOOK_S)
    finally:
        run.rig.go_on()
    wait_for_cohort(run, [1, 2, 3, 4], "the federation is not together again")
    after = [run.rig.log(f"site{number}").count("attached to the hub") for number in (1, 2, 3, 4)]
    # Each has given the silent stream up and has found the hub again.
    assert all(new > old for new, old in zip(after, before, strict=True)), run.why("nobody noticed")


def test_a_worker_that_starts_slowly_takes_part_in_the_end(run: Run) -> None:
    """Rounds that the others complete without it meanwhile must not kill the worker again and again."""
    over = threading.Event()
    known = set(run.rig.workers(2))

    def slow_down() -> None:
        while not over.is_set():
            for pid in set(run.rig.workers(2)) - known:
                known.add(pid)
                threading.Thread(target=run.rig.slow, args=(pid, SLOW_S), daemon=True).start()
            time.sleep(0.02)

    slowing = threading.Thread(target=slow_down, daemon=True)
    slowing.start()
    try:
        run.rig.kill_worker(2)
        wait_for_cohort(run, [1, 3, 4], "the study did not go on without the slow site")
        wait_for_cohort(run, [1, 2, 3, 4], "the slow site is in no cohort", 30.0)
    finally:
        over.set()
        slowing.join(5)


def test_a_site_put_back_from_an_older_copy_is_charged_nothing(run: Run, tmp_path: Path) -> None:
    """A snapshot of the whole machine: ledger, mark and run file agree, so only the others can know."""
    folder = run.rig.sites[1].folder

    def swapped(kept: str, used: str) -> None:
        run.rig.kill_agent(2)
        run.rig.agents[2].process.wait(10)
        if kept:
            shutil.copytree(folder, tmp_path / kept)
        if used:
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / used, folder)
        run.rig.up()

    swapped("older", "")
    # The charge of its first round is in the head that the others see before its second; one may have been in flight.
    for _ in range(3):
        wait_for_cohort(run, [1, 2, 3, 4], "the site is not back")
    swapped("newest", "older")
    after, charged = len(run.completed()), charges(run, 2)
    assert within(BACK_S, lambda: "entries of this ledger, but it has" in run.rig.log("site2")), run.why(
        "unseen"
    )
    assert within(20, lambda: len(run.completed()) >= after + 3), run.why("the study stands still")
    assert all(2 not in cohort for cohort in cohorts(run, after))
    assert charges(run, 2) == charged
    swapped("", "newest")
    wait_for_cohort(run, [1, 2, 3, 4], "the site is not back with its newest ledger")


def charges(run: Run, number: int) -> int:
    with Ledger.open(run.rig.sites[number - 1].ledger) as ledger:
        return sum(isinstance(entry, Charge) for entry in ledger.entries())


def test_a_pause_in_the_middle_of_a_round(run: Run) -> None:
    held_at_upload(run, 3)
    site_command(run, 3, "pause", "--reason", "maintenance")
    assert within(GONE_S, lambda: not run.rig.workers(3)), run.why("a worker of a paused site runs on")
    wait_for_cohort(run, [1, 2, 4], "the study did not go on without the paused site")
    after = len(run.completed())
    assert within(20, lambda: len(run.completed()) >= after + 3), run.why("the study stands still")
    assert all(3 not in cohort for cohort in cohorts(run, after))
    site_command(run, 3, "resume")
    wait_for_cohort(run, [1, 2, 3, 4], "the site is not back after its pause")


def test_a_withdrawal_in_the_middle_of_a_round(run: Run) -> None:
    held_at_upload(run, 4)
    site_command(run, 4, "withdraw", run.digest, "--reason", "consent withdrawn", "--yes")
    assert within(GONE_S, lambda: not run.open_run(4)), run.why("the withdrawn run is not erased")
    assert within(GONE_S, lambda: not run.rig.workers(4)), run.why("a worker of a withdrawn study runs on")
    spent = set(run.rig.proxies[4].seen.sent)
    wait_for_cohort(run, [1, 2, 3], "the study did not go on without the withdrawn site")
    after = len(run.completed())
    assert within(20, lambda: len(run.completed()) >= after + 3), run.why("the study stands still")
    assert all(cohort == [1, 2, 3] for cohort in cohorts(run, after))
    assert set(run.rig.proxies[4].seen.sent) == spent
    assert within(LOOK_S, lambda: told(run)[4][1] == "denied", 0.2), run.why("the coordinator is not told")
    with Ledger.open(run.rig.sites[3].ledger) as ledger:
        said = [entry.decision for entry in ledger.entries() if isinstance(entry, Approval)]
    assert said[-1] == "denied"


def test_an_abort_in_the_middle_of_a_round_leaves_nothing(run: Run) -> None:
    held_at_upload(run, 1, UP)
    run.rig.abort(run.digest, "enough")
    sites = (1, 2, 3, 4)
    assert within(GONE_S, lambda: not any(map(run.rig.workers, sites))), run.why("workers run on")
    assert within(2 * GONE_S, lambda: not any(map(run.open_run, sites))), run.why("a run is not erased")
    assert (run.row().status, run.row().detail) == ("aborted", "enough")
    assert run.end_violations() == [], run.why("something is left behind")
