"""Attention calibration (ACT): mass on sinks that are not the first one goes back to the other tokens.

Yu et al., 2024, "Unveiling and Harnessing Hidden Attention Sinks" (code: GATECH-EIC/ACT). For a head with pattern A,

    c_j = 1 / n_j sum_i A_ij          attention received by key j, over the n_j tokens of the prompt that see it
    S   = {j : c_j > 0.1} less the first such j
    A'_ij = b A_ij                                           for j in S (b = 0.4)
    A'_ij = A_ij (1 + (1 - b) sum_S A_i / (1 - sum_S A_i))   for the others

so that rows keep their sums and weights outside S their ratios. Row by row this is log b, and log of the second factor,
added to scores. S is of each head and each item. It is counted over the prompt, padding left out, and stays for the
tokens that are generated: a decoding step has one row, in which every weight is its own mean. (The released code edits
the prompt alone, for one item at a time; `scope = "prompt"` is that.)

Exact: the formula. The first sink is left alone because it is taken to be the first token; where the first token
receives less than 0.1, what is left alone is another one, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.metrics import Metric, measure, metric, sign_of
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.sweep.edited import Edited
from headwise.sweep.measuring import measure_sets
from headwise.use.attention.zero_tuning import parted, units_of
from headwise.use.intervention import Intervention, finite, named_heads


@dataclass(frozen=True, eq=False, repr=False)
class AttentionCalibration(Intervention):
    """Take from the later sinks of heads, and give it to their other keys: `AttentionCalibration("L2H1, L3H4")`.

    Attributes:
        heads: the heads.
        beta: the share that sinks keep, from 0 to 1; 1 changes nothing.
        above: from how much attention received on a key is a sink.
        scope: queries whose rows are changed, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "attention-calibration"
    heads: HeadSet
    beta: float = 0.4
    above: float = 0.1
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        object.__setattr__(self, "beta", finite(self.beta, f"{self.id}: beta", 0.0, 1.0))
        object.__setattr__(self, "above", finite(self.above, f"{self.id}: above", 0.0, 1.0))
        edit.received(self.above)
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        heads = model.heads(self.heads)
        return () if self.beta == 1 else (self._edit(heads),)

    def _edit(self, heads: HeadSet, rows: object = None) -> Edit:
        keys = edit.received(self.above)
        return edit.redistribute(heads, 1 - self.beta, keys=keys, scope=self.scope, rows=rows)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """An ACT whose heads were chosen on one part of the items and judged on the other.

    Attributes:
        intervention: of the heads that helped; None where none did.
        heads, gain: every head tried, and by how much its calibration alone bettered the mean metric of `tuning`.
        tuning, judging: the two parts; no prompt is in both.
        plain, calibrated: the metric of every judging item without it and with it.
    """

    intervention: AttentionCalibration | None
    heads: HeadSet
    gain: Float[Tensor, " head"]
    tuning: ItemSet
    judging: ItemSet
    plain: Float[Tensor, " item"]
    calibrated: Float[Tensor, " item"]


def choose_heads(
    model: AttachedModel,
    items: ItemSet,
    heads: HeadSet | str | None = None,
    *,
    measured: str | Metric = "exact-match",
    beta: float = 0.4,
    above: float = 0.1,
) -> Calibrated:
    """Calibrate each head alone on one half of the items, keep those that help, and judge them on the other half.

    Cost: one forward per head and tuning item; it begins at the head's layer where the model allows it. The paper takes
    accuracy on 900 to 1000 items, and leaves the first two layers and the last one out; with few items most gains of
    accuracy are 0 or one item, and a metric of the logits tells more.

    Args:
        heads: which heads to try; None is all of them.

    Raises:
        InputError: settings out of range, fewer than two different prompts.
    """
    chosen = metric(measured) if not isinstance(measured, Metric) else measured
    tried = model.heads(heads)
    settings = AttentionCalibration(tried, beta, above)
    if beta == 1:
        raise InputError("beta=1 changes nothing, so no head can be chosen by it; give a number below 1")
    tuning, judging = parted(items)
    sign = sign_of(chosen.better)
    plain = measure(model, tuning, chosen).double().mean()
    alone = measure_sets(model, tuning, units_of(tried, "head"), Edited(settings._edit), chosen).mean(dim=1)
    gain = sign * (alone - plain)
    helping = HeadSet(tuple(head for head, better in zip(tried.heads, (gain > 0).tolist(), strict=True) if better))
    before = measure(model, judging, chosen)
    if not helping:
        return Calibrated(None, tried, gain, tuning, judging, before, before)
    found = settings.but(heads=helping)
    after = measure(model, judging, chosen, edits=found.edits(model))
    return Calibrated(found, tried, gain, tuning, judging, before, after)


INTERVENTIONS = (
    InterventionEntry(
        id=AttentionCalibration.id,
        title="Take attention from sinks within the text",
        page="use/attention.md#attention-calibration",
        paper="Yu et al., Unveiling and Harnessing Hidden Attention Sinks (ACT)",
        year=2024,
        tier="B",
        status="exact",
        cost="1 forward; rows of these heads recomputed, the prompt's twice (choice: 1 forward per head and item)",
        made=AttentionCalibration,
    ),
)
