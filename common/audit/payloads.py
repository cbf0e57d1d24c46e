"""The file of kept payloads that a hub hands to an auditor, read without trust and one payload at a time.

Source: PROTOCOL.md C6; APPNOTE.TXT (zip), through the standard library. Rules: names are a closed form,
nothing is compressed, so that no member is larger than the file; what a payload holds is checked by its
signed digests.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from common.audit.openings import Payload
from common.errors import UsageError, VerificationError

_NAME: Final = re.compile(r"payloads/[0-9a-f]{64}/[1-9][0-9]{0,4}/[1-9][0-9]{0,4}")
_LARGEST_BYTES: Final = 1 << 31
_UNSOUND: Final = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError),
)


def member_name(digest: str, number: int, site: int) -> str:
    """The name in the zip file of a hospital's payload in a round of a study."""
    return f"payloads/{digest}/{number}/{site}"


@contextmanager
def kept_payloads(path: Path) -> Iterator[Payload]:
    """Read from the file at ``path`` while it is open.

    Raises: UsageError when it cannot be read; VerificationError when it is no such file, and by the function
    given for a payload that is not in it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        remedy = "Give the path of a file that 'wardround hub payloads' wrote."
        raise UsageError("audit.file", f"{path} cannot be read: {error.strerror}", remedy=remedy) from error
    except _UNSOUND as error:
        raise _refused(path, "it is not a sound zip file") from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
        if len(members) != len(archive.infolist()) or not all(map(_NAME.fullmatch, members)) or not stored:
            raise _refused(path, "it does not hold exactly the files that belong in it")

        def payload(digest: str, number: int, site: int) -> bytes:
            info = members.get(member_name(digest, number, site))
            if info is None or info.file_size > _LARGEST_BYTES:
                problem = (
                    f"the payload of hospital {site} in round {number} of study {digest[:12]} is missing"
                )
                raise VerificationError("audit.payloads", problem, remedy="Ask the hub for it.")
            try:
                return archive.read(info)
            except (*_UNSOUND, OSError) as error:
                raise _refused(path, f"{info.filename} is damaged") from error

        yield payload


def _refused(path: Path, problem: str) -> VerificationError:
    text = f"{path} is no file of payloads: {problem}"
    return VerificationError("audit.payloads", text, remedy="Ask for it again.")
