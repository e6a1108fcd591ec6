"""The rows of the table: every (model type, auto-class) that transformers ships, once, fixed in `rows.csv`.

A type stands with each of the classes for language, for text to text, for images and text and for speech that it has;
where it has none of these, with its base model; and where it has no base model either, with the first class that any
other auto-class gives for it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from transformers.models.auto import modeling_auto

TASKS = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "text-to-text": "Text to text",
    "image-text": "Images and text to text",
    "speech": "Speech to text",
    "base": "Base models: vision, sound, detection, time series",
    "other": "Other classes of types without a base model",
}
"""Each task with its title, in the order of the table."""

_MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text-to-text": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One model class of one type."""

    model_type: str
    task: str
    class_name: str

    @property
    def key(self) -> str:
        return f"{self.model_type} {self.task}"


def committed() -> list[Row]:
    """The rows of `rows.csv`."""
    with resources.files(__package__).joinpath("rows.csv").open(encoding="utf-8") as file:
        return [Row(each["model_type"], each["task"], each["class"]) for each in csv.DictReader(file)]


def shipped() -> list[Row]:
    """The rows of the transformers that is installed, in the order of the table."""
    rows = [Row(kind, task, name) for task in _MAPPINGS for kind, name in _classes(_MAPPINGS[task]).items()]
    covered = {row.model_type for row in rows}
    base = _classes("MODEL_MAPPING_NAMES")
    rows += [Row(kind, "base", name) for kind, name in base.items() if kind not in covered]
    covered |= base.keys()
    for mapping in sorted(name for name in vars(modeling_auto) if name.startswith("MODEL_FOR_")):
        if mapping.endswith("_MAPPING_NAMES"):
            for kind, name in _classes(mapping).items():
                if kind not in covered:
                    covered.add(kind)
                    rows.append(Row(kind, "other", name))
    order = list(TASKS)
    return sorted(rows, key=lambda row: (order.index(row.task), row.model_type))


def write(rows: list[Row], path: str) -> None:
    """Write `rows` as csv."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model_type", "task", "class"))
        writer.writerows((row.model_type, row.task, row.class_name) for row in rows)


def _classes(mapping: str) -> dict[str, str]:
    names: Mapping[str, Any] = getattr(modeling_auto, mapping)
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}
