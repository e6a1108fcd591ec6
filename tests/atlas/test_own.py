"""Probe files in an atlas: their halves, their name, their pictures, and how it goes on with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.atlas import Atlas, Settings
from headwise.atlas.own import ProbeFile, is_file, require_files
from headwise.atlas.planning import plan
from headwise.atlas.report.command import beyond_command, command_of
from headwise.errors import InputError
from headwise.find.method import Method
from headwise.model.attached import AttachedModel
from headwise.probes.item import Item
from headwise.probes.stream import Probe
from headwise.verify.verifying import half_for_finding, half_for_testing


def written(folder: Path, items: Sequence[Item], name: str = "My garden.jsonl") -> Path:
    """The items as a probe file with their pictures beside it."""
    lines = []
    for number, each in enumerate(items):
        images = [f"{number}-{place}.png" for place in range(len(each.pictures))]
        for image, picture in zip(images, each.pictures, strict=True):
            Image.fromarray(picture.array()).save(folder / image)
        lines.append({"prompt": each.prompt, "answer": each.answer, "foils": each.foils, "images": images})
    path = folder / name
    path.write_text("\n".join(json.dumps(each) for each in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(seeing: AttachedModel, ask: Callable[..., tuple[Item, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("file"), ask(seeing, 40))


@pytest.mark.parametrize(
    ("name", "is_one"), [("a.jsonl", True), ("a.csv", True), ("some/a", True), ("ioi", False), ("panel", False)]
)
def test_what_names_a_file(name: str, is_one: bool) -> None:
    assert is_file(name) == is_one


def test_an_atlas_of_a_file(
    seeing: AttachedModel,
    file: Path,
    told: Probe,
    run: Callable[..., Atlas],
    method: Callable[..., Method],
    tmp_path: Path,
) -> None:
    one = method("by-place", probe="shown")
    atlas = run(tmp_path / "atlas", seeing, probes=[str(file)], methods=[one])
    assert atlas.complete
    assert atlas.probes == ("my-garden",)
    card = atlas.manifest.probe("my-garden")
    assert (card.file, card.pictures) == (str(file), True)
    finding, testing = ([each.id for each in half(file)] for half in (half_for_finding, half_for_testing))
    assert list(card.finding) == finding[:8]
    assert list(card.testing) == testing[:8]
    assert "my-garden" not in atlas.refused
    kept = atlas.examples("my-garden")[0]
    shown = next(each for each in half_for_testing(file) if each.id == kept.item)
    assert np.array_equal(kept.pictures[0].pixels, shown.pictures[0].array())

    more = run(tmp_path / "atlas", seeing, probes=[told], methods=[one])  # the file is not named again
    assert more.probes == ("my-garden", "told")
    assert more.complete
    assert str(file) in command_of(atlas.manifest, "there")
    assert "my-garden" not in beyond_command(atlas.manifest)


def test_an_item_more_is_another_atlas(
    seeing: AttachedModel, ask: Callable[..., tuple[Item, ...]], method: Callable[..., Method], tmp_path: Path
) -> None:
    items, settings, one = ask(seeing, 40), Settings(items=40, controls=4), [method("by-place", probe="shown")]
    file = written(tmp_path, items[:36])
    before = plan(seeing, settings, [file], one, None).manifest
    assert plan(seeing, settings, [file], one, before).manifest == before
    written(tmp_path, items)
    with pytest.raises(InputError, match="the items of my-garden are not those of this atlas"):
        plan(seeing, settings, ["repeat"], one, before)


def test_another_text_under_the_same_id_is_another_atlas(
    seeing: AttachedModel, ask: Callable[..., tuple[Item, ...]], method: Callable[..., Method], tmp_path: Path
) -> None:
    items, settings, one = ask(seeing, 40), Settings(items=40, controls=4), [method("by-place", probe="shown")]
    file = written(tmp_path, items)
    before = plan(seeing, settings, [file], one, None).manifest
    written(tmp_path, tuple(replace(each, foils=tuple(x for x in "abc" if x != each.answer)) for each in items))
    with pytest.raises(InputError, match="items of my-garden have the ids of this atlas and other texts"):
        plan(seeing, settings, ["repeat"], one, before)
    older = replace(before, probes=tuple(replace(each, digests=()) for each in before.probes))
    assert plan(seeing, settings, ["repeat"], one, older).manifest.probes[0].digests == ()


def test_names_that_say_nothing_or_another_probe(
    seeing: AttachedModel, file: Path, run: Callable[..., Atlas], tmp_path: Path
) -> None:
    taken = file.with_name("Panel.jsonl")
    taken.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="would be called 'panel', as another probe is; rename it"):
        run(tmp_path / "atlas", seeing, probes=[taken])
    nameless = file.with_name("--.jsonl")
    nameless.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="has no letter or figure in its name"):
        ProbeFile.of(nameless)


def test_files_are_read_before_anything_runs(file: Path) -> None:
    require_files(["panel", str(file)])
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        require_files(["panel", str(file.with_name("nowhere.jsonl"))])
