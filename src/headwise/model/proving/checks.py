"""The doctor's checks of what is read, each against a second way that does not go through headwise (see `patient`).

A check covers every site at once and costs a run or two.
"""

from __future__ import annotations

from typing import Any

import torch

from headwise.heads import Head
from headwise.model import edit, read
from headwise.model.finding.discover import LINEAR_TOLERANCE, precision
from headwise.model.proving.findings import Finding, share_of, verdict, wavering
from headwise.model.proving.patient import Patient, columns_of, distance, same, sampled, slices_of, taken, wide
from headwise.model.proving.rebuilding import Rebuilding, heads_moved, products, z_under
from headwise.model.running.projection import first


def no_op(patient: Patient) -> Finding:
    """Out of the seam, attached, and with reads in force at every site: the same bits."""
    if patient.wavering:
        return wavering(patient)
    attached = patient.run()
    labels = [site.id for site in patient.attached.sites]
    reads = [read.z(labels, point="pre_gate", reduce=_nothing)]
    if seen := [site.id for site in patient.sites("qk")]:
        reads.append(read.q(seen, reduce=_nothing))
    if rows := [site.id for site in patient.sites("rows")]:
        reads += [make(rows, reduce=_nothing) for make in (read.scores, read.rows)]
        reads.append(read.statistics(rows, wanted=["entropy", "max"], reduce=_nothing))
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

    A watched site's z is read there, so what its own product of pattern and values returned is held against it, too.
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
    wrong = [s for s in sites if not same(slices_of(seen[s.id][0], s), taken(got.z[s.id], s, len(seen[s.id][0])))]
    # Where no two runs are alike, the product of another one says nothing.
    watched = [s for s in sites if s.route == "watched" and not s.gated and not patient.wavering]
    returned = products(patient, watched) if watched else {}
    wrong += [site for site in watched if not same(returned[site.id], got.z[site.id].flatten(0, 1))]
    gated = sampled([site for site in sites if site.gated and not site.added])
    if gated and patient.wavering:
        return wavering(patient)
    for site in gated:
        halved = edit.scale(Head(site.id, patient.drawn[site.id]), 0.5, point="pre_gate")
        if heads_moved(patient, site, z_under(patient, site, halved)) != {patient.drawn[site.id]}:
            wrong.append(site)
    behind = (
        f"; a head halved before the gate moves its own slice alone, at {share_of(gated, patient)}" if gated else ""
    )
    return verdict(wrong, f"equal at {share_of(sites, patient)}{behind}", "z is not the heads' slice of the input")


def writes_sum(patient: Patient) -> Finding:
    """Writes of all heads, summed, and the bias (and what else enters it) give the projection's output."""
    sites = patient.sites("projection")
    if not sites:
        return Finding("n/a", patient.why_not("projection"))
    summed = read.write([site.id for site in sites], reduce=lambda write: wide(write).sum(dim=2))
    apart = [site for site in sites if site.by_span]  # two biases, each where its own kind of tokens stands
    with (
        patient.attached.reading(summed) as got,
        patient.without_biases(apart),
        patient.seeing_projections(sites) as seen,
    ):
        patient.run()
    wrong, worst = [], 0.0
    for site in sites:
        entered, left = seen[site.id]
        written = torch.cat([taken(write, site, len(left)) for write in got.write[site.id]])
        if not site.by_span:
            with torch.no_grad():
                columns = columns_of(site).flatten().to(entered.device)
                beside = torch.zeros_like(entered[:1])
                if len(columns) < entered.shape[-1]:
                    beside = entered.index_fill(-1, columns, 0.0)
                rest = first(patient.model.get_submodule(str(site.projection))(beside))
            written = written + wide(rest.reshape(-1, rest.shape[-1]))
        off = distance(written, left)
        worst = max(worst, off)
        coarse = {precision(patient.model.get_submodule(path), left) for path in site.takers}
        if off > max(LINEAR_TOLERANCE.get(dtype, 1e-2) for dtype in coarse):
            wrong.append(site)
    return verdict(wrong, f"{share_of(sites, patient)}, largest relative difference {worst:.2g}", f"off by {worst:.2g}")


def rows_rebuild_z(patient: Patient) -> Finding:
    """Pattern rows times values, each query head with its own KV head, give the z that the kernel returned."""
    sites = patient.sites("rows", "v")
    if not sites:
        return Finding("n/a", patient.why_not("rows", "v"))
    mask = patient.inputs.get("attention_mask")
    followed = {site.id: Rebuilding(site, mask) for site in sites}
    reads = [one for number, site in enumerate(sites) for one in followed[site.id].reads(read.rows, str(number))]
    with patient.attached.reading(*reads):
        patient.run()
    compared = [site for site in sites if followed[site.id].calls]
    if not compared:
        return Finding("n/a", "at no site do rows and values cover the same keys")
    worst = max(followed[site.id].off for site in compared)
    wrong = [site for site in compared if not followed[site.id].close]
    return verdict(
        wrong, f"{share_of(compared, patient)}, largest relative difference {worst:.2g}", f"off by {worst:.2g}"
    )


def _nothing(value: Any) -> None:
    return None
