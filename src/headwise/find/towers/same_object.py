"""IsSameObject: whether two patches belong to one object, read off a tower's stream, and the heads that go by it.

After Li et al. (2025), "Does Object Binding Naturally Emerge in Large Pretrained Vision Transformers?". For the stream
x, y of two patches, with C numbers each, a probe gives a logit:

    linear        w(x) + w(y) + b
    diagonal      w . (x * y) + b
    quadratic     x^T W y / sqrt(C) + b,   W = (V + V^T) / 2

trained by binary cross entropy on all pairs of `patches` patches of a picture (Adam, learning rate 1e-3, 256 pictures a
step, 8 epochs). A linear probe cannot say "same", since whether y fits depends on x; where the quadratic one can,
objects are bound. Patches of no object (0 in a mask) are in no pair. Half of the pictures are held out, and `accuracy`
and `majority`, the share of the more frequent answer, are of those.

The score of a head is Pearson's correlation of A_ij with the probe's logit, over the pairs of different patches of a
picture: a "binding head" looks where the probe sees the same object.

The probes are those of the paper's code; the pairs of a patch with itself are left out here, their answer is known. Its
learning rate falls behind the eighth epoch, so here it does not. That heads are scored one by one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from headwise.errors import InputError, Refusal
from headwise.find.method import LibraryMethod
from headwise.find.towers.correlation import pearson
from headwise.find.towers.tower import (
    BATCH,
    Given,
    Grid,
    Inputs,
    Rows,
    grid_of,
    on_device,
    over_rows,
    scores_of,
    shape_of,
    sites_of,
)
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.scores import HeadScores

Form = Literal["linear", "diagonal", "quadratic"]
PATCHES = 64
EPOCHS = 8
LEARNING_RATE = 1e-3
TOGETHER = 256
"""Pictures of one step."""


@dataclass(frozen=True, eq=False)
class SameObject:
    """A trained probe.

    Attributes:
        form: how it compares two patches.
        weight: `[C]` for the linear and diagonal form, the symmetric `[C, C]` for the quadratic one.
        bias: one number.
        accuracy, majority: on pairs of held-out pictures: how often it is right, and how often the more frequent
            answer is.
    """

    form: Form
    weight: Tensor
    bias: Tensor
    accuracy: float
    majority: float

    def __call__(self, stream: Float[Tensor, "*item patch width"]) -> Float[Tensor, "*item patch patch"]:
        """The logit of "same object" for every pair of patches."""
        return _logits(self.form, self.weight.to(stream), self.bias.to(stream), stream)


def fit_same_object(
    stream: Float[Tensor, "item patch width"],
    objects: Int[Tensor, "item patch"],
    *,
    form: Form = "quadratic",
    patches: int = PATCHES,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> SameObject:
    """Train a probe on every second picture, and judge it on the others.

    Args:
        stream: of every patch, such as `patch_stream` gives it.
        objects: number of the object that each patch is of, 0 for none.
        patches: how many are drawn of every picture in every step, without those of no object.

    Raises:
        InputError: shapes that do not fit, fewer than two pictures, settings that cannot be meant.
        Refusal: the held-out pictures have no pairs of different patches on objects.
    """
    if form not in get_args(Form):
        raise InputError(f"form={form!r} is none; choose one of {', '.join(get_args(Form))}")
    if stream.dim() != 3 or objects.shape != stream.shape[:2] or objects.is_floating_point() or len(stream) < 2:
        raise InputError(
            f"a stream of shape {list(stream.shape)} and objects of {list(objects.shape)} do not fit; give [item, "
            "patch, width], and whole numbers [item, patch], of 2 pictures or more"
        )
    if patches < 2 or epochs < 1 or learning_rate <= 0:
        raise InputError(
            f"patches={patches}, epochs={epochs}, learning_rate={learning_rate}: give at least 2 patches, 1 epoch and "
            "a rate above 0"
        )
    stream, objects = stream.detach().float().cpu(), objects.cpu()
    generator = torch.Generator().manual_seed(seed)
    width = stream.shape[-1]
    shape = (width, width) if form == "quadratic" else (width,)
    weight = torch.zeros(shape).normal_(std=width**-0.5, generator=generator).requires_grad_()
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    for seen, which in _steps(stream[::2], objects[::2], patches, epochs, generator):
        same, counted = pairs_of(which)
        if not bool(counted.any()):
            continue
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = binary_cross_entropy_with_logits(_logits(form, weight, bias, seen)[counted], same[counted].float())
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    weight, bias = weight.detach(), bias.detach()
    # As one symmetric matrix: what the form uses of it.
    weight = (weight + weight.T) / 2 if form == "quadratic" else weight
    same, counted = pairs_of(objects[1::2])
    if not bool(counted.any()):
        raise Refusal("no held-out picture has two patches on objects, so nothing can be said of pairs; give more")
    right = (_logits(form, weight, bias, stream[1::2]) > 0)[counted] == same[counted]
    share = float(same[counted].double().mean())
    return SameObject(form, weight, bias, float(right.double().mean()), max(share, 1 - share))


def patch_stream(
    model: AttachedModel,
    pictures: Given,
    block: str,
    *,
    grid: tuple[int, int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    batch: int = BATCH,
) -> Float[Tensor, "item patch width"]:
    """The residual stream of every patch behind a block, such as `vision.L1`, in fp32 on the CPU.

    Raises:
        InputError: no such block; and as `spatial_profile`.
        Refusal: the block has no residual stream, or the tower packs its pictures.
    """
    inputs = Inputs.of(model, pictures, beside)
    site = model.site(block)
    kept = []
    for items in inputs.batches(batch):
        given = inputs.rows(items)
        with torch.no_grad(), model.reading(read.residual(block)) as got:
            model(**on_device(model, given))
        stream = got.residual_post[block]
        if len(stream) != items.stop - items.start:
            raise Refusal(f"the tower of {model.name} packs its pictures, so their patches are not told apart")
        place = grid_of(grid or shape_of(model, site, given, stream.shape[1]), stream.shape[1])
        kept.append(stream[:, place.before :].float().cpu())
    return torch.cat(kept)


def binding_heads(
    model: AttachedModel,
    pictures: Given,
    probe: SameObject,
    block: str,
    *,
    grid: tuple[int, int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    batch: int = BATCH,
) -> HeadScores:
    """Pearson's correlation of every head's pattern with the probe's logits, picture by picture: -1 to 1.

    A head whose pattern is the same for all pairs of a picture has no score on it. Every head of the tower is compared
    with one and the same probe; its own block and those around it are what the paper looks at.

    Args:
        probe: trained on the stream behind `block`, on other pictures than these.
        pictures, grid, beside: as in `spatial_profile`.

    Raises:
        InputError: a probe of another width than the block; and as `spatial_profile`.
        Refusal: as `spatial_profile` and `patch_stream`.
    """
    inputs = Inputs.of(model, pictures, beside)
    stream = patch_stream(model, pictures, block, grid=grid, beside=beside, batch=batch)
    if stream.shape[-1] != probe.weight.shape[0]:
        raise InputError(
            f"the probe takes {probe.weight.shape[0]} numbers of a patch, {block} has {stream.shape[-1]}; fit it there"
        )
    sites = sites_of(model, model.site(block).id.stack)
    logits = probe(stream)
    apart = ~torch.eye(stream.shape[1], dtype=torch.bool)

    def agreement(rows: Rows, on: Grid, items: slice) -> Mapping[str, Tensor]:
        pairs = on.within(rows).cpu()[..., apart]
        return {"agreement": pearson(pairs, logits[items][:, None, apart])}

    found = over_rows(model, inputs, sites, agreement, shape=grid, batch=batch)
    about = model.provenance("same-object", {"block": block, "form": probe.form})
    return scores_of(inputs.ids, found.of("agreement"), about)


@dataclass(frozen=True, eq=False)
class ObjectScenes:
    """Pictures of rectangles and what they show.

    Attributes:
        pixel_values: `[item, 3, row, column]`, about -1 to 1.
        objects: number of the object that each patch is of, 0 for the ground: `[item, patch]`, row by row.
    """

    pixel_values: Float[Tensor, "item 3 row column"]
    objects: Int[Tensor, "item patch"]


def object_scenes(
    n: int, *, cells: tuple[int, int] = (6, 6), patch: int = 4, objects: int = 3, colors: int = 2, seed: int = 0
) -> ObjectScenes:
    """Pictures with masks, without a data set: rectangles of whole patches that do not touch, on a gray ground.

    Fewer colours than objects make some objects alike, so that colour alone does not tell them apart.

    Args:
        n: how many pictures.
        cells: rows and columns of patches.
        patch: its side in pixels.
        objects: most rectangles of a picture; those that find no room are left out.
        colors: how many different ones a picture has.

    Raises `InputError` for numbers below 1.
    """
    rows, columns = cells
    if min(n, rows, columns, patch, objects, colors) < 1:
        raise InputError(f"n={n}, cells={cells}, patch={patch}, objects={objects}, colors={colors}: give 1 or more")
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    masks = torch.zeros(n, rows, columns, dtype=torch.long)
    pixels = torch.zeros(n, 3, rows, columns)
    for picture in range(n):
        palette = torch.rand(colors, 3, generator=generator) * 2 - 1
        for number in range(1, objects + 1):
            height, width = drawn(1, max(1, rows // 2)), drawn(1, max(1, columns // 2))
            top, left = drawn(0, rows - height), drawn(0, columns - width)
            around = masks[picture, max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1]
            if not bool(around.any()):
                masks[picture, top : top + height, left : left + width] = number
                color = palette[drawn(0, colors - 1)]
                pixels[picture, :, top : top + height, left : left + width] = color[:, None, None]
    large = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    noise = torch.randn(large.shape, generator=generator)
    return ObjectScenes(large + 0.05 * noise, masks.flatten(1))


def pairs_of(objects: Int[Tensor, "item patch"]) -> tuple[Bool[Tensor, "item p p"], Bool[Tensor, "item p p"]]:
    """Which pairs are of one object, and which count: two different patches, both on objects."""
    there = objects > 0
    apart = ~torch.eye(objects.shape[1], dtype=torch.bool)
    return objects[:, :, None] == objects[:, None, :], there[:, :, None] & there[:, None, :] & apart


def _steps(
    stream: Tensor, objects: Tensor, patches: int, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Float[Tensor, "item patch width"], Int[Tensor, "item patch"]]]:
    for _ in range(epochs):
        order = torch.randperm(len(stream), generator=generator)
        for first in range(0, len(order), TOGETHER):
            chosen = order[first : first + TOGETHER]
            # Patches on objects first, in an order of chance; what is left over of a picture counts in no pair.
            chance = torch.rand(objects[chosen].shape, generator=generator) + (objects[chosen] == 0)
            drawn = chance.argsort(dim=1)[:, :patches]
            yield stream[chosen[:, None], drawn], objects[chosen[:, None], drawn]


def _logits(form: Form, weight: Tensor, bias: Tensor, x: Float[Tensor, "*item patch width"]) -> Tensor:
    if form == "linear":
        one = x @ weight
        return one[..., :, None] + one[..., None, :] + bias
    if form == "diagonal":
        return (x * weight) @ x.transpose(-1, -2) + bias
    symmetric = (weight + weight.T) / 2
    return x @ symmetric @ x.transpose(-1, -2) / math.sqrt(x.shape[-1]) + bias


METHODS = (
    LibraryMethod(
        id="same-object",
        title="Heads that look where a probe sees the same object",
        page="towers.md#same-object",
        paper="Does Object Binding Naturally Emerge in Large Pretrained Vision Transformers?",
        year=2025,
        tier="B",
        status="reconstruction",
        needs=("rows", "pictures"),
        cost="2 forwards per picture, and training of the probe",
        call="headwise.find.towers.binding_heads(model, pixel_values, probe, block)",
    ),
)
