"""The two settings files: what they may say, and errors that name file, field and rule."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.settings import Policy, Register, SiteSettings, load, new_files
from client.sources.source import DataSource
from common.errors import RefusedError, UsageError

REGISTER = "0123456789abcdef" * 2


def policy_file(folder: Path, **tables: dict[str, Any]) -> Path:
    policy: dict[str, Any] = {"register": {"id": REGISTER, "epsilon_t": 1.0, "epsilon_w": 2.0}}
    for name, values in tables.items():
        policy.setdefault(name, {}).update(values)
    path = folder / "policy.toml"
    path.write_text(tomli_w.dumps(policy), encoding="utf-8")
    return path


def problem(path: Path, model: type[Policy] | type[SiteSettings]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(path, model)
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    return caught.value


def test_new_files_are_read_back_and_deny_everything(tmp_path: Path) -> None:
    for name, text in new_files("St. Mary's", "hub.example:9443", REGISTER).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    settings = load(tmp_path / "site.toml", SiteSettings)
    assert (settings.name, settings.hub) == ("St. Mary's", "hub.example:9443")
    policy = load(tmp_path / "policy.toml", Policy)
    assert policy.privacy_register.id == REGISTER
    assert policy.rules.coordinators == []
    assert policy.data == {}
    assert not policy.rules.allow_studies_without_differential_privacy
    assert policy.rules == load(policy_file(tmp_path), Policy).rules
    cap = policy.privacy_register.cap
    assert (cap.epsilon_t, cap.epsilon_w, cap.delta) == (3.0, 3.0, 1e-6)
    with pytest.raises(RefusedError) as caught:
        policy.source("readmissions")
    assert "[data.readmissions]" in caught.value.remedy


@pytest.mark.parametrize(
    "name", ["", "a" * 65, 'quo"te', "new\nline", "last\n", "tab\t", "Ärzte", "x]\n[y", "a\\b"]
)
def test_names_that_could_not_stand_in_a_roster_or_a_file_are_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        new_files(name, "hub:1", REGISTER)
    assert caught.value.code == "site.name"


@pytest.mark.parametrize(
    "hub", ["", "hub", "hub:", ":1", "hub:x", "hub:123456", 'h":1', "h\n:1", "h:1\n", "https://h:1"]
)
def test_malformed_addresses_are_refused(hub: str) -> None:
    with pytest.raises(UsageError):
        new_files("St. Mary", hub, REGISTER)


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"register": {"epsilon": 1.0}}, "register.epsilon"),
        ({"extra": {}}, "extra"),
        ({"rules": {"allow_all": True}}, "rules.allow_all"),
        ({"register": {"id": REGISTER.upper()}}, "register.id"),
        ({"register": {"id": REGISTER[:-1]}}, "register.id"),
        ({"register": {"epsilon_t": 0.0}}, "register.epsilon_t"),
        ({"register": {"epsilon_t": -1.0}}, "register.epsilon_t"),
        ({"register": {"epsilon_w": 100.1}}, "register.epsilon_w"),
        ({"register": {"epsilon_t": float("nan")}}, "register.epsilon_t"),
        ({"register": {"epsilon_w": float("inf")}}, "register.epsilon_w"),
        ({"register": {"epsilon_t": "3"}}, "register.epsilon_t"),
        ({"register": {"delta": 0.0}}, "register.delta"),
        ({"register": {"delta": 1.0}}, "register.delta"),
        ({"register": {"delta": 1.1e-5}}, "register"),
        ({"rules": {"minimum_hospitals": 2}}, "rules.minimum_hospitals"),
        ({"rules": {"max_round_minutes": 0}}, "rules.max_round_minutes"),
        ({"rules": {"coordinators": "all"}}, "rules.coordinators"),
        ({"rules": {"allow_studies_without_differential_privacy": 1}}, "rules.allow_studies"),
        ({"data": {"x": {"source": "postgres://host"}}}, "data.x.source"),
        ({"data": {"x": {"source": "csv:"}}}, "data.x.source"),
        ({"data": {"x": {"source": "csv:/a", "patient": "p", "password": "p"}}}, "data.x.password"),
    ],
)
def test_every_broken_rule_names_its_field(tmp_path: Path, tables: dict[str, Any], field: str) -> None:
    error = problem(policy_file(tmp_path, **tables), Policy)
    assert error.code == "settings.field"
    assert f": {field}" in error.problem


def test_an_error_quotes_no_value(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('name = "St. Mary"\nhub = "user:hunter2@hub"\n', encoding="utf-8")
    assert "hunter2" not in problem(path, SiteSettings).diagnostics()


def test_a_large_delta_needs_its_ugly_name() -> None:
    large = Register(
        id=REGISTER, epsilon_t=1.0, epsilon_w=1.0, delta=1e-4, delta_above_one_in_a_hundred_thousand=True
    )
    assert large.cap.delta == 1e-4
    assert Register(id=REGISTER, epsilon_t=1.0, epsilon_w=1.0, delta=1e-5).delta == 1e-5


def test_missing_unreadable_and_broken_files_are_told_apart(tmp_path: Path) -> None:
    assert problem(tmp_path / "policy.toml", Policy).code == "settings.missing"
    (tmp_path / "folder").mkdir()
    assert problem(tmp_path / "folder", Policy).code == "settings.unreadable"
    for content in (b"[register", b"\xff\xfe", b"a = 1\na = 2"):
        (tmp_path / "policy.toml").write_bytes(content)
        assert problem(tmp_path / "policy.toml", Policy).code == "settings.toml"


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[rules]\n", encoding="utf-8")
    assert ": register" in problem(tmp_path / "policy.toml", Policy).problem


def test_a_source_is_a_kind_and_a_path() -> None:
    source = DataSource(source="parquet:/srv/a:b.parquet", patient="id")
    assert (source.kind, source.path) == ("parquet", Path("/srv/a:b.parquet"))


def test_no_secret_and_no_seed_has_a_field() -> None:
    fields = {*SiteSettings.model_fields, *Policy.model_fields, *Register.model_fields}
    assert not [name for name in fields if any(w in name for w in ("seed", "key", "secret", "password"))]
    assert "seed" not in "".join(new_files("a", "h:1", REGISTER).values())
    assert tomllib.loads(new_files("a", "h:1", REGISTER)["policy.toml"])["register"]["id"] == REGISTER
