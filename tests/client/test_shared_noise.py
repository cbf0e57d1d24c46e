"""Hospitals that share one noise: what is in the sums, what is charged and settled, and what a failure tells."""

import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.participation import Participation
from common.errors import FailureError
from common.ledger.entries import Charge, Closed, Outcome
from common.privacy.events import Event
from tests.client.federation import ComputedHere, Federation, Hub
from tests.federation import contribution
from tests.noise import FALSE_ALARM, chi_squared

STEP = 0.001
SHARED: dict[str, Any] = {
    "training__mode": "shared-noise",
    "training__engine": "bookkeeping",
    "training__rounds": 30,
    "aggregation__codec__step": STEP,
    "privacy__noise_multiplier": 30.0,
}


class Breaking(ComputedHere):
    """A worker that fails in the rounds named, after the charge."""

    broken: frozenset[int] = frozenset()
    rounds = 0

    def compute(self, *arguments: Any, **named: Any) -> NDArray[np.int64]:
        self.rounds += 1
        if self.rounds in self.broken:
            raise FailureError("worker.died", "the worker process died")
        return super().compute(*arguments, **named)


def started(folder: Path, template: Path, members: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Hub:
    federation = Federation(template, folder, epsilon=20.0)
    manifest = federation.manifest(members, **SHARED | changes)
    sites = {n: Participation(federation.sites[n], computation=Breaking) for n in members}
    return Hub(federation, manifest, sites).joined()


@pytest.fixture
def hub(template: Path, tmp_path: Path) -> Any:
    found = started(tmp_path / "federation", template)
    yield found
    for site in found.sites.values():
        site.close()


def test_a_sum_is_the_clipped_sums_and_one_noise(hub: Hub) -> None:
    plain = sum(np.rint(contribution(n, hub.state) / STEP) for n in hub.sites)
    noise = np.concatenate([hub.whole_round() - plain for _ in range(25)])
    share = hub.admitted.shares[-1]
    assert share * 2 == pytest.approx((30 * 1000) ** 2, rel=0.02)
    assert chi_squared(noise, 3 * share) > FALSE_ALARM
    # As if it were added twice, or by one hospital alone.
    assert chi_squared(noise, 3 * 4 * share) < FALSE_ALARM
    assert chi_squared(noise, share) < FALSE_ALARM


def test_every_upload_is_told_with_its_cohort_and_share(hub: Hub) -> None:
    hub.whole_round()
    said = [entry for entry in hub.federation.entries(1) if isinstance(entry, Outcome)]
    assert [(one.reason, one.u_size, one.s_g_squared) for one in said] == [
        ("upload_started", 3, hub.admitted.shares[-1]),
        ("completed", None, None),
    ]


def test_a_round_is_settled_at_its_least_noise(template: Path, tmp_path: Path) -> None:
    hub = started(tmp_path / "four", template, (1, 2, 3, 4))
    guard = hub.sites[1]._guard
    round_ = hub.start()
    assert all(hub.ready(round_).values())
    (charge,) = [Event.from_fields(e.event) for e in hub.federation.entries(1) if isinstance(e, Charge)]
    before = guard.budget()
    assert guard._charges.settled(guard._ledger.entries()) == (charge,)
    hub.upload(round_, round_.cohort())
    (of_four,) = guard._charges.settled(guard._ledger.entries())
    # Hospital 4 is gone: the others mask again, with larger shares.
    second = round_.cohort(without=[4])
    hub.upload(round_, second)
    hub.finish(round_, second)
    (settled,) = guard._charges.settled(guard._ledger.entries())
    shares = hub.admitted.shares
    assert (settled.u_size, settled.s_g_squared) == (4, min(shares[1], 2 * shares[0] // 3))
    assert charge.mechanism.z_t <= settled.mechanism.z_t
    assert charge.mechanism.z_w <= settled.mechanism.z_w <= of_four.mechanism.z_w
    after = guard.budget()
    assert after.charges == before.charges == 1
    assert 0 < after.epsilon_w <= before.epsilon_w
    assert 0 < after.epsilon_t <= before.epsilon_t
    # Another guard on the same ledger reads the same.
    fresh = hub.federation.guard(1)
    assert fresh.budget() == after
    fresh.close()
    for site in hub.sites.values():
        site.close()


def test_a_failure_after_the_charge_is_a_zero_with_noise(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    plain = sum(np.rint(contribution(n, hub.state) / STEP) for n in (1, 2))
    computation = hub.sites[3]._runs[hub.man].computation
    assert isinstance(computation, Breaking)
    computation.broken = frozenset(range(1, 40))
    noise = np.concatenate([hub.whole_round() - plain for _ in range(25)])
    assert chi_squared(noise, 3 * hub.admitted.shares[-1]) > FALSE_ALARM
    assert "contribute nothing" in caplog.text
    charged = [entry for entry in hub.federation.entries(3) if isinstance(entry, Charge)]
    assert len(charged) == 25


def test_a_cut_round_gives_no_zero(hub: Hub) -> None:
    site = hub.sites[3]
    computation = site._runs[hub.man].computation
    original: Callable[..., NDArray[np.int64]] = computation.compute

    def paused_meanwhile(*arguments: Any, **named: Any) -> NDArray[np.int64]:
        arguments[3].set()
        return original(*arguments, **named)

    computation.compute = paused_meanwhile  # type: ignore[method-assign]
    round_ = hub.start()
    assert hub.ready(round_) == {1: True, 2: True, 3: False}


def test_the_end_of_a_study_is_in_the_ledger(hub: Hub) -> None:
    hub.whole_round()
    hub.end()
    for number in hub.sites:
        closed = [entry for entry in hub.federation.entries(number) if isinstance(entry, Closed)]
        assert [entry.manifest for entry in closed] == [hub.man.hex()]


def test_a_study_for_outsiders_only_needs_a_policy_that_says_so(template: Path, tmp_path: Path) -> None:
    changes = SHARED | {"aggregation__colluders": 0, "aggregation__rollbacks": 0}
    federation = Federation(template, tmp_path / "federation", epsilon=20.0)
    manifest = federation.manifest(**changes)
    sites = {n: Participation(federation.sites[n], computation=partial(ComputedHere)) for n in (1, 2, 3)}
    hub = Hub(federation, manifest, sites)
    for number in sites:
        federation.decide(number, manifest)
    assert set(hub.offer().values()) == {"unavailable"}
    for number in sites:
        assert "outsiders_only" in tomllib.loads(federation.sites[number].policy.read_text())["rules"]
        federation.edit_policy(number, rules={"outsiders_only": True})
    assert set(hub.offer().values()) == {"approved"}
    hub.join()
    total = hub.whole_round()
    assert total.shape == (6,)
    for site in sites.values():
        site.close()
