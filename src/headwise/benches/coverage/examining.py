"""One row from its class to its result: built, run, attached, examined by the doctor."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from headwise.benches.coverage.building import build
from headwise.benches.coverage.capabilities import capabilities_of
from headwise.benches.coverage.inputs import inputs_for, is_whole
from headwise.benches.coverage.most_used import is_most_used
from headwise.benches.coverage.particulars import UNBUILDABLE
from headwise.benches.coverage.result import Outcome, Result, Status
from headwise.benches.coverage.rows import Row
from headwise.errors import HeadwiseError, Refusal
from headwise.model.attached import AttachedModel, attach
from headwise.model.proving.doctor import DoctorReport

NO_OP = "no-op is bit-identical"
Z = "z is the projection's input"
ZERO = "zeroing two ways agrees"
ROWS = "rows times values are the kernel's z"


def examine(row: Row) -> Result:
    """Build the tiny model of a row, attach it and put it to the doctor; nothing that goes wrong is raised."""
    began = time.monotonic()
    result = _examined(row)
    return replace(result, seconds=round(time.monotonic() - began, 2))


def _examined(row: Row) -> Result:
    def at(status: Status, reason: str, **rest: Any) -> Result:
        return Result(row.model_type, row.task, row.class_name, status, reason, **rest)

    try:
        model = build(row)
    except Exception as error:
        known = UNBUILDABLE.get(row.model_type)
        return at("not built", f"{known} ({_why_not_built(error)})" if known else _why_not_built(error))
    try:
        inputs, made_up = inputs_for(row, model)
    except Exception as error:
        return at("not run", f"no inputs were found: {_said(error)}")
    given = {"inputs": "made up" if made_up else "given", "seen": tuple(sorted(inputs))}
    try:
        attached = attach(model, example=None if made_up else inputs)
    except Refusal as error:
        status, reason = _why_refused(model, inputs, error)
        return at(status, reason, **given)
    except Exception as error:
        return at("wrong", f"attach: {type(error).__name__}: {_said(error)}", **given)
    with attached:
        found = _sites_of(attached) | given
        try:
            report = attached.doctor()
        except Exception as error:
            return at("wrong", f"doctor: {type(error).__name__}: {_said(error)}", **found)
        found["checks"] = {check.name: Outcome(check.status, check.detail) for check in report.checks}
        status, reason = _judged(report, attached)
        if not is_whole(row, inputs):
            reason = "; ".join(each for each in (reason, "run on its text alone, without a picture or sound") if each)
        if is_most_used(row.model_type, row.task):
            found["capabilities"] = capabilities_of(row, attached, report)
        return at(status, reason, **found)


def _sites_of(attached: AttachedModel) -> dict[str, Any]:
    sites = attached.sites
    projected = [site for site in sites if site.projection is not None]
    kinds = {type(attached.model.get_submodule(str(site.projection))).__name__ for site in projected}
    return {
        "sites": len(sites),
        "heads": sum(site.n_heads for site in sites),
        "routes": tuple(sorted({str(getattr(site, "route", "registry")) for site in sites})),
        "projections": tuple(sorted(kinds)),
        "with_z": sum(bool(site.capabilities["separable"] and site.capabilities["projection"]) for site in sites),
        "with_rows": sum(bool(site.capabilities["rows"]) for site in sites),
    }


def _judged(report: DoctorReport, attached: AttachedModel) -> tuple[Status, str]:
    """The status of an attached model, and what of it is failed or refused."""
    failed = [f"{check.name}: {check.detail}" for check in report.checks if check.status == "fail"]
    if failed:
        return "wrong", "; ".join(failed)
    refused = []
    for name, what in (("separable", "z edits"), ("projection", "z edits"), ("rows", "rows")):
        without = [site for site in attached.sites if not site.capabilities[name]]
        reasons = dict.fromkeys(site.capabilities[name].reason for site in without)
        if without and (name != "projection" or all(site.capabilities["separable"] for site in without)):
            where = (
                "every site"
                if len(without) == len(attached.sites)
                else f"{len(without)} of {len(attached.sites)} sites"
            )
            refused.append(f"no {what} at {where}: {'; '.join(reasons)}")
    checks = {check.name: check for check in report.checks}
    if checks[ZERO].status != "pass":
        return "partly", "; ".join(refused or [checks[ZERO].detail])
    return "right", "; ".join(refused)


# -- why not -------------------------------------------------------------------------------------------------


def _why_not_built(error: Exception) -> str:
    missing = re.search(r"requires the (\w+) library", str(error))
    if missing:
        return f"the optional package {missing[1]} is missing"
    return f"{type(error).__name__}: {_said(error)}"


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, HeadwiseError):
        text = re.sub(r"/\S+/(?=[\w.-]+)", "", text)[:240]  # no paths of the machine that made the table
    return text


def _why_refused(model: nn.Module, inputs: Mapping[str, Any], error: Refusal) -> tuple[Status, str]:
    """Headwise's own reason where the model attends; where it does not, what it does instead."""
    with torch.no_grad(), _Softmaxes() as seen:
        model(**inputs)
    if seen.count:
        return "refused", _said(error)
    names = list(dict.fromkeys(type(module).__name__ for module in model.modules()))
    attending = [name for name in names if _ATTENDING.search(name)]
    if attending:
        return "refused", f"its attention takes no softmax of torch that could be seen ({', '.join(attending[:3])})"
    with_weights = Counter(
        type(module).__name__ for module in model.modules() if any(True for _ in module.parameters(recurse=False))
    )
    made_of = [name for name in names if _MIXER.search(name)] or [name for name, _ in with_weights.most_common()]
    return "no attention", f"no softmax over keys in its forward; it is made of {', '.join(made_of[:3])}"


_ATTENDING = re.compile(r"Attention$")
_MIXER = re.compile(r"(Mixer|Mamba\w*Block|SSM|Conv\w*(Layer|Block)|Fourier|Pool\w*Layer|LSTM|Bottleneck)")


class _Softmaxes(TorchFunctionMode):
    """Counts what may be attention: softmax over an axis, and fused attention."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "log_softmax"):
            self.count += 1
        return function(*args, **(kwargs or {}))
