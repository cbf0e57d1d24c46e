"""The hub's and the coordinator's folders: what is read, and what is said when it cannot be."""

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.errors import RefusedError, UsageError
from server.enrolment import create_hub
from server.home import CoordinatorHome, HubHome, HubSettings

GOOD = 'listen = "localhost:0"\naddress = "hub.example.org:8443"\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HubHome:
    home = HubHome(tmp_path_factory.mktemp("home") / "hub")
    create_hub(home, address="hub.example.org:8443", listen="[::]:0", now=datetime.now(UTC))
    return home


def test_settings_are_read_as_written(made: HubHome) -> None:
    settings = made.load_settings()
    assert (settings.listen, settings.address) == ("[::]:0", "hub.example.org:8443")
    coordinator = CoordinatorHome(made.coordinator).load_settings()
    assert coordinator.hub == "hub.example.org:8443"
    assert coordinator.hub_key.startswith("ed25519:")


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD + 'extra = "x"\n',
        GOOD.replace('"localhost:0"', "8443"),
        GOOD.replace("localhost:0", "localhost"),
        GOOD.replace("8443", "0"),
        GOOD.replace("8443", "65536"),
        GOOD.replace("hub.example.org", "::1"),
        GOOD.replace("hub.example.org", 'h" #'),
        "listen = \n",
        "\udcff",
    ],
)
def test_malformed_settings_name_the_file(tmp_path: Path, text: str) -> None:
    home = HubHome(tmp_path)
    home.settings.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"hub\.toml") as caught:
        home.load_settings()
    assert caught.value.code == "settings.invalid"
    assert caught.value.remedy


@pytest.mark.parametrize("address", ["[::1]:8443", "localhost:1", "10.0.0.7:65535"])
def test_addresses_that_can_be_dialled(address: str) -> None:
    assert HubSettings.create(listen=address, address=address).address == address


@pytest.mark.parametrize(
    ("listen", "address", "names"), [("here", "hub:1", "listen"), ("h:0", "h:0", "address")]
)
def test_a_bad_address_on_the_command_line_is_named(listen: str, address: str, names: str) -> None:
    with pytest.raises(UsageError, match=f"--{names} ") as caught:
        HubSettings.create(listen=listen, address=address)
    assert caught.value.code == f"hub.{names}"
    assert "port" in caught.value.remedy


def test_a_folder_that_is_no_hub_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing") as caught:
        HubHome(tmp_path).load_settings()
    assert "hub init" in caught.value.remedy
    with pytest.raises(UsageError, match="missing") as caught:
        CoordinatorHome(tmp_path / "nowhere").load_settings()
    assert "--as" in caught.value.remedy


def test_secrets_are_closed_to_others(made: HubHome) -> None:
    coordinator = CoordinatorHome(made.coordinator)
    secrets = [made.server_key, made.hub_key, made.authority / "authority.key"]
    for path in [*secrets, coordinator.tls_key, coordinator.signing_key]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (made.folder, made.server_key.parent, made.authority, made.coordinator):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_credentials_of_a_coordinator(made: HubHome, tmp_path: Path) -> None:
    whole = CoordinatorHome(made.coordinator)
    authority, key, certificate = whole.load_credentials()
    assert authority == (made.authority / "authority.pem").read_bytes()
    assert b"PRIVATE KEY" in key
    assert b"CERTIFICATE" in certificate

    copy = CoordinatorHome(tmp_path)
    copy.authority.write_bytes(authority)
    with pytest.raises(UsageError, match=r"certificate\.pem is missing"):
        copy.load_credentials()
    copy.certificate.write_bytes(certificate)
    with pytest.raises(RefusedError, match=r"tls\.pem"):
        copy.load_credentials()
    copy.tls_key.write_bytes(key)
    copy.tls_key.chmod(0o640)
    with pytest.raises(RefusedError, match=r"tls\.pem"):
        copy.load_credentials()
