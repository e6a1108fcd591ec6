"""Many knock-outs at once, and the sets of heads they are compared with."""

from __future__ import annotations

from headwise.sweep.knockout import MODES, KnockOut, Mode, Patch, reference_of
from headwise.sweep.matched import Controls, matched_sets
from headwise.sweep.measuring import measure_sets

__all__ = ["MODES", "Controls", "KnockOut", "Mode", "Patch", "matched_sets", "measure_sets", "reference_of"]
