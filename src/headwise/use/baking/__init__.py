"""Edits put into the weights for good: `hw.bake(model, edits).save_pretrained(folder)`."""

from headwise.use.baking.bake import Baked, bake
from headwise.use.baking.report import BakeReport, Check, Line, Removal

__all__ = ["BakeReport", "Baked", "Check", "Line", "Removal", "bake"]
