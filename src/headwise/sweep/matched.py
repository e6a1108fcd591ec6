"""Control sets: as many heads (or KV groups) in the same layers, drawn from those that are not under test."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod
from typing import Literal

from headwise.errors import InputError
from headwise.heads import Head, HeadSet, KVGroup, SiteId

Member = Head | KVGroup
Match = Literal["layers", "neighbouring layers", "model"]

FEWEST = 20
"""Different sets that a match must have; with fewer the match is widened."""
PATIENCE = 50
"""Draws per wanted set after which nothing new is taken to be left."""


@dataclass(frozen=True, slots=True)
class Controls:
    """Control sets for one set of heads.

    Attributes:
        sets: the sets, all different.
        match: how they are matched: the same number of heads in every layer of the tested set (`layers`), each head
            from its own layer or one beside it (`neighbouring layers`), or from anywhere in the same stack (`model`).
        exhausted: whether there are no other sets of this match.
    """

    sets: tuple[HeadSet, ...]
    match: Match
    exhausted: bool


def matched_sets(heads: HeadSet, available: HeadSet, n: int, seed: int) -> Controls:
    """`n` control sets for `heads` from `available` (less `heads`); the same for the same arguments.

    Where fewer than `n` sets with the same layers exist all of them are taken; where they are fewer than `FEWEST`, the
    match is widened to neighbouring layers, then to the stack.

    Raises:
        InputError: no heads, or `n` is no number of sets.
    """
    if not heads or n < 1:
        raise InputError(f"matched_sets needs heads and a number of sets; got {len(heads)} heads and n={n}")
    free = (available - heads).members
    draw = random.Random(f"controls/{seed}/{','.join(heads.labels)}/{','.join(each.label for each in free)}")
    best = Controls((), "layers", True)
    for match in ("layers", "neighbouring layers", "model"):
        pools = _pools(heads.members, free, match)
        found = _exact(pools, n, draw) if match == "layers" else _tried(pools, n, draw)
        if len(found.sets) > len(best.sets) or not best.sets:
            best = Controls(found.sets, match, found.exhausted)
        if len(best.sets) >= min(n, FEWEST):
            return best
    return best


@dataclass(frozen=True, slots=True)
class _Found:
    sets: tuple[HeadSet, ...]
    exhausted: bool


def _pools(heads: Sequence[Member], free: Sequence[Member], match: Match) -> Mapping[SiteId, tuple[list[Member], int]]:
    """For each site of the tested heads: what may stand in for them, and how many are wanted."""
    sites: dict[SiteId, int] = {}
    for head in heads:
        sites[head.site] = sites.get(head.site, 0) + 1
    return {site: ([each for each in free if _fits(each.site, site, match)], k) for site, k in sites.items()}


def _fits(other: SiteId, site: SiteId, match: Match) -> bool:
    if match == "layers":
        return other == site
    return other.stack == site.stack and (match == "model" or abs(other.layer - site.layer) <= 1)


def _exact(pools: Mapping[SiteId, tuple[list[Member], int]], n: int, draw: random.Random) -> _Found:
    """Sites do not share heads here, so the sets can be counted, and listed where they are few."""
    if prod(comb(len(pool), k) for pool, k in pools.values()) <= n:
        every = product(*(combinations(pool, k) for pool, k in pools.values()))
        return _Found(tuple(_set(head for part in parts for head in part) for parts in every), True)
    return _tried(pools, n, draw)


def _tried(pools: Mapping[SiteId, tuple[list[Member], int]], n: int, draw: random.Random) -> _Found:
    found: dict[HeadSet, None] = {}
    for each in _draws(pools, draw, PATIENCE * n):
        found.setdefault(each)
        if len(found) == n:
            return _Found(tuple(found), False)
    return _Found(tuple(found), True)


def _draws(pools: Mapping[SiteId, tuple[list[Member], int]], draw: random.Random, tries: int) -> Iterator[HeadSet]:
    for _ in range(tries):
        taken: set[Member] = set()
        for pool, k in pools.values():
            left = [head for head in pool if head not in taken]
            if len(left) < k:
                break
            taken.update(draw.sample(left, k))
        else:
            yield _set(taken)


def _set(members: Iterable[Member]) -> HeadSet:
    return HeadSet.parse(tuple(members))
