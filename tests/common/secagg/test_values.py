"""Every value of the secure sum is immutable, and no key, seed, signature or vector of it is printed."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import common.secagg

UNPRINTED = {
    "Setup": "directory",
    "SetupKeys": "mlkem_seed x25519_key",
    "RunParams": "keys hub_key",
    "Sums": "parameters scalars",
    "KeyAnnounce": "mlkem x25519 sig",
    "Directory": "entries",
    "PairSeed": "ct sig",
    "Confirm": "tags sig",
    "Tag": "tag",
    "Head": "extensions sig",
    "Cosign": "sig",
    "Cosigned": "cosigns",
    "RoundStart": "sig",
    "Ready": "sig",
    "Upload": "chunk_digests sig",
    "Open": "b sig",
    "Result": "sig",
}


def values() -> Iterator[Any]:
    names = [f"common.secagg.{module.name}" for module in pkgutil.iter_modules(common.secagg.__path__)]
    for name in [*names, "common.messages"]:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == name:
                yield value


VALUES = list(values())


def test_there_are_values() -> None:
    assert {value.__name__ for value in VALUES} > UNPRINTED.keys()


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_a_value_is_immutable_and_prints_no_secret(value: Any) -> None:
    assert value.__dataclass_params__.frozen
    hidden = {field.name for field in dataclasses.fields(value) if not field.repr}
    assert hidden == set(UNPRINTED.get(value.__name__, "").split())
    # The state of a run says by itself what it prints.
    assert value.__dataclass_params__.repr == (value.__name__ != "RunState")
