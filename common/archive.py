"""Zip files with a closed list of names, read without trust: what evidence and backups are packed in.

Source: APPNOTE.TXT (zip), through the standard library. Rules: names, methods and stated sizes are checked
before anything is unpacked; nothing is written to disk here; the same files give the same bytes.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Set
from typing import Final

from common.errors import RefusedError, VerificationError

MAX_FILES: Final = 10_000
MAX_TOTAL_BYTES: Final = 1 << 30

_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNSOUND: Final = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, OSError, ValueError),
)


def pack(files: Mapping[str, bytes]) -> bytes:
    """A zip file of these files in their order, without times; mode 0600 for whoever unpacks it by hand.

    Raises: RefusedError for more than ``unpack`` reads.
    """
    total = sum(map(len, files.values()))
    if len(files) > MAX_FILES or total > MAX_TOTAL_BYTES:
        problem = f"{len(files)} files of {total} bytes in all are more than is read from one zip file"
        raise RefusedError("archive.size", problem, remedy="Ask the auditor how to hand it over.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o600 << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpack(
    data: bytes, required: Set[str], others: re.Pattern[str], optional: Set[str] = frozenset()
) -> dict[str, bytes]:
    """The files of ``pack`` by name: all ``required`` ones, and only such as are optional or like ``others``.

    Raises: VerificationError whose problem goes on from "the file ... is wrong: ".
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = {info.filename for info in infos}
            if len(infos) > MAX_FILES or len(names) != len(infos):
                raise _wrong("a file in it is there twice, or there are too many")
            if not required <= names or not all(map(others.fullmatch, names - required - optional)):
                raise _wrong("it does not hold exactly the files that belong in it")
            if not all(info.compress_type in _METHODS for info in infos):
                raise _wrong("it is compressed in another way than such files are")
            if sum(info.file_size for info in infos) > MAX_TOTAL_BYTES:
                raise _wrong(f"it would unpack to more than {MAX_TOTAL_BYTES} bytes")
            # zipfile reads no more than the stated size of a member, and checks its CRC.
            return {info.filename: archive.read(info) for info in infos}
    except _UNSOUND as error:
        raise _wrong("it is not a sound zip file") from error


def _wrong(problem: str) -> VerificationError:
    return VerificationError("archive.zip", problem)
