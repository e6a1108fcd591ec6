"""What model something was made on, and whether another one may stand in for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet, KVGroup, SiteId
from headwise.model.attached import AttachedModel
from headwise.model.site import Site
from headwise.scores import HeadScores, Provenance
from headwise.use.intervention import Intervention
from headwise.use.sharing.adapter import Adapter
from headwise.verify.result import Verdict

Member = Head | KVGroup | SiteId


@dataclass(frozen=True)
class Geometry:
    """The sizes of a site, as in `Site`."""

    n_heads: int
    n_kv_heads: int
    qk_dim: int
    head_dim: int
    d_model: int

    @classmethod
    def of(cls, site: Site) -> Geometry:
        return cls(site.n_heads, site.n_kv_heads, site.qk_dim, site.head_dim, site.d_model)

    def __str__(self) -> str:
        groups = "" if self.n_kv_heads == self.n_heads else f" in {self.n_kv_heads} KV groups"
        return f"{self.n_heads} heads of {self.head_dim}{groups}, model width {self.d_model}"


@dataclass(frozen=True)
class MadeOn:
    """A model, as far as a folder remembers it.

    Attributes:
        model: hub id or name. Of a model from a folder only the folder's own name: the rest is nobody's business.
        revision: commit of a hub id.
        weights_hash: see `headwise.model.identity`.
        dtype: of its weights, which the hash is of.
        versions: of headwise and the packages under it.
        sites: geometry of the sites that are named; of all sites where none is.
    """

    model: str
    revision: str | None
    weights_hash: str
    dtype: str
    versions: Mapping[str, str]
    sites: Mapping[str, Geometry]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> MadeOn:
        """The inverse of `to_dict`. Raises InputError, KeyError or TypeError for what it did not make."""
        sites = {label: Geometry(**sizes) for label, sizes in form["sites"].items()}
        made = cls(**{**form, "sites": sites})
        words = (made.model, made.weights_hash, made.dtype, made.revision or "")
        if not all(isinstance(each, str) for each in words) or not isinstance(made.versions, Mapping):
            raise InputError(f"made_on={dict(form)!r} does not say what model something was made on")
        return made

    def require(self, model: AttachedModel, what: str, *, anyway: bool) -> None:
        """That `model` is this one; with `anyway` only that the named sites have these shapes there.

        A model of the same commit in another dtype is the same model.

        Raises:
            Refusal: it is not.
        """
        here = made_on(model)
        for label, sizes in self.sites.items():
            found = here.sites.get(label)
            if found != sizes:
                has = "no such site" if found is None else str(found)
                raise Refusal(
                    f"{what} is of {self} and does not fit {here}: {label} is {sizes} there and {has} here; load the "
                    "model it was made on"
                )
        same_commit = self.revision is not None and (self.model, self.revision) == (here.model, here.revision)
        if self.weights_hash == here.weights_hash or (same_commit and self.dtype != here.dtype) or anyway:
            return
        raise Refusal(
            f"{what} is of another model: it was made on {self}, and this is {here}; load that one, or permit it with "
            "anyway=True (--anyway), and expect its heads to do something else here"
        )

    def __str__(self) -> str:
        revision = f" at {self.revision[:12]}" if self.revision else ""
        return f"{self.model}{revision} (weights {self.weights_hash[:8]}, {self.dtype})"


def made_on(model: AttachedModel, thing: Any = None) -> MadeOn:
    """What there is to remember of a model; `sites` those that `thing` names, all where it names none.

    Raises:
        Refusal: the weights are not in memory.
    """
    found: Provenance = model.provenance("saved")
    wanted = {member if isinstance(member, SiteId) else member.site for member in named_members(thing)}
    sites = {site.label: Geometry.of(site) for site in model.sites if not wanted or site.id in wanted}
    is_path = os.path.isdir(model.name) or model.name.startswith((".", "~", os.sep)) or model.name.count("/") > 1
    return MadeOn(
        model=Path(model.name).name if is_path else model.name,
        revision=model.revision,
        weights_hash=str(found.weights_hash),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=found.versions,
        sites=sites,
    )


def named_members(thing: Any) -> frozenset[Member]:
    """Every head, KV group and site that something names, at any depth of its settings."""
    return frozenset(_members(thing))


def _members(thing: Any) -> Iterator[Member]:
    match thing:
        case Head() | KVGroup() | SiteId():
            yield thing
        case str():
            yield from _labelled(thing)
        case HeadSet():
            yield from thing
        case Intervention():
            yield from _members(thing.settings)
        case Verdict() | Adapter():
            yield from _members(thing.heads)
        case HeadScores():
            yield from (site for sites in thing.sites.values() for site in sites)
        case Mapping():
            for key, value in thing.items():
                yield from _members(key)
                yield from _members(value)
        case tuple() | list():
            for each in thing:
                yield from _members(each)


def _labelled(word: str) -> Iterator[Member]:
    """The head, KV group or site whose label a word is."""
    for kind in (Head, KVGroup, SiteId):
        try:
            found = kind.parse(word)
        except InputError:
            continue
        if found.label == word:
            yield found


__all__ = ["Geometry", "MadeOn", "made_on", "named_members"]
