"""The MLP: torch's own layers and names, a public start, no seed."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from torch import nn

from common.contract import Contract, Label, Number
from common.encoding import digest
from common.identity import key_text
from common.methods import LogisticRegression, Mlp
from common.study import Manifest, Party, Study
from common.tasks.models import build, initial_norm, initial_state
from common.tasks.models.layout import layout
from common.tasks.state import check_state
from tests.federation import small_study

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
MLP = Mlp(kind="mlp", hidden=(5, 4))


def contract_of(width: int, classes: int) -> Contract:
    return Contract(
        patient="patient",
        features=tuple(
            Number(kind="number", name=f"x{i}", unit="1", minimum=0.0, maximum=1.0) for i in range(width)
        ),
        label=Label(name="ill", classes=tuple(str(k) for k in range(classes))),
    )


def manifest(run: str = "ab", **model: Any) -> Manifest:
    study = Study.model_validate(
        small_study(["A", "B", "C"], model={"kind": "mlp", "hidden": [300, 250]} | model)
    )
    return Manifest(
        schema=1,
        run=run * 16,
        roster="cd" * 32,
        hub=key_text(b"\x09" + bytes(31)),
        coordinator=key_text(b"\x0a" + bytes(31)),
        members=tuple(Party(id=i, name=name) for i, name in enumerate(study.members, 1)),
        study=study,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(1,), (5,), (5, 4), (3, 3, 3, 3)])
def test_modules_match_their_layout(hidden: tuple[int, ...], activation: Any) -> None:
    model, contract = Mlp(kind="mlp", hidden=hidden, activation=activation), contract_of(6, 3)
    module = build(model, contract)
    named = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    assert named == [(tensor.name, tensor.shape) for tensor in layout(model, contract)]
    assert list(module.state_dict()) == [name for name, _ in named]
    assert all(p.dtype == torch.float64 and not p.detach().any() for p in module.parameters())
    assert all(type(part) in (nn.Linear, ACTIVATIONS[activation]) for part in module.children())
    assert module.training


def test_a_state_loads_in_plain_torch_and_computes_the_same() -> None:
    whole = manifest(hidden=[5, 4], activation="tanh")
    state = initial_state(whole)
    plain = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    plain.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
    ours = build(whole.study.model, whole.study.contract)
    ours.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
    rows = torch.linspace(-1, 1, 12).reshape(6, 2)
    assert torch.allclose(plain(rows).double(), ours(rows.double()), atol=1e-6)
    assert plain(rows).std() > 0.01


def test_building_draws_no_random_numbers() -> None:
    for model in (MLP, LogisticRegression(kind="logistic_regression")):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        build(model, contract_of(4, 3))
        assert (torch.get_rng_state() == before).all()


def test_starts_are_reproducible() -> None:
    """Another reading of the definition, word by word with Python's integers."""
    whole = manifest(hidden=[5, 4])
    state = initial_state(whole)
    check_state(state, layout(whole.study.model, whole.study.contract), 100.0)
    for index, (inputs, outputs) in enumerate(pairwise([2, 5, 4, 2])):
        name = f"{2 * index}.weight"
        half = math.sqrt(6 / inputs) if index < 2 else math.sqrt(6 / (inputs + outputs))
        key = digest("initial", whole.digest, name.encode())
        stream = Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(4 * inputs * outputs))
        words = [int.from_bytes(stream[at : at + 4], "little") for at in range(0, len(stream), 4)]
        expected = [np.float32(half * (2 * (w >> 8) + 1 - 2**24) / 2**24) for w in words]
        assert state[name].ravel().tolist() == [float(value) for value in expected]
        assert not state[f"{2 * index}.bias"].any()
    again, other = initial_state(manifest(hidden=[5, 4])), initial_state(manifest(run="ba", hidden=[5, 4]))
    for name, value in state.items():
        assert (again[name] == value).all()
        assert name.endswith("bias") or (other[name] != value).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_starts_are_within_their_norm(activation: str) -> None:
    """Uniform numbers: a third of the bound's square, with the variance of so many."""
    whole = manifest(activation=activation)
    state = initial_state(whole)
    bound = initial_norm(whole.study.model, whole.study.contract)
    squares = sum(float(np.square(value, dtype=np.float64).sum()) for value in state.values())
    assert squares == pytest.approx(bound**2 / 3, rel=0.03)
    middle = state["2.weight"]
    inputs, outputs = middle.shape[1], middle.shape[0]
    half = math.sqrt(6 / (inputs + outputs)) if activation == "tanh" else math.sqrt(6 / inputs)
    assert np.abs(middle).max() <= half
    assert np.abs(middle).max() > 0.999 * half
    assert abs(middle.mean()) < 5 * half / math.sqrt(3 * middle.size)
    assert initial_norm(LogisticRegression(kind="logistic_regression"), whole.study.contract) == 0
