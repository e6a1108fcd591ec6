"""Scores of attention heads, kept per item, with where they came from.

A score array has the axes item x site x head, one array per stack; NaN marks a head that a site does not have, or an
item on which a head has no score. Means, errors and ranks leave NaN out and count what is there. Higher means more of
what the method looks for.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors import numpy as tensor_file
from scipy import stats

from headwise.errors import InputError
from headwise.heads import Head, HeadSet, SiteId
from headwise.heatmap import heat_maps
from headwise.whole_file import write_whole

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """Where scores came from: enough to make them again, and to see that two sets of scores are not comparable.

    `settings` must be expressible in JSON and is stored as JSON would give it back. `versions` maps a package to its
    version; packages that are not installed are left out.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    revision: str | None = None
    weights_hash: str | None = None
    probe: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: Provenance.versions_now())

    def __post_init__(self) -> None:
        try:
            settings = json.loads(json.dumps(dict(self.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"settings={self.settings!r} are not JSON ({error}); use plain values") from None
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "versions", dict(self.versions))

    @staticmethod
    def versions_now() -> dict[str, str]:
        """Versions in this process of Python and of the packages that decide a score.

        That of headwise is its own word: run from its source it is not installed, or another version is.
        """
        from headwise import __version__

        versions = {"python": platform.python_version(), "headwise": __version__}
        for package in ("torch", "transformers", "numpy"):
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return versions

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Provenance:
        """Inverse of `to_dict`. Raises InputError for fields that are missing or unknown."""
        expected = [each.name for each in fields(cls)]
        if set(form) != set(expected):
            raise InputError(f"provenance has the fields {sorted(form)}; expected {sorted(expected)}")
        return cls(**form)


@dataclass(frozen=True)
class ScoredHead:
    """A head with its mean score over items and the standard error of that mean (NaN for fewer than two items)."""

    head: Head
    score: float
    standard_error: float


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of two random halves of the items on the order of the heads.

    `correlation` is the mean Spearman correlation over the splits where it is defined (NaN if none is); `undefined`
    counts the others, in which a half ranks all heads alike. `corrected` is the Spearman-Brown estimate for all items,
    2r / (1 + r); it holds for r > 0 only, so r <= 0 is passed on as it is.
    """

    correlation: float
    corrected: float
    splits: int
    undefined: int
    n_heads: int
    n_items: int


@dataclass(frozen=True)
class Comparison:
    """Agreement of two sets of scores on the heads that both have.

    `jaccard` is the overlap of the two top-k sets, |A & B| / |A | B|, and `jaccard_by_chance` its expectation for two
    sets of k drawn at random. `n_items` is the number of joined items; 0 means that no item is in both, so that each
    side was averaged over its own. Correlations are NaN where one side ranks all heads alike.
    """

    spearman: float
    kendall: float
    jaccard: float
    jaccard_by_chance: float
    k: int
    n_heads: int
    n_items: int


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of the heads of one model on some items.

    `values[stack]` is copied and made read-only; `sites[stack]` names its second axis, in ascending order; `item_ids`
    names the first one, the same for all stacks. A head with NaN for every item has no score and is nowhere selected.
    Raises InputError for shapes that do not fit, ids that repeat, and infinite scores.
    """

    values: Mapping[str, Float[np.ndarray, "item site head"]]
    sites: Mapping[str, tuple[SiteId, ...]]
    item_ids: tuple[str, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_ids", tuple(self.item_ids))
        if not self.item_ids or not self.values:
            raise InputError(f"scores need items and stacks; got {len(self.item_ids)} items, {len(self.values)} stacks")
        if any(not isinstance(item, str) for item in self.item_ids):
            raise InputError(f"item_ids={_shortened(self.item_ids)} must be strings")
        _require_unique("item_ids", self.item_ids)
        if set(self.values) != set(self.sites):
            raise InputError(f"values has the stacks {sorted(self.values)}, sites has {sorted(self.sites)}")
        ordered = sorted(self.sites, key=lambda stack: SiteId(stack=stack, layer=0))
        sites = {stack: tuple(self.sites[stack]) for stack in ordered}
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "values", {stack: self._checked(stack, self.values[stack]) for stack in sites})

    @property
    def stacks(self) -> tuple[str, ...]:
        return tuple(self.sites)

    @property
    def heads(self) -> HeadSet:
        """The heads that have a score on at least one item."""
        return HeadSet(
            tuple(head for stack in self.stacks for head in compress(self._heads(stack), self._present(stack)))
        )

    def count(self) -> dict[str, Int[np.ndarray, "site head"]]:
        """Number of items on which each head has a score."""
        return {stack: np.isfinite(scores).sum(axis=0) for stack, scores in self.values.items()}

    def mean(self) -> dict[str, Float[np.ndarray, "site head"]]:
        """Mean score of each head over the items where it has one, in float64; NaN where it has none."""
        return {stack: _mean(scores) for stack, scores in self.values.items()}

    def standard_error(self) -> dict[str, Float[np.ndarray, "site head"]]:
        """Standard error of `mean`: s / sqrt(n), s with n - 1 in the denominator; NaN for fewer than two items."""
        errors = {}
        for stack, n in self.count().items():
            squares = (self.values[stack] - _mean(self.values[stack])) ** 2
            with np.errstate(invalid="ignore", divide="ignore"):
                errors[stack] = np.where(n > 1, np.sqrt(np.nansum(squares, axis=0) / (n - 1) / n), np.nan)
        return errors

    def of(self, head: Head | str) -> Float[np.ndarray, " item"]:
        """Per-item scores of one head. Raises InputError if it has none."""
        head = Head.parse(head)
        sites = self.sites.get(head.stack, ())
        if head.site in sites and head.index < self.values[head.stack].shape[2]:
            scores: Float[np.ndarray, " item"] = self.values[head.stack][:, sites.index(head.site), head.index]
            if np.isfinite(scores).any():
                return scores
        raise InputError(f"{head} has no scores here; the scores are of {self.heads}")

    def ranked(self, stack: str | None = None) -> tuple[ScoredHead, ...]:
        """All heads that have a score (of one stack, or of all), by descending mean; ties in canonical order."""
        means, errors = self.mean(), self.standard_error()
        scored = [
            ScoredHead(head, float(mean), float(error))
            for name in self._chosen(stack)
            for head, mean, error in zip(self._heads(name), means[name].flat, errors[name].flat, strict=True)
            if np.isfinite(mean)
        ]
        return tuple(sorted(scored, key=lambda each: (-each.score, each.head)))

    def top_scores(self, k: int, stack: str | None = None) -> tuple[ScoredHead, ...]:
        """The first k of `ranked`. Raises InputError unless 1 <= k <= the number of heads that have a score."""
        ranked = self.ranked(stack)
        if not 1 <= k <= len(ranked):
            raise InputError(f"k={k} heads cannot be chosen; {len(ranked)} heads have a score, use 1 to {len(ranked)}")
        return ranked[:k]

    def top(self, k: int, stack: str | None = None) -> HeadSet:
        """The k heads with the highest mean, as `top_scores` gives them with their scores."""
        return HeadSet(tuple(each.head for each in self.top_scores(k, stack)))

    def above(self, threshold: float, stack: str | None = None) -> HeadSet:
        """The heads whose mean is greater than the threshold, for instance `scores.quantile(0.95)`."""
        return HeadSet(tuple(each.head for each in self.ranked(stack) if each.score > threshold))

    def below(self, threshold: float, stack: str | None = None) -> HeadSet:
        """The heads whose mean is less than the threshold."""
        return HeadSet(tuple(each.head for each in self.ranked(stack) if each.score < threshold))

    def quantile(self, q: float, stack: str | None = None) -> float:
        """The q-quantile (0 to 1, linear between neighbours) of the means of the heads."""
        means = [each.score for each in self.ranked(stack)]
        if not 0 <= q <= 1 or not means:
            raise InputError(f"q={q} of {len(means)} scored heads is no quantile; use q from 0 to 1 and scored heads")
        return float(np.quantile(means, q))

    def split_half(self, seed: int, splits: int = 100, stack: str | None = None) -> SplitHalf:
        """Split the items into random halves, rank the heads in each, and correlate the ranks.

        Heads without a score in one of the halves are left out of that split. Raises InputError for fewer than two
        items, three heads or one split.
        """
        rows = np.concatenate([self._rows(name) for name in self._chosen(stack)], axis=1)
        rows = rows[:, np.isfinite(rows).any(axis=0)]
        n_items, n_heads = rows.shape
        if n_items < 2 or n_heads < 3 or splits < 1:
            raise InputError(
                f"{n_items} items, {n_heads} scored heads, splits={splits}: split_half needs at least 2, 3 and 1"
            )
        generator = np.random.default_rng(seed)
        orders = (generator.permutation(n_items) for _ in range(splits))
        halves = ((rows[order[: n_items // 2]], rows[order[n_items // 2 :]]) for order in orders)
        correlations = np.array([_correlation(stats.spearmanr, _mean(one), _mean(two)) for one, two in halves])
        defined = correlations[np.isfinite(correlations)]
        r = float(defined.mean()) if defined.size else float("nan")
        corrected = 2 * r / (1 + r) if r > 0 else r
        return SplitHalf(r, corrected, splits, splits - defined.size, n_heads, n_items)

    def compare(self, other: HeadScores, k: int) -> Comparison:
        """Rank correlations and top-k overlap with other scores, on the heads that both have.

        Items are joined by id, and a head's means are taken over the items on which both sides score it. Where the two
        have no item in common, each side is averaged over its own (`n_items` is 0 then). Raises InputError if no head
        is in both, or k is not between 1 and the number of heads that are.
        """
        theirs = set(other.item_ids)
        joined = [item for item in self.item_ids if item in theirs]
        one, two = (scores.select(joined) if joined else scores for scores in (self, other))
        means = []
        for head in (one.heads & two.heads).heads:
            left, right = one.of(head), two.of(head)
            if joined:
                both = np.isfinite(left) & np.isfinite(right)
                left, right = left[both], right[both]
            if left.size:
                means.append((float(_mean(left)), float(_mean(right))))
        n = len(means)
        if not n:
            raise InputError(f"no head is scored in both, {self.heads} and {other.heads}; compare scores of one model")
        if not 1 <= k <= n:
            raise InputError(f"k={k} is out of range; {n} heads are scored in both, use 1 to {n}")
        sides = np.array(means).T
        tops = [set(np.argsort(-side, kind="stable")[:k]) for side in sides]
        overlap = np.arange(k + 1)
        return Comparison(
            spearman=_correlation(stats.spearmanr, *sides),
            kendall=_correlation(stats.kendalltau, *sides),
            jaccard=len(tops[0] & tops[1]) / len(tops[0] | tops[1]),
            jaccard_by_chance=float(stats.hypergeom.pmf(overlap, n, k, k) @ (overlap / (2 * k - overlap))),
            k=k,
            n_heads=n,
            n_items=len(joined),
        )

    def select(self, items: Iterable[str]) -> HeadScores:
        """The same scores on some of the items, in the order given. Raises InputError for an id that is not here."""
        chosen = (items,) if isinstance(items, str) else tuple(items)
        position = {item: i for i, item in enumerate(self.item_ids)}
        if unknown := [item for item in chosen if item not in position]:
            raise InputError(f"items {_shortened(unknown)} are not among the {len(position)} items scored here")
        rows = [position[item] for item in chosen]
        values = {stack: scores[rows] for stack, scores in self.values.items()}
        return HeadScores(values, self.sites, chosen, self.provenance)

    def to_pandas(self) -> pd.DataFrame:
        """Long table with the columns item, stack, layer, call, head, label, score; one row per item and head.

        Items in their order, heads in canonical order. Heads without any score are left out; a head that has no score
        on one item only has NaN there.
        """
        heads = self.heads.heads
        scores = np.concatenate([self._rows(stack)[:, self._present(stack)] for stack in self.stacks], axis=1)
        n = len(self.item_ids)
        return pd.DataFrame(
            {
                "item": np.repeat(np.array(self.item_ids, dtype=object), len(heads)),
                "stack": [head.stack for head in heads] * n,
                "layer": [head.layer for head in heads] * n,
                "call": [head.call for head in heads] * n,
                "head": [head.index for head in heads] * n,
                "label": [head.label for head in heads] * n,
                "score": scores.reshape(-1),
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write `scores.safetensors` (one tensor per stack) and `scores.json` (names of the axes, provenance).

        Each file appears whole or not at all. The JSON comes last and holds the hash of the tensors, so a save that
        was cut off between the two is noticed by `load`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = tensor_file.save({stack: np.ascontiguousarray(scores) for stack, scores in self.values.items()})
        description = {
            "format": "headwise.scores",
            "format_version": FORMAT_VERSION,
            "tensors": {"file": "scores.safetensors", "sha256": hashlib.sha256(tensors).hexdigest()},
            "axes": ["item", "site", "head"],
            "sites": {stack: [site.label for site in sites] for stack, sites in self.sites.items()},
            "item_ids": list(self.item_ids),
            "provenance": self.provenance.to_dict(),
        }
        write_whole(folder / "scores.safetensors", tensors)
        write_whole(folder / "scores.json", (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> HeadScores:
        """Read what `save` wrote, bit for bit. Raises InputError for files that are missing, damaged or newer."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "scores.json").read_bytes())
            tensors = (folder / "scores.safetensors").read_bytes()
        except OSError as error:
            raise InputError(f"{folder} holds no saved scores ({error.strerror}: {error.filename})") from None
        except ValueError as error:
            raise InputError(f"{folder / 'scores.json'} is not JSON ({error}); save the scores again") from None
        if not isinstance(description, dict) or description.get("format") != "headwise.scores":
            raise InputError(f"{folder / 'scores.json'} does not describe headwise scores")
        if description.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{folder} has format_version {description.get('format_version')}, this headwise reads "
                f"{FORMAT_VERSION}; use the headwise that wrote it, or a newer one"
            )
        try:
            if hashlib.sha256(tensors).hexdigest() != description["tensors"]["sha256"]:
                raise InputError(f"{folder}: scores.safetensors is not the file that scores.json names; save again")
            return cls(
                tensor_file.load(tensors),
                {stack: tuple(map(SiteId.parse, labels)) for stack, labels in description["sites"].items()},
                tuple(description["item_ids"]),
                Provenance.from_dict(description["provenance"]),
            )
        except (KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(f"{folder} holds damaged scores ({type(error).__name__}: {error}); save again") from None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{stack} {array.shape[1]} sites x {array.shape[2]}" for stack, array in self.values.items())
        return f"HeadScores({self.provenance.method}: {len(self.item_ids)} items; {shapes})"

    def _repr_html_(self) -> str:
        """Heat maps of the mean, site x head, one per stack on one colour scale: an HTML fragment without scripts."""
        made_by = (self.provenance.method, self.provenance.model, self.provenance.probe)
        caption = " \u00b7 ".join([*(str(each) for each in made_by if each), f"mean over {len(self.item_ids)} items"])
        return heat_maps(caption, self.sites, self.mean(), self.standard_error(), self.count())

    def _checked(self, stack: str, scores: Any) -> Float[np.ndarray, "item site head"]:
        copied = np.array(scores, order="C")
        if copied.dtype.kind not in "fiub":
            raise InputError(f"values[{stack!r}] has the dtype {copied.dtype}; scores are real numbers")
        if copied.dtype not in (np.float16, np.float32, np.float64):
            copied = copied.astype(np.float64)
        sites = self.sites[stack]
        _require_unique(f"sites[{stack!r}]", sites)
        if any(not isinstance(site, SiteId) or site.stack != stack for site in sites) or list(sites) != sorted(sites):
            raise InputError(f"sites[{stack!r}]={_shortened(sites)} must be SiteIds of that stack, in ascending order")
        if copied.ndim != 3 or copied.shape[:2] != (len(self.item_ids), len(sites)) or not copied.size:
            raise InputError(
                f"values[{stack!r}] has the shape {copied.shape}; "
                f"expected (items, sites, heads) = ({len(self.item_ids)}, {len(sites)}, any)"
            )
        if np.isinf(copied).any():
            item, site, index = np.argwhere(np.isinf(copied))[0]
            raise InputError(
                f"the score of {Head(sites[site], index)} on item {self.item_ids[item]!r} is infinite; "
                "scores are finite, NaN where there is none"
            )
        copied.setflags(write=False)
        return copied

    def _chosen(self, stack: str | None) -> tuple[str, ...]:
        if stack is not None and stack not in self.sites:
            raise InputError(f"stack={stack!r} has no scores here; use {' or '.join(map(repr, self.stacks))}")
        return self.stacks if stack is None else (stack,)

    def _heads(self, stack: str) -> list[Head]:
        return [Head(site, index) for site in self.sites[stack] for index in range(self.values[stack].shape[2])]

    def _rows(self, stack: str) -> Float[np.ndarray, "item site*head"]:
        return self.values[stack].reshape(len(self.item_ids), -1)

    def _present(self, stack: str) -> np.ndarray:
        return np.asarray(np.isfinite(self._rows(stack)).any(axis=0))


def _mean(scores: np.ndarray) -> np.ndarray:
    """Over the first axis, NaN left out, in float64."""
    n = np.isfinite(scores).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(scores, axis=0, dtype=np.float64) / n)


def _correlation(measure: Any, one: Float[np.ndarray, " head"], two: Float[np.ndarray, " head"]) -> float:
    both = np.isfinite(one) & np.isfinite(two)
    if not both.any() or np.ptp(one[both]) == 0 or np.ptp(two[both]) == 0:
        return float("nan")
    return float(measure(one[both], two[both]).statistic)


def _require_unique(name: str, entries: tuple[Any, ...]) -> None:
    if len(set(entries)) < len(entries):
        repeated = next(each for i, each in enumerate(entries) if each in entries[:i])
        raise InputError(f"{name} holds {repeated!r} more than once; each may appear once")


def _shortened(entries: Iterable[Any]) -> str:
    listed = list(entries)
    return ", ".join(map(repr, listed[:3])) + (f", ... ({len(listed)})" if len(listed) > 3 else "")
