"""Models shipped with the package: some with weights written by hand, and tiny random ones."""

from __future__ import annotations

from headwise.zoo.building import build, names
from headwise.zoo.table import TinyType
from headwise.zoo.tiny import Organism, outside_registry, tiny_types

__all__ = ["Organism", "TinyType", "build", "names", "outside_registry", "tiny_types"]
