"""How much of what a speech model hears for a token is told by its cross-attention.

After Papi et al. (2025), "Cross-attention is half explanation in speech-to-text models". The saliency of encoder frame
j for token t is what the prediction loses without it, measured by occlusion. With p_t the distribution at decoder
position t,

    S_t(j) = mean over windows w that cover j of KL(p_t || p_t^{without w})          nats, 0 or more

by = "states": the encoder's output is 0 in the window (SM_H of the paper: what the decoder can use)
by = "input":  the input frames that the window stands for are the item's mean over time (SM_X: what was heard)

and the score of a head is, for each token, Pearson's correlation over frames of S_t with its weights A_t; the same for
Spearman's, and for what is really moved, the norm of each frame's write (Kobayashi et al., 2020):

    pattern    A_tj
    weighted   |A_tj v_j W_O|

Maps are also averaged over the heads of a layer and over all heads, and correlated then: the paper finds means to
explain more than single heads. Frames that no head can see (padding) are left out.

A reconstruction: the paper's saliency is by SPES, which cuts spectrograms into pieces of like sound and takes days;
sliding windows are ours, and so are the mean and 0 in them. The paper correlates maps whole, this is token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from headwise.errors import InputError, Refusal
from headwise.find.method import LibraryMethod
from headwise.find.towers.correlation import Interval, interval, pearson, spearman
from headwise.find.towers.tower import SENSED, Inputs, on_device, scores_of
from headwise.heads import SiteId
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.running.projection import head_weights
from headwise.model.site import Site
from headwise.scores import HeadScores

By = Literal["states", "input"]
ROWS = 32
"""Rows of one forward: items times windows."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Correlation of maps with the saliency, for every token.

    Attributes:
        heads: of each cross-attention head; its items are tokens, `item-0:token-3`.
        layers: of the mean map of each layer: `[token, layer]`.
        overall: of the mean map of all heads.
    """

    heads: HeadScores
    layers: Float[np.ndarray, "token layer"]
    overall: Float[np.ndarray, " token"]

    def interval(self, *, level: float = 0.95, seed: int = 0) -> Interval:
        """Mean over tokens of `overall`, and its bootstrap interval over tokens."""
        return interval(self.overall, level=level, seed=seed)


@dataclass(frozen=True, eq=False)
class CrossSaliency:
    """What cross-attention tells of saliency.

    Attributes:
        saliency: S of the file's docstring, also of frames and tokens that no correlation counts, such as padding:
            `[item, token, frame]`.
        pattern, pattern_ranks: Pearson's and Spearman's correlation of the weights A with it.
        weighted, weighted_ranks: the same of the norms of writes.
    """

    saliency: Float[Tensor, "item token frame"]
    pattern: Agreement
    pattern_ranks: Agreement
    weighted: Agreement
    weighted_ranks: Agreement


def cross_saliency(
    model: AttachedModel,
    inputs: Mapping[str, Tensor],
    *,
    by: By = "states",
    window: int = 1,
    stride: int = 1,
    rows: int = ROWS,
) -> CrossSaliency:
    """Compare every cross-attention head of a speech model with the saliency of what it hears.

    Args:
        inputs: what the model takes: its sound (`input_features`), masks, and as `decoder_input_ids` `[item, token]`
            what was said, such as `model.generate` gives it; a `decoder_attention_mask` leaves padding out.
        by: `states` or `input`: where frames are taken out.
        window, stride: of the windows, in encoder frames.
        rows: most rows of one forward, items times windows.

    Raises:
        InputError: inputs without sound or tokens, or settings that cannot be meant.
        Refusal: a model without cross-attention, or one whose patterns or values are out of reach.
    """
    if by not in get_args(By):
        raise InputError(f"by={by!r} is no setting; choose one of {', '.join(get_args(By))}")
    if min(window, stride, rows) < 1 or stride > window:
        raise InputError(
            f"window={window}, stride={stride}, rows={rows}: give 1 or more, and no stride beyond the window"
        )
    ready = _ready(model, inputs)
    sites = _cross_sites(model)
    occlusion = _Occlusion(by, window, stride, rows)
    parts = [_of_items(model, ready.rows(items), sites, occlusion) for items in ready.batches(rows)]
    maps = [{site.id: torch.cat([part.maps[kind][site.id] for part in parts]) for site in sites} for kind in range(2)]
    saliency = torch.cat([part.saliency for part in parts])
    spoken = ready.of_items.get("decoder_attention_mask", torch.ones(saliency.shape[:2])).bool().cpu()
    about = model.provenance("cross-saliency", {"by": by, "window": window, "stride": stride})
    kinds = [_agreement(of_kind, saliency, spoken, how, about) for of_kind in maps for how in (pearson, spearman)]
    return CrossSaliency(saliency, *kinds)


@dataclass(frozen=True, slots=True)
class _Occlusion:
    by: By
    window: int
    stride: int
    rows: int

    def windows(self, frames: int) -> list[tuple[int, int]]:
        """First frame and the one behind the last; the same for a sound by itself and with padding behind it."""
        return [(max(start, 0), start + self.window) for start in range(1 - self.window, frames, self.stride)]


@dataclass(frozen=True, eq=False)
class _Part:
    saliency: Float[Tensor, "item token frame"]
    maps: tuple[Mapping[SiteId, Tensor], Mapping[SiteId, Tensor]]


def _of_items(
    model: AttachedModel, inputs: Mapping[str, Tensor], sites: Sequence[Site], occlusion: _Occlusion
) -> _Part:
    given = on_device(model, inputs)
    labels = [site.label for site in sites]
    with torch.no_grad(), model.reading(read.rows(labels), read.v(labels)) as got:
        output = model(**given, use_cache=False)
    states = getattr(output, "encoder_last_hidden_state", None)
    if not isinstance(states, Tensor):
        raise Refusal(f"{model.name} does not give its encoder's states, which occlusion takes; use another model")
    patterns = {site.id: got.rows[site.label].float().cpu() for site in sites}
    moved = {site.id: patterns[site.id] * _lengths(model, site, got.v[site.label]).cpu()[:, :, None] for site in sites}
    clean = output.logits.double().log_softmax(-1)
    occluded = _states_without if occlusion.by == "states" else _input_without
    total = torch.zeros(*clean.shape[:2], states.shape[1])
    covered = torch.zeros(states.shape[1])
    windows = occlusion.windows(states.shape[1])
    together = max(1, occlusion.rows // len(clean))
    for first in range(0, len(windows), together):
        chosen = windows[first : first + together]
        for (start, end), lost in zip(chosen, _lost(model, occluded(model, given, states, chosen), clean), strict=True):
            total[..., start:end] += lost[..., None]
            covered[start:end] += 1
    return _Part(total / covered, (patterns, moved))


def _lost(
    model: AttachedModel, given: Mapping[str, Any], clean: Float[Tensor, "item token vocab"]
) -> Iterator[Float[Tensor, "item token"]]:
    """KL of the clean distributions to those of each window, which stand one after the other along the rows."""
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits.double().log_softmax(-1)
    for without in logits.split(len(clean)):
        yield (clean.exp() * (clean - without)).sum(-1).clamp(min=0).cpu()


def _states_without(
    model: AttachedModel, given: Mapping[str, Tensor], states: Tensor, windows: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    hidden = states.repeat(len(windows), 1, 1)
    for place, (start, end) in enumerate(windows):
        hidden[place * len(states) : (place + 1) * len(states), start:end] = 0
    others = {name: value for name, value in given.items() if name not in SENSED}
    return _repeated(others, len(windows)) | {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}


def _input_without(
    model: AttachedModel, given: Mapping[str, Tensor], states: Tensor, windows: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    named = next(name for name in SENSED if name in given)
    sound = given[named]
    time = _time_axis(model, sound)
    n_frames = sound.shape[time]
    frames = sound.movedim(time, 1)
    mask = given.get("attention_mask")
    heard = torch.ones(frames.shape[:2]) if mask is None or mask.shape != frames.shape[:2] else mask
    heard = heard.to(frames).reshape(*heard.shape, *[1] * (frames.dim() - 2))
    mean = (frames * heard).sum(1, keepdim=True) / heard.sum(1, keepdim=True).clamp(min=1)
    repeated = frames.repeat(len(windows), *[1] * (frames.dim() - 1))
    per_state = n_frames / states.shape[1]
    for place, (start, end) in enumerate(windows):
        which = slice(place * len(frames), (place + 1) * len(frames))
        part = slice(round(start * per_state), round(end * per_state))
        # Padding stays as it is: what is not heard cannot be taken out.
        repeated[which, part] = torch.where(heard[:, part] > 0, mean, frames[:, part])
    others = {name: value for name, value in given.items() if name != named}
    return _repeated(others, len(windows)) | {named: repeated.movedim(1, time)}


def _repeated(given: Mapping[str, Tensor], times: int) -> dict[str, Any]:
    return {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in given.items()}


def _time_axis(model: AttachedModel, sound: Tensor) -> int:
    """Which axis is time: of a spectrogram the one that is not the frequencies."""
    if sound.dim() == 2:
        return 1
    config = getattr(model.model, "config", None)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None)
    axes = [axis for axis in (1, 2) if sound.dim() == 3 and sound.shape[3 - axis] == bins]
    if len(axes) != 1:
        raise InputError(
            f"which axis of a sound of shape {list(sound.shape)} is time cannot be told from {model.name}; use "
            "by='states'"
        )
    return axes[0]


def _lengths(
    model: AttachedModel, site: Site, values: Float[Tensor, "item frame group width"]
) -> Float[Tensor, "item head frame"]:
    """|v_j W_O| of every head and frame."""
    assert site.projection is not None
    weights = head_weights(model.model.get_submodule(site.projection), site).detach().float()
    gram = weights @ weights.transpose(-1, -2)
    of_heads = values.float().repeat_interleave(site.group_size, dim=2)
    return torch.einsum("ishk,hkl,ishl->ihs", of_heads, gram, of_heads).clamp(min=0).sqrt()


def _agreement(
    maps: Mapping[SiteId, Float[Tensor, "item head token frame"]],
    saliency: Float[Tensor, "item token frame"],
    spoken: Bool[Tensor, "item token"],
    correlation: Any,
    about: Any,
) -> Agreement:
    sites = sorted(maps)
    seen = torch.stack([(maps[site] > 0).flatten(1, 2).any(1) for site in sites]).any(0)
    ids: list[str] = []
    heads: dict[SiteId, list[Tensor]] = {site: [] for site in sites}
    layers: list[Tensor] = []
    overall: list[Tensor] = []
    for item, frames in enumerate(seen):
        tokens = spoken[item].nonzero()[:, 0]
        wanted = saliency[item][tokens][:, frames]
        of_item = [maps[site][item][:, tokens][..., frames] for site in sites]
        ids += [f"item-{item}:token-{token}" for token in tokens.tolist()]
        for site, of_site in zip(sites, of_item, strict=True):
            heads[site].append(correlation(of_site, wanted[None]).T)
        layers.append(torch.stack([correlation(of_site.mean(0), wanted) for of_site in of_item], dim=1))
        overall.append(correlation(torch.cat(of_item).mean(0), wanted))
    return Agreement(
        scores_of(ids, {site: torch.cat(values) for site, values in heads.items()}, about),
        torch.cat(layers).numpy(),
        torch.cat(overall).numpy(),
    )


def _cross_sites(model: AttachedModel) -> tuple[Site, ...]:
    sites = tuple(site for site in model.sites if site.kind == "cross")
    if not sites:
        raise Refusal(f"{model.name} has no cross-attention; this is for models that hear with an encoder and write")
    for site in sites:
        for need in ("rows", "v", "projection"):
            if not site.capabilities[need]:
                raise Refusal(f"{site.label} of {model.name} has no {need}: {site.capabilities[need].reason}")
    return sites


def _ready(model: AttachedModel, inputs: Mapping[str, Tensor]) -> Inputs:
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs are a {type(inputs).__name__}; give a mapping of the model's inputs, its sound and "
            "decoder_input_ids, what it said"
        )
    sounds = [name for name in SENSED if name in inputs]
    if len(sounds) != 1 or "decoder_input_ids" not in inputs:
        raise InputError(
            f"inputs hold {', '.join(inputs) or 'nothing'}; give the sound ({' or '.join(SENSED[1:])}) and "
            "decoder_input_ids, what was said"
        )
    return Inputs.of(model, inputs)


METHODS = (
    LibraryMethod(
        id="cross-saliency",
        title="How much of the saliency of sound cross-attention explains",
        page="towers.md#cross-saliency",
        paper="Cross-attention is half explanation in speech-to-text models",
        year=2025,
        tier="B",
        status="reconstruction",
        needs=("rows", "v", "projection", "sound"),
        cost="1 forward per item and window",
        call="headwise.find.towers.cross_saliency(model, inputs)",
    ),
)
