"""Head Pursuit: how much of what a head writes is made of the words of a concept.

After Basile et al. (2025), "Head Pursuit: Probing Attention Specialization in Multimodal Transformers". H holds what a
head writes at the last token of each prompt, `[item, d_model]`, or (`at`) before every token of the answer, or before
those that are of the concept: in a caption they may stand anywhere. D has a row for each token of the concept: its row
of the unembedding, with the gain of the final norm folded in (and its centring), and that of any norm behind the head.
By simultaneous orthogonal matching pursuit, with R = H at first and rows of D of length 1, in every step

    j <- argmax_j sum_i |<D_j, R_i>|                the one token that speaks for all items at once
    R <- H less its projection onto the rows of D that were taken so far

and the score is the share of energy that is explained,

    s_h = 1 - |R|^2 / |H|^2                         0 to 1, one number for all items together

after `atoms` steps. With `by="logit-lens"`, the baseline, a head is scored by what it writes into the logits of the
concept, less into all logits, in the mean over items (norms with the scale 1):

    s_h = mean_i < mean_{j in concept} D_j - mean_j D_j,  H_i >

The concept is given in words, `concept="Rome Paris Vienna"`; each counts with a blank in front and without, by its
first token. Without words it is the items' answers, by their first tokens.

A reconstruction: no code of the paper was to be had. Energy is taken about 0 and not about the mean, rows have length
1, and `atoms` is ours. A head that writes into all directions alike explains about (number of atoms) / d_model, so
scores of different concepts or atoms do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.find.patterns import require_choice
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.direct import direct_paths, plain_matrix
from headwise.model.running.projection import head_weights
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe

By = Literal["pursuit", "logit-lens"]
At = Literal["last", "answer", "concept"]
ATOMS = 10
EXPLAINED = 1e-12
"""Where so small a share of energy is left, nothing is."""


@dataclass(frozen=True, eq=False)
class Pursuit:
    """What matching pursuit found in one head's writes: rows in the order taken, and the share explained after each."""

    rows: tuple[int, ...]
    explained: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return self.explained[-1] if self.explained else 0.0


def head_pursuit(
    model: AttachedModel,
    items: ItemSet,
    *,
    concept: str = "",
    atoms: int = ATOMS,
    by: By = "pursuit",
    at: At = "last",
) -> Scored:
    """`head-pursuit`: a share of energy from 0 to 1; by `logit-lens`, logits.

    Args:
        concept: words with blanks between them; none are the items' answers.
        atoms: most steps of the pursuit.
        by: `pursuit`, or the baseline `logit-lens`.
        at: the tokens whose writes are looked at: the `last` one of each prompt, those before the tokens of the
            `answer`, or those before a token of the `concept` in it.

    Raises:
        InputError: a setting that is none; words of which the tokenizer knows none, or that no answer has.
        Refusal: the unembedding is no plain matrix; and as `direct_paths`.
    """
    require_choice("by", by, get_args(By))
    require_choice("at", at, get_args(At))
    if atoms < 1:
        raise InputError(f"atoms={atoms!r} is no number of steps; give 1 or more")
    ids = concept_tokens(model.tokenizer, concept) if concept else answer_tokens(items)
    dictionary = _rows(model, ids)
    writes = _writes(model, items, at, ids)
    scored = {}
    for site, written in writes.items():
        rows = dictionary[site.label]
        if by == "pursuit":
            values = [pursue(written[:, head], rows[:-1], atoms).ratio for head in range(written.shape[1])]
        else:
            values = (written.double() @ (rows[:-1].mean(0) - rows[-1])).mean(0).tolist()
        scored[site] = torch.tensor([values], dtype=torch.float64)
    return scored


def pursue(writes: Float[Tensor, "item d_model"], dictionary: Float[Tensor, "token d_model"], atoms: int) -> Pursuit:
    """Simultaneous orthogonal matching pursuit of all writes at once; rows that add nothing are passed over."""
    h, d = writes.double(), dictionary.double()
    whole = float(h.square().sum())
    if whole == 0:
        return Pursuit((), ())
    length = d.norm(dim=-1, keepdim=True)
    d = torch.where(length > 0, d / length.clamp(min=1e-300), 0.0)
    left, beyond, free = h.clone(), d.clone(), torch.ones(len(d), dtype=torch.bool)
    rows: list[int] = []
    explained: list[float] = []
    while len(rows) < atoms and (not explained or explained[-1] < 1 - EXPLAINED):
        # What of a row is beyond those taken; a row in their span has nothing left to add.
        free &= beyond.norm(dim=-1) > 1e-6
        if not bool(free.any()):
            break
        best = int((d @ left.T).abs().sum(-1).masked_fill(~free, -1).argmax())
        free[best] = False
        unit = beyond[best] / beyond[best].norm()
        left -= (left @ unit)[:, None] * unit
        beyond -= (beyond @ unit)[:, None] * unit
        rows.append(best)
        explained.append(min(1.0, max(0.0, 1 - float(left.square().sum()) / whole)))
    return Pursuit(tuple(rows), tuple(explained))


def concept_tokens(tokenizer: Any, words: str) -> list[int]:
    """First tokens of the words, each with a blank in front and without; words split at blanks and commas.

    Raises InputError where there is no tokenizer, or none of the words.
    """
    if tokenizer is None:
        raise InputError(
            "a concept in words needs the model's tokenizer; load the model with one, or leave concept out"
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    found: dict[int, None] = {}
    for word in words.replace(",", " ").split():
        for form in (f" {word}", word):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if ids and ids[0] != unknown:
                found.setdefault(ids[0])
    if not found:
        raise InputError(f"concept={words!r} has no word that the tokenizer knows; give some, with blanks between them")
    return list(found)


def answer_tokens(items: ItemSet) -> list[int]:
    """First tokens of the items' answers. Raises InputError where there are none."""
    found = dict.fromkeys(each.answer[0] for each in items if each.answer)
    if not found:
        raise InputError(f"{items.probe}: no item has an answer, so concept= has to name the words")
    return list(found)


def _rows(model: AttachedModel, ids: Sequence[int]) -> dict[str, Float[Tensor, "row d_model"]]:
    """By site, the dictionary as the site's writes see it, and behind it the mean row of the whole vocabulary."""
    paths = direct_paths(model)
    matrix = plain_matrix(paths.unembedding)
    if matrix is None:
        raise Refusal(f"the unembedding of {model.name} is no plain matrix in memory, so it has no rows for tokens")
    rows = torch.cat([matrix[list(ids)].double(), matrix.double().mean(0, keepdim=True)])
    return {label: found.double().cpu() for label, found in paths.of_rows(rows).items()}


def _writes(
    model: AttachedModel, items: ItemSet, at: At, concept: Sequence[int]
) -> dict[SiteId, Float[Tensor, "token head d_model"]]:
    """What every head writes at the chosen tokens of all items."""
    sites = scored_sites(model)
    if at != "last" and not any(_before(each.answer, at, concept) for each in items):
        raise InputError(
            f"no answer of {items.probe} has a token of the concept, so nothing comes before one; use at='last'"
        )

    written: dict[SiteId, list[Tensor]] = {id: [] for id in sites}
    for batch in items.batches():
        with torch.no_grad(), model.reading(read.z([id.label for id in sites], reduce=_last)) as got:
            observe(model, batch, wants={"logits"})
        chosen = _chosen(batch, at, concept)
        for id, parts in written.items():
            site = model.table.site(id)
            assert site.projection is not None
            (z,) = got.z[id.label]
            weights = head_weights(model.model.get_submodule(site.projection), site).detach()
            columns = z[:, -max(batch.answers.shape[1], 1) :].to(weights)
            parts.append(torch.einsum("ihk,hkd->ihd", columns[chosen.to(columns.device)], weights).double().cpu())
    return {id: torch.cat(parts) for id, parts in written.items()}


def _chosen(batch: Batch, at: At, concept: Sequence[int]) -> Bool[Tensor, "item token"]:
    """Which tokens of the answers it is that the chosen columns come before; the first stands for the last token of the
    prompt."""
    chosen = torch.zeros(len(batch.items), max(batch.answers.shape[1], 1), dtype=torch.bool)
    for row, each in enumerate(batch.items):
        chosen[row, [0] if at == "last" else _before(each.answer, at, concept)] = True
    return chosen


def _before(answer: Sequence[int], at: At, concept: Sequence[int]) -> list[int]:
    return [place for place, id in enumerate(answer) if at == "answer" or id in concept]


def _last(z: Tensor) -> Tensor:
    return z.clone()


METHODS = (
    Method(
        id="head-pursuit",
        title="How much of what a head writes is made of the words of a concept",
        page="methods/head-pursuit.md",
        paper="Basile et al., Head Pursuit",
        year=2025,
        tier="B",
        status="reconstruction",
        needs=("z", "projection", "logits", "answer"),
        cost="1 forward per item",
        probe="facts",
        score=head_pursuit,
    ),
)
