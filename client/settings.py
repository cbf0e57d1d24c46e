"""The hospital's two settings files: ``site.toml`` (where the hub is) and ``policy.toml`` (what is allowed).

Source: DESIGN "One program"; PRIVACY "Registers, budget, filter". Rules: TOML by tomllib, validated with
unknown keys as errors; the policy is the hospital's own, denies by default, and the hub never changes it;
no secret stands in either file.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from client.sources.source import DataSource
from common.contract import Strict
from common.errors import RefusedError, UsageError
from common.privacy.filter import Cap

DELTA_LIMIT: Final = 1e-5
_TIME: Final = "([01][0-9]|2[0-3]):[0-5][0-9]"
_WINDOW: Final = f"^({_TIME}-{_TIME})?$"
Text = Annotated[str, Field(min_length=1, max_length=200)]


class SiteSettings(Strict):
    """``site.toml``: this hospital's name and the hub's address as host:port."""

    name: Text
    hub: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}$")]


class Register(Strict):
    """The budget's owner: one random id, made once, and what all studies together may spend.

    ``epsilon_t`` holds while at most t members collude, ``epsilon_w`` when all others do.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    # Far above 20 the sampler's bound times 1 + e^epsilon would use up delta: nothing would be admitted.
    epsilon_t: Annotated[float, Field(gt=0, le=20)]
    epsilon_w: Annotated[float, Field(gt=0, le=20)]
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    delta_above_one_in_a_hundred_thousand: bool = False

    @model_validator(mode="after")
    def _delta_is_small(self) -> "Register":
        if self.delta > DELTA_LIMIT and not self.delta_above_one_in_a_hundred_thousand:
            flag = "delta_above_one_in_a_hundred_thousand = true"
            raise ValueError(f"delta above 1e-5 needs {flag}, and reports say so")
        return self

    @property
    def cap(self) -> Cap:
        """The caps as the filter takes them."""
        return Cap(epsilon_t=self.epsilon_t, epsilon_w=self.epsilon_w, delta=self.delta)


class Rules(Strict):
    """What a study must meet before a person may approve it, and whenever a round of it begins.

    ``minimum_patients`` is looked at when a person approves, and never again: an automatic refusal would tell
    how many there are.
    """

    coordinators: list[str] = Field(default_factory=list)
    officers: list[str] = Field(default_factory=list)
    epsilon_per_study: Annotated[float, Field(gt=0, le=20)] | None = None
    minimum_hospitals: Annotated[int, Field(ge=3)] = 3
    minimum_patients: Annotated[int, Field(ge=1)] = 20
    training_window: Annotated[str, Field(pattern=_WINDOW)] = ""
    allow_studies_without_differential_privacy: bool = False
    allow_studies_whose_every_update_the_hub_sees: bool = False
    outsiders_only: bool = False
    max_round_minutes: Annotated[int, Field(ge=1, le=24 * 60)] = 60


class Policy(Strict):
    """``policy.toml``."""

    privacy_register: Annotated[Register, Field(alias="register")]
    rules: Rules = Rules()
    data: dict[Text, DataSource] = Field(default_factory=dict)

    def source(self, name: str) -> DataSource:
        """The extract that a study names. Raises RefusedError when the policy does not offer it."""
        if name not in self.data:
            problem = f"the policy offers no data source named {name!r}"
            remedy = f"Add [data.{name}] with its source to policy.toml, or deny the study."
            raise RefusedError("policy.data", problem, remedy=remedy)
        return self.data[name]


Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, model: type[Model]) -> Model:
    """Read and validate one settings file. Raises UsageError naming the file, the field and the rule."""
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        remedy = "Restore it; only a new site is made by 'wardround site init', in a new folder."
        raise UsageError("settings.missing", f"{path} is missing", remedy=remedy) from error
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
        remedy = "Check that it is a file which the agent's account may read."
        raise UsageError("settings.unreadable", problem, remedy=remedy) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        remedy = "Correct that field; unknown keys are errors."
        raise UsageError("settings.field", f"{path}: {field}: {first['msg']}", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        # tomllib also fails on a number of thousands of digits, and on tables deep inside one another.
        remedy = "Correct that line."
        raise UsageError("settings.toml", f"{path} is not valid TOML: {error}", remedy=remedy) from error


SITE_TEMPLATE: Final = """\
# Where this hospital's agent dials out to. The address comes from the coordinator.
name = "{name}"
hub = "{hub}"
"""

POLICY_TEMPLATE: Final = """\
# This file belongs to the hospital; the hub can never change it. Nothing is allowed that it does not allow.

[register]
# The population whose privacy budget this is. Made once; never edit the id.
id = "{register_id}"
# What all studies together may spend on any one patient: epsilon_t while at most t hospitals collude with
# the hub, epsilon_w when every other hospital does. The first command after admission fixes them: later they
# may only be lowered, or raised by two officers.
epsilon_t = 3.0
epsilon_w = 3.0
delta = 1e-6

[rules]
# Keys of the coordinators whose studies may be approved, as printed by 'wardround hub init', for example
# coordinators = ["ed25519:..."]
coordinators = []
# Keys of the two or more officers who can raise a cap together, or reopen a restored site's register
# ('wardround site officer' makes one): neither belongs to whoever edits this file.
officers = []
minimum_hospitals = 3
allow_studies_without_differential_privacy = false
allow_studies_whose_every_update_the_hub_sees = false
outsiders_only = false
max_round_minutes = 60
# Beside the caps of the register, what one study may spend; and when rounds may begin, in local time.
# epsilon_per_study = 1.0
# training_window = "20:00-06:00"
# A person may approve a study for no fewer patients than these.
minimum_patients = 20

# One table an extract that studies may name, for example:
# [data.readmissions]
# source = "csv:/srv/wardround/readmissions.csv"
# patient = "patient_id"   # whose privacy is counted: a study that names another column is refused
# columns = ["age", "sex", "readmitted"]   # all that studies may see; a study that names another is refused
# opt_out = "/srv/wardround/opt_out.txt"   # patients to leave out, an id a line; read anew before every round
# Other sources: parquet: ndjson: duckdb: (with table), sql: and omop: (a database's address, password_file),
# fhir: and dicom: (folders). What a file does not write as the contract does, a map says:
# delimiter = ";"
# decimal = ","
# [data.readmissions.map.age]
# column = "Alter"
# unit = "a"
"""

_NAME: Final = re.compile(r"[A-Za-z0-9 .'_-]{1,64}")


def new_files(name: str, hub: str, register_id: str) -> dict[str, str]:
    """The two files of a new site. Raises UsageError when the name or the address is malformed."""
    if not _NAME.fullmatch(name):
        remedy = "Use 1-64 letters, digits, spaces and . ' _ -"
        raise UsageError("site.name", f"{name!r} is not a site name", remedy=remedy)
    # Before they stand in a file: neither may hold what TOML would read otherwise.
    try:
        SiteSettings(name=name, hub=hub)
    except ValidationError as error:
        remedy = "Give host:port, as the coordinator sent it."
        raise UsageError("site.hub", f"{hub!r} is not an address", remedy=remedy) from error
    return {
        "site.toml": SITE_TEMPLATE.format(name=name, hub=hub),
        "policy.toml": POLICY_TEMPLATE.format(register_id=register_id),
    }
