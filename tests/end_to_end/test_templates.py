"""A template from nothing to use: trained with an evaluation, exported, applied and compared at a hospital."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.study import Manifest
from common.synthetic import columns_of, write

COMMAND = [sys.executable, "-P", "-m", "wardround"]


def said(*arguments: str) -> dict[str, Any]:
    result = subprocess.run(
        [*COMMAND, *arguments, "--json"], capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)["data"]
    return data


def failed(*arguments: str) -> tuple[int, str]:
    result = subprocess.run(
        [*COMMAND, *arguments, "--json"], capture_output=True, text=True, timeout=100, check=False
    )
    return result.returncode, json.loads(result.stdout)["code"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("template") / "demo"
    given = [
        "--template",
        "diagnosis",
        "--rounds",
        "12",
        "--hospitals",
        "3",
        "--epsilon",
        "6",
        "--out",
        str(out),
    ]
    return out, said("demo", *given)


def test_the_model_and_its_evaluation_are_one_study(done: tuple[Path, dict[str, Any]]) -> None:
    out, data = done
    assert data["rounds"] == 14
    assert data["test"]["auroc"] > 0.75
    assert {site["epsilon"] <= site["cap"] == 6.0 for site in data["sites"]} == {True}
    found = data["results"]["groups"]
    assert set(found) == {"everybody", "sex = female", "sex = male"}
    auroc = found["everybody"]["auroc"]
    assert auroc["low"] - 0.1 <= data["test"]["auroc"] <= auroc["high"] + 0.1
    names = sorted(path.name for path in out.glob("model*"))
    assert names == ["model.card.md", "model.manifest.json", "model.results.json", "model.safetensors"]
    manifest = Manifest.from_bytes((out / "model.manifest.json").read_bytes())
    assert manifest.digest.hex() == data["study"]
    assert json.loads((out / "model.results.json").read_text())["groups"] == found
    card = (out / "model.card.md").read_text()
    assert manifest.digest.hex() in card
    assert "## Privacy" in card


def test_a_hospital_applies_the_model(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, data = done
    manifest = Manifest.from_bytes((out / "model.manifest.json").read_bytes())
    rows, result = tmp_path / "new.csv", tmp_path / "said.csv"
    write(manifest.study.contract, 40, 77, rows)
    home = str(out / "sites" / "1")
    told = said("site", "predict", data["study"][:12], "--home", home, "--model", str(out / "model.safetensors"),
                "--in", str(rows), "--out", str(result))  # fmt: skip
    assert told["rows"] == 40
    found = list(csv.reader(result.read_text(encoding="utf-8").splitlines()))
    assert found[0] == ["patient", "probability of no", "probability of yes"]
    # Ten lines of plain torch, as the README has them, say the same.
    state = load_file(out / "model.safetensors")
    model = torch.nn.Linear(*state["weight"].shape[::-1])
    model.load_state_dict({name: torch.from_numpy(state[name]) for name in ("weight", "bias")})
    columns: dict[str, Any] = dict(columns_of(manifest.study.contract, 40, 77))
    x, _ = manifest.study.contract.encode(columns)
    expected = torch.softmax(model(torch.from_numpy(x.astype(np.float32))), dim=1).detach().numpy()
    values = np.array([[float(cell) for cell in row[1:]] for row in found[1:]])
    assert np.abs(values - expected).max() < 1e-4


def test_a_hospital_sees_what_it_gains(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, data = done
    plot, model = tmp_path / "plot.svg", str(out / "model.safetensors")
    told = said(
        "site",
        "benefit",
        data["study"][:12],
        "--home",
        str(out / "sites" / "2"),
        "--model",
        model,
        "--out",
        str(plot),
    )
    assert set(told["models"]) == {"local only", "global", "fine-tuned"}
    assert told["models"]["fine-tuned"]["everybody"]["auroc"] > 0.7
    assert plot.read_text().startswith("<svg")
    code, name = failed("site", "benefit", "0" * 12, "--home", str(out / "sites" / "2"), "--model", model)
    assert (code, name) == (2, "site.digest")
