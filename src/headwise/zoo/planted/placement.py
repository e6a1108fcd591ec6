"""Where planned heads sit: scattered by the seed, each after what it reads from, KV groups shared by heads that can."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from headwise.errors import InputError
from headwise.heads import Head
from headwise.zoo.planted.circuits import HeadPlan

ATTEMPTS = 2000


@dataclass(frozen=True)
class Placed:
    """A plan and its place."""

    plan: HeadPlan
    head: Head


def scatter(plans: Sequence[HeadPlan], *, layers: int, heads: int, group_size: int, seed: int) -> tuple[Placed, ...]:
    """A place for every plan. `group_size` query heads share a KV group; only plans with equal keys and values do so.

    Raises InputError if the model has too few layers for the longest chain, or too few heads.
    """
    before, behind = _chains(plans)
    longest = max(before[plan.name] + behind[plan.name] for plan in plans) + 1
    if layers < longest:
        raise InputError(f"these circuits are {longest} layers deep and the model has {layers}; use layers={longest}")
    random = Random(seed)
    for _ in range(ATTEMPTS):
        placed = _attempt(plans, before, behind, layers, heads // group_size, group_size, random)
        if placed is not None:
            return placed
    raise InputError(
        f"{len(plans)} planted heads do not fit into {layers} layers of {heads} heads in groups of {group_size}; "
        "use more layers or heads, or fewer circuits"
    )


def _chains(plans: Iterable[HeadPlan]) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """By plan: how many layers must come before it, and how many behind."""
    by_name = {plan.name: plan for plan in plans}

    @cache
    def before(name: str) -> int:
        return max((before(each) + 1 for each in by_name[name].after), default=0)

    @cache
    def behind(name: str) -> int:
        return max((behind(plan.name) + 1 for plan in by_name.values() if name in plan.after), default=0)

    return {name: before(name) for name in by_name}, {name: behind(name) for name in by_name}


def _attempt(
    plans: Sequence[HeadPlan],
    before: Mapping[str, int],
    behind: Mapping[str, int],
    layers: int,
    groups: int,
    group_size: int,
    random: Random,
) -> tuple[Placed, ...] | None:
    """One random filling; None where it got stuck."""
    free = {layer: list(range(groups)) for layer in range(layers)}
    for order in free.values():
        random.shuffle(order)
    # KV groups in use: by layer, what their heads share and which of their heads are free.
    opened: dict[int, list[tuple[tuple[object, ...], list[int]]]] = {layer: [] for layer in range(layers)}
    layer_of: dict[str, int] = {}
    placed = []
    # Those with the least room first within a depth, so that they do not find it taken.
    for plan in sorted(plans, key=lambda plan: (before[plan.name], -behind[plan.name], random.random())):
        lowest = max((layer_of[name] + 1 for name in plan.after), default=0)
        highest = 0 if plan.first_layer else layers - 1 - behind[plan.name]
        choices: list[tuple[int, list[int] | None]] = []
        for layer in range(lowest, highest + 1):
            choices += [(layer, slots) for sharing, slots in opened[layer] if sharing == plan.sharing and slots]
            if free[layer]:
                choices.append((layer, None))
        if not choices:
            return None
        sharing_choices = [choice for choice in choices if choice[1] is not None]
        # A place in a group that is open already costs nothing.
        layer, slots = random.choice(sharing_choices or choices)
        if slots is None:
            group = free[layer].pop()
            slots = [group * group_size + member for member in range(group_size)]
            random.shuffle(slots)
            opened[layer].append((plan.sharing, slots))
        layer_of[plan.name] = layer
        placed.append(Placed(plan, Head.of(layer, slots.pop())))
    return tuple(placed)
