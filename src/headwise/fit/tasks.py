"""What a model is trained to do and judged by: answers that it writes, or classes read off its embedding.

Task("facts", items, held_out)                                   # a model that continues text
classifying(model, "tense", items, held_out)                     # an encoder: a linear layer on its embedding
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headwise.errors import InputError
from headwise.fit.training import generator
from headwise.metrics import metric
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe


@dataclass(frozen=True, eq=False)
class Task:
    """Items to learn from, items to be judged on, and how.

    Attributes:
        name: what it is called; it names its readout's parameters, too.
        items: what is trained on, and ranks heads.
        held_out: what accuracy is measured on; none of `items`.
        classes: the answers that a readout tells apart; none where the model writes its answers itself.
        readout: from the embedding (mean of the last hidden state) to a logit per class.

    Raises:
        InputError: an item on both sides, or a readout that does not go with the classes.
    """

    name: str
    items: ItemSet
    held_out: ItemSet
    classes: tuple[str, ...] = ()
    readout: nn.Linear | None = None

    def __post_init__(self) -> None:
        if not len(self.items) or not len(self.held_out) or "/" in self.name:
            raise InputError(f"task {self.name!r} needs a name without '/', items, and held-out items")
        if set(self.items.ids) & set(self.held_out.ids):
            raise InputError(f"task {self.name!r}: an item is trained on and held out; part them first")
        if bool(self.classes) != (self.readout is not None):
            raise InputError(f"task {self.name!r}: classes and a readout go together; see classifying()")

    def losses(self, model: AttachedModel, batch: Batch) -> Float[Tensor, " item"]:
        """Cross-entropy of the answer (mean over its tokens) or of the class, with its graph where gradients are on."""
        gradients = torch.is_grad_enabled()
        if self.readout is None:
            return metric("cross-entropy")(observe(model, batch, wants={"logits"}, gradients=gradients))
        return cross_entropy(self._logits(model, batch, gradients), self._wanted(batch), reduction="none")

    def right(self, model: AttachedModel, batch: Batch) -> Float[Tensor, " item"]:
        """1 for each item that is answered right, else 0."""
        if self.readout is None:
            return metric("exact-match")(observe(model, batch, wants={"logits"}))
        with torch.no_grad():
            return (self._logits(model, batch, False).argmax(-1) == self._wanted(batch)).float()

    def accuracy(self, model: AttachedModel, *, batch_size: int = 32) -> float:
        """Share of the held-out items that are answered right, under whatever plan is open."""
        return float(torch.cat([self.right(model, batch).cpu() for batch in self.held_out.batches(batch_size)]).mean())

    def _logits(self, model: AttachedModel, batch: Batch, gradients: bool) -> Float[Tensor, "item class"]:
        assert self.readout is not None
        embedding = observe(model, batch, wants={"embedding"}, gradients=gradients).embedding
        assert embedding is not None
        logits: Tensor = self.readout(embedding)
        return logits

    def _wanted(self, batch: Batch) -> Int[Tensor, " item"]:
        assert self.readout is not None
        wanted = torch.tensor([self.classes.index(each.item.answer) for each in batch.items])
        return wanted.to(self.readout.weight.device)


def classifying(model: AttachedModel, name: str, items: ItemSet, held_out: ItemSet, *, seed: int = 0) -> Task:
    """A task whose classes are the answers of its items, with a readout that is drawn from the seed.

    Raises:
        InputError: fewer than two classes, or a held-out item of a class that no item has.
    """
    classes = tuple(sorted({each.item.answer for each in items}))
    strange = {each.item.answer for each in held_out} - set(classes)
    if len(classes) < 2 or strange:
        said = f"a class that is not trained on ({sorted(strange)[0]!r})" if strange else f"the classes {classes}"
        raise InputError(f"task {name!r} has {said}; give two classes or more, all of them among the items")
    one = replace(items, items=items.items[:1])
    embedding = observe(model, next(one.batches(1)), wants={"embedding"}).embedding
    assert embedding is not None
    readout = nn.Linear(embedding.shape[1], len(classes))
    bound = embedding.shape[1] ** -0.5
    with torch.no_grad():
        nn.init.uniform_(readout.weight, -bound, bound, generator=generator("readout", name, seed))
        readout.bias.zero_()
    return Task(name, items, held_out, classes, readout.to(embedding.device))


__all__ = ["Task", "classifying"]
