"""Secure aggregation: masking on one core, setups and whole rounds; the summary in SECAGG.md beside this file."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cryptography.hazmat.backends.openssl import backend

from tests.bench import cohorts, masking
from tests.bench.cohorts import Round, exponent
from tests.bench.plot import log_log
from tests.bench.result import Result

FOLDER = Path(__file__).parent
PACKAGES = ("numpy", "cryptography", "flwr", "tenseal")
TEXT = """\
# Secure aggregation: figures

Written by `make bench ONLY=secagg` on {date}: {machine}, {versions}.

- Times are CPU times, the least of several turns; whatever is compared took turns in one run. "mask.",
  "upload.", "flower." and "ckks." ran on one core.
- mask.: the ceiling is 1 / (1 / AES rate + 1 / add rate), each measured alone on a block in the cache.
- upload.: all that a hospital does from the cohort to its kept upload: cohort and own vector checked, masks,
  digests, signature. Only the file that the upload is kept in is left out.
- flower.: `flwr.common.secure_aggregation`, as its SecAgg+ client calls it each round, and our `mask_payload`.
  "Masks": a private and 10 pair masks made and added. "Upload": from the keys that each side holds to the masked
  bytes; on its side with a key agreement for each peer, on ours with the derivation of the mask keys; neither
  side quantises. Its masks come from a Mersenne Twister, which is no cipher; ours are bound by the AES rate.
- ckks.: TenSEAL, 8192 coefficients, modulus of 60 + 40 + 60 bits (128-bit security allows 218), scale 2^40.
  For one hospital: encrypt, add at the hub, decrypt the sum; ours: mask, add at the hub, take the self-mask off.
- setup. and round.: the machines of the hospitals and the hub in one process, 10^4 parameters, states kept in
  memory, nothing sent. Bytes are those of the encoded records. Hub memory is what its round holds above one
  model, "kept" at its end, "peak" at any moment. A hospital's CPU is the mean over all.
- For 1000 hospitals the half a million pair keys were put into the stored states: no setup was run.

| name | value | unit | target | reached |
|---|---|---|---|---|
{rows}

![whole rounds against the number of hospitals](secagg.svg)
"""


def run() -> list[Result]:
    masked = list(masking.run())
    grown, rounds = cohorts.run()
    results = [Result(f"secagg.{r.name}", r.value, r.unit, r.target, r.at_least) for r in (*masked, *grown)]
    write(results, rounds)
    return results


def write(results: Sequence[Result], rounds: Sequence[Round]) -> None:
    """SECAGG.md and its drawing."""
    sizes = [r.hospitals for r in rounds]
    shown = [
        (f"{name}, {unit} ~ n^{exponent(sizes, values):.2f}", values)
        for name, unit, values in cohorts.series(rounds)
    ]
    drawing = log_log(sizes, shown, "hospitals")
    (FOLDER / "secagg.svg").write_text(drawing, encoding="utf-8")
    text = TEXT.format(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=", ".join([f"Python {platform.python_version()}", *versions()]),
        rows="\n".join("| " + " | ".join(result.row) + " |" for result in results),
    )
    (FOLDER / "SECAGG.md").write_text(text, encoding="utf-8")


def versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return [*found, backend.openssl_version_text()]
