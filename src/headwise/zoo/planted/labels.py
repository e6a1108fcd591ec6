"""The truth of a model from its plans and places: who writes, who feeds a writer, who hides whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from headwise.zoo.planted.circuits import BEHAVIOURS, Behaviour, HeadPlan
from headwise.zoo.planted.placement import Placed
from headwise.zoo.planted.truth import Effect, HeadTruth, Truth


def label(
    kind: Literal["planted", "null", "random"],
    model: str,
    placed: Sequence[Placed],
    strengths: Mapping[str, float],
    full_effect: float,
    background: float,
) -> Truth:
    """`full_effect` is what a head of share 1 and strength 1 writes, in logits; `background` what random heads do."""
    plans = [each.plan for each in placed]
    labels = {each.plan.name: each.head.label for each in placed}
    groups = _backups(plans, strengths)
    hidden = {name for group in groups for name in group}
    effects = []
    for plan in plans:
        for behaviour in BEHAVIOURS:
            size = plan.direct.get(behaviour, 0.0) * _strength(plan, strengths) * full_effect
            total = _reaches(plan, behaviour, plans, strengths) and plan.name not in hidden
            if size or total:
                effects.append(Effect(labels[plan.name], behaviour, bool(size), total, size or None))
    return Truth(
        kind=kind,
        model=model,
        heads_known=tuple(_known(plan, labels[plan.name], strengths) for plan in plans),
        effects=tuple(effects),
        backups=tuple(tuple(labels[name] for name in group) for group in groups),
        near_ties=tuple(tuple(labels[name] for name in group) for group in _near_ties(plans, strengths)),
        background=background,
    )


def _strength(plan: HeadPlan, strengths: Mapping[str, float]) -> float:
    return strengths[plan.dial] if plan.dial else 1.0


def _known(plan: HeadPlan, head: str, strengths: Mapping[str, float]) -> HeadTruth:
    if _strength(plan, strengths) == 0:
        return HeadTruth(head, plan.name, ("decoy",), plan.roles[0])
    return HeadTruth(head, plan.name, plan.roles, plan.decoy_of)


def _reaches(plan: HeadPlan, behaviour: Behaviour, plans: Sequence[HeadPlan], strengths: Mapping[str, float]) -> bool:
    """Whether the plan, or one that reads what it writes, and so on, brings the answer of a behaviour about."""
    own = plan.direct.get(behaviour, 0.0) or plan.relayed.get(behaviour, 0.0)
    if own and _strength(plan, strengths):
        return True
    return any(_reaches(later, behaviour, plans, strengths) for later in plans if plan.name in later.after)


def _backups(plans: Sequence[HeadPlan], strengths: Mapping[str, float]) -> list[tuple[str, ...]]:
    return [
        (plan.backs_up, plan.name)
        for plan in plans
        if plan.backs_up and plan.decoy_of is None and _strength(plan, strengths)
    ]


def _near_ties(plans: Sequence[HeadPlan], strengths: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Heads of one role that write shares of one effect."""
    shared: dict[str, list[str]] = {}
    for plan in plans:
        shares = [abs(share) for share in (*plan.direct.values(), *plan.relayed.values())]
        if shares and max(shares) < 1 and _strength(plan, strengths):
            shared.setdefault(plan.roles[0], []).append(plan.name)
    return [tuple(names) for names in shared.values() if len(names) > 1]
