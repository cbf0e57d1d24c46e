from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common.contract import Contract, Label, Number
from common.methods import LogisticRegression
from common.tasks.models import build, initial_state
from common.tasks.models.layout import layout
from common.tasks.state import check_state

MODEL = LogisticRegression(kind="logistic_regression")


def make_contract(width, classes):
    return Contract(
        patient="patient",
        features=tuple(
            Number(kind="number", name=f"x{i}", unit="1", minimum=0.0, maximum=1.0) for i in range(width)
        ),
        label=Label(name="ill", classes=tuple(str(k) for k in range(classes))),
    )


@pytest.mark.parametrize("width", [1, 30])
@pytest.mark.parametrize("classes", [2, 5])
def test_modules_match_their_layout(width, classes):
    contract = make_contract(width, classes)
    module = build(MODEL, contract)
    named = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    assert named == [(tensor.name, tensor.shape) for tensor in layout(MODEL, contract)]
    assert list(module.state_dict()) == [name for name, _ in named]
    assert all(p.dtype == torch.float64 and not p.detach().any() for p in module.parameters())
    assert type(module) is nn.Linear
    assert module.training


def test_it_computes_one_logit_a_class():
    module = build(MODEL, make_contract(3, 2))
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]))
        module.bias.copy_(torch.tensor([10.0, 20.0]))
    logits = module(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 2.0]], dtype=torch.float64))
    assert np.array_equal(logits.detach().numpy(), [[16.0, 20.0], [16.0, 22.0]])


def test_the_initial_state_is_zeros_of_the_layout():
    contract = make_contract(4, 3)
    manifest = SimpleNamespace(study=SimpleNamespace(model=MODEL, contract=contract, evaluation=None))
    state = initial_state(manifest)
    check_state(state, layout(MODEL, contract), 0.0)  # a norm of at most 0
    assert list(state) == ["weight", "bias"]
