"""An adapter in PEFT's layout, as a value that can be checked against a model, saved and shared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A folder that PEFT wrote, or that is written as PEFT does: `adapter_config.json`, `adapter_model.safetensors`.

    `PeftModel.from_pretrained(model, adapter.folder)` puts it on a model.

    Attributes:
        folder: where it is.
        heads: the heads that it is restricted to; None where it is not.

    Raises:
        InputError: one of the files is missing or damaged.
        Refusal: weights that exist only as a pickle; an adapter of another type than LoRA.
    """

    folder: Path
    heads: HeadSet | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / WEIGHTS).is_file() and (self.folder / "adapter_model.bin").is_file():
            raise Refusal(f"{self.folder} has its weights as a pickle (adapter_model.bin); save them as safetensors")
        for name in (CONFIG, WEIGHTS):
            if not (self.folder / name).is_file():
                raise InputError(f"{self.folder} is no PEFT adapter: it has no {name}")
        try:
            form = json.loads((self.folder / CONFIG).read_bytes()).get("peft_type")
            changed = self.shapes
        except (ValueError, AttributeError, SafetensorError) as error:
            raise InputError(f"{self.folder} holds a damaged adapter ({type(error).__name__}: {error})") from None
        if not changed:
            raise Refusal(
                f"{self.folder} is an adapter of the type {form} that changes no weight by LoRA; only LoRA is read"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Qualified name of each module that LoRA changes -> (outputs, inputs) that its weight must have."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        found = {}
        for name, size in sizes.items():
            module, lora, _ = name.partition(".lora_A.")
            other = name.replace(".lora_A.", ".lora_B.")
            if lora and other in sizes:
                found[module.removeprefix("base_model.model.")] = (sizes[other][0], size[1])
        return found

    def require_fits(self, model: AttachedModel) -> None:
        """Raises Refusal where the model lacks a module that the adapter changes, or has it in another shape."""
        modules = dict(model.model.named_modules())
        for name, shape in self.shapes.items():
            weight = getattr(modules.get(name), "weight", None)
            here = None if weight is None else tuple(weight.shape)
            if here is not None and not isinstance(modules[name], nn.Linear):
                here = here[::-1]  # Conv1D of GPT-2 holds its weight the other way round
            if here != shape:
                has = "it has no such module" if here is None else f"there it is {list(here)}"
                raise Refusal(
                    f"the adapter changes {name}, a weight [outputs, inputs] of {list(shape)}, and does not fit "
                    f"{model.name}: {has}; load the model it was made for"
                )


__all__ = ["Adapter"]
