"""What an edit comes to in weights, and why some come to nothing there.

z_h <- g * z_h + d          columns of the output projection times g; W_O,h d into a bias
v_g <- g * v_g + d          the same of every head of the group, where the rows of its pattern sum to 1
A_h <- g * A_h              the same as g on z
s_h <- c * s_h              rows that make the head's queries times c
A_h <- uniform, q_h <- 0    the same with c = 0
m   <- m + d                a bias of the module that writes to the stream

What selects positions, steps, rows or spans, runs a second stream or looks at the run has no such form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.heads import Head, SiteId
from headwise.model import edit as edits
from headwise.model import operations as op
from headwise.model.attached import AttachedModel
from headwise.model.capture import Opened
from headwise.model.edit import Edit
from headwise.model.running.affine import affine_map
from headwise.model.running.lowering import why_no_lane
from headwise.model.running.plan import Layer, Placed, Plan
from headwise.model.site import Site
from headwise.model.table import SiteTable
from headwise.use.intervention import Intervention, Together

ON_SCORES = ("q", "k", "score")
STAGES = {"v": 0, "pattern": 1, "z": 2}
"""In which order edits that come to edits of z act in a run."""

LONGEST = 120
"""Characters of an edit's name."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One line of what is to be baked: an edit, or an intervention that is none or makes none.

    Attributes:
        name: the edit in words.
        edit: None where there is nothing to do, or where the reason is known already.
        why_not: why it cannot be baked; empty so far as is known.
        weights: what an intervention puts in the place of parameters, by name.
    """

    name: str
    edit: Edit | None = None
    why_not: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Form:
    """What one edit comes to.

    Attributes:
        sites: where it acts on heads.
        on_z: edits of z that do the same.
        sharper: factor on the scores by site and head; 0 is uniform attention.
        added: constants by `(variable, block label)`, in units of the stream.
    """

    asked: Asked
    variable: str
    sites: tuple[Site, ...] = ()
    on_z: tuple[Edit, ...] = ()
    sharper: Mapping[SiteId, Mapping[int, float]] = field(default_factory=dict)
    added: Mapping[tuple[str, str], Float[Tensor, " d_model"]] = field(default_factory=dict)


class NoForm(Exception):
    """Why an edit has no form in weights."""


def listed(model: AttachedModel, given: Any) -> tuple[Asked, ...]:
    """Edits and interventions, one or several, as lines.

    Raises:
        InputError: something else, or heads that the model does not have.
        Refusal: an intervention that this model cannot serve at all.
    """
    if isinstance(given, Together):
        return tuple(asked for part in given.parts for asked in listed(model, part))
    if isinstance(given, Intervention):
        return _of_intervention(model, given)
    if isinstance(given, Edit):
        return (Asked(_named(given), given),)
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping, Tensor)):
        return tuple(asked for each in given for asked in listed(model, each))
    raise InputError(f"bake() takes edits and interventions, one or a list of them, not a {type(given).__name__}")


def form_of(model: AttachedModel, asked: Asked) -> Form:
    """The form of an edit that is one.

    Raises:
        NoForm: it has none; the message says why.
        InputError: heads or values that cannot be meant for this model.
    """
    edit = asked.edit
    assert edit is not None
    _require_constant(edit)
    try:
        plan = Plan(model.table, [Layer((), (edit,), {}, None, False, Opened())])
    except Refusal as refusal:
        raise NoForm(str(refusal)) from None
    if edit.variable in edits.BLOCK_VARIABLES:
        return _on_blocks(asked, edit, plan, model)
    placed = [one for operations in plan.sites.values() for many in operations.edits.values() for one in many]
    sites = tuple(model.site(each.site.label) for each in placed)
    if edit.variable in ON_SCORES or isinstance(edit.operation, op.Uniform):
        sharper = {each.site: _sharper(each, edit, model.site(each.site.label), model.table) for each in placed}
        return Form(asked, edit.variable, sites, sharper=sharper)
    for site in sites:
        _require_projection(model, site, edit)
    if edit.variable == "z":
        return Form(asked, "z", sites, on_z=(edit,))
    on_z = tuple(
        made
        for each, site in zip(placed, sites, strict=True)
        for made in (_of_values(each, site) if edit.variable == "v" else _of_pattern(each, site))
    )
    return Form(asked, edit.variable, sites, on_z=on_z)


def in_order(forms: Iterable[Form]) -> tuple[Edit, ...]:
    """The edits of z that all forms come to, in the order in which a run makes them."""
    return tuple(each for form in sorted(forms, key=lambda form: STAGES.get(form.variable, 0)) for each in form.on_z)


def overwritten(forms: Iterable[Form]) -> dict[Asked, str]:
    """Edits of a pattern that a later uniform one puts away, with the reason: their trace in z would stay."""
    found: dict[Asked, str] = {}
    before: list[Form] = []
    for form in forms:
        if form.variable != "pattern":
            continue
        if form.sharper:
            reached = {Head(site, head).label for site, heads in form.sharper.items() for head in heads}
            for earlier in before:
                if any(reached & {*each.heads} for each in earlier.on_z):
                    found[earlier.asked] = f"{form.asked.name} comes after it and puts another pattern in place"
        before.append(form)
    return found


# -- what is given -----------------------------------------------------------------------------------------------


def _of_intervention(model: AttachedModel, given: Intervention) -> tuple[Asked, ...]:
    if type(given)._opened is not Intervention._opened or type(given).__call__ is not Intervention.__call__:
        return (Asked(_named(given), why_not="it does more in a run than edits say"),)
    if given.beside(model) is not None:
        return (Asked(_named(given), why_not="a second stream runs beside the first one"),)
    made, weights = given.edits(model), given.weights(model)
    first = (Asked(_named(given), weights=weights),) if weights or not made else ()
    return first + tuple(
        Asked(f"{_named(given)}: {_named(each)}" if len(made) > 1 else _named(given), each) for each in made
    )


def _named(thing: Intervention | Edit) -> str:
    """On one line, and no longer than one can read."""
    words = " ".join(repr(thing).split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 4]} ..."


def _require_constant(edit: Edit) -> None:
    """Raises NoForm for an edit that is not one and the same at all positions of all runs."""
    operation = edit.operation
    if edit.stream != "first" or edit.reads_other:
        raise NoForm("it belongs to a run of two streams")
    if edit.when.timed:
        raise NoForm(f"it acts in some steps of a loop only (scope={edit.scope!r})")
    if edit.scope != "all":
        raise NoForm(f"it acts at some positions only (scope={edit.scope!r})")
    if edit.queries is not None:
        raise NoForm("it acts at some query positions only (queries=)")
    if edit.keys is not None:
        raise NoForm("it acts on some key positions only (keys=)")
    if edit.rows is not None:
        raise NoForm("it acts in some rows of the batch only (rows=)")
    if isinstance(operation, op.Resample):
        raise NoForm("it draws another z at every position")
    values = (*operation.values, edit.strength)
    if not all(isinstance(part, (Real, Tensor)) for value in values for part in _parts(value)):
        raise NoForm("its values change with the run or the position")


def _parts(value: op.Value) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


# -- heads -------------------------------------------------------------------------------------------------------


def _require_projection(model: AttachedModel, site: Site, edit: Edit) -> None:
    if sharing := [other.label for other in model.sites if site.projection in other.takers and other.id != site.id]:
        raise NoForm(f"{site.label}: {', '.join(sharing[:3])} write through the same weights")
    if why := why_no_lane(site, model.table):
        raise NoForm(f"{site.label}: {why}")
    if edit.point == "pre_gate" and site.gated:
        raise NoForm(f"{site.label} has a gate between z and its projection, and point='pre_gate' is before it")


def _affine(placed: Placed, dim: int) -> tuple[Float[Tensor, "head dim"], Float[Tensor, "head dim"]]:
    """Factor and term of an edit, in fp64."""
    if not isinstance(placed.edit.operation, (op.Set, op.Scale, op.Add, op.Mix)):
        raise NoForm(f"no weight holds what edit.{placed.edit.name} does to a pattern")
    return affine_map(placed, torch.zeros(1, 1, len(placed.heads), dim, dtype=torch.float64))


def _sharper(placed: Placed, edit: Edit, site: Site, table: SiteTable) -> dict[int, float]:
    """Factor on the scores, by head."""
    if sharing := [other.label for other in table.sites if other.module == site.module and other.id != site.id]:
        raise NoForm(f"{site.label}: {', '.join(sharing[:3])} are made by the same weights")
    if not site.capabilities["qk"]:
        raise NoForm(f"{site.label}: {site.capabilities['qk'].reason}")
    if isinstance(edit.operation, op.Uniform):
        if edit.strength != 1:
            raise NoForm("a part of uniform attention (strength=) is no softmax of any scores")
        return dict.fromkeys(placed.heads, 0.0)
    factor, term = _affine(placed, 1 if edit.variable == "score" else site.qk_dim)
    if bool((term != 0).any()):
        raise NoForm(f"what is added to or put in place of {edit.variable} is no factor on scores")
    if bool((factor != factor[:, :1]).any()):
        raise NoForm(f"{edit.variable} is scaled by another factor in each dimension")
    share = site.group_size if edit.variable == "k" else 1
    by_index = dict(zip(placed.heads, factor[:, 0].tolist(), strict=True))
    return {index * share + i: value for index, value in by_index.items() for i in range(share)}


def _of_values(placed: Placed, site: Site) -> tuple[Edit, ...]:
    """An edit of v of whole groups, as edits of z of their heads."""
    if site.added:
        raise NoForm(f"{site.label}: something is added to z on its way, so z is not made of v alone")
    factor, term = _affine(placed, site.head_dim)
    if site.gated and bool((term != 0).any()):
        raise NoForm(f"{site.label} has a gate between z and its projection, which changes what is added to v")
    return _on_heads(
        site,
        [group * site.group_size + i for group in placed.heads for i in range(site.group_size)],
        factor.repeat_interleave(site.group_size, 0),
        term.repeat_interleave(site.group_size, 0),
    )


def _of_pattern(placed: Placed, site: Site) -> tuple[Edit, ...]:
    if site.added:
        raise NoForm(f"{site.label}: something is added to z on its way, so z is not made of the pattern alone")
    factor, term = _affine(placed, 1)
    if bool((term != 0).any()):
        raise NoForm("what is added to or put in place of a pattern is no factor on z")
    return _on_heads(site, list(placed.heads), factor, term)


def _on_heads(site: Site, heads: list[int], factor: Tensor, term: Tensor) -> tuple[Edit, ...]:
    labels = [site.heads.heads[head].label for head in heads]
    made = []
    wide = factor.expand(len(heads), site.head_dim)
    if bool((wide != 1).any()):
        made.append(edits.scale(labels, dict(zip(labels, wide, strict=True))))
    if bool((term != 0).any()):
        made.append(edits.add(labels, dict(zip(labels, term.expand_as(wide), strict=True))))
    return tuple(made)


# -- blocks ------------------------------------------------------------------------------------------------------


def _on_blocks(asked: Asked, edit: Edit, plan: Plan, model: AttachedModel) -> Form:
    if not isinstance(edit.operation, op.Add):
        raise NoForm(f"of edits of {edit.variable} only the addition of a constant has a bias to go to")
    width = max(site.d_model for site in model.sites)
    added: dict[tuple[str, str], Tensor] = {}
    for operations in plan.blocks.values():
        for placed in (one for many in operations.edits.values() for one in many):
            _, term = affine_map(placed, torch.zeros(1, 1, 1, width, dtype=torch.float64))
            key = (edit.variable, placed.names[0])
            added[key] = added.get(key, torch.zeros(width, dtype=torch.float64)) + term[0]
    return Form(asked, edit.variable, added=added)


__all__ = ["Asked", "Form", "NoForm", "form_of", "in_order", "listed", "overwritten"]
