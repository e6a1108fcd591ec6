"""The rows of `headwise bench uses`: for each use of heads how it finds them, what it sets, and what judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headwise.benches.use_row import CONTROLS, FINDING, Bench, Row, joined
from headwise.find import find
from headwise.fit.function_task import FunctionTask, function_task
from headwise.fit.head_lora import fit_head_lora
from headwise.fit.localized_tuning import Recipe, lofit
from headwise.fit.soft_injection import fit_injection, permuted, task_embedding
from headwise.fit.training import Schedule
from headwise.heads import HeadSet
from headwise.metrics import measure
from headwise.probes import ItemSet, Probe, probe
from headwise.use.decoding.decore import DeCoRe
from headwise.use.evaluating import compare
from headwise.use.evaluation import Comparison
from headwise.use.intervention import Intervention
from headwise.use.knowledge.conflicts import Source, answered_from
from headwise.use.knowledge.juice_heads import choose_juice, juice_heads
from headwise.use.knowledge.knowledge_pruning import choose_pruned
from headwise.use.knowledge.temporal_scan import temporal_scan
from headwise.use.scaling import HeadOffset, HeadRemoval, HeadScaling
from headwise.use.tuning import tuned

TRAINED_CONTROLS = 3
"""Controls that have to be trained themselves."""

MOST_HEADS = 8
N_HEADS = (1, 2, 4, MOST_HEADS)
STRENGTHS = (1.0, 2.0, 4.0)
FACTORS = (0.0, -1.0, -2.0, 2.0, 4.0)
DECORE_HEADS = (2, 4, 8, 16)
FUNCTIONS = ("plural", "continent", "language")
"""Which of them is meant nobody can tell without demonstrations."""
INJECTING = Schedule(steps=200, learning_rate=0.2, validate_every=50, patience=2)
SELECTING, TUNING = Recipe(learning_rate=3e-2, l1=1e-3, epochs=25), Recipe(learning_rate=3e-2, epochs=25)
LOFIT_HEADS = 4
ADAPTING = Schedule(steps=40, learning_rate=3e-3, validate_every=20)
LORA_RANK, LORA_HEADS = 1, 2


@dataclass(frozen=True)
class Use:
    """`title`: what is shown; `how`: where heads and settings are from, and what the controls are."""

    title: str
    how: str
    row: Callable[[Bench], Row]


# -- heads taken out, or made stronger --------------------------------------------------------------------------------


def needle_removed(bench: Bench) -> Row:
    asked = probe("needle").over(words=40)
    ranked = bench.ranked(asked)
    heads = ranked.top(MOST_HEADS)
    found = bench.compared(HeadRemoval(heads), bench.parts(asked).judging)
    return Row.of(found, heads, wanted=-1, note=ranked.note)


def refusal_off(bench: Bench) -> Row:
    return _turned(bench, "refuse")


def refusal_on(bench: Bench) -> Row:
    return _turned(bench, "answer")


def _turned(bench: Bench, wish: str) -> Row:
    """What refusing and answering differ by in the heads, added to them at the last token of the prompt."""
    asked = probe("refusal").over(wish=wish)
    parts, ranked = bench.parts(asked), bench.ranked(asked)
    other = bench.parts(probe("refusal").over(wish="answer" if wish == "refuse" else "refuse"))
    heads = ranked.top(MOST_HEADS)
    own, wanted = (task_embedding(bench.model, each.finding, heads) for each in (parts, other))
    candidates = [
        HeadOffset({label: wanted[label] - own[label] for label in ranked.top(k).labels}, strength, scope="last")
        for k in sorted({min(k, len(heads)) for k in N_HEADS})
        for strength in STRENGTHS
    ]
    choosing = _foil_wanted(parts.choosing)
    reached = [float(measure(bench.model, choosing, under=each).mean()) for each in candidates]
    best = candidates[reached.index(max(reached))]
    note = f"strength {best.strength:g}; for what the model does without it {ranked.note}"
    # What is judged is whether it refuses: an answer has to be right as well, which these heads may not see to.
    items, way = (parts.judging, -1) if wish == "refuse" else (_foil_wanted(parts.judging), 1)
    return Row.of(bench.compared(best, items), best.heads, wanted=way, note=note)


def memory_by_scaling(bench: Bench) -> Row:
    return _scaled(bench, _told_to_trust("context"), lambda items: answered_from(items, "memory"))


def context_by_scaling(bench: Bench) -> Row:
    return _scaled(bench, _told_to_trust("memory"), lambda items: answered_from(items, "context"))


def _scaled(bench: Bench, asked: Probe, wanted: Callable[[ItemSet], ItemSet]) -> Row:
    """The heads that the behaviour hangs on, scaled so that the model does the other thing."""
    parts, ranked = bench.parts(asked), bench.ranked(asked)
    sizes = sorted({min(k, len(ranked.heads)) for k in N_HEADS})
    candidates = [HeadScaling(ranked.top(k), factor) for k in sizes for factor in FACTORS]
    best = tuned(bench.model, candidates, wanted(parts.choosing)).best
    assert isinstance(best, HeadScaling)
    note = f"factor {best.factor:g}; for what the model does without it {ranked.note}"
    return Row.of(bench.compared(best, wanted(parts.judging)), best.heads, note=note)


def _foil_wanted(items: ItemSet) -> ItemSet:
    """The same prompts with their one wrong answer as the right one."""
    swapped = tuple(
        replace(
            each,
            item=replace(each.item, answer=each.item.foils[0], foils=(each.item.answer,), also=(), twin=None),
            answer=each.foils[0],
            foils=(each.answer,),
            also=(),
            twin=None,
        )
        for each in items
    )
    return replace(items, items=swapped)


# -- memory against context -------------------------------------------------------------------------------------------


def memory_by_ph3(bench: Bench) -> Row:
    return _pruned(bench, "memory")


def context_by_ph3(bench: Bench) -> Row:
    return _pruned(bench, "context")


def memory_by_juice(bench: Bench) -> Row:
    return _just_run_twice(bench, "memory")


def context_by_juice(bench: Bench) -> Row:
    return _just_run_twice(bench, "context")


def _pruned(bench: Bench, source: Source) -> Row:
    """Where the instruction asks for the other source."""
    other: Source = "context" if source == "memory" else "memory"
    parts = bench.parts(_told_to_trust(other, twin="subject-and-told"))
    scores = find("memory-context", bench.model, parts.finding, heads=other)
    best = choose_pruned(bench.model, scores, parts.choosing).best
    judging = answered_from(parts.judging, source)
    return Row.of(bench.compared(best, judging), best.acts_on)


def _just_run_twice(bench: Bench, source: Source) -> Row:
    other: Source = "context" if source == "memory" else "memory"
    parts = bench.parts(_told_to_trust(other)).each(lambda items: answered_from(items, source))
    four = [replace(parts.finding, items=parts.finding.items[start : start + 4]) for start in (0, 4)]
    found = juice_heads(bench.model, four)
    chosen = choose_juice(
        bench.model, found, parts.choosing, enhance_by=(0.0, 1.0, 3.0, 5.0), suppress_by=(0.0, 1.0, 2.0)
    )
    best: Any = chosen.best
    note = f"{best.enhance} stronger by {best.enhance_by:g}, {best.suppress} weaker by {best.suppress_by:g}"
    return Row.of(bench.compared(best, parts.judging), best.acts_on, note=note)


def _told_to_trust(source: Source, twin: str = "instruction") -> Probe:
    return probe("conflict").over(trust=source, twin=twin)


def decore_on_conflicts(bench: Bench) -> Row:
    """Against greedy decoding, where the text is to be trusted."""
    parts = bench.parts(_told_to_trust("context"))
    scores = find("retrieval", bench.model, items=FINDING, seed=bench.seed)
    candidates = [DeCoRe.from_scores(scores, n, relative_top=top) for n in DECORE_HEADS for top in (0.0, 0.1)]
    best = tuned(bench.model, candidates, parts.choosing).best
    assert isinstance(best, DeCoRe)
    note = f"{len(best.heads)} heads, relative_top {best.relative_top:g}"
    return Row.of(bench.compared(best, parts.judging), best.heads, note=note)


# -- fitted -----------------------------------------------------------------------------------------------------------


def soft_injection(bench: Bench) -> Row:
    def of(task: FunctionTask) -> tuple[Intervention, list[Intervention]]:
        embedding = task_embedding(bench.model, task.shown)

        def fitted(given: Mapping[str, Tensor]) -> Intervention:
            return fit_injection(
                bench.model, task.fit, given, validation=task.validation, schedule=INJECTING, seed=bench.seed
            ).injection

        return fitted(embedding), [fitted(permuted(embedding, seed)) for seed in range(TRAINED_CONTROLS)]

    return _without_examples(bench, of, "all heads")


def by_lofit(bench: Bench) -> Row:
    def of(task: FunctionTask) -> tuple[Intervention, list[Intervention]]:
        given: dict[str, Any] = {"selecting": SELECTING, "tuning": TUNING, "validation": task.validation}
        own = lofit(bench.model, task.fit, LOFIT_HEADS, seed=bench.seed, **given)
        drawn = [
            lofit(bench.model, task.fit, LOFIT_HEADS, control="random-heads", ranked=own.ranked, seed=seed + 1, **given)
            for seed in range(TRAINED_CONTROLS)
        ]
        return own.offset, [each.offset for each in drawn]

    return _without_examples(bench, of, f"{LOFIT_HEADS} heads for each function")


def head_lora(bench: Bench) -> Row:
    def of(task: FunctionTask) -> tuple[Intervention, list[Intervention]]:
        heads = find("gate-gradient", bench.model, task.shown).top(LORA_HEADS)

        def fitted(seed: int, control: Literal["random-heads"] | None = None) -> Intervention:
            return fit_head_lora(
                bench.model,
                heads,
                task.fit,
                rank=LORA_RANK,
                schedule=ADAPTING,
                validation=task.validation,
                control=control,
                seed=seed,
            ).adapter

        return fitted(bench.seed), [fitted(seed, "random-heads") for seed in range(TRAINED_CONTROLS)]

    return _without_examples(bench, of, f"rank {LORA_RANK} in {LORA_HEADS} heads for each function")


def _without_examples(
    bench: Bench, fitted: Callable[[FunctionTask], tuple[Intervention, list[Intervention]]], note: str
) -> Row:
    """The words of the test of several functions, without demonstrations; each function has what was fitted to it."""
    found, shown, heads = [], [], HeadSet()
    for function in FUNCTIONS:
        task = function_task(function, bench.model.tokenizer, seed=bench.seed)
        own, others = fitted(task)
        found.append(compare(bench.model, own, task.test, metric="exact-match", controls=others))
        shown.append(measure(bench.model, task.test_shown, "exact-match"))
        heads = heads | own.acts_on
    demonstrated = float(torch.cat(shown).mean())
    return Row.of(joined(found), heads, note=f"{note}; with ten demonstrations in the prompt {demonstrated:.3f}")


# -- dated facts ------------------------------------------------------------------------------------------------------


def temporal_edit(bench: Bench) -> Row:
    """What is added is of each item's own source, the same question of the other year, as in the scan."""
    parts = bench.parts(probe("dated"))
    label, coefficient = temporal_scan(bench.model, parts.finding, seed=bench.seed).best
    scans = [
        temporal_scan(bench.model, parts.judging, groups=[label], coefficients=[coefficient], seed=draw)
        for draw in range(CONTROLS)
    ]
    edited = scans[0].hit[0, 0].double().numpy()  # an item that is answered so without the edit is no hit
    found = Comparison(
        probe="dated",
        metric="exact-match",
        unit="0 or 1",
        better="higher",
        item_ids=parts.judging.ids,
        clean=np.zeros_like(edited),
        edited=edited,
        controls=np.stack([each.control_hit[0, 0].double().numpy() for each in scans]),
        control_heads=tuple(each.groups for each in scans),
        match="given",
    )
    return Row.of(found, scans[0].groups, note=f"coefficient {coefficient:g}")


_KNOCKED_OUT = "Heads by exact knock-outs on items of their own: those verified alone, or all where none is, by effect."
_CHOSEN = f"{_KNOCKED_OUT} How many and by what factor is chosen on further items. Controls: random heads."

_WORDS = (
    f"{', '.join(FUNCTIONS)}; words that nothing was fitted on, which the models know from prompts with demonstrations."
)
_STEERED = (
    f"{_KNOCKED_OUT} To each its mean difference between refusing and answering is added at the last token of the "
    "prompt; how many and how strongly is chosen on further items. Controls: the same vectors in random heads."
)

USES: Mapping[str, Use] = {
    "needle-removed": Use(
        "Needles are no longer found without their heads", f"{_KNOCKED_OUT} Controls: random heads.", needle_removed
    ),
    "refusal-off": Use("Refusals are fewer where they are asked for", _STEERED, refusal_off),
    "refusal-on": Use("What is to be answered is refused", _STEERED, refusal_on),
    "memory-by-scaling": Use("Memory against the text that is to be trusted, by scaling", _CHOSEN, memory_by_scaling),
    "context-by-scaling": Use("The text against memory that is to be trusted, by scaling", _CHOSEN, context_by_scaling),
    "memory-by-ph3": Use(
        "Memory against the text, context heads taken out (PH3)",
        "How many is chosen on further items. Controls: random heads.",
        memory_by_ph3,
    ),
    "context-by-ph3": Use(
        "The text against memory, memory heads taken out (PH3)",
        "How many is chosen on further items. Controls: random heads.",
        context_by_ph3,
    ),
    "memory-by-juice": Use(
        "Memory against the text, in two runs (JUICE)",
        "Heads on two kinds of four items, both alphas on further ones. Controls: random heads.",
        memory_by_juice,
    ),
    "context-by-juice": Use(
        "The text against memory, in two runs (JUICE)",
        "Heads on two kinds of four items, both alphas on further ones. Controls: random heads.",
        context_by_juice,
    ),
    "decore": Use(
        "DeCoRe against greedy decoding, where the text is to be trusted",
        "Heads by retrieval scores on needles; how many, and the filter, chosen on conflicts. Controls: random heads.",
        decore_on_conflicts,
    ),
    "soft-injection": Use(
        "Three functions without demonstrations, by Soft Injection",
        f"{_WORDS} Controls: the embeddings of other heads, fitted alike.",
        soft_injection,
    ),
    "lofit": Use(
        "Three functions without demonstrations, by LoFiT",
        f"{_WORDS} Controls: offsets in random heads, with as many parameters.",
        by_lofit,
    ),
    "head-lora": Use(
        "Three functions without demonstrations, by LoRA in two heads",
        f"{_WORDS} Heads by gate gradients on prompts with demonstrations. Controls: random heads, as many parameters.",
        head_lora,
    ),
    "temporal-edit": Use(
        "A dated question is answered for another year, by an edit of one KV group's values",
        "Group and coefficient by a scan of all; what is added is from the same question of the other year. Controls: "
        "random vectors of the same length in the same group.",
        temporal_edit,
    ),
}
"""By id, in the order of the page."""
