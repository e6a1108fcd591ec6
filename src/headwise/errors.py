"""What can go wrong, in one family, so that a caller catches one class and the command line prints one line."""

from __future__ import annotations


class HeadwiseError(Exception):
    """Base of every error that headwise raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code: int = 2


class InputError(HeadwiseError, ValueError):
    """What was asked for cannot be understood or does not exist: a head, a path, a shape, an option."""


class Refusal(HeadwiseError):
    """What was asked for is understood, and this model, site or setting cannot do it. Says why, and what would work."""


class NotFired(HeadwiseError):
    """A read or edit was in force during a run, and its site never ran."""


class PlanConflict(HeadwiseError, RuntimeError):
    """Two plans on one model at once, or a plan changed while the model runs."""
