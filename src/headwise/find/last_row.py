"""What the last token of a prompt attends to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import Refusal
from headwise.find.method import scored_sites
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.outcome import observe, places

Marks = Callable[[EncodedItem], list[list[int]]]
"""Some groups of tokens of an item's prompt, by position; as many groups for every item."""


def last_row_masses(model: AttachedModel, batch: Batch, marks: Marks) -> dict[SiteId, Float[Tensor, "item head group"]]:
    """How much the last token of each prompt attends to each group of tokens, by site. `batch` holds prompts alone.

    Raises:
        Refusal: prompts are not read as one text that goes on (encoders, encoder-decoders).
    """
    if places(model, batch).prompt_length is None:
        raise Refusal(
            f"{model.name} does not read prompt and answer as one text, so no token of its prompts says what comes "
            "next; use a model that continues text"
        )
    marked = _marked(batch, marks)
    last = read.rows([id.label for id in scored_sites(model)], queries=[batch.prompt_length - 1])
    with torch.no_grad(), model.reading(last) as got:
        observe(model, batch, wants={"logits"})
    found = {}
    for id in scored_sites(model):
        row = got.rows[id.label][:, :, 0].cpu().double()
        found[id] = torch.einsum("ihk,igk->ihg", row, marked.to(row))
    return found


def _marked(batch: Batch, marks: Marks) -> Bool[Tensor, "item group column"]:
    listed = [marks(each) for each in batch.items]
    marked = torch.zeros(len(listed), len(listed[0]), batch.prompt_length, dtype=torch.bool)
    for row, (each, groups) in enumerate(zip(batch.items, listed, strict=True)):
        start = batch.prompt_length - len(each.prompt)
        for group, positions in enumerate(groups):
            marked[row, group, [start + position for position in positions]] = True
    return marked
