"""What an intervention is worth: with it and without, against the same on random heads, and what it does elsewhere.

    found = use.evaluate(model, use.HeadRemoval("L2H1, L3H4"), "needle")
    print(found)
    found.target.change, found.target.interval, found.target.excess, found.target.p

Random heads are as many in the same layers (`sweep.matched_sets`), never the intervention's own. An intervention moves
to them with all that it knows of each head (`Intervention.on`). The statistics are those of verdicts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwise.errors import InputError, Refusal
from headwise.metrics import Metric, measure
from headwise.metrics import metric as metric_named
from headwise.model.attached import AttachedModel
from headwise.probes import EncodedItem, ItemSet, Probe, encode
from headwise.probes import probe as probe_named
from headwise.probes.outcome import observe, places
from headwise.sweep import matched_sets
from headwise.use.evaluation import Comparison, Evaluation, Sample
from headwise.use.intervention import Intervention, Together
from headwise.verify.gathering import every_head
from headwise.verify.verifying import Finding, unseen_items

CONTROLS = 50
"""Sets of random heads: as many as a verdict wants for a studentised p."""
OFF_TARGET_CONTROLS = 5
OFF_TARGET_ITEMS = 32
SAMPLE_TOKENS = 24
COST_TOKENS = 32
COST_TURNS = 5

Controls = int | Sequence[Intervention]


def evaluate(
    model: AttachedModel,
    intervention: Intervention,
    items: str | Path | Probe | ItemSet,
    *,
    metric: str | Metric | None = None,
    n: int = 64,
    off_target: str | Sequence[str] | None = "text",
    controls: Controls = CONTROLS,
    samples: int = 3,
    finding: Finding | None = None,
    seed: int = 0,
) -> Evaluation:
    """Run items with the intervention, without it, and with the same on random heads.

    Args:
        items: encoded items, or what `verify` takes: the id of a probe, a probe, or a probe file of your own. They must
            not be those that chose the heads or tuned the strength; see `finding`.
        metric: None is that of the items' probe.
        n: how many items of a probe are drawn.
        off_target: probes on which the intervention should change nothing, each by its own metric; None for none.
        controls: how many sets of random heads; 0 for none. Or the controls themselves, where they have to be made as
            the intervention was, such as adapters that were trained on random heads.
        samples: of how many items the text is written with and without.
        finding: the items that chose or tuned anything, as in `verify`. They are left out. Left out itself, encoded
            items are used as they are; of a probe what `find` uses by default is taken to have chosen, of a file its
            finding half.
        seed: of items and random heads.

    Raises:
        InputError: the intervention does not fit the model; no items; an unknown metric or probe.
        Refusal: the model cannot give what the metric needs, or cannot serve the intervention.
    """
    if not isinstance(model, AttachedModel):
        raise InputError(f"evaluate takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    tested = unseen_items(model, items, n, finding, seed)
    drawn, match, notes = _controls(model, intervention, controls, seed)
    target = compare(model, intervention, tested, metric=metric, controls=drawn, match=match)
    elsewhere = []
    for probe in [off_target] if isinstance(off_target, str) else off_target or ():
        try:
            elsewhere.append(_elsewhere(model, intervention, probe, drawn[:OFF_TARGET_CONTROLS], match, seed))
        except (InputError, Refusal) as error:
            notes.append(f"nothing off target on {probe}: {error}")
    written: tuple[Sample, ...] = ()
    cost = float("nan")
    try:
        written = _samples(model, intervention, tested, samples)
        cost = cost_per_token(model, intervention, tested)
    except Refusal as error:
        notes.append(f"nothing written: {error}")
    return Evaluation(intervention, target, tuple(elsewhere), written, cost, tuple(notes))


def compare(
    model: AttachedModel,
    intervention: Intervention,
    items: ItemSet,
    *,
    metric: str | Metric | None = None,
    controls: Controls = CONTROLS,
    match: str = "given",
    seed: int = 0,
) -> Comparison:
    """The target metric alone: every item without, with, and with each control. Arguments and errors of `evaluate`.

    `match` says how the controls relate to the intervention, where they are given.
    """
    chosen = metric if isinstance(metric, Metric) else metric_named(items.metric if metric is None else metric)
    if isinstance(controls, int):
        controls, match, _ = _controls(model, intervention, controls, seed)
    values = [measure(model, items, chosen, under=each).double().numpy() for each in (intervention, *controls)]
    return Comparison(
        probe=items.probe,
        metric=chosen.id,
        unit=chosen.unit,
        better=chosen.better,
        item_ids=items.ids,
        clean=measure(model, items, chosen).double().numpy(),
        edited=values[0],
        controls=np.array(values[1:]).reshape(len(controls), len(items)),
        control_heads=tuple(each.acts_on for each in controls),
        match=match,
    )


def random_heads(model: AttachedModel, intervention: Intervention, n: int, seed: int = 0) -> tuple[Intervention, ...]:
    """The intervention on `n` sets of random heads, as many in each layer as its own, or fewer sets where there are
    not so many.

    Raises:
        InputError: it names no heads, or heads that the model does not have.
        Refusal: no other heads are left to draw.
    """
    return _drawn(model, intervention, n, seed)[0]


def cost_per_token(model: AttachedModel, intervention: Intervention, items: ItemSet) -> float:
    """Time per token in `generate` with the intervention over that without; the prompt is counted with it.

    One prompt, 32 new tokens, both ways in turns, the ratio of the medians. CPU time of the process; on other devices
    the clock's, after all is computed.

    Raises:
        Refusal: the model does not generate, or has no room behind the prompt.
    """
    item = min(items, key=lambda each: len(each.prompt))
    network: Any = model.model
    room = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tokens = COST_TOKENS if not isinstance(room, int) else min(COST_TOKENS, room - len(item.prompt))
    if tokens < 1 or not getattr(network, "can_generate", lambda: False)():
        raise Refusal(f"{model.name} cannot write {COST_TOKENS} tokens behind a prompt, so a token has no cost")
    ids = torch.tensor([item.prompt + items.suffix], device=model.device)
    asked = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    taken: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(COST_TURNS + 1):
        for edited in (bool(turn % 2), not turn % 2):  # neither always comes first
            with _opened(model, intervention if edited else None, replace(items, items=(item,))):
                start = _now(model.device)
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=items.pad, **asked)
                taken[edited].append(_now(model.device) - start)
    with_it, without = taken[True][1:], taken[False][1:]  # the first of each warms up
    return statistics.median(with_it) / statistics.median(without)


def _controls(
    model: AttachedModel, intervention: Intervention, wanted: Controls, seed: int
) -> tuple[tuple[Intervention, ...], str, list[str]]:
    """The controls, how they match, and why there are none."""
    if not isinstance(wanted, int):
        return tuple(wanted), "given", []
    if wanted < 0 or isinstance(wanted, bool):
        raise InputError(f"controls={wanted!r} is no number of control sets; give 0 or more, or interventions")
    if not wanted:
        return (), "", []
    if not intervention.acts_on:
        return (), "", [f"no random heads: {intervention.id} names no heads of its own"]
    try:
        drawn, match = _drawn(model, intervention, wanted, seed)
    except Refusal as error:
        return (), "", [f"no random heads: {error}"]
    return drawn, match, []


def _drawn(model: AttachedModel, intervention: Intervention, n: int, seed: int) -> tuple[tuple[Intervention, ...], str]:
    own = intervention.acts_on
    if not own:
        raise InputError(f"{intervention.id} names no heads, so there is nothing to put random heads in place of")
    if own.kind == "group":
        available = model.groups(None).filter(lambda each: each.stack in own.stacks)
    else:
        model.heads(own)
        available = every_head(model, own.stacks)
    found = matched_sets(own, available, n, seed)
    if not found.sets:
        raise Refusal(f"{intervention.id} acts on {len(own)} of {len(available)} {own.kind}s, so no others are left")
    return tuple(intervention.on(each) for each in found.sets), found.match


def _elsewhere(
    model: AttachedModel,
    intervention: Intervention,
    probe: str,
    controls: Sequence[Intervention],
    match: str,
    seed: int,
) -> Comparison:
    if model.tokenizer is None:
        raise Refusal(f"{model.name} has no tokenizer, so no probe can be written for it")
    items = encode(probe_named(probe), model, n=OFF_TARGET_ITEMS, seed=f"off target/{seed}")
    everywhere = [_outside_spans(each) for each in (intervention, *controls)]
    return compare(model, everywhere[0], items, controls=everywhere[1:], match=match)


def _outside_spans(intervention: Intervention) -> Intervention:
    """What acts in a span of the target's own acts at all positions elsewhere, as in a verdict."""
    if isinstance(intervention, Together):
        return intervention.but(parts=tuple(map(_outside_spans, intervention.parts)))
    scope = intervention.settings.get("scope")
    return intervention.but(scope="all") if isinstance(scope, str) and "span:" in scope else intervention


def _samples(model: AttachedModel, intervention: Intervention, items: ItemSet, n: int) -> tuple[Sample, ...]:
    shown = replace(items, items=items.items[:n])
    if not shown.items:
        return ()
    without, with_it = (_written(model, each, shown) for each in (None, intervention))
    rows = zip(shown, without, with_it, strict=True)
    return tuple(Sample(item.id, _prompt(item), item.item.answer, plain, steered) for item, plain, steered in rows)


def _written(model: AttachedModel, intervention: Intervention | None, items: ItemSet) -> Iterable[str]:
    for batch in items.batches():
        at = places(model, batch)
        with _under(model, intervention, at.spans, at.prompt_length):
            yield from observe(model, batch, wants={"generation"}, new_tokens=SAMPLE_TOKENS).text or ()


def _prompt(item: EncodedItem) -> str:
    prompt = item.item.prompt
    return prompt if isinstance(prompt, str) else "\n".join(f"{each.role}: {each.content}" for each in prompt)


@contextmanager
def _opened(model: AttachedModel, intervention: Intervention | None, items: ItemSet) -> Iterator[None]:
    (batch,) = items.batches(len(items), answers=False)
    at = places(model, batch)
    with _under(model, intervention, at.spans, at.prompt_length):
        yield


def _under(
    model: AttachedModel, intervention: Intervention | None, spans: Any, prompt_length: int | None
) -> AbstractContextManager[Any]:
    return nullcontext() if intervention is None else intervention(model, spans=spans, prompt_length=prompt_length)


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()
