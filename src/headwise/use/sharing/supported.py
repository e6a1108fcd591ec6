"""What speaks for something that is saved: a verdict on its heads, or an evaluation of it, as JSON and as text."""

from __future__ import annotations

from typing import Any

import torch

from headwise.errors import InputError
from headwise.heads import Head, HeadSet, KVGroup
from headwise.model.attached import AttachedModel
from headwise.use.evaluation import Evaluation
from headwise.use.intervention import Intervention
from headwise.use.sharing.made_on import named_members
from headwise.use.sharing.stored_form import Writing
from headwise.verify.result import Verdict

Evidence = Verdict | Evaluation


def told(evidence: Evidence | None, thing: Any, model: AttachedModel) -> dict[str, Any] | None:
    """What a folder keeps of the evidence: its own JSON, with `kind` (`verdict`, `evaluation`) and `text`.

    Raises:
        InputError: a verdict on other heads, an evaluation of something else, or what is neither.
    """
    if isinstance(thing, Verdict):
        if evidence is not None:
            raise InputError("a verdict is evidence itself; leave evidence= out")
        return _of_verdict(thing)
    match evidence:
        case None:
            return None
        case Verdict():
            _require_heads(evidence, thing, model)
            return _of_verdict(evidence)
        case Evaluation():
            if not isinstance(thing, Intervention) or not _same(evidence.intervention, thing):
                raise InputError(f"the evidence is an evaluation of {evidence.intervention!r}; evaluate what is saved")
            return {"kind": "evaluation", "text": str(evidence), **evidence.to_dict()}
    raise InputError(
        f"evidence= is a Verdict or an Evaluation (hw.verify, use.evaluate), not a {type(evidence).__name__}"
    )


def _of_verdict(verdict: Verdict) -> dict[str, Any]:
    family = verdict.family
    return {
        "kind": "verdict",
        "text": str(verdict),
        "heads": list(verdict.heads.labels),
        "family": family.family.key,
        "clean": family.clean,
        "chance": family.chance,
        "match": verdict.joint.match,
        "reason": verdict.reason,
        **verdict.to_json(),
    }


def _require_heads(verdict: Verdict, thing: Any, model: AttachedModel) -> None:
    members = named_members(thing)
    named = HeadSet(tuple(each for each in members if isinstance(each, Head)))
    groups = HeadSet(tuple(each for each in members if isinstance(each, KVGroup)), "group")
    named |= groups.to_heads(model.table.group_sizes)
    if named != verdict.heads:
        raise InputError(
            f"the evidence is a verdict on {', '.join(verdict.heads.labels)} and what is saved names "
            f"{', '.join(named.labels) or 'no heads'}; verify the same heads"
        )


def _same(one: Intervention, other: Intervention) -> bool:
    """Whether both would be saved alike."""
    first, second = Writing(), Writing()
    return (
        first.intervention(one) == second.intervention(other)
        and first.tensors.keys() == second.tensors.keys()
        and all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    )


__all__ = ["Evidence", "told"]
