"""Keys that a run itself shows: those to which the tokens of the prompt give much of their attention.

    received_j = sum_i A_ij / n_j,    over the n_j attended queries i of the prompt that see key j

An edit whose keys are a `Received` needs them before its first row is edited, so the prompt's rows are gone through
once beforehand. What was found is kept for the run: a decoding step has one row, and no column means. Where they are a
`LastRow`, one row is made, and a function chooses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from headwise.errors import InputError, Refusal
from headwise.model.attention.calls import AttentionCall
from headwise.model.attention.rows import row_chunks
from headwise.model.operations import LastRow, Received
from headwise.model.positions import Window
from headwise.model.running.plan import Placed
from headwise.model.running.valuework import Stage, here_of

Rows = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of some queries, the weights of the edit's heads and which of them are visible, `[batch, head, query, key]`."""


def find_received(call: AttentionCall, placed: Placed, rows: Rows, stage: Stage) -> None:
    """Find the keys of an edit and keep them with the run; a later step of the same run finds nothing anew.

    Raises:
        Refusal: key columns have no names here; the prompt was not seen by this run, or comes in pieces.
    """
    window, edit = _window(placed, stage), placed.edit
    assert isinstance(edit.keys, Received)
    frame, what = window.frame, f"edit.{edit.name} at {stage.id.label}"
    if frame.past:
        if _place(placed, stage) not in stage.run.received:
            raise Refusal(
                f"{what}: its keys are found in the prompt, and this run begins behind it; use generate(), or run the "
                "prompt and its continuation as one"
            )
        return
    if frame.total < frame.prompt:
        raise Refusal(f"{what}: its keys are found in the prompt, and the prompt comes in pieces; give it whole")
    prompt = frame.in_scope("prompt")
    assert prompt is not None
    counted = window.queries(prompt & frame.mask)
    assert counted is not None
    if isinstance(edit.keys, LastRow):
        with torch.no_grad():
            last, _ = rows((frame.prompt_end - window.start)[:, None])
            chosen = edit.keys.choose(last[:, :, 0], here_of(placed, stage, "rows", 1))
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != last[:, :, 0].shape:
            gave = list(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
            raise InputError(
                f"{what}: the function of last_row() gave {gave}; expected truth values {list(last[:, :, 0].shape)}"
            )
        stage.run.received[_place(placed, stage)] = pad(chosen, (window.offset, 0))
        return
    mass = call.query.new_zeros(stage.batch, len(placed.heads), call.key.shape[2], dtype=torch.float64)
    seers = torch.zeros_like(mass)
    heads = torch.tensor(placed.heads)
    with torch.no_grad():
        for chunk in row_chunks(call, heads, counted.any(0).nonzero()[:, 0]):
            weights, seen = rows(chunk)
            kept = counted[:, None, chunk, None]
            mass += (weights * kept).sum(2)
            seers += (seen & kept).sum(2)
    found = mass / seers.clamp(min=1) > edit.keys.above
    if not window.cross:
        of_prompt = window.keys(prompt)
        assert of_prompt is not None
        found &= of_prompt[:, None]
    found &= found.cumsum(-1) > edit.keys.skip
    stage.run.received[_place(placed, stage)] = pad(found, (window.offset, 0))


def received_keys(placed: Placed, stage: Stage) -> Bool[Tensor, "batch head key"]:
    """The keys found, of all heads of the edit at this site, among those of this call.

    Raises:
        Refusal: the run has gone on with another number of rows.
    """
    window, found = _window(placed, stage), stage.run.received[_place(placed, stage)]
    if len(found) != stage.batch:
        raise Refusal(
            f"edit.{placed.edit.name} at {stage.id.label}: its keys were found in {len(found)} rows, and the run goes "
            f"on with {stage.batch}; use a way to generate that keeps its rows"
        )
    seen = found[..., window.offset : window.offset + window.n_keys]
    return pad(seen, (0, window.n_keys - seen.shape[-1]))


def _window(placed: Placed, stage: Stage) -> Window:
    window = stage.window
    if window is None or window.joined:
        raise Refusal(
            f"edit.{placed.edit.name}: key columns cannot be told at {stage.id.label}, so attention received cannot be "
            "counted; name keys by columns, or leave this site out"
        )
    return window


def _place(placed: Placed, stage: Stage) -> tuple[object, ...]:
    return *placed.key, stage.stream, stage.chunk
