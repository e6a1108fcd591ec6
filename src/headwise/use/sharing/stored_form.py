"""Values as JSON and tensors, and back bit for bit: what the fields of an intervention, a verdict and scores may hold.

Numbers, words, None and tuples are themselves (a tuple is a list in JSON). Everything else is an object whose keys
say what it is:

    {"heads": {"kind": "head", "sites": {"L2": [1]}}}     a HeadSet
    {"head": "L2H1"}, {"group": "L2G0"}, {"site": "L2"}  one of its parts
    {"tensor": "offset/L2H1"}, {"array": "clean"}         torch's, numpy's: the tensor of that name beside the JSON
    {"mapping": {"L2H1": 0.5}}                            with words as keys
    {"number": "nan"}                                     a number that JSON does not have
    {"intervention": "head-scaling", "settings": {...}}
    {"record": "JointVerdict", "fields": {...}}           a dataclass of a verdict or of scores

Nothing else is written and nothing else is read: a file cannot name code to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.heads import Head, HeadSet, KVGroup, SiteId
from headwise.scores import HeadScores, Provenance
from headwise.sweep.matched import Controls
from headwise.use.intervention import Intervention, Together, intervention
from headwise.verify.evidence import Evidence, Family, Joint
from headwise.verify.result import Dose, KeptOnly, OffTarget, Verdict
from headwise.verify.verdict import Against, FamilyVerdict, JointVerdict, SingleVerdict

RECORDS: dict[str, type] = {
    each.__name__: each
    for each in (
        *(Verdict, FamilyVerdict, JointVerdict, SingleVerdict, Against, OffTarget, Dose, KeptOnly),
        *(Evidence, Family, Joint, Controls),
        *(HeadScores, Provenance),
    )
}
"""What verdicts and scores are made of; each is a dataclass whose fields can be stored."""

PARTS: dict[str, type[Head] | type[KVGroup] | type[SiteId]] = {"head": Head, "group": KVGroup, "site": SiteId}

KEYS = {
    *map(frozenset, (("number",), ("heads",), ("tensor",), ("array",), ("mapping",))),
    *(frozenset((word,)) for word in PARTS),
    *map(frozenset, (("intervention", "settings"), ("record", "fields"))),
}
"""The keys that a form can have, all of them and no others."""


@dataclass
class Writing:
    """Makes the JSON form of values, and gathers the tensors that it names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def form(self, value: Any, name: str) -> Any:
        """The JSON form of a value; `name` is the place it has among the settings, for tensors and for errors.

        Raises:
            Refusal: what cannot be stored, such as a function.
        """
        match value:
            case None | bool() | str():
                return value
            case np.generic():
                return self.form(value.item(), name)
            case int() | float():
                return value if math.isfinite(value) else {"number": str(float(value))}
            case HeadSet():
                return {"heads": value.to_dict()}
            case Tensor():
                return {"tensor": self._kept(value.detach(), name)}
            case np.ndarray():
                return {"array": self._kept(torch.from_numpy(np.array(value)), name)}
            case tuple() | list():
                return [self.form(each, f"{name}/{number}") for number, each in enumerate(value)]
            case Intervention():
                return self.intervention(value, name)
            case Mapping():
                return {"mapping": {self._key(key, name): self.form(value[key], f"{name}/{key}") for key in value}}
        for word, kind in PARTS.items():
            if isinstance(value, kind):
                return {word: value.label}
        if (record := type(value).__name__) in RECORDS and isinstance(value, RECORDS[record]):
            parts = [each.name for each in fields(RECORDS[record])]
            return {
                "record": record,
                "fields": {part: self.form(getattr(value, part), _under(name, part)) for part in parts},
            }
        raise Refusal(
            f"{name} is a {type(value).__name__} and cannot be saved; numbers, words, heads, tensors, mappings and "
            "interventions can"
        )

    def intervention(self, given: Intervention, name: str = "") -> dict[str, Any]:
        """The form of an intervention and its settings. Raises as `form`; Refusal also where no catalogue has it."""
        if not _is_known(given):
            raise Refusal(
                f"{type(given).__name__} ({given.id}) is not in the catalogue, so it could not be loaded again; "
                "register an InterventionEntry for it"
            )
        settings = {key: self.form(value, _under(name, key)) for key, value in given.settings.items()}
        return {"intervention": given.id, "settings": settings}

    def _kept(self, tensor: Tensor, name: str) -> str:
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            raise Refusal(f"{name} is a tensor that is complex, quantised or sparse and cannot be saved; make it plain")
        # Cloned, because safetensors refuses two names for one memory.
        self.tensors[name] = tensor.to("cpu", copy=True).contiguous()
        return name

    def _key(self, key: Any, name: str) -> str:
        if not isinstance(key, str):
            raise Refusal(f"{name} has the key {key!r}, a {type(key).__name__}; a saved mapping has words as keys")
        return key


@dataclass(frozen=True)
class Reading:
    """Makes values of their JSON form again; `tensors` are those that it names."""

    tensors: Mapping[str, Tensor]

    def value(self, form: Any) -> Any:
        """The inverse of `Writing.form`.

        Raises:
            InputError: a form that no version wrote, an intervention that is not installed, settings it does not have.
        """
        if isinstance(form, list):
            return tuple(self.value(each) for each in form)
        if not isinstance(form, dict):
            return form
        known = form if frozenset(form) in KEYS else {}
        match known:
            case {"number": word} if word in ("nan", "inf", "-inf"):
                return float(word)
            case {"heads": members}:
                return HeadSet.from_dict(members)
            case {"tensor": name}:
                return self._tensor(name)
            case {"array": name}:
                return self._tensor(name).numpy()
            case {"mapping": entries} if isinstance(entries, dict):
                return {key: self.value(each) for key, each in entries.items()}
            case {"intervention": id, "settings": settings} if isinstance(settings, dict):
                return self._made(_class_of(id), id, settings)
            case {"record": record, "fields": parts} if record in RECORDS and isinstance(parts, dict):
                return self._made(RECORDS[record], record, parts)
        for word, part in PARTS.items():
            if known.keys() == {word}:
                return part.parse(form[word])
        raise InputError(f"{_shown(form)} is no form of a saved value; a newer headwise may have written it")

    def _tensor(self, name: Any) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"the tensor {name!r} is named and is not among those that were saved")
        return self.tensors[name]

    def _made(self, kind: type, name: str, settings: dict[str, Any]) -> Any:
        known = {each.name for each in fields(kind)}
        if unknown := sorted(settings.keys() - known):
            raise InputError(
                f"{name} was saved with the setting {unknown[0]!r}, which it does not have here (it has "
                f"{', '.join(sorted(known))}); use the headwise that wrote it, or a newer one"
            )
        values = {key: self.value(each) for key, each in settings.items()}
        try:
            return kind(**values)
        except HeadwiseError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"the saved settings of {name} cannot be used here ({error})") from None


def _class_of(id: Any) -> type[Intervention]:
    return Together if id == Together.id else intervention(str(id))


def _is_known(given: Intervention) -> bool:
    try:
        return _class_of(given.id) is type(given)
    except InputError:
        return False


def _under(name: str, part: str) -> str:
    return f"{name}/{part}" if name else part


def _shown(form: Any) -> str:
    text = repr(form)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = ["RECORDS", "Reading", "Writing"]
