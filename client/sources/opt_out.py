"""The hospital's list of patients who are left out of every study from now on.

Source: PRIVACY.md "Everything upstream is separable by patient". Rules: leaving a patient out is the same as
not having the rows; the list is read anew before every round; an unclear line stops the round before a row is
touched, for nobody is to be trained on by a misspelling; releases made before are not undone.
"""

import re
from pathlib import Path

from client.sources.table import patient_id
from common.errors import RefusedError


def read_opt_outs(path: Path) -> frozenset[str]:
    """The patient ids of a list: one a line as in the extract; lines that are empty or begin with # are none.

    Raises: RefusedError naming the file, and the line that names no patient.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Restore the list of patients to leave out, in UTF-8; nothing is trained without it."
        raise RefusedError("policy.opt-out", f"{path} cannot be read", remedy=remedy) from error
    found: set[str] = set()
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        patient = patient_id(line)
        if patient is None:
            remedy = "Write one patient id a line, as in the extract."
            raise RefusedError("policy.opt-out", f"{path}, line {number}, names no patient", remedy=remedy)
        found.add(patient)
    return frozenset(found)
