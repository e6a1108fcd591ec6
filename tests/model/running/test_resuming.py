"""Runs that begin at a block in the middle against whole runs, on every type of the zoo that allows it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise.heads import Head, HeadSet
from headwise.model.running.courses import course_of, occupied, same_logits
from headwise.model.running.resuming import Course, Start, keeping, resumed
from headwise.zoo.tiny import build_tiny, outside_registry, tiny_types

ROWS = {row.name: row for row in (*tiny_types(), *outside_registry())}

WHOLE = {
    "tiny-albert": "do not run once each",
    "tiny-clip": "depend on the rows beside it",  # it compares every text of a batch with every picture
    "tiny-siglip": "depend on the rows beside it",
    "tiny-qwen3_vl": "cannot be run",  # its text blocks take features of the picture between them
    "tiny-fsmt": "cannot be run",  # positions stand before rows
    "tiny-wavlm": "cannot be run",  # a position bias of the first block goes from block to block
}
NOT_ANSWERED = {
    *("tiny-bitnet", "tiny-diffllama", "tiny-jetmoe"),  # no projection that is separable into heads
    *("tiny-bloom", "tiny-led"),  # the module adds the stream itself, or more than one thing
}
TOWER_FROM_ITS_START = {"tiny-llava"}  # its tower hands on another block's output than the last one's
ONE_ROW_OF_PATCHES = {"tiny-qwen2_vl", "tiny-qwen2_5_vl"}  # their vision towers know no rows
TWO_SITES_A_BLOCK = {"tiny-t5", "tiny-t5gemma", "tiny-bart", "tiny-whisper", "tiny-mvp", "tiny-bigbird_pegasus"}


@cache
def attached(name: str) -> hw.AttachedModel:
    organism = build_tiny(ROWS[name])
    return hw.attach(organism.model, organism.tokenizer, example=organism.example)


def logits(output: Any) -> Tensor:
    tensor = getattr(output, "logits", None)
    return tensor if isinstance(tensor, Tensor) else output[0]


@pytest.mark.parametrize("name", ROWS)
def test_which_types_allow_it(name: str) -> None:
    course = course_of(attached(name))
    if name in WHOLE:
        assert not course.blocks
        assert WHOLE[name] in course.reason
        return
    assert course.reason == ""
    assert len(course.blocks) == len(set(course.blocks)) >= 2
    inside = [site.id for site in attached(name).sites if name not in TOWER_FROM_ITS_START or site.id.stack == "main"]
    assert set(course.place) == set(inside)
    alone = [id for id, place in course.place.items() if list(course.place.values()).count(place) == 1]
    if name in ONE_ROW_OF_PATCHES:
        alone = [id for id in alone if id.stack == "main"]
    assert set(course.answered) == (set() if name in NOT_ANSWERED else set(alone))
    if name in TWO_SITES_A_BLOCK:
        assert course.tail is None


@pytest.mark.parametrize("name", [name for name in ROWS if name not in WHOLE])
def test_an_edit_in_a_run_from_its_block_is_the_edit_in_a_whole_run(name: str) -> None:
    """Two copies of the rows: the first with one head at zero, the second with another head of the block at half."""
    model = attached(name)
    course = course_of(model)
    inputs = {key: torch.cat([value, value]) for key, value in model.example.items()}
    rows = len(next(iter(model.example.values())))
    with torch.no_grad(), keeping(model, course, tuple(course.place)) as kept:
        model(**model.example)
    changed = 0.0
    for site in model.sites:
        if not site.capabilities["separable"].ok or site.id not in course.place:
            continue
        if name in ONE_ROW_OF_PATCHES and site.id.stack != "main":
            continue
        edits = [
            hw.edit.zero(HeadSet((Head(site.id, 0),)), rows=range(rows)),
            hw.edit.scale(HeadSet((Head(site.id, site.n_heads - 1),)), 0.5, rows=range(rows, 2 * rows)),
        ]
        with torch.no_grad(), model.editing(*edits):
            whole = logits(model(**inputs))
        start = Start(course.place[site.id], 2)
        with torch.no_grad(), model.editing(*edits) as run, resumed(model, course, kept, start):
            begun = logits(model(**inputs))
        assert same_logits(begun, whole, torch.float32), site.label
        assert all(each.positions for each in run.fired)
        with torch.no_grad():
            changed = max(changed, float((whole - logits(model(**inputs))).abs().max()))
        if course.tail is not None:
            with torch.no_grad(), model.editing(*edits), resumed(model, course, kept, Start(start.block, 2, last=2)):
                ends = logits(model(**inputs))
            assert same_logits(ends[:, -2:], whole[:, -2:], torch.float32), site.label
    assert changed > 1e-4 or name in NOT_ANSWERED, "an edit that changes nothing would pass as well"


def calls_of(model: nn.Module, course: Course) -> tuple[dict[str, int], list[Any]]:
    """How often the attention, and the feed-forward part, of each block is called."""
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            counts[name] = counts.get(name, 0) + stream.shape[1]

        return hook

    hooks = []
    for number, path in enumerate(course.blocks):
        block = model.get_submodule(path)
        for part in ("q_proj", "down_proj", "o_proj"):
            found = next(module for name, module in block.named_modules() if name.endswith(part))
            hooks.append(found.register_forward_pre_hook(count(f"{number} {part}"), with_kwargs=True))
    return counts, hooks


def test_what_is_left_out_is_not_computed() -> None:
    """Positions that matrices are given: none in front of the block, none of its queries, few at the end."""
    model = attached("tiny-llama")
    course = course_of(model)
    length = model.example["input_ids"].shape[1]
    with torch.no_grad(), keeping(model, course, tuple(course.place)) as kept:
        model(**model.example)
    counts, hooks = calls_of(model.model, course)
    heads = model.heads("L1").heads[:1]
    try:
        start = Start(1, 1, last=1)
        with torch.no_grad(), model.editing(hw.edit.zero(HeadSet(heads))), resumed(model, course, kept, start):
            model(**model.example)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts == {
        "1 o_proj": length,
        "1 down_proj": length,
        "2 q_proj": length,
        "2 o_proj": length,  # as it is called; what enters is cut behind the hooks of plans
        "2 down_proj": 1,
    }


def test_everything_is_as_it_was_behind_an_error() -> None:
    model = attached("tiny-gpt2")
    course = course_of(model)
    with torch.no_grad(), keeping(model, course, tuple(course.place)) as kept:
        expected = logits(model(**model.example))
    with pytest.raises(RuntimeError, match="broken off"), resumed(model, course, kept, Start(1, 1, last=1)):
        raise RuntimeError("broken off")
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    with torch.no_grad():
        torch.testing.assert_close(logits(model(**model.example)), expected, rtol=0, atol=0)


def test_a_model_whose_rows_hang_together_is_found_out() -> None:
    organism = build_tiny(ROWS["tiny-llama"])
    organism.model.model.norm.register_forward_hook(lambda module, args, output: output - 0.1 * output.mean((0, 1)))  # type: ignore[union-attr]
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        assert "depend on the rows beside it" in course_of(model).reason


def test_hooks_on_blocks_and_compiled_models_are_in_the_way() -> None:
    organism = build_tiny(ROWS["tiny-llama"])
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        course = course_of(model)
        assert occupied(model, course) == ""
        hook = organism.model.model.layers[1].register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        assert "hooks are on its blocks" in occupied(model, course)
        hook.remove()
        assert occupied(model, course) == ""
        organism.model.model.layers[0].compile(backend="eager")  # type: ignore[union-attr]
        assert occupied(model, course) == "it is compiled"


def test_a_block_that_looks_at_the_rows_is_found_out() -> None:
    """A model in which a block takes in something beside its stream from the block before it."""
    organism = build_tiny(ROWS["tiny-llama"])
    first, second = organism.model.model.layers[:2]  # type: ignore[union-attr]
    told: list[Tensor] = []
    first.mlp.register_forward_hook(lambda module, args, output: told.append(output))
    second.mlp.register_forward_hook(lambda module, args, output: output + told.pop())
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        course = course_of(model)
    assert not course.blocks
    assert "cannot be run" in course.reason or "differs" in course.reason
