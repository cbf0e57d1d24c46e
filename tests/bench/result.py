"""One measured figure beside its target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """``target`` is the most that ``value`` may be; None for a figure that is only reported."""

    name: str
    value: float
    unit: str
    target: float | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.target is None else self.value <= self.target

    @property
    def target_text(self) -> str:
        return "-" if self.target is None else f"<= {self.target:g}"

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "reached": self.reached,
        }
