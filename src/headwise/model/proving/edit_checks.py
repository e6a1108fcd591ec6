"""The doctor's checks of edits and of gradients, each against plain hooks on the model or against autograd.

What has to be edited one site at a time is done at a sample of sites, and the detail says how many.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from headwise.heads import Head, KVGroup
from headwise.model import edit, read
from headwise.model.proving.findings import Finding, one_line, share_of, verdict, wavering
from headwise.model.proving.patient import Patient, distance, same, sampled, wide
from headwise.model.proving.rebuilding import Rebuilding, heads_moved, z_under
from headwise.model.site import Site

# Largest difference, relative to the largest value, between two ways to one gradient.
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def zero_two_ways(patient: Patient) -> Finding:
    """A head zeroed by an edit, and its slice zeroed by a plain hook on the projection: the same model output.

    At watched sites a third way must agree, the head zeroed in what the product of pattern and values returned; unless
    something stands in between, which may add to it.
    """
    sites = patient.sites("separable", "projection")
    if not sites:
        return Finding("n/a", patient.why_not("separable", "projection"))
    if patient.wavering:
        return wavering(patient)
    wrong: list[Site] = []
    together = moved = 0
    turns = [sites, *([site] for site in sampled(sites) if len(sites) > 1)]
    for turn in turns:
        with patient.attached.editing(edit.zero(patient.heads(turn))):
            edited = patient.run()
        with patient.multiplying({site.id: 0.0 for site in turn}):
            sliced = patient.run()
        agree = same(edited, sliced)
        if products := [site for site in turn if site.route == "watched" and not site.gated]:
            rest = {site.id: 0.0 for site in turn if site not in products}
            with patient.at_products(products, partial(_with_head_zeroed, patient)), patient.multiplying(rest):
                agree = agree and same(edited, patient.run())
        if not agree:
            wrong += turn
        effective = not same(edited, patient.plain)
        together, moved = together or effective, moved + effective
    if not together and not wrong:
        return Finding("fail", "zeroing a head at every site changed nothing in the output")
    alone = f" and at {len(turns) - 1} of them alone" if len(turns) > 1 else ""
    return verdict(
        wrong,
        f"bit-equal with one head of {share_of(sites, patient)}{alone}; {moved} of {len(turns)} moved the output",
        "the two outputs differ",
    )


def other_heads_keep_bits(patient: Patient) -> Finding:
    """Equal attention of one head makes its z the mean of the visible values, and moves no other head's by a bit."""
    sites = [site for site in patient.sites("rows", "v") if site.n_heads > 1]
    if not sites:
        return Finding("n/a", patient.why_not("rows", "v"))
    if patient.wavering:
        return wavering(patient)
    touched, still, wrong, changed = [], [], [], 0
    chosen = sampled(sites)
    for site in chosen:
        head = patient.drawn[site.id]
        mean = Rebuilding(site, patient.inputs.get("attention_mask"), head)
        with patient.attached.reading(*mean.reads(read.scores, "0")):
            z = z_under(patient, site, edit.uniform(Head(site.id, head)))
        moved = heads_moved(patient, site, z)
        touched += [site] if moved - {head} else []
        # Where the mean is what the head had as it was (one key, or keys all alike) there is nothing to be done.
        still += [] if moved or mean.calls or mean.most_keys < 2 else [site]
        changed += bool(moved)
        wrong += [] if mean.close else [site]
    for sites, complaint in (
        (touched, "other heads moved"),
        (still, "the edit did nothing"),
        (wrong, "z of the edited head is not the mean of the values that it sees"),
    ):
        if sites:
            return verdict(sites, "", complaint)
    if not changed:
        return Finding("n/a", "at the sites drawn, z is the mean of the values as it is")
    return Finding("pass", f"{share_of(chosen, patient)}: the edited head is as computed by hand, all others bit-equal")


def edits_fire_once(patient: Patient) -> Finding:
    """Each edited site fires once per call of its module and once per position, and halving a head halves it once."""
    halved = patient.sites("separable", "projection")
    counted = [site for site in patient.sites("v") if site not in halved]
    sites = [site for site in patient.attached.sites if site in halved or site in counted]
    edits = [edit.scale(patient.heads(halved), 0.5)] if halved else []
    if counted:  # values times 1: an edit that fires and changes nothing
        edits.append(edit.scale([KVGroup(site.id, 0) for site in counted], 1.0, variable="v"))
    with (
        patient.attached.editing(*edits) as opened,
        patient.counting({site.module for site in sites}) as calls,
        patient.seeing_projections(halved) as seen,  # what an edit does to one site may change the length of another
    ):
        edited = patient.run()
    fired = dict.fromkeys(calls, 0)
    for met in opened.fired:
        fired[patient.attached.site(met.site).module] += met.calls
    pieces = {site.module for site in sites if site.chunked}
    # A module that attends more than once in a call is that many sites, as is one that serves several layers.
    due = {path: max(count, sum(site.module == path for site in sites)) for path, count in calls.items()}
    wrong = [site for site in sites if site.module not in pieces and fired[site.module] != due[site.module]]
    positions = {met.site: met.positions for met in opened.fired}
    wholly = [site for site in halved if all(span.projection for span in site.spans)]  # all of its z is taken in
    wrong += [site for site in wholly if positions[site.label] != len(seen[site.id][0])]
    if wrong:
        return verdict(wrong, "", "firings and calls, or firings and positions, do not agree")
    if halved and not patient.wavering:
        with patient.multiplying({site.id: 0.5 for site in halved}):
            expected = patient.run()
        if not same(edited, expected):
            return Finding("fail", f"halving heads once by a plain hook differs by {distance(edited, expected):.2g}")
    return Finding("pass", f"{sum(fired.values())} firings at {len(positions)} sites in {sum(calls.values())} calls")


def groups_map(patient: Patient) -> Finding:
    """With the values of one KV group zeroed, z of its own query heads is 0, and no other head's moves by a bit."""
    if patient.wavering:
        return wavering(patient)
    chosen = sampled(patient.sites("v"))
    if not chosen:
        return Finding("n/a", patient.why_not("v"))
    wrong = []
    for site in chosen:
        group = patient.drawn[site.id] // site.group_size
        own = set(range(group * site.group_size, (group + 1) * site.group_size))
        z = z_under(patient, site, edit.zero(KVGroup(site.id, group), variable="v"))
        rest = z[:, sorted(own)]
        rest = rest[~rest.isnan()]  # rows of padding that see nothing can be NaN under any values
        if heads_moved(patient, site, z) - own or not rest.numel() or bool(rest.any()):
            wrong.append(site)
    sizes = " or ".join(str(size) for size in sorted({site.group_size for site in chosen}))
    return verdict(
        wrong, f"{share_of(chosen, patient)}, {sizes} query heads to a group", "heads and groups do not match"
    )


def gate_gradients(patient: Patient) -> Finding:
    """<z, dM/dz>, summed, is the derivative by a factor on the head's slice, put in by a plain hook or by an edit."""
    sites = patient.sites("separable", "projection")
    if not sites:
        return Finding("n/a", patient.why_not("separable", "projection"))
    if patient.wavering > GRADIENT_TOLERANCE.get(patient.dtype, 1e-2):
        return wavering(patient)
    heads = patient.heads(sites)
    ones = torch.ones(
        len(heads), device=patient.attached.device, dtype=torch.promote_types(patient.dtype, torch.float32)
    )
    with torch.enable_grad(), patient.frozen():
        by_hand = ones.clone().requires_grad_(True)
        try:
            with patient.multiplying({site.id: by_hand[index] for index, site in enumerate(sites)}):
                (expected,) = torch.autograd.grad(patient.loss(), by_hand)
        except RuntimeError as error:
            return Finding("n/a", f"the model itself has no backward here ({one_line(error)})")
        by_edit = ones.clone().requires_grad_(True)
        with patient.attached.editing(edit.scale(heads, by_edit)):
            (edited,) = torch.autograd.grad(patient.loss(), by_edit)
        with patient.attached.reading(read.gate(heads)) as got:
            torch.autograd.backward(patient.loss())
    if not bool(expected.any()):
        return Finding("n/a", "the output does not hang on z of any site")
    gates = [sum(float(wide(piece).sum()) for piece in got.gate.grad.pieces(site.id)) for site in sites]
    off = max(distance(found, expected) for found in (expected.new_tensor(gates), edited))
    detail = f"{len(heads)} heads in one backward, largest relative difference {off:.2g}"
    return Finding("pass" if off <= GRADIENT_TOLERANCE.get(patient.dtype, 1e-2) else "fail", detail)


def _with_head_zeroed(patient: Patient, site: Site, z: Tensor) -> Tensor:
    return z.index_fill(2, torch.tensor([patient.drawn[site.id]], device=z.device), 0.0)
