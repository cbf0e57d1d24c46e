"""The hub's folder: its authority, its keys, its settings, and the credentials of its first coordinator.

Source: DESIGN "Three people, one program". Rules: private keys are files of mode 0600 that never leave
the folder; the coordinator's folder is made beside them to be handed over, and is not needed by the hub.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

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


class HubSettings(BaseModel):
    """``hub.toml``: where the hub listens and under which address sites and coordinators dial it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
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
            raise UsageError(
                f"hub.{name}",
                f"--{name} {value!r} is not host:port",
                remedy="Give a host name or an address (IPv6 in brackets), a colon and a port up to 65535.",
            ) from error


@dataclass(frozen=True, slots=True)
class HubHome:
    """Paths inside the hub's folder."""

    folder: Path

    @property
    def settings(self) -> Path:
        """``hub.toml``."""
        return self.folder / "hub.toml"

    @property
    def authority(self) -> Path:
        """Folder of the certificate authority."""
        return self.folder / "authority"

    @property
    def server_key(self) -> Path:
        """The link's private key."""
        return self.folder / "keys" / "server.pem"

    @property
    def server_certificate(self) -> Path:
        """The link's certificate."""
        return self.folder / "server-certificate.pem"

    @property
    def hub_key(self) -> Path:
        """The Ed25519 key that signs rosters, round starts and results."""
        return self.folder / "keys" / "hub.pem"

    @property
    def database(self) -> Path:
        """Sites, studies, rounds."""
        return self.folder / "hub.db"

    @property
    def coordinator(self) -> Path:
        """Credentials to hand to the first coordinator."""
        return self.folder / "coordinator"

    def load_settings(self) -> HubSettings:
        """Read ``hub.toml``. Raises UsageError."""
        return _load(self.settings, HubSettings, "Run 'wardround hub init' in a new folder.")


class CoordinatorSettings(BaseModel):
    """``coordinator.toml``: the hub to talk to and the key it signs with."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    hub: Address
    hub_key: str


@dataclass(frozen=True, slots=True)
class CoordinatorHome:
    """Paths inside a coordinator's folder."""

    folder: Path

    @property
    def settings(self) -> Path:
        """``coordinator.toml``."""
        return self.folder / "coordinator.toml"

    @property
    def tls_key(self) -> Path:
        """The private key of the connection."""
        return self.folder / "tls.pem"

    @property
    def certificate(self) -> Path:
        """The certificate of the connection."""
        return self.folder / "certificate.pem"

    @property
    def authority(self) -> Path:
        """The hub's authority certificate."""
        return self.folder / "authority.pem"

    @property
    def signing_key(self) -> Path:
        """The Ed25519 key that signs manifests."""
        return self.folder / "coordinator.pem"

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
            raise UsageError(
                "coordinator.files", f"{error.filename} is missing or unreadable", remedy=COORDINATOR_REMEDY
            ) from error
        return authority, read_secret(self.tls_key), certificate


Model = TypeVar("Model", bound=BaseModel)


def _load(path: Path, model: type[Model], remedy: str) -> Model:
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError("settings.missing", f"{path} is missing or unreadable", remedy=remedy) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UsageError("settings.invalid", f"{path}: {error}", remedy="Correct the file.") from error
