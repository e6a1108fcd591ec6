"""The class and configuration that baked weights live in: the model's own, one with biases, a Llama's, a smaller one.

A class makes its tensors from its configuration, so what fits is found by building it without weights and looking at
the shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from headwise.errors import Refusal
from headwise.model.site import Site

LIKE_LLAMA = ("qwen2", "mistral")
"""Types whose files compute what Llama's does, with the same names of weights: read in transformers 5."""


@dataclass(frozen=True)
class House:
    """A class with its configuration.

    Attributes:
        created: tensors that the weights so far do not have: biases, which start at zero.
        how: what was changed, in words; empty for the model's own.
    """

    architecture: type[nn.Module]
    config: Any
    created: tuple[str, ...] = ()
    how: str = ""

    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor of the state. Raises Refusal where the class cannot be built without weights."""
        return {name: tensor.shape for name, tensor in self.empty().state_dict().items()}

    def empty(self) -> nn.Module:
        """The model on the meta device: shapes without weights."""
        try:
            with torch.device("meta"):
                return self.architecture(copy.deepcopy(self.config))
        except Exception as error:
            raise Refusal(
                f"{self.architecture.__name__} cannot be built from the configuration that baking needs "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); leave out what asks for it"
            ) from error


def own_house(model: nn.Module) -> House:
    """The model's own class and configuration.

    Raises:
        Refusal: it is no class of transformers, so that no server would know what is saved.
    """
    network: Any = model
    if not isinstance(network, transformers.PreTrainedModel):
        raise Refusal(
            f"a {type(model).__name__} has no checkpoint of transformers to bake into; bake the model inside it"
        )
    if getattr(transformers, type(network).__name__, None) is not type(network):
        raise Refusal(
            f"{type(network).__name__} is code of the checkpoint's own, which is not written anew; bake a model of a "
            "type that transformers has"
        )
    config = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    return House(type(network), config)


def with_biases(house: House, state: Mapping[str, Tensor], wanted: Collection[str]) -> House | str:
    """The same class with a setting that makes these biases; or why none does."""
    flags = [name for name, value in vars(house.config).items() if "bias" in name and value is False]
    for flag in flags:
        config = copy.deepcopy(house.config)
        setattr(config, flag, True)
        larger = replace(house, config=config, how=f"{flag}=true")
        shapes = larger.shapes()
        created = tuple(name for name in shapes if name not in state)
        same = all(shapes.get(name) == tensor.shape for name, tensor in state.items())
        if same and set(wanted) <= set(created) and all(name.endswith(".bias") for name in created):
            return replace(larger, created=created)
    return f"{house.architecture.__name__} has no bias at its output projections and no setting that makes one"


def as_llama(house: House, state: Mapping[str, Tensor], wanted: Collection[str]) -> House | str:
    """The weights as a Llama with biases; or why they cannot be that. See `LIKE_LLAMA`."""
    own = house.config
    name = house.architecture.__name__
    if own.model_type not in LIKE_LLAMA or not name.endswith("ForCausalLM"):
        return f"a {name} is not among those that a Llama checkpoint can hold ({', '.join(LIKE_LLAMA)} for text)"
    window = getattr(own, "sliding_window", None)
    if window is not None and getattr(own, "use_sliding_window", True):
        return f"its layers see a window of {window} keys, which a Llama checkpoint cannot say"
    if {*(getattr(own, "layer_types", None) or ())} - {"full_attention"}:
        return f"its layers are of several kinds ({', '.join(sorted({*own.layer_types}))}), which a Llama's are not"
    taken = own.to_dict()
    kept = {name: taken[name] for name in transformers.LlamaConfig().to_dict() if name in taken}
    for name in ("model_type", "architectures", "transformers_version"):
        kept.pop(name, None)
    kept["head_dim"] = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    config = transformers.LlamaConfig(**{**kept, "attention_bias": True, "mlp_bias": False})
    config.architectures = ["LlamaForCausalLM"]
    config._attn_implementation = own._attn_implementation
    llama = House(transformers.LlamaForCausalLM, config, how="weights as a Llama checkpoint with attention_bias=true")
    shapes = llama.shapes()
    created = tuple(name for name in shapes if name not in state)
    odd = sorted(name for name, tensor in state.items() if shapes.get(name) != tensor.shape)
    odd += sorted(set(wanted) - {*created}) + [name for name in created if not name.endswith(".bias")]
    if odd:
        return f"{odd[0]} has no place in a Llama checkpoint"
    return replace(llama, created=created)


def with_fewer_heads(house: House, site: Site, groups_less: int) -> House | str:
    """The same class with that many KV groups less in every layer; or why its configuration cannot say that."""
    config = copy.deepcopy(house.config)
    groups = site.n_kv_heads - groups_less
    settings = {
        "num_attention_heads": groups * site.group_size,
        "num_key_value_heads": groups,
        "head_dim": site.qk_dim,
    }
    for name, value in settings.items():
        if not hasattr(config, name) and name == "head_dim":
            return f"a {type(config).__name__} has no head_dim: it is the hidden size over the number of heads"
        if hasattr(config, name):
            setattr(config, name, value)
    return replace(house, config=config, how="; ".join(filter(None, (house.how, f"{groups} KV groups in every layer"))))


__all__ = ["House", "as_llama", "own_house", "with_biases", "with_fewer_heads"]
