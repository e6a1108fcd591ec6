"""The doctor's checks of what hangs on positions: the same edits with and without padding, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.errors import Refusal
from headwise.heads import MAIN
from headwise.model import edit
from headwise.model.finding.example import can_generate, placeholder_tokens
from headwise.model.proving.findings import Finding, one_line
from headwise.model.proving.patient import Patient, distance, numbered, sampled

# Largest difference, relative to the largest value, between runs of one input in batches of different shape. Eager
# kernels take softmax in fp32 in an fp64 model, too.
BATCH_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

NEW_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two runs are apart, relative to the largest value, and over what."""

    off: float
    where: str


def left_padding(patient: Patient) -> Finding:
    """An edited row gives the same output alone and left-padded in a batch, in one forward and while generating."""
    if patient.text is None:
        return Finding("n/a", "not a decoder that runs on padded tokens alone")
    return _with_what_is_served(_under_left_padding, patient)


def cache(patient: Patient) -> Finding:
    """An edited generation gives the same scores with and without a cache, and fires once in each of its forwards."""
    return _with_what_is_served(_with_and_without_cache, patient)


def _with_what_is_served(examine: Callable[[Patient, Sequence[edit.Edit]], Finding], patient: Patient) -> Finding:
    """The finding with all of the edits; where some of them are refused, with the others."""
    edits = _positional_edits(patient)
    if not edits:
        return Finding("n/a", patient.why_not("cache") if not patient.sites("cache") else "no site allows such edits")
    try:
        return examine(patient, edits)
    except Refusal as refusal:
        served = [one for one in edits if _is_served(one, patient)]
        if not served or len(served) == len(edits):
            raise
        finding = examine(patient, served)
        return replace(finding, detail=f"{finding.detail}; refused: {refusal}")


def _is_served(one: edit.Edit, patient: Patient) -> bool:
    try:
        with patient.attached.editing(one):
            if can_generate(patient.model):
                _generated(patient, patient.inputs)
            else:
                patient.run()
    except Refusal:
        return False
    return True


def _under_left_padding(patient: Patient, edits: Sequence[edit.Edit]) -> Finding:
    assert patient.text is not None
    alone, batch = _padded(patient.text)

    def both() -> tuple[Tensor, Tensor]:
        together, single = patient.run(numbered(patient.model, batch)), patient.run(numbered(patient.model, alone))
        return together[1:, -single.shape[1] :], single

    try:
        padded, single = both()
    except Exception as error:
        return Finding("n/a", f"the model itself does not run on padded tokens alone ({one_line(error)})")
    plain = distance(padded, single)
    with patient.attached.editing(*edits):
        padded, edited = both()
        apart = Apart(distance(padded, edited), "one forward")
        if can_generate(patient.model):
            generated = _apart(_generated(patient, batch), _generated(patient, alone), row=1)
            apart = Apart(max(apart.off, generated.off), f"{apart.where} and {generated.where}")
    if apart.off > BATCH_TOLERANCE.get(patient.dtype, 1e-2) and can_generate(patient.model):
        # Generation may number positions in another way than the forwards here were told to.
        plain = max(plain, _apart(_generated(patient, batch), _generated(patient, alone), row=1).off)
    return _compared(patient, apart, distance(edited, single), plain, edits, "under left padding")


def _with_and_without_cache(patient: Patient, edits: Sequence[edit.Edit]) -> Finding:
    if not patient.sites("cache") or not can_generate(patient.model):
        return Finding("n/a", patient.why_not("cache"))
    try:
        plain = _generated(patient, patient.inputs)
        own = _apart(plain, _generated(patient, patient.inputs, use_cache=False))
    except Exception as error:
        return Finding("n/a", f"the model itself does not generate with and without a cache ({one_line(error)})")
    with patient.attached.editing(*edits) as opened:
        towers = {site.label: site.tower for site in patient.attached.sites}  # a wrapper's generate passes it by
        with patient.counting(set(towers.values())) as forwards:
            cached = _generated(patient, patient.inputs)
        wrong = [met for met in opened.fired if met.calls != forwards[towers[met.site]]]
        uncached = _generated(patient, patient.inputs, use_cache=False)
    if wrong:
        met = wrong[0]
        return Finding(
            "fail", f"{met.what} fired {met.calls} times at {met.site} in {forwards[towers[met.site]]} forwards"
        )
    moved = distance(cached.logits[0], plain.logits[0])
    return _compared(patient, _apart(cached, uncached), moved, own.off, edits, "with and without its cache")


# -- parts ----------------------------------------------------------------------------------------------------


def _positional_edits(patient: Patient) -> list[edit.Edit]:
    """Edits whose meaning hangs on positions: the first token, the predicting one, all that is visible, the decoded."""
    cached = [site for site in patient.sites("cache") if site.kind == "self"]
    stack = next((site.id.stack for site in cached if site.id.stack == MAIN), cached[0].id.stack if cached else MAIN)
    main = [site for site in cached if site.id.stack == stack]
    edits = []
    if scaled := [site for site in main if site.capabilities["separable"] and site.capabilities["projection"]]:
        edits += [edit.scale(site.heads, -2.0, scope="last") for site in sampled(scaled)]
    if rows := [site for site in main if site.capabilities["rows"]]:
        edits.append(edit.reweight(rows[-1].heads, 50.0, keys="first"))
        edits.append(edit.uniform(rows[0].heads))
    valued = [site for site in main if site.capabilities["v"]]
    if not edits:
        edits += [edit.scale(site.groups, -2.0, variable="v", scope="prompt") for site in sampled(valued)]
    return [*edits, *(edit.scale(site.groups, 3.0, variable="v", scope="decode") for site in sampled(valued))]


def _padded(text: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The end of the example's first row alone; and as the second row of a batch, left-padded."""
    ids = text["input_ids"]
    cut = ids.shape[1] // 3
    short = ids[:1, cut:]
    mask = torch.ones_like(ids[:2])
    mask[1, :cut] = 0
    alone = {"input_ids": short, "attention_mask": torch.ones_like(short)}
    return alone, {"input_ids": torch.cat([ids[:1].flip(1), ids[:1]]), "attention_mask": mask}


def _generated(patient: Patient, inputs: Any, use_cache: bool = True) -> Any:
    return patient.attached.generate(
        **{name: value for name, value in inputs.items() if name not in ("labels", "position_ids")},
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        bad_words_ids=[[token] for token in placeholder_tokens(patient.model)] or None,  # they stand for a picture
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _apart(one: Any, other: Any, row: int | None = None) -> Apart:
    """Largest difference of two generations' logits, over the tokens up to the first that differs.

    With `row`, that row of the first generation is compared with the only one of the other.
    """
    off, tokens = 0.0, 0
    for index in range(len(other.sequences)):
        mine = index if row is None else row
        for step in range(len(other.logits)):
            off, tokens = max(off, distance(one.logits[step][mine], other.logits[step][index])), tokens + 1
            token = step - len(other.logits)
            if bool((one.sequences[mine, token] != other.sequences[index, token]).any()):  # a token may be several
                break  # a tie broken the other way: what follows has another prefix
    return Apart(off, f"{tokens} generated tokens")


def _compared(
    patient: Patient, apart: Apart, moved: float, plain: float, edits: Sequence[edit.Edit], when: str
) -> Finding:
    """Verdict on edited runs that should agree, as they do within `plain` when nothing is edited.

    An edit at a wrong place is about as far off as it moves the output, so runs agree only if closer than that.
    """
    off, tolerance = apart.off, BATCH_TOLERANCE.get(patient.dtype, 1e-2)
    named = ", ".join(dict.fromkeys(f"{one.name} ({one.scope})" for one in edits))
    if plain > tolerance:
        return Finding("n/a", f"the model itself differs {when}, by {plain:.2g} with nothing edited")
    if not moved:
        return Finding("fail", f"{named} changed nothing in the output")
    if off <= tolerance and off < moved / 4:
        return Finding("pass", f"{named}: {off:.2g} apart in {apart.where}, moved by {moved:.2g}")
    if off <= tolerance and off <= 4 * plain:
        return Finding("n/a", f"{named} move the output by {moved:.2g}, too little beside its own {plain:.2g} to tell")
    return Finding("fail", f"{named}: {off:.2g} apart, by {plain:.2g} with nothing edited")
