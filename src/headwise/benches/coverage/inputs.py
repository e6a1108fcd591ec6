"""Inputs on which a tiny model runs: those that `hw.attach` makes up itself, else forms that are found by trying.

What a model wants is not declared anywhere, so forms are tried one after the other, and the first on which the model
runs is taken. Pictures and sounds inside a text need as many placeholder tokens as the model makes features of them;
a model that was given another number says in its error how many it would have been.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from headwise.benches.coverage.given import GIVEN
from headwise.benches.coverage.parts import Inputs, noise, setting, text, tokens, with_decoder
from headwise.benches.coverage.rows import Row
from headwise.model.finding.example import example_inputs
from headwise.model.running.run import named_arguments


class NoInputs(Exception):
    """The model ran on none of the forms that were tried; says what the last ones ended in."""


def inputs_for(row: Row, model: nn.Module) -> tuple[Inputs, bool]:
    """Inputs on which the model runs, two rows where it takes rows, and whether `attach` makes them up by itself.

    Raises:
        NoInputs: the model ran on nothing that was tried.
    """
    if type(model).forward is nn.Module.forward:
        raise NoInputs("its class has no forward of its own; its parts are run by other methods")
    errors: list[str] = []
    made_up: Inputs | None = None
    if row.key not in GIVEN and row.model_type not in GIVEN:
        made_up = _tried(model, lambda: example_inputs(model), errors)
        if made_up is not None and is_whole(row, made_up):
            return made_up, True
    for name in (row.key, row.model_type):
        if name in GIVEN and (found := _tried(model, partial(GIVEN[name], model), errors)) is not None:
            return found, False
    for make in _ways(model):
        found = _tried(model, make, errors)
        if found is not None and is_whole(row, found):
            return found, False
    if made_up is not None:  # no form of picture or sound was found: the text part alone
        return made_up, True
    telling = [each for each in dict.fromkeys(errors) if not re.search(r"missing \d+ required|have to specify", each)]
    raise NoInputs("; ".join((telling or errors)[:4]))


def is_whole(row: Row, inputs: Inputs) -> bool:
    """Whether the inputs of a model that takes pictures or sound beside text have them."""
    named = {"image-text": ("pixel", "patches", "video"), "speech": ("features", "values", "audio")}
    return row.task not in named or any(part in name for part in named[row.task] for name in inputs)


def _tried(model: nn.Module, make: Callable[[], Inputs], errors: list[str]) -> Inputs | None:
    try:
        inputs = make()
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    return inputs


def _ways(model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    accepted = named_arguments(model, (), {})
    if "input_ids" in accepted:
        for thing, forms in (("image", pictures), ("audio", sounds)):
            for form in forms(model):
                yield lambda form=form, thing=thing: _in_text(model, form, thing)  # type: ignore[misc]
    for form in (*pictures(model), *sounds(model)):
        yield lambda form=form: with_decoder(model, form)  # type: ignore[misc]
        if "input_ids" in accepted:
            yield lambda form=form: {**text(model), **form}  # type: ignore[misc]
    if "inputs_embeds" in accepted:
        yield lambda: {"inputs_embeds": noise(2, 24, setting(model, "hidden_size"))}
    yield lambda: text(model)


# -- what stands in a text -----------------------------------------------------------------------------------


def _in_text(model: nn.Module, form: Inputs, thing: str) -> Inputs:
    """A text with the placeholders of a picture or a sound in it, as many as the model makes features of it."""
    marker = next(
        (t for n in (f"{thing}_token_id", f"{thing}_token_index") if isinstance(t := setting(model, n), int)), None
    )
    if marker is None:
        raise NoInputs(f"no token stands for the {thing}")
    accepted = named_arguments(model, (), {})
    count, tried = 1, set()
    while True:
        tried.add(count)
        ids = tokens(model)
        ids[ids == marker] = 7
        ids = torch.cat([ids[:, :6], torch.full((2, count), marker), ids[:, 6:]], dim=1)
        start = next(
            (t for n in ("vision_start_token_id", "boi_token_id") if (t := setting(model, n)) is not None), None
        )
        if thing == "image" and isinstance(start, int):
            ids[:, 5] = start
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        inputs: Inputs = {"input_ids": ids, "attention_mask": mask, **form}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in accepted:
                inputs[name] = (ids == marker).long()
        inputs = with_decoder(model, inputs)
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:
            said = re.search(r"tokens:? (?:tensor\()?(\d+)\)?,? *features:? (\d+)", " ".join(str(error).split()))
            if said is None:
                raise
            have, want = int(said[1]), int(said[2])
            hidden = setting(model, "hidden_size") or 1  # some count every number of every feature
            due = [-(-count * features // max(have, 1)) for features in (want, want // hidden)]
            untried = [each for each in due if each not in tried and 1 <= each <= 400]
            if not untried:
                raise
            count = untried[0]


def pictures(model: nn.Module) -> Iterator[Inputs]:
    """The ways in which models take pictures, two of them."""
    accepted = set(named_arguments(model, (), {}))
    first = next(
        (n for n in ("pixel_values", "pixel_values_videos", "flattened_patches", "hidden_states") if n in accepted),
        None,
    )
    if first is None:
        return
    size = setting(model, "image_size") or setting(model, "img_size") or 32
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    patch = setting(model, "patch_size") or setting(model, "patch_sizes") or 8
    side = patch if isinstance(patch, int) else int(patch[-1])
    channels = next(
        (c for n in ("num_channels", "in_channels", "in_chans") if isinstance(c := setting(model, n), int)), 3
    )
    frames = setting(model, "num_frames") or setting(model, "frames_per_clip") or 2
    whole = noise(2, channels, height, width)
    extras = [{"image_sizes": torch.tensor([[height, width]] * 2)}] if "image_sizes" in accepted else []
    extras.append({})
    grid_name = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hws", "grid_hws") if n in accepted), None)
    if grid_name is not None:
        merge = setting(model, "spatial_merge_size") or 2
        merge = merge if isinstance(merge, int) else merge[0]
        rows, columns = (2 * merge, 2 * merge)
        span = setting(model, "temporal_patch_size") or setting(model, "patch_temporal") or 1
        span = span if isinstance(span, int) else span[0]
        grid = torch.tensor([[1, rows, columns]] * 2)
        merged = (side * merge, side * merge, channels)
        for tokens_per_cell in (1, merge**2):
            yield {first: noise(2 * rows * columns // tokens_per_cell, *merged), grid_name: grid}
        for values in ((channels * span * side * side,), (channels, side, side), (channels, span, side, side)):
            flat = noise(2 * rows * columns, *values)
            if "image_merge_sizes" in accepted:
                yield {first: flat, grid_name: grid, "image_merge_sizes": torch.tensor([merge] * 2)}
            yield {first: flat, grid_name: grid}
            if grid_name.endswith("hws"):
                yield {first: flat, grid_name: grid[:, 1:]}
            yield {first: flat, grid_name: grid[:, 1:]}
            yield {first: flat[None], grid_name: grid}
    count = (height // side) * (width // side)
    block = side * (setting(model, "pooling_kernel_size") or 1)
    places = torch.cartesian_prod(torch.arange(height // side), torch.arange(width // side))
    for name in ("pixel_position_ids", "image_position_ids"):
        if name in accepted:
            for flip in (places, places.flip(-1)):
                for numbers in dict.fromkeys((channels * side**2, channels * block**2)):
                    yield {first: noise(2, count, numbers), name: flip[None].expand(2, -1, -1).contiguous()}
    if "spatial_shapes" in accepted:
        shapes = torch.tensor([[height // side, width // side]] * 2)
        some = {first: noise(2, count, channels * side**2), "spatial_shapes": shapes}
        for mask in ("pixel_attention_mask", "pixel_mask"):
            if mask in accepted:
                yield {**some, mask: torch.ones(2, count, dtype=torch.long)}
        yield some
    for sizes in ["target_sizes"] if "target_sizes" in accepted else []:
        shape = torch.tensor([[height // side, width // side]] * 2, dtype=torch.int32)
        yield {first: noise(1, channels, side, 2 * count * side), sizes: shape}
        yield {first: whole, sizes: shape}
    if "high_res_pixel_values" in accepted:
        for high in (2 * height, 4 * height, height):
            yield {first: whole, "high_res_pixel_values": noise(2, channels, high, high)}
    if "pixel_attention_mask" in accepted:
        seen = torch.ones(2, 1, height, width, dtype=torch.bool)
        yield {first: whole[:, None], "pixel_attention_mask": seen}
        yield {first: whole[:, None], "pixel_attention_mask": seen[:, :, 0, 0].long()}
    for extra, value in itertools.product(
        extras,
        (
            whole,
            whole[:, None],
            noise(2, frames, channels, height, width),
            noise(2, channels, frames, height, width),
            noise(2, 2, channels, height, width),
            noise(2, 1, 1, channels, height, width),
            noise(2, count, channels * side**2),
            noise(2, channels, 64, 64),
            noise(2, channels, 224, 224),
        ),
    ):
        yield {first: value, **extra}


_WIDTHS = (
    *("num_mel_bins", "n_mels", "n_mel_bins", "feature_size", "input_feat_size", "input_dim", "input_feat_per_channel"),
    *("feature_projection_input_dim", "nb_max_frames", "audio_dim"),
)
"""Settings that may say how wide a frame of sound is."""


_SOUND_MASKS = (*("input_features_mask", "feature_attention_mask", "audio_mel_mask", "attention_mask", "padding_mask"),)


def sounds(model: nn.Module) -> Iterator[Inputs]:
    """The ways in which models take sound."""
    accepted = set(named_arguments(model, (), {}))
    names = (
        "input_features",
        "input_values",
        "audio_values",
        "audio_mel",
        "input_audio_embeds",
        "audio_input_features",
    )
    first = next((n for n in names if n in accepted), None)
    if first is None:
        return
    named = [setting(model, name) for name in _WIDTHS]
    stacked = setting(model, "num_stacked_frames")
    widths = dict.fromkeys([width for width in named if isinstance(width, int)] or [16])
    if isinstance(stacked, int):
        widths = dict.fromkeys([width * stacked for width in widths])
    positions = setting(model, "max_source_positions")
    lengths = dict.fromkeys([2 * positions if isinstance(positions, int) else 96, 96, 200])
    mask_name = next((name for name in _SOUND_MASKS if name in accepted), None)
    for length in lengths:
        for value in (noise(2, *shape) for bins in widths for shape in ((bins, length), (length, bins))):
            whole = torch.ones(2, length)
            if mask_name is not None and mask_name != "attention_mask":
                for kind in (torch.long, torch.bool):
                    yield {first: value, mask_name: whole.to(kind)}
            yield {first: value}
            if mask_name == "attention_mask" and "input_ids" not in accepted:
                yield {first: value, mask_name: whole.long()}
    for value in (noise(2, 4000), noise(2, 1, 4000), noise(2, 1, 7680)):
        yield {first: value}
        if mask_name is not None:
            yield {first: value, mask_name: torch.ones(2, value.shape[-1], dtype=torch.long)}
