"""A manifest is run only when the model's size meets every bound, at hub and hospital alike."""

import math
import os
import subprocess
import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.admissible import TASK, Admitted, check
from common.errors import UsageError
from common.identity import key_text
from common.privacy.clipping import weight_limit
from common.privacy.events import Event
from common.privacy.gate import GateParams, LocalGate, PlainGate, PlainParams, SharedGate
from common.study import WITHOUT_MASKS, Manifest, Party, Study
from common.tasks.models.layout import layout, layout_digest, size

EXAMPLE = tomllib.loads(
    (Path(__file__).parents[1] / "vectors" / "studies" / "breast_cancer.toml").read_text(encoding="utf-8")
)
DIM = 62
REGISTER, EVENT = "ab" * 16, "cd" * 16


def manifest(**tables: dict[str, Any]) -> Manifest:
    """The example with keys of its tables changed; ``top`` is the study itself."""
    value = EXAMPLE | tables.pop("top", {})
    value["aggregation"] = EXAMPLE["aggregation"] | {
        "codec": EXAMPLE["aggregation"]["codec"] | tables.pop("codec", {})
    }
    for name, change in tables.items():
        value[name] = change if change.get("kind", "dp") != "dp" else value[name] | change
    study = Study.model_validate(value)
    return Manifest(
        schema=1,
        run="ab" * 16,
        roster="cd" * 32,
        hub=key_text(b"\x09" + bytes(31)),
        coordinator=key_text(b"\x0a" + bytes(31)),
        members=tuple(Party(id=i, name=name) for i, name in enumerate(study.members, 1)),
        study=study,
    )


def refusal(whole: Manifest, now: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        check(whole, now)
    assert caught.value.remedy
    assert caught.value.problem.startswith(f"{caught.value.fields['path']}: ")
    return caught.value.code


def test_the_example_is_admitted() -> None:
    whole = manifest()
    admitted = check(whole, "2026-01-01T00:00Z")
    assert admitted.dim == size(admitted.layout) == DIM
    assert [tensor.shape for tensor in admitted.layout] == [(2, 30), (2,)]
    assert admitted.layout_digest == layout_digest(admitted.layout)
    assert admitted.manifest_digest == whole.digest
    assert admitted.private
    assert isinstance(admitted.params, GateParams)
    assert admitted.params.delta_g == 2008
    assert admitted.params.variance() == 20**2 * 2008**2 + 8


@pytest.mark.parametrize(
    ("now", "admits"),
    [("2099-12-31T23:58Z", True), ("2099-12-31T23:59Z", False), ("2100-01-01T00:00Z", False), (None, True)],
)
def test_expired_studies_are_refused(now: str | None, admits: bool) -> None:
    if admits:
        assert check(manifest(), now).dim == DIM
    else:
        assert refusal(manifest(), now) == "study.expires"


def edge_of_grid(clip: float) -> float:
    """The largest double whose square times DIM is at most (0.01 C)^2, in rational arithmetic."""
    step = 0.01 * clip / math.sqrt(DIM)
    while DIM * Fraction(repr(step)) ** 2 <= (Fraction(repr(clip)) / 100) ** 2:
        step = math.nextafter(step, 1)
    while DIM * Fraction(repr(step)) ** 2 > (Fraction(repr(clip)) / 100) ** 2:
        step = math.nextafter(step, 0)
    return step


def test_bounds_hold_at_the_edge() -> None:
    step = edge_of_grid(1.0)
    assert check(manifest(privacy={"grid_step": step}), None).dim == DIM
    over = math.nextafter(step, 1)
    assert refusal(manifest(privacy={"grid_step": over})) == "study.privacy.grid_step"

    # eta = 2048 B^2 2^-53 <= 1/1000, so B is at most floor(sqrt(2^53 / 2048000)) = 66317.
    most = math.isqrt(2**53 // 2_048_000)
    assert check(manifest(privacy={"max_patients": most}), None).dim == DIM
    assert refusal(manifest(privacy={"max_patients": most + 1})) == "study.privacy.max_patients"
    assert check(manifest(privacy={"max_patients": most + 1, "arithmetic": "f32_assumed"}), None).private

    # Delta_g = 2008: z^2 Delta_g^2 + 4 <= 248 gives s_g^2 = 252, under 16^2; 252 gives 256.
    small = {"noise_multiplier": math.sqrt(247) / 2008}
    assert refusal(manifest(privacy=small)) == "study.privacy.noise_multiplier"
    assert check(manifest(privacy={"noise_multiplier": math.sqrt(247.9) / 2008}), None).private
    large = {"noise_multiplier": 2.0**26 / 2008}
    assert refusal(manifest(privacy=large)) == "study.privacy.noise_multiplier"

    # n (R/step + 1) < 2^(b-1) for n = 4: R/step up to 2^29 - 2 in 32 bits, 2^13 - 2 in 16.
    for width, most_steps in ((32, 2**29 - 2), (16, 2**13 - 2)):
        fits = {"bits": width, "step": 0.5, "range": most_steps / 2}
        assert check(manifest(codec=fits), None).codec.bits == width
        over_codec = {"bits": width, "step": 0.5, "range": (most_steps + 1) / 2}
        assert refusal(manifest(codec=over_codec)) == "study.aggregation.codec.range"


@given(st.sampled_from([16, 32]), st.floats(1e-6, 10), st.floats(1, 1e9), st.integers(3, 40))
@settings(max_examples=60, deadline=None)
def test_codec_rule_agrees_with_the_naive_bound(bits: int, step: float, ratio: float, n: int) -> None:
    whole = manifest(
        top={"members": [f"Site {i:02d}" for i in range(n)]},
        codec={"bits": bits, "step": step, "range": step * ratio},
    )
    m = whole.study.aggregation.minimum_hospitals
    steps = math.ceil(Fraction(step * ratio) / Fraction(step))
    if all(u * (steps + 1) < 2 ** (bits - 1) for u in range(m, n + 1)):
        assert check(whole, None).members == n
    else:
        assert refusal(whole) == "study.aggregation.codec.range"


@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-4, 0.2),
    st.floats(1e-3, 100),
    st.integers(1, 100_000),
    st.sampled_from([1.0, 0.5, 0.01]),
    st.integers(1, 50),
)
@settings(max_examples=80, deadline=None)
def test_planned_events_exist(
    clip: float, share: float, z: float, patients: int, rate: float, steps: int
) -> None:
    whole = manifest(
        training={
            "steps": steps,
            "sampling": "full" if rate == 1 else "poisson",
            "sampling_rate": rate,
        },
        privacy={
            "clip_norm": clip,
            "grid_step": max(1e-12, share * 0.01 * clip),
            "noise_multiplier": z,
            "max_patients": patients,
        },
    )
    try:
        admitted = check(whole, None)
    except UsageError as error:
        refused = error.code
    else:
        event = admitted.event(REGISTER, 3, 2, EVENT)
        assert Event.from_fields(event.to_fields()) == event
        assert (event.task, event.round, event.attempt) == (TASK, 3, 2)
        assert (event.manifest_digest, event.steps, event.dim) == (whole.digest.hex(), steps, DIM)
        assert (event.members, event.u_size, event.t) == (4, 4, 1)
        return
    assert refused.startswith(("study.privacy", "study.aggregation.state_norm_bound"))


def test_the_admitted_gate_fits_the_study() -> None:
    admitted = check(manifest(), None)
    gate = admitted.gate(os.urandom)
    assert isinstance(gate, LocalGate)
    for _ in range(2):
        gate.coins(5)
        released = gate.step(np.zeros(DIM))
        assert np.array_equal(np.rint(released / 0.0005) * 0.0005, released)
    quantise = admitted.quantiser(os.urandom)
    q = gate.finish(np.full(DIM, 1e9), quantise).q
    assert q.tolist() == [10_000_000] * DIM


def test_quantiser_rounds_to_the_nearest_step() -> None:
    def no_entropy(_size: int) -> bytes:
        raise AssertionError("rounding to nearest draws nothing")

    quantise = check(manifest(), None).quantiser(no_entropy)
    values = np.linspace(-1, 1, DIM)
    assert np.abs(quantise(values) * 1e-5 - values).max() <= 0.5e-5 * (1 + 1e-9)


def test_without_privacy_only_the_codec_is_checked() -> None:
    plain = {"kind": "without_differential_privacy"}
    admitted = check(manifest(privacy=plain), None)
    assert admitted.params == PlainParams(dim=DIM, steps=2)
    assert not admitted.private
    assert isinstance(admitted.gate(os.urandom), PlainGate)
    event = admitted.event(REGISTER, 1, 1, EVENT)
    assert event.kind == "no_dp"
    assert event.to_fields().get("z_t") is None
    over = {"range": 1e9}
    assert refusal(manifest(privacy=plain, codec=over)) == "study.aggregation.codec.range"


def test_dither_is_drawn_from_the_given_entropy() -> None:
    whole = manifest(
        privacy={"kind": "without_differential_privacy"}, codec={"rounding": "dither", "step": 1.0}
    )
    admitted: Admitted = check(whole, None)
    values = np.full(DIM, 0.5)
    low = admitted.quantiser(bytes)(values)
    high = admitted.quantiser(lambda size: b"\xff" * size)(values)
    assert low.tolist() == [0] * DIM
    assert high.tolist() == [1] * DIM


def test_checking_needs_neither_torch_nor_flower() -> None:
    heavy = ("torch", "flwr", "opacus", "dp_accounting", "duckdb")
    code = f"import sys, common.admissible; sys.exit(any(name in sys.modules for name in {heavy}))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_model_past_the_arithmetic_bound_is_refused() -> None:
    limit = weight_limit(10_000, 1.0, 1, 30)
    assert 2000 < limit < 3000
    check(manifest(aggregation={"state_norm_bound": math.floor(limit) * 1.0}), None)
    with pytest.raises(UsageError) as caught:
        check(manifest(aggregation={"state_norm_bound": limit * 1.001}), None)
    assert caught.value.code == "study.aggregation.state_norm_bound"


MLP = {"kind": "mlp", "hidden": [5]}
ASSUMED = {"arithmetic": "f32_assumed"}


def test_an_mlp_is_admitted_with_its_assumption_only() -> None:
    model = {"top": {"model": MLP}}
    admitted = check(manifest(privacy=ASSUMED, **model), None)
    assert admitted.dim == 30 * 5 + 5 + 5 * 2 + 2
    assert admitted.event(REGISTER, 1, 1, EVENT).to_fields()["arith"] == "f32_assumed"
    with pytest.raises(UsageError) as caught:
        check(manifest(**model), None)
    assert caught.value.code == "study.privacy.arithmetic"
    assert "f32_assumed" in caught.value.remedy
    plain = {"kind": "without_differential_privacy"}
    assert not check(manifest(privacy=plain, **model), None).private


def test_a_model_must_start_inside_its_norm_bound() -> None:
    # Squares of the half widths: 150 weights of 6/30, 10 of 6/7.
    start = math.sqrt(150 * 6 / 30 + 10 * 6 / 7)
    for bound, admits in ((start * 1.0001, True), (start * 0.9999, False)):
        whole = manifest(top={"model": MLP}, privacy=ASSUMED, aggregation={"state_norm_bound": bound})
        if admits:
            check(whole, None)
        else:
            assert refusal(whole) == "study.aggregation.state_norm_bound"


def test_the_field_that_makes_a_model_too_large_is_named() -> None:
    layers = {"kind": "mlp", "hidden": [65_536, 65_536]}
    assert refusal(manifest(top={"model": layers}, privacy=ASSUMED)) == "study.model.hidden"


def test_a_patient_must_fit_into_a_hospitals_memory() -> None:
    """2^27 words of gradients a patient: refused one row past them."""
    layers = {"kind": "mlp", "hidden": [2048, 2048]}

    def whole(rows: int) -> Manifest:
        changed = {"model": layers, "contract": EXAMPLE["contract"] | {"rows_per_patient": rows}}
        bounds = EXAMPLE["aggregation"] | {"state_norm_bound": 1e6}
        return manifest(
            top=changed | {"aggregation": bounds}, privacy={"kind": "without_differential_privacy"}
        )

    one = whole(1)
    most = (1 << 27) // size(layout(one.study.model, one.study.contract))
    assert most > 1
    assert refusal(whole(most + 1)) == "study.contract.rows_per_patient"
    check(whole(most), None)


def test_what_is_kept_and_what_is_masked_changes_no_number() -> None:
    plain = check(manifest(), None)
    for aggregation in ({"audit": "payloads"}, {"masks": WITHOUT_MASKS}):
        found = check(manifest(aggregation=aggregation), None)
        assert found.manifest_digest != plain.manifest_digest
        assert (found.params, found.codec, found.dim) == (plain.params, plain.codec, plain.dim)


def shared(z: float = 20.0, **codec: object) -> Manifest:
    step = EXAMPLE["privacy"]["grid_step"]
    return manifest(
        training={"mode": "shared-noise", "steps": 1, "engine": "bookkeeping"},
        privacy={"noise_multiplier": z},
        codec={"step": step, "range": 40.0, **codec},
    )


def test_a_study_with_shared_noise_is_admitted() -> None:
    admitted = check(shared(), None)
    assert admitted.shared
    assert isinstance(admitted.params, GateParams)
    assert isinstance(admitted.shared_gate(os.urandom), SharedGate)
    assert admitted.params.limit == 40.0
    # n = 4, m = 3, t = 1: shares among 2 and among 3.
    assert admitted.shares == (admitted.params.variance(2), admitted.params.variance(3))
    event = admitted.event(REGISTER, 1, 1, EVENT)
    assert (event.mode, event.u_size, event.t) == ("shared-noise", 4, 1)
    assert float(event.mechanism.z_t) == pytest.approx(20.0, rel=1e-5)
    assert float(event.mechanism.z_w) == pytest.approx(20.0 / math.sqrt(3), rel=1e-5)
    plain = check(manifest(), None)
    assert plain.shares == ()
    assert not plain.shared


def test_shared_noise_must_fit_the_codec_and_the_sampler() -> None:
    # Delta_g = 2008: 80 000 steps of range and 12 s sqrt(u) beside it, in words of 16 bits: refused.
    assert refusal(shared(bits=16)) == "study.aggregation.codec.range"
    assert refusal(shared(z=0.01)) == "study.privacy.noise_multiplier"
    assert refusal(shared(z=1e5)) == "study.privacy.noise_multiplier"
    naive = 2**31 - 4 * (80_000 + 1)
    edge = naive / (12 * math.sqrt(4)) * math.sqrt(3) / 2008
    assert check(shared(z=min(edge * 0.999, 2.0**26 * math.sqrt(2) / 2008 * 0.999)), None).shared
