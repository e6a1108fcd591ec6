"""What became of one row, and how it is told apart from every other outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from headwise.benches.coverage.rows import Row

Status = Literal["right", "partly", "wrong", "refused", "no attention", "not run", "not built", "ended"]

MEANING: dict[Status, str] = {
    "wrong": "a check of the doctor failed, or headwise stumbled: not to be used until it is mended",
    "right": "z shown right at every site whose z can be edited, and no check failed",
    "partly": "attached and no check failed, but no site's z could be shown right, for the reason given",
    "refused": "the model attends, and `hw.attach` refuses it, for the reason given",
    "no attention": "the model has no attention; there are no heads to reach",
    "not run": "built, but no inputs were found on which the model itself runs",
    "not built": "the tiny model could not be built, for the reason given",
    "ended": "the row ran into the time limit or its process was ended",
}
"""Every status, the worst first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check or capability: `pass`, `fail`, `n/a`, or `not installed`, and what was seen."""

    status: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One row examined.

    Attributes:
        status: see `MEANING`.
        reason: why the row is not `right`, in its own words; what is refused, where it is.
        inputs: `made up` by attach, or `given` by this script; what they hold is in `seen`.
        seen: names of the model's inputs.
        sites, heads: attention sites and heads that were found.
        routes: ways by which the sites are reached.
        projections: classes of the output projections.
        with_z, with_rows: sites whose z can be edited, and whose rows can be read.
        checks: the doctor's, by name.
        capabilities: further ones, for the most used types.
        seconds: how long it took; not part of what is committed.
    """

    model_type: str
    task: str
    class_name: str
    status: Status
    reason: str = ""
    inputs: str = ""
    seen: tuple[str, ...] = ()
    sites: int = 0
    heads: int = 0
    routes: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    with_z: int = 0
    with_rows: int = 0
    checks: dict[str, Outcome] = field(default_factory=dict)
    capabilities: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.model_type} {self.task}"

    @property
    def route(self) -> str:
        """`registry`, `watched`, `both`, or nothing where there are no sites."""
        return "both" if len(self.routes) > 1 else "".join(self.routes)

    @property
    def built(self) -> bool:
        return self.status not in ("not built", "ended")

    def passed(self, check: str) -> bool:
        return check in self.checks and self.checks[check].status == "pass"

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ("", 0, 0.0, (), {})}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Result:
        named = dict(read)
        for name in ("seen", "routes", "projections"):
            named[name] = tuple(named.get(name, ()))
        for name in ("checks", "capabilities"):
            named[name] = {key: Outcome(**value) for key, value in named.get(name, {}).items()}
        return cls(**named)


def ended(row: Row, reason: str, seconds: float = 0.0) -> Result:
    return Result(row.model_type, row.task, row.class_name, "ended", reason, seconds=seconds)
