"""Whether heads that look are needed: found on some pictures, taken out on others, against random heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headwise.benches.looking.items import Bench
from headwise.benches.looking.row import Row
from headwise.heads import HeadSet
from headwise.scores import HeadScores
from headwise.sweep import KnockOut
from headwise.verify.gathering import gather
from headwise.verify.judging import judge
from headwise.verify.statistics import mean_interval

PART = 1 / 12
"""Share of the heads that a method names: fewer than 9 percent, as of gaze heads."""


@dataclass(frozen=True)
class Found:
    """A method's heads, found on a probe."""

    method: str
    probe: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.method, *(f"by {value}" for value in self.settings.values()), "on", self.probe])

    def scores(self, bench: Bench) -> HeadScores:
        return bench.scores(self.method, self.probe, **self.settings)

    def heads(self, bench: Bench) -> HeadSet:
        return self.scores(bench).top(bench.share_of_heads(PART))


VISION_AWARE = Found("vision-aware", "existence")
RELATIVE = Found("vision-aware", "existence", {"distance": "relative"})
"""Large heads move far: as a share of what they give with and without the picture."""
OF_PICTURES = Found("multimodal-retrieval", "picture-needle")
OF_TEXT = Found("multimodal-retrieval", "text-needle")


def gazing(probe: str) -> dict[str, Found]:
    """Heads that look at the place asked for: from the last token, by either gaze score, and from the question."""
    return {
        "mass": Found("gaze", probe),
        "contrast": Found("gaze", probe, {"score": "contrast"}),
        "question": Found("multimodal-retrieval", probe),
    }


TESTED: Mapping[str, tuple[Mapping[str, Any], tuple[Found, ...]]] = {
    "existence": ({"faintness": 0.0}, (VISION_AWARE, RELATIVE)),
    "panel": ({}, (*gazing("panel").values(), VISION_AWARE)),
    "place": ({}, (*gazing("place").values(), VISION_AWARE)),
    "picture-needle": ({}, (OF_PICTURES, OF_TEXT)),
    "text-needle": ({}, (OF_TEXT, OF_PICTURES)),
}
"""Which heads are taken out of which behaviour; clear pictures, so that what they show can be seen."""


def part(bench: Bench) -> list[Row]:
    """Of every probe and set of heads the joint verdict."""
    return [row for name in TESTED for row in _of_probe(bench, name)]


def _of_probe(bench: Bench, name: str) -> list[Row]:
    settings, tested = TESTED[name]
    items = bench.items(name, "judging", bench.sizes.verdicts, **settings)
    evidence = gather(
        bench.model,
        items,
        KnockOut(),
        joints={each.name: each.heads(bench) for each in tested},
        measured="logit-difference",
        n_controls=bench.sizes.verdict_controls,
        seed=bench.seed,
    )
    family = judge(evidence)
    if family.refusal:
        return [Row(f"{name}: {each.name}", refused=family.refusal) for each in tested]
    rows = []
    for measured in evidence.joints:
        joint = family.joint(measured.name)
        alone = sum(family.single(head).ruling == "verified" for head in joint.heads.heads)
        change = measured.values - evidence.clean
        rows.append(
            Row(
                name=f"{name}: {joint.name}",
                heads=joint.heads.labels,
                items=family.n_items,
                without=family.clean,
                edited=float(measured.values.mean()),
                change=float(change.mean()),
                interval=mean_interval(change),
                beyond=-joint.against.excess,
                beyond_interval=(-joint.against.ci[1], -joint.against.ci[0]),
                controls=joint.against.n,
                wanted=-1,
                ruling=joint.ruling,
                note=f"{joint.ruling}: {joint.reason}; of {len(joint.heads)} heads {alone} are verified alone",
            )
        )
    return rows
