"""Tiny randomly initialised models of many types, built in memory from a seed: `headwise doctor zoo:tiny-llama`.

They know nothing; they have the shape of the real ones. What is said about a head of such a model (its slice of the
output projection, its KV group, its mask) is as true of the large model of the same type.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from headwise.errors import InputError
from headwise.zoo.decoders import DECODERS
from headwise.zoo.encoders import ENCODER_DECODERS, ENCODERS, SPEECH
from headwise.zoo.processors import PROCESSORS
from headwise.zoo.table import TinyType
from headwise.zoo.tokens import byte_tokenizer
from headwise.zoo.unregistered import OUTSIDE_REGISTRY
from headwise.zoo.vision import IMAGE_ENCODERS, VLMS
from headwise.zoo.weights import roughen


@dataclass(frozen=True)
class Organism:
    """A model of the zoo with what is needed to run it.

    `model` is in eval mode on the CPU. `tokenizer` is None where the model takes no text, and `processor` where it
    takes no pictures with it. `example` holds the inputs of one plain forward, two rows, that reaches every attention
    module: `model(**example)`.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    example: dict[str, Tensor]
    title: str
    processor: ProcessorMixin | None = field(default=None, kw_only=True)


def build_tiny(
    row: TinyType, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str | None = None
) -> Organism:
    """The tiny model of one type; the same weights for the same seed, whatever was drawn before.

    The weights of another `dtype` are those of float32, rounded. `attn` is the attention implementation
    (`eager`, `sdpa`, ...); None leaves it to transformers. The global random state is left as it was.

    Raises `InputError` for an attention implementation that the type does not have.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the accelerators, whose state is not forked here.
        torch.default_generator.manual_seed(seed)
        model = _instantiate(row, torch.float32, attn)
        roughen(model)
        if dtype != torch.float32:
            # Built anew rather than cast, so that what the type keeps in float32 (rotary frequencies) stays there.
            rounded = _instantiate(row, dtype, attn)
            rounded.load_state_dict(model.state_dict())
            for parameter in rounded.parameters():  # a few files make some in float32, whatever they are told
                parameter.data = parameter.data.to(dtype)
            model = rounded
        inputs = row.example(model.config)
    example = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    tokenizer = None
    if inputs.keys() & {"input_ids", "decoder_input_ids"}:
        tokenizer = byte_tokenizer("left" if row.tags & {"decoder", "vlm"} else "right")
    writes = PROCESSORS.get(row.model_type)
    processor = None if tokenizer is None or writes is None else writes(tokenizer)
    return Organism(row.name, model.eval(), tokenizer, example, row.title, processor=processor)


def tiny_types() -> tuple[TinyType, ...]:
    """The types that take their attention from the registry of transformers."""
    return (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *SPEECH, *IMAGE_ENCODERS, *VLMS)


def outside_registry() -> tuple[TinyType, ...]:
    """The types that have attention code of their own, or some beside the registry."""
    return OUTSIDE_REGISTRY


def _instantiate(row: TinyType, dtype: torch.dtype, attn: str | None) -> PreTrainedModel:
    model_class = getattr(transformers, row.classname)
    # A copy, because the configuration keeps the lists it is given, and building writes into its dictionaries.
    config = model_class.config_class(**copy.deepcopy(dict(row.sizes)))
    if attn is None:
        return model_class._from_config(config, dtype=dtype)
    try:
        return model_class._from_config(config, dtype=dtype, attn_implementation=attn)
    except (ValueError, ImportError) as error:
        raise InputError(f"{row.name} cannot run with attn={attn!r}: {str(error).splitlines()[0]}") from error
