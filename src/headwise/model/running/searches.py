"""Which ways of searching `generate` has, as far as they matter to runs that contrast logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from headwise.errors import Refusal
from headwise.model.running.run import parameter_names

_BY_ITSELF = {"assistant_early_exit": "drafts with fewer layers", "use_mtp": "drafts with heads of its own"}


def refuse_search(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises Refusal for a search whose forwards are not those of the model as it is, or are not known.

    `args` and `kwargs` are what `generate` is called with.

    Greedy search, sampling, beams, an assistant and drafts looked up in the prompt all choose from the logits of
    forwards of the model, so they are served.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper names no arguments
    kwargs = {**dict(zip(parameter_names(type(inner).generate), args, strict=False)), **kwargs}
    served = "a contrast of logits serves greedy search, sampling, beams, an assistant model and prompt lookup"
    if kwargs.get("custom_generate") is not None:
        raise Refusal(f"custom_generate= is code that headwise does not know; {served}")
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    if config is None:
        return
    asked = copy.deepcopy(config)
    for name, value in kwargs.items():
        if hasattr(asked, name) and not callable(getattr(asked, name)):
            setattr(asked, name, value)
    for name, what in _BY_ITSELF.items():
        if getattr(asked, name, None):
            raise Refusal(f"{name}= {what} of the same model, whose logits are no contrast; leave it out: {served}")
    mode = asked.get_generation_mode(kwargs.get("assistant_model"))
    if mode.value in ("contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search"):
        raise Refusal(f"{mode.value} is code that transformers loads from its hub; {served}")
