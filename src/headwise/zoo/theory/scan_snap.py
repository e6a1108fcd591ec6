"""Scan and Snap: one softmax head under training looks first at what tells the next token, then stops moving.

Tian, Wang, Chen, Du, "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer",
2023. Common tokens stand before several next tokens, distinct ones before a single one. From zero weights, the
attention on common tokens falls, that on distinct tokens rises in the order of their frequency (scan), and then the
pattern nearly freezes (snap). The first two steps are known in closed form; the rest is measured.

    task = ScanSnapTask()
    head = ScanSnapHead(task.tokens, task.last, task.classes)
    train_scan_snap(head, task.batches(3000, seed=0))       # about 5 seconds on one thread
    common_mass(task, head)                                 # 0.51, from 0.73 at zero weights
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headwise.errors import InputError


@dataclass(frozen=True, slots=True)
class ScanSnapItems:
    """Contexts as token frequencies (each row sums to 1), the last token, which attends, and the class to predict."""

    frequencies: Float[Tensor, "item token"]
    last: Int[Tensor, " item"]
    target: Int[Tensor, " item"]


@dataclass(frozen=True, slots=True)
class ScanSnapPrediction:
    """The head after two steps of gradient descent from zero on whole populations, exactly (derived here).

    Step one moves the decoder alone: Y = (lr_Y / C) sum_n f_n (e_n - 1/C), with f_n the frequencies of class n divided
    by their L2 norm. Step two moves the attention logits of last token m by the paper's gradient
    (lr_Z / C) sum_n diag(f_n) (I - f_n f_n^T) Y (e_n - alpha_n), over the classes n of m, alpha_n = softmax(Y^T f_n).
    By symmetry four numbers say all of it:

    - `common_mass_at_start`: the attention on common tokens at zero weights, their share of the context.
    - `distinct_logits`: of the distinct tokens of one class, in the order of `ScanSnapTask.weights`; positive, and
      proportional to the SQUARE of the token's frequency.
    - `shared_logit`: of the tokens common to all classes; negative.
    - `last_logit`: of the tokens common to the classes of one last token, of either sign: they tell that token's
      classes from the others, and not from one another.
    """

    common_mass_at_start: float
    distinct_logits: tuple[float, ...]
    shared_logit: float
    last_logit: float


@dataclass(frozen=True, slots=True)
class ScanSnapTask:
    """`last` last tokens with `next_per_last` classes each, one class per next token, all equally likely.

    A context of `length` tokens is drawn with weight 1 for the `shared` tokens (of all classes) and the `per_last` ones
    (of the classes of one last token), and with weights 1/k, 2/k .. 1 for the k = `distinct` tokens of its class.
    Tokens are numbered in that order: shared, per last token, per class.

    Raises InputError unless every number is at least 1 and there are two classes.
    """

    last: int = 2
    next_per_last: int = 2
    shared: int = 10
    per_last: int = 5
    distinct: int = 10
    length: int = 64

    def __post_init__(self) -> None:
        if min(self.last, self.next_per_last, self.shared, self.per_last, self.distinct, self.length) < 1:
            raise InputError(f"not every number of {self} is at least 1: choose at least one of each")
        if self.classes < 2:
            raise InputError(f"{self} has one class, nothing to tell apart: choose last * next_per_last >= 2")

    @property
    def classes(self) -> int:
        return self.last * self.next_per_last

    @property
    def tokens(self) -> int:
        return self.shared + self.last * self.per_last + self.classes * self.distinct

    @property
    def weights(self) -> tuple[float, ...]:
        """The unnormalised frequencies of the distinct tokens of a class, rising to 1."""
        return tuple((i + 1) / self.distinct for i in range(self.distinct))

    def distinct_of(self, class_: int) -> slice:
        """The tokens that stand before this class alone."""
        start = self.shared + self.last * self.per_last + class_ * self.distinct
        return slice(start, start + self.distinct)

    def common_of(self, last: int) -> slice:
        """The tokens that stand before every class of this last token, without the shared ones."""
        start = self.shared + last * self.per_last
        return slice(start, start + self.per_last)

    def population(self) -> ScanSnapItems:
        """One item per class with its exact frequencies: the limit of long contexts and large batches."""
        frequencies = torch.zeros(self.classes, self.tokens, dtype=torch.float64)
        frequencies[:, : self.shared] = 1
        for class_ in range(self.classes):
            frequencies[class_, self.common_of(class_ // self.next_per_last)] = 1
            frequencies[class_, self.distinct_of(class_)] = torch.tensor(self.weights, dtype=torch.float64)
        target = torch.arange(self.classes)
        return ScanSnapItems(frequencies / frequencies.sum(1, keepdim=True), target // self.next_per_last, target)

    def draw(self, items: int, *, seed: int) -> ScanSnapItems:
        """`items` sampled contexts, the same for the same seed."""
        return self._draw(items, torch.Generator().manual_seed(seed))

    def batches(self, steps: int, *, size: int = 256, seed: int = 0) -> Iterator[ScanSnapItems]:
        """Fresh batches for `train_scan_snap`; `itertools.repeat(task.population(), steps)` serves it as well."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self._draw(size, generator)

    def predict(self, decoder_rate: float = 10.0, attention_rate: float = 1.0) -> ScanSnapPrediction:
        """The prediction for these two learning rates."""
        classes, siblings = self.classes, self.next_per_last - 1
        common = self.shared + self.per_last
        squares = sum(weight**2 for weight in self.weights)
        norm = common + squares  # squared, in units of the weight 1
        rate = decoder_rate / classes

        # Y^T f_n up to a constant: the overlap f_n . f_n' with itself, with its last token's classes, with the others.
        own, same, other = (math.exp(rate * overlap) for overlap in (1.0, common / norm, self.shared / norm))
        total = own + siblings * same + (classes - self.next_per_last) * other
        right, sibling = 1 - own / total, -same / total  # entries of e_n - alpha_n

        of_last = right + siblings * sibling
        mean = (squares * right + self.per_last * of_last) / norm
        scale = attention_rate / classes * rate / norm
        return ScanSnapPrediction(
            common_mass_at_start=common / (common + sum(self.weights)),
            distinct_logits=tuple(scale * weight**2 * (right - mean) for weight in self.weights),
            shared_logit=-scale * self.next_per_last * mean,
            last_logit=scale * self.next_per_last * (of_last - mean),
        )

    def _draw(self, items: int, generator: torch.Generator) -> ScanSnapItems:
        population = self.population()
        target = torch.randint(self.classes, (items,), generator=generator)
        drawn = torch.multinomial(population.frequencies[target].float(), self.length, True, generator=generator)
        counts = torch.zeros(items, self.tokens, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        return ScanSnapItems(counts / self.length, target // self.next_per_last, target)


class ScanSnapHead(nn.Module):
    """One softmax head over one-hot tokens, zero weights to start with, fp64.

        u_l = frequency_l exp(Z[m, l])        f = u / |u|_2        logits = Y^T f

    `kq` is Z, [last, token], the attention logits of each last token; `ov` is Y, [token, class], decoder and value in
    one. A token that stands k times in the context has k times the attention, hence the frequencies.
    """

    def __init__(self, tokens: int, last: int, classes: int) -> None:
        super().__init__()
        self.kq = nn.Parameter(torch.zeros(last, tokens, dtype=torch.float64))
        self.ov = nn.Parameter(torch.zeros(tokens, classes, dtype=torch.float64))

    def pattern(self, items: ScanSnapItems) -> Float[Tensor, "item token"]:
        """The attention on all occurrences of each token together; rows sum to 1."""
        unnormalised = self._unnormalised(items)
        return unnormalised / unnormalised.sum(1, keepdim=True)

    def forward(self, items: ScanSnapItems) -> Float[Tensor, "item class"]:
        unnormalised = self._unnormalised(items)
        unit: Tensor = unnormalised / torch.linalg.vector_norm(unnormalised, dim=1, keepdim=True)
        return unit @ self.ov

    def _unnormalised(self, items: ScanSnapItems) -> Float[Tensor, "item token"]:
        return items.frequencies * self.kq[items.last].exp()


def common_mass(task: ScanSnapTask, head: ScanSnapHead) -> float:
    """The head's attention on common tokens, shared and per last token, averaged over the classes."""
    with torch.no_grad():
        pattern = head.pattern(task.population())
    return float(pattern[:, : task.shared + task.last * task.per_last].sum(1).mean())


def train_scan_snap(
    head: ScanSnapHead,
    batches: Iterable[ScanSnapItems],
    *,
    decoder_rate: float = 10.0,
    attention_rate: float = 1.0,
) -> None:
    """Plain gradient descent on the cross-entropy, one step per batch, in place.

    The paper asks for a decoder that learns faster than the attention. Conserved at every step, whatever the batches:
    each row of Z sums to 0 (f does not change when a constant is added to a row), and each row of Y sums to 0.
    """
    optimiser = torch.optim.SGD(
        [{"params": [head.ov], "lr": decoder_rate}, {"params": [head.kq], "lr": attention_rate}], lr=attention_rate
    )
    for items in batches:
        optimiser.zero_grad()
        torch.autograd.backward(cross_entropy(head(items), items.target))
        optimiser.step()
