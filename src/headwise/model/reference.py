"""Reference sets: z of many items, for mean and resample knock-outs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import InputError
from headwise.heads import MAIN, SiteId
from headwise.model import read

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel


@dataclass(frozen=True, eq=False)
class Reference:
    """z at the attended positions of a set of items, pooled: `values[site]` is `[sample, head, head_dim]`.

    Every site is sampled at the same positions, so that drawing one number draws all heads' z of one token.
    """

    values: Mapping[SiteId, Float[Tensor, "sample head head_dim"]]

    def __len__(self) -> int:
        return min((len(values) for values in self.values.values()), default=0)

    def mean(self, site: SiteId) -> Float[Tensor, "head head_dim"]:
        """Mean z of each head of a site, taken in fp32 (fp64 where z is)."""
        values = self._of(site)
        return values.to(torch.promote_types(values.dtype, torch.float32)).mean(dim=0)

    def draw(
        self, site: SiteId, rows: Int[Tensor, " batch"], columns: Int[Tensor, " position"], seed: int
    ) -> Float[Tensor, "batch position head head_dim"]:
        """One sample for every row and column, by a hash of the three numbers."""
        samples = self._of(site)
        salt = crc32(str(seed).encode())  # any integer, however large, negative ones as well
        mixed = (rows[:, None] * 0x9E3779B1 + columns[None, :] * 0x85EBCA77 + salt) & 0x7FFFFFFF
        for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B), (16, 1)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
        return samples[(mixed % len(samples)).to(samples.device)]

    def _of(self, site: SiteId) -> Tensor:
        if site not in self.values:
            raise InputError(f"the reference set holds no z of {site.label}; collect it with heads that include it")
        return self.values[site]

    def __repr__(self) -> str:
        return f"<Reference of {len(self)} positions at {len(self.values)} sites>"


def reference(model: AttachedModel, batches: Iterable[Mapping[str, Any]], heads: Any = "main") -> Reference:
    """Collect z at the attended positions of `batches` (each the keyword inputs of one forward).

    Args:
        heads: which heads' sites to collect, by any name; the main stack unless said otherwise.

    Raises:
        InputError: no batch was given.
    """
    pooled: dict[SiteId, list[Tensor]] = {}
    sites = model.heads(heads).sites
    if isinstance(batches, (Mapping, str)):
        raise InputError("reference() takes several batches, each the inputs of one forward; put this one in a list")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise InputError(f"a batch is a mapping of inputs, such as a tokenizer gives, not a {type(batch).__name__}")
        with torch.no_grad(), model.reading(read.z(heads=tuple(sites))) as got:
            model(**batch)
        for site in sites:
            z = got.z[site]
            mask = batch.get(_mask_name(model, site))
            if isinstance(mask, Tensor) and mask.shape == z.shape[:2]:
                pooled.setdefault(site, []).append(z[mask.bool()])
            else:
                pooled.setdefault(site, []).append(z.flatten(0, 1))
    if not pooled:
        raise InputError("reference() was given no batch; pass the inputs of at least one forward")
    return Reference({site: torch.cat(parts) for site, parts in pooled.items()})


def _mask_name(model: AttachedModel, site: SiteId) -> str:
    """Which argument says what is attended in the sequence that a site's queries come from."""
    decodes = site.stack == MAIN or model.table.site(site).kind == "cross"
    encoder_decoder = getattr(getattr(model.model, "config", None), "is_encoder_decoder", False)
    return "decoder_attention_mask" if decodes and encoder_decoder else "attention_mask"
