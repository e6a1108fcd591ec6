"""Which module is the feed-forward of a block, found by derivatives (the four measurements of `sublayers.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.model.finding.block_run import BlockRun, Seen, same_values
from headwise.model.finding.norms import float_dtype, measure_norm
from headwise.model.finding.ways import NoGradient, gradients, signs_like


@dataclass(frozen=True, slots=True)
class Write:
    """Module `name` adds `scale * output` to the sum that the block returns, through `closing_norm` if there is one."""

    name: str
    scale: float
    closing_norm: str | None
    output: Seen


def feed_forward_of(run: BlockRun, x: Tensor, stream: Tensor) -> Write | str:
    """The block's one feed-forward write, or in words why there is none."""
    if x.shape[1] < 2:
        return "the forward it was measured on had one position; what acts on each alone shows from two on"
    y = Seen.of(stream)
    run.calls = [call.on_stream(x) for call in run.calls]
    try:
        writes = _feed_forward_writes(run, x, y, None)
        for call in run.calls:
            if writes or call.only is None or call.output is None or not same_values(call.output.value, y.value):
                continue
            if measure_norm(call.name, call.module, call.only.value, call.output.value) is not None:
                writes = _feed_forward_writes(run, x, call.only, call.name)
    except NoGradient as error:
        return f"gradients do not pass through the block: {error}"
    if not writes:
        return "no module of the block adds its output to the stream and reads the stream at each position alone"
    # A dropout or layer-drop after the write returns the same values: the module that made them comes first.
    others = [write.name for write in writes[1:] if not same_values(write.output.value, writes[0].output.value)]
    if others:
        return f"several modules add to the stream side by side: {', '.join([writes[0].name, *others])}"
    return writes[0]


def _feed_forward_writes(run: BlockRun, x: Tensor, total: Seen, closing_norm: str | None) -> list[Write]:
    """All outermost modules with the four properties at the top of this file, in the order in which they returned."""
    if not total.tensor.requires_grad:
        return []
    states = [Seen.of(x), *(seen for call in run.calls for seen in (*call.inputs, call.output) if seen is not None)]
    signs = signs_like(x)
    writes: list[Write] = []
    for name, scale, output in _added_to(run, total, signs):
        if any(name.startswith(f"{outer.name}.") for outer in writes):
            continue
        rest, bound = _rest(total, scale, output)
        if bool((rest.abs() <= bound).all()):
            continue  # It is all that the block returns: there is no stream that it could be added to.
        before = [state for state in states if _is_multiple(rest, state, bound)]
        at_input = [state for state in states if same_values(state.value, x)]
        if any(_reads_each_position_alone(output, sources, run, signs) for sources in (before, at_input)):
            writes.append(Write(name, scale, closing_norm, output))
    returned = [call.name for call in run.calls]
    return sorted(writes, key=lambda write: returned.index(write.name))


def _added_to(run: BlockRun, total: Seen, signs: Tensor) -> list[tuple[str, float, Seen]]:
    """Name, factor c and output of each module with d(total)/d(output) = c times the identity; outer ones first."""
    times = Counter(call.name for call in run.calls)
    asked = [
        (call.name, call.output)
        for call in run.calls
        if times[call.name] == 1 and call.output is not None and call.output.tensor.requires_grad
    ]
    # With r of random signs, r^T d(total)/d(output) = c r holds for c times the identity and by luck for nothing else,
    # and signs are exact in every dtype.
    towards = signs.view_as(total.tensor)
    found = gradients(total.tensor, [seen.tensor for _, seen in asked], towards)
    added = []
    for (name, seen), gradient in zip(asked, found, strict=True):
        if gradient is None:
            continue
        ratio = (gradient.reshape(signs.shape) * signs).to(float_dtype(gradient))
        c = float(ratio.mean())
        if c != 0 and float((ratio - c).abs().max()) <= 4 * torch.finfo(gradient.dtype).eps * abs(c):
            added.append((name, c, seen))
    return sorted(added, key=lambda entry: entry[0].count("."))


def _rest(total: Seen, scale: float, output: Seen) -> tuple[Tensor, Tensor]:
    """total - scale * output, flat, and how far from it rounding may have moved each element."""
    whole = total.value.flatten().to(float_dtype(total.value))
    part = scale * output.value.flatten().to(whole.dtype)
    # One rounding of the product and one of the sum, each at most eps / 2 of its result; and room for a fused order.
    return whole - part, 4 * torch.finfo(total.value.dtype).eps * (whole.abs() + part.abs())


def _is_multiple(rest: Tensor, state: Seen, bound: Tensor) -> bool:
    """Whether rest = a * state for some number a != 0, element by element."""
    value = state.value.flatten().to(rest.dtype)
    if not bool(value.any()):
        return False
    a = (rest @ value) / (value @ value)
    return bool(a != 0) and bool(((rest - a * value).abs() <= bound).all())


def _reads_each_position_alone(output: Seen, sources: Sequence[Seen], run: BlockRun, signs: Tensor) -> bool:
    """Whether output at a position depends on the sources there and not elsewhere, and on nothing else the block got.

    Gradients of what does not depend are exact zeros or absent. Two positions are asked: the last, which a causal mixer
    fills from all others, and a middle one, since a mask may shut the last one off.
    """
    cut = [source.tensor for source in sources if source.tensor.requires_grad]
    others = [leaf for leaf in run.leaves.values() if all(leaf is not tensor for tensor in cut)]
    length = signs.shape[1]
    for position in {length - 1, (length - 1) // 2}:
        towards = torch.zeros_like(signs)
        towards[:, position] = signs[:, position]
        towards = towards.view_as(output.tensor)
        reached = torch.zeros(length, dtype=torch.bool, device=signs.device)
        for gradient in gradients(output.tensor, cut, towards):
            if gradient is not None:
                reached |= (gradient.reshape(signs.shape) != 0).any(-1).any(0)
        if reached.nonzero().flatten().tolist() != [position]:
            return False
        with ExitStack() as undo:
            for tensor in cut:
                undo.callback(tensor.register_hook(torch.zeros_like).remove)  # type: ignore[no-untyped-call]
            if any(g is not None and bool((g != 0).any()) for g in gradients(output.tensor, others, towards)):
                return False
    return True
