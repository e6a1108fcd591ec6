"""Models shipped with the package: tiny random builds of many types."""

from __future__ import annotations

from headwise.zoo.table import TinyType
from headwise.zoo.tiny import Organism, build, names, outside_registry, tiny_types

__all__ = ["Organism", "TinyType", "build", "names", "outside_registry", "tiny_types"]
