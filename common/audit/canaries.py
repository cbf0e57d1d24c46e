"""Whether a study's code keeps what its accountant says: one run on canaries, beside the planned epsilon.

Source: PRIVACY.md "Tests by name" (canaries), "What is reported" (PLD). Rules: a code check on public data,
at 95 percent: it can contradict a claim, never prove one; of all that an auditor does it alone runs a study's
code, and torch is imported for it alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.admissible import check
from common.audit.spending import Costs
from common.errors import UsageError
from common.identity import key_text, public_key
from common.privacy.accountant import check_delta
from common.privacy.canaries import FALSE_ALARM, largest_shown, shown_epsilon, variance_p_value
from common.run import read_study_document
from common.study import Manifest, Party, Study
from common.tasks.models import initial_state

LABEL: Final = "code check on public data, 95 %"
SEEN: Final = ("rounds", "sum_error", "noise_ratio", "noise_count")
SUM_TOLERANCE: Final = 0.5
"""In clip norms: a unit that is active in one arithmetic and not in the other moves one canary a little."""


def read_manifest(path: Path) -> Manifest:
    """A study's TOML file, under keys of nobody's, or a study document (studies/*.study of evidence).

    Raises: UsageError; VerificationError for a document that is none or is not signed.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8") if path.suffix == ".toml" else ""
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give a study's TOML file, or studies/*.study out of evidence."
        raise UsageError("study.file", f"{path} cannot be read", remedy=remedy) from error
    if path.suffix != ".toml":
        return read_study_document(data)[0].verify()
    study = Study.from_toml(text)
    own = (Ed25519PrivateKey.from_private_bytes(bytes([one]) * 32) for one in (1, 2))
    hub, coordinator = (key_text(public_key(key)) for key in own)
    members = tuple(Party(id=at, name=name) for at, name in enumerate(study.members, 1))
    keys = {"roster": "0" * 64, "hub": hub, "coordinator": coordinator}
    return Manifest.model_validate({"schema": 1, "run": "0" * 32, **keys, "members": members, "study": study})


def check_canaries(
    manifest: Manifest, delta: float, seed: int, entropy: Callable[[int], bytes]
) -> dict[str, Any]:
    """Run the study once on canaries, compare; what is contradicted stands in ``flags``.

    ``lower`` and ``upper`` bound epsilon at ``delta`` of the rounds that were run; ``largest`` is the lower
    bound that all right guesses would give; ``sum_error`` in clip norms; ``noise_ratio`` the measured over
    the stated variance, of ``noise_count`` coordinates, with ``noise_p_value``.

    Raises: UsageError for what cannot be run or claims nothing.
    """
    check_delta(delta)
    admitted = check(manifest, None)
    from common.tasks.canaries import observe

    seen = observe(manifest.study, admitted, initial_state(manifest), seed, entropy)
    costs = Costs()
    upper = costs.fixed([costs.planned(admitted)] * seen.rounds, delta).t
    lower = shown_epsilon(seen.scores, seen.included, delta)
    p_value = variance_p_value(seen.noise_ratio, seen.noise_count)
    largest = largest_shown(len(seen.scores), seen.included.size, delta)
    sums, noise = not seen.sum_error <= SUM_TOLERANCE, p_value < FALSE_ALARM
    wrong = {"epsilon": lower > upper, "sums": sums, "noise": noise}
    planned, canaries = manifest.study.rounds, seen.included.size
    run = {"manifest": manifest.digest.hex(), "planned_rounds": planned, "canaries": canaries}
    bounds = {"delta": delta, "lower": lower, "upper": upper, "largest": largest, "noise_p_value": p_value}
    flags = [name for name, found in wrong.items() if found]
    return {"label": LABEL, **run, **bounds, **{name: getattr(seen, name) for name in SEEN}, "flags": flags}
