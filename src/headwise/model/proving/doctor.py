"""The doctor: proof, on the user's own model, dtype, device and kernel, that reads and edits do what they say.

Every check compares headwise with a second way to the same number that does not go through it: the model out of the
seam, plain PyTorch hooks, rows of a batch run one by one, generation without a cache, autograd. The number of runs does
not grow with the depth of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from headwise.model.proving import checks as read_checks
from headwise.model.proving import edit_checks, position_checks
from headwise.model.proving.findings import Finding, carried_out
from headwise.model.proving.patient import Patient
from headwise.model.site import Site

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel

Status = Literal["pass", "fail", "n/a"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its outcome; `detail` gives counts and the largest difference, or why it does not apply."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What one site can do: its kind, heads and kernel, and by capability True or the reason why not."""

    label: str
    capabilities: dict[str, str | bool]


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What the doctor found. `passed` is False only if a check failed; n/a is not a failure."""

    model: str
    passed: bool
    checks: tuple[Check, ...]
    sites: tuple[SiteReport, ...]
    summary: str

    def to_json(self) -> dict[str, Any]:
        """The form that `headwise doctor --json` prints."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Examination:
    """One check to be made; `unsafe` names what must not be used if it fails."""

    name: str
    carry_out: Callable[[Patient], Finding]
    unsafe: str


EXAMINATIONS = (
    Examination("no-op is bit-identical", read_checks.no_op, "anything: attaching changes the model"),
    Examination("z is the projection's input", read_checks.z_enters_projection, "z"),
    Examination("sum of writes is the projection's output", read_checks.writes_sum, "writes"),
    Examination("rows times values are the kernel's z", read_checks.rows_rebuild_z, "patterns, scores, statistics"),
    Examination("zeroing two ways agrees", edit_checks.zero_two_ways, "edits of z"),
    Examination("pattern edits leave other heads alone", edit_checks.other_heads_keep_bits, "score and pattern edits"),
    Examination("edits fire once per call", edit_checks.edits_fire_once, "edits"),
    Examination("KV groups map to their query heads", edit_checks.groups_map, "edits of k and v"),
    Examination("gate gradients match autograd", edit_checks.gate_gradients, "gradients"),
    Examination("left padding changes nothing", position_checks.left_padding, "edits in left-padded batches"),
    Examination("a cache changes nothing", position_checks.cache, "edits in generate() with a cache"),
)


def examine(
    attached: AttachedModel, *, seed: int = 0, began: Callable[[str], object] = lambda check: None
) -> DoctorReport:
    """Run every check on an attached model; its weights, gradients, mode and random state are left as they were.

    Args:
        seed: draws the heads that are edited.
        began: told the name of each check as it begins.

    Raises:
        PlanConflict: a plan is open on the model, it is running, or it was detached.
        InputError: the model is in training mode with dropout.
    """
    cuda = sorted({p.device.index or 0 for p in attached.model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        patient = Patient(attached, seed)
        found = []
        for examination in EXAMINATIONS:
            began(examination.name)
            finding = carried_out(examination.carry_out, patient)
            found.append(Check(examination.name, finding.status, finding.detail))
    sites = tuple(SiteReport(site.label, _abilities(site)) for site in attached.sites)
    passed = all(check.status != "fail" for check in found)
    return DoctorReport(attached.name, passed, tuple(found), sites, _summary(patient, found))


REFUSED = {
    "separable": "edits of z and writes",
    "rows": "patterns, scores and their edits",
    "qk": "queries, keys and their edits",
    "v": "values and their edits",
}


def _abilities(site: Site) -> dict[str, str | bool]:
    shape = f"{site.n_heads}" + ("" if site.group_size == 1 else f" / {site.n_kv_heads} KV")
    described: dict[str, str | bool] = {
        "route": site.route,
        "kind": site.kind,
        "heads": shape,
        "kernel": _kernel(site.kernel),
    }
    described["gated"] = "no: something is added to z" if site.added else site.gated
    for name, capability in site.capabilities.items():
        described[name] = True if capability else f"no: {capability.reason}"
    return described


def _kernel(name: str) -> str:
    return name.removesuffix("_attention_forward").removesuffix("_forward") or name


def _summary(patient: Patient, found: list[Check]) -> str:
    """One sentence on what is unsafe to use, what is refused, and what was not looked at."""
    unsafe = [e.unsafe for e, check in zip(EXAMINATIONS, found, strict=True) if check.status == "fail"]
    parts = []
    for name, refused in REFUSED.items():
        without = [site.label for site in patient.attached.sites if not site.capabilities[name]]
        if without:
            parts.append(f"{refused} are refused at {_listed(without, len(patient.attached.sites))}")
    if patient.unreached:
        parts.append(f"{', '.join(patient.unreached)} did not run on this example and was not examined")
    for each in patient.attached.table.unserved[:3]:
        parts.append(f"{each.module} attends out of reach ({each.reason})")
    if len(patient.attached.table.unserved) > 3:
        parts.append(f"so do {len(patient.attached.table.unserved) - 3} more modules")
    if unsafe:
        return "; ".join([f"Unsafe on this model: {', '.join(unsafe)}", *parts]) + "."
    return "; ".join(["Safe to use", *(parts or ["nothing is refused on this model"])]) + "."


def _listed(labels: list[str], every: int) -> str:
    if len(labels) == every:
        return "every site"
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
