"""The hub's folder: its authority, its keys, its settings, and the credentials of its first coordinator.

Source: DESIGN "Three people, one program". Rules: private keys are files of mode 0600 that never leave
the folder; the coordinator's folder is made beside them to be handed over, and is not needed by the hub.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Final, Self, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from common.contract import Strict
from common.errors import UsageError
from common.identity import read_secret

HIGHEST_PORT: Final = 65535
COORDINATOR_REMEDY: Final = "Give --as the folder that 'hub init' made."


def _port(text: str) -> str:
    if int(text.rpartition(":")[2]) > HIGHEST_PORT:
        raise ValueError(f"a port is at most {HIGHEST_PORT}")
    return text


_HOST: Final = r"^(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])"
Address = Annotated[str, Field(pattern=_HOST + ":[1-9][0-9]{0,4}$"), AfterValidator(_port)]
"""host:port that can be dialled, as an admission may name it."""
Listen = Annotated[str, Field(pattern=_HOST + ":[0-9]{1,5}$"), AfterValidator(_port)]
"""host:port to listen on; port 0 takes any that is free."""


class HubSettings(Strict):
    """``hub.toml``: where the hub listens and under which address sites and coordinators dial it."""

    address: Address
    listen: Listen

    @classmethod
    def create(cls, *, listen: str, address: str) -> Self:
        """Settings from a command line. Raises UsageError naming the one that is malformed."""
        try:
            return cls(listen=listen, address=address)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            value = listen if name == "listen" else address
            remedy = "Give a host name or an address (IPv6 in brackets), a colon and a port up to 65535."
            raise UsageError(f"hub.{name}", f"--{name} {value!r} is not host:port", remedy=remedy) from error


class HubHome:
    """Paths inside the hub's folder; ``coordinator`` is the folder to hand to the first coordinator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "hub.toml"
        self.authority = folder / "authority"
        self.server_key = folder / "keys" / "server.pem"
        self.server_certificate = folder / "server-certificate.pem"
        self.hub_key = folder / "keys" / "hub.pem"  # signs rosters, round starts and results
        self.database = folder / "hub.db"
        self.ledger = folder / "ledger.db"
        self.payloads = folder / "payloads"
        self.coordinator = folder / "coordinator"

    def load_settings(self) -> HubSettings:
        """Read ``hub.toml``. Raises UsageError."""
        return _load(self.settings, HubSettings, "Run 'wardround hub init' in a new folder.")


class CoordinatorSettings(Strict):
    """``coordinator.toml``: the hub to talk to and the key it signs with."""

    hub: Address
    hub_key: str


class CoordinatorHome:
    """Paths inside a coordinator's folder: a TLS client's files, and the key that signs manifests."""

    def __init__(self, folder: Path) -> None:
        self.settings = folder / "coordinator.toml"
        self.tls_key = folder / "tls.pem"
        self.certificate = folder / "certificate.pem"
        self.authority = folder / "authority.pem"
        self.signing_key = folder / "coordinator.pem"

    def load_settings(self) -> CoordinatorSettings:
        """Read ``coordinator.toml``. Raises UsageError."""
        return _load(self.settings, CoordinatorSettings, COORDINATOR_REMEDY)

    def load_credentials(self) -> tuple[bytes, bytes, bytes]:
        """PEM of the hub's authority, the private key and the certificate of the connection.

        Raises: UsageError for a missing file; RefusedError for a key that is open to others.
        """
        try:
            authority, certificate = self.authority.read_bytes(), self.certificate.read_bytes()
        except OSError as error:
            problem = f"{error.filename} is missing or unreadable"
            raise UsageError("coordinator.files", problem, remedy=COORDINATOR_REMEDY) from error
        return authority, read_secret(self.tls_key), certificate


Model = TypeVar("Model", bound=BaseModel)


def _load(path: Path, model: type[Model], remedy: str) -> Model:
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError("settings.missing", f"{path} is missing or unreadable", remedy=remedy) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UsageError("settings.invalid", f"{path}: {error}", remedy="Correct the file.") from error
