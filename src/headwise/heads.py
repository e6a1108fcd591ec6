"""Names: attention sites, heads, KV groups, and immutable sets of them.

    >>> HeadSet.parse("L1H2, encoder.L0H3, 1.5")
    HeadSet(L1H2, L1H5, encoder.L0H3)

Everything is counted from 0. `L` is the index of the block in its stack's list of layers, so a model whose first
attention sits in block 4 starts at L4. The main stack has no prefix. Whether a named head exists is the model's to say,
not this module's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, total_ordering
from itertools import groupby
from operator import index as as_index
from typing import Any, ClassVar, Literal, Self

from headwise.errors import InputError

Kind = Literal["head", "group"]
MAIN = "main"

_STACK = r"[a-z][a-z0-9_-]*"
_PREFIX = rf"(?:(?P<stack>{_STACK})\.)?"
_CALL = r"(?:@(?P<call>[0-9]+))?"
_LAYER = r"(?P<layer>[0-9]+)"
_INDEX = r"(?P<index>[0-9]+)"
_SITE_LABEL = re.compile(rf"{_PREFIX}L{_LAYER}{_CALL}")
_MEMBER_LABELS = (
    re.compile(rf"{_PREFIX}L{_LAYER}(?P<letter>[HG]){_INDEX}{_CALL}"),
    re.compile(rf"{_PREFIX}a{_LAYER}\.(?P<letter>h){_INDEX}{_CALL}"),
    re.compile(rf"{_PREFIX}{_LAYER}\.{_INDEX}{_CALL}"),
)


@total_ordering
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SiteId:
    """One attention module of a model, by place: printed `L4`, `encoder.L2`, `L3@1` (second call of the same module).

    Sorts with the main stack first, then the other stacks by name, then by layer and call. Raises InputError for a
    negative number or a stack name that a label could not carry.
    """

    stack: str = MAIN
    layer: int
    call: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.stack, str) or not re.fullmatch(_STACK, self.stack):
            raise InputError(
                f"stack={self.stack!r} is not a stack name; use a lower-case word such as encoder, vision or cross"
            )
        object.__setattr__(self, "layer", _counted(self.layer, "layer"))
        object.__setattr__(self, "call", _counted(self.call, "call"))

    @classmethod
    def parse(cls, form: SiteId | str | int) -> SiteId:
        """Read `L4`, `main.L4`, `encoder.L2@1`, or a bare layer of the main stack (`4`, `"4"`). Raises InputError."""
        if isinstance(form, SiteId):
            return form
        if isinstance(form, str):
            label = form.strip()
            if found := _SITE_LABEL.fullmatch(label):
                return cls._from_label(found)
            if re.fullmatch("[0-9]+", label):
                return cls(layer=int(label))
        elif _is_integer(form):
            return cls(layer=form)
        raise InputError(f"{form!r} is not a site label; write L4, encoder.L2 or L3@1")

    @classmethod
    def _from_label(cls, found: re.Match[str]) -> SiteId:
        return cls(stack=found["stack"] or MAIN, layer=int(found["layer"]), call=int(found["call"] or 0))

    @property
    def label(self) -> str:
        return f"{_place(self)}{_call_suffix(self)}"

    @property
    def _rank(self) -> tuple[bool, str, int, int]:
        return (self.stack != MAIN, self.stack, self.layer, self.call)

    def __lt__(self, other: SiteId) -> bool:
        return self._rank < other._rank if isinstance(other, SiteId) else NotImplemented

    def __str__(self) -> str:
        return self.label

    __repr__ = __str__


@dataclass(frozen=True, slots=True, order=True, repr=False)
class _SiteMember:
    """What heads and KV groups share: a site, an index in it, a label. Sorts by site, then index."""

    site: SiteId
    index: int

    letter: ClassVar[str]
    kind: ClassVar[Kind]
    noun: ClassVar[str]
    examples: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.site, SiteId):
            raise InputError(f"site={self.site!r} is not a SiteId; use SiteId.parse, or .of(layer, index)")
        object.__setattr__(self, "index", _counted(self.index, f"{self.noun} index"))

    @classmethod
    def of(cls, layer: int, index: int, stack: str = MAIN, call: int = 0) -> Self:
        return cls(SiteId(stack=stack, layer=layer, call=call), index)

    @classmethod
    def parse(cls, form: Any) -> Self:
        """Read one label (`L10H7`, `encoder.L2H0`, `L3H5@1`, `10.7`, `encoder.10.7`, for heads also `a10.h7`) or one
        pair (`(10, 7)`, `("encoder.L2", 0)`, the site in any form `SiteId.parse` reads). Groups are written `L4G2`.

        Raises InputError for anything else, and where a head is asked for and a group is named, or the reverse.
        """
        if isinstance(form, str):
            found = _read_label(form.strip(), cls)
        elif _is_pair(form):
            found = cls(SiteId.parse(form[0]), form[1])
        else:
            found = form if isinstance(form, _SiteMember) else None
        if isinstance(found, cls):
            return found
        if found is not None:
            raise InputError(f"{found.label} names a {found.noun}, a {cls.noun} was expected; write {cls.examples}")
        raise _unreadable(form, cls)

    @property
    def stack(self) -> str:
        return self.site.stack

    @property
    def layer(self) -> int:
        return self.site.layer

    @property
    def call(self) -> int:
        return self.site.call

    @property
    def label(self) -> str:
        return f"{_place(self.site)}{self.letter}{self.index}{_call_suffix(self.site)}"

    def __str__(self) -> str:
        return self.label

    __repr__ = __str__


class Head(_SiteMember):
    """One (query) head of one site, printed `L10H7`, `encoder.L2H0`, `L3H5@1`."""

    __slots__ = ()
    letter = "H"
    kind = "head"
    noun = "head"
    examples = "L1H2, encoder.L1H2 or 1.2"


class KVGroup(_SiteMember):
    """The query heads of one site that share one key/value head, printed `L4G2`, `encoder.L2G0`, `L3G1@1`."""

    __slots__ = ()
    letter = "G"
    kind = "group"
    noun = "KV group"
    examples = "L1G2, encoder.L1G2 or (1, 2)"


HeadLike = Head | KVGroup | str | Mapping[Any, Iterable[int]] | Iterable[Any]
"""Whatever `HeadSet.parse` reads; a HeadSet is an iterable of its members."""


@dataclass(frozen=True, repr=False)
class HeadSet:
    """An immutable set of heads, or of KV groups, never of both; it iterates in canonical order without duplicates.

    Usually made with `HeadSet.parse`. The operators `| & - ^ <= < >= >` and `in` are those of a set; between a set of
    heads and a set of groups they raise InputError (`to_groups` and `to_heads` translate). Sets of different kind are
    unequal, also when both are empty.
    """

    members: tuple[Head | KVGroup, ...] = ()
    kind: Kind = "head"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"kind={self.kind!r} is not a kind of set; use 'head' or 'group'")
        for member in self.members:
            if not isinstance(member, _KINDS[self.kind]):
                raise InputError(
                    f"{member!r} cannot be in a set of {_KINDS[self.kind].noun}s; a HeadSet holds heads or KV groups, "
                    "never both"
                )
        object.__setattr__(self, "members", tuple(sorted(set(self.members), key=_order)))

    @classmethod
    def parse(cls, form: HeadLike, kind: Kind | None = None) -> HeadSet:
        """Read heads or groups from a label, labels in one string (commas or spaces between), a Head, KVGroup or
        HeadSet, a pair `(10, 7)`, a mapping `{10: [7], "encoder.L2": [0, 1]}`, or any iterable of such forms.

        `kind` says what forms without a letter mean (`(10, 7)`, `10.7`, mappings: heads unless "group" is given), and
        what the set must hold. Raises InputError for what cannot be read, and for heads mixed with groups.
        """
        if kind is not None and kind not in _KINDS:
            raise InputError(f"kind={kind!r} is not a kind of set; use 'head' or 'group'")
        members = tuple(_read(form, _KINDS[kind or "head"]))
        named = form.kind if isinstance(form, HeadSet) else members[0].kind if members else None
        return cls(members, kind or named or "head")

    @property
    def heads(self) -> tuple[Head, ...]:
        """The members of a set of heads. Raises InputError for a set of groups."""
        self._require("head", "to_heads")
        return tuple(member for member in self.members if isinstance(member, Head))

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        """The members of a set of groups. Raises InputError for a set of heads."""
        self._require("group", "to_groups")
        return tuple(member for member in self.members if isinstance(member, KVGroup))

    @property
    def sites(self) -> tuple[SiteId, ...]:
        return tuple(site for site, _ in groupby(self.members, key=lambda member: member.site))

    @property
    def stacks(self) -> tuple[str, ...]:
        return tuple(stack for stack, _ in groupby(self.members, key=lambda member: member.stack))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(member.label for member in self.members)

    def at(self, site: SiteId) -> tuple[int, ...]:
        """The indices at one site, ascending; empty where the set has none there."""
        return self._by_site.get(site, ())

    @cached_property
    def _by_site(self) -> dict[SiteId, tuple[int, ...]]:
        """Looked up by every site of a model for every plan, so that comparing all members each time is felt."""
        indices: dict[SiteId, list[int]] = {}
        for member in self.members:
            indices.setdefault(member.site, []).append(member.index)
        return {site: tuple(listed) for site, listed in indices.items()}

    def filter(self, predicate: Callable[[Head | KVGroup], bool]) -> HeadSet:
        return HeadSet(tuple(member for member in self.members if predicate(member)), self.kind)

    def to_groups(self, heads_per_group: Mapping[SiteId, int]) -> HeadSet:
        """The KV groups that any of these heads belongs to. `heads_per_group` is n_heads / n_kv_heads of each site."""
        return HeadSet(tuple(KVGroup(h.site, h.index // _share(heads_per_group, h)) for h in self.heads), "group")

    def complete_groups(self, heads_per_group: Mapping[SiteId, int]) -> HeadSet:
        """The KV groups whose heads are all in this set: those a key or value edit reaches without touching others."""
        touched = self.to_groups(heads_per_group)
        return touched.filter(lambda group: HeadSet((group,), "group").to_heads(heads_per_group) <= self)

    def to_heads(self, heads_per_group: Mapping[SiteId, int]) -> HeadSet:
        """All query heads of these groups. `heads_per_group` is n_heads / n_kv_heads of each site."""
        shares = [(group, _share(heads_per_group, group)) for group in self.groups]
        return HeadSet(tuple(Head(g.site, g.index * share + i) for g, share in shares for i in range(share)))

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `{"kind": "head", "sites": {"L1": [2, 5], "encoder.L0": [3]}}`."""
        return {"kind": self.kind, "sites": {site.label: list(self.at(site)) for site in self.sites}}

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> HeadSet:
        """Inverse of `to_dict`. Raises InputError when the form is another one."""
        if not isinstance(form, Mapping) or set(form) != {"kind", "sites"} or not isinstance(form["sites"], Mapping):
            raise InputError(f'{form!r} is not a stored HeadSet; expected {{"kind": "head", "sites": {{"L1": [2]}}}}')
        return cls.parse(form["sites"], kind=form["kind"])

    def __iter__(self) -> Iterator[Head | KVGroup]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, member: object) -> bool:
        return (_KINDS[self.kind].parse(member) if isinstance(member, str) else member) in self.members

    def __or__(self, other: HeadSet) -> HeadSet:
        return self._combine(other, frozenset.union)

    def __and__(self, other: HeadSet) -> HeadSet:
        return self._combine(other, frozenset.intersection)

    def __sub__(self, other: HeadSet) -> HeadSet:
        return self._combine(other, frozenset.difference)

    def __xor__(self, other: HeadSet) -> HeadSet:
        return self._combine(other, frozenset.symmetric_difference)

    def __le__(self, other: HeadSet) -> bool:
        return not self - other if isinstance(other, HeadSet) else NotImplemented

    def __lt__(self, other: HeadSet) -> bool:
        return self <= other and len(self) < len(other) if isinstance(other, HeadSet) else NotImplemented

    def __repr__(self) -> str:
        shown = list(self.labels)
        if len(shown) > 12:
            shown = [*shown[:10], f"... {len(shown)} {_KINDS[self.kind].noun}s"]
        if not shown and self.kind == "group":
            shown = ["kind='group'"]
        return f"HeadSet({', '.join(shown)})"

    def _combine(self, other: HeadSet, operation: Callable[..., frozenset[Head | KVGroup]]) -> HeadSet:
        if not isinstance(other, HeadSet):
            return NotImplemented
        if self.kind != other.kind:
            raise InputError(
                f"{self} and {other} cannot be combined, one holds heads and the other KV groups; "
                "translate with to_groups or to_heads"
            )
        return HeadSet(tuple(operation(frozenset(self.members), frozenset(other.members))), self.kind)

    def _require(self, kind: Kind, translation: str) -> None:
        if self.kind != kind:
            raise InputError(
                f"{self} holds {_KINDS[self.kind].noun}s where {_KINDS[kind].noun}s are needed; use {translation}"
            )


_KINDS: dict[Kind, type[Head] | type[KVGroup]] = {"head": Head, "group": KVGroup}
_LETTERS: dict[str, type[Head] | type[KVGroup]] = {"H": Head, "h": Head, "G": KVGroup}


def _read(form: Any, unmarked: type[Head] | type[KVGroup]) -> Iterator[Head | KVGroup]:
    if isinstance(form, Head | KVGroup):
        yield form
    elif isinstance(form, str):
        for label in re.split(r"[\s,;]+", form):
            if label:
                member = _read_label(label, unmarked)
                if member is None:
                    raise _unreadable(label, unmarked)
                yield member
    elif isinstance(form, Mapping):
        for site, indices in form.items():
            if isinstance(indices, str) or not isinstance(indices, Iterable):
                raise InputError(f"{{{site!r}: {indices!r}}} lists no {unmarked.noun}s; write {{{site!r}: [0, 1]}}")
            yield from (unmarked(SiteId.parse(site), index) for index in indices)
    elif hasattr(form, "tolist"):  # rows of numpy.argwhere and the like, whose numbers are no Python integers
        yield from _read(form.tolist(), unmarked)
    elif _is_pair(form):
        yield unmarked.parse(form)
    elif isinstance(form, Iterable):
        for each in form:
            yield from _read(each, unmarked)
    else:
        raise _unreadable(form, unmarked)


def _read_label(label: str, unmarked: type[_SiteMember]) -> Any:
    """A Head or KVGroup, as the label's letter says, or `unmarked` where it has none; None if it is no label."""
    for pattern in _MEMBER_LABELS:
        if found := pattern.fullmatch(label):
            member = _LETTERS.get(found.groupdict().get("letter", ""), unmarked)
            return member(SiteId._from_label(found), int(found["index"]))
    return None


def _unreadable(form: object, wanted: type[_SiteMember]) -> InputError:
    return InputError(f"{form!r} is not a {wanted.noun} label; write {wanted.examples}")


def _is_pair(form: Any) -> bool:
    return isinstance(form, tuple | list) and len(form) == 2 and _is_integer(form[1])


def _is_integer(value: object) -> bool:
    try:
        as_index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def _counted(value: Any, name: str) -> int:
    if type(value) is int and value >= 0:
        return value
    if not _is_integer(value):
        raise InputError(f"{name} {value!r} is not a whole number; layers, heads and calls are counted 0, 1, 2, ...")
    number = as_index(value)
    if number < 0:
        raise InputError(f"{name} {number} is negative; layers, heads and calls are counted from 0")
    return number


def _order(member: Head | KVGroup) -> tuple[Any, ...]:
    """As members sort; made once for each, where comparisons would make it anew."""
    return (*member.site._rank, member.index)


def _place(site: SiteId) -> str:
    return f"L{site.layer}" if site.stack == MAIN else f"{site.stack}.L{site.layer}"


def _call_suffix(site: SiteId) -> str:
    return f"@{site.call}" if site.call else ""


def _share(heads_per_group: Mapping[SiteId, int], member: Head | KVGroup) -> int:
    if member.site not in heads_per_group:
        raise InputError(f"{member} sits at {member.site}, for which heads_per_group has no entry; pass every site")
    share = _counted(heads_per_group[member.site], "heads_per_group")
    if share == 0:
        raise InputError(f"heads_per_group of {member.site} is 0; it is n_heads / n_kv_heads, at least 1")
    return share
