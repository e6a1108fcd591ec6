"""Output projections behind a gate: found, with each head's columns, by shifting one head of z at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.model.recording import Seen, entering, listening, matrices
from headwise.model.site import Capability


@dataclass(eq=False)
class SiteSeen:
    """The calls that make up one site: one, or the pieces of a module that splits its sequence."""

    calls: list[Seen]
    ordinal: int
    projection: nn.Module | None = None
    gated: bool = False
    columns: Tensor | None = None
    separable: Capability = field(default_factory=lambda: Capability(True))
    d_model: int = 0
    cache: Capability = field(default_factory=lambda: Capability(False, "not measured"))

    @property
    def module(self) -> nn.Module:
        return self.calls[0].module

    @property
    def chunked(self) -> bool:
        return len(self.calls) > 1


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
        shifted = _inputs_after(model, run, site, turn * call.n_queries)
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
        return
    if bool((changed.sum(dim=1) == call.head_dim).all()):
        site.columns = torch.stack([row.nonzero()[:, 0] for row in changed]).cpu()
        return
    site.projection = None
    site.separable = Capability(False, "the columns of its heads in the projection's input could not be told apart")


def _inputs_after(
    model: nn.Module, run: Callable[[], Any], site: SiteSeen, offset: int | None
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
                if offset is not None:
                    return _shifted(output[0], offset), *output[1:]
        return output

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = entering(args, kwargs)
        if past_it and taken is not None:
            entered.append((module, taken.detach().clone()))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in matrices(model)]
    try:
        with listening(model, attend):
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
