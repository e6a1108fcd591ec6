"""Which tokens of a denoiser's attention are of the image and which of the text, measured by running it.

With other latents and the same text, what is made of the image changes and what is made of the text does not: that
names the queries and the keys of every site, and tells cross- from self-attention whatever their lengths. Where both
kinds stand in one attention, the module that is given them apart is run once more with another text: the queries that
change are the text's. Each of the two may have an output projection of its own; it is the one that takes their z in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headwise.model.finding.denoiser_example import image_argument, is_denoiser
from headwise.model.finding.recording import entering, listening, matrices
from headwise.model.finding.shifting import SiteSeen, SpanSeen
from headwise.model.running.run import named_arguments, parameter_names
from headwise.model.running.spans import IMAGE, TEXT, own_spans

IMAGE_STATES, TEXT_STATES = "hidden_states", "encoder_hidden_states"


def find_token_spans(model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[SiteSeen]) -> None:
    """Name the tokens of every site of a denoiser; other models, and what cannot be told, are left as they are."""
    name = image_argument(model)
    if name is None or not is_denoiser(model) or not isinstance(inputs.get(name), Tensor):
        return
    has_text = isinstance(inputs.get(TEXT_STATES), Tensor)
    meetings: dict[int, Meeting] = {}
    handles = [module.register_forward_pre_hook(_noting(meetings), with_kwargs=True) for module in model.modules()]
    try:
        plain = _calls_of(model, sites, lambda: model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    others = _calls_of(model, sites, lambda: model(**{**inputs, name: _another(inputs[name])}))
    for site, before, after in zip(sites, plain, others, strict=True):
        if before is None or after is None:
            continue
        of_image = [not torch.equal(one, other) for one, other in zip(before.sides, after.sides, strict=True)]
        if all(of_image) and (meeting := _meeting(model, site, meetings)) is not None:
            _find_joint(site, meeting)
        elif all(of_image) or has_text:
            queries, keys = (IMAGE if moved else TEXT for moved in of_image)
            site.spans, site.key_spans = (SpanSeen(queries),), (keys,)
            site.calls[0].kind = "self" if queries == keys else "cross"


@dataclass(frozen=True, eq=False)
class Meeting:
    """A module that is given tokens of the image and of the text apart, as it was called."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    lengths: Mapping[str, int]

    def run(self, text: Callable[[Tensor], Tensor]) -> None:
        """Call the module again with another text."""
        place = parameter_names(type(self.module).forward).index(TEXT_STATES)
        args, kwargs = list(self.args), dict(self.kwargs)
        if place < len(args):
            args[place] = text(args[place])
        else:
            kwargs[TEXT_STATES] = text(kwargs[TEXT_STATES])
        self.module(*args, **kwargs)


def lengths_given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int] | None:
    """How many tokens of the image and of the text a module is given apart; None where it is not."""
    arguments = named_arguments(module, args, kwargs)
    states = {IMAGE: arguments.get(IMAGE_STATES), TEXT: arguments.get(TEXT_STATES)}
    if not all(isinstance(x, Tensor) and x.dim() == 3 for x in states.values()):
        return None
    return {kind: int(x.shape[1]) for kind, x in states.items() if x is not None}


@dataclass(frozen=True, eq=False)
class _Call:
    """What one call was made of: `sides` are what its queries and its keys come from."""

    query: Tensor
    sides: tuple[Tensor, Tensor]
    z: Tensor


def _calls_of(model: nn.Module, sites: Sequence[SiteSeen], run: Callable[[], Any]) -> list[_Call | None]:
    calls: dict[tuple[int, int], _Call] = {}
    counts: dict[int, int] = {}

    def attend(
        base: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **o: Any
    ) -> Any:
        output = base(module, query, key, value, *rest, **o)
        turn = counts[id(module)] = counts.get(id(module), -1) + 1
        # Scores of the model's own are made of queries and keys; then the values alone tell where keys come from.
        asking = o.get("own_scores", query)
        calls[id(module), turn] = _Call(query, (asking, value), output[0])
        return output

    with listening(model, attend, dict.fromkeys(module for site in sites for module in site.watched)):
        run()
    return [calls.get((id(site.module), site.ordinal)) for site in sites]


def _noting(meetings: dict[int, Meeting]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths = lengths_given(module, args, kwargs)
        if lengths is not None:
            meetings.setdefault(id(module), Meeting(module, args, kwargs, lengths))

    return hook


def _meeting(model: nn.Module, site: SiteSeen, meetings: Mapping[int, Meeting]) -> Meeting | None:
    """The innermost module around a site that is given both kinds apart, as many as the site has queries."""
    path = next(path for path, module in model.named_modules() if module is site.module)
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        meeting = meetings.get(id(model.get_submodule(".".join(parts[:depth]))))
        if meeting is not None and sum(meeting.lengths.values()) == site.calls[0].n_queries:
            return meeting
    return None


def _find_joint(site: SiteSeen, meeting: Meeting) -> None:
    entered: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = entering(args, kwargs)
        if taken is not None:
            entered.append((module, taken.detach().clone()))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in matrices(meeting.module)]
    try:
        (before,) = _calls_of(meeting.module, [site], lambda: meeting.run(lambda text: text))
    finally:
        for handle in handles:
            handle.remove()
    (after,) = _calls_of(meeting.module, [site], lambda: meeting.run(_another))
    if before is None or after is None or not before.query.shape[-1]:
        return
    names = _in_order((before.query != after.query).any(dim=(0, 1, 3)), meeting.lengths)
    if names is None:
        return
    site.calls[0].kind, site.joined_in = "joint", meeting.module
    columns = own_spans(names, meeting.lengths, {})
    site.spans = tuple(SpanSeen(name, _taker(before.z[:, columns[name]], entered)) for name in names)
    site.key_spans = names


def _in_order(of_text: Bool[Tensor, " query"], lengths: Mapping[str, int]) -> tuple[str, ...] | None:
    """The two kinds in the order they stand in, told from which queries are the text's."""
    for names in ((IMAGE, TEXT), (TEXT, IMAGE)):
        expected = torch.cat([torch.full((lengths[name],), name == TEXT) for name in names])
        if torch.equal(of_text.cpu(), expected):
            return names
    return None


def _taker(z: Tensor, entered: Sequence[tuple[nn.Module, Tensor]]) -> nn.Module | None:
    """The first matrix that z of one kind of tokens enters, value for value."""
    flat = z.reshape(-1)
    for module, x in entered:
        if x.shape[:-1] == z.shape[:2] and x.numel() == flat.numel() and torch.equal(x.reshape(-1), flat):
            return module
    return None


def _another(x: Tensor) -> Tensor:
    """Other values of the same size and spread."""
    return x.flip(0) + x.roll(1, -1) + 1.0
