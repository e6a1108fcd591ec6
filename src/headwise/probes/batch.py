"""Items as rows of one tensor, prompts flush right, answers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.probes.encoded import EncodedItem
from headwise.probes.layout import Ids, PictureReader


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward.

    Attributes:
        items: what the rows hold, in order.
        input_ids: ids, padded on the left so that all prompts end in column `prompt_length - 1`; behind them, where
            asked for, all but the last token of each answer, padded on the right.
        attention_mask: 1 on prompts and answers.
        prompt_length: columns of the prompts.
        answers: ids of the answers, -1 where an answer is shorter than the longest.
        suffix: ids that belong behind a prompt where it is not continued (encoders).
        reader: how pictures were written, where there are some.
    """

    items: tuple[EncodedItem, ...]
    input_ids: Int[Tensor, "item column"]
    attention_mask: Int[Tensor, "item column"]
    prompt_length: int
    answers: Int[Tensor, "item token"]
    suffix: Ids = ()
    reader: PictureReader | None = None

    @property
    def pixels(self) -> dict[str, Tensor]:
        """What the model takes beside the ids: the pictures of all rows, in the form that its processor gives them."""
        if self.reader is None or not any(each.pixels for each in self.items):
            return {}
        return self.reader.joined([each.pixels for each in self.items])

    @property
    def position_ids(self) -> Int[Tensor, "item column"]:
        """Positions counted from each row's first attended column; 0 on the padding."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    @property
    def answer_mask(self) -> Bool[Tensor, "item token"]:
        return self.answers >= 0

    @property
    def spans(self) -> Mapping[str, list[list[int]]]:
        """Columns of each span in each row of `input_ids`, all its places together; of spans that every item has.

        These are right for models that continue text. `places` gives them for the model at hand, in the form that
        `reading` and `editing` take as `spans=`; encoders are padded on the other side.
        """
        common = set.intersection(*(set(each.spans) for each in self.items))
        return {
            name: [
                [self.prompt_length - len(each.prompt) + position for place in each.spans[name] for position in place]
                for each in self.items
            ]
            for name in sorted(common)
        }


def pad(
    items: Sequence[EncodedItem], fill: int, suffix: Ids, *, answers: bool, reader: PictureReader | None = None
) -> Batch:
    """The items as rows; see `Batch`."""
    width = max(len(each.prompt) for each in items)
    longest = max(len(each.answer) for each in items)
    behind = max(longest - 1, 0) if answers else 0
    ids = torch.full((len(items), width + behind), fill)
    mask = torch.zeros_like(ids)
    wanted = torch.full((len(items), longest), -1)
    for row, each in enumerate(items):
        tokens = each.prompt + (each.answer[:-1] if answers else ())
        start = width - len(each.prompt)
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = 1
        wanted[row, : len(each.answer)] = torch.tensor(each.answer)
    return Batch(tuple(items), ids, mask, width, wanted, suffix, reader)
