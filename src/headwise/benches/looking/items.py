"""The items of `headwise bench looking`: what finds heads, what sets strengths, and what judges, none of it twice.

What judges is of the tenth of pictures that no organism saw in training (`probes.held_out`); the others are not, and
come from two streams of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any, Literal, TypeVar

from headwise.find import find
from headwise.model.attached import AttachedModel
from headwise.probes import Item, ItemSet, encode, held_out, probe
from headwise.probes.scenes import Scene, draw, grid, strip
from headwise.probes.seeing import Asked, about_panel, about_place, asks
from headwise.scores import HeadScores
from headwise.use.looking.gaze import crossed

FINDING, CHOOSING = 32, 48

Purpose = Literal["finding", "choosing", "judging"]
Place = Literal["panel", "cell"]


Made = TypeVar("Made")


@dataclass(frozen=True)
class Sizes:
    """Numbers of items that judge, and of control sets."""

    verdicts: int = 32
    questions: int = 200
    lists: int = 96
    clear: int = 32
    crossed: int = 96
    captions: int = 48
    pruned: int = 48
    controls: int = 8
    verdict_controls: int = 50


@dataclass(frozen=True)
class Bench:
    """A model, and what several parts of the table share, made when it is first needed."""

    model: AttachedModel
    seed: int = 0
    sizes: Sizes = Sizes()
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def items(self, name: str, purpose: Purpose, n: int, **settings: Any) -> ItemSet:
        """The first `n` items of a probe for a purpose."""

        def made() -> ItemSet:
            stream = probe(name).over(**settings).items(self._stream(purpose))
            return self.encoded(name, _for(purpose, stream), n)

        return self.once(("items", name, purpose, n, *sorted(settings.items())), made)

    def crossed(self, place: Place, purpose: Purpose, n: int) -> ItemSet:
        """Questions about one place of a picture, whose right answer is that of another; one of each picture."""

        def made() -> ItemSet:
            stream = _crossed(place, Random(f"{self._stream(purpose)}/{place}"))
            return self.encoded(f"{place}, crossed", _for(purpose, stream), n)

        return self.once(("crossed", place, purpose, n), made)

    def scores(self, method: str, name: str, **settings: Any) -> HeadScores:
        """The scores of a method on the items of a probe that find heads."""
        return self.once(
            ("scores", method, name, *sorted(settings.items())),
            lambda: find(method, self.model, self.items(name, "finding", FINDING), **settings),
        )

    def encoded(self, name: str, items: Iterable[Item], n: int) -> ItemSet:
        return encode(islice(items, n), self.model, name=name)

    def share_of_heads(self, part: float) -> int:
        """So many heads are a part of those of the language model."""
        site = self.model.table.stacks[0]
        return max(1, round(part * sum(each.n_heads for each in self.model.sites if each.id.stack == site)))

    def _stream(self, purpose: Purpose) -> str:
        return f"looking/{purpose}/{self.seed}"

    def once(self, key: Any, made: Callable[[], Made]) -> Made:
        """What was made for this key before, or else now."""
        if key not in self._kept:
            self._kept[key] = made()
        found: Made = self._kept[key]
        return found


def _for(purpose: Purpose, items: Iterable[Item]) -> Iterator[Item]:
    return (each for each in items if held_out(each) == (purpose == "judging"))


def _crossed(place: Place, random: Random) -> Iterator[Item]:
    while True:
        scene = strip(random) if place == "panel" else grid(random, copies=3)
        kind = random.choice(("color", "shape"))
        if len(scene.taken) < 2:
            continue
        two = random.sample(scene.taken, 2)
        questions = [about_panel(scene, each) if place == "panel" else about_place(scene, each, kind) for each in two]
        if questions[0].answer != questions[1].answer:
            yield _crossing(scene, two, questions, Random(random.getrandbits(32)))


def _crossing(scene: Scene, places: list[int], questions: list[Asked], random: Random) -> Item:
    shown = (draw(scene, random),)
    regions = scene.layout.regions()
    items = [
        asks(each).item(each.answer, pictures=shown, regions=regions | {"target": scene.layout.region(number)})
        for number, each in zip(places, questions, strict=True)
    ]
    return crossed([each.named(scene.layout.place) for each in items])[0]
