"""Image-centric heads: heads that look at the picture, and at more of it than its sinks.

Kang et al., 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (code: seilk/VisAttnSink).
With x_j the residual stream entering a layer at token j, and D the sink dimensions of the model,

    phi(x_j) = max_{d in D} |RMSNorm(x_j)[d]|        RMSNorm without gain, eps 1e-6
    sinks    = the tokens with phi(x_j) > tau        I_v those of pictures, I_t the others

A head h is image-centric at a query i, with A its pattern and V the tokens of pictures, where

    s = sum_{j in V} A_ij >= 0.2        and        sum_{j in I_v} A_ij <= 0.5 s

The score is the share of queries at which it is, over the tokens of the prompt behind its last picture.

Exact: phi, the two conditions, their numbers, tau = 20. Ours: a score of it (the share of queries, in all layers). The
dimensions belong to a model ({1415, 2533} in LLaMA-2-7B, {2100, 4743} in 13B): unless `dims` gives them,
`sink_dimensions` looks for them at the first token of these prompts. |RMSNorm| is at most sqrt(d_model), so a tau of 20
means something in wide models only: unless `tau` is given it is 20, or that share of sqrt(d_model) that 20 is in
LLaMA-2-7B (0.3125) where this is less. In a model without such tokens no token is a sink, and image-centric is a head
that looks at the picture at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.search import over_batches
from headwise.find.vision_aware import prompts_of
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe, places

TAU = 20.0
PAPER_WIDTH = 4096
"""Width of LLaMA-2-7B, on which the paper's tau was chosen."""
EPS = 1e-6
FIRST_LAYER = 2
"""Before this layer no token is massive yet; the paper leaves these layers alone."""


def image_centric(
    model: AttachedModel,
    items: ItemSet,
    *,
    dims: Sequence[int] = (),
    tau: float | None = None,
    rho: float = 0.5,
    least: float = 0.2,
) -> Scored:
    """`image-centric`: the share of queries behind the picture at which a head is image-centric.

    Args:
        dims: the sink dimensions; none: found on these items.
        tau: above which phi makes a sink; None: 20, or less where the model is narrow.
        rho: most of its mass on pictures that a head may have on their sinks.
        least: mass on pictures that it must have.

    Raises:
        InputError: a dimension or number that cannot be meant; a prompt that ends in its picture.
        Refusal: as `sink_dimensions`.
    """
    for name, share in (("rho", rho), ("least", least)):
        if not 0 <= share <= 1:
            raise InputError(f"{name}={share!r} is no share of attention; give a number from 0 to 1")
    chosen = checked_dimensions(model, dims or sink_dimensions(model, items))
    tau = checked_tau(model, tau)
    return over_batches(items, partial(_shares, model, chosen, tau, rho, least), answers=False)


def sink_dimensions(model: AttachedModel, items: ItemSet, *, n: int = 2) -> tuple[int, ...]:
    """The dimensions of the residual stream that are largest at the first token of the prompts, the largest first.

    |RMSNorm(x)| of the first token is averaged over the layers that it enters, but for the first two; the median over
    the prompts counts, so that what is large in a few of them stays behind. Every model has such dimensions. Whether
    tokens are massive in them, `phi` and tau tell.

    Raises:
        InputError: an n that is no number of dimensions.
        Refusal: the model has too few layers, or its prompts are not read as one text that goes on.
    """
    width = d_model(model)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= width:
        raise InputError(f"n={n!r} is no number of dimensions; give a whole number from 1 to {width}")
    labels = [site.label for site in deep_sites(model)]
    found = []
    for batch in items.batches(16, answers=False):
        _require_decoder(model, batch)
        with torch.no_grad(), model.reading(read.residual(labels, where="pre", queries="first", name="stream")) as got:
            observe(model, prompts_of(batch), wants={"logits"})
        found.append(torch.stack([normed(got.stream[label][:, 0]).abs().cpu() for label in labels]).mean(0))
    return tuple(torch.cat(found).median(0).values.topk(n).indices.tolist())


def deep_sites(model: AttachedModel) -> tuple[SiteId, ...]:
    """The self-attention sites of the main stack but those of its first two layers.

    Raises:
        Refusal: nothing is left.
    """
    sites = [site for site in scored_sites(model) if model.table.site(site).kind == "self"]
    deep = tuple(site for site in sites if site.layer >= FIRST_LAYER)
    if not deep:
        raise Refusal(
            f"{model.name} has {len(sites)} layers of attention, and visual sinks are looked for from the third on; "
            "use a deeper model"
        )
    return deep


def normed(x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """RMSNorm without gain, in fp32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def phi(x: Float[Tensor, "*rows d_model"], dims: Sequence[int]) -> Float[Tensor, " *rows"]:
    """How massive tokens are in the sink dimensions."""
    return normed(x)[..., list(dims)].abs().amax(-1)


def is_image_centric(
    pattern: Float[Tensor, "batch head query key"],
    image: Bool[Tensor, "batch key"],
    sinks: Bool[Tensor, "batch key"],
    rho: float,
    least: float,
) -> Bool[Tensor, "batch head query"]:
    """Where heads look at pictures, and at more than their sinks."""
    mass = (pattern * image[:, None, None]).sum(-1)
    on_sinks = (pattern * (image & sinks)[:, None, None]).sum(-1)
    return (mass >= least) & (on_sinks <= rho * mass)


def behind_pictures(image: Bool[Tensor, "batch column"]) -> Bool[Tensor, "batch column"]:
    """The columns behind the last token of a picture; none in a row without one."""
    return image.flip(-1).cumsum(-1).flip(-1).eq(0) & image.any(-1, keepdim=True)


def checked_dimensions(model: AttachedModel, dims: Sequence[int]) -> tuple[int, ...]:
    """Sink dimensions that the model has. Raises InputError for others."""
    width, dims = d_model(model), tuple(dims)
    odd = [dim for dim in dims if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < width]
    if odd or not dims:
        raise InputError(f"dims={dims!r} are no dimensions of a residual stream of {width}; give some from 0 on")
    return dims


def checked_tau(model: AttachedModel, tau: float | None) -> float:
    """The threshold of phi. Raises InputError for one that no token of this width can pass."""
    most = math.sqrt(d_model(model))
    if tau is None:
        return min(TAU, TAU * most / math.sqrt(PAPER_WIDTH))
    if isinstance(tau, bool) or not 0 <= tau < most:
        raise InputError(
            f"tau={tau!r}: |RMSNorm| of {d_model(model)} dimensions lies below {most:.1f}, so give a number from 0 up "
            "to that, or None"
        )
    return float(tau)


def d_model(model: AttachedModel) -> int:
    """Width of the residual stream of the main stack."""
    return model.table.site(scored_sites(model)[0]).d_model


def _require_decoder(model: AttachedModel, batch: Batch) -> None:
    if places(model, batch).prompt_length is None:
        raise Refusal(
            f"{model.name} does not read prompt and answer as one text, so there are no queries behind a picture; use "
            "a model that continues text"
        )


def _shares(model: AttachedModel, dims: Sequence[int], tau: float, rho: float, least: float, batch: Batch) -> Scored:
    _require_decoder(model, batch)
    image = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, columns in enumerate(batch.spans["image"]):
        image[row, columns] = True
    counted = behind_pictures(image) & batch.attention_mask.bool()
    if not bool(counted.any(-1).all()):
        raise InputError("a prompt ends in its picture, and queries behind it are what is counted; ask something there")
    start = int(counted.any(0).nonzero()[0])
    sites = [site for site in scored_sites(model) if model.table.site(site).kind == "self"]
    sinks: dict[str, Tensor] = {}
    found: dict[SiteId, Tensor] = {}

    def note(label: str, stream: Float[Tensor, "item column d_model"]) -> None:
        sinks[label] = (phi(stream, dims) > tau).cpu()

    def judge(site: SiteId, rows: Float[Tensor, "item head query key"]) -> None:
        centric = is_image_centric(rows.cpu(), image, sinks[site.label], rho, least)
        behind = counted[:, None, start:]
        found[site] = (centric & behind).sum(-1).double() / behind.sum(-1)

    reads = [
        each
        for site in sites
        for each in (
            read.residual([site.label], where="pre", reduce=partial(note, site.label), name=f"stream_{site.layer}"),
            read.rows(
                [site.label],
                queries=slice(start, image.shape[1]),
                reduce=partial(judge, site),
                name=f"rows_{site.layer}",
            ),
        )
    ]
    with torch.no_grad(), model.reading(*reads):
        observe(model, prompts_of(batch), wants={"logits"})
    return found


METHODS = (
    Method(
        id="image-centric",
        title="attention to the picture that is not on its sinks",
        page="methods/image-centric.md",
        paper="Kang et al., See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        year=2025,
        tier="B",
        status="exact",
        needs=("rows", "span:image"),
        cost="1 forward, and one to find the dimensions",
        probe="existence",
        score=image_centric,
    ),
)
