import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import cross_entropy

from common.errors import FailureError, RefusedError
from common.privacy.gate import GateParams, LocalGate, PlainGate, PlainParams, SharedGate, to_grid
from common.privacy.noise import coins
from common.study import Study
from common.tasks import training
from common.tasks.models import build
from common.tasks.models.layout import Tensor, layout, size
from common.tasks.training import GatedOptimizer, contribute, train_local

torch.set_num_threads(1)
WIDTH = 3

TOML = """
name = "heart"
purpose = "research"
legal_basis = "consent"
contact = "a@example.org"
expires = "2030-01-01T00:00Z"
members = ["A", "B", "C", "D"]
data = "heart"

[contract]
patient = "patient"
rows_per_patient = 20
features = [{features}]
label = {{ name = "ill", classes = [{classes}] }}

[model]
{model}

[training]
mode = "local"
rounds = 3
steps = {steps}
learning_rate = {learning_rate}
sampling = "{sampling}"
sampling_rate = {rate}
patients_public = 10
engine = "opacus"
server = {{ strategy = "fedavg" }}

[privacy]
{privacy}

[aggregation]
rounds_max = 5
ready_s = 10
upload_s = 10
deadline_s = 60
state_norm_bound = 1000.0
audit = "digests"
codec = {{ bits = 32, step = 0.0001, range = 1000.0, rounding = "{rounding}" }}
"""
PRIVATE = """kind = "dp"
clip_norm = {clip}
grid_step = {grid}
noise_multiplier = 0.5
max_patients = 200
arithmetic = "{arithmetic}"
"""
LOGISTIC = 'kind = "logistic_regression"'
RELU = ((4,), "relu")
MODELS = [((), ""), RELU, ((3, 5), "tanh"), ((2,), "gelu")]
"""Widths of hidden layers and what follows them; none: logistic regression."""


def make_study(
    *, private=True, steps=1, rate=1.0, clip=1.0, learning_rate=2.0, classes=3, hidden=(), activation="relu"
):
    mlp = f'kind = "mlp"\nhidden = {list(hidden)}\nactivation = "{activation}"'
    arithmetic, grid = ("f32_assumed", 2.0**-12) if hidden else ("f64_bounded", 2.0**-10)
    names = "abcdefgh"
    return Study.from_toml(
        TOML.format(
            features=", ".join(
                f'{{ kind = "number", name = "{n}", unit = "1", minimum = 0.0, maximum = 1.0 }}'
                for n in names[:WIDTH]
            ),
            classes=", ".join(f'"{k}"' for k in range(classes)),
            steps=steps,
            learning_rate=learning_rate,
            sampling="full" if rate == 1.0 else "poisson",
            rate=rate,
            model=mlp if hidden else LOGISTIC,
            privacy=PRIVATE.format(clip=clip, arithmetic=arithmetic, grid=grid)
            if private
            else 'kind = "without_differential_privacy"',
            rounding="nearest" if private else "dither",
        )
    )


class SpyGate(LocalGate):
    """The real gate, remembering what came in, what went out and whose coin fell."""

    def __init__(self, params, entropy):
        super().__init__(params, entropy)
        self.sums, self.released, self.chosen = [], [], []

    def coins(self, n_patients):
        self.chosen.append(super().coins(n_patients))
        return self.chosen[-1]

    def step(self, clipped_sum):
        self.sums.append(clipped_sum.copy())
        self.released.append(super().step(clipped_sum))
        return self.released[-1]


def seeded(seed):
    return np.random.default_rng(seed).bytes


def gate_params(study):
    return GateParams(
        clip_norm=study.privacy.clip_norm,
        grid_step=study.privacy.grid_step,
        dim=size(layout(study.model, study.contract)),
        noise_multiplier=study.privacy.noise_multiplier,
        sampling=study.training.sampling,
        rate=study.training.sampling_rate,
        steps=study.training.steps,
        max_patients=study.privacy.max_patients,
        arithmetic=study.privacy.arithmetic,
    )


def make_gate(study, seed=0):
    return SpyGate(gate_params(study), seeded(seed))


def make_state(seed=1, classes=3, scale=1.0, hidden=()):
    random = np.random.default_rng(seed)
    tensors = layout(make_study(classes=classes, hidden=hidden).model, make_study(classes=classes).contract)
    return {t.name: random.normal(0, scale, t.shape).astype(np.float32) for t in tensors}


def make_rows(seed, counts, classes=3):
    """Ragged rows, ``counts[p]`` of patient p, shuffled, patients under arbitrary numbers."""
    random = np.random.default_rng(seed)
    numbers = random.choice(10**6, size=len(counts), replace=False)
    patients = random.permutation(np.repeat(numbers, counts)).astype(np.int64)
    n = len(patients)
    return random.uniform(-1, 1, (n, WIDTH)), random.integers(0, classes, n), patients


def flat(state):
    return np.concatenate([value.reshape(-1) for value in state.values()]).astype(np.float64)


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}


def logits(w, row, classes, hidden, activation):
    """The layers written out on the flat vector: weights of a layer, then its biases."""
    widths, at = [WIDTH, *hidden, classes], 0
    for inputs, outputs in pairwise(widths):
        if at:
            row = ACTIVATIONS[activation](row)
        end = at + inputs * outputs
        row = w[at:end].view(outputs, inputs) @ row + w[end : end + outputs]
        at = end + outputs
    assert at == len(w)
    return row


def naive_vector(weights, x, y, classes, hidden=(), activation="relu"):
    """Gradient over all rows of one patient by torch.autograd, one row at a time."""
    total = np.zeros(len(weights))
    for row, label in zip(x, y, strict=True):
        if not 0 <= label < classes:
            continue
        w = torch.tensor(weights, requires_grad=True)
        found = logits(w, torch.tensor(row), classes, hidden, activation)
        loss = cross_entropy(found[None], torch.tensor([label]), reduction="sum")
        with np.errstate(all="ignore"):
            total = total + torch.autograd.grad(loss, w)[0].numpy()
    return total


def naive_sum(weights, x, y, patients, clip_norm, chosen=None, classes=3, hidden=(), activation="relu"):
    """The definition: for each patient whose coin fell sum, zero if not finite, clip, add."""
    total = np.zeros(len(weights))
    for number, patient in enumerate(sorted(set(patients.tolist()))):
        if chosen is not None and not chosen[number]:
            continue
        mine = patients == patient
        vector = naive_vector(weights, x[mine], y[mine], classes, hidden, activation)
        if not np.isfinite(vector).all():
            continue
        largest = np.abs(vector).max()
        norm = largest * np.linalg.norm(vector / largest) if largest > 0 else 0.0
        total += vector / max(1.0, norm / clip_norm)
    return total


def close(a, b, scale=1.0):
    return np.abs(a - b).max() <= 1e-12 * scale


def train(study, rows, gate, state=None, progress=lambda done, steps: None):
    return train_local(state or make_state(), *rows, study, gate, progress)


def agrees(study, rows, gate, state, classes=3, hidden=(), activation="relu"):
    """Follow the iterates with the naive sums and the gate's own releases."""
    delta = train(study, rows, gate, state)
    weights = flat(state)
    start = weights.copy()
    factor = study.training.learning_rate / (study.training.sampling_rate * study.training.patients_public)
    assert len(gate.sums) == study.training.steps
    for chosen, total, released in zip(gate.chosen, gate.sums, gate.released, strict=True):
        expected = naive_sum(weights, *rows, study.privacy.clip_norm, chosen, classes, hidden, activation)
        assert close(total, expected, max(1, len(chosen)) * study.privacy.clip_norm)
        weights = weights - factor * released
    assert close(delta, weights - start)


counts_of_patients = st.lists(st.integers(1, 6), min_size=0, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    counts=counts_of_patients,
    seed=st.integers(0, 1000),
    steps=st.integers(1, 3),
    rate=st.sampled_from([1.0, 0.5, 0.25]),
    clip=st.sampled_from([0.5, 1.0, 100.0]),
    classes=st.sampled_from([2, 3]),
    piece_rows=st.sampled_from([1, 3, 10**6]),
    model=st.sampled_from(MODELS),
)
def test_agrees_with_a_naive_patient_loop(counts, seed, steps, rate, clip, classes, piece_rows, model):
    hidden, activation = model
    study = make_study(
        steps=steps, rate=rate, clip=clip, classes=classes, hidden=hidden, activation=activation
    )
    rows = make_rows(seed, counts, classes)
    state = make_state(seed, classes, hidden=hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PIECE_SIZE_BYTES", 8 * len(flat(state)) * piece_rows)
        agrees(study, rows, make_gate(study, seed), state, classes, hidden, activation)


@pytest.mark.parametrize("value", [1e6, 1e100, -1e100, 1e130])
def test_huge_rows_agree_with_the_naive_loop(value):
    study = make_study(clip=1.0)
    rows = make_rows(4, [1, 3, 2, 1])
    rows[0][1] *= value
    rows[0][4, 0] = value
    agrees(study, rows, make_gate(study), make_state())


@pytest.mark.parametrize("value", [1e154, -1e200, 1e308])
def test_rows_whose_squares_overflow_are_still_bounded(value):
    study = make_study(clip=0.5)
    gate = make_gate(study)
    train(study, (np.full((1, WIDTH), value), np.zeros(1, int), np.zeros(1, int)), gate)
    assert np.isfinite(gate.sums[0]).all()
    assert np.linalg.norm(gate.sums[0]) <= 0.5


@pytest.mark.parametrize("counts", [[], [1], [5]])
def test_batches_of_none_and_one(counts):
    study = make_study(steps=2)
    agrees(study, make_rows(0, counts), make_gate(study), make_state())


def test_patients_are_clipped_whole():
    study = make_study(clip=0.5)
    x = np.ones((20, WIDTH))
    y = np.zeros(20, dtype=np.int64)
    gate = make_gate(study)
    train(study, (x, y, np.full(20, 7)), gate)
    assert np.linalg.norm(gate.sums[0]) == pytest.approx(0.5, rel=1e-12)
    spread = make_gate(study)
    train(study, (x, y, np.arange(20)), spread)
    assert np.linalg.norm(spread.sums[0]) > 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("piece_rows", [1, 10**6])
@pytest.mark.parametrize(("hidden", "activation"), MODELS)
def test_a_nan_row_changes_only_its_patient(bad, piece_rows, hidden, activation, monkeypatch):
    monkeypatch.setattr(training, "PIECE_SIZE_BYTES", 8 * 12 * piece_rows)
    study, state = make_study(hidden=hidden, activation=activation), make_state(hidden=hidden)
    x, y, patients = make_rows(5, [2, 3, 1, 4])
    victim = patients[0]
    without = patients != victim
    x[0, 1] = bad
    dirty, clean = make_gate(study), make_gate(study)
    train(study, (x, y, patients), dirty, state)
    train(study, (x[without], y[without], patients[without]), clean, state)
    assert np.isfinite(dirty.sums[0]).all()
    assert dirty.sums[0].any()
    assert close(dirty.sums[0], clean.sums[0])
    # The bad row takes the patient's good rows with it: half a patient would be another vector.
    assert (patients == victim).sum() > 1


def test_two_infinities_that_cancel_to_nan_count_as_zero():
    study = make_study()
    x = np.array([[1e308, 0, 0], [1e308, 0, 0], [1e308, 0, 0]])
    y = np.zeros(3, dtype=np.int64)
    gate = make_gate(study)
    state = {"weight": np.zeros((3, WIDTH), np.float32), "bias": np.zeros(3, np.float32)}
    train(study, (x, y, np.zeros(3, dtype=np.int64)), gate, state)
    # Three times -2/3 1e308 leaves the finite numbers.
    assert not gate.sums[0].any()


def test_unusable_labels_are_left_out_and_their_patients_still_toss_coins():
    study = make_study()
    x, y, patients = make_rows(6, [2, 2, 3])
    y = y.copy()
    y[patients == patients[0]] = -1
    other = np.flatnonzero(patients != patients[0])[0]
    y[other] = 99
    gate, reference = make_gate(study), make_gate(study)
    train(study, (x, y, patients), gate)
    keep = (y >= 0) & (y < 3)
    train(study, (x[keep], y[keep], patients[keep]), reference)
    assert close(gate.sums[0], reference.sums[0])
    assert len(gate.chosen[0]) == 3
    assert close(gate.sums[0], naive_sum(flat(make_state()), x, y, patients, 1.0))


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=12), seed=st.integers(0, 10**6))
def test_neighbours_differ_by_at_most_delta_g_on_the_grid(counts, seed):
    hidden = [(), (5,)][seed % 3 == 0]
    study = make_study(clip=0.5, hidden=hidden)
    params = gate_params(study)
    x, y, patients = make_rows(seed, counts)
    random = np.random.default_rng(seed)
    if seed % 2:
        x *= 10.0 ** random.integers(-3, 6, (len(x), 1))
    keep = patients != random.choice(patients)
    with_p, without_p = make_gate(study), make_gate(study)
    state = make_state(seed, scale=10.0, hidden=hidden)
    train(study, (x, y, patients), with_p, state)
    train(study, (x[keep], y[keep], patients[keep]), without_p, state)
    a, b = with_p.sums[0], without_p.sums[0]
    assert np.linalg.norm(a - b) <= 0.5 * (1 + float(params.eta))
    assert ((to_grid(params, a) - to_grid(params, b)) ** 2).sum() <= params.delta_g**2


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("hidden", [(), (4,)])
def test_an_empty_batch_is_a_noised_step(n, hidden, monkeypatch):
    monkeypatch.setattr(training, "weight_limit", lambda *_: np.inf)  # such steps leave any model behind
    # At this rate no coin of three falls in the first tosses of the seed.
    study, state = make_study(steps=4, rate=0.001, hidden=hidden), make_state(hidden=hidden)
    dim = len(flat(state))
    gate = make_gate(study)
    delta = train(study, make_rows(0, [1] * n), gate, state)
    assert [len(chosen) for chosen in gate.chosen] == [n] * 4
    assert not np.concatenate(gate.chosen).any()
    assert len(gate.sums) == 4
    assert all(total.shape == (dim,) and not total.any() for total in gate.sums)
    assert all(released.any() for released in gate.released)
    assert close(delta, -2.0 / (0.001 * 10) * sum(gate.released), 1e6)
    assert gate.finish(delta, lambda d: np.rint(d).astype(np.int64)).q.shape == (dim,)


def test_no_state_is_kept_between_calls(monkeypatch):
    monkeypatch.setattr(training, "PIECE_SIZE_BYTES", 8 * 12 * 2)
    study = make_study(steps=3)
    rows = make_rows(8, [3, 1, 2, 2])
    first = make_gate(study, 5)
    expected = train(study, rows, first)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(done, steps):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        train(study, rows, make_gate(study, 5), progress=stop)

    # Interrupted between two pieces of a batch, as a killed logical batch would be.
    original = GatedOptimizer.clip_and_accumulate
    calls = []

    def broken(self):
        original(self)
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(GatedOptimizer, "clip_and_accumulate", broken)
        with pytest.raises(Stop):
            train(study, rows, make_gate(study, 5))
    assert len(calls) == 2

    again = make_gate(study, 5)
    assert (train(study, rows, again) == expected).all()
    assert (np.array(again.sums) == np.array(first.sums)).all()
    assert all(np.linalg.norm(total) <= 4 * (1 + 1e-9) for total in again.sums)


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_the_torch_seed_reaches_nothing(hidden):
    study, state = make_study(steps=2, rate=0.5, hidden=hidden), make_state(hidden=hidden)
    rows = make_rows(9, [2, 1, 3])
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(train(study, rows, make_gate(study, 3), state))
        assert (torch.get_rng_state() == before).all()
    assert (results[0] == results[1]).all()


def test_two_hospitals_with_one_torch_seed_have_independent_noise():
    study = make_study()
    rows = make_rows(9, [2, 1, 3])
    gates = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        gates.append(SpyGate(gate_params(study), os.urandom))
        train(study, rows, gates[-1])
    noise = [(g.released[0] - g.sums[0]) for g in gates]
    assert (gates[0].sums[0] == gates[1].sums[0]).all()
    assert (np.abs(noise[0] - noise[1]) > 0.05).sum() >= 8


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_without_privacy_it_is_plain_full_batch_descent(hidden):
    study = make_study(private=False, steps=3, learning_rate=0.7, hidden=hidden)
    x, y, patients = make_rows(2, [1, 4, 2])
    x[patients == patients[0]] *= 50
    state = make_state(hidden=hidden)
    gate = PlainGate(PlainParams(dim=len(flat(state)), steps=3))
    delta = train(study, (x, y, patients), gate, state)
    model = nn.Linear(WIDTH, 3, dtype=torch.float64)
    if hidden:
        layers = [nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 3)]
        model = nn.Sequential(*layers).to(torch.float64)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    sgd = torch.optim.SGD(model.parameters(), lr=0.7)
    for _ in range(3):
        sgd.zero_grad()
        cross_entropy(model(torch.tensor(x)), torch.tensor(y)).backward()
        sgd.step()
    after = {name: value.numpy() for name, value in model.state_dict().items()}
    assert close(delta, flat(after) - flat(state), 10)


@pytest.mark.parametrize(
    "rows", [make_rows(0, []), (np.full((2, WIDTH), np.nan), np.zeros(2, int), np.arange(2))]
)
def test_without_privacy_no_usable_patient_changes_nothing(rows):
    study = make_study(private=False, steps=1)
    assert not train(study, rows, PlainGate(PlainParams(dim=12, steps=1))).any()


def test_the_gate_must_fit_the_study():
    private, plain = make_study(), make_study(private=False)
    rows = make_rows(0, [1])
    with pytest.raises(RefusedError, match=r"training\.gate"):
        train(private, rows, PlainGate(PlainParams(dim=12, steps=1)))
    with pytest.raises(RefusedError, match=r"training\.gate"):
        train(plain, rows, make_gate(private))


def test_more_patients_than_public_are_refused_before_any_gradient():
    study = make_study()
    gate = make_gate(study)
    with pytest.raises(RefusedError, match=r"privacy\.max-patients"):
        train(study, make_rows(0, [1] * 201), gate)
    assert gate.sums == []


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_rows_of_unequal_length_are_refused(cut):
    study = make_study()
    rows = list(make_rows(0, [2, 2]))
    rows[cut] = rows[cut][:-1]
    with pytest.raises(RefusedError, match=r"training\.shapes"):
        train(study, tuple(rows), make_gate(study))


def test_training_works_where_the_caller_switched_gradients_off():
    study = make_study()
    rows = make_rows(3, [2, 1])
    expected = train(study, rows, make_gate(study))
    with torch.no_grad():
        assert (train(study, rows, make_gate(study)) == expected).all()


def test_progress_says_steps_only():
    study = make_study(steps=3)
    said = []
    train(study, make_rows(0, [1, 2]), make_gate(study), progress=lambda *a: said.append(a))
    assert said == [(1, 3), (2, 3), (3, 3)]


# The optimizer by itself.

LINEAR = (Tensor("weight", (2, 3)), Tensor("bias", (2,)))


def linear():
    return nn.Linear(3, 2, dtype=torch.float64)


class Echo:
    """A gate without grid and noise, to see the optimizer alone."""

    def __init__(self):
        self.sums = []

    def coins(self, n_patients):
        return np.ones(n_patients, dtype=bool)

    def step(self, clipped_sum):
        self.sums.append(clipped_sum.copy())
        return np.full_like(clipped_sum, 0.25)

    def finish(self, delta, quantise):
        raise NotImplementedError


def make_optimizer(module, tensors=LINEAR, gate=None, clip=1.0):
    return GatedOptimizer(module, tensors, learning_rate=1.0, clip_norm=clip, gate=gate or Echo())


class Extra(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        if kind == "extra":
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        if kind == "shared":
            self.scale = self.bias
        if kind == "buffer":
            self.register_buffer("seen", torch.zeros(1))
        if kind == "frozen":
            self.bias.requires_grad_(False)
        if kind == "single":
            self.bias = nn.Parameter(torch.zeros(2))
        if kind == "shape":
            self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["extra", "buffer", "frozen", "single", "shape"])
def test_parameters_outside_the_optimizer_are_refused(kind):
    with pytest.raises(RefusedError, match=r"training\.parameters"):
        make_optimizer(Extra(kind))
    make_optimizer(Extra("none"))


def test_shared_parameters_are_refused():
    shared = (*LINEAR, Tensor("scale", (2,)))
    with pytest.raises(RefusedError, match=r"training\.parameters"):
        make_optimizer(Extra("shared"), shared)


def test_a_parameter_that_joins_later_is_refused():
    module = linear()
    wrapped = GradSampleModule(module, loss_reduction="sum")
    optimizer = make_optimizer(module)
    wrapped(torch.ones(2, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    module.late = nn.Parameter(torch.zeros(1))
    optimizer.take_patients(torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(RefusedError, match=r"training\.parameters"):
        optimizer.step()


def test_only_released_gradients_are_applied():
    module, gate = linear(), Echo()
    before = module.weight.detach().clone()
    wrapped = GradSampleModule(module, loss_reduction="sum")
    optimizer = make_optimizer(module, gate=gate)
    wrapped(torch.ones(2, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert module.weight.grad.abs().sum() > 1  # torch's own, raw: this is what must vanish
    optimizer.take_patients(torch.tensor([0, 1]), 2)
    optimizer.signal_skip_step(do_skip=True)
    optimizer.step()
    assert module.weight.grad is None
    assert gate.sums == []
    optimizer.zero_grad()
    wrapped(torch.ones(1, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    optimizer.take_patients(torch.tensor([0]), 1)
    optimizer.step()
    assert (module.weight.grad == 0.25).all()
    assert (module.bias.grad == 0.25).all()
    assert (module.weight.detach() == before - 0.25).all()
    # Three patients with the same gradient (1, ..., 1) of norm sqrt(8), each clipped to 1.
    assert close(gate.sums[0], np.full(8, 3 / np.sqrt(8)))
    optimizer.zero_grad()
    assert module.weight.grad is None
    assert module.weight.grad_sample is None


def test_a_gradient_is_used_once_and_only_with_its_patients():
    module, gate = linear(), Echo()
    wrapped = GradSampleModule(module, loss_reduction="sum")
    optimizer = make_optimizer(module, gate=gate)
    wrapped(torch.ones(2, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    with pytest.raises(RefusedError, match=r"training\.patients"):
        optimizer.step()
    optimizer.take_patients(torch.tensor([0, 0]), 1)
    optimizer.step()
    optimizer.take_patients(torch.tensor([0, 0]), 1)
    with pytest.raises(ValueError, match="Per sample gradient"):
        optimizer.step()
    assert len(gate.sums) == 1
    # Also where zero_grad was forgotten, the next release holds the next rows only.
    wrapped(torch.ones(1, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    optimizer.take_patients(torch.tensor([0]), 1)
    optimizer.step()
    assert close(gate.sums[1], np.full(8, 1 / np.sqrt(8)))


def test_opacus_own_optimizer_agrees_where_each_patient_has_one_row():
    """Opacus clips by C / (norm + 1e-6): the difference is below 1e-6 for each row."""
    inputs = torch.tensor(make_rows(1, [1] * 6)[0], requires_grad=True)
    labels = torch.tensor([0, 1] * 3)

    def backward():
        module = linear()
        with torch.no_grad():
            module.weight.fill_(0.5)
            module.bias.copy_(torch.tensor([1.0, -1.0]))
        wrapped = GradSampleModule(module, loss_reduction="sum")
        cross_entropy(wrapped(inputs), labels, reduction="sum").backward()
        return module

    module, gate = backward(), Echo()
    ours = make_optimizer(module, gate=gate)
    ours.take_patients(torch.arange(6), 6)
    ours.step()
    module = backward()
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    DPOptimizer(
        sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=None, loss_reduction="sum"
    ).step()
    theirs = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).numpy()
    assert np.abs(gate.sums[0] - theirs).max() < 6e-6
    assert np.abs(theirs).max() > 0.1


def test_a_model_that_mixes_patients_is_refused(monkeypatch):
    study = make_study()

    def mixing(model, contract):
        module = build(model, contract)
        module.eval()
        return module

    monkeypatch.setattr(training, "build", mixing)
    gate = make_gate(study)
    with pytest.raises(RefusedError, match=r"training\.model"):
        train(study, make_rows(0, [1, 1]), gate)
    assert gate.sums == []


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(1, 9), max_size=12), piece_rows=st.integers(1, 20))
def test_pieces_cover_all_rows_and_split_no_patient(counts, piece_rows):
    patients = np.repeat(np.arange(len(counts)), counts)
    pieces = [(piece.start, piece.stop) for piece in training.pieces(patients, piece_rows)]
    if not counts:
        assert pieces == []
        return
    assert [begin for begin, _ in pieces] == [0, *[stop for _, stop in pieces[:-1]]]
    assert pieces[-1][1] == len(patients)
    owners = [set(patients[begin:stop]) for begin, stop in pieces]
    assert sum(map(len, owners)) == len(counts)
    assert all(
        stop - begin <= piece_rows or len(o) == 1 for (begin, stop), o in zip(pieces, owners, strict=True)
    )
    assert all(owners)


def test_weights_past_the_arithmetic_bound_are_refused_before_any_step(monkeypatch):
    study = make_study(steps=3)
    gate = make_gate(study)
    monkeypatch.setattr(training, "weight_limit", lambda *_: 1e-9)
    with pytest.raises(FailureError, match="weights"):
        train(study, make_rows(0, [1] * 5), gate)
    assert gate.sums == []


def with_engine(study, **training):
    """The same study computed by book-keeping."""
    changed = {"engine": "bookkeeping"} | training
    return study.model_copy(update={"training": study.training.model_copy(update=changed)})


@settings(max_examples=40, deadline=None)
@given(
    counts=counts_of_patients,
    model=st.sampled_from(MODELS),
    seed=st.integers(0, 10**6),
    sampled=st.booleans(),
    steps=st.integers(1, 3),
)
def test_both_engines_of_local_agree(counts, model, seed, sampled, steps):
    hidden, activation = model
    study = make_study(
        rate=0.5 if sampled else 1.0,
        clip=0.5,
        steps=steps,
        hidden=hidden,
        activation=activation or "relu",
        learning_rate=0.01,
    )
    rows, state = make_rows(seed, counts), make_state(hidden=hidden)
    # float32 rounds a sum by as much as the grid does, so that the same coins and noise give near iterates.
    limit = 1e-4 if hidden else 1e-12
    gates = [make_gate(study, seed) for _ in range(2)]
    deltas = [train(with_engine(study) if i else study, rows, gate, state) for i, gate in enumerate(gates)]
    assert [c.tolist() for c in gates[0].chosen] == [c.tolist() for c in gates[1].chosen]
    assert np.abs(gates[0].sums[0] - gates[1].sums[0]).max() <= limit * max(1, len(counts))
    assert np.abs(deltas[0] - deltas[1]).max() <= 0.01 * (limit + study.privacy.grid_step) * 10 * steps


@settings(max_examples=40, deadline=None)
@given(counts=counts_of_patients, seed=st.integers(0, 10**6), sampled=st.booleans())
def test_a_contribution_is_the_clipped_sum(counts, seed, sampled):
    study = with_engine(make_study(rate=0.5 if sampled else 1.0, clip=0.5), mode="shared-noise", steps=1)
    rows, state = make_rows(seed, counts), make_state()
    params = replace(gate_params(study), mode="shared-noise", steps=1, clamp=50.0)
    gate = SharedGate(params, seeded(seed))
    chosen = None if not sampled else coins(params.q, len(counts), seeded(seed))
    release = contribute(state, *rows, study, gate)
    expected = naive_sum(flat(state), *rows, 0.5, chosen)
    assert np.abs(release.q + expected / params.grid_step).max() <= 0.5 + 1e-6


def test_a_shared_round_takes_what_training_takes():
    study = with_engine(make_study(learning_rate=2.0), mode="shared-noise", steps=1)
    rows = make_rows(1, [2, 3])
    params = replace(gate_params(study), mode="shared-noise", steps=1, clamp=50.0)
    far = {name: np.full_like(value, 1e9) for name, value in make_state().items()}
    with pytest.raises(FailureError, match="grown past"):
        contribute(far, *rows, study, SharedGate(params, seeded(1)))
    rows[0][rows[2] == rows[2][0]] = np.nan
    expected = naive_sum(flat(make_state()), *rows, 1.0)
    q = contribute(make_state(), *rows, study, SharedGate(params, seeded(1))).q
    assert np.abs(q + expected / params.grid_step).max() <= 0.5 + 1e-6
