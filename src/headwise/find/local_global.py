"""Local and global heads, and two numbers per token made of them: WAAD and FAI.

"Attention Illuminates LLM Reasoning", 2025. R are the rows of the response, A_loc and A_glob the mean maps of the local
and of the global heads:

    d_h     = mean_{t in R} sum_{s <= t} A_h[t, s] (t - s)                          distance of a head, in tokens
    local   = the heads with the lowest 30 percent of d_h, global = those with the highest 30 percent
    WAAD_t  = sum_{s <= t} A_loc[t, s] min(t - s, W)                                local heads reach back at t
    FAI_s   = mean of A_glob[t, s] over t in R with s + lo <= t <= s + hi           what s is to later tokens

    scores = find("local-global", model)
    heads = split(scores)
    waad(model, items, heads.near), fai(model, items, heads.far)

Exact: d_h, the shares, WAAD and FAI as printed. Reconstruction: W = 10, lo = 10 and hi = 50 are those of an independent
re-implementation, the paper's text does not give them; and R. The paper samples responses; here R are the rows of each
item's given answer (`rows="answer"`, all of its tokens but the last), so the default probe is `text`, whose answers are
several sentences long. `rows="prompt"` takes the tokens of the prompt, the only choice for encoders and for probes with
answers of one token: such an answer is predicted from the prompt, no row is its own, and where the paper averages over
hundreds of positions of a response there is none to average over.

Distances grow with the text, and a sink on the first token counts with the whole distance to it. So beside the paper's
score there is the same without the first column (`distance-without-first`, not brought to a sum of 1 again), and for
single heads what WAAD and FAI are for groups:

    waad    mean_{t in R} of WAAD_t, of the head's own map
    fai     mean of FAI_s over the tokens s that have such a row, of the head's own map
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Method, Scored
from headwise.find.patterns import Tokens, Weights, reduced, require_choice, require_whole, weighted_sums
from headwise.find.search import BATCH, over_batches
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.scores import HeadScores

Score = Literal["distance", "distance-without-first", "waad", "fai"]
Rows = Literal["answer", "prompt"]

SHARE = 0.3
WINDOW = 10
HORIZON = (10, 50)


@dataclass(frozen=True, slots=True)
class LocalGlobal:
    """The heads that look near, and those that look far."""

    near: HeadSet
    far: HeadSet


def local_global(
    model: AttachedModel,
    items: ItemSet,
    score: Score = "distance",
    rows: Rows = "answer",
    window: int = WINDOW,
    low: int = HORIZON[0],
    high: int = HORIZON[1],
) -> Scored:
    """One of the scores of a head, per item; NaN for an item without such rows.

    Args:
        score: `distance` and `distance-without-first` (tokens), `waad` (tokens, at most `window`), `fai` (0 to 1).
        rows: which rows count, those of the `answer` or of the `prompt`.
        window: W of WAAD.
        low, high: horizon of FAI, in tokens.

    Raises:
        InputError: an unknown choice, a window below 1, a horizon that is none.
        Refusal: rows of an answer from a model that does not continue text, or where no answer has two tokens.
    """
    require_choice("score", score, get_args(Score))
    require_choice("rows", rows, get_args(Rows))
    _require_window(window)
    _require_horizon(low, high)
    if rows == "answer" and all(len(each.answer) < 2 for each in items):
        raise Refusal(
            f"no answer of {items.probe} has rows of its own, which takes two tokens; "
            "use the probe text, or rows='prompt' for the tokens of the prompt"
        )

    def scored(batch: Batch) -> Scored:
        tokens = Tokens.of(model, batch, answers=rows == "answer")
        asked = _asked(tokens, rows)
        weights = _fai_weights(tokens, asked, low, high) if score == "fai" else _reach(tokens, asked, score, window)
        counted = _counts(asked, tokens, low, high) > 0 if score == "fai" else asked
        sums = weighted_sums(model, tokens, weights)
        return {site: each[..., 0] / counted.sum(-1, keepdim=True) for site, each in sums.items()}

    return over_batches(items, scored, answers=rows == "answer")


def split(scores: HeadScores, share: float = SHARE) -> LocalGlobal:
    """The heads up to the `share` quantile of the mean score, and those from the 1 - `share` quantile on.

    Raises `InputError` for a share outside 0 to 0.5, or scores of no head.
    """
    if not 0 < share < 0.5:
        raise InputError(f"share={share!r} is no share of two groups that lie apart; give a number between 0 and 0.5")
    ranked = scores.ranked()
    low, high = scores.quantile(share), scores.quantile(1 - share)
    return LocalGlobal(
        near=HeadSet(tuple(each.head for each in ranked if each.score <= low)),
        far=HeadSet(tuple(each.head for each in ranked if each.score >= high)),
    )


def waad(
    model: AttachedModel, items: ItemSet, near: HeadSet, *, rows: Rows = "answer", window: int = WINDOW
) -> tuple[Float[Tensor, " row"], ...]:
    """WAAD_t of the mean map of `near`, for each item at each of its rows in R, in tokens.

    Raises as `local_global`, and `InputError` for no heads.
    """
    require_choice("rows", rows, get_args(Rows))
    _require_window(window)
    found: list[Tensor] = []
    for tokens in _runs(model, items, rows):
        asked = _asked(tokens, rows)
        summed = partial(_over_keys, _reach(tokens, asked, "waad", window))
        values = torch.cat(_of_mean_map(model, tokens, near, summed), dim=1)
        found += [row[here] for row, here in zip(values, asked, strict=True)]
    return tuple(found)


def fai(
    model: AttachedModel,
    items: ItemSet,
    far: HeadSet,
    *,
    rows: Rows = "answer",
    low: int = HORIZON[0],
    high: int = HORIZON[1],
) -> tuple[Float[Tensor, " token"], ...]:
    """FAI_s of the mean map of `far`, for each item at each of its tokens; NaN where no row lies in the horizon.

    Raises as `local_global`, and `InputError` for no heads.
    """
    require_choice("rows", rows, get_args(Rows))
    _require_horizon(low, high)
    found: list[Tensor] = []
    for tokens in _runs(model, items, rows):
        asked = _asked(tokens, rows)
        summed = partial(_over_queries, _fai_weights(tokens, asked, low, high))
        values = torch.stack(_of_mean_map(model, tokens, far, summed)).sum(0)
        unseen = _counts(asked, tokens, low, high) == 0
        values = values.masked_fill(unseen, torch.nan)
        found += [row[here] for row, here in zip(values, tokens.attended, strict=True)]
    return tuple(found)


def _runs(model: AttachedModel, items: ItemSet, rows: Rows) -> list[Tokens]:
    answers = rows == "answer"
    return [Tokens.of(model, batch, answers=answers) for batch in items.batches(BATCH, answers=answers)]


def _asked(tokens: Tokens, rows: Rows) -> Bool[Tensor, "item column"]:
    """R."""
    return tokens.answer if rows == "answer" else tokens.prompt


def _reach(tokens: Tokens, asked: Bool[Tensor, "item column"], score: str, window: int) -> Weights:
    """w[t, s] of the sums over s of the distances and of WAAD."""

    def weights(queries: Tensor) -> Tensor:
        distance = (queries.unsqueeze(-1) - tokens.columns).clamp(min=0)
        if score == "waad":
            distance = distance.clamp(max=window)
        counted = asked[:, queries].unsqueeze(-1) & tokens.attended.unsqueeze(1)
        if score == "distance-without-first":
            counted = counted & (tokens.columns != tokens.first.unsqueeze(-1)).unsqueeze(1)
        return (distance * counted).double()

    return weights


def _fai_weights(tokens: Tokens, asked: Bool[Tensor, "item column"], low: int, high: int) -> Weights:
    """w[t, s] whose sums over t are FAI_s."""
    counts = _counts(asked, tokens, low, high).clamp(min=1).double()

    def weights(queries: Tensor) -> Tensor:
        distance = queries.unsqueeze(-1) - tokens.columns
        inside = (distance >= low) & (distance <= high) & tokens.attended.unsqueeze(1)
        return (inside & asked[:, queries].unsqueeze(-1)) / counts.unsqueeze(1)

    return weights


def _counts(asked: Bool[Tensor, "item column"], tokens: Tokens, low: int, high: int) -> Tensor:
    """For each token s, how many t of R lie in s + low ... s + high, `[item, column]`."""
    before = torch.nn.functional.pad(asked.cumsum(1), (1, 0))  # how many of R lie before a column
    from_, to = ((tokens.columns + edge).clamp(max=tokens.width) for edge in (low, high + 1))
    return (before[:, to] - before[:, from_]) * tokens.attended


def _over_keys(weights: Weights, rows: Tensor, queries: Tensor) -> Float[Tensor, "item query"]:
    return torch.einsum("ihqk,iqk->iq", rows, weights(queries).to(rows)).cpu().double()


def _over_queries(weights: Weights, rows: Tensor, queries: Tensor) -> Float[Tensor, "item key"]:
    return torch.einsum("ihqk,iqk->ik", rows, weights(queries).to(rows)).cpu().double()


def _of_mean_map(
    model: AttachedModel, tokens: Tokens, heads: HeadSet, summed: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """`summed` of the mean map of heads at any sites, for each few queries."""
    if not heads:
        raise InputError("the mean map of no heads is none; give heads, such as split(scores).near")
    by_site = reduced(model, tokens, summed, heads=heads).values()
    return [torch.stack(parts).sum(0) / len(heads) for parts in zip(*by_site, strict=True)]


def _require_window(window: int) -> None:
    require_whole("window", window, 1)


def _require_horizon(low: int, high: int) -> None:
    require_whole("low", low, 0)
    require_whole("high", high, low)


METHODS = (
    Method(
        id="local-global",
        title="how far back a head looks, and what tells local heads from global ones",
        page="methods/local-global.md",
        paper="Attention Illuminates LLM Reasoning",
        year=2025,
        tier="B",
        status="reconstruction",
        needs=("rows",),
        cost="1 forward",
        probe="text",
        score=local_global,
    ),
)
