"""Methods over heads of vision towers and of speech models: functions of an attached model and of pictures or sound.

Their inputs are no items of a probe, so `find` does not run them; `headwise list methods` shows them, and their page is
`towers.md`.
"""

from __future__ import annotations

from importlib import import_module

from headwise.catalogue import register
from headwise.find.method import LibraryMethod
from headwise.find.towers.correlation import Interval, interval
from headwise.find.towers.cross_saliency import Agreement, CrossSaliency, cross_saliency
from headwise.find.towers.pattern_families import PatternFamilies, pattern_families
from headwise.find.towers.predicates import PREDICATES, Places, predicate_relevance
from headwise.find.towers.pruning_importance import PruningImportance, pruning_importance
from headwise.find.towers.same_object import (
    ObjectScenes,
    SameObject,
    binding_heads,
    fit_same_object,
    object_scenes,
    patch_stream,
)
from headwise.find.towers.spatial_profile import SpatialProfile, spatial_profile
from headwise.find.towers.tower import Grid

FILES = (
    "pruning_importance",
    "spatial_profile",
    "pattern_families",
    "predicates",
    "same_object",
    "cross_saliency",
)
"""The modules of this room that define methods, each as `METHODS`."""

METHODS: tuple[LibraryMethod, ...] = tuple(
    each for name in FILES for each in import_module(f"headwise.find.towers.{name}").METHODS
)
for _each in METHODS:
    register(_each)

__all__ = [
    "METHODS",
    "PREDICATES",
    "Agreement",
    "CrossSaliency",
    "Grid",
    "Interval",
    "ObjectScenes",
    "PatternFamilies",
    "Places",
    "PruningImportance",
    "SameObject",
    "SpatialProfile",
    "binding_heads",
    "cross_saliency",
    "fit_same_object",
    "interval",
    "object_scenes",
    "patch_stream",
    "pattern_families",
    "predicate_relevance",
    "pruning_importance",
    "spatial_profile",
]
