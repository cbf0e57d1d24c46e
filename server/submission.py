"""From a study's TOML file to a signed manifest: names become ids, the roster and the keys are fixed.

Source: DESIGN "A round, end to end", step 1. Rules: everything is checked here before it is sent, and
again by the hub and by each hospital; the run id is 16 random bytes, never reused; with a token it is
derived from it and from all else in the manifest, so that handing the same file in twice is one study.
"""

import os
import re
from datetime import UTC, datetime
from pathlib import Path

from common import identity
from common.admissible import check
from common.encoding import digest
from common.errors import UsageError
from common.ledger.entries import utc_minute
from common.study import Manifest, Party, SignedManifest, Study
from server.desk import CoordinatorDesk
from server.home import CoordinatorHome


def prepare(home: CoordinatorHome, path: Path, desk: CoordinatorDesk, token: str) -> SignedManifest:
    """Read, resolve, check and sign one study. Raises UsageError naming the field and the rule."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give the study's TOML file."
        raise UsageError("study.file", f"{path} cannot be read", remedy=remedy) from error
    study = Study.from_toml(text)
    if token and not re.fullmatch(r"[0-9a-f]{32}", token):
        raise UsageError("study.token", "a token has 32 hex digits", remedy="Leave it out or make a new one.")
    signed_roster, roster = desk.roster()
    ids = {member.name: member.id for member in roster.members}
    unknown = [name for name in study.members if name not in ids]
    if unknown:
        problem = f"members: {', '.join(unknown)} not on the hub's roster"
        raise UsageError("study.members", problem, remedy="Admit the hospital first, or correct the name.")
    key = identity.load_signing_key(home.signing_key)
    coordinator = identity.public_key(key)
    # Everything else that the manifest states is in it: another manifest never has the same run id.
    named = (bytes.fromhex(token), text.encode(), signed_roster.digest, desk.hub_key, coordinator)
    run = digest("run", *named)[:16] if token else os.urandom(16)
    keys = {"hub": identity.key_text(desk.hub_key), "coordinator": identity.key_text(coordinator)}
    members = tuple(Party(id=i, name=name) for i, name in sorted((ids[n], n) for n in study.members))
    version = {"schema": 1, "run": run.hex(), "roster": signed_roster.digest.hex()}
    manifest = Manifest.model_validate({**version, **keys, "members": members, "study": study})
    check(manifest, utc_minute(datetime.now(UTC)))
    return SignedManifest.sign(manifest, key)
