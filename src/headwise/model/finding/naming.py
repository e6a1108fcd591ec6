"""Labels for sites: which stack, which layer. Only names depend on module paths; what a site is was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwise.heads import MAIN, SiteId
from headwise.model.running.run import parameter_names
from headwise.model.site import Site

_MODALITIES = {
    "vision": {"vision", "visual", "image", "vit", "patch", "pixel"},
    "audio": {"audio", "speech", "sound", "acoustic"},
}
_STRUCTURE = {
    "model",
    "layers",
    "layer",
    "blocks",
    "block",
    "h",
    "encoder",
    "decoder",
    "base",
    "transformer",
    "backbone",
}


_U_NET = re.compile(r"(^|.*\.)(down_blocks|mid_block|up_blocks)\.")
"""The parts of a U-Net, which one after the other are one sequence of blocks."""


@dataclass(frozen=True)
class _Place:
    """Where a module lies: the lists of layers around it, outermost first, as (path of the list, index in it)."""

    path: str
    lists: tuple[tuple[str, int], ...]
    tower: str

    @property
    def home(self) -> str:
        if found := _U_NET.match(self.path):
            return f"{found[1]}unet"
        return self.lists[0][0] if self.lists else self.path

    @property
    def of_u_net(self) -> bool:
        return bool(self.lists) and _U_NET.match(self.path) is not None

    @property
    def innermost(self) -> str:
        """Path of the element of the innermost list."""
        path, index = self.lists[-1]
        return f"{path}.{index}"


def name_sites(model: nn.Module, found: Sequence[tuple[str, str]]) -> list[tuple[SiteId, str]]:
    """Label and tower of each site, given its module's path and its kind, in the order of calls.

    The layer is the index of the block in its list of layers; where lists are nested and the inner one holds several
    attending blocks (stages), blocks are counted through, and so they are over the parts of a U-Net, in the order in
    which they run. What falls on one label is told apart by `@call`.
    """
    places = [_place(model, path) for path, _ in found]
    u_blocks = {path: layer for layer, path in enumerate(dict.fromkeys(p.innermost for p in places if p.of_u_net))}
    families: dict[tuple[str, str], list[int]] = {}
    for index, (place, (_, kind)) in enumerate(zip(places, found, strict=True)):
        families.setdefault((place.home, "cross" if kind == "cross" else "self"), []).append(index)
    stacks = _stack_names(model, {key: [places[i] for i in members] for key, members in families.items()})
    labels: dict[int, SiteId] = {}
    for key, members in families.items():
        of_u_net = places[members[0]].of_u_net
        layer_of = {} if of_u_net else _layers(model, [places[i] for i in members])
        taken: dict[int, int] = {}
        for index in members:
            layer = u_blocks[places[index].innermost] if of_u_net else layer_of[places[index].path]
            labels[index] = SiteId(stack=stacks[key], layer=layer, call=taken.get(layer, 0))
            taken[layer] = taken.get(layer, 0) + 1
    return [(labels[index], place.tower) for index, place in enumerate(places)]


def stack_blocks(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Every element of every list of layers that holds a site, by label; also elements without attention."""
    blocks: dict[str, str] = {}
    families: dict[str, list[_Place]] = {}
    stacks: dict[str, str] = {}
    for site in sites:
        place = _place(model, site.module)
        if site.kind == "cross" or not place.lists:
            continue
        if place.of_u_net:
            blocks.setdefault(SiteId(stack=site.id.stack, layer=site.id.layer).label, place.innermost)
            continue
        families.setdefault(place.home, []).append(place)
        stacks[place.home] = site.id.stack
    for home, places in families.items():
        for layer, path in _elements(model, places).items():
            blocks[SiteId(stack=stacks[home], layer=layer).label] = path
    return blocks


def is_tower(module: nn.Module) -> bool:
    """Whether a module lays tokens out for what is in it: a pretrained model, or a part that takes tokens itself.

    A layer may be told the tokens beside the states that it works on; it lays out nothing.
    """
    from transformers import PreTrainedModel

    taken = parameter_names(type(module).forward)
    return isinstance(module, PreTrainedModel) or ("input_ids" in taken and "hidden_states" not in taken)


def _place(model: nn.Module, path: str) -> _Place:
    parts, lists, tower = path.split("."), [], ""
    for depth in range(len(parts)):
        prefix = ".".join(parts[:depth])
        module = model.get_submodule(prefix)
        if is_tower(module):
            tower = prefix
        if isinstance(module, nn.ModuleList) and parts[depth].isdigit():
            lists.append((prefix, int(parts[depth])))
    return _Place(path, tuple(lists), tower)


def _nested(places: Sequence[_Place]) -> bool:
    """Whether one element of the outer list holds several attending modules in an inner list."""
    outer = {(place.lists[0], place.lists[1]) for place in places if len(place.lists) > 1}
    return len({first for first, _ in outer}) < len(outer)


def _layers(model: nn.Module, places: Sequence[_Place]) -> dict[str, int]:
    if not all(place.lists for place in places):
        return dict.fromkeys((place.path for place in places), 0)
    if not _nested(places):
        return {place.path: place.lists[0][1] for place in places}
    elements = {path: layer for layer, path in _elements(model, places).items()}
    return {place.path: elements[f"{place.lists[1][0]}.{place.lists[1][1]}"] for place in places}


def _elements(model: nn.Module, places: Sequence[_Place]) -> dict[int, str]:
    """Path of every block of a stack by its layer."""
    home = places[0].home
    outer = [f"{home}.{index}" for index in range(len(model.get_submodule(home)))]  # type: ignore[arg-type]
    if not _nested(places):
        return dict(enumerate(outer))
    inner_names = {place.lists[1][0].removeprefix(f"{home}.{place.lists[0][1]}") for place in places if place.lists[1:]}
    paths = []
    for element in outer:
        for name in sorted(inner_names):
            try:
                inner: Any = model.get_submodule(element + name)
            except AttributeError:
                continue
            paths += [f"{element}{name}.{index}" for index in range(len(inner))]
    return dict(enumerate(paths))


def _stack_names(model: nn.Module, families: dict[tuple[str, str], list[_Place]]) -> dict[tuple[str, str], str]:
    own = {key: places for key, places in families.items() if key[1] == "self"}
    main = _main_family(model, own) if own else next(iter(families))
    names: dict[tuple[str, str], str] = {main: MAIN}
    for key, places in families.items():
        if key == main:
            continue
        base = "cross" if key[1] == "cross" else _own_name(places[0])
        name, number = base, 2
        while name in names.values():
            name, number = f"{base}{number}", number + 1
        names[key] = name
    return names


def _main_family(model: nn.Module, families: dict[tuple[str, str], list[_Place]]) -> tuple[str, str]:
    """The decoder's self-attention; else text; else whatever is largest."""
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def rank(key: tuple[str, str]) -> tuple[bool, bool, bool, int]:
        words = _words(key[0])
        decoder = encoder_decoder and "decoder" in words
        text = not any(words & vocabulary for vocabulary in _MODALITIES.values())
        return decoder, text, "encoder" not in words or not encoder_decoder, len(families[key])

    return max(families, key=rank)


def _own_name(place: _Place) -> str:
    words = _words(place.home)
    for name, vocabulary in _MODALITIES.items():
        if words & vocabulary:
            return name
    if "encoder" in words:
        return "encoder"
    if "decoder" in words:
        return "decoder"
    telling = [part for part in place.home.split(".") if part and not part.isdigit() and part not in _STRUCTURE]
    if not telling:
        return "other"
    return re.sub(r"\W", "_", re.sub(r"_transformer_blocks$", "", telling[-1])).lower()


def _words(path: str) -> set[str]:
    return set(re.split(r"[._\d]+", path.lower()))
