"""A step on ``clipped_sum`` beside a plain SGD step on the same batch, and beside Opacus: one thread, float32.

A plain step is forward, backward and ``torch.optim.SGD``. None of the private steps adds noise. Opacus gets
the layout that is fastest for it: patients as rows, their own rows as positions, padded with rows of no loss.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import cross_entropy

from common.tasks.clipped_sum import clipped_sum
from tests.bench.masking import one_core
from tests.bench.result import Result

Step: TypeAlias = Callable[[], object]

PATIENTS = 256
FEATURES = 30
CLIP = 1.0
RATE: Final = 0.01
WARM, TURNS = 30, 400
BLOCK, BLOCKS = 20, 20


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_core(), warnings.catch_warnings():
            # Opacus hooks a first layer, whose inputs have no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        torch.set_num_threads(before)


def cpu_medians(*steps: Step, turns: int = TURNS) -> list[float]:
    """The median CPU seconds of each step, of all threads of the process; the steps take turns."""
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(WARM + turns):
        for times, step in zip(taken, steps, strict=True):
            started = time.process_time()
            step()
            if turn >= WARM:
                times.append(time.process_time() - started)
    return [statistics.median(times) for times in taken]


@dataclass(frozen=True)
class Batch:
    """Rows sorted by patient, and the same padded to [patients, most rows]; ``mask`` is 0 on padding."""

    x: torch.Tensor
    y: torch.Tensor
    patients: NDArray[np.int64]
    padded_x: torch.Tensor
    padded_y: torch.Tensor
    mask: torch.Tensor


def batch(most: int) -> Batch:
    rng = np.random.default_rng(7)
    counts = rng.integers(1, most + 1, PATIENTS)
    patients = np.repeat(np.arange(PATIENTS), counts)
    x = torch.tensor(rng.normal(size=(len(patients), FEATURES)), dtype=torch.float32)
    y = torch.tensor(rng.integers(0, 2, len(patients)))
    if most == 1:
        return Batch(x, y, patients, x, y, torch.ones(PATIENTS))
    mask = torch.arange(most)[None, :] < torch.from_numpy(counts)[:, None]
    padded_x, padded_y = torch.zeros(PATIENTS, most, FEATURES), torch.zeros(PATIENTS, most, dtype=torch.int64)
    padded_x[mask], padded_y[mask] = x, y
    return Batch(x, y, patients, padded_x, padded_y, mask.float())


def losses(module: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(module(x), labels, reduction="none")


def of_patients(module: nn.Module, rows: Batch) -> torch.Tensor:
    """The sum of the losses of each patient's rows, on the padded rows."""
    each = losses(lambda x: module(x).flatten(0, -2), rows.padded_x, rows.padded_y.flatten())
    return (each.view(rows.mask.shape) * rows.mask).view(PATIENTS, -1).sum(1)


def plain(module: nn.Module, rows: Batch) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(module(rows.x), rows.y).backward()
        optimizer.step()

    return step


def bookkeeping(module: nn.Module, rows: Batch) -> Step:
    parameters = [p.detach().numpy().reshape(-1) for p in module.parameters()]
    ends = np.cumsum([p.size for p in parameters])
    slices = [slice(end - p.size, end) for p, end in zip(parameters, ends, strict=True)]

    def step() -> None:
        found = clipped_sum(module, rows.x, rows.y, rows.patients, losses, CLIP)
        found *= RATE / PATIENTS
        for p, own in zip(parameters, slices, strict=True):
            p -= found[own]

    return step


def hooks(module: nn.Module, rows: Batch) -> Step:
    """Opacus with the gradient of every patient, and its optimizer without noise."""
    wrapped = GradSampleModule(module, batch_first=True, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=PATIENTS,
    )

    def step() -> None:
        optimizer.zero_grad()
        of_patients(wrapped, rows).sum().backward()
        optimizer.step()

    return step


def ghost(module: nn.Module, rows: Batch) -> Step:
    """Opacus with the norms alone, then a second backward pass weighted by what they ask for."""
    wrapped = GradSampleModuleFastGradientClipping(
        module, batch_first=True, loss_reduction="sum", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=RATE / PATIENTS)

    def step() -> None:
        optimizer.zero_grad()
        each = of_patients(wrapped, rows)
        each.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        weights = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (weights * each).sum().backward()
        optimizer.step()
        wrapped.enable_hooks()

    return step


def agree(module: nn.Module, rows: Batch, *ways: Callable[[nn.Module, Batch], Step]) -> None:
    """Raise unless one step of each way leads to the same parameters."""
    moved = []
    for way in ways:
        other = copy.deepcopy(module)
        way(other, rows)()
        moved.append(nn.utils.parameters_to_vector(other.parameters()).detach())
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    for end in moved[1:]:
        if (end - moved[0]).norm() > 1e-3 * (moved[0] - start).norm():
            raise RuntimeError("the engines do not take the same step")


def logistic() -> nn.Module:
    return nn.Linear(FEATURES, 2)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
    )


def in_a_row(step: Step) -> Step:
    def block() -> None:
        for _ in range(BLOCK):
            step()

    return block


def compared(name: str, make: Callable[[], nn.Module], most: int, target: float) -> list[Result]:
    torch.manual_seed(7)
    module, rows = make(), batch(most)
    agree(module, rows, bookkeeping, hooks, ghost)
    # In pairs: what a third engine leaves in the caches of the processor is no cost of these two.
    plain_s, ours_s = cpu_medians(
        plain(copy.deepcopy(module), rows), bookkeeping(copy.deepcopy(module), rows)
    )
    # Steps in a row, as in training, find the processor's caches warm: a small plain step gains most by it.
    blocks = [in_a_row(way(copy.deepcopy(module), rows)) for way in (plain, bookkeeping)]
    plain_row_s, ours_row_s = cpu_medians(*blocks, turns=BLOCKS)
    results = [
        Result(f"engines.{name}: plain SGD step", plain_s * 1e6, "µs"),
        Result(f"engines.{name}: book-keeping / plain", ours_s / plain_s, "x", target),
        Result(f"engines.{name}: book-keeping / plain, {BLOCK} in a row", ours_row_s / plain_row_s, "x"),
    ]
    ratios = {}
    for way in (hooks, ghost):
        plain_s, theirs_s = cpu_medians(plain(copy.deepcopy(module), rows), way(copy.deepcopy(module), rows))
        ratios[way.__name__] = theirs_s / plain_s
    mode = min(ratios, key=ratios.__getitem__)
    return [*results, Result(f"engines.{name}: Opacus at its best ({mode}) / plain", ratios[mode], "x")]


def run() -> list[Result]:
    with one_thread():
        return [
            *compared("logistic regression, 256 rows", logistic, 1, 1.6),
            *compared("MLP 30-128-128-2, 256 rows", mlp, 1, 1.9),
            *compared("MLP 30-128-128-2, 256 patients of 1-8 rows", mlp, 8, 2.6),
        ]
