"""Whether the runs of a model may begin in the middle (see `resuming`), measured on its probe forward.

A row must give the same logits alone and beside others. A run from every block, once and with every row twice, must
give the logits of the whole run, and so must one whose last block is run at its last columns. What holds is remembered
for the attached model; what may have been put on it since is asked anew (`occupied`, `kept_end`, and `Kept.answered`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.naming import stack_blocks
from headwise.model.finding.recording import one_line, quietly
from headwise.model.finding.sublayers import first_tensor
from headwise.model.running.resuming import RETURNED, Course, Kept, Returned, Start, keeping, resumed
from headwise.model.site import Site

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from the whole forward, relative to the largest logit, at which a run counts as the same; copies
of a row in one batch are multiplied in another order than the row alone."""

CAPTURING = "transformers.utils.output_capturing"

_COURSES: WeakKeyDictionary[AttachedModel, Course] = WeakKeyDictionary()
_TRIED: WeakKeyDictionary[AttachedModel, tuple[_Around, Kept]] = WeakKeyDictionary()
"""What was around the blocks when a whole probe forward was last tried with its last block cut, and what they gave."""
_MEASURING = threading.RLock()


def course_of(model: AttachedModel) -> Course:
    """The course of a model, measured at the first call by runs of its probe forward; a plan must not be open."""
    with _MEASURING:
        known = _COURSES.get(model)
        if known is None:
            try:
                known = _COURSES[model] = _measured(model)
            except torch.OutOfMemoryError:  # of now: another time there may be more
                return Course((), reason="memory ran out while it was tried whether runs can begin in the middle")
        return known


def occupied(model: AttachedModel, course: Course) -> str:
    """Why a course that was measured cannot be taken now; empty where it can."""
    blocks = [model.model.get_submodule(path) for path in course.blocks]
    if any(_acting_hooks(block) for block in blocks) or _global_hooks():
        return "hooks are on its blocks, and would act on what is handed on"
    if any(
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        for module in (*model.model.modules(), model.model)
    ):
        return "it is compiled"
    return ""


def _acting_hooks(block: nn.Module) -> bool:
    """Whether hooks are on a block, but for those that transformers leaves there from the first call on in which hidden
    states were asked for: they only note what a block returned, and only while that is asked for again."""
    hooks = (*block._forward_hooks.values(), *block._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks)


def _global_hooks() -> bool:
    of_torch = torch.nn.modules.module
    return bool(of_torch._global_forward_hooks or of_torch._global_forward_pre_hooks)


def kept_end(model: AttachedModel, course: Course) -> Kept | None:
    """What runs need that begin at the first block and end at the last columns of the last one; None where such a run
    of the probe forward does not give its logits now, whatever was measured before.

    Where nothing outside of the blocks has changed since it did, the last block is tried by itself.
    """
    if course.tail is None or occupied(model, course):
        return None
    around = _Around.of(model, course)
    start = Start(len(course.blocks) - 1, 1, at_z=False)
    tried, front = _TRIED.get(model, (None, Kept()))
    whole = around.watched or around != tried
    with quietly(model.model):
        with keeping(model, course, ()) as kept, nullcontext() if whole else resumed(model, course, front, start):
            plain = _logits(model(**model.example)) if whole else _last_output(model, course)
        if plain is None or course.tail not in kept.answered:
            return None
        columns = min(2, plain.shape[1])
        with resumed(model, course, kept, replace(start, last=columns)):
            ends = _logits(model(**model.example)) if whole else _last_output(model, course)
    if ends is None or not same_logits(ends[:, -columns:], plain[:, -columns:], model.dtype):
        return None
    if whole:
        _TRIED[model] = around, Kept(outputs=kept.outputs)
    return Kept(forms=kept.forms, stream=kept.stream, answered=kept.answered)


@dataclass(frozen=True)
class _Around:
    """What a probe forward hangs on outside of the blocks: inputs, kind of numbers, modules and replaced forwards."""

    inputs: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    modules: tuple[tuple[nn.Module, Any], ...]
    watched: bool
    """Whether hooks are on these modules, which would see a forward that ends in the middle."""

    @classmethod
    def of(cls, model: AttachedModel, course: Course) -> _Around:
        inside = {module for path in course.blocks for module in model.model.get_submodule(path).modules()}
        outside = [module for module in model.model.modules() if module not in inside]
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in outside)
        forwards = tuple((module, module.__dict__.get("forward")) for module in outside)
        return cls(model.example, model.dtype, model.device, forwards, watched)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Around)
            and self.inputs is other.inputs
            and (self.dtype, self.device, self.modules) == (other.dtype, other.device, other.modules)
        )


class _Ended(Exception):
    """The last block has returned; what is behind it is left out."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def _last_output(model: AttachedModel, course: Course) -> Tensor | None:
    """What the last block gives in a probe forward, which ends there; None where it goes on all the same."""

    def end(module: nn.Module, args: Any, output: Any) -> None:
        stream = first_tensor(output)
        assert stream is not None
        raise _Ended(stream)

    handle = model.model.get_submodule(course.blocks[-1]).register_forward_hook(end)
    try:
        model(**model.example)
    except _Ended as ended:
        return ended.output
    finally:
        handle.remove()
    return None


def _measured(model: AttachedModel) -> Course:
    blocks = stack_blocks(model.model, model.sites)
    whole = _tried(model, tuple(blocks.values()))
    own = tuple(path for label, path in blocks.items() if SiteId.parse(label).stack == model.table.stacks[0])
    if whole.blocks or not own or len(own) == len(blocks):
        return whole
    # A tower in front may hand on more than what its last block gives; it then runs from its start every time.
    return _tried(model, own)


def _tried(model: AttachedModel, paths: tuple[str, ...]) -> Course:
    try:
        with quietly(model.model):
            return _measure(model, paths)
    except torch.OutOfMemoryError:
        raise
    except (HeadwiseError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        # Whatever in a model's code stands against beginning anywhere but at the start, the answer is to begin there.
        return Course((), reason=f"its blocks cannot be run from one in the middle ({one_line(error)})")


def _measure(model: AttachedModel, paths: tuple[str, ...]) -> Course:
    if not paths:
        return Course((), reason="it has no list of layers")
    with keeping(model, Course(paths), ()) as seen:
        model(**model.example)
    if sorted(seen.order) != sorted(paths):
        return Course((), reason="its blocks do not run once each in a forward")
    course = _with_sites(model, Course(tuple(seen.order)))
    course = _with_answers(model, course)
    with keeping(model, course, tuple(course.place)) as kept:
        plain = _logits(model(**model.example))
    if not bool(plain.isfinite().any()):
        return Course((), reason="its logits are not numbers")
    twice = {name: _twice(value) for name, value in model.example.items()}
    expected = torch.cat([plain, plain])
    doubled = _logits(model(**twice))
    others = _logits(model(**_beside_others(model.example)))
    exact = TOLERANCE.get(model.dtype, 1e-3) / 100
    # What a row is beside other rows is what it is alone, to the rounding of products of another shape.
    for found, wanted in ((doubled, expected), (others[: len(plain)], plain)):
        if not same_logits(found, wanted, model.dtype):
            return Course((), reason="a row's logits depend on the rows beside it")
    rounding = exact + 4 * max(difference(doubled, expected), difference(others[: len(plain)], plain))
    for answered in (course.answered, {}):
        course = replace(course, answered=answered)
        kept.answered &= answered.keys()
        differs = None
        for block in range(len(course.blocks) + 1):
            once = _run_from(model, course, kept, Start(block, 1), model.example)
            again = _run_from(model, course, kept, Start(block, 2), twice)
            if difference(once, plain) > exact or difference(again, expected) > rounding:
                differs = course.blocks[min(block, len(course.blocks) - 1)]
                break
        if differs is None:
            return _with_tail(model, course, kept, twice, expected)
    return Course((), reason=f"a run that begins at {differs} differs")


def _beside_others(example: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the example, and under them the same with their tokens in reverse."""
    beside = {}
    for name, value in example.items():
        tokens = isinstance(value, Tensor) and name in ("input_ids", "decoder_input_ids")
        beside[name] = torch.cat([value, value.flip(1)]) if tokens else _twice(value)
    return beside


def _with_sites(model: AttachedModel, course: Course) -> Course:
    place = {}
    for site in model.sites:
        held = [number for number, path in enumerate(course.blocks) if site.module.startswith(f"{path}.")]
        if len(held) == 1:
            place[site.id] = held[0]
    return replace(course, place=place)


def _with_answers(model: AttachedModel, course: Course) -> Course:
    """For sites alone in their block: whether their module returns z, value by value, or what the projection writes."""
    places = list(course.place.values())
    alone = [
        id
        for id, place in course.place.items()
        if places.count(place) == 1 and _plainly_projected(model.table.site(id))
    ]
    answered: dict[SiteId, Returned] = {}
    for form in RETURNED:
        guessed = replace(course, answered=dict.fromkeys(set(alone) - answered.keys(), form))
        with keeping(model, guessed, tuple(alone)) as kept:
            model(**model.example)
        answered |= dict.fromkeys(kept.answered, form)
    return replace(course, answered=answered)


def _plainly_projected(site: Site) -> bool:
    return site.projection is not None and not site.chunked and site.entering == "rows" and not site.spans


def _with_tail(model: AttachedModel, course: Course, kept: Kept, twice: dict[str, Any], expected: Tensor) -> Course:
    """The course with its tail, if runs with the last block at the last column alone give its logits."""
    last = len(course.blocks) - 1
    ends = [id for id, place in course.place.items() if place == last and course.answered.get(id) == "write"]
    if len(ends) != 1 or expected.dim() != 3:
        return course
    with_tail = replace(course, tail=ends[0])
    for block in sorted({0, last}):
        try:
            found = _run_from(model, with_tail, kept, Start(block, 2, last=1), twice)
        except torch.OutOfMemoryError:
            raise
        except (HeadwiseError, RuntimeError, TypeError, ValueError, IndexError):
            return course
        if not same_logits(found[:, -1:], expected[:, -1:], model.dtype):
            return course
    return with_tail


def _run_from(model: AttachedModel, course: Course, kept: Kept, start: Start, inputs: Mapping[str, Any]) -> Tensor:
    with resumed(model, course, kept, start):
        return _logits(model(**inputs))


def _logits(output: Any) -> Tensor:
    tensor = getattr(output, "logits", None)
    tensor = tensor if isinstance(tensor, Tensor) else first_tensor(output)
    if tensor is None:
        raise HeadwiseError("the model returns no tensor")
    return tensor


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else copy.copy(value)


def same_logits(found: Tensor, expected: Tensor, computed_in: torch.dtype) -> bool:
    """Whether two runs gave the same, but for the rounding of the precision that they were computed in."""
    return difference(found, expected) <= TOLERANCE.get(computed_in, 1e-3)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest of what was expected; infinite where that cannot be said."""
    finite = expected[expected.isfinite()]
    if found.shape != expected.shape or not len(finite):
        return torch.inf
    # Where logits are ruled out with -inf both are.
    apart = (found - expected).masked_fill(found == expected, 0.0).abs().max()
    share = float(apart / finite.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))
    return torch.inf if share != share else share
