"""What the methods that look at patterns share: the tokens of a run, and sums over its rows with no n x n held.

    weights(queries) -> w[item, query, key]         which entries of the pattern count, and how much
    score[item, head] = sum_{t, s} w[item, t, s] A[item, head, t, s]

Rows are read a few queries at a time, within `BUDGET` bytes a site, and summed at once. Where a query has one key that
counts, no row is made at all (`mean_pair_masses`). Every self-attention site of the main stack is read in the same
forward. Padding is in no sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.find.method import Scored, scored_sites
from headwise.find.search import over_batches
from headwise.heads import HeadSet, SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.read import Read
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.form import Want
from headwise.probes.outcome import observe, places, refuse_two_sided

BUDGET = 64 * 2**20
"""Bytes of the rows that are read at a time, as fp32."""

Weights = Callable[[Int[Tensor, " query"]], Float[Tensor, "item query key"] | Bool[Tensor, "item query key"]]
"""Weight of every key for some queries (columns of the sequence)."""

Statistic = Literal["entropy", "max", "sink_mass", "mean_distance"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The rows of one forward, column by column, as the model at hand lays them out.

    Attributes:
        batch: what runs.
        want: what to ask `observe` for.
        ids: token ids; what stands on padding is no token.
        attended: True on tokens, False on padding.
        prompt: True on the tokens of the prompt. What a tokenizer puts in front of a text (bos, [CLS]) belongs to it;
            what an encoder's puts behind it ([SEP]) does not.
        answer: True on the tokens of the answer that are in the row: all but the last, or none.
        special: True on the tokenizer's special tokens.
        starts: column at which each prompt begins.
    """

    batch: Batch
    want: Want
    ids: Int[Tensor, "item column"]
    attended: Bool[Tensor, "item column"]
    prompt: Bool[Tensor, "item column"]
    answer: Bool[Tensor, "item column"]
    special: Bool[Tensor, "item column"]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, model: AttachedModel, batch: Batch, *, answers: bool = False) -> Tokens:
        """The tokens of a batch of prompts, or of prompts and answers (`answers`, on a batch made with them).

        Raises `Refusal` for an encoder-decoder, whose main stack does not read the prompt, and where answers are asked
        of a model that does not continue text.
        """
        continues = places(model, batch).prompt_length is not None
        if not continues and any(site.kind == "cross" for site in model.sites):
            raise Refusal(
                f"{model.name} reads its prompts in an encoder and its main stack is the decoder; "
                "patterns over a prompt are scored on decoders and encoders only"
            )
        if not continues and answers:
            raise Refusal(
                f"{model.name} does not continue text, so it has no rows of an answer; score the rows of the prompt"
            )
        if not continues:
            return cls._right_padded(model, batch)
        ids, attended = batch.input_ids, batch.attention_mask.bool()
        behind = torch.arange(ids.shape[1]) >= batch.prompt_length
        starts = tuple(batch.prompt_length - len(each.prompt) for each in batch.items)
        # Without answers the model need only look at the last column to give its logits.
        shown = batch if answers else replace(batch, answers=batch.answers[:, :0])
        special = _special(model, ids)
        return cls(shown, "logits", ids, attended, attended & ~behind, attended & behind, special, starts)

    @classmethod
    def _right_padded(cls, model: AttachedModel, batch: Batch) -> Tokens:
        rows = [each.prompt + batch.suffix for each in batch.items]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        attended, prompt = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            attended[index, : len(row)] = True
            prompt[index, : len(row) - len(batch.suffix)] = True
        none = torch.zeros_like(prompt)
        return cls(batch, "embedding", ids, attended, prompt, none, _special(model, ids), (0,) * len(rows))

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def columns(self) -> Int[Tensor, " column"]:
        return torch.arange(self.width)

    @property
    def words(self) -> Bool[Tensor, "item column"]:
        """The prompt without special tokens."""
        return self.prompt & ~self.special

    @property
    def first(self) -> Int[Tensor, " item"]:
        """Column of each row's first token."""
        return self.attended.int().argmax(dim=1)

    def within(self, span: str) -> Bool[Tensor, "item column"]:
        """The columns of a span; every column of an item that has no span of that name."""
        inside = torch.ones_like(self.attended)
        for row, (each, start) in enumerate(zip(self.batch.items, self.starts, strict=True)):
            if span in each.spans:
                inside[row] = False
                inside[row, [start + position for place in each.spans[span] for position in place]] = True
        return inside

    def previous(self) -> Int[Tensor, "item column"]:
        """Column of the latest earlier token with the same id, both of the prompt and not special; -1 for none."""
        found = torch.full_like(self.ids, -1)
        for row, (ids, counted) in enumerate(zip(self.ids.tolist(), self.words.tolist(), strict=True)):
            latest: dict[int, int] = {}
            for column in (column for column, here in enumerate(counted) if here):
                found[row, column] = latest.get(ids[column], -1)
                latest[ids[column]] = column
        return found


def mean_mass(model: AttachedModel, items: ItemSet, keys: Callable[[Tokens], Weights]) -> Scored:
    """Mean mass on marked keys over the queries that have such a key; NaN for an item with no such query.

    `keys(tokens)` gives True at the keys of each query, and nowhere for a query that does not count.
    """
    return over_batches(items, partial(_mean_mass, model, keys), answers=False)


def _mean_mass(model: AttachedModel, keys: Callable[[Tokens], Weights], batch: Batch) -> Scored:
    tokens = Tokens.of(model, batch)
    rule = keys(tokens)
    counts = torch.stack([rule(chunk).bool().any(-1).sum(-1) for chunk in _chunks(model, tokens)]).sum(0)
    return {site: sums[..., 0] / counts.unsqueeze(-1) for site, sums in weighted_sums(model, tokens, rule).items()}


def mean_pair_masses(
    model: AttachedModel, tokens: Tokens, *keys: Int[Tensor, "item column"]
) -> dict[SiteId, Float[Tensor, "item head rule"]]:
    """The mean mass on one key for each query, over the queries that have one (-1: none); NaN where none has.

    From the kernel's logsumexp where it can be had (`read.statistics`), so that no row is made.
    """
    pairs = {f"keys {number}": columns.unsqueeze(-1) for number, columns in enumerate(keys)}
    got = _run(model, tokens, read.statistics(tuple(_sites(model)), wanted=[], pairs=pairs))["statistics"]

    def means(site: SiteId) -> Float[Tensor, "item head rule"]:
        masses = [mass.cpu() for mass in got[site].pair_mass.values()]
        return torch.stack([mean_over(mass, at >= 0) for mass, at in zip(masses, keys, strict=True)], dim=-1)

    return {site: means(site) for site in _sites(model)}


def weighted_sums(
    model: AttachedModel, tokens: Tokens, *rules: Weights
) -> dict[SiteId, Float[Tensor, "item head rule"]]:
    """`sum_{t, s} w[item, t, s] A[item, head, t, s]` for each rule, in fp64, from one forward."""

    def summed(rows: Float[Tensor, "item head query key"], queries: Tensor) -> Float[Tensor, "item head rule"]:
        sums = [torch.einsum("ihqk,iqk->ihq", rows, rule(queries).to(rows)).cpu().double().sum(-1) for rule in rules]
        return torch.stack(sums, dim=-1)

    return {site: torch.stack(parts).sum(0) for site, parts in reduced(model, tokens, summed).items()}


def reduced(
    model: AttachedModel,
    tokens: Tokens,
    reduce: Callable[[Tensor, Int[Tensor, " query"]], Tensor],
    *,
    of: Callable[..., Read] = read.rows,
    heads: HeadSet | None = None,
) -> dict[SiteId, list[Tensor]]:
    """What `reduce(rows, queries)` makes of the rows of each few queries, in order, by site.

    Args:
        reduce: gets `[item, head, query, key]`, heads in canonical order, and the columns of its queries.
        of: `read.rows`, or `read.scores`.
        heads: of these heads only; every head of the scored sites unless given.
    """
    chosen = tuple(_sites(model)) if heads is None else heads
    reads = [
        of(
            chosen,
            queries=slice(int(chunk[0]), int(chunk[-1]) + 1),
            reduce=partial(_called, reduce, chunk),
            name=f"rows_from_{int(chunk[0])}",
        )
        for chunk in _chunks(model, tokens)
    ]
    got = _run(model, tokens, *reads)
    sites = _sites(model) if heads is None else heads.sites
    found = {site: [piece for each in reads for piece in got[each.name].pieces(site)] for site in sites}
    pieced = next((site for site, parts in found.items() if len(parts) != len(reads)), None)
    if pieced is not None:
        raise Refusal(f"{pieced.label} of {model.name} attends in pieces, so the places of its rows are not known")
    return found


def mean_statistic(model: AttachedModel, items: ItemSet, statistic: Statistic) -> Scored:
    """Mean of a row statistic (`read.statistics`) over the tokens of the prompt."""
    return over_batches(items, partial(_mean_statistic, model, statistic), answers=False)


def _mean_statistic(model: AttachedModel, statistic: Statistic, batch: Batch) -> Scored:
    tokens = Tokens.of(model, batch)
    got = _run(model, tokens, read.statistics(tuple(_sites(model)), wanted=[statistic]))["statistics"]
    return {site: mean_over(getattr(got[site], statistic).cpu(), tokens.prompt) for site in _sites(model)}


def mean_over(
    values: Float[Tensor, "item head query"], counted: Bool[Tensor, "item query"]
) -> Float[Tensor, "item head"]:
    """Mean over the counted queries, in fp64; NaN for an item that has none."""
    totals = values.double().masked_fill(~counted.unsqueeze(1), 0.0).sum(-1)
    return totals / counted.sum(-1, keepdim=True)


def require_choice(setting: str, given: object, choices: tuple[str, ...]) -> None:
    """Raises `InputError` if a setting is none of its choices."""
    if given not in choices:
        raise InputError(f"{setting}={given!r} is unknown; choose from {', '.join(choices)}")


def require_whole(setting: str, given: object, least: int | None = None) -> None:
    """Raises `InputError` if a setting is no whole number, or below `least`."""
    if isinstance(given, bool) or not isinstance(given, int) or (least is not None and given < least):
        bound = "" if least is None else f", at least {least}"
        raise InputError(f"{setting}={given!r} must be a whole number of tokens{bound}")


def _run(model: AttachedModel, tokens: Tokens, *reads: Read) -> dict[str, Any]:
    """What the reads keep of one forward, by their names."""
    if bool(tokens.answer.any()):
        refuse_two_sided(model, tokens.batch)
    with torch.no_grad(), model.reading(*reads) as got:
        observe(model, tokens.batch, wants={tokens.want})
    return dict(got.captures)


def _called(reduce: Callable[[Tensor, Tensor], Tensor], queries: Tensor, rows: Tensor) -> Tensor:
    return reduce(rows, queries)


def _chunks(model: AttachedModel, tokens: Tokens) -> Iterator[Int[Tensor, " query"]]:
    """The columns, as many at a time as the budget allows rows of."""
    most = max(model.table.site(site).n_heads for site in _sites(model))
    step = max(1, BUDGET // (len(tokens.ids) * most * tokens.width * 4))
    yield from torch.split(tokens.columns, step)


def _sites(model: AttachedModel) -> tuple[SiteId, ...]:
    """The scored sites whose keys are the tokens that the queries are of."""
    found = tuple(site for site in scored_sites(model) if model.table.site(site).kind == "self")
    if not found:
        raise Refusal(f"{model.name} has no self-attention in its main stack, and patterns of tokens are looked for")
    return found


def _special(model: AttachedModel, ids: Int[Tensor, "item column"]) -> Bool[Tensor, "item column"]:
    known = getattr(model.tokenizer, "all_special_ids", None) or []
    return torch.isin(ids, torch.tensor(known, dtype=ids.dtype))
