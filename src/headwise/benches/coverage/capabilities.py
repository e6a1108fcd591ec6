"""What the doctor does not show of a most used type: edits in `generate`, patching, bf16, offload, four bits."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.benches.coverage.result import Outcome
from headwise.benches.coverage.rows import Row
from headwise.errors import HeadwiseError, Refusal
from headwise.model import edit, read
from headwise.model.attached import AttachedModel, attach
from headwise.model.finding.example import can_generate
from headwise.model.proving import checks, edit_checks
from headwise.model.proving.doctor import DoctorReport
from headwise.model.proving.findings import Finding, one_line
from headwise.model.proving.patient import Patient, distance, same, slices_of
from headwise.model.site import Site

COLUMNS = ("rows", "z", "generate", "gradients", "patching", "bf16", "offload", "NF4")
NEW_TOKENS = 4

# Names of the doctor's checks that are columns of their own.
_FROM_DOCTOR = {
    "rows": "rows times values are the kernel's z",
    "z": "zeroing two ways agrees",
    "gradients": "gate gradients match autograd",
}


def capabilities_of(row: Row, attached: AttachedModel, report: DoctorReport) -> dict[str, Outcome]:
    """Every column of the table of the most used types, each shown on the model at hand."""
    by_name = {check.name: check for check in report.checks}
    found = {column: Outcome(by_name[check].status, by_name[check].detail) for column, check in _FROM_DOCTOR.items()}
    for column, show in (("generate", _generating), ("patching", _patching)):
        found[column] = _shown(lambda show=show: show(Patient(attached, seed=0)))  # type: ignore[misc]
    for column, show_apart in (("bf16", _in_bf16), ("offload", _offloaded), ("NF4", _in_four_bits)):
        found[column] = _shown(lambda show=show_apart: show(attached))  # type: ignore[misc]
    return {column: found[column] for column in COLUMNS}


def _shown(show: Callable[[], Outcome]) -> Outcome:
    try:
        return show()
    except _ModelItself as error:
        return Outcome("n/a", str(error))
    except Refusal as error:
        return Outcome("n/a", f"refused: {error}")
    except HeadwiseError as error:
        return Outcome("fail", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("fail", f"stopped by {type(error).__name__}: {one_line(error)}")


def _editable(patient: Patient) -> list[Site]:
    return patient.sites("separable", "projection")


def _generating(patient: Patient) -> Outcome:
    """Tokens generated with heads zeroed by an edit, and with their slices zeroed by plain hooks: the same logits."""
    sites = _editable(patient)
    if not can_generate(patient.model):
        return Outcome("n/a", "the model does not generate")
    if not sites:
        return Outcome("n/a", patient.why_not("separable", "projection"))

    def logits() -> list[Tensor]:
        with torch.no_grad():
            made = patient.model.generate(
                **{name: value for name, value in patient.inputs.items() if name != "labels"},
                do_sample=False,
                num_beams=1,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return list(made.logits)

    with patient.attached.aside():
        plain = logits()
    idle = logits()
    with patient.attached.editing(edit.zero(patient.heads(sites))):
        edited = logits()
    with patient.multiplying({site.id: 0.0 for site in sites}):
        sliced = logits()
    if not all(map(same, plain, idle)):
        return Outcome("fail", "attached and idle, the logits are not those of the model by itself")
    if not all(map(same, edited, sliced)):
        return Outcome("fail", f"off by {max(map(distance, edited, sliced)):.2g}")
    acted = sum(not same(one, other) for one, other in zip(edited, plain, strict=True))
    if acted < NEW_TOKENS:
        return Outcome("fail", f"the edit acted on {acted} of {NEW_TOKENS} steps")
    return Outcome("pass", f"bit-equal to plain hooks at {NEW_TOKENS} of {NEW_TOKENS} steps, {len(sites)} sites")


def _patching(patient: Patient) -> Outcome:
    """A head's z from another run put in its place: the model's output is that of the same done by a plain hook."""
    sites = _editable(patient)
    if not sites:
        return Outcome("n/a", patient.why_not("separable", "projection"))
    donor_inputs = _other_inputs(patient.inputs)
    with patient.attached.reading(read.z([site.id for site in sites])) as donor:
        patient.run(donor_inputs)
    heads = patient.heads(sites)
    with patient.attached.editing(edit.patch(heads, donor.z)):
        patched = patient.run()
    with patient.seeing_projections(sites) as seen:
        patient.run(donor_inputs)
    slices = {site.id: slices_of(seen[site.id][0], site)[:, patient.drawn[site.id]] for site in sites}
    with _putting(patient, sites, slices):
        by_hand = patient.run()
    if not same(patched, by_hand):
        return Outcome("fail", f"off by {distance(patched, by_hand):.2g}")
    if same(patched, patient.plain):
        return Outcome("fail", "the patched run is the plain one")
    return Outcome("pass", f"one head of each of {len(sites)} sites, bit-equal to a plain hook")


def _other_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the inputs in another order, where there are two; masks stay where they are."""
    changed: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            changed[name] = value
        elif value.is_floating_point():
            changed[name] = -value
        elif name in ("input_ids", "decoder_input_ids"):
            changed[name] = torch.where(value >= 96, value, (value + 7) % 90) if int(value.max()) < 200 else value
        else:
            changed[name] = value
    return changed


def _putting(patient: Patient, sites: list[Site], slices: Mapping[Any, Tensor]) -> Any:
    from headwise.model.proving.patient import columns_of

    def put(module: nn.Module, site: Site, args: tuple[Any, ...]) -> tuple[Any, ...]:
        columns = columns_of(site)[patient.drawn[site.id]]
        part = slices[site.id].reshape(*args[0].shape[:-1], len(columns))
        return (args[0].index_copy(-1, columns, part), *args[1:])

    return patient._at_projections(sites, put, "register_forward_pre_hook")


# -- other homes of the weights --------------------------------------------------------------------------------


def _in_bf16(attached: AttachedModel) -> Outcome:
    model = copy.deepcopy(attached.model).to(torch.bfloat16)
    inputs = {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in attached.example.items()
    }
    with attach(model, example=inputs) as low:
        return _summed(low.doctor())


def _offloaded(attached: AttachedModel) -> Outcome:
    """Every weight on disk between the calls, by accelerate: the same bits as at home, and zeroing in two ways."""
    try:
        from accelerate import disk_offload  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return Outcome("not installed", "accelerate")
    model = copy.deepcopy(attached.model)
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
        _runs(model, attached.example, "offloaded")
        with attach(model, example=attached.example) as away:
            patient = Patient(away, seed=0)
            if not _editable(patient):
                return Outcome("n/a", patient.why_not("separable", "projection"))
            if not same(patient.plain, Patient(attached, seed=0).plain) or not same(patient.run(), patient.plain):
                return Outcome("fail", "offloaded, the output is not that of the model in memory")
            return _both(edit_checks.zero_two_ways(patient))


def _in_four_bits(attached: AttachedModel) -> Outcome:
    """Linear layers in NF4 by bitsandbytes."""
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        return Outcome("not installed", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        whole: Any = attached.model
        whole.save_pretrained(folder)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = type(whole).from_pretrained(folder, quantization_config=settings, device_map="cpu")
    kinds = {type(module).__name__ for module in model.modules()}
    if "Linear4bit" not in kinds:
        return Outcome("n/a", "no layer of it was taken to four bits")
    _runs(model.eval(), attached.example, "in four bits")
    with attach(model, example=attached.example) as low:
        patient = Patient(low, seed=0)
        if not _editable(patient):
            return Outcome("n/a", patient.why_not("separable", "projection"))
        return _both(checks.no_op(patient), edit_checks.zero_two_ways(patient))


class _ModelItself(Exception):
    """The model, with headwise not yet near it, does not run in this form."""


def _runs(model: nn.Module, inputs: Mapping[str, Any], how: str) -> None:
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise _ModelItself(f"{how}, the tiny model itself does not run ({one_line(error)})") from error


def _summed(report: DoctorReport) -> Outcome:
    failed = [f"{check.name}: {check.detail}" for check in report.checks if check.status == "fail"]
    if failed:
        return Outcome("fail", "; ".join(failed))
    return Outcome("pass", f"{sum(check.status == 'pass' for check in report.checks)} checks of the doctor")


def _both(*findings: Finding) -> Outcome:
    for finding in findings:
        if finding.status != "pass":
            return Outcome(finding.status, finding.detail)
    return Outcome("pass", "; ".join(finding.detail for finding in findings))
