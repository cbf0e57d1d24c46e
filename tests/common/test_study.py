"""Studies as coordinators write them, manifests as hospitals approve them."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import canonical_json, digest
from common.errors import UsageError, VerificationError
from common.identity import key_text, public_key
from common.study import Manifest, Party, SignedManifest, Study, defaults, minimum_hospitals_bound

STUDIES = Path(__file__).parents[1] / "vectors" / "studies"
TEXT = (STUDIES / "breast_cancer.toml").read_text(encoding="utf-8")
CASES = tomllib.loads((STUDIES / "refused.toml").read_text(encoding="utf-8"))["case"]
COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
HUB = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
SIZE_OF_LONGEST_NAME = 64


def plain() -> dict[str, Any]:
    return tomllib.loads(TEXT)


def changed(path: str, *value: object) -> dict[str, Any]:
    """The example study with one field set, or removed when no value is given."""
    study = plain()
    *parents, last = path.split(".")
    table: Any = study
    for part in parents:
        table = table[int(part)] if isinstance(table, list) else table[part]
    if value:
        table[last] = value[0]
    else:
        del table[last]
    return study


def toml(study: dict[str, Any]) -> str:
    """A TOML text of a study: tomllib's inverse for what these tests write."""

    def form(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {form(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(form, value)) + "]"
        if isinstance(value, bool | str):
            return json.dumps(value)
        return str(value)

    return "\n".join(f"{json.dumps(key)} = {form(value)}" for key, value in study.items())


def manifest(study: dict[str, Any] | None = None, **change: Any) -> Manifest:
    parsed = Study.from_toml(TEXT if study is None else toml(study))
    fields: dict[str, Any] = {
        "schema": 1,
        "run": "ab" * 16,
        "roster": "cd" * 32,
        "hub": key_text(public_key(HUB)),
        "coordinator": key_text(public_key(COORDINATOR)),
        "members": tuple(Party(id=i, name=name) for i, name in enumerate(parsed.members, 1)),
        "study": parsed,
    }
    return Manifest(**fields | change)


def test_the_example_is_read_whole() -> None:
    study = Study.from_toml(TEXT)
    rules = study.aggregation
    assert study.members == ("Cleveland", "Hungarian", "Long Beach", "St. Gallen")
    assert (rules.minimum_hospitals, rules.colluders, rules.rollbacks, rules.rounds_max) == (3, 1, 0, 13)
    assert len(study.contract.features) == study.contract.width == 30
    assert Study.from_toml(toml(plain())) == study


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['path']}" for i, case in enumerate(CASES)])
def test_study_errors_name_the_field(case: dict[str, Any]) -> None:
    study = changed(case["path"], *([case["value"]] if "value" in case else []))
    told = case.get("told", case["path"])
    with pytest.raises(UsageError) as caught:
        Study.from_toml(toml(study))
    assert caught.value.code == f"study.{told}"
    assert caught.value.fields["path"] == told
    rule = caught.value.problem.removeprefix(f"{told}: ")
    assert rule != caught.value.problem
    assert rule[0].islower()
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("server", "stated"),
    [
        ({"strategy": "fedavg"}, {}),
        ({"strategy": "fedavgm"}, {"learning_rate": 1.0, "momentum": 0.0}),
        ({"strategy": "fedadagrad"}, {"learning_rate": 0.1, "tau": 1e-3}),
        ({"strategy": "fedadam"}, {"learning_rate": 0.1, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99}),
        ({"strategy": "fedyogi"}, {"learning_rate": 0.01, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99}),
    ],
)
def test_manifests_state_every_parameter_of_the_server(
    server: dict[str, Any], stated: dict[str, float]
) -> None:
    whole = manifest(changed("training.server", server))
    found = json.loads(whole.to_bytes())["study"]["training"]["server"]
    assert found == server | stated
    assert Manifest.from_bytes(whole.to_bytes()) == whole
    for name in stated:
        short = json.loads(whole.to_bytes())
        del short["study"]["training"]["server"][name]
        with pytest.raises(VerificationError):
            Manifest.from_bytes(canonical_json(short))


def test_an_mlp_is_read_and_stated() -> None:
    whole = manifest(changed("model", {"kind": "mlp", "hidden": [16, 8]}))
    assert Manifest.from_bytes(whole.to_bytes()) == whole
    assert json.loads(whole.to_bytes())["study"]["model"] == {
        "kind": "mlp",
        "hidden": [16, 8],
        "activation": "relu",
    }
    assert whole.diff(manifest())[0][0].startswith("study.model.")


@pytest.mark.parametrize("text", ["name = ", "name = 1\nname = 2", "[privacy", "\x00"])
def test_broken_toml_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Study.from_toml(text)
    assert caught.value.code == "study.toml"


def test_without_privacy_sampling_is_full_and_dither_allowed() -> None:
    study = changed("privacy", {"kind": "without_differential_privacy"})
    study["aggregation"]["codec"]["rounding"] = "dither"
    assert Study.from_toml(toml(study)).privacy.kind == "without_differential_privacy"
    study["training"] |= {"sampling": "poisson", "sampling_rate": 0.5}
    with pytest.raises(UsageError) as caught:
        Study.from_toml(toml(study))
    assert caught.value.code == "study.training.sampling"
    study["privacy"]["clip_norm"] = 1.0
    with pytest.raises(UsageError) as caught:
        Study.from_toml(toml(study))
    assert caught.value.code == "study.privacy.clip_norm"


@pytest.mark.parametrize(
    ("n", "expected"),
    [(3, (1, 1, 3)), (4, (1, 0, 3)), (5, (1, 1, 4)), (6, (1, 1, 5)), (10, (2, 1, 7)), (100, (20, 1, 67))],
)
def test_defaults_are_those_of_the_protocol(n: int, expected: tuple[int, int, int]) -> None:
    assert defaults(n) == expected


def test_defaults_can_always_run() -> None:
    for n in range(3, 1001):
        t, rho, m = defaults(n)
        assert t >= 1
        assert m == minimum_hospitals_bound(n, t, rho)
        assert max(3, t + 2) <= m <= n
        # Two cohorts of m overlap in at least one member that neither colludes nor was rolled back.
        assert 2 * m - n > t + rho


@given(st.integers(3, 12), st.integers(1, 12), st.integers(0, 12), st.integers(3, 13))
@settings(max_examples=80, deadline=None)
def test_cohort_rules_agree_with_the_bound(n: int, t: int, rho: int, m: int) -> None:
    study = changed("members", [f"Site {i:02d}" for i in range(n)])
    study["aggregation"] |= {"colluders": t, "rollbacks": rho, "minimum_hospitals": m}
    allowed = max(3, t + 2, -(-2 * n // 3), -(-(n + t + rho + 1) // 2)) <= m <= n
    if allowed:
        assert Study.from_toml(toml(study)).aggregation.minimum_hospitals == m
    else:
        with pytest.raises(UsageError, match="aggregation"):
            Study.from_toml(toml(study))


def test_a_split_attack_of_two_colluders_among_six_is_refused() -> None:
    study = changed("members", [f"Site {i}" for i in range(6)])
    study["aggregation"] |= {"colluders": 2, "rollbacks": 0, "minimum_hospitals": 4}
    with pytest.raises(UsageError) as caught:
        Study.from_toml(toml(study))
    assert caught.value.code == "study.aggregation.minimum_hospitals"


@pytest.mark.parametrize(("rounds", "expected"), [(1, 4), (10, 13), (100, 110), (10_000, 10_000)])
def test_spare_rounds_are_stated(rounds: int, expected: int) -> None:
    assert Study.from_toml(toml(changed("training.rounds", rounds))).aggregation.rounds_max == expected


def test_the_order_of_members_in_the_file_is_no_difference() -> None:
    turned = changed("members", list(reversed(plain()["members"])))
    assert manifest(turned).digest == manifest().digest


values = st.sampled_from([0, 1, -1, 2.5, 1e15, 1e-9, True, "", "x", [], {}, float("nan"), float("inf")])
paths = st.sampled_from(
    [path for case in CASES if "." in (path := case["path"]) or path in plain()] + ["contract.features.0"]
)


@given(paths, values)
@settings(max_examples=60, deadline=None)
def test_any_value_is_read_or_refused_at_a_path(path: str, value: object) -> None:
    study = plain()
    *parents, last = path.split(".")
    table: Any = study
    for part in parents:
        table = table[int(part)] if isinstance(table, list) else table[part]
    table[int(last) if isinstance(table, list) else last] = value
    refused = None
    try:
        parsed = Study.from_toml(toml(study))
    except UsageError as error:
        refused = error
    if refused is not None:
        assert refused.code.startswith("study.")
        return
    whole = manifest().model_copy(update={"study": parsed})
    assert Manifest.from_bytes(whole.to_bytes()).study == parsed


def test_the_manifest_of_the_example_is_frozen() -> None:
    data = (STUDIES / "breast_cancer.manifest.json").read_bytes()
    assert manifest().to_bytes() == data
    frozen = json.loads((STUDIES / "breast_cancer.digest.json").read_bytes())
    assert manifest().digest.hex() == frozen["digest"] == digest("manifest", data).hex()
    assert SignedManifest.sign(manifest(), COORDINATOR).signature.hex() == frozen["signature"]


def test_manifests_have_one_form() -> None:
    whole = manifest()
    data = whole.to_bytes()
    assert Manifest.from_bytes(data) == whole
    value = json.loads(data)
    others = [
        data + b"\n",
        b" " + data,
        json.dumps(value).encode(),
        data.replace(b'"schema":1', b'"schema":1.0'),
        data.replace(b'"bits":32', b'"bits":32.0'),
        data.replace(b'"schema":1,', b'"schema":1,"schema":1,'),
        data.replace(b'"range":100', b'"range":100.0'),
    ]
    for path, replaced in [
        (("schema",), True),
        (("study", "permit"), None),
        (("study", "aggregation", "rounds_max"), None),
        (("study", "aggregation", "minimum_hospitals"), None),
        (("study", "contract", "features", 0, "missing"), "drop"),
        (("study", "members"), list(reversed(value["study"]["members"]))),
        (("extra",), 1),
        (("schema",), 2),
    ]:
        copy = json.loads(data)
        table = copy
        for part in path[:-1]:
            table = table[part]
        if replaced is None or replaced == "drop":
            del table[path[-1]]
        else:
            table[path[-1]] = replaced
        others.append(canonical_json(copy))
    assert len(set(others)) == len(others)
    for other in others:
        assert other != data
        with pytest.raises((VerificationError, UsageError)):
            Manifest.from_bytes(other)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_refused_or_another_manifest(position: int, byte: int) -> None:
    data = bytearray(manifest().to_bytes())
    data[position % len(data)] = byte
    try:
        parsed = Manifest.from_bytes(bytes(data))
    except (VerificationError, UsageError):
        return
    assert parsed.to_bytes() == bytes(data)
    assert (parsed.digest == manifest().digest) == (bytes(data) == manifest().to_bytes())


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"1", b"{}", b"\xff", b"[" * 100_000, b" " * (1 << 21)]
)
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((VerificationError, UsageError)):
        Manifest.from_bytes(data)


SITES = ("Cleveland", "Hungarian", "Long Beach", "St. Gallen")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 2}, "schema"),
        ({"schema": True}, "schema"),
        ({"run": "AB" * 16}, "run"),
        ({"run": "ab" * 15}, "run"),
        ({"roster": "cd" * 16}, "roster"),
        ({"hub": "ed25519:AAAA"}, "hub"),
        ({"coordinator": key_text(public_key(HUB))}, "coordinator"),
        ({"members": [{"id": i, "name": name} for i, name in enumerate(SITES)]}, "members.0.id"),
        ({"members": [{"id": 1, "name": name} for name in SITES]}, "members"),
        ({"members": [{"id": 9 - i, "name": name} for i, name in enumerate(SITES)]}, "members"),
        ({"members": [{"id": i, "name": name} for i, name in enumerate(SITES[:3], 1)]}, "members"),
        (
            {"members": [{"id": i, "name": name} for i, name in enumerate((*SITES[:3], "Other"), 1)]},
            "members",
        ),
    ],
)
def test_malformed_manifests_are_refused(change: dict[str, Any], told: str) -> None:
    value = json.loads(manifest().to_bytes()) | change
    with pytest.raises(UsageError) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert caught.value.code == f"manifest.{told}"


def test_diff_names_every_change() -> None:
    study = changed("training.learning_rate", 2.0)
    study["contract"]["features"].insert(0, {"kind": "category", "name": "grade", "codes": ["1", "2"]})
    study["permit"] = "EC 17/2026"
    found = {path: (old, new) for path, old, new in manifest().diff(manifest(study))}
    names = [feature.name for feature in manifest().study.contract.features]
    assert found == {
        "study.training.learning_rate": (4.0, 2.0),
        "study.permit": ("", "EC 17/2026"),
        "study.contract.features": (names, ["grade", *names]),
        "study.contract.features[grade].kind": (None, "category"),
        "study.contract.features[grade].name": (None, "grade"),
        "study.contract.features[grade].codes": (None, ["1", "2"]),
    }
    assert manifest().diff(manifest()) == []


@given(st.sampled_from(["training.rounds", "training.steps", "privacy.max_patients"]), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_diff_is_empty_only_for_equal_manifests(path: str, value: int) -> None:
    first, second = manifest(), manifest(changed(path, value))
    assert (first.diff(second) == []) == (first.digest == second.digest)


def test_order_of_features_is_a_difference() -> None:
    study = plain()
    study["contract"]["features"].reverse()
    assert [path for path, _, _ in manifest().diff(manifest(study))] == ["study.contract.features"]


def test_altered_manifests_are_refused() -> None:
    signed = SignedManifest.sign(manifest(), COORDINATOR)
    assert signed.verify() == manifest()
    other = manifest(changed("training.rounds", 11))
    taken_over = manifest(
        coordinator=key_text(public_key(Ed25519PrivateKey.from_private_bytes(b"\x03" * 32)))
    )
    for forged in (
        SignedManifest(other.to_bytes(), signed.signature),
        SignedManifest(taken_over.to_bytes(), signed.signature),
        SignedManifest(signed.manifest_bytes, bytes(64)),
        SignedManifest(signed.manifest_bytes, signed.signature[:-1]),
        SignedManifest(signed.manifest_bytes, HUB.sign(signed.manifest_bytes)),
        SignedManifest(signed.manifest_bytes, COORDINATOR.sign(signed.manifest_bytes)),
        SignedManifest(signed.manifest_bytes[:-1], signed.signature),
    ):
        with pytest.raises((VerificationError, UsageError)):
            forged.verify()


def test_only_the_named_coordinator_signs() -> None:
    with pytest.raises(VerificationError, match="another coordinator"):
        SignedManifest.sign(manifest(), HUB)


SHARED = {
    "training.mode": "shared-noise",
    "training.steps": 1,
    "training.engine": "bookkeeping",
    "aggregation.codec.step": 0.0005,
}


def shared(**changes: Any) -> dict[str, Any]:
    study = plain()
    for path, value in (SHARED | {key.replace("__", "."): value for key, value in changes.items()}).items():
        *parents, last = path.split(".")
        table: Any = study
        for part in parents:
            table = table[part]
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return study


def test_shared_noise_has_an_engine_a_step_and_a_grid_of_its_own() -> None:
    study = Study.from_toml(toml(shared(training__engine=None)))
    assert (study.training.engine, study.training.steps) == ("bookkeeping", 1)
    assert (study.training.rounds, study.training.average_last) == (10, 5)
    assert Study.from_toml(toml(shared(training__average_last=3))).training.average_last == 3
    assert Study.from_toml(TEXT).training.average_last == 1
    assert Study.from_toml(toml(changed("training.engine"))).training.engine == "opacus"
    assert Study.from_toml(toml(changed("training.engine", "bookkeeping"))).training.engine == "bookkeeping"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training__steps": 2}, "training.steps"),
        ({"training__engine": "opacus"}, "training.engine"),
        ({"aggregation__codec__step": 0.001}, "aggregation.codec.step"),
        ({"aggregation__masks": "none_hub_sees_every_update"}, "aggregation.masks"),
        ({"privacy": {"kind": "without_differential_privacy"}}, "training.engine"),
    ],
)
def test_shared_noise_stands_on_masks_clipping_and_one_grid(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Study.from_toml(toml(shared(**change)))
    assert caught.value.code == f"study.{told}"


def test_consents_are_those_of_all_members_unless_stated() -> None:
    study = Study.from_toml(TEXT)
    assert study.consents == study.members
    assert Study.from_toml(toml(changed("consents", []))).consents == ()
    some = sorted(study.members)[:2]
    assert Study.from_toml(toml(changed("consents", some[::-1]))).consents == tuple(some)
