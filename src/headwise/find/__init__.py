"""Methods that find heads: one small file per published method, all run with `find`."""

from __future__ import annotations

from importlib import import_module

from headwise.catalogue import register
from headwise.find.method import Method
from headwise.find.search import find, method
from headwise.room import callable_as

FILES = (
    "profile",
    "local_global",
    "previous_token",
    "offset",
    "sink",
    "uniform",
    "duplicate_token",
    "induction",
    "copying",
    "retrieval",
    "retrieval_proxy",
    "direct_logit",
    "fact_parts",
    "head_pursuit",
    "gate_gradient",
    "codes",
    "knock_out",
    "hydra",
    "path_patching",
    "memory_context",
    "arithmetic",
    "correct_letter",
    "reasoning",
    "decision",
    "vision_aware",
    "visual_sink",
    "multimodal_retrieval",
    "gaze",
    "alignment",
    "contrastive_maps",
)
"""The modules of this room that define a method, each as `METHODS`."""

METHODS: tuple[Method, ...] = tuple(each for name in FILES for each in import_module(f"headwise.find.{name}").METHODS)
for _each in METHODS:
    register(_each)
import_module("headwise.find.towers")  # methods that find does not run

callable_as(__name__, find)

__all__ = ["METHODS", "Method", "find", "method"]
