"""Which rows of which layers make each head's queries, keys and values; measured, never told by a name.

    q = input_projections(model, model.site("L4")).require("q")
    model.model.get_submodule(q.module).weight[q.rows[2]]       # what makes the queries of L4H2, if not transposed

One forward is run in which the output of every layer with a weight matrix is cut off from what came before. The
gradient of one head's queries then reaches exactly the layers that make them, and in them exactly the rows that are
this head's: so fused projections, rows in an order of their own and shared keys need no knowledge of the model. What a
second forward with these rows' outputs doubled does to the queries says whether a norm stands in between.

Where several layers make the queries together (rotary parts of latent attention, two kinds of tokens), or a row moves
several heads (a norm over all of them), there are no rows of one head, and the reason is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwise.errors import Refusal
from headwise.heads import SiteId
from headwise.model.at_rest import weights_at_rest
from headwise.model.attached import AttachedModel
from headwise.model.attention.watching import of_groups
from headwise.model.finding.recording import listening, matrices, quietly
from headwise.model.finding.ways import signs_like
from headwise.model.site import Site

VARIABLES = ("q", "k", "v")
_WORDS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True, eq=False, slots=True)
class InputProjection:
    """The layer that makes a site's queries, keys or values, and each head's (k, v: each KV group's) rows of it.

    Attributes:
        module: qualified name of the layer in the attached model.
        rows: `[head, dim]` or `[group, dim]`: indices into the layer's output; into its bias, too, and into the rows of
            its weight, or the columns where it is `transposed`. In the order of the head's dimensions where `plain`,
            else ascending.
        transposed: whether the weight is `[in, out]`, as GPT-2's Conv1D has it, and not `[out, in]`.
        plain: what attention is given are these outputs as they are (values, and queries without rotary embedding).
        linear: what attention is given is twice as large where these outputs are: a rotary embedding or a factor may
            stand in between, but no norm, no cap, no bias of another module.
    """

    module: str
    rows: Int[Tensor, "member dim"]
    transposed: bool
    plain: bool
    linear: bool


@dataclass(frozen=True, eq=False, slots=True)
class InputProjections:
    """Where the queries, keys and values of one site come from.

    Attributes:
        site: label of the site.
        q, k, v: the layer and its rows; None where they are not the rows of one layer.
        reasons: by variable, why it is None.
    """

    site: str
    q: InputProjection | None = None
    k: InputProjection | None = None
    v: InputProjection | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def require(self, variable: str) -> InputProjection:
        """The projection of `q`, `k` or `v`.

        Raises:
            Refusal: no rows of one layer are a head's own.
        """
        found: InputProjection | None = getattr(self, variable)
        if found is None:
            raise Refusal(
                f"{self.site}: the {_WORDS[variable]} of a head are no rows of a layer: {self.reasons[variable]}"
            )
        return found


_known: WeakKeyDictionary[AttachedModel, dict[SiteId, InputProjections]] = WeakKeyDictionary()


def input_projections(model: AttachedModel, site: Site) -> InputProjections:
    """Where the queries, keys and values of `site` come from. All sites are measured on the first call, and kept.

    Raises:
        PlanConflict: the model is running, and nothing was measured before.
    """
    if model not in _known:
        with model.unplanned():
            _known[model] = _measured(model)
    return _known[model][site.id]


@dataclass(frozen=True, eq=False, slots=True)
class _Made:
    """What a layer returned in one call: cut off from what made it."""

    module: nn.Module
    leaf: Tensor


_Given = dict[tuple[SiteId, str], Tensor]
"""What attention was given, by site and variable: `[batch, member, position, dim]`."""


def _measured(model: AttachedModel) -> dict[SiteId, InputProjections]:
    root = model.model
    paths = {id(module): path for path, module in root.named_modules()}
    found: dict[tuple[SiteId, str], InputProjection] = {}
    reasons: dict[tuple[SiteId, str], str] = {}
    with model.aside(), quietly(root), weights_at_rest(root), torch.enable_grad():
        made: list[_Made] = []

        def cut(module: nn.Module, output: Tensor) -> Tensor:
            made.append(_Made(module, output.detach().requires_grad_()))
            return made[-1].leaf.clone()  # a leaf may not be changed in place, and some models clip their queries so

        given = _run(model, cut)
        for (site, variable), tensor in given.items():
            answer = _rows(tensor, made, _WORDS[variable], paths)
            if isinstance(answer, str):
                reasons[site, variable] = answer
            else:
                found[site, variable] = answer
        doubled = _run(model, _doubling(made, found, paths))
    for place, each in found.items():
        found[place] = replace(each, linear=torch.equal(doubled[place], 2 * given[place]))
    unseen = "its attention was not seen"
    return {
        site.id: InputProjections(
            site.label,
            q=found.get((site.id, "q")),
            k=found.get((site.id, "k")),
            v=found.get((site.id, "v")),
            reasons={v: reasons.get((site.id, v), unseen) for v in VARIABLES if (site.id, v) not in found},
        )
        for site in model.sites
    }


def _run(model: AttachedModel, change: Callable[[nn.Module, Tensor], Tensor]) -> _Given:
    """One forward with the output of every layer with a matrix changed; what its attention was given."""
    by_module: dict[int, list[Site]] = {}
    for site in model.sites:
        by_module.setdefault(id(model.model.get_submodule(site.module)), []).append(site)
    calls: Counter[int] = Counter()
    given: _Given = {}

    def attend(base: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **o: Any) -> Any:
        sites = by_module.get(id(module), [])
        if sites:
            site = sites[calls[id(module)] % len(sites)]
            calls[id(module)] += 1
            if site.route == "watched":
                base, key, value = of_groups(base, key, value, site.n_kv_heads)
            for variable, tensor in zip(VARIABLES, (query, key, value), strict=True):
                given.setdefault((site.id, variable), tensor)  # of a sequence in pieces, the first piece
        return base(module, query, key, value, *args, **o)

    watched = [model.model.get_submodule(site.module) for site in model.sites if site.route == "watched"]
    with _changing(model.model, change), listening(model.model, attend, watched):
        model.model(**model.example)
    return given


@contextmanager
def _changing(root: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        floats = isinstance(output, Tensor) and output.is_floating_point()
        return change(module, output) if floats else None

    with ExitStack() as undo:
        for module in matrices(root):
            undo.callback(module.register_forward_hook(hook).remove)
        yield


def _rows(given: Tensor, made: Sequence[_Made], words: str, paths: Mapping[int, str]) -> InputProjection | str:
    """The layer and the rows that `given` is made of, or in words why there are none."""
    if not given.shape[-1]:
        return "the model makes its scores in code of its own"
    signs = signs_like(given)
    reached = [each for each, g in zip(made, _gradients(given, signs, made), strict=True) if g is not None and g.any()]
    if not reached:
        return "no layer with a weight matrix of its own makes them"
    if len(reached) > 1:
        names = list(dict.fromkeys(paths[id(each.module)] for each in reached))
        listed = " and ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} others"
        return f"several layers make them together ({listed})"
    layer, path = reached[0], paths[id(reached[0].module)]
    n_members, dim = int(given.shape[1]), int(given.shape[-1])
    moving = torch.stack([_moving(given, _only(signs, member), layer) for member in range(n_members)])
    if int(moving.sum(0).max()) > 1:
        return f"a row of {path} moves the {words} of several heads, as under a norm over all of them"
    if not bool((moving.sum(1) == dim).all()):
        return f"{int(moving[0].sum())} rows of {path} make the {dim} dimensions of a head"
    rows = torch.stack([row.nonzero()[:, 0] for row in moving]).cpu()
    ordered = _in_order(given, layer, rows)
    return InputProjection(
        path,
        rows if ordered is None else ordered,
        transposed=isinstance(layer.module, Conv1D),
        plain=ordered is not None,
        linear=False,
    )


def _gradients(given: Tensor, towards: Tensor, made: Sequence[_Made]) -> Sequence[Tensor | None]:
    if not given.requires_grad:
        return [None] * len(made)
    leaves = [each.leaf for each in made]
    return torch.autograd.grad(given, leaves, towards, retain_graph=True, allow_unused=True)


def _only(signs: Tensor, member: int) -> Tensor:
    alone = torch.zeros_like(signs)
    alone[:, member] = signs[:, member]
    return alone


def _moving(given: Tensor, towards: Tensor, layer: _Made) -> Tensor:
    """`[out]`: which outputs of the layer have a gradient."""
    (gradient,) = _gradients(given, towards, [layer])
    assert gradient is not None
    return (gradient != 0).flatten(0, -2).any(0)


def _in_order(given: Tensor, layer: _Made, rows: Tensor) -> Tensor | None:
    """The rows in the order of the head's dimensions, if attention is given their outputs as they are.

    Every dimension has a code of signs, one bit in a backward; signs come back exact in every dtype or not as they are.
    """
    n_members, dim = rows.shape
    numbers = torch.arange(dim)
    codes = torch.zeros(rows.shape, dtype=torch.long)
    for bit in range(max(1, math.ceil(math.log2(dim)))):
        of_dim = ((numbers >> bit) % 2 * 2 - 1).to(given)
        (gradient,) = _gradients(given, of_dim.expand_as(given), [layer])
        assert gradient is not None
        column = gradient.flatten(0, -2)[:, rows.flatten().to(gradient.device)]
        if not (bool((column == column[0]).all()) and bool((column[0].abs() == 1).all())):
            return None
        codes += ((column[0] > 0).long().reshape(rows.shape) << bit).cpu()
    order = codes.argsort(dim=1)
    same = torch.equal(codes.gather(1, order), numbers.expand(n_members, dim))
    return rows.gather(1, order) if same else None


def _doubling(
    made: Sequence[_Made], found: Mapping[tuple[SiteId, str], InputProjection], paths: Mapping[int, str]
) -> Callable[[nn.Module, Tensor], Tensor]:
    """What every layer returned before, with the outputs that make queries, keys and values twice as large."""
    rows: dict[str, list[Tensor]] = {}
    for each in found.values():
        rows.setdefault(each.module, []).append(each.rows.flatten())
    again = iter(made)

    def double(module: nn.Module, output: Tensor) -> Tensor:
        before = next(again).leaf.detach().clone()
        path = paths[id(module)]
        if path in rows:
            chosen = torch.cat(rows[path]).to(before.device)
            before[..., chosen] *= 2
        return before

    return double


__all__ = ["InputProjection", "InputProjections", "input_projections"]
