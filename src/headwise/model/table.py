"""The sites and blocks of a model as one table: look-ups, and the many ways to name heads resolved against it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from headwise.errors import InputError
from headwise.heads import MAIN, Head, HeadSet, KVGroup, SiteId
from headwise.model.finding.sublayers import Block, Sublayers
from headwise.model.site import Site, Unserved

Want = Literal["head", "group"]


@dataclass(frozen=True)
class SiteTable:
    """All that was found of a model: its sites in order of their labels, its blocks, its final norms.

    `unserved` names the modules that seem to attend and could not be reached, with the reasons. `met_spans` are the
    spans that a run finds in its own tokens, such as those of pictures.
    Blocks and norms take a recorded forward to find, so they are looked for when they are first asked for.
    """

    sites: tuple[Site, ...]
    find_sublayers: Callable[[], Sublayers]
    unserved: tuple[Unserved, ...] = ()
    met_spans: frozenset[str] = frozenset()

    @cached_property
    def sublayers(self) -> Sublayers:
        return self.find_sublayers()

    @property
    def stacks(self) -> tuple[str, ...]:
        """Stacks with a site, the main one first."""
        return tuple(dict.fromkeys(site.id.stack for site in self.sites))

    @property
    def group_sizes(self) -> dict[SiteId, int]:
        return {site.id: site.group_size for site in self.sites}

    def site(self, label: str | SiteId) -> Site:
        """The site of a label such as `L4` or `encoder.L2`.

        Raises:
            InputError: the model has no such site; the nearest labels are named.
        """
        wanted = SiteId.parse(label)
        for site in self.sites:
            if site.id == wanted:
                return site
        raise self._no_site(wanted)

    def block(self, label: str | SiteId) -> Block:
        """The block (element of a list of layers) of a label such as `L4`."""
        wanted = SiteId.parse(label).label
        if wanted in self.sublayers.blocks:
            return self.sublayers.blocks[wanted]
        known = ", ".join(_abbreviated(list(self.sublayers.blocks)))
        raise InputError(f"this model has no block {wanted}; it has {known or 'none'}")

    def select(self, heads: Any, want: Want = "head") -> HeadSet:
        """A HeadSet of heads or of KV groups from whatever names them, checked against the model.

        Reads all that `HeadSet.parse` reads, and site labels (`L4`: all its heads) and stack names (`encoder`).
        Groups stand for all their query heads where heads are wanted; heads stand for their group only where every
        group has one head.

        Raises:
            InputError: a head, group or site that the model does not have; heads where groups are meant.
        """
        if heads is None:
            found = [site.heads if want == "head" else site.groups for site in self.sites]
            return HeadSet(tuple(member for members in found for member in members), want)
        chosen = HeadSet.parse(tuple(self._spelled_out(heads, want)), kind=None)
        if not chosen:
            raise InputError("no heads were given: the set is empty")
        site_of = cache(self.site)  # of a model with many heads, each would look through all sites
        for member in chosen:
            site = site_of(member.site)
            limit = site.n_heads if isinstance(member, Head) else site.n_kv_heads
            if member.index >= limit:
                what = "heads" if isinstance(member, Head) else "KV groups"
                raise InputError(f"there is no {member.label}: {site.label} has {limit} {what}, counted from 0")
        if chosen.kind == want:
            return chosen
        if want == "head":
            return chosen.to_heads(self.group_sizes)
        grouped = [site.label for site in map(self.site, chosen.sites) if site.group_size > 1]
        if grouped:
            suggestion = ", ".join(chosen.to_groups(self.group_sizes).labels[:4])
            raise InputError(
                f"{grouped[0]} shares keys and values between query heads: name KV groups here, "
                f"for example {suggestion}, not heads"
            )
        return chosen.to_groups(self.group_sizes)

    def names_in_order(self, heads: Any, want: Want = "head") -> bool:
        """Whether a form names its heads in the order of the HeadSet it stands for."""
        if heads is None or isinstance(heads, HeadSet):
            return True
        given = tuple(self._spelled_out(heads, want))
        return list(given) == sorted(set(given))

    def blocks(self, labels: Any) -> tuple[Block, ...]:
        """Blocks by label; None is all of them."""
        if labels is None:
            return tuple(self.sublayers.blocks.values())
        forms = re.split(r"[,\s]+", labels.strip()) if isinstance(labels, str) else labels
        if not isinstance(forms, Iterable):
            forms = [forms]
        named = {block.label: block for block in map(self.block, forms)}
        if not named:
            raise InputError("no blocks were given: the list is empty")
        return tuple(named.values())

    def _spelled_out(self, heads: Any, want: Want) -> Iterable[Any]:
        """The forms in `heads`, with site labels and stack names replaced by their members."""
        if isinstance(heads, str):
            heads = [form for form in re.split(r"[,\s]+", heads.strip()) if form]
        elif isinstance(heads, (Head, KVGroup, SiteId)) or _is_pair(heads):
            heads = [heads]
        if isinstance(heads, (HeadSet, Mapping)):
            yield from HeadSet.parse(heads, kind=None if isinstance(heads, HeadSet) else want)
            return
        if not isinstance(heads, Iterable):
            raise InputError(f"{heads!r} does not name heads; write 'L4H0', 'L4H0,L5H2', 'L4' or {{4: [0]}}")
        for form in heads:
            if isinstance(form, str) and form in self.stacks:
                sites: Sequence[Site] = [site for site in self.sites if site.id.stack == form]
            elif isinstance(form, SiteId) or (isinstance(form, str) and re.fullmatch(r"(\w+\.)?L\d+(@\d+)?", form)):
                sites = [self.site(form)]
            elif isinstance(form, str) and re.fullmatch(r"[a-z_]+", form):
                raise InputError(f"{form!r} names no heads: {self._no_stack(form)}")
            else:
                yield from HeadSet.parse(form)
                continue
            for site in sites:
                yield from site.heads if want == "head" else site.groups

    def _no_stack(self, stack: str) -> str:
        why = "a tower that did not run in the probe forward has no sites: pass example= inputs that reach it"
        if self.unserved:
            why += f"; {self.unserved[0].module} attends out of reach: {self.unserved[0].reason}"
        return f"this model has no stack {stack!r} (it has {', '.join(self.stacks)}); {why}"

    def _no_site(self, wanted: SiteId) -> InputError:
        labels = [site.label for site in self.sites]
        if wanted.stack != MAIN and wanted.stack not in self.stacks:
            return InputError(f"{wanted.label}: {self._no_stack(wanted.stack)}")
        near = difflib.get_close_matches(wanted.label, labels, n=3) or labels[:3]
        here = [site for site in self.sites if site.id.stack == wanted.stack]
        return InputError(
            f"there is no attention at {wanted.label}: the stack has {len(here)} sites, "
            f"{here[0].label} to {here[-1].label} (nearest: {', '.join(near)})"
        )


def _is_pair(form: Any) -> bool:
    return isinstance(form, tuple) and len(form) == 2 and all(isinstance(part, int) for part in form)


def _abbreviated(labels: list[str]) -> list[str]:
    return labels if len(labels) <= 6 else [*labels[:3], "...", labels[-1]]
