"""Every template on its planted data: pooled, federated without and with privacy, and each hospital alone.

The federation runs in this process: the sites' own computation, gates, codec, noise and server step, without
keys and links. ``pooled`` is the same model by Adam on all rows, without privacy. Each metric is high where a
model is good. Data, split and noise differ by seed.
"""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from common.admissible import Admitted, check
from common.contract import Contract
from common.contract.labels import AMOUNT_STEPS
from common.identity import key_text
from common.methods import RandomForest, Statistics
from common.privacy.accountant import noise_for_epsilon
from common.privacy.noise import discrete_gaussian
from common.secagg.codec import from_words, to_words
from common.secagg.noise import with_noise
from common.study import Manifest, Party, Study
from common.synthetic import columns_of
from common.tasks import forest, metrics, statistics
from common.tasks.evaluation import bounded_error
from common.tasks.holdout import HeldOut
from common.tasks.models import initial_state
from common.tasks.models.layout import layout
from common.tasks.models.modules import build, load, losses, named
from common.tasks.models.prediction import predict
from common.tasks.state import State
from common.tasks.training import contribute, train_local
from server.demo_data import split_rows
from server.strategy import ServerStep
from tests.bench.result import Result

NAMES: Final = ("A", "B", "C", "D")
SEEDS: Final = (0, 1, 2)
TEST: Final = 3000
ADAM_STEPS: Final = 150
# Without clipping a squared error bounds the step; elsewhere the template's serves.
PLAIN_RATES: Final = {
    "bed-demand": 0.3,
    "image-classification": 0.3,
    "laboratory-anomalies": 0.1,
    "codes-from-notes": 1.0,
}
SHARES: Final = (0.4, 0.3, 0.2, 0.1)
Rows = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True)
class Template:
    """A template as a study of four hospitals, with and without privacy."""

    name: str
    private: Study
    plain: Study
    patients: int


def templates() -> list[str]:
    """All of them."""
    folder = files("server").joinpath("templates/studies")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir())


def read(name: str) -> Template:
    text = files("server").joinpath(f"templates/studies/{name}.toml").read_text(encoding="utf-8")
    value: dict[str, Any] = tomllib.loads(text) | {"members": list(NAMES)}
    private = Study.model_validate(value)
    training = value["training"]
    plain = value | {
        "privacy": {"kind": "without_differential_privacy"},
        "training": {
            "mode": "local", "rounds": training["rounds"], "steps": 1 if private.counts else 5,
            "learning_rate": PLAIN_RATES.get(name, training["learning_rate"]),
            "patients_public": training["patients_public"],
        },
        "aggregation": value["aggregation"] | {"codec": {"bits": 32, "step": 1e-5, "range": 4000.0}},
    }  # fmt: skip
    return Template(name, private, Study.model_validate(plain), training["patients_public"])


def manifest_of(study: Study) -> Manifest:
    return Manifest(
        schema=1,
        run="ab" * 16,
        roster="cd" * 32,
        hub=key_text(b"\x09" + bytes(31)),
        coordinator=key_text(b"\x0a" + bytes(31)),
        members=tuple(Party(id=i, name=name) for i, name in enumerate(study.members, 1)),
        study=study,
    )


def rows_of(study: Study, count: int, seed: int) -> Rows:
    contract = study.contract
    columns: dict[str, Any] = dict(
        columns_of(contract, count, seed, anomalies=study.model.kind == "autoencoder")
    )
    return contract.encode({name: _cells(values) for name, values in columns.items()})


def _cells(values: Sequence[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        return np.stack(values)
    if any(isinstance(value, str) and value.startswith("[") for value in values):
        import json

        return [json.loads(value) for value in values]
    return list(values)


def federate(study: Study, parts: Sequence[Rows]) -> tuple[State, Admitted]:
    """All rounds of a study over hospitals, in this process."""
    manifest = manifest_of(study)
    admitted = check(manifest, None)
    step, state = ServerStep(manifest), dict(initial_state(manifest))
    nobody = np.zeros(0, dtype=np.int64)
    for _ in range(study.training.rounds):
        total: Any = 0
        for member, (x, y) in enumerate(parts):
            held = None
            if study.evaluation is not None:
                held = HeldOut(x[:0], y[:0], nobody, 0, member)
            patients = np.arange(len(x))
            if admitted.shared:
                q = contribute(state, x, y, patients, study, admitted.shared_gate(os.urandom), held).q
                words = to_words(q, 32, q.size, 2**31 - 1, "sums")
                share = admitted.shares[-1]
                noisy = with_noise(words, share, os.urandom(32), os.urandom(32), discrete_gaussian)
                total = total + from_words(noisy).astype(np.int64)
            else:
                gate = admitted.gate(os.urandom)
                change = train_local(state, x, y, patients, study, gate, lambda _a, _b: None, held, member)
                total = total + gate.finish(change, admitted.quantiser(os.urandom)).q
        state = step.advance(state, total, admitted.codec.step, len(parts))
    return state, admitted


def pooled(study: Study, x: NDArray[np.float64], y: NDArray[np.int64]) -> State:
    """The model by Adam on these rows, or their counts."""
    if study.counts:
        state, _ = federate(study, [(x, y)] * 1 + [(x[:0], y[:0])] * 3)
        return state
    start = initial_state(manifest_of(study))
    tensors = layout(study.model, study.contract)
    module = load(build(study.model, study.contract), {t.name: start[t.name] for t in tensors})
    loss, inputs, labels = losses(study.model, study.contract), torch.tensor(x), torch.tensor(y)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(ADAM_STEPS):
        optimizer.zero_grad()
        loss(module, inputs, labels).mean().backward()
        optimizer.step()
    return {key: p.detach().numpy().astype(np.float32) for key, p in named(module).items()}


def score(study: Study, state: State, test: Rows, noise_sd: float) -> float:
    """The metric of the template's kind: AUROC, R2, C-index, share right, or 1 minus the mean error."""
    model, contract, (x, y) = study.model, study.contract, test
    if isinstance(model, Statistics):
        exact = statistics.phi(model, contract, x, y).sum(axis=0)
        return 1.0 - _distance(model, contract, state["counts"], exact, noise_sd)
    if isinstance(model, RandomForest):
        found = forest.read_out(forest.plant(model, contract), state["leaves"].astype(float), noise_sd)
        return _auroc(y, found.scores(x)[:, 1])
    tensors = layout(model, contract)
    module = load(build(model, contract), {t.name: state[t.name] for t in tensors})
    said = predict(model, contract, module, x)
    if model.kind in ("skip_gram", "sequence_to_sequence"):
        return float(said[:, 0].mean())
    if model.kind == "autoencoder":
        return _auroc(y, bounded_error(said[:, 0]))
    if contract.label.kind == "number":
        truth = 2 * y / AMOUNT_STEPS - 1
        return float(1 - np.square(said[:, 0] - truth).mean() / truth.var())
    if contract.label.kind == "time_to_event":
        return _concordance(y, 1 - said.mean(axis=1))
    return _auroc(y, said[:, 1])


def _auroc(y: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, scores))


def _concordance(y: NDArray[np.int64], risk: NDArray[np.float64]) -> float:
    ranks = np.argsort(np.argsort(risk))
    bins, counts = 200, np.zeros((200, int(y.max()) // 2 + 1, 2))
    np.add.at(counts, (ranks * bins // len(ranks), y // 2, y % 2), 1.0)
    return metrics.concordance(counts)["c-index"]


def _distance(model: Statistics, contract: Contract, counts: Any, exact: Any, noise_sd: float) -> float:
    """The mean relative error of the means, medians and survival of each group."""
    found = statistics.read_out(model, contract, counts.astype(float), noise_sd)
    truth = statistics.read_out(model, contract, exact, 0.0)
    errors = []
    for group in ("female", "male"):
        for block, values in truth["groups"][group].items():
            for name, value in values.items():
                if name in ("mean", "quantile 0.5") or name.startswith("interval"):
                    other = found["groups"][group][block][name].value
                    errors.append(abs(other - value.value) / abs(value.value))
    return float(np.mean(errors))


def one(template: Template, seed: int) -> dict[str, float]:
    private, plain = template.private, template.plain
    count = round(template.patients * len(NAMES) * 0.8)
    x, y = rows_of(private, count, 100 + seed)
    cuts = np.cumsum(np.round(np.array(SHARES) * count).astype(int))[:-1]
    parts = list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))
    test = (x, y) if isinstance(private.model, Statistics) else rows_of(private, TEST, 900 + seed)
    found = {"pooled": score(plain, pooled(plain, x, y), test, 0.0)}
    if not private.counts:
        found["alone"] = float(np.mean([score(plain, pooled(plain, *part), test, 0.0) for part in parts]))
    state, _ = federate(plain, parts)
    found["without"] = score(plain, state, test, 0.0)
    state, admitted = federate(private, parts)
    noise_sd = (len(parts) * admitted.shares[-1]) ** 0.5 * admitted.codec.step
    found["private"] = score(private, state, test, noise_sd)
    return found


def run() -> list[Result]:
    # torch's threads would wait for each other on matrices this small.
    torch.set_num_threads(1)
    results = []
    for name in templates():
        template = read(name)
        found = [one(template, seed) for seed in SEEDS]
        means = {key: float(np.mean([entry[key] for entry in found])) for key in found[0]}
        spread = {key: float(np.std([entry[key] for entry in found])) for key in found[0]}
        print(name, {key: f"{means[key]:.4f} ({spread[key]:.4f})" for key in means}, flush=True)
        results += [
            Result(f"{name}: without DP / pooled", means["without"] / means["pooled"], "", at_least=0.98),
            Result(f"{name}: epsilon 3 / pooled", means["private"] / means["pooled"], "", at_least=0.95),
        ]
        if "alone" in means:
            alone = means["private"] / means["alone"]
            results.append(Result(f"{name}: epsilon 3 / mean alone", alone, "", at_least=1.0))
    return results + breast_cancer()


BREAST: Final = {0.3: 0.945, 1.0: 0.955, 3.0: 0.957, 8.0: 0.962}
FOREST: Final = {0.5: 0.90, 1.0: 0.93, 3.0: 0.935}
DELTA: Final = 1e-5


def breast_cancer() -> list[Result]:
    """Wisconsin breast cancer over four unlike hospitals, one noise, nobody colludes: accuracy, twenty seeds."""
    text = files("server").joinpath("templates/breast_cancer.toml").read_text(encoding="utf-8")
    whole = tomllib.loads(text) | {"members": list(NAMES)}
    results = []
    for kind, targets in (("logistic_regression", BREAST), ("random_forest", FOREST)):
        for epsilon, target in targets.items():
            found = []
            for seed in range(20):
                study = _breast(whole, kind, epsilon, seed)
                test, parts = split_rows(4, seed)
                encoded = [study.contract.encode(part.columns) for part in parts]
                state, admitted = federate(study, encoded)
                x, y = study.contract.encode(test.columns)
                if isinstance(study.model, RandomForest):
                    sd = (4 * admitted.shares[-1]) ** 0.5 * admitted.codec.step
                    planted = forest.plant(study.model, study.contract)
                    said = forest.read_out(planted, state["leaves"].astype(float), sd).scores(x)
                else:
                    said = x @ state["weight"].T + state["bias"]
                found.append(float((said.argmax(axis=1) == y).mean()))
            name = f"breast cancer, {kind}, epsilon {epsilon:g} ({np.std(found):.3f})"
            print(name, np.mean(found), flush=True)
            results.append(Result(name, float(np.mean(found)), "", at_least=target))
    return results


def _breast(whole: dict[str, Any], kind: str, epsilon: float, seed: int) -> Study:
    """The demo's study with one noise, t = 0, at that epsilon by the PLD."""
    trees = kind == "random_forest"
    depth = 3 if epsilon >= 1 else 2
    # The less there is to spend, the fewer the rounds that it is spent on.
    rounds = 1 if trees else 20 if epsilon >= 1 else 10
    clip = 14.2 if trees else 0.5
    step = clip * 1e-4 / (2 if trees else 1)
    model = {"kind": kind, "trees": 200, "depth": depth, "seed": seed} if trees else {"kind": kind}
    return Study.model_validate(
        whole
        | {
            "model": model,
            "training": {
                "mode": "shared-noise", "rounds": rounds, "steps": 1,
                "learning_rate": 1.0 if trees else BREAST_RATE, "patients_public": 114,
                "server": {"strategy": "fedavg"} if trees else BREAST_SERVER,
            },
            "privacy": whole["privacy"] | {
                "clip_norm": clip, "grid_step": step, "max_patients": 1000,
                "noise_multiplier": noise_for_epsilon(epsilon, DELTA, rounds, dim=2000, members=4),
            },
            "aggregation": whole["aggregation"] | {
                "colluders": 0, "state_norm_bound": 100.0, "codec": {"bits": 32, "step": step, "range": 2000.0, "rounding": "nearest"},
            },
        }
    )  # fmt: skip


BREAST_RATE: Final = 4.0
BREAST_SERVER: Final = {"strategy": "fedavgm", "learning_rate": 1.0, "momentum": 0.8}
