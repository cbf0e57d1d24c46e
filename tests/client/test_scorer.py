"""The scorer: a model on a hospital's rows, in a process of its own; nothing of a row in an error."""

import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.frames import passed_environment, read_frame, write_frame
from client.scorer import answer
from client.sources.source import DataSource
from common.admissible import check
from common.contract.labels import AMOUNT_STEPS
from common.study import Manifest
from common.synthetic import write
from common.tasks.models import initial_state
from common.tasks.models.layout import state_layout
from common.tasks.models.modules import build, load
from common.tasks.models.prediction import predict
from common.tasks.state import state_bytes
from tests.common.tasks.kinds import KINDS, manifest_of, study_of

ROWS = 30
PLAIN = [name for name in KINDS if name not in ("cnn", "resnet", "statistics", "skip_gram")]


def made(name: str, tmp_path: Path, **changes: Any) -> tuple[Manifest, bytes, DataSource]:
    study = study_of(name, rows=1, **changes)
    rng = np.random.default_rng(4)
    state = {t.name: rng.normal(0, 0.3, t.shape).astype(np.float32) for t in state_layout(study)}
    table = tmp_path / "rows.csv"
    write(study.contract, ROWS, 1, table)
    source = DataSource(source=f"csv:{table}", patient="patient", columns=list(study.contract.columns))
    return manifest_of(study), state_bytes(state, state_layout(study)), source


def asked(op: str, manifest: Manifest, state: bytes, source: DataSource) -> tuple[dict[str, Any], bytes]:
    data = manifest.to_bytes()
    header = {
        "op": op,
        "source": source.model_dump(mode="json"),
        "manifest": len(data),
        "split_key": "07" * 32,
    }
    return answer(header, data + state)


@pytest.mark.parametrize("name", PLAIN)
def test_every_row_is_answered_in_its_order(name: str, tmp_path: Path) -> None:
    manifest, state, source = made(name, tmp_path)
    reply, found = asked("predict", manifest, state, source)
    assert reply == {"status": "ok"}
    rows = list(csv.reader(io.StringIO(found.decode())))
    assert rows[0][0] == "patient"
    assert [row[0] for row in rows[1:]] == [f"synthetic-{at:07}" for at in range(ROWS)]
    assert all(len(row) == len(rows[0]) for row in rows)


def test_what_is_said_is_the_models(tmp_path: Path) -> None:
    manifest, state, source = made("mlp", tmp_path)
    _, found = asked("predict", manifest, state, source)
    study = manifest.study
    from client.sources.extract import load_table
    from common.tasks.state import load_state

    table = load_table(source, study.contract, key=bytes(32))
    values = load_state(state, check(manifest, None).layout, 100.0)
    said = predict(study.model, study.contract, load(build(study.model, study.contract), values), table.x)
    by_patient = {row[0]: row[1:] for row in list(csv.reader(io.StringIO(found.decode())))[1:]}
    for patient, expected in zip(table.ids, said, strict=True):
        assert [float(x) for x in by_patient[patient]] == pytest.approx(expected.tolist(), abs=1e-6)


def test_an_amount_is_said_in_its_unit(tmp_path: Path) -> None:
    manifest, state, source = made("linear", tmp_path)
    _, found = asked("predict", manifest, state, source)
    rows = list(csv.reader(io.StringIO(found.decode())))
    assert rows[0] == ["patient", "beds"]
    assert all(0 <= float(row[1]) <= 50 for row in rows[1:])
    assert manifest.study.contract.label.limit == AMOUNT_STEPS + 1


def test_a_label_is_not_needed(tmp_path: Path) -> None:
    manifest, state, source = made("mlp", tmp_path)
    table = Path(source.source.removeprefix("csv:"))
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "ill"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    reply, found = asked("predict", manifest, state, source)
    assert reply["status"] == "ok"
    assert found.count(b"\n") == ROWS + 1


def test_three_models_are_compared_on_who_was_held_out(tmp_path: Path) -> None:
    model, features, label = KINDS["logistic"]
    contract = {
        "patient": "patient",
        "features": features,
        "label": {"name": "ill", "classes": ["no", "yes"]},
        "holdout": 0.4,
    }
    manifest, _, source = made(
        "logistic", tmp_path, contract=contract, evaluation={"subgroups": ["sex"], "per_hospital": True}
    )
    table = Path(source.source.removeprefix("csv:"))
    table.unlink()
    write(manifest.study.contract, 400, 3, table)
    start = state_bytes(initial_state(manifest), state_layout(manifest.study))
    reply, _ = asked("benefit", manifest, start, source)
    found = reply["found"]
    assert 100 < found["held_out"] < 220
    assert set(found["models"]) == {"local only", "global", "fine-tuned"}
    assert set(found["models"]["global"]) == {"everybody", "sex = f", "sex = m"}
    assert found["models"]["global"]["everybody"]["auroc"] == pytest.approx(0.5)
    assert found["models"]["local only"]["everybody"]["auroc"] > 0.75
    assert found["models"]["fine-tuned"]["everybody"]["auroc"] > 0.6
    assert model["kind"] == "logistic_regression"
    assert label["name"] == "ill"


def test_errors_hold_no_row(tmp_path: Path) -> None:
    manifest, state, source = made("mlp", tmp_path)
    gone = source.model_copy(update={"source": f"csv:{tmp_path}/absent.csv"})
    reply, _ = asked("predict", manifest, state, gone)
    assert reply["status"] == "failed"
    assert reply["code"].startswith(("source.", "contract."))
    reply, _ = asked("predict", manifest, state[:-1], source)
    assert (reply["status"], reply["code"].partition(".")[0]) == ("failed", "state")
    reply, _ = asked("predict", manifest, state, source.model_copy(update={"source": "nothing"}))
    assert reply["status"] == "failed"
    assert "synthetic-" not in str(reply)


def test_the_process_answers_once_without_network(tmp_path: Path) -> None:
    manifest, state, source = made("logistic", tmp_path)
    data = manifest.to_bytes()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "client.scorer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=passed_environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}, cwd="/",
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        header = {"op": "predict", "source": source.model_dump(mode="json"), "manifest": len(data)}
        write_frame(process.stdin, header, data + state)
        frame = read_frame(process.stdout)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    assert frame is not None
    assert frame[0] == {"status": "ok"}
    assert frame[1].startswith(b"patient,")
