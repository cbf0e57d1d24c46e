"""Every kind of model: its layout, torch's own weights, losses against formulas, one row at a time."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from common.contract.labels import AMOUNT_STEPS
from common.tasks.models import initial_norm, initial_state
from common.tasks.models.layout import layout
from common.tasks.models.modules import build, load, losses, named
from common.tasks.models.projection import projection
from common.tasks.models.sequences import Translator
from common.tasks.state import check_state
from tests.common.tasks.kinds import KINDS, TRAINED, encoded, manifest_of, study_of


def started(name: str) -> tuple[Any, nn.Module]:
    study = study_of(name)
    rng = np.random.default_rng(1)
    state = {
        t.name: rng.normal(0, 0.5, t.shape).astype(np.float32) for t in layout(study.model, study.contract)
    }
    return study, load(build(study.model, study.contract), state).requires_grad_(False)


@pytest.mark.parametrize("name", TRAINED)
def test_modules_match_their_layout(name: str) -> None:
    study = study_of(name)
    module = build(study.model, study.contract)
    found = [(key, tuple(p.shape)) for key, p in named(module).items()]
    assert found == [(t.name, t.shape) for t in layout(study.model, study.contract)]
    assert not list(module.buffers())
    assert all(p.dtype == torch.float64 and not p.any() for p in module.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_starts_are_within_their_norm(name: str) -> None:
    study = study_of(name)
    bound = initial_norm(study.model, study.contract)
    check_state(initial_state(manifest_of(study)), layout(study.model, study.contract), bound)


@pytest.mark.parametrize("name", TRAINED)
def test_building_draws_no_random_numbers(name: str) -> None:
    study = study_of(name)
    before = torch.get_rng_state()
    build(study.model, study.contract)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", TRAINED)
def test_each_row_is_alone(name: str) -> None:
    study, module = started(name)
    x, y = (torch.from_numpy(part) for part in encoded(study.contract, 7))
    loss = losses(study.model, study.contract)
    whole = loss(module, x, y)
    assert whole.shape == (7,)
    assert torch.isfinite(whole).all()
    each = torch.cat([loss(module, x[i : i + 1], y[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(whole, each, rtol=1e-12, atol=1e-12)
    assert loss(module, x[:0], y[:0]).shape == (0,)


def loaded(ours: nn.Module, theirs: nn.Module, prefix: str) -> Any:
    own = {key.removeprefix(prefix): p for key, p in named(ours).items() if key.startswith(prefix)}
    theirs.load_state_dict(own)
    return theirs.double().eval()


@pytest.mark.parametrize(("name", "cell"), [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_cells_are_torchs(name: str, cell: Any) -> None:
    study, module = started(name)
    theirs = loaded(module, cell(4, 3, batch_first=True), "rnn.")
    x = torch.from_numpy(encoded(study.contract, 5)[0])
    where = slice(2, 18) if name == "lstm" else slice(0, 16)
    steps = theirs(x[:, where].reshape(5, 4, 4))[0][:, -1]
    sex = x[:, :2] if name == "lstm" else x[:, 16:]
    head = named(module)
    expected = torch.cat([steps, sex], 1) @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


# torch warns that its fast path is not taken for norm_first.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_encoder_is_torchs() -> None:
    study, module = started("transformer")
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
    theirs = loaded(module, nn.TransformerEncoder(layer, 2, nn.LayerNorm(4)), "encoder.")
    x = torch.from_numpy(encoded(study.contract, 9)[0])
    pairs = x[:, :10].reshape(9, 5, 2)
    some = (pairs[:, :, 0] != 0).any(1)
    x, pairs = x[some], pairs[some]
    absent, parts = pairs[:, :, 0] == 0, named(module)
    embedded = parts["embedding.weight"][pairs[:, :, 0].long()]
    embedded = embedded + pairs[:, :, 1:] @ parts["time.weight"].T + parts["time.bias"]
    there = (~absent).double()[:, :, None]
    mean = (theirs(embedded, src_key_padding_mask=absent) * there).sum(1) / there.sum(1)
    expected = torch.cat([mean, x[:, 10:]], 1) @ parts["head.weight"].T + parts["head.bias"]
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_padding_changes_nothing() -> None:
    """Of a translator's source, and of an encoder's events."""
    study, module = started("translator")
    x = torch.from_numpy(encoded(study.contract, 4)[0])
    x[:, 2:6] = 0.0
    x[:, 0] = 3.0
    x[:, 1] = 0.0
    short = x.clone()
    assert isinstance(module, Translator)
    _state, (outputs, absent) = module._encoded(x)
    weights = torch.softmax(absent, 1)
    assert (weights[:, 1:] == 0).all()
    assert torch.equal(outputs[:, 1], outputs[:, 0])
    assert torch.equal(module.greedy(x), module.greedy(short))
    assert module.greedy(x).shape == (4, 3)


def test_a_greedy_translation_is_the_likeliest_step_by_step() -> None:
    study, module = started("translator")
    x = torch.from_numpy(encoded(study.contract, 6)[0])
    assert isinstance(module, Translator)
    found = module.greedy(x)
    again = x.clone()
    again[:, module.places[1]] = found.double()
    best = module(again).argmax(2)
    ended = torch.cumsum((found == 0).long(), 1) > 1
    assert torch.equal(best.masked_fill(ended, 0), found)


def test_a_kernel_is_a_gaussian() -> None:
    """The features' inner products approach exp(-|x - y|^2 / 2 s^2)."""
    study = study_of(
        "kernel", model={"kind": "kernel_svm", "random_features": 20000, "bandwidth": 0.8, "seed": 5}
    )
    directions, phases = projection(study.model, study.contract)  # type: ignore[arg-type]
    x = encoded(study.contract, 6)[0]
    z = np.cos(x @ directions + phases) * math.sqrt(2 / 20000)
    squared = np.square(x[:, None] - x[None]).sum(2)
    assert np.abs(z @ z.T - np.exp(-squared / (2 * 0.64))).max() < 0.03


def test_losses_are_their_formulas() -> None:
    study, module = started("svm")
    x, y = (torch.from_numpy(part) for part in encoded(study.contract, 6))
    scores = module(x)
    expected = [
        max(0.0, 1 + max(float(row[k]) for k in range(3) if k != label) - float(row[label]))
        for row, label in zip(scores, y.tolist(), strict=True)
    ]
    assert losses(study.model, study.contract)(module, x, y).tolist() == pytest.approx(expected)
    study, module = started("linear")
    x, y = (torch.from_numpy(part) for part in encoded(study.contract, 6))
    values = 2 * y / AMOUNT_STEPS - 1
    torch.testing.assert_close(
        losses(study.model, study.contract)(module, x, y), (module(x)[:, 0] - values) ** 2 / 2
    )
    study, module = started("autoencoder")
    x, y = (torch.from_numpy(part) for part in encoded(study.contract, 6))
    torch.testing.assert_close(
        losses(study.model, study.contract)(module, x, y), ((module(x) - x) ** 2).sum(1) / 2
    )


def test_a_hazard_is_the_likelihood_of_its_intervals() -> None:
    study, module = started("cox")
    x, y = (torch.from_numpy(part) for part in encoded(study.contract, 12))
    hazards = 1 - torch.exp(-torch.exp(module(x)))
    for row, label, found in zip(
        hazards, y.tolist(), losses(study.model, study.contract)(module, x, y), strict=True
    ):
        interval, event = divmod(label, 2)
        likelihood = math.prod(1 - float(h) for h in row[:interval])
        likelihood *= float(row[interval]) if event else 1 - float(row[interval])
        assert float(found) == pytest.approx(-math.log(likelihood), rel=1e-9)


def test_neighbours_are_predicted_by_each_other() -> None:
    study, module = started("skip_gram")
    x, y = (torch.from_numpy(part) for part in encoded(study.contract, 8))
    parts = named(module)
    for row, found in zip(x.long(), losses(study.model, study.contract)(module, x, y), strict=True):
        terms = [int(t) for t in row if t]
        pairs = [(a, b) for i, a in enumerate(terms) for j, b in enumerate(terms) if 0 < abs(i - j) <= 2]
        each = [
            functional.cross_entropy(
                parts["embedding.weight"][a] @ parts["output.weight"].T + parts["output.bias"],
                torch.tensor(b),
            ).item()
            for a, b in pairs
        ]
        assert float(found) == pytest.approx(sum(each) / len(each) if each else 0.0)
