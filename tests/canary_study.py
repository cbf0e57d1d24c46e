"""A small study that canaries are tried on, as a TOML file. For tests only."""

from pathlib import Path

from common.audit.canaries import read_manifest
from common.study import Manifest

STUDY = """
name = "canaries"
purpose = "p"
legal_basis = "l"
contact = "c"
expires = "2099-01-01T00:00Z"
members = ["A", "B", "C", "D"]
data = "d"
model = {model}

[training]
mode = "{mode}"
rounds = {rounds}
steps = {steps}
learning_rate = 1.0
sampling = "{sampling}"
sampling_rate = {rate}
patients_public = 200

[privacy]
{privacy}

[aggregation]
upload_s = 10
deadline_s = 60
state_norm_bound = 20.0
codec = {{ bits = 32, step = {grid}, range = 3000.0 }}

[contract]
patient = "patient"
rows_per_patient = {rows}
label = {{ name = "ill", classes = ["no", "yes"] }}
"""
PRIVATE = """kind = "dp"
clip_norm = 1.0
grid_step = {grid}
noise_multiplier = {z}
max_patients = 2000
arithmetic = "{arithmetic}"
"""
FEATURE = """
[[contract.features]]
kind = "number"
name = "f{at}"
unit = "1"
minimum = 0.0
maximum = 1.0
"""
SEX = '\n[[contract.features]]\nkind = "category"\nname = "sex"\ncodes = ["f", "m"]\n'


def make(
    path: Path, *, mode: str = "local", rounds: int = 20, steps: int = 1, z: float = 7.0, width: int = 16,
    rate: float = 1.0, rows: int = 5, hidden: tuple[int, ...] = (), private: bool = True,
) -> Manifest:  # fmt: skip
    grid = 2.0**-13
    arithmetic = "f32_assumed" if hidden else "f64_bounded"
    privacy = PRIVATE.format(grid=grid, z=z, arithmetic=arithmetic)
    text = STUDY.format(
        model=f'{{ kind = "mlp", hidden = {list(hidden)} }}'
        if hidden
        else '{ kind = "logistic_regression" }',
        mode=mode,
        rounds=rounds,
        steps=steps,
        sampling="full" if rate == 1 else "poisson",
        rate=rate,
        privacy=privacy if private else 'kind = "without_differential_privacy"',
        grid=grid,
        rows=rows,
    )
    file = path / "study.toml"
    file.write_text(text + "".join(FEATURE.format(at=at) for at in range(width)) + SEX)
    return read_manifest(file)
