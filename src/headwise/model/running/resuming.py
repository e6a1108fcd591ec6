"""Runs that begin where edits begin: what lies in front of them is taken from a clean run.

An edit at one head changes nothing in the blocks in front of it, and nothing in what its own attention was given. Where
logits of the last columns are all that is wanted, the last block's keys and values are all that matters of the others.

- blocks in front of the first edited one hand on what they gave in the clean run, for as many copies of its rows as
  there are sets of edits in the batch;
- where only z is edited, the attention of the first edited block is the clean z with the edits, or its projection;
- the last block is computed at the last columns alone, behind keys and values of all.

The model's own forward runs all the same, masks, norms and head included: only the `forward` of these modules is
another one meanwhile. Nothing is assumed about their classes. Whether a model allows it is measured (see `courses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.sublayers import first_tensor, with_first_tensor
from headwise.model.site import Site

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
        stop: number of the first block behind that does not run again, but hands on what it gave in the clean run: what
            was asked for lies in front of it, and the logits are not. None: all of them run.
    """

    block: int
    copies: int
    at_z: bool = True
    column: int = 0
    last: int | None = None
    stop: int | None = None


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
        for number, path in enumerate(course.blocks):
            if start.block <= number and (start.stop is None or number < start.stop):
                continue
            if path not in kept.outputs:  # a tower for pictures, where the text has none
                continue
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
