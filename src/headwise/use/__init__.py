"""Heads in use: one small file per published intervention, and what is done with all of them.

from headwise import use
with use.HeadScaling("L2H1", 2.0)(model):
    model.generate(**inputs)
"""

from __future__ import annotations

from importlib import import_module

from headwise.catalogue import InterventionEntry, register
from headwise.use.attention.calibration import AttentionCalibration
from headwise.use.attention.rotary import RotaryDimensions
from headwise.use.attention.span_emphasis import SpanEmphasis
from headwise.use.attention.temperature import AttentionTemperature
from headwise.use.attention.zero_tuning import ZeroTuning
from headwise.use.decoding.context_aware import ContextAware
from headwise.use.decoding.decore import DeCoRe
from headwise.use.decoding.dola import DoLa
from headwise.use.directions.head_pursuit import HeadPursuit
from headwise.use.directions.inference_time import ITI
from headwise.use.directions.soft_injection import SoftInjection
from headwise.use.evaluating import evaluate
from headwise.use.harness import harness_model
from headwise.use.intervention import Intervention, Together, intervention
from headwise.use.knowledge.juice import JUICE, JustRunOnce
from headwise.use.knowledge.knowledge_pruning import PH3
from headwise.use.knowledge.temporal_edit import TemporalEdit
from headwise.use.knowledge.value_scaling import FactualScaling
from headwise.use.looking.gaze import GazeRedirection
from headwise.use.looking.paint import PAINT
from headwise.use.looking.redistribution import VAR
from headwise.use.looking.reinforcement import VHR
from headwise.use.looking.vision_pruning import VisionPruning
from headwise.use.scaling import HeadOffset, HeadRemoval, HeadScaling
from headwise.use.sharing.adapter import Adapter
from headwise.use.sharing.hub import from_pretrained, push_to_hub
from headwise.use.sharing.saved import load, save

FILES = (
    "scaling",
    "knowledge.knowledge_pruning",
    "knowledge.value_scaling",
    "knowledge.juice",
    "knowledge.temporal_edit",
    "directions.inference_time",
    "directions.head_pursuit",
    "decoding.decore",
    "decoding.dola",
    "decoding.context_aware",
    "attention.calibration",
    "attention.rotary",
    "attention.span_emphasis",
    "attention.temperature",
    "attention.zero_tuning",
    "directions.soft_injection",
    "looking.reinforcement",
    "looking.redistribution",
    "looking.gaze",
    "looking.paint",
    "looking.vision_pruning",
)
"""The modules of this room that define interventions, each as `INTERVENTIONS`."""

INTERVENTIONS: tuple[InterventionEntry, ...] = tuple(
    each for name in FILES for each in import_module(f"headwise.use.{name}").INTERVENTIONS
)
for _each in INTERVENTIONS:
    register(_each)

__all__ = [
    "INTERVENTIONS",
    "ITI",
    "JUICE",
    "PAINT",
    "PH3",
    "VAR",
    "VHR",
    "Adapter",
    "AttentionCalibration",
    "AttentionTemperature",
    "ContextAware",
    "DeCoRe",
    "DoLa",
    "FactualScaling",
    "GazeRedirection",
    "HeadOffset",
    "HeadPursuit",
    "HeadRemoval",
    "HeadScaling",
    "Intervention",
    "JustRunOnce",
    "RotaryDimensions",
    "SoftInjection",
    "SpanEmphasis",
    "TemporalEdit",
    "Together",
    "VisionPruning",
    "ZeroTuning",
    "evaluate",
    "from_pretrained",
    "harness_model",
    "intervention",
    "load",
    "push_to_hub",
    "save",
]
