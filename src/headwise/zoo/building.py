"""Every model of the zoo by its name: `zoo.build("organism")`, `zoo.build("tiny-llama")`.

organism = build("tiny-llama")
organism.model(**organism.example).logits.shape      # torch.Size([2, 32, 264])
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

import torch

from headwise.catalogue import Entry, register
from headwise.errors import InputError
from headwise.zoo.diffusion import DENOISERS, build_denoiser
from headwise.zoo.organism import TITLE, load_organism
from headwise.zoo.planted import PLANTED_NAMES, planted_named
from headwise.zoo.tiny import Organism, build_tiny, outside_registry, tiny_types
from headwise.zoo.visual_organism import TITLE as VISUAL_TITLE
from headwise.zoo.visual_organism import load_visual_organism


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str | None = None) -> Organism:
    """The model `name`, in evaluation mode on the CPU; the same weights for the same seed.

    `attn` is the attention implementation (`eager`, `sdpa`, ...); None leaves it to transformers. A trained model has
    the weights it was shipped with, and no seed but 0.

    Raises `InputError` for an unknown name, for an attention implementation that the type does not have, and for a seed
    that the model does not have.
    """
    if name in _TRAINED:
        if seed != 0:
            raise InputError(f"{name} has trained weights and no seed {seed}; leave seed out")
        return _TRAINED[name](dtype=dtype, attn=attn)
    if name not in _BUILDERS:
        close = get_close_matches(name, names(), n=3, cutoff=0.5)
        nearest = f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(names())}"
        raise InputError(f"the zoo has no model {name!r}; {nearest}")
    return _BUILDERS[name](seed=seed, dtype=dtype, attn=attn)


def names() -> tuple[str, ...]:
    """Every name that `build` takes."""
    return (*_TRAINED, *_BUILDERS)


_TRAINED: dict[str, Callable[..., Organism]] = {"organism": load_organism, "visual-organism": load_visual_organism}

_BUILDERS: dict[str, Callable[..., Organism]] = {
    **{name: partial(planted_named, name) for name in PLANTED_NAMES},
    **{row.name: partial(build_tiny, row) for row in (*tiny_types(), *outside_registry())},
    **{row.name: partial(build_denoiser, row) for row in DENOISERS},
}

register(Entry(id="organism", kind="models", title=TITLE, page="organism.md"))
register(Entry(id="visual-organism", kind="models", title=VISUAL_TITLE, page="visual-organism.md"))
for _name, _architecture in PLANTED_NAMES.items():
    register(Entry(id=_name, kind="models", title=f"planted heads, {_architecture} shape", page="planted.md"))
for _type in (*tiny_types(), *outside_registry()):
    register(Entry(id=_type.name, kind="models", title=_type.title, page="zoo.md"))
for _denoiser in DENOISERS:
    register(Entry(id=_denoiser.name, kind="models", title=_denoiser.title, page="diffusion.md"))
