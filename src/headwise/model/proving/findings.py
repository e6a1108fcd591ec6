"""What a check of the doctor comes to, and the words for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from headwise.errors import HeadwiseError, Refusal
from headwise.model.proving.patient import Patient
from headwise.model.site import Site


@dataclass(frozen=True, slots=True)
class Finding:
    """Outcome of one check."""

    status: Literal["pass", "fail", "n/a"]
    detail: str


def carried_out(check: Callable[[Patient], Finding], patient: Patient) -> Finding:
    """What a check finds, whatever becomes of it on its way.

    What is refused there is refused to everybody, in so many words, so nothing can go wrong unseen: that is no failure.
    """
    try:
        return check(patient)
    except Refusal as refusal:
        return Finding("n/a", f"refused: {refusal}")
    except HeadwiseError as error:
        return Finding("fail", f"{type(error).__name__}: {error}")
    except Exception as error:  # the model itself stumbled under what the check did: that is a finding, too
        return Finding("fail", f"stopped by {type(error).__name__}: {one_line(error)}")


def verdict(wrong: Sequence[Site], fine: str, complaint: str) -> Finding:
    if not wrong:
        return Finding("pass", fine)
    labels = list(dict.fromkeys(site.label for site in wrong))
    return Finding("fail", f"{complaint} at {', '.join(labels[:6])}{' ...' if len(labels) > 6 else ''}")


def wavering(patient: Patient) -> Finding:
    return Finding(
        "n/a", f"two plain runs of this model already differ (by {patient.wavering:.2g}), so bits cannot be compared"
    )


def share_of(sites: Sequence[Site], patient: Patient) -> str:
    every = len(patient.attached.sites)
    if len(sites) == every:
        return f"all {every} sites" if every > 1 else "the one site"
    return f"{len(sites)} of {every} sites"


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
