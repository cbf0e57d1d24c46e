"""The book-keeping sum against a loop over patients that computes each gradient by itself."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from common.errors import RefusedError
from common.tasks import clipped_sum as engine
from common.tasks.clipped_sum import check_supported, clipped_sum

CLASSES = 3


def losses(module: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(module(x), labels, reduction="none")


class Twice(nn.Module):
    """One layer called several times, as in a recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.out(x)


class Sequences(nn.Module):
    """Positions in a row: embedding, layer norm, linear layers on each, then their mean."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=padding)
        self.norm, self.first, self.out = nn.LayerNorm(5), nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(gelu(self.first(self.norm(self.embedding(x)))).mean(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.first(x))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(6, CLASSES),
    "without bias": lambda: nn.Sequential(
        nn.Linear(6, 4, bias=False), nn.LayerNorm(4, bias=False), nn.Linear(4, CLASSES)
    ),
    "mlp": lambda: nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, CLASSES)
    ),
    "twice": Twice,
    "sequences": Sequences,
    "padded": lambda: Sequences(padding=0),
    "grouped": Grouped,
    "fixed norm": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, CLASSES)
    ),
}


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)


def rows(
    name: str, n: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.integers(0, CLASSES, n))
    if name in ("sequences", "padded"):
        return torch.tensor(rng.integers(0, 7, (n, 4))), labels
    return torch.tensor(rng.normal(size=(n, 6)), dtype=dtype), labels


def gradients(
    module: nn.Module, x: torch.Tensor, y: torch.Tensor, patients: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Each patient's gradient by itself, float64 [d]."""
    found = []
    for patient in np.unique(patients):
        here = torch.from_numpy(patients == patient)
        module.zero_grad()
        losses(module, x[here], y[here]).sum().backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        found.append(torch.cat([part.flatten() for part in parts]).double().numpy().copy())
    module.zero_grad()
    return found


def naive(vectors: list[NDArray[np.float64]], scales: list[float], dim: int) -> NDArray[np.float64]:
    return sum((c * v for c, v in zip(scales, vectors, strict=True)), np.zeros(dim))


def scales_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The scales that the engine takes, as it takes them."""
    seen: list[torch.Tensor] = []
    original = engine._scales

    def keep(*arguments: Any) -> torch.Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(engine, "_scales", keep)
    return seen


def close(a: NDArray[np.float64], b: NDArray[np.float64], limit: float) -> bool:
    return bool(np.linalg.norm(a - b) <= limit * max(1e-30, float(np.linalg.norm(b))))


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    counts=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=9),
    clip=st.sampled_from([1e-3, 0.3, 1.0, 1e6]),
    piece=st.sampled_from([1, 4, 4096]),
    wide=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_a_naive_loop(
    name: str, counts: list[int], clip: float, piece: int, wide: bool, seed: int
) -> None:
    dtype, limit = (torch.float64, 1e-14) if wide else (torch.float32, 1e-6)
    patients = np.repeat(np.arange(len(counts)) * 3, counts)
    module, (x, y) = made(name, dtype, seed), rows(name, len(patients), dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        seen = scales_of(patch)
        found = clipped_sum(module, x, y, patients, losses, clip, piece_rows=piece)
    exact = made(name, torch.float64, seed)
    exact.load_state_dict({key: value.double() for key, value in module.state_dict().items()})
    vectors = gradients(exact, x.double() if x.is_floating_point() else x, y, patients)
    each = torch.cat(seen).numpy()[np.flatnonzero(np.diff(patients, prepend=-1))]
    size = sum(float(c) * np.linalg.norm(v) for c, v in zip(each, vectors, strict=True))
    assert np.linalg.norm(found - naive(vectors, list(each), found.size)) <= 20 * limit * max(size, 1e-30)
    # The scale is the exact one, but for what covers cancellation and the rounding of the activations.
    for c, vector in zip(each, vectors, strict=True):
        norm = float(np.linalg.norm(vector))
        assert c * norm <= clip * (1 + 20 * limit)
        assert c >= min(1.0, clip / max(norm, 1e-30)) * (1 - 1e-3)


def test_relative_to_the_same_scales_it_is_as_exact_as_stated() -> None:
    """On ordinary rows, where the sum is not small beside its parts."""
    for name in MODELS:
        for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            module, (x, y) = made(name, dtype), rows(name, 30, dtype)
            y[:] = 1
            patients = np.repeat(np.arange(10), 3)
            found = clipped_sum(module, x, y, patients, losses, 1e9)
            vectors = gradients(module.double(), x.double() if x.is_floating_point() else x, y, patients)
            assert close(found, naive(vectors, [1.0] * 10, found.size), limit), name


# Opacus hooks an embedding, whose inputs are indices and have no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["logistic", "mlp", "sequences", "grouped"])
def test_agrees_with_opacus_where_nothing_is_clipped(name: str) -> None:
    module, (x, y) = made(name), rows(name, 24)
    found = clipped_sum(module, x, y, np.arange(24), losses, 1e9)
    wrapped = GradSampleModule(made(name), batch_first=True, loss_reduction="sum")
    if x.is_floating_point():
        x.requires_grad_()
    losses(wrapped, x, y).sum().backward()
    samples = [p.grad_sample.sum(0).flatten() for p in wrapped.parameters()]  # type: ignore[attr-defined]
    assert close(found, torch.cat(samples).detach().numpy(), 1e-14)


def test_without_rows_it_is_zero() -> None:
    for name in MODELS:
        module, (x, y) = made(name), rows(name, 5)
        found = clipped_sum(module, x[:0], y[:0], np.zeros(0, dtype=np.int64), losses, 1.0)
        assert found.tolist() == [0.0] * sum(p.numel() for p in module.parameters())


def exact_norm(a: torch.Tensor, b: torch.Tensor, bias: bool) -> float:
    """Norm of sum_t b_t a_t^T, in rationals but for the root, from below."""
    rational_a = [[Fraction(value) for value in row] for row in a.double().tolist()]
    rational_b = [[Fraction(value) for value in row] for row in b.double().tolist()]
    if bias:
        rational_a = [[*row, Fraction(1)] for row in rational_a]
    total = Fraction(0)
    for i in range(len(rational_a[0])):
        for j in range(len(rational_b[0])):
            total += sum((x[i] * y[j] for x, y in zip(rational_a, rational_b, strict=True)), Fraction(0)) ** 2
    return math.sqrt(total) * (1 - 1e-15)


@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(1, 12),
    shape=st.sampled_from([(1, 1), (2, 3), (9, 8)]),
    bias=st.booleans(),
    cancels=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_norms_are_never_too_small(
    t: int, shape: tuple[int, int], bias: bool, cancels: bool, wide: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    dtype = torch.float64 if wide else torch.float32
    a = torch.tensor(rng.normal(size=(1, t, shape[0])) * 10.0 ** rng.integers(-3, 4), dtype=dtype)
    b = torch.tensor(rng.normal(size=(1, t, shape[1])), dtype=dtype)
    if cancels:
        # Every position twice, with the other sign: what is left is one position's rounding.
        a = torch.cat([a, a], 1)
        b = torch.cat([b, -b * (1 + torch.finfo(dtype).eps)], 1)
    layer = nn.Linear(*shape, bias=bias, dtype=dtype)
    squared = engine._Captured(layer, a, b).squared_norms()
    assert float(squared.sqrt()) >= exact_norm(a[0], b[0], bias)


def test_the_cancellation_attack_is_clipped() -> None:
    """At T = 48 in float32 the Gram trick alone let a gradient of 41 C through (notes on engines)."""
    rng = np.random.default_rng(3)
    for seed in range(20):
        t, d, p = 48, 80, 80
        direction = rng.normal(size=(1, d))
        a = torch.tensor(
            np.repeat(direction * 1e4, t, 0)[None] + rng.normal(size=(1, t, d)) * 1e-3, dtype=torch.float32
        )
        signs = np.where(np.arange(t) % 2 == 0, 1.0, -1.0)[:, None]
        b = torch.tensor((signs * rng.normal(size=(1, p)))[None], dtype=torch.float32)
        layer = nn.Linear(d, p, dtype=torch.float32)
        one = engine._Captured(layer, a, b)
        scale = engine._scale([one], 1.0)
        parts = one.contract(scale)
        clipped = math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))
        assert clipped <= 1.0 + 1e-3, seed


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(["logistic", "mlp", "twice", "sequences", "grouped"]))
def test_a_neighbour_moves_the_sum_by_at_most_the_clip(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    patients = np.sort(rng.integers(0, 6, 25))
    module, (x, y) = made(name, seed=seed), rows(name, 25, seed=seed)
    if x.is_floating_point():
        x = x * 10.0 ** float(rng.integers(-2, 6))
    one = int(rng.choice(patients))
    others = torch.from_numpy(patients != one)
    whole = clipped_sum(module, x, y, patients, losses, 0.7)
    without = clipped_sum(module, x[others], y[others], patients[patients != one], losses, 0.7)
    assert np.linalg.norm(whole - without) <= 0.7 * (1 + 1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("counts", [[1] * 8, [3, 1, 4]])
def test_a_non_finite_patient_is_zero(value: float, counts: list[int]) -> None:
    patients = np.repeat(np.arange(len(counts)), counts)
    for name in ("logistic", "mlp", "twice", "grouped"):
        module, (x, y) = made(name), rows(name, 8)
        others = torch.from_numpy(patients != 1)
        expected = clipped_sum(module, x[others], y[others], patients[patients != 1], losses, 0.7)
        x[patients == 1] = value
        found = clipped_sum(module, x, y, patients, losses, 0.7)
        assert np.isfinite(found).all()
        if not math.isfinite(value):
            assert close(found, expected, 1e-14)
        assert np.linalg.norm(found - expected) <= 0.7 * (1 + 1e-9)


def test_nothing_stays_on_the_module() -> None:
    module, (x, y) = made("mlp"), rows("mlp", 6)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = clipped_sum(module, x, y, np.arange(6), losses, 1.0)

    def broken(_module: nn.Module, _x: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        clipped_sum(module, x, y, np.arange(6), broken, 1.0)
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())
    torch.manual_seed(6)
    assert (clipped_sum(module, x, y, np.arange(6), losses, 1.0) == first).all()
    torch.manual_seed(5)
    assert (torch.get_rng_state() == before).all()


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x * self.scale)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.unsqueeze(0)).squeeze(0)


def tied() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, second)


def frozen() -> nn.Module:
    module = nn.Linear(6, CLASSES)
    module.bias.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), "1 .BatchNorm1d. computes with other"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False)), "other patients"),
        (lambda: nn.Conv1d(6, 4, 3), "the model .Conv1d. has no clipping rule"),
        (lambda: nn.LSTM(6, 4), "LSTM. has no clipping rule"),
        (lambda: nn.MultiheadAttention(6, 2), "MultiheadAttention. has no clipping rule"),
        (Loose, "Loose. has no clipping rule"),
        (tied, "layer 1 .Linear. shares or freezes"),
        (frozen, "shares or freezes"),
        (lambda: nn.Embedding(3, 4, max_norm=1.0), "changes its gradients"),
        (lambda: nn.Embedding(3, 4, sparse=True), "changes its gradients"),
    ],
)
def test_layers_without_a_rule_are_refused(module: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(RefusedError, match=said) as caught:
        check_supported(module())
    assert caught.value.code == "training.layer"
    assert caught.value.remedy


def test_a_layer_that_sees_other_than_a_row_each_is_refused() -> None:
    x, y = rows("logistic", 5)
    with pytest.raises(RefusedError, match="one entry a row"):
        clipped_sum(Turned().double(), x, y, np.arange(5), losses, 1.0)
    planes = nn.Sequential(nn.LayerNorm((2, 3)), nn.Flatten(), nn.Linear(6, CLASSES)).double()
    with pytest.raises(RefusedError, match="several dimensions"):
        clipped_sum(planes, x.view(5, 2, 3), y, np.arange(5), losses, 1.0)
