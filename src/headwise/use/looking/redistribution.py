"""VAR: heads that look at the picture take what they spend on sinks and spend it on the rest of the picture.

Visual attention redistribution of Kang et al., 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal
Models" (code: seilk/VisAttnSink). Layer by layer, with the sinks of the tokens that enter it (`find/visual_sink.py`),
for every head and query behind the pictures at which the head is image-centric,

    A_j <- p A_j                                     for the sinks j, of pictures and of text
    A_j <- A_j + (1 - p) S A_j / R                   for the other picture tokens j

with S what the row has on all sinks, and R on the picture tokens that are none. Rows keep their sums. p = 0.6, in the
layers from the third on, but for the last; in the prompt the queries behind the last picture, then every token written.

Exact: the formula, p and where it acts. Ours: tau where it is not 20 (`visual_sink`), and the rows left alone. A row
changes nothing if no picture token is a sink there (the paper moves attention from visual sinks, and without one there
is no visual sink to move from), if nothing of it lies on pictures but on sinks, or if it has no picture. Sinks are told
when the prompt runs, in every row of a batch by itself (the released code counts tokens over a batch as one text, and
so serves one prompt at a time); tokens that are written are none. The sink dimensions belong to the model:
`sink_dimensions` finds them. `tau` as there.

An independent table has VAR worse than the plain model on object hallucination in captions (CHAIR 52.5 against 48.6 on
LLaVA-1.5), so it is no cure for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.find.vision_aware import IMAGE, picture_markers
from headwise.find.visual_sink import (
    behind_pictures,
    checked_dimensions,
    checked_tau,
    deep_sites,
    is_image_centric,
    phi,
)
from headwise.heads import HeadSet
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.operations import Here
from headwise.use.intervention import Intervention, finite, named_heads


@dataclass(frozen=True, eq=False, repr=False)
class VAR(Intervention):
    """Take attention from sinks to the rest of the picture: `with VAR(sink_dimensions(model, items))(model): ...`.

    Attributes:
        dims: the sink dimensions of the model.
        p: what a sink's weight is multiplied by; 1 changes nothing.
        tau: above which phi makes a sink; None: 20, or less where the model is narrow.
        rho: most of its mass on pictures that an image-centric head has on their sinks.
        least: mass on pictures that it has.
        heads: the heads that may be changed; None is all of the layers that the paper changes.
    """

    id: ClassVar[str] = "visual-attention-redistribution"
    dims: tuple[int, ...]
    p: float = 0.6
    tau: float | None = None
    rho: float = 0.5
    least: float = 0.2
    heads: HeadSet | None = None

    def __post_init__(self) -> None:
        dims = (self.dims,) if isinstance(self.dims, int) else tuple(self.dims)
        if not dims or any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 0 for dim in dims):
            raise InputError(f"{self.id}: dims={self.dims!r} names no dimensions; take sink_dimensions(model, items)")
        object.__setattr__(self, "dims", dims)
        for name in ("p", "rho", "least"):
            object.__setattr__(self, name, finite(getattr(self, name), f"{self.id}: {name}", 0.0, 1.0))
        if self.tau is not None:
            object.__setattr__(self, "tau", finite(self.tau, f"{self.id}: tau", 0.0))
        if self.heads is not None:
            object.__setattr__(self, "heads", named_heads(self.heads, self.id))

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        picture_markers(model)  # refuses a model that reads no pictures
        dims, tau = checked_dimensions(model, self.dims), checked_tau(model, self.tau)
        heads = self._heads(model)
        if self.p == 1:
            return ()
        seen = _Sinks(dims, tau)
        reads = tuple(
            read.residual([site.label], where="pre", reduce=partial(seen.note, site.label), name=f"var_{number}")
            for number, site in enumerate(heads.sites)
        )
        moved = partial(self._moved, seen)
        behind = edit.rewrite(heads, moved, queries=edit.outside(f"span:{IMAGE}"), scope="prompt")
        return replace(behind, reads=reads), edit.rewrite(heads, moved, scope="decode")

    def _heads(self, model: AttachedModel) -> HeadSet:
        if self.heads is not None:
            return model.heads(self.heads)
        sites = deep_sites(model)[:-1]
        if not sites:
            raise Refusal(
                f"{self.id}: the first two layers and the last are left alone, and {model.name} has no other; name "
                "heads="
            )
        return model.heads([site.label for site in sites])

    def _moved(
        self, seen: _Sinks, pattern: Float[Tensor, "batch head query key"], here: Here
    ) -> Float[Tensor, "batch head query key"]:
        """The rows of one site after VAR."""
        window = here.window
        if window is None or window.joined:
            raise Refusal(
                f"{self.id}: tokens cannot be told at {here.label}, so pictures and sinks cannot; leave it out"
            )
        image, sinks = window.frame.span(IMAGE), seen.at(here)
        queries = window.start + torch.as_tensor(here.queries, device=pattern.device)
        behind = behind_pictures(image).gather(1, queries.expand(len(image), -1).to(image.device))
        keys = (window.keys(each) for each in (image, sinks))
        on_image, on_sinks = (each for each in keys if each is not None)
        changed = redistributed(pattern, on_image, on_sinks, self.p, self.rho, self.least)
        return torch.where(behind[:, None, :, None].to(pattern.device), changed, pattern)


def redistributed(
    pattern: Float[Tensor, "batch head query key"],
    image: Bool[Tensor, "batch key"],
    sinks: Bool[Tensor, "batch key"],
    p: float = 0.6,
    rho: float = 0.5,
    least: float = 0.2,
) -> Float[Tensor, "batch head query key"]:
    """Rows with a share of what lies on sinks given to the other picture tokens, where heads are image-centric."""
    centric = is_image_centric(pattern, image, sinks, rho, least)[..., None]
    to = (image & ~sinks)[:, None, None]
    visual = (image & sinks).any(-1)[:, None, None, None]
    on_sinks = torch.where(sinks[:, None, None], pattern, 0.0)
    rest = torch.where(to, pattern, 0.0)
    left = rest.sum(-1, keepdim=True)
    given = rest * ((1 - p) * on_sinks.sum(-1, keepdim=True) / left.clamp(min=1e-30))
    return torch.where(centric & visual & (left > 0), pattern - (1 - p) * on_sinks + given, pattern)


class _Sinks:
    """The sinks of the latest prompt, by layer."""

    def __init__(self, dims: Sequence[int], tau: float) -> None:
        self._dims, self._tau = dims, tau
        self._streams: dict[str, Tensor] = {}
        self._found: dict[str, Bool[Tensor, "batch column"]] = {}

    def note(self, label: str, stream: Float[Tensor, "batch column d_model"]) -> None:
        """Keep what enters a layer until its attention asks for sinks."""
        self._streams[label] = stream.detach()

    def at(self, here: Here) -> Bool[Tensor, "batch column"]:
        """The sinks among the columns so far.

        Raises:
            InputError: the prompt has no picture.
            Refusal: the prompt was not seen whole, or its rows have changed since.
        """
        assert here.window is not None
        frame, label = here.window.frame, here.label
        if not frame.past and frame.total >= frame.prompt:
            if not bool(frame.span(IMAGE).any()):
                raise InputError(f"{VAR.id}: no token of this prompt is of a picture; give a prompt with a picture")
            if (stream := self._streams.pop(label, None)) is not None:
                massive = phi(stream, self._dims) > self._tau
                self._found[label] = massive & frame.mask & (frame.columns < frame.prompt)
        elif not frame.past or label not in self._found:
            raise Refusal(
                f"{VAR.id}: sinks are found in the prompt, and this run does not show it in one forward; use "
                "generate(), or run the prompt whole"
            )
        found = self._found[label]
        if len(found) != here.batch:
            raise Refusal(
                f"{VAR.id}: sinks were found in {len(found)} rows, and the run goes on with {here.batch}; use a way to "
                "generate that keeps its rows"
            )
        return pad(found, (0, frame.total - found.shape[1]))


INTERVENTIONS = (
    InterventionEntry(
        id=VAR.id,
        title="Move attention of heads from sinks to the rest of the picture",
        page="use/looking.md#var",
        paper="Kang et al., See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        year=2025,
        tier="B",
        status="exact",
        cost="1 forward; rows behind the picture recomputed",
        made=VAR,
    ),
)
