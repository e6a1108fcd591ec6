"""The doctor's checks, each against a second way that does not go through headwise (see `patient`).

A check that covers every site at once costs a run or two. What has to be edited one site at a time is done at a sample
of sites, and the detail says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.heads import Head, KVGroup
from headwise.model import edit, read
from headwise.model.discover import LINEAR_TOLERANCE
from headwise.model.patient import Patient, distance, same, sampled, slices_of, wide
from headwise.model.projection import first
from headwise.model.recording import ROW_TOLERANCE
from headwise.model.site import Site

# Largest difference, relative to the largest value, between two ways to one gradient.
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Finding:
    """Outcome of one check."""

    status: Literal["pass", "fail", "n/a"]
    detail: str


# -- bits ----------------------------------------------------------------------------------------------------


def no_op(patient: Patient) -> Finding:
    """Out of the seam, attached, and with reads in force at every site: the same bits."""
    if patient.wavering:
        return _wavering(patient)
    attached = patient.run()
    labels = [site.id for site in patient.attached.sites]
    reads = [make(labels, reduce=_nothing) for make in (read.q, partial(read.z, point="pre_gate"))]
    if rows := [site.id for site in patient.sites("rows")]:
        reads += [make(rows, reduce=_nothing) for make in (read.scores, read.rows, read.statistics)]
    if projected := [site.id for site in patient.sites("projection")]:
        reads.append(read.write(projected, reduce=_nothing))
    with patient.attached.reading(*reads):
        watched = patient.run()
    for output, when in ((attached, "attached and idle"), (watched, "under reads")):
        if not same(output, patient.plain):
            return Finding("fail", f"{when} the output differs by {distance(output, patient.plain):.2g}")
    kinds = ", ".join(asked.name for asked in reads)
    return Finding("pass", f"the same bits out of the seam, attached, and reading {kinds} at {len(labels)} sites")


def z_enters_projection(patient: Patient) -> Finding:
    """z as read equals, value for value, what a plain hook finds entering the projection.

    Behind a gate both are taken at one place, so there one head of z is halved before the gate: its own slice of what
    enters the projection must move, and no other.
    """
    sites = patient.sites("projection")
    if not sites:
        return Finding("n/a", patient.why_not("projection"))
    with (
        patient.attached.reading(read.z(heads=[site.id for site in sites])) as got,
        patient.seeing_projections(sites) as seen,
    ):
        patient.run()
    wrong = [s for s in sites if not same(slices_of(seen[s.id][0], s), got.z[s.id].flatten(0, 1))]
    gated = sampled([site for site in sites if site.gated])
    if gated and patient.wavering:
        return _wavering(patient)
    for site in gated:
        halved = edit.scale(Head(site.id, patient.drawn[site.id]), 0.5, point="pre_gate")
        if _moved(patient, site, _under(patient, site, halved)) != {patient.drawn[site.id]}:
            wrong.append(site)
    behind = f"; a head halved before the gate moves its own slice alone, at {_of(gated, patient)}" if gated else ""
    return _verdict(wrong, f"equal at {_of(sites, patient)}{behind}", "z is not the heads' slice of the input")


def writes_sum(patient: Patient) -> Finding:
    """Writes of all heads, summed, and the bias give the projection's output."""
    sites = patient.sites("projection")
    if not sites:
        return Finding("n/a", patient.why_not("projection"))
    summed = read.write([site.id for site in sites], reduce=lambda write: wide(write).sum(dim=2).flatten(0, 1))
    with patient.attached.reading(summed) as got, patient.seeing_projections(sites) as seen:
        patient.run()
    wrong, worst = [], 0.0
    for site in sites:
        entered, left = seen[site.id]
        with torch.no_grad():
            bias = first(patient.model.get_submodule(str(site.projection))(torch.zeros_like(entered[:1])))
        off = distance(torch.cat(got.write[site.id]) + wide(bias.reshape(1, -1)), left)
        worst = max(worst, off)
        if off > LINEAR_TOLERANCE.get(left.dtype, 1e-2):
            wrong.append(site)
    return _verdict(wrong, f"{_of(sites, patient)}, largest relative difference {worst:.2g}", f"off by {worst:.2g}")


def rows_rebuild_z(patient: Patient) -> Finding:
    """Pattern rows times values, each query head with its own KV head, give the z that the kernel returned."""
    sites = patient.sites("rows")
    if not sites:
        return Finding("n/a", patient.why_not("rows"))
    mask = patient.inputs.get("attention_mask")
    followed = {site.id: _Rebuilding(site, mask) for site in sites}
    reads = [one for number, site in enumerate(sites) for one in followed[site.id].reads(read.rows, str(number))]
    with patient.attached.reading(*reads):
        patient.run()
    compared = [site for site in sites if followed[site.id].calls]
    if not compared:
        return Finding("n/a", "at no site do rows and values cover the same keys")
    worst = max(followed[site.id].off for site in compared)
    wrong = [site for site in compared if not followed[site.id].close]
    return _verdict(wrong, f"{_of(compared, patient)}, largest relative difference {worst:.2g}", f"off by {worst:.2g}")


# -- edits ---------------------------------------------------------------------------------------------------


def zero_two_ways(patient: Patient) -> Finding:
    """A head zeroed by an edit, and its slice zeroed by a plain hook on the projection: the same model output."""
    sites = patient.sites("separable", "projection")
    if not sites:
        return Finding("n/a", patient.why_not("separable", "projection"))
    if patient.wavering:
        return _wavering(patient)
    wrong: list[Site] = []
    together = moved = 0
    turns = [sites, *([site] for site in sampled(sites) if len(sites) > 1)]
    for turn in turns:
        with patient.attached.editing(edit.zero(patient.heads(turn))):
            edited = patient.run()
        with patient.multiplying({site.id: 0.0 for site in turn}):
            sliced = patient.run()
        if not same(edited, sliced):
            wrong += turn
        effective = not same(edited, patient.plain)
        together, moved = together or effective, moved + effective
    if not together and not wrong:
        return Finding("fail", "zeroing a head at every site changed nothing in the output")
    alone = f" and at {len(turns) - 1} of them alone" if len(turns) > 1 else ""
    return _verdict(
        wrong,
        f"bit-equal with one head of {_of(sites, patient)}{alone}; {moved} of {len(turns)} moved the output",
        "the two outputs differ",
    )


def other_heads_keep_bits(patient: Patient) -> Finding:
    """Equal attention of one head makes its z the mean of the visible values, and moves no other head's by a bit."""
    sites = [site for site in patient.sites("rows") if site.n_heads > 1]
    if not sites:
        return Finding("n/a", patient.why_not("rows"))
    if patient.wavering:
        return _wavering(patient)
    touched, still, wrong = [], [], []
    for site in (chosen := sampled(sites)):
        head = patient.drawn[site.id]
        mean = _Rebuilding(site, patient.inputs.get("attention_mask"), head)
        with patient.attached.reading(*mean.reads(read.scores, "0")):
            z = _under(patient, site, edit.uniform(Head(site.id, head)))
        moved = _moved(patient, site, z)
        touched += [site] if moved - {head} else []
        still += [] if moved else [site]
        wrong += [] if mean.close else [site]
    for sites, complaint in (
        (touched, "other heads moved"),
        (still, "the edit did nothing"),
        (wrong, "z of the edited head is not the mean of the values that it sees"),
    ):
        if sites:
            return _verdict(sites, "", complaint)
    return Finding("pass", f"{_of(chosen, patient)}: the edited head is as computed by hand, all others bit-equal")


def edits_fire_once(patient: Patient) -> Finding:
    """Each edited site fires once per call of its module and once per position, and halving a head halves it once."""
    sites, halved = patient.attached.sites, patient.sites("separable", "projection")
    counted = [site for site in sites if site not in halved]
    edits = [edit.scale(patient.heads(halved), 0.5)] if halved else []
    if counted:  # values times 1: an edit that fires and changes nothing
        edits.append(edit.scale([KVGroup(site.id, 0) for site in counted], 1.0, variable="v"))
    with (
        patient.attached.editing(*edits) as opened,
        patient.counting({site.module for site in sites}) as calls,
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
    wrong += [site for site in halved if positions[site.label] != len(patient.entering[site.id])]
    if wrong:
        return _verdict(wrong, "", "firings and calls, or firings and positions, do not agree")
    if halved and not patient.wavering:
        with patient.multiplying({site.id: 0.5 for site in halved}):
            expected = patient.run()
        if not same(edited, expected):
            return Finding("fail", f"halving heads once by a plain hook differs by {distance(edited, expected):.2g}")
    return Finding("pass", f"{sum(fired.values())} firings at {len(positions)} sites in {sum(calls.values())} calls")


def groups_map(patient: Patient) -> Finding:
    """With the values of one KV group zeroed, z of its own query heads is 0, and no other head's moves by a bit."""
    if patient.wavering:
        return _wavering(patient)
    chosen = sampled(patient.attached.sites)
    wrong = []
    for site in chosen:
        group = patient.drawn[site.id] // site.group_size
        own = set(range(group * site.group_size, (group + 1) * site.group_size))
        z = _under(patient, site, edit.zero(KVGroup(site.id, group), variable="v"))
        rest = z[:, sorted(own)]
        rest = rest[~rest.isnan()]  # rows of padding that see nothing can be NaN under any values
        if _moved(patient, site, z) - own or not rest.numel() or bool(rest.any()):
            wrong.append(site)
    sizes = " or ".join(str(size) for size in sorted({site.group_size for site in chosen}))
    return _verdict(wrong, f"{_of(chosen, patient)}, {sizes} query heads to a group", "heads and groups do not match")


def gate_gradients(patient: Patient) -> Finding:
    """<z, dM/dz>, summed, is the derivative by a factor on the head's slice, put in by a plain hook or by an edit."""
    sites = patient.sites("separable", "projection")
    if not sites:
        return Finding("n/a", patient.why_not("separable", "projection"))
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


# -- parts ---------------------------------------------------------------------------------------------------


class _Rebuilding:
    """Follows one site through a forward: its values, then its rows, then z; only the largest difference is kept.

    Rows are patterns; or scores, which then stand for equal attention to whatever they do not hide. With `head` that
    one alone is compared.
    """

    def __init__(self, site: Site, mask: Any, head: int | None = None) -> None:
        self.off, self.calls, self.close = 0.0, 0, True
        self._site = site
        self._heads = list(range(site.n_heads)) if head is None else [head]
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._values = self._rows = torch.zeros(0)

    def reads(self, rows: Callable[..., read.Read], name: str) -> tuple[read.Read, ...]:
        """What has to be read in the forward to follow, in the order in which it comes by; `rows` or `scores`."""
        label = [self._site.id]
        take = self._take_rows if rows is read.rows else self._take_scores
        return (
            read.v(label, name=f"v{name}", reduce=self._take_values),
            rows(label, name=f"rows{name}", reduce=take),
            read.z(label, point="pre_gate", name=f"z{name}", reduce=self._compare),
        )

    def _take_values(self, v: Tensor) -> None:
        self._values = v

    def _take_rows(self, rows: Tensor) -> None:
        self._rows = rows

    def _take_scores(self, scores: Tensor) -> None:
        visible = (scores != float("-inf")).float()
        self._rows = visible / visible.sum(dim=-1, keepdim=True).clamp(min=1)

    def _compare(self, z: Tensor) -> None:
        values = wide(self._values).transpose(1, 2).repeat_interleave(self._site.group_size, dim=1)
        if values.shape[2] != self._rows.shape[-1] or len(values) not in (1, len(self._rows)):
            return  # learned queries over a shared sequence
        rows, values, z = self._rows[:, self._heads], values[:, self._heads], wide(z)[:, :, self._heads]
        rebuilt = (rows.to(values.dtype) @ values).transpose(1, 2)
        # A padding query may see nothing; kernels then return what they like. Any other row has mass.
        empty = (rows.sum(-1) == 0).transpose(1, 2)
        padding = torch.zeros_like(empty)
        if self._mask is not None and self._mask.shape == z.shape[:2]:
            padding |= (self._mask == 0)[:, :, None].to(padding.device)
        zero = torch.zeros((), dtype=rebuilt.dtype, device=rebuilt.device)
        kept = ~empty[..., None]
        off = distance(torch.where(kept, rebuilt, zero), torch.where(kept, z, zero))
        self.off = max(self.off, float("inf") if bool((empty & ~padding).any()) else off)
        self.calls += 1
        self.close = self.off <= ROW_TOLERANCE.get(self._values.dtype, 1e-2)


def _under(patient: Patient, site: Site, one: edit.Edit | None) -> Tensor:
    """`[row, head, head_dim]` of a site under an edit, by a plain hook on its projection; as read where it has none."""
    with ExitStack() as stack:
        if site.projection is not None:
            seen = stack.enter_context(patient.seeing_projections([site]))
        else:
            got = stack.enter_context(patient.attached.reading(read.z([site.id], point="pre_gate")))
        if one is not None:
            stack.enter_context(patient.attached.editing(one))
        patient.run()
        return slices_of(seen[site.id][0], site) if site.projection is not None else got.z[site.id].flatten(0, 1)


def _moved(patient: Patient, site: Site, z: Tensor) -> set[int]:
    """Heads whose z is not the plain run's, bit for bit."""
    if site.projection is not None:
        plain = slices_of(patient.entering[site.id], site)
    else:
        plain = _under(patient, site, None)
    return {head for head in range(site.n_heads) if not same(z[:, head], plain[:, head])}


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _nothing(value: Any) -> None:
    return None


def _wavering(patient: Patient) -> Finding:
    return Finding(
        "n/a", f"two plain runs of this model already differ (by {patient.wavering:.2g}), so bits cannot be compared"
    )


def _of(sites: Sequence[Site], patient: Patient) -> str:
    every = len(patient.attached.sites)
    if len(sites) == every:
        return f"all {every} sites" if every > 1 else "the one site"
    return f"{len(sites)} of {every} sites"


def _verdict(wrong: Sequence[Site], fine: str, complaint: str) -> Finding:
    if not wrong:
        return Finding("pass", fine)
    labels = list(dict.fromkeys(site.label for site in wrong))
    return Finding("fail", f"{complaint} at {', '.join(labels[:6])}{' ...' if len(labels) > 6 else ''}")
