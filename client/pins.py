"""The other hospitals' fingerprints that a person here has accepted.

Source: PROTOCOL "Roster" (each fingerprint checked out of band and pinned by each hospital). Rules: a study
runs only with members whose keys are pinned; a pinned name with other keys is never accepted again without
a person removing the pin.
"""

import json
from collections.abc import Mapping

from client.state import SiteHome, write_durable
from common.encoding import canonical_json
from common.errors import RefusedError, VerificationError
from common.roster import Member, Roster, check_pins
from common.study import Manifest


class Pins:
    """``pins.json`` of a site: name to fingerprint."""

    def __init__(self, home: SiteHome) -> None:
        self._home = home

    def _read(self) -> dict[str, str]:
        try:
            value = json.loads(self._home.pins.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            value = None
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise VerificationError("pins.file", f"{self._home.pins} is damaged", remedy="Restore it.")
        return value

    @staticmethod
    def _others(manifest: Manifest, roster: Roster, me: int) -> tuple[Member, ...]:
        return tuple(roster.member(party.id) for party in manifest.members if party.id != me)

    def check(self, manifest: Manifest, roster: Roster, me: int) -> None:
        """Every other member must be pinned with these keys. Raises RefusedError or VerificationError."""
        check_pins(Roster(self._others(manifest, roster, me)), self._read())

    def unpinned(self, manifest: Manifest, roster: Roster, me: int) -> Mapping[str, str]:
        """Members without a pin. Raises VerificationError when a pinned member has other keys."""
        pins = self._read()
        others = self._others(manifest, roster, me)
        new = {member.name: member.fingerprint for member in others if member.name not in pins}
        check_pins(Roster(others), {**pins, **new})
        return new

    def accept(self, prints: Mapping[str, str]) -> None:
        """Pin what a person has compared. Raises RefusedError when a name is pinned otherwise."""
        pins = self._read()
        if any(name in pins and pins[name] != text for name, text in prints.items()):
            raise RefusedError("pins.conflict", "a name is pinned with another fingerprint already")
        write_durable(self._home.pins, canonical_json({**pins, **prints}))
