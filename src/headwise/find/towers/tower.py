"""What the methods of this room share: a tower's sites, its inputs in batches, its tokens on a grid, and scores.

A tower is a stack that looks at pictures or listens to sound. Its inputs are no items of a probe, so the methods take
what the model itself takes: `pixel_values` or `input_features`, a tensor with one entry per item, or a mapping of all
the model's inputs. What a model needs besides pictures (CLIP its texts, LLaVA a prompt) comes from `model.example`
where it is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.site import Site
from headwise.scores import HeadScores, Provenance

BATCH = 16
"""Items of one forward."""

STACKS = ("vision", "audio", "encoder")
"""The stacks that are taken where none is named, the first of them that the model has; else its main stack."""

SENSED = ("pixel_values", "input_features", "input_values")
"""What models call the pictures or the sound that they take."""

TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "decoder_input_ids")
"""What of `model.example` stands in for inputs that a model needs beside pictures or sound."""

Rows = Float[Tensor, "item head query key"]
Given = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a model: those that have a row per item, and those that every batch is given whole."""

    of_items: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: AttachedModel, given: Given, beside: Mapping[str, Tensor] | None = None) -> Inputs:
        """The inputs that a user gave, with what the model needs besides.

        Raises `InputError` for no items, entries of different length, and a model whose kind of input is not known.
        """
        if not isinstance(model, AttachedModel):
            raise InputError(f"this takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
        shared = dict(beside or {})
        if isinstance(given, Tensor):
            of_items, added = _filled(model, given, shared)
            shared |= added
        else:
            of_items = dict(given)
        lengths = {name: len(value) for name, value in of_items.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise InputError(f"inputs have one row per item, all the same number and at least one; got {lengths}")
        return cls(of_items, shared)

    def __len__(self) -> int:
        return len(next(iter(self.of_items.values())))

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"item-{index}" for index in range(len(self)))

    def rows(self, which: slice) -> dict[str, Tensor]:
        """What the model is given for some of the items."""
        return {name: value[which] for name, value in self.of_items.items()} | dict(self.shared)

    def batches(self, size: int) -> Iterator[slice]:
        """The items, `size` at a time. Raises `InputError` for a size below 1."""
        if size < 1:
            raise InputError(f"batch={size!r} is no number of items; give 1 or more")
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))


@dataclass(frozen=True, slots=True)
class Grid:
    """Where a tower's tokens stand: `before` tokens of no place (CLS first, then registers), then cells row by row.

    Sound and text are a grid of one row.
    """

    rows: int
    columns: int
    before: int = 0

    def __len__(self) -> int:
        return self.rows * self.columns

    @property
    def steps(self) -> int:
        """How many different hops there are, 0 counted."""
        return max(self.rows, self.columns)

    @property
    def cells(self) -> Int[Tensor, "cell 2"]:
        """Row and column of every cell."""
        number = torch.arange(len(self))
        return torch.stack([number // self.columns, number % self.columns], dim=-1)

    @property
    def offsets(self) -> Int[Tensor, "query key 2"]:
        """Row and column of every cell as seen from every cell."""
        cells = self.cells
        return cells[None] - cells[:, None]

    @property
    def hops(self) -> Int[Tensor, "query key"]:
        """Chebyshev distance between cells: the steps of a king."""
        return self.offsets.abs().amax(dim=-1)

    @property
    def distances(self) -> Float[Tensor, "query key"]:
        """Euclidean distance between the centres of cells, in cells."""
        return self.offsets.double().square().sum(dim=-1).sqrt()

    def within(self, rows: Rows) -> Rows:
        """What cells give to cells."""
        return rows[..., self.before :, self.before :]


@dataclass(frozen=True, eq=False)
class Gathered:
    """What was made of the rows of a tower: by site and name, with an entry per item and head, on one grid."""

    grid: Grid
    values: Mapping[SiteId, Mapping[str, Tensor]]

    def of(self, name: str) -> dict[SiteId, Tensor]:
        return {site: values[name] for site, values in self.values.items()}


def sites_of(model: AttachedModel, stack: str | None = None, *, needs: Sequence[str] = ("rows",)) -> tuple[Site, ...]:
    """The sites of a tower, those of `stack` or of the first one in `STACKS`.

    Raises:
        InputError: there is no such stack.
        Refusal: the stack attends to another one, or a site of it cannot give what is needed.
    """
    if not isinstance(model, AttachedModel):
        raise InputError(f"this takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    known = model.table.stacks
    chosen = stack if stack is not None else next((each for each in STACKS if each in known), known[0])
    sites = tuple(site for site in model.sites if site.id.stack == chosen)
    if not sites:
        raise InputError(f"{model.name} has no stack {chosen!r}; it has {', '.join(known)}")
    for site in sites:
        if site.kind != "self":
            raise Refusal(f"{site.label} of {model.name} attends to another sequence; name a stack of self-attention")
        for need in needs:
            if not site.capabilities[need]:
                raise Refusal(f"{site.label} of {model.name} has no {need}: {site.capabilities[need].reason}")
    return sites


def over_rows(
    model: AttachedModel,
    inputs: Inputs,
    sites: Sequence[Site],
    of_rows: Callable[[Rows, Grid, slice], Mapping[str, Tensor]],
    *,
    shape: tuple[int, int] | None = None,
    batch: int = BATCH,
) -> Gathered:
    """`of_rows` on the pattern of every site and batch, joined along the items; the patterns are not kept.

    Args:
        of_rows: takes the rows of one site, the grid of its tokens and which items they are of; gives tensors whose
            first axis is the item.
        shape: rows and columns of the grid; None takes them from the size of the pictures and of a patch.

    Raises:
        InputError: a grid that the tokens do not fill.
        Refusal: the tower cuts its pictures into windows, or packs them together.
    """
    grids: dict[SiteId, Grid] = {}
    parts: dict[SiteId, list[Mapping[str, Tensor]]] = {site.id: [] for site in sites}
    labels = [site.label for site in sites]
    for items in inputs.batches(batch):
        given = inputs.rows(items)

        def reduced(rows: Rows, given: Mapping[str, Tensor] = given, items: slice = items) -> Any:
            if rows.shape[0] != items.stop - items.start or rows.shape[2] != rows.shape[3]:
                raise Refusal(
                    f"the tower of {model.name} has patterns of shape {list(rows.shape)} for "
                    f"{items.stop - items.start} items: it cuts pictures into windows or packs them, so its tokens are "
                    "on no one grid"
                )
            length = rows.shape[-1]
            grid = grid_of(shape or shape_of(model, sites[0], given, length), length)
            return grid, of_rows(rows, grid, items)

        with torch.no_grad(), model.reading(read.rows(labels, reduce=reduced)) as got:
            model(**on_device(model, given))
        for site in sites:
            pieces = got.rows[site.label]
            if len(pieces) != 1:
                raise Refusal(
                    f"{site.label} of {model.name} runs in {len(pieces)} pieces, which have no grid in common"
                )
            grids[site.id], found = pieces[0]
            parts[site.id].append({name: value.detach().cpu() for name, value in found.items()})
    if len(set(grids.values())) > 1:
        raise Refusal(f"the sites of {model.name} have grids of different size; it pools its tokens on the way")
    joined = {
        site: {name: torch.cat([part[name] for part in of_site]) for name in of_site[0]}
        for site, of_site in parts.items()
    }
    return Gathered(next(iter(grids.values())), joined)


def grid_of(shape: tuple[int, int], length: int) -> Grid:
    """The grid of that many rows and columns that `length` tokens are on. Raises `InputError` for too few of them."""
    rows, columns = shape
    before = length - rows * columns
    if rows < 1 or columns < 1 or before < 0:
        raise InputError(
            f"a grid of {rows} x {columns} cells does not fit {length} tokens; give grid=(rows, columns) of the patches"
        )
    return Grid(rows, columns, before)


def scores_of(ids: Sequence[str], values: Mapping[SiteId, Float[Tensor, "item head"]], about: Provenance) -> HeadScores:
    """Scores of the sites of one stack, NaN for heads that a site does not have."""
    sites = tuple(sorted(values))
    return HeadScores({sites[0].stack: stacked(values).numpy()}, {sites[0].stack: sites}, tuple(ids), about)


def stacked(values: Mapping[SiteId, Float[Tensor, "item head *rest"]]) -> Float[Tensor, "item site head *rest"]:
    """The sites' values in float64, in the order of their labels, NaN for heads that a site does not have."""
    widest = max(value.shape[1] for value in values.values())
    filled = []
    for site in sorted(values):
        value = values[site].double()
        blank = value.new_full((value.shape[0], widest - value.shape[1], *value.shape[2:]), torch.nan)
        filled.append(torch.cat([value, blank], dim=1))
    return torch.stack(filled, dim=1)


def on_device(model: AttachedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs where the model is, numbers in its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in given.items()
    }


def shape_of(model: AttachedModel, site: Site, given: Mapping[str, Tensor], length: int) -> tuple[int, int]:
    if "input_ids" in given and site.id.stack != "vision":
        return 1, length
    config = getattr(model.model, "config", None)
    patch: Any = getattr(getattr(config, "vision_config", None) or config, "patch_size", None)
    pixels = given.get("pixel_values")
    if pixels is None and patch is None:
        return 1, length
    if pixels is None or pixels.dim() != 4 or patch is None:
        form = "no pixel_values" if pixels is None else f"pixel_values of shape {list(pixels.shape)}"
        raise InputError(
            f"the grid of {model.name} cannot be told from {form} and the patch size {patch}; give grid=(rows, columns)"
        )
    height, width = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return pixels.shape[2] // int(height), pixels.shape[3] // int(width)


def _filled(
    model: AttachedModel, given: Tensor, shared: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A tensor of pictures or sound under its name, and text of the model's example: of items, and shared."""
    named = next((name for name in SENSED if name in model.example), None)
    if named is None:
        raise InputError(
            f"what {model.name} calls its pictures or its sound is not known; give its inputs as a mapping, such as "
            "{'pixel_values': ..., 'input_ids': ...}"
        )
    # A mask without text is one of the sound of the example.
    text = TEXT if "input_ids" in model.example else ("decoder_input_ids",)
    wanted = {name: model.example[name] for name in text if name in model.example and name not in shared}
    config = getattr(model.model, "config", None)
    in_prompt = any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))
    if "input_ids" in wanted and not in_prompt:
        return {named: given}, wanted
    return {named: given} | {name: value[:1].expand(len(given), -1) for name, value in wanted.items()}, {}
