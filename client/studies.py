"""Received studies as files, one a manifest digest: what a person reads before deciding.

Rules: a file is written once, after its signatures verified, and read back with the same checks; the
decision itself is in the ledger, not here.
"""

import re
from typing import Final

from client.state import SiteHome, write_durable
from common.encoding import digest
from common.errors import RefusedError, UsageError, VerificationError
from common.roster import SignedRoster
from common.run import read_study_document
from common.study import Manifest

MAX_STUDIES: Final = 1000
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class StudyFolder:
    """The ``studies`` folder of a site."""

    def __init__(self, home: SiteHome) -> None:
        self._home = home

    def add(self, man: bytes, document: bytes) -> bool:
        """Keep a study; true when it is new. Raises RefusedError when a thousand are waiting already."""
        path = self._home.study(man.hex())
        if path.exists():
            return False
        if len(self.digests()) >= MAX_STUDIES:
            raise RefusedError("studies.full", f"{MAX_STUDIES} studies are kept here already")
        write_durable(path, document)
        return True

    def load(self, man: bytes) -> bytes:
        """The document of a study. Raises RefusedError when it never arrived."""
        try:
            return self._home.study(man.hex()).read_bytes()
        except FileNotFoundError as error:
            problem = f"no study {man.hex()[:12]} has been received"
            remedy = "See 'wardround site approve' for those that have."
            raise RefusedError("studies.unknown", problem, remedy=remedy) from error

    def digests(self) -> list[str]:
        """Digests of all kept studies, ascending."""
        folder = self._home.study("0").parent
        return sorted(path.stem for path in folder.glob("*.study") if _DIGEST.fullmatch(path.stem))

    def read(self, man: bytes) -> tuple[Manifest, SignedRoster]:
        """The verified manifest of a kept study, and its roster, which nobody has verified yet.

        Guarantee: a_replaced_file_is_refused - also by another study that is signed as well.
        Raises: RefusedError when the study never arrived; VerificationError.
        """
        signed, roster = read_study_document(self.load(man))
        if digest("manifest", signed.manifest_bytes) != man:
            problem = f"the file of study {man.hex()[:12]} holds another study"
            remedy = "Remove that file; the hub sends the study again."
            raise VerificationError("studies.changed", problem, remedy=remedy)
        return signed.verify(), roster

    def resolve(self, prefix: str) -> str:
        """The full digest behind its first 6 or more digits. Raises UsageError."""
        found = [name for name in self.digests() if len(prefix) >= 6 and name.startswith(prefix)]
        if len(found) != 1:
            remedy = "Run 'wardround site approve' to list them."
            raise UsageError("site.digest", f"{prefix!r} names {len(found)} received studies", remedy=remedy)
        return found[0]
