"""One measured figure beside its target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """``target`` is the most, ``at_least`` the least that ``value`` may be; without both it is only reported."""

    name: str
    value: float
    unit: str
    target: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.target is None else self.value <= self.target

    @property
    def target_text(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "-" if self.target is None else f"<= {self.target:g}"

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Name, value, unit, target and whether it is reached, for a table."""
        reached = {True: "yes", False: "NO", None: "-"}[self.reached]
        return self.name, f"{self.value:.4g}", self.unit, self.target_text, reached

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "at_least": self.at_least,
            "reached": self.reached,
        }
