"""Study files to start from: one for each method and each use.

Source: DESIGN.md "Three people, one program". Rules: a template is a whole study but for its members and who
answers for it; what a coordinator gets is text with comments, to be read and changed.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Final

from common.errors import UsageError

_FOLDER: Final = "templates/studies"


def names() -> list[str]:
    """All templates, in order."""
    return sorted(entry.name.removesuffix(".toml") for entry in files("server").joinpath(_FOLDER).iterdir())


def summary(name: str) -> str:
    """What a template is for, in one line."""
    return text(name).partition("\n")[0].removeprefix("# ")


def text(name: str) -> str:
    """A template's TOML. Raises UsageError for an unknown name."""
    if name not in names():
        problem = f"there is no template {name!r}"
        raise UsageError("study.template", problem, remedy=f"Name one of {', '.join(names())}.")
    return files("server").joinpath(f"{_FOLDER}/{name}.toml").read_text(encoding="utf-8")


def filled(name: str, members: Sequence[str]) -> str:
    """A template's TOML with these hospitals as members."""
    listed = ", ".join(json.dumps(member, ensure_ascii=False) for member in members)
    return text(name).replace("members = []", f"members = [{listed}]", 1)
