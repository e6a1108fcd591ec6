"""Output projections behind a gate: found, with each head's columns, by shifting one head of z at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.model.finding.recording import Seen, entering, listening, matrices
from headwise.model.site import Capability


@dataclass(frozen=True, eq=False)
class SpanSeen:
    """One kind of tokens of a site, and the module that takes their z in, if they have one of their own."""

    name: str
    projection: nn.Module | None = None


@dataclass(eq=False)
class SiteSeen:
    """The calls that make up one site: one, or the pieces of a module that splits its sequence."""

    calls: list[Seen]
    ordinal: int
    projection: nn.Module | None = None
    gated: bool = False
    added: bool = False  # something is added to its z on the way to the projection
    columns: Tensor | None = None
    separable: Capability = field(default_factory=lambda: Capability(True))
    d_model: int = 0
    width: int = 0  # of the projection's input, where it is more than the heads
    spans: tuple[SpanSeen, ...] = ()
    key_spans: tuple[str, ...] = ()
    joined_in: nn.Module | None = None
    cache: Capability = field(default_factory=lambda: Capability(False, "not measured"))
    disordered: bool = False  # what it returns for a position is of another one
    unhooked: str = ""  # why a hook on its projection would not see its z, where that is so

    @property
    def module(self) -> nn.Module:
        return self.calls[0].module

    @property
    def chunked(self) -> bool:
        return len(self.calls) > 1

    @property
    def watched(self) -> tuple[nn.Module, ...]:
        """What has to be watched for its calls to be seen."""
        return (self.module,) if self.calls[0].route == "watched" else ()

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What takes its z in: one module, or one for each kind of tokens."""
        named = (self.projection,) if self.projection is not None else tuple(span.projection for span in self.spans)
        return tuple(module for module in named if module is not None)


class _Found(Exception):
    """Ends a forward once what it was for is known."""


def find_by_shifting(model: nn.Module, run: Callable[[], Any], site: SiteSeen) -> None:
    """Shift head `position mod n_heads` of z by a constant: what changes, where, is the projection's input."""
    call = site.calls[0]
    if site.chunked:
        site.separable = Capability(False, "its pieces do not enter one projection in order")
        return
    passes = -(-call.n_heads // max(call.n_queries, 1))
    changed = torch.zeros(0)
    for turn in range(passes):
        plain = _inputs_after(model, run, site, None)
        shifted = _inputs_after(model, run, site, partial(_shifted, offset=turn * call.n_queries))
        met = next(((m, a, b) for (m, a), (_, b) in zip(plain, shifted, strict=False) if _differs(a, b)), None)
        if met is None:
            site.separable = Capability(False, "shifting its z changed the input of no module with a matrix")
            return
        module, before, after = met
        rows = before.reshape(-1, before.shape[-1])
        n_positions = int(call.z.shape[0] * call.z.shape[1])
        if len(rows) != n_positions:
            site.separable = Capability(
                False, f"its output projection takes {len(rows)} rows for {n_positions} positions"
            )
            return
        moved = (after.reshape(rows.shape) - rows).abs() > 0
        heads = (torch.arange(call.n_queries) + turn * call.n_queries).remainder(call.n_heads)
        heads = heads.repeat(call.z.shape[0]).to(moved.device)
        if not len(changed):
            changed = torch.zeros(call.n_heads, rows.shape[-1], dtype=torch.bool, device=moved.device)
        for head in range(call.n_heads):
            changed[head] |= moved[heads == head].any(dim=0)
    widest = int(changed.sum(dim=1).max())
    overlap = int(changed.sum(dim=0).max())
    if widest > call.head_dim or overlap > 1:
        site.disordered = call.route == "watched" and _is_disordered(model, run, site, module)
        site.separable = Capability(
            False, f"a head reaches {widest} columns of the projection's input, and its own are {call.head_dim}"
        )
        return
    site.projection, site.gated = module, True
    plain_layout = torch.arange(call.n_heads * call.head_dim).reshape(call.n_heads, call.head_dim)
    inside = torch.zeros_like(changed)
    if rows.shape[-1] >= plain_layout.numel():
        inside.scatter_(1, plain_layout.to(inside.device), True)
    if rows.shape[-1] == plain_layout.numel() and not bool((changed & ~inside).any()):
        site.added = _is_added_to(model, run, site, module, plain_layout)
        return
    if bool((changed.sum(dim=1) == call.head_dim).all()):
        site.columns = torch.stack([row.nonzero()[:, 0] for row in changed]).cpu()
        site.width = int(rows.shape[-1])
        # Beside something else, or in another order, but as it is: no gate.
        site.gated = not torch.equal(rows[:, site.columns.flatten().to(rows.device)], call.z.reshape(len(rows), -1))
        site.added = site.gated and _is_added_to(model, run, site, module, site.columns)
        return
    site.projection = None
    site.separable = Capability(False, "the columns of its heads in the projection's input could not be told apart")


def _is_added_to(model: nn.Module, run: Callable[[], Any], site: SiteSeen, taker: nn.Module, columns: Tensor) -> bool:
    """Whether anything enters the heads' columns where z is 0: a gate has nothing to let through then."""
    entered = next(x for module, x in _inputs_after(model, run, site, torch.zeros_like) if module is taker)
    return bool(entered[..., columns.flatten().to(entered.device)].any())


def _is_disordered(model: nn.Module, run: Callable[[], Any], site: SiteSeen, taker: nn.Module) -> bool:
    """Whether z of a position leaves that position's own row of what `taker` is given as it was.

    So it is where a module picks the queries that attend, and puts what they found back in their places.
    """
    call = site.calls[0]
    n_rows, n_positions = int(call.z.shape[0]), int(call.z.shape[1])
    for position in {0, n_positions // 2}:

        def at_one(z: Tensor, position: int = position) -> Tensor:
            return z.index_fill(1, torch.tensor([position], device=z.device), float(1.0 + z.abs().max()))

        plain = [x for module, x in _inputs_after(model, run, site, None) if module is taker][:1]
        after = [x for module, x in _inputs_after(model, run, site, at_one) if module is taker][:1]
        for one, other in zip(plain, after, strict=False):
            moved = (one != other).reshape(-1, one.shape[-1]).any(dim=1)
            by_rows, by_positions = moved.reshape(n_rows, n_positions), moved.reshape(n_positions, n_rows)
            if not bool(by_rows[:, position].all()) and not bool(by_positions[position].all()):
                return True
    return False


def _inputs_after(
    model: nn.Module, run: Callable[[], Any], site: SiteSeen, shift: Callable[[Tensor], Tensor] | None
) -> list[tuple[nn.Module, Tensor]]:
    """What enters the modules with a matrix between the site's call and the next attention call."""
    entered: list[tuple[nn.Module, Tensor]] = []
    count, past_it = 0, False

    def attend(base: Callable[..., Any], module: nn.Module, *args: Any, **options: Any) -> Any:
        nonlocal count, past_it
        if past_it:
            raise _Found
        output = base(module, *args, **options)
        if module is site.module:
            count += 1
            if count - 1 == site.ordinal:
                past_it = True
                if shift is not None:
                    return shift(output[0]), *output[1:]
        return output

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = entering(args, kwargs)
        if past_it and taken is not None:
            entered.append((module, taken.detach().clone()))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in matrices(model)]
    try:
        with listening(model, attend, site.watched):
            run()
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return entered


def _shifted(z: Tensor, offset: int) -> Tensor:
    positions = torch.arange(z.shape[1], device=z.device)
    heads = (positions + offset) % z.shape[2]
    shift = torch.zeros_like(z)
    shift[:, positions, heads] = 1.0 + z.abs().max()
    return z + shift


def _differs(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and not torch.equal(before, after)
