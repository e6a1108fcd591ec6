"""Rotary dimensions of heads: pairs of dimensions of q and k, by their frequency, taken out or scaled.

"Does RoPE Prevent or Degrade Retrieval Heads?", 2026 (code: CengizhanBayram), patches frequencies of retrieval heads:
q and k of a head are set to 0 in d_h / 8 dimensions, of the lowest frequencies, the highest, or random ones, so that

    q_i . k_j = sum over pairs p    loses the pairs taken out:    s_ij -> s_ij - sum_{p out} q_i^p . k_j^p

The pairs with the lowest frequencies hardly turn within a text and carry what is said; the highest tell near positions
apart. Both members of a pair go together: one alone is half a frequency. Here q and k are edited behind the rotary
embedding. Since a pair turns within itself that is the same as in front of it, as in the paper, unless q and k are
normalised in between.

k belongs to a whole KV group: with `side = "both"`, as in the paper, the other heads of the group lose these pairs of
k, too. Taking q out alone (`side = "q"`) gives the same scores of the heads named, and leaves the others be. Scaling
both sides by f scales the pairs' part of the score by f ^ 2.

`rotary_of` finds the pairs and their frequencies (see `model/finding/rotary.py`). Exact: the edit. Reconstruction: that
whole pairs are chosen (the paper counts dimensions; early versions of its code paired them by another layout).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.metrics import Metric, metric
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.capture import Captured
from headwise.model.edit import Edit
from headwise.model.finding.rotary import Rotary, rotary_of
from headwise.model.operations import Here
from headwise.model.scopes import parse_scope
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places
from headwise.use.intervention import Intervention, finite, named_heads

Side = Literal["both", "q", "k"]
CHOICES = ("lowest", "highest", "random")


@dataclass(frozen=True, eq=False, repr=False)
class RotaryDimensions(Intervention):
    """Scale pairs of rotary dimensions of heads, or take them out: `RotaryDimensions("L2H1", "lowest")`.

    Attributes:
        heads: the heads.
        pairs: `lowest`, `highest` or `random`, or numbers of pairs, 0 the one with the highest frequency.
        count: how many, where `pairs` is a word; None is the paper's share, an eighth of the head's dimensions.
        factor: what these dimensions are multiplied by; 0 takes them out, 1 changes nothing.
        side: `both` q and k, or one of them.
        seed: of the draw of `random`, which is the same for all heads of a site.
        scope: for q positions of queries, for k those of keys, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "rotary-dimensions"
    heads: HeadSet
    pairs: str | tuple[int, ...] = "lowest"
    count: int | None = None
    factor: float = 0.0
    side: Side = "both"
    seed: int = 0
    scope: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        object.__setattr__(self, "factor", finite(self.factor, f"{self.id}: factor"))
        if not isinstance(self.pairs, str):
            object.__setattr__(self, "pairs", _numbers(self.pairs, self.id))
        elif self.pairs not in CHOICES:
            raise InputError(f"{self.id}: pairs={self.pairs!r} is not one of {', '.join(CHOICES)}, or numbers of pairs")
        if self.count is not None and (not isinstance(self.pairs, str) or not _is_count(self.count) or self.count < 1):
            raise InputError(
                f"{self.id}: count={self.count!r}; give a number of pairs from 1 on, beside a word as pairs="
            )
        if self.side not in ("both", "q", "k"):
            raise InputError(f"{self.id}: side={self.side!r} is not one of both, q, k")
        parse_scope(self.scope)

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        """Raises Refusal where a head's site has no rotary embedding, InputError for pairs that it does not have."""
        model.heads(self.heads)
        chosen = self.dimensions(model)
        if self.factor == 1:
            return ()

        def scaled(width: int, dims: Tensor) -> Tensor:
            return torch.ones(width).index_fill(0, dims, self.factor)

        edits: list[Edit] = []
        for site, dims in chosen.items():
            factor = scaled(model.table.site(site).qk_dim, dims)
            for variable, labels in self._sides(model, site):
                edits.append(
                    edit.scale(labels, dict.fromkeys(labels, factor), variable=variable, scope=self.scope)  # type: ignore[arg-type]
                )
        return tuple(edits)

    def dimensions(self, model: AttachedModel) -> dict[SiteId, Tensor]:
        """Dimensions of q and k at each site of the heads, both members of every pair. Raises as `edits`."""
        found = rotary_of(model)
        without = [site.label for site in self.heads.sites if site not in found]
        if without:
            raise Refusal(f"{self.id}: {without[0]} of {model.name} does not turn q and k by position; leave it out")
        return {site: found[site].pairs[self._chosen(site, found[site], model)].flatten() for site in self.heads.sites}

    def _chosen(self, site: SiteId, rotary: Rotary, model: AttachedModel) -> list[int]:
        n = len(rotary.frequency)
        if not isinstance(self.pairs, str):
            if max(self.pairs) >= n:
                raise InputError(f"{self.id}: {site.label} has pairs 0 to {n - 1}, and no pair {max(self.pairs)}")
            return list(self.pairs)
        count = self.count if self.count is not None else max(1, model.table.site(site).qk_dim // 16)
        if count > n:
            raise InputError(f"{self.id}: {site.label} has {n} pairs, and not {count}")
        match self.pairs:
            case "highest":
                return list(range(count))
            case "lowest":
                return list(range(n - count, n))
            case _:
                return sorted(random.Random(f"rotary/{self.seed}/{site.label}").sample(range(n), count))

    def _sides(self, model: AttachedModel, site: SiteId) -> list[tuple[str, list[str]]]:
        """The variables edited at a site, each with the labels of its heads or KV groups."""
        here = self.heads.filter(lambda head: head.site == site)
        groups = here.to_groups({site: model.table.site(site).group_size})
        sides = {"q": list(here.labels), "k": list(groups.labels)}
        return [(name, labels) for name, labels in sides.items() if self.side in ("both", name)]


def measure_from_twins(
    model: AttachedModel,
    items: ItemSet,
    dimensions: RotaryDimensions,
    measured: str | Metric | None = None,
    *,
    batch_size: int = 16,
) -> Float[Tensor, " item"]:
    """The metric of every item when these dimensions of q and k are those of a run on the item's corrupted twin.

    Where `RotaryDimensions` asks what is lost without them, this asks what they tell the two texts apart by. `factor`
    is not used. Answers are the item's, behind the twin as behind the item.

    Raises:
        InputError: an item without a twin; a metric that needs the clean run or a generation.
        Refusal: as `RotaryDimensions.edits`.
    """
    chosen = metric(items.metric if measured is None else measured) if not isinstance(measured, Metric) else measured
    if chosen.needs != {"logits"}:
        raise InputError(f"measure_from_twins takes a metric of the logits alone, and {chosen.id} needs more")
    model.heads(dimensions.heads)
    dims = dimensions.dimensions(model)
    asked = {
        name: [
            label
            for site in dims
            for variable, labels in dimensions._sides(model, site)
            if variable == name
            for label in labels
        ]
        for name in ("q", "k")
    }
    twins = items.twins()
    values = []
    for batch, other in zip(items.batches(batch_size), _behind(twins, items).batches(batch_size), strict=True):
        at = places(model, batch)
        reads = [getattr(read, name)(labels) for name, labels in asked.items() if labels]
        with model.reading(*reads) as got:
            observe(model, other, wants={"logits"})
        edits = [
            edit.set(labels, _from(getattr(got, name), dims), variable=name, scope=dimensions.scope)  # type: ignore[arg-type]
            for name, labels in asked.items()
            if labels
        ]
        with model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length):
            outcome = observe(model, batch, wants={"logits"})
        values.append(chosen(outcome).detach().cpu())
    return torch.cat(values)


def _behind(twins: ItemSet, items: ItemSet) -> ItemSet:
    """The twins' prompts with the items' answers, so that both runs have the same columns."""
    both = zip(twins, items, strict=True)
    return replace(twins, items=tuple(replace(twin, answer=item.answer) for twin, item in both))


def _from(captured: Captured, dims: Mapping[SiteId, Tensor]) -> Callable[[Tensor, Here], Tensor]:
    """As the value of an edit: what was captured in these dimensions, what is there in the others."""

    def value(current: Tensor, here: Here) -> Tensor:
        given = captured.donate(here).to(current)
        index = dims[here.site].to(current.device)
        return current.index_copy(-1, index, given.index_select(-1, index))

    return value


def _numbers(pairs: object, what: str) -> tuple[int, ...]:
    listed = tuple(pairs) if isinstance(pairs, Sequence) else ()
    if not listed or not all(_is_count(each) for each in listed) or len(set(listed)) != len(listed):
        raise InputError(f"{what}: pairs={pairs!r}; give {', '.join(CHOICES)}, or different numbers of pairs from 0 on")
    return listed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


INTERVENTIONS = (
    InterventionEntry(
        id=RotaryDimensions.id,
        title="Take rotary frequencies out of the queries and keys of heads",
        page="use/attention.md#rotary-dimensions",
        paper="Does RoPE Prevent or Degrade Retrieval Heads?",
        year=2026,
        tier="B",
        status="exact",
        cost="1 forward",
        made=RotaryDimensions,
    ),
)
