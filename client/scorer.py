"""The process that applies a model to a hospital's own rows: no network, no key, no ledger, one answer.

Source: DESIGN "The agent is two processes". Rules: it is cut off before any library is imported; what it says
stays at this hospital, in the file that a person asked for; an error leaves as a code and places, its text
stays here.
"""

import io
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, cast

from client.isolation import cut_off, refuse_sockets_and_processes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from client.sources.source import DataSource
    from common.study import Manifest
    from common.tasks.state import State

BENEFIT_STEPS = 150


def predict(source: "DataSource", manifest: "Manifest", state: "State") -> bytes:
    """What the model says of each row of a source, in its order: CSV with the patient's id as it stands."""
    import csv

    from client.sources.extract import opened
    from common.contract import NoLabel

    contract = manifest.study.contract
    plain = contract.model_copy(
        update={"label": NoLabel(kind="none"), "window": None, "query": "", "tables": ()}
    )
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    with opened(source, plain) as extract:
        found = extract.run(f"SELECT {extract.patient_text} AS p FROM extract ORDER BY {extract.row}")
        ids = [row[0] for row in found.fetchall()]
        writer.writerow([contract.patient, *_columns(manifest)])
        for start, columns in extract.batches():
            x, _ = plain.encode(columns)
            said = _said(manifest, state, x)
            for patient, values in zip(ids[start : start + len(x)], said, strict=True):
                writer.writerow([patient, *values])
    return out.getvalue().encode()


def benefit(source: "DataSource", manifest: "Manifest", state: "State", key: bytes) -> dict[str, Any]:
    """Local-only, global and fine-tuned model on this hospital's own held-out patients, by subgroup."""
    from client.sources.extract import load_table
    from common.methods import Evaluation
    from common.tasks import evaluation
    from common.tasks.models import initial_state

    study = manifest.study
    model, contract = study.model, study.contract
    train, held = (load_table(source, contract, key=key, part=part) for part in ("train", "holdout"))
    if not held.patients or not train.patients:
        return {"held_out": held.patients, "models": {}}
    rules = study.evaluation or Evaluation()
    rules = rules.model_copy(update={"per_hospital": False})
    start = initial_state(manifest)
    states = {
        "local only": _fitted(manifest, start, train.x, train.y),
        "global": state,
        "fine-tuned": _fitted(manifest, state, train.x, train.y, steps=BENEFIT_STEPS // 10),
    }
    found: dict[str, Any] = {}
    for name, values in states.items():
        counts = evaluation.cells(
            rules, model, contract, (0, 1), held.x, held.y, _predicted(manifest, values, held.x)
        ).sum(axis=0)
        read = evaluation.read_out(rules, model, contract, study.members, counts, 0.0)
        found[name] = {
            group: {key: value.to_json()["value"] for key, value in metrics.items()}
            for group, metrics in read.items()
        }
    return {"held_out": held.patients, "models": found}


def _fitted(
    manifest: "Manifest",
    state: "State",
    x: "NDArray[np.float64]",
    y: "NDArray[np.int64]",
    steps: int = BENEFIT_STEPS,
) -> "State":
    """The model after ``steps`` of Adam on these rows, without privacy: it stays here."""
    import numpy as np
    import torch

    from common.tasks.models.layout import layout
    from common.tasks.models.modules import build, load, losses, named

    study = manifest.study
    tensors = layout(study.model, study.contract)
    module = load(build(study.model, study.contract), {t.name: state[t.name] for t in tensors})
    loss, inputs, labels = losses(study.model, study.contract), torch.tensor(x), torch.tensor(y)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module, inputs, labels).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {key: p.detach().numpy().astype(np.float32) for key, p in named(module).items()}


def _predicted(manifest: "Manifest", state: "State", x: "NDArray[np.float64]") -> "NDArray[np.float64]":
    from common.tasks.models.layout import layout
    from common.tasks.models.modules import build, load
    from common.tasks.models.prediction import predict as said

    study = manifest.study
    tensors = layout(study.model, study.contract)
    module = load(build(study.model, study.contract), {t.name: state[t.name] for t in tensors})
    return said(study.model, study.contract, module, x)


def _columns(manifest: "Manifest") -> list[str]:
    from common.methods import Autoencoder

    study = manifest.study
    label = study.contract.label
    if study.model.kind == "sequence_to_sequence":
        return ["said"]
    if isinstance(study.model, Autoencoder):
        return ["error", *(f"code {at}" for at in range(study.model.code))]
    if label.kind == "classes":
        return [f"probability of {name}" for name in label.classes]
    if label.kind == "time_to_event":
        return [f"without event by {end:g}" for end in label.ends]
    return [label.name]


def _said(manifest: "Manifest", state: "State", x: "NDArray[np.float64]") -> list[list[object]]:
    """The numbers or words of each row, as a person reads them."""
    import numpy as np
    import torch

    from common.admissible import check
    from common.contract import Amount
    from common.methods import Autoencoder, RandomForest, SequenceToSequence
    from common.results import noise_sd
    from common.tasks import forest
    from common.tasks.models.layout import layout
    from common.tasks.models.modules import build, load
    from common.tasks.models.sequences import Translator

    study = manifest.study
    model, contract = study.model, study.contract
    if isinstance(model, RandomForest):
        sd = noise_sd(manifest, check(manifest, None), len(study.members))
        counts = state["leaves"].astype(np.float64)
        found = forest.read_out(forest.plant(model, contract), counts, sd).scores(x)
        return [[round(float(value), 6) for value in row] for row in found]
    if isinstance(model, SequenceToSequence):
        tensors = {t.name: state[t.name] for t in layout(model, contract)}
        module = load(build(model, contract), tensors)
        if not isinstance(module, Translator):
            raise TypeError("a model of sequences is a translator")
        target = next(f for f in contract.features if f.name == model.target)
        terms = ("", "?", *getattr(target, "codes", getattr(target, "vocabulary", ())))
        with torch.no_grad():
            tokens = module.greedy(torch.tensor(x))
        return [[" ".join(terms[int(token)] for token in row if int(token))] for row in tokens]
    said = _predicted(manifest, state, x)
    if isinstance(model, Autoencoder):
        tensors = {t.name: state[t.name] for t in layout(model, contract)}
        encoder = cast("nn.Sequential", load(build(model, contract), tensors).encoder)
        with torch.no_grad():
            said = np.concatenate([said, encoder(torch.tensor(x)).numpy()], axis=1)
    if isinstance(contract.label, Amount):
        said = contract.label.unscaled(said)
    return [[round(float(value), 6) for value in row] for row in said]


def answer(header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The answer to one question: ``op`` predict or benefit; the manifest, then the state, in ``blob``."""
    from client.sources.source import DataSource
    from common.admissible import check
    from common.errors import WardroundError
    from common.study import Manifest
    from common.tasks.state import load_state

    try:
        size = int(header["manifest"])
        manifest = Manifest.from_bytes(blob[:size])
        bound = manifest.study.aggregation.state_norm_bound
        state = load_state(blob[size:], check(manifest, None).layout, bound)
        source = DataSource.model_validate(header["source"])
        if header["op"] == "predict":
            return {"status": "ok"}, predict(source, manifest, state)
        key = bytes.fromhex(str(header["split_key"]))
        return {"status": "ok", "found": benefit(source, manifest, state, key)}, b""
    except WardroundError as error:
        said = {"code": error.code, "problem": error.problem, "remedy": error.remedy or ""}
        return {"status": "failed", **said}, b""
    except Exception as error:
        # Only types and places: the text of an exception may quote a row.
        last = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"the model could not be applied: {type(error).__name__} at {last.name}:{last.lineno}"
        return {"status": "failed", "code": "scorer.failed", "problem": problem, "remedy": ""}, b""


def main() -> None:
    """Cut off, then answer the one question on standard input."""
    cut_off()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    import common.tasks.training  # noqa: F401 - imported before the process is cut off
    from client.frames import read_frame, write_frame
    from common.errors import FailureError

    torch.set_num_threads(max(1, int(os.environ.get("WARDROUND_THREADS", "1"))))
    refuse_sockets_and_processes()
    frame = read_frame(sys.stdin.buffer)
    if frame is None:
        raise FailureError("worker.frame", "the scorer was asked nothing")
    header, blob = answer(*frame)
    write_frame(replies, header, blob)


if __name__ == "__main__":
    main()
