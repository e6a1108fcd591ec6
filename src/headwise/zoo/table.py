"""A row of the zoo's table: a transformers model class, small sizes for it, and inputs that reach all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

KINDS = ("decoder", "encoder", "encoder-decoder", "vision", "vlm", "speech")
"""A type has one of `decoder`, `encoder`, `encoder-decoder`, `vlm`; `vision` and `speech` say what else it takes."""

FEATURES = (
    "mha",  # as many key/value heads as query heads
    "gqa",
    "mqa",
    "mla",  # latent attention: D_qk is not D_v
    "indexer",  # a second, small attention picks the keys
    "window",
    "sink",
    "softcap",
    "gated",  # a gate between z and the output projection
    "qk-norm",
    "position-bias",
    "cross",
    "moe",
    "hybrid",  # some layers have no attention
    "shared-layers",  # several layers are one module
    "two-calls",  # an attention module attends twice
    "two-towers",
    "not-separable",  # no output projection with a slice per head
    "outside-registry",
)


@dataclass(frozen=True)
class TinyType:
    """A model type as a tiny randomly initialised build.

    `model_type` is the type's name in transformers, `classname` the model class that is built, `sizes` the arguments
    of its configuration class (everything not named keeps the type's own default). `tags`
    are words of `KINDS` and `FEATURES`. `variant` tells a second build of a type apart.
    """

    model_type: str
    classname: str
    title: str
    tags: frozenset[str]
    sizes: Mapping[str, Any]
    example: Callable[[PreTrainedConfig], dict[str, Tensor]]
    variant: str = ""

    @property
    def name(self) -> str:
        """What `build` and the command line (after `zoo:`) take."""
        return "-".join(part for part in ("tiny", self.model_type, self.variant) if part)


def tags(words: str) -> frozenset[str]:
    return frozenset(words.split())
