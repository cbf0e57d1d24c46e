"""Who this site is: keys made here that stay here, and an admission that answers this site's request."""

import json
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.identity import SiteIdentity, create_site, load_policy
from client.state import SiteHome
from common import identity
from common.enrolment import AdmissionRequest
from common.errors import RefusedError, UsageError, VerificationError, WardroundError
from common.ledger.store import Ledger
from server.enrolment import admit_site, create_hub
from server.home import HubHome
from tests.client.federation import ADDRESS, Federation


def private_parts(home: SiteHome) -> list[bytes]:
    """Every run of private bytes that must be nowhere else."""
    parts = [home.split_secret.read_bytes()]
    for path in (home.tls_key, home.protocol_key, home.ledger_key):
        parts += [line for line in path.read_bytes().splitlines() if b"-----" not in line]
    for path in (home.protocol_key, home.ledger_key):
        parts.append(identity.load_signing_key(path).private_bytes_raw())
    return parts


def test_private_keys_stay(tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "site")
    request = create_site(home, name="St. Mary", hub=ADDRESS)
    assert AdmissionRequest.from_bytes(home.request.read_bytes()) == request
    secrets = private_parts(home)
    assert len(secrets) >= 6
    public = [path for path in (home.request, home.settings, home.policy, home.ledger) if path.exists()]
    assert len(public) == 4
    for path in public:
        content = path.read_bytes()
        assert not any(secret in content or secret.hex().encode() in content for secret in secrets), path
    for path in (home.tls_key, home.protocol_key, home.ledger_key, home.split_secret, home.ledger):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.request.stat().st_mode) & 0o044


def test_every_site_is_new(tmp_path: Path) -> None:
    homes = [SiteHome(tmp_path / name) for name in ("a", "b")]
    requests = [create_site(home, name="St. Mary", hub=ADDRESS) for home in homes]
    assert requests[0].fingerprint != requests[1].fingerprint
    assert not set(private_parts(homes[0])[1:]) & set(private_parts(homes[1])[1:])
    assert load_policy(homes[0]).privacy_register.id != load_policy(homes[1]).privacy_register.id
    assert Ledger.open(homes[0].ledger).head().size == 0


def test_a_site_is_never_made_over_another(tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "site")
    create_site(home, name="St. Mary", hub=ADDRESS)
    before = {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError):
        create_site(home, name="St. Mary", hub=ADDRESS)
    # Neither when it was only half made: the keys that are there may be known to others already.
    home.settings.unlink()
    with pytest.raises(WardroundError):
        create_site(home, name="St. Mary", hub=ADDRESS)
    for path, content in before.items():
        assert path == home.settings or path.read_bytes() == content


@pytest.mark.parametrize(("name", "hub"), [('a"b', ADDRESS), ("St. Mary", "nowhere")])
def test_a_malformed_name_or_address_makes_nothing(tmp_path: Path, name: str, hub: str) -> None:
    with pytest.raises(UsageError):
        create_site(SiteHome(tmp_path / "site"), name=name, hub=hub)
    assert not (tmp_path / "site").exists()


def test_an_admitted_site_knows_itself_and_prints_no_secret(federation: Federation) -> None:
    home = federation.sites[2]
    found = SiteIdentity.load(home)
    assert (found.id, found.name, found.address) == (2, "Northgate", ADDRESS)
    assert found.hub_key == identity.public_key(federation.hub_key)
    text = repr(found) + str(found)
    assert not any(repr(secret)[2:-1] in text or secret.hex() in text for secret in private_parts(home))


def test_before_admission_it_says_what_to_do(tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "site")
    create_site(home, name="St. Mary", hub=ADDRESS)
    with pytest.raises(RefusedError) as caught:
        SiteIdentity.load(home)
    assert caught.value.code == "site.not-admitted"
    assert "request.json" in caught.value.remedy


def refusal(home: SiteHome) -> WardroundError:
    with pytest.raises(WardroundError) as caught:
        SiteIdentity.load(home)
    assert type(caught.value) is not UsageError
    return caught.value


def test_the_admission_of_another_site_is_refused(federation: Federation) -> None:
    shutil.copy(federation.sites[2].admission, federation.sites[1].admission)
    assert isinstance(refusal(federation.sites[1]), VerificationError)


def test_the_admission_of_another_hub_or_an_altered_one_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    home = federation.sites[1]
    good = home.admission.read_bytes()
    hub = HubHome(tmp_path / "other")
    now = datetime.now(UTC)
    create_hub(hub, address=ADDRESS, listen=ADDRESS, now=now)
    other = json.loads(admit_site(hub, home.request.read_bytes(), now=now).to_bytes())
    mine = json.loads(good)
    for field in ("certificate", "authority", "hub_key", "roster", "roster_signature"):
        altered = json.dumps({**mine, field: other[field]}, separators=(",", ":"), sort_keys=True)
        home.admission.write_text(altered, encoding="utf-8")
        assert isinstance(refusal(home), VerificationError), field
    for content in (b"", good[:-1], good + b" "):
        home.admission.write_bytes(content)
        assert isinstance(refusal(home), VerificationError)
    home.admission.write_bytes(good)
    SiteIdentity.load(home)


@pytest.mark.parametrize("name", ["tls_key", "protocol_key", "ledger_key"])
def test_keys_of_another_site_are_refused(federation: Federation, name: str) -> None:
    source, target = getattr(federation.sites[2], name), getattr(federation.sites[1], name)
    target.write_bytes(source.read_bytes())
    assert refusal(federation.sites[1]).code == "site.foreign-keys"


@pytest.mark.parametrize("name", ["tls_key", "protocol_key", "ledger_key", "split_secret"])
def test_a_key_that_others_can_read_or_that_is_gone_is_refused(federation: Federation, name: str) -> None:
    path = getattr(federation.sites[1], name)
    path.chmod(0o640)
    assert refusal(federation.sites[1]).code == "identity.secret-mode"
    path.chmod(0o600)
    path.unlink()
    assert isinstance(refusal(federation.sites[1]), RefusedError)


def test_a_lost_request_is_a_clear_error(federation: Federation) -> None:
    federation.sites[1].request.unlink()
    assert refusal(federation.sites[1]).code == "site.no-request"
