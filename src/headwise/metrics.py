"""Metrics: one number per item from what a run of the model gave.

    items = encode(probe("ioi"), model, n=64)
    measure(model, items)                                                 # the probe's own metric
    measure(model, items, "exact-match", edits=[hw.edit.zero("L1H2")])    # another one, under edits

Metrics of the answer are teacher-forced: each of its tokens is predicted from the prompt and the tokens before it. All
of them can be differentiated except ranks, matches and what is told from generated text. Logarithms are natural.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.probes.batch import Batch
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.form import WANTS, Want
from headwise.probes.layout import Ids
from headwise.probes.outcome import Outcome, observe, places, refuse_spans_in_the_decoder, refuse_two_sided
from headwise.words import refusal_markers

Need = Literal["logits", "generation", "embedding", "clean"]
NEEDS: tuple[Need, ...] = get_args(Need)

Better = Literal["higher", "lower"]


class Under(Protocol):
    """What is carried out around a run and is told where its prompts stand: an intervention of `headwise.use`."""

    def edits(self, model: AttachedModel, /) -> Sequence[Edit]: ...

    def __call__(
        self, model: AttachedModel, /, *, spans: Any = None, prompt_length: int | None = None
    ) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One number per item from a run, and for some from the clean run beside it.

    Attributes:
        id, title: its name, and what it is in a few words.
        needs: what must have been observed; `clean` is the same of a run without the edits.
        better: whether a model that does well has a higher or a lower value.
        unit: what it counts.
        function: takes the outcome and the clean one (None where `needs` has no `clean`), gives one number per item.

    Raises `InputError` for needs that are none.
    """

    id: str
    title: str
    needs: frozenset[Need]
    better: Better
    unit: str
    function: Callable[[Outcome, Outcome | None], Float[Tensor, " item"]]

    def __post_init__(self) -> None:
        unknown = sorted(self.needs - set(NEEDS))
        if unknown or not self.wants:
            raise InputError(
                f"metric {self.id!r} needs {unknown or 'nothing that a run gives'}; name some of {', '.join(WANTS)}, "
                "and clean beside them where the run without edits is used"
            )

    @property
    def wants(self) -> frozenset[Want]:
        """What must be observed of a run."""
        return frozenset(want for want in WANTS if want in self.needs)

    @property
    def sign(self) -> int:
        """See `sign_of`."""
        return sign_of(self.better)

    def __call__(self, outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
        """The numbers of one batch. Raises `InputError` if something that it needs was not observed."""
        if "clean" in self.needs and clean is None:
            raise InputError(f"metric {self.id} compares with the clean run; give its outcome as the second argument")
        for each in (outcome, clean) if clean is not None and "clean" in self.needs else (outcome,):
            has = {"logits": each.logits, "generation": each.generated, "embedding": each.embedding}
            missing = next((want for want in WANTS if want in self.needs and has[want] is None), None)
            if missing is not None:
                raise InputError(f"metric {self.id} needs the {missing} of the run; put {missing!r} into wants=")
        values = self.function(outcome, clean)
        if values.shape != (len(outcome.batch.items),):
            raise InputError(
                f"metric {self.id} gave shape {list(values.shape)} for {len(outcome.batch.items)} items; "
                "its function must give one number per item"
            )
        return values


def sign_of(better: Better) -> int:
    """1 where a model that does well has a higher value, else -1: `(clean - edited) * sign` is what an edit costs."""
    return 1 if better == "higher" else -1


def metric(id: str) -> Metric:
    """The metric of that id. Raises `InputError`, with the nearest ids."""
    known = {each.id: each for each in METRICS}
    if id not in known:
        close = get_close_matches(str(id), known, n=3, cutoff=0.5)
        nearest = f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(known)}"
        raise InputError(f"no metric {id!r}; {nearest}")
    return known[id]


def measure(
    model: AttachedModel,
    items: ItemSet,
    metric: str | Metric | None = None,
    *,
    edits: Sequence[Edit] = (),
    under: Under | None = None,
    batch_size: int = 16,
) -> Float[Tensor, " item"]:
    """The metric of every item, in their order, on the CPU.

    The numbers do not depend on `batch_size`, unless an edit names columns by number (those of padded rows), draws at
    random or takes its values from another run. Name places by spans.

    Runs happen under whatever plan is open on the model, which is told where the prompts end, without gradients. The
    clean run, where the metric needs one, is the run without `edits` and outside `under`.

    Args:
        metric: an id, a metric, or None for the default metric of the items' probe.
        edits: what is changed in the model; spans of the items can be named in them.
        under: an intervention (`hw.use`) that is carried out around every run, before `edits`; likewise with spans.

    Raises:
        InputError: no items; an item or an edit that cannot be used.
        Refusal: the model cannot give what the metric needs.
    """
    if not isinstance(model, AttachedModel):
        raise InputError(f"measure takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    if not isinstance(items, ItemSet):
        raise InputError(f"measure takes encoded items (hw.encode), not a {type(items).__name__}")
    if isinstance(edits, Edit):
        raise InputError("edits takes a list of edits; write edits=[...]")
    chosen = metric if isinstance(metric, Metric) else _by_id(items.metric if metric is None else metric)
    if not items.items:
        raise InputError(f"{items.probe}: there are no items to measure; encode at least one")
    edits = tuple(edits)
    refuse_spans_in_the_decoder(model, (*edits, *(under.edits(model) if under is not None else ())))
    changed = bool(edits) or under is not None
    measured = []
    for batch in items.batches(batch_size):
        if "logits" in chosen.needs:
            refuse_two_sided(model, batch)
        clean = _observe(model, batch, items, chosen) if not changed or "clean" in chosen.needs else None
        outcome = clean
        if changed:
            at = places(model, batch)
            with ExitStack() as blocks:
                if under is not None:
                    blocks.enter_context(under(model, spans=at.spans, prompt_length=at.prompt_length))
                if edits:
                    blocks.enter_context(model.editing(*edits, spans=at.spans, prompt_length=at.prompt_length))
                outcome = _observe(model, batch, items, chosen)
        assert outcome is not None
        measured.append(chosen(outcome, clean).detach().cpu())
    return torch.cat(measured)


def keep_right(model: AttachedModel, items: ItemSet, *, batch_size: int = 16) -> ItemSet:
    """The items whose answer the model gives (`exact-match` is 1); the others are counted as dropped.

    Raises:
        Refusal: it gives none of them.
    """
    right = measure(model, items, EXACT_MATCH, batch_size=batch_size) == 1
    if not bool(right.any()):
        raise Refusal(
            f"{model.name} gets 0 of {len(items)} items of {items.probe} right, so there is no behaviour to look at; "
            "use a model that solves the probe, or easier settings"
        )
    return items.only(right.tolist(), "the model gets it wrong")


_by_id = metric  # `measure` has a parameter of that name


def _observe(model: AttachedModel, batch: Batch, items: ItemSet, chosen: Metric) -> Outcome:
    return observe(model, batch, wants=chosen.wants)


# -- of the answer's logits -------------------------------------------------------------------------------------------


def logit_difference(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Logit of the answer minus logit of a foil, where the two part; the mean over the item's foils.

    With answer `a` and foil `f`, `t` is the first place where `a[t] != f[t]`. Up to there both are the same text, which
    is given to the model; the value of the foil is `logits[t, a[t]] - logits[t, f[t]]`. Each foil has a `t` of its own.
    Where all of them part at the first token, this is `logit(a[0])` minus the mean of `logit(f[0])`.

    Raises:
        InputError: an item has no foil, or one of which the answer is the beginning, or the other way round.
    """
    logits = _logits(outcome)
    rows, columns, right, wrong = [], [], [], []
    for row, each in enumerate(_answered(outcome)):
        if not each.foils:
            raise InputError(f"item {each.id} has no foil; a logit difference needs wrong answers to compare with")
        for foil in each.foils:
            pairs = enumerate(zip(each.answer, foil, strict=False))
            column = next((t for t, (own, other) in pairs if own != other), None)
            if column is None:
                raise InputError(
                    f"item {each.id}: answer {each.item.answer!r} and one of its foils nowhere differ in a token, one "
                    "only goes on where the other ends; give foils that part from the answer"
                )
            rows.append(row)
            columns.append(column)
            right.append(each.answer[column])
            wrong.append(foil[column])
    differences = logits[rows, columns, right] - logits[rows, columns, wrong]
    index = torch.tensor(rows, device=logits.device)
    totals = logits.new_zeros(len(outcome.batch.items)).index_add(0, index, differences)
    return totals / torch.bincount(index)


def probability_difference(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Probability of all right answers minus that of all wrong ones, at the first token.

    `sum p(answer and also) - sum p(foils)`, the measure of the greater-than task of Hanna, Liu and Variengien 2023.
    A first token that several right answers share is counted once, likewise for wrong ones.

    Raises:
        InputError: an item has no foil, or a right and a wrong answer begin with the same token.
    """
    probabilities = _logits(outcome)[:, 0].softmax(dim=-1)
    sign = torch.zeros_like(probabilities)
    for row, each in enumerate(_answered(outcome)):
        right = {ids[0] for ids in (each.answer, *each.also)}
        wrong = {ids[0] for ids in each.foils}
        if not wrong:
            raise InputError(f"item {each.id} has no foil; a probability difference needs items with wrong answers")
        if right & wrong:
            raise InputError(
                f"item {each.id}: a right and a wrong answer begin with the same token {min(right & wrong)}, so their "
                "probabilities cannot be told apart; use items whose answers are one token each, or logit-difference"
            )
        sign[row, sorted(right)] = 1
        sign[row, sorted(wrong)] = -1
    return (probabilities * sign).sum(dim=-1)


def answer_log_probability(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Log-probability of the answer: the sum over its tokens. Other right answers are not added."""
    return _answer_log_probabilities(outcome).sum(dim=-1)


def cross_entropy(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Minus the mean log-probability of the answer's tokens."""
    return -_answer_log_probabilities(outcome).sum(dim=-1) / outcome.predicting.sum(dim=-1)


def answer_rank(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """Place of the true token among all tokens, 1 the best; of several answer tokens the worst.

    Tokens of exactly the same logit share the mean of their places, so a model that prefers nothing has no good rank.
    """
    logits, ids = _logits(outcome), _answer_ids(outcome)
    true = logits.gather(-1, ids[:, :, None])
    above, level = (logits > true).sum(dim=-1), (logits == true).sum(dim=-1)
    ranks = 1 + above + (level - 1) / 2
    return ranks.masked_fill(~outcome.predicting, 0).max(dim=-1).values


def exact_match(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """1 if every token of the answer is the most probable one after those before it, else 0: as greedy decoding goes.

    Another right answer (`also`) counts too where the same run shows it: where all its tokens but the last are those of
    the answer, as with answers of one token. One that parts from the answer earlier is not seen; see
    `exact-match-generated`.
    """
    matches = []
    for best, each in zip(_logits(outcome).argmax(dim=-1).tolist(), _answered(outcome), strict=True):
        seen = [each.answer, *(ids for ids in each.also if ids[:-1] == each.answer[: len(ids) - 1])]
        matches.append(float(any(_begins(best, ids) for ids in seen)))
    return torch.tensor(matches)


# -- of the generated continuation ------------------------------------------------------------------------------------


def exact_match_generated(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """1 if the greedy continuation begins with the ids of the answer, or of another right answer, else 0."""
    assert outcome.generated is not None
    rows = zip(outcome.generated.tolist(), _answered(outcome), strict=True)
    return torch.tensor([float(any(_begins(row, ids) for ids in (each.answer, *each.also))) for row, each in rows])


def refusal(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    """1 if the generated text holds one of the markers of `words/refusals.txt`, else 0.

    Case does not count, typographic apostrophes are taken as plain ones, and any blanks as one.
    """
    return torch.tensor([float(any(marker in _plain(text) for marker in _refusals())) for text in _texts(outcome)])


def rouge_1_recall(outcome: Outcome, clean: Outcome | None = None) -> Float[Tensor, " item"]:
    r"""Share of the answer's words that the generated text has, each at most as often as it has it (ROUGE-1, Lin 2004).

    Words are the matches of `\w+` in the lower-cased text. With other right answers the best of them counts.

    Raises:
        InputError: a right answer has no words.
    """
    shares = []
    for text, each in zip(_texts(outcome), outcome.batch.items, strict=True):
        written = _words(text)
        best = 0.0
        for answer in (each.item.answer, *each.item.also):
            wanted = _words(answer)
            if not wanted:
                raise InputError(f"item {each.id}: the answer {answer!r} has no words, so there is no recall of them")
            best = max(best, (wanted & written).total() / wanted.total())
        shares.append(best)
    return torch.tensor(shares)


# -- beside the clean run ---------------------------------------------------------------------------------------------


def kl_to_clean(outcome: Outcome, clean: Outcome | None) -> Float[Tensor, " item"]:
    """KL(clean || edited) of the next-token distributions, the mean over the places where an answer token is predicted.

    An item without an answer is compared behind its prompt.
    """
    assert clean is not None
    edited, reference = _logits(outcome).log_softmax(dim=-1), _logits(clean).log_softmax(dim=-1)
    # A token that the clean run excludes (log-probability -inf) adds 0.
    terms = torch.where(reference.isneginf(), 0.0, reference.exp() * (reference - edited))
    divergence = terms.sum(dim=-1).masked_fill(~outcome.predicting, 0)
    return divergence.sum(dim=-1) / outcome.predicting.sum(dim=-1)


def cosine_to_clean(outcome: Outcome, clean: Outcome | None) -> Float[Tensor, " item"]:
    """Cosine of the embedding with that of the clean run."""
    assert clean is not None
    assert outcome.embedding is not None
    assert clean.embedding is not None
    return torch.nn.functional.cosine_similarity(outcome.embedding, clean.embedding, dim=-1)


# -- what they share --------------------------------------------------------------------------------------------------


def _logits(outcome: Outcome) -> Float[Tensor, "item token vocab"]:
    assert outcome.logits is not None
    return outcome.logits


def _answered(outcome: Outcome) -> tuple[EncodedItem, ...]:
    """The items. Raises InputError if one has no answer, as partners may."""
    silent = next((each.id for each in outcome.batch.items if not each.answer), None)
    if silent is not None:
        raise InputError(f"item {silent} has no answer, and this metric needs one; use kl-to-clean or other items")
    return outcome.batch.items


def _answer_ids(outcome: Outcome) -> Int[Tensor, "item token"]:
    """Ids of the answers, any id behind the end of one."""
    _answered(outcome)
    return outcome.batch.answers.clamp(min=0).to(_logits(outcome).device)


def _answer_log_probabilities(outcome: Outcome) -> Float[Tensor, "item token"]:
    """Of each answer token; 0 behind the end of an answer."""
    ids = _answer_ids(outcome)
    found = _logits(outcome).log_softmax(dim=-1).gather(-1, ids[:, :, None])[:, :, 0]
    inside: Bool[Tensor, "item token"] = outcome.predicting
    return found.masked_fill(~inside, 0)


def _begins(row: Sequence[int], ids: Ids) -> bool:
    return tuple(row[: len(ids)]) == ids


def _texts(outcome: Outcome) -> tuple[str, ...]:
    if outcome.text is None:
        raise InputError("this metric reads text, and the outcome has only generated ids; give it the text too")
    return outcome.text


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("\u2019", "'").split())


@cache
def _refusals() -> tuple[str, ...]:
    return tuple(_plain(marker) for marker in refusal_markers())


_ANSWER: frozenset[Need] = frozenset({"logits"})
_WRITTEN: frozenset[Need] = frozenset({"generation"})

EXACT_MATCH = Metric("exact-match", "greedy decoding gives the answer", _ANSWER, "higher", "0 or 1", exact_match)

METRICS = (
    Metric("logit-difference", "logit of the answer against foils", _ANSWER, "higher", "logits", logit_difference),
    Metric("probability-difference", "right against wrong", _ANSWER, "higher", "probability", probability_difference),
    Metric("answer-log-probability", "of the whole answer", _ANSWER, "higher", "nats", answer_log_probability),
    Metric("answer-rank", "place of the true token", _ANSWER, "lower", "rank", answer_rank),
    EXACT_MATCH,
    Metric("exact-match-generated", "it writes the answer", _WRITTEN, "higher", "0 or 1", exact_match_generated),
    Metric("cross-entropy", "loss on the answer", _ANSWER, "lower", "nats per token", cross_entropy),
    Metric("kl-to-clean", "drift of predictions", _ANSWER | {"clean"}, "lower", "nats per token", kl_to_clean),
    Metric(
        "cosine-to-clean",
        "embedding against the clean one",
        frozenset({"embedding", "clean"}),
        "higher",
        "cosine",
        cosine_to_clean,
    ),
    Metric("refusal", "what it writes is a refusal", _WRITTEN, "higher", "0 or 1", refusal),
    Metric("rouge-1-recall", "words of the answer in what it writes", _WRITTEN, "higher", "share", rouge_1_recall),
)
