"""z of a site by other ways: rebuilt from rows and values, seen by a plain hook, or as its own product returns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from headwise.heads import SiteId
from headwise.model import edit, read
from headwise.model.finding.recording import ROW_TOLERANCE
from headwise.model.proving.patient import Patient, distance, same, slices_of, wide
from headwise.model.site import Site


class Rebuilding:
    """Follows one site through a forward: its values, then its rows, then z; only the largest difference is kept.

    Rows are patterns; or scores, which then stand for equal attention to whatever they do not hide. With `head` that
    one alone is compared.
    """

    def __init__(self, site: Site, mask: Any, head: int | None = None) -> None:
        self.off, self.calls, self.close, self.most_keys = 0.0, 0, True, 0
        self._site = site
        self._heads = list(range(site.n_heads)) if head is None else [head]
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._values = self._rows = torch.zeros(0)

    def reads(self, rows: Callable[..., read.Read], name: str) -> tuple[read.Read, ...]:
        """What has to be read in the forward to follow, in the order in which it comes by; `rows` or `scores`."""
        label = [self._site.id]
        take = self._take_rows if rows is read.rows else self._take_scores
        return (
            read.v(label, name=f"v{name}", reduce=self._take_values),
            rows(label, name=f"rows{name}", reduce=take),
            read.z(label, point="pre_gate", name=f"z{name}", reduce=self._compare),
        )

    def _take_values(self, v: Tensor) -> None:
        self._values = v

    def _take_rows(self, rows: Tensor) -> None:
        self._rows = rows

    def _take_scores(self, scores: Tensor) -> None:
        visible = (scores != float("-inf")).float()
        n_keys = visible.sum(dim=-1, keepdim=True)
        self.most_keys = max(self.most_keys, int(n_keys.max()))
        self._rows = visible / n_keys.clamp(min=1)

    def _compare(self, z: Tensor) -> None:
        values = wide(self._values).transpose(1, 2).repeat_interleave(self._site.group_size, dim=1)
        if values.shape[2] != self._rows.shape[-1] or len(values) not in (1, len(self._rows)):
            return  # learned queries over a shared sequence
        rows, values, z = self._rows[:, self._heads], values[:, self._heads], wide(z)[:, :, self._heads]
        rebuilt = (rows.to(values.dtype) @ values).transpose(1, 2)
        # A padding query may see nothing; kernels then return what they like. Any other row has mass.
        empty = (rows.sum(-1) == 0).transpose(1, 2)
        padding = torch.zeros_like(empty)
        if self._mask is not None and self._mask.shape == z.shape[:2]:
            padding |= (self._mask == 0)[:, :, None].to(padding.device)
        elif self._mask is not None:  # a tower that adds tokens, or has others: which are padding is not known
            padding |= empty
        zero = torch.zeros((), dtype=rebuilt.dtype, device=rebuilt.device)
        kept = ~empty[..., None]
        off = distance(torch.where(kept, rebuilt, zero), torch.where(kept, z, zero))
        self.off = max(self.off, float("inf") if bool((empty & ~padding).any()) else off)
        self.calls += 1
        self.close = self.off <= ROW_TOLERANCE.get(self._values.dtype, 1e-2)


def z_under(patient: Patient, site: Site, one: edit.Edit | None) -> Tensor:
    """`[row, head, head_dim]` of a site under an edit, by a plain hook on its projection; as read where it has none."""
    with ExitStack() as stack:
        if _seen_behind(site):
            seen = stack.enter_context(patient.seeing_projections([site]))
        else:
            got = stack.enter_context(patient.attached.reading(read.z([site.id], point="pre_gate")))
        if one is not None:
            stack.enter_context(patient.attached.editing(one))
        patient.run()
        return slices_of(seen[site.id][0], site) if _seen_behind(site) else got.z[site.id].flatten(0, 1)


def heads_moved(patient: Patient, site: Site, z: Tensor) -> set[int]:
    """Heads whose z is not the plain run's, bit for bit."""
    if _seen_behind(site):
        plain = slices_of(patient.entering[site.id], site)
    else:
        plain = z_under(patient, site, None)
    return {head for head in range(site.n_heads) if not same(z[:, head], plain[:, head])}


def products(patient: Patient, sites: Sequence[Site]) -> dict[SiteId, Tensor]:
    """What the products of pattern and values of watched sites return: `[row, head, head_dim]`."""
    found: dict[SiteId, Tensor] = {}

    def keep(site: Site, z: Tensor) -> Tensor:
        found[site.id] = torch.cat([found[site.id], z.flatten(0, 1)]) if site.id in found else z.flatten(0, 1)
        return z

    with patient.at_products(sites, keep):
        patient.run()
    return found


def _seen_behind(site: Site) -> bool:
    """Whether z is seen by a hook on its projection; code of a model's own may have added to it by then."""
    return bool(site.takers) and not (site.gated and site.route == "watched")
