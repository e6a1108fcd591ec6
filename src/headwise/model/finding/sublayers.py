"""The blocks of a model, what their feed-forward adds to the residual stream, and the final norm, found by running.

No class, attribute or module name is looked up. One forward is recorded block by block, with gradients inside each
block, and a module is called the feed-forward (MLP) of its block when four things were measured of its output m:

1. d(sum)/dm is one number c times the identity, where `sum` is the block's output, or the input of the norm that
   closes the block (post-norm models). So c m is added to `sum`, and nothing in the block reads it before.
2. Either `sum - c m` is, value for value, a state s of the stream that some module of the block read or returned (times
   a constant), or the block is parallel and s is the block's input.
3. m at one position depends on s at that position alone: attention, cross-attention from the stream, convolutions and
   recurrent mixers all fail here.
4. With s held fixed, m depends on no other argument of the block: cross-attention to encoder states fails here.

Where no module, or more than one, has all four, the answer is None with the reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.heads import SiteId
from headwise.model.finding.block_run import BlockRun, Call, Seen, same_values
from headwise.model.finding.feed_forward import feed_forward_of
from headwise.model.finding.norms import FinalNorm, may_be_norm, measure_norm, submodule
from headwise.model.finding.ways import NoGradient, Passed, Way, find_way


@dataclass(frozen=True, slots=True)
class Block:
    """One block: where its residual stream is, and which module's output its feed-forward adds to that stream.

    The stream before the block is the argument `input_key` (an int: positional, a str: keyword), the stream after it is
    `first_tensor(output)`, both `[batch, position, d_model]`; `residual` says that they are there and of one shape.

    `mlp` is the qualified name of the outermost module whose output (its first tensor), times `mlp_scale`, is added:
    `stream_after = rest + mlp_scale * output`, or, where `closing_norm` names a norm that stands after that sum
    (post-norm models), `stream_after = closing_norm(rest + mlp_scale * output)`. Its output is
    `[batch, position, d_model]`, or the same rows flattened to `[batch * position, d_model]` (OPT). `mlp_scale` is
    measured in the model's dtype. A block with two feed-forwards in a row (macaron) names the one nearest its output.

    `calls` is how often the block ran in the one forward; with more than one (ALBERT) all else is of the last call.
    `reasons` says why `residual` is False or `mlp` is None, under these two names.

    `ways` holds how each write reaches the stream behind the block, and how the stream before it does, past the writes:
    by the label of the site for what an attention projection returns, by `mlp` for the feed-forward module's output, by
    `stream` for the stream. In place of a way that is none stands the reason.
    """

    label: str
    module: str
    residual: bool
    input_key: int | str | None
    mlp: str | None
    mlp_scale: float
    closing_norm: str | None
    calls: int
    reasons: Mapping[str, str]
    ways: Mapping[str, Way | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sublayers:
    """What `find_sublayers` found: blocks by label in the order given, final norms by stack ("main" has no prefix).

    `reasons` says for each stack without a final norm why it has none.
    """

    blocks: Mapping[str, Block]
    final_norms: Mapping[str, FinalNorm]
    reasons: Mapping[str, str]


def find_sublayers(
    model: nn.Module, run: Callable[[], object], blocks: Mapping[str, str], writes: Mapping[str, str] | None = None
) -> Sublayers:
    """Run the model once and measure blocks, feed-forward writes and final norms (see the top of this file).

    `run` makes one plain forward of `model` in eval mode, under `torch.no_grad()` and not `inference_mode`, with at
    least two positions. `blocks` maps a label ("L0", "encoder.L1") to the qualified name of the block's module. Inside
    each block gradients are on, so tensors kept by the run itself, such as a cache, carry them: throw them away.
    `writes` maps the label of a site to the qualified name of its output projection.

    Raises InputError for an empty or nested `blocks`, a name the model does not have, or a run in inference mode.
    """
    if not blocks:
        raise InputError("blocks: empty; expected at least one block label with its module's qualified name")
    modules = {label: submodule(model, name, f"blocks[{label!r}]") for label, name in blocks.items()}
    names = sorted(f"{name}." for name in blocks.values())
    for outer, inner in pairwise(names):
        if inner.startswith(outer):
            raise InputError(f"blocks: {inner[:-1]!r} lies in {outer[:-1]!r}; expected blocks apart from one another")
    forward = _RecordedForward(blocks, writes or {})
    grad_was_on = torch.is_grad_enabled()
    with ExitStack() as undo:
        undo.callback(torch.set_grad_enabled, grad_was_on)
        for label, block in modules.items():
            undo.callback(block.register_forward_pre_hook(forward.enter(label), with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(forward.leave(label)).remove)
            for name, part in block.named_modules():
                if part is not block:
                    undo.callback(part.register_forward_pre_hook(forward.before(block), with_kwargs=True).remove)
                    undo.callback(part.register_forward_hook(forward.after(block, name)).remove)
        inside = {id(part) for block in modules.values() for part in block.modules()}
        for name, part in model.named_modules():
            if id(part) not in inside and may_be_norm(part):
                undo.callback(part.register_forward_hook(forward.outside(name), with_kwargs=True).remove)
        run()
    return forward.result()


def with_two_streams(found: Sublayers, joint: Sequence[SiteId]) -> Sublayers:
    """What was found, less what was measured of one stream where a block's attention joins two."""
    reason = "the block carries two streams, one of the image and one of the text, and which is meant cannot be said"
    none = {"residual": reason, "mlp": reason}
    blocks = dict(found.blocks)
    for label in dict.fromkeys(replace(site, call=0).label for site in joint):
        if label in blocks:
            blocks[label] = replace(
                blocks[label], residual=False, input_key=None, mlp=None, closing_norm=None, reasons=none, ways={}
            )
    return replace(found, blocks=blocks)


def first_tensor(output: object) -> Tensor | None:
    """The tensor that a module returned, alone or first in a tuple, list or ModelOutput; None if there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` in its own form with its first tensor replaced; the given object is left as it is.

    Raises InputError if `output` has no first tensor.
    """
    if first_tensor(output) is None:
        raise InputError(f"output: {type(output).__name__}; expected a tensor, or a tuple that starts with one")
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = tensor
        return changed
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: tensor})
    return type(output)((tensor, *output[1:]))


# ----------------------------------------------------------------------------------------------- recording one forward


class _RecordedForward:
    """The hooks of one recorded forward; only one block is kept at a time."""

    def __init__(self, names: Mapping[str, str], writes: Mapping[str, str]) -> None:
        self.names = names
        self.writes = writes
        self.running: BlockRun | None = None
        self.found: dict[str, Block] = {}
        self.last: dict[str, Tensor] = {}
        self.norms: dict[str, dict[str, FinalNorm]] = {}

    def enter(self, label: str) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if torch.is_inference_mode_enabled():
                raise InputError("run: inference mode has no gradients; run the forward under torch.no_grad()")
            order = {name: i for i, name in enumerate(inspect.signature(block.forward).parameters)}
            given: dict[int | str, Any] = dict(enumerate(args))
            given.update({key: kwargs[key] for key in sorted(kwargs, key=lambda key: order.get(key, len(order)))})
            leaves = {
                key: value.detach().clone().requires_grad_()
                for key, value in given.items()
                if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
            }
            self.running = BlockRun(block, leaves, torch.is_grad_enabled())
            torch.set_grad_enabled(True)
            # Clones, because a block may add to its input in place and a leaf that needs a gradient forbids it.
            passed = {key: leaf.clone() for key, leaf in leaves.items()}
            return (
                tuple(passed.get(i, value) for i, value in enumerate(args)),
                {key: passed.get(key, value) for key, value in kwargs.items()},
            )

        return hook

    def leave(self, label: str) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            run = self.running
            if run is None or run.block is not block:
                return None
            self.running = None
            torch.set_grad_enabled(run.grad_was_on)
            stream = first_tensor(output)
            calls = self.found[label].calls + 1 if label in self.found else 1
            found = _measure_block(label, self.names[label], run, stream, calls)
            ways = {} if stream is None else _ways(found, run, stream, self.writes, self.last.get(_stack(label)))
            self.found[label] = replace(found, ways=ways)
            if stream is None:
                return None
            self.last[_stack(label)] = stream.detach().clone()
            self.norms[_stack(label)] = {}
            return with_first_tensor(output, stream.detach())

        return hook

    def before(self, block: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run = self.running
            if run is not None and run.block is block:
                given = [*args, *kwargs.values()]
                inputs = tuple(Seen.of(value) for value in given if run.keeps(value))
                run.open.append((inputs, len(given) == 1))

        return hook

    def after(self, block: nn.Module, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            run = self.running
            if run is None or run.block is not block:
                return None
            inputs, alone = run.open.pop()
            tensor = first_tensor(output)
            seen = Seen.of(tensor) if tensor is not None and run.keeps(tensor) else None
            run.calls.append(Call(name, module, inputs, inputs[0] if alone and inputs else None, seen))
            # The block gets a clone: Falcon adds to a module's output in place, and its own gradient would be lost.
            return None if seen is None else with_first_tensor(output, seen.tensor.clone())

        return hook

    def outside(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, *kwargs.values()]
            if self.running is not None or len(given) != 1 or not isinstance(given[0], Tensor):
                return
            for stack, stream in self.last.items():
                if _is_part_of(given[0], stream):
                    norm = measure_norm(name, module, given[0], first_tensor(output))
                    if norm is not None:
                        self.norms[stack][name] = norm

        return hook

    def result(self) -> Sublayers:
        blocks = {label: self.found.get(label, _never_ran(label, name)) for label, name in self.names.items()}
        stacks = dict.fromkeys(_stack(label) for label in self.names)
        unique = {stack: norms for stack in stacks if len(norms := self.norms.get(stack, {})) == 1}
        return Sublayers(
            blocks=blocks,
            final_norms={stack: next(iter(norms.values())) for stack, norms in unique.items()},
            reasons={stack: _no_norm(self.norms.get(stack)) for stack in stacks if stack not in unique},
        )


def _stack(label: str) -> str:
    return label.rpartition(".")[0] or "main"


def _never_ran(label: str, name: str) -> Block:
    reason = "the block did not run in the forward it was measured on"
    return Block(label, name, False, None, None, 1.0, None, 0, {"residual": reason, "mlp": reason})


def _no_norm(found: Mapping[str, FinalNorm] | None) -> str:
    if found is None:
        return "its blocks did not run in the forward they were measured on"
    if found:
        return f"{len(found)} norms read the last block's output: {', '.join(found)}"
    return "no norm outside the blocks, with its weights in memory, reads the last block's output as it is"


def _is_part_of(x: Tensor, stream: Tensor) -> bool:
    """Whether x is the stream, or holds only positions of it (poolers pick one, heads pick the last ones)."""
    if x.shape == stream.shape:
        return torch.equal(x, stream)
    if stream.ndim != 3 or x.shape[:1] != stream.shape[:1] or x.shape[-1:] != stream.shape[-1:] or not x.numel():
        return False
    rows = x.reshape(x.shape[0], -1, 1, x.shape[-1])
    return bool((rows == stream[:, None]).all(-1).any(-1).all())


# ------------------------------------------------------------------------------------------ how writes reach the stream


def _ways(
    block: Block, run: BlockRun, stream: Tensor, writes: Mapping[str, str], before: Tensor | None
) -> dict[str, Way | str]:
    """See `Block.ways`; `before` is the stream behind the block that ran before this one."""
    prefix = f"{block.module}."
    modules = {label: name.removeprefix(prefix) for label, name in writes.items() if name.startswith(prefix)}
    if block.mlp is not None:
        modules["mlp"] = block.mlp.removeprefix(prefix)
    if not block.residual or block.input_key is None:
        return dict.fromkeys([*modules, "stream"], block.reasons["residual"])
    returned = {label: _only_output(run, name) for label, name in modules.items()}
    x = run.leaves[block.input_key]
    starts = {label: output for label, output in returned.items() if not isinstance(output, str)} | {"stream": x}
    passed = [
        Passed(
            prefix + call.name, call.module, call.only.tensor, call.only.value, call.output.tensor, call.output.value
        )
        for call in run.calls
        if call.only is not None and call.output is not None
    ]
    found: dict[str, Way | str] = {label: output for label, output in returned.items() if isinstance(output, str)}
    for label, start in starts.items():
        others = [output for other, output in starts.items() if output is not start and other != "stream"]
        try:
            way = find_way(start, stream, passed, others)
        except NoGradient as error:
            found[label] = f"gradients do not pass through the block: {error}"
            continue
        found[label] = way or "it does not reach the stream by factors and norms alone, past the block's other writes"
    if block.calls > 1:
        found["stream"] = f"the block ran {block.calls} times"
    elif before is not None and not same_values(before, x):
        found["stream"] = "the stream is changed between the block before and this one"
    return found


def _only_output(run: BlockRun, name: str) -> Tensor | str:
    outputs = [call.output for call in run.calls if call.name == name]
    if len(outputs) != 1:
        return f"{name} ran {len(outputs)} times in the block"
    if outputs[0] is None or not outputs[0].tensor.requires_grad:
        return f"what {name} returns is not of the form of the stream, or has no gradient"
    return outputs[0].tensor


def _measure_block(label: str, name: str, run: BlockRun, stream: Tensor | None, calls: int) -> Block:
    def without(reason: str) -> Block:
        return Block(label, name, False, None, None, 1.0, None, calls, {"residual": reason, "mlp": reason})

    if stream is None or stream.ndim != 3:
        shape = "no tensor first" if stream is None else f"a tensor {list(stream.shape)}"
        return without(f"the block returns {shape}; a stream is [batch, position, d_model]")
    key = next((key for key, leaf in run.leaves.items() if leaf.shape == stream.shape), None)
    if key is None:
        return without(f"no argument of the block has the shape of its output {list(stream.shape)}")
    found = feed_forward_of(run, run.leaves[key], stream)
    if isinstance(found, str):
        return Block(label, name, True, key, None, 1.0, None, calls, {"mlp": found})
    closing = None if found.closing_norm is None else f"{name}.{found.closing_norm}"
    return Block(label, name, True, key, f"{name}.{found.name}", found.scale, closing, calls, {})
