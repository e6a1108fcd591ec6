"""Runs that begin where edits begin: what lies in front of them is taken from a clean run.

An edit at one head changes nothing in the blocks in front of it, and nothing in what its own attention was given. Where
logits of the last columns are all that is wanted, the last block's keys and values are all that matters of the others.

- blocks in front of the first edited one hand on what they gave in the clean run, for as many copies of its rows as
  there are sets of edits in the batch;
- where only z is edited, the attention of the first edited block is the clean z with the edits, or its projection;
- the last block is computed at the last columns alone, behind keys and values of all.

The model's own forward runs all the same, masks, norms and head included: only the `forward` of these modules is
another one meanwhile. Nothing is assumed about their classes. Whether a model allows it is measured, by running its
probe forward in full and from every block (`course_of`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.naming import stack_blocks
from headwise.model.finding.sublayers import first_tensor, with_first_tensor
from headwise.model.site import Site

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from the whole forward, relative to the largest logit, at which a run counts as the same; copies
of a row in one batch are multiplied in another order than the row alone."""


Returned = Literal["z", "write"]
RETURNED: tuple[Returned, ...] = get_args(Returned)


@dataclass(frozen=True)
class Course:
    """The blocks of a model in the order in which they run, and what may be left out of a run.

    Attributes:
        blocks: qualified names; empty where every run has to be whole, and then `reason` says why.
        place: which block a site is in.
        answered: sites whose module need not run where its z is known, and what it returns then: `z` itself, or what
            the output projection makes of it (`write`).
        tail: the site of the last block, where that can run at the last columns alone.
    """

    blocks: tuple[str, ...]
    place: Mapping[SiteId, int] = field(default_factory=dict)
    answered: Mapping[SiteId, Returned] = field(default_factory=dict)
    tail: SiteId | None = None
    reason: str = ""


@dataclass(eq=False)
class Kept:
    """What a clean run left: outputs of blocks, what entered output projections, and forms of attention's outputs.

    `answered` are the sites whose module returned in this very run what it returned when the model was measured: an
    adapter that was trained since, say, is no longer left out.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    entering: dict[SiteId, Tensor] = field(default_factory=dict)
    forms: dict[SiteId, Any] = field(default_factory=dict)
    answered: set[SiteId] = field(default_factory=set)
    stream: dict[str, int | str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        block: number of the first block that runs; as many as there are blocks for none.
        copies: how often the rows of the clean run stand one after the other in the batch.
        at_z: whether nothing but z is edited in that block.
        column: the first column that is run; those before it are in a cache.
        last: how many columns at the end are wanted of the last block; None for all.
    """

    block: int
    copies: int
    at_z: bool = True
    column: int = 0
    last: int | None = None


_COURSES: WeakKeyDictionary[AttachedModel, Course] = WeakKeyDictionary()
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
    if any(block._forward_hooks or block._forward_pre_hooks for block in blocks) or _global_hooks():
        return "hooks are on its blocks, and would act on what is handed on"
    if any(
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        for module in (*model.model.modules(), model.model)
    ):
        return "it is compiled"
    return ""


def _global_hooks() -> bool:
    of_torch = torch.nn.modules.module
    return bool(of_torch._global_forward_hooks or of_torch._global_forward_pre_hooks)


@contextmanager
def keeping(model: AttachedModel, course: Course, sites: tuple[SiteId, ...]) -> Iterator[Kept]:
    """Inside the block, a run leaves what later runs can begin from: z of `sites` that are `answered`, and all blocks'
    outputs."""
    kept = Kept()
    with ExitStack() as undo:
        for path in course.blocks:
            block = model.model.get_submodule(path)
            undo.callback(block.register_forward_pre_hook(_note_stream(kept, path), with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(_note_output(kept, path)).remove)
        for id in course.answered.keys() & {*sites, course.tail}:
            site = model.table.site(id)
            projection, module = map(model.model.get_submodule, (str(site.projection), site.module))
            note = _Answer(kept, id, course.answered[id])
            # In front of other hooks: those run again on what stands in for this later.
            undo.callback(projection.register_forward_pre_hook(note.entering, prepend=True).remove)
            undo.callback(projection.register_forward_hook(note.written).remove)
            undo.callback(module.register_forward_hook(note.returned, prepend=True).remove)
        yield kept


@contextmanager
def resumed(model: AttachedModel, course: Course, kept: Kept, start: Start) -> Iterator[None]:
    """Inside the block, a run of `start.copies` times the kept rows begins at block `start.block`.

    Hooks of open plans stay in force in what runs. A site whose attention is `answered` has the positions it had.
    """
    last = len(course.blocks) - 1
    with ExitStack() as undo:
        for number, path in enumerate(course.blocks[: start.block]):
            # What a block hands to the next is needed of the one in front of the first, and where a stack ends.
            wanted = number == start.block - 1 or _ends_stack(course, number)
            copies = start.copies if wanted else 1
            undo.enter_context(_answering(model, path, partial(_handed_on, kept.outputs[path], copies, start.column)))
        if start.block <= last:
            if start.at_z:
                for site in _answerable(model, course, kept, start.block):
                    undo.enter_context(_answered_from_z(model, course, site, kept, start))
            if start.last is not None and course.tail in kept.answered:
                assert course.tail is not None
                tail = model.table.site(course.tail)
                undo.enter_context(_at_last_columns(model, course.blocks[last], tail, kept, start.last))
        yield


def _ends_stack(course: Course, number: int) -> bool:
    following = course.blocks[number + 1 : number + 2]
    return not following or _home(following[0]) != _home(course.blocks[number])


def _home(path: str) -> str:
    return path.rpartition(".")[0]


def _answerable(model: AttachedModel, course: Course, kept: Kept, block: int) -> list[Site]:
    return [model.table.site(id) for id, place in course.place.items() if place == block and id in kept.answered]


# -- what is noted of the clean run -----------------------------------------------------------------------------------


def _note_stream(kept: Kept, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.order.append(path)
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for key, value in named:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
                kept.stream[path] = key
                return

    return hook


def _note_output(kept: Kept, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.outputs[path] = output

    return hook


class _Answer:
    """What a site's module returned in a run, and whether that was z, or the projection's write, as `form` says."""

    def __init__(self, kept: Kept, id: SiteId, form: Returned) -> None:
        self.kept, self.id, self.form = kept, id, form
        self.z: Tensor | None = None
        self.write: Tensor | None = None
        self.output: Tensor | None = None

    def entering(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.z = args[0]
        if self.form == "z":
            self._settle(self.output, self.z)

    def written(self, module: nn.Module, args: Any, output: Any) -> None:
        self.write = first_tensor(output)

    def returned(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = first_tensor(output)
        if self.output is not None:
            self.kept.forms[self.id] = with_first_tensor(output, self.output.new_empty(0))
        if self.form == "write":
            self._settle(self.output, self.write)

    def _settle(self, output: Tensor | None, expected: Tensor | None) -> None:
        if output is not None and expected is not None and self.z is not None and torch.equal(output, expected):
            self.kept.answered.add(self.id)
            self.kept.entering[self.id] = self.z
        self.z = self.write = self.output = None


# -- what stands in for modules ---------------------------------------------------------------------------------------


@contextmanager
def _answering(model: AttachedModel, path: str, answer: Callable[[], Any]) -> Iterator[None]:
    """Inside the block the module at `path` does nothing but answer."""
    with _forward_is(model, path, lambda *args, **kwargs: answer()):
        yield


@contextmanager
def _forward_is(model: AttachedModel, path: str, forward: Callable[..., Any]) -> Iterator[None]:
    module = model.model.get_submodule(path)
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


def _handed_on(output: Any, copies: int, column: int) -> Any:
    """A block's output for more rows, or fewer columns, than it had; tensors beside the stream go by rows, too."""
    stream = first_tensor(output)
    if stream is None:
        raise HeadwiseError("a block returns no tensor")
    rows = len(stream)
    handed = with_first_tensor(output, _repeated(stream[:, column:] if column else stream, copies))
    if copies > 1 and isinstance(handed, (tuple, list)):
        beside = [
            _repeated(each, copies) if isinstance(each, Tensor) and each.dim() and len(each) == rows else each
            for each in handed[1:]
        ]
        handed = type(handed)((handed[0], *beside))
    return handed


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else tensor.repeat(copies, *[1] * (tensor.dim() - 1))


@contextmanager
def _answered_from_z(model: AttachedModel, course: Course, site: Site, kept: Kept, start: Start) -> Iterator[None]:
    """The attention module of `site` returns what follows from the clean z and the plan's edits of it."""
    projection = model.model.get_submodule(str(site.projection))

    def answer() -> Any:
        clean = kept.entering[site.id]
        z = model.answering(site, _repeated(clean[:, start.column :] if start.column else clean, start.copies))
        # Edits of what enters the projection are carried out by its hooks, wherever it is called.
        returned = z if course.answered[site.id] == "z" else projection(z)
        return with_first_tensor(kept.forms[site.id], returned)

    with _answering(model, site.module, answer):
        yield


class _Written(Exception):
    """What the last block's attention writes has been computed."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


@contextmanager
def _at_last_columns(model: AttachedModel, path: str, tail: Site, kept: Kept, last: int) -> Iterator[None]:
    """The last block runs up to what its attention writes at the last columns, then anew at these with that in hand.

    It returns a stream of the width that it was given, of which the other columns are 0.
    """
    assert tail.projection is not None
    block, projection = map(model.model.get_submodule, (path, tail.projection))
    forward = block.forward

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -last:].contiguous(), *args[1:])

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        raise _Written(output)

    def at_last_columns(*args: Any, **kwargs: Any) -> Any:
        # Behind the hooks of plans, which stand first and see all columns.
        handles = [projection.register_forward_pre_hook(cut), projection.register_forward_hook(stop)]
        try:
            forward(*args, **kwargs)
        except _Written as reached:
            answer = with_first_tensor(kept.forms[tail.id], reached.output)
        else:
            raise HeadwiseError(f"{path} ran without its attention's output projection {tail.projection}")
        finally:
            for handle in handles:
                handle.remove()
        key = kept.stream[path]
        stream: Tensor = args[key] if isinstance(key, int) else kwargs[key]
        ends = stream[:, -last:].contiguous()
        if isinstance(key, int):
            args = (*args[:key], ends, *args[key + 1 :])
        else:
            kwargs = {**kwargs, key: ends}
        with _answering(model, tail.module, lambda: answer):
            output = forward(*args, **kwargs)
        at_last = first_tensor(output)
        assert at_last is not None
        whole = torch.zeros_like(stream)
        whole[:, -last:] = at_last
        return with_first_tensor(output, whole)

    with _forward_is(model, path, at_last_columns):
        yield


# -- measuring what a model allows ------------------------------------------------------------------------------------


def _measured(model: AttachedModel) -> Course:
    from headwise.model.finding.recording import one_line, quietly

    try:
        with quietly(model.model):
            return _measure(model)
    except torch.OutOfMemoryError:
        raise
    except (HeadwiseError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        # Whatever in a model's code stands against beginning anywhere but at the start, the answer is to begin there.
        return Course((), reason=f"its blocks cannot be run from one in the middle ({one_line(error)})")


def _measure(model: AttachedModel) -> Course:
    paths = tuple(stack_blocks(model.model, model.sites).values())
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
    seen: dict[SiteId, dict[str, Tensor]] = {}
    with ExitStack() as undo:
        for id, place in course.place.items():
            site = model.table.site(id)
            if list(course.place.values()).count(place) > 1 or not _plainly_projected(site):
                continue
            projection, module = map(model.model.get_submodule, (str(site.projection), site.module))
            parts = seen.setdefault(id, {})
            undo.callback(projection.register_forward_pre_hook(_note_argument(parts)).remove)
            undo.callback(projection.register_forward_hook(_note_first(parts, "write")).remove)
            undo.callback(module.register_forward_hook(_note_first(parts, "returned")).remove)
        model(**model.example)
    answered: dict[SiteId, Returned] = {}
    for id, parts in seen.items():
        for name in RETURNED:
            if "returned" in parts and name in parts and torch.equal(parts["returned"], parts[name]):
                answered[id] = name
    return replace(course, answered=answered)


def _plainly_projected(site: Site) -> bool:
    return site.projection is not None and not site.chunked and site.entering == "rows" and not site.spans


def _note_argument(parts: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        parts["z"] = args[0].clone()

    return hook


def _note_first(parts: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and tensor.dim() == 3:
            parts[name] = tensor.clone()

    return hook


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
