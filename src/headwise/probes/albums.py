"""Something to be found among several pictures: the one that shows a shape, or a sentence that stands between them."""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item, Passage
from headwise.probes.picture import PICTURE_MARK
from headwise.probes.scenes import COLORS, GRID, SHAPES, Scene, Thing, draw, grid
from headwise.probes.stream import Probe, require
from headwise.words import word_list

MOST = 4
"""Pictures in an album."""
TOLD = ("password", "nickname")


def album(random: Random, pictures: int, shape: str) -> tuple[list[Scene], int]:
    """Grids of which one, whose number is given, shows the shape once; the others do not."""
    shown = random.randrange(pictures)
    return [_with(random, shape, 1 if number == shown else 0) for number in range(pictures)], shown


def _with(random: Random, shape: str, times: int) -> Scene:
    while True:
        scene = grid(random)
        if sum(each is not None and each.shape == shape for each in scene.things) == times:
            return scene


def _picture_needle(random: Random, *, asked: str, pictures: int) -> Item:
    require("asked", asked, ("color", "picture"))
    require("pictures", pictures, range(2, MOST + 1))
    shape = random.choice(SHAPES)
    scenes, shown = album(random, pictures, shape)
    place = scenes[shown].where(shape)
    if asked == "color":
        was, new = random.sample(tuple(COLORS), 2)
        scenes[shown], changed = (scenes[shown].put(place, Thing(shape, each)) for each in (was, new))
        order = list(range(pictures))
        scenes.append(changed)
        order[shown] = pictures
        seen = {each.color for scene in scenes for each in scene.things if each}
        answer, other, wrong = was, new, sorted(seen - {was})
        question = f"What color is the {shape}?"
    else:
        goes = random.choice([each for each in range(pictures) if each != shown])
        order = list(range(pictures))
        order[shown], order[goes] = goes, shown
        answer, other = str(shown + 1), str(goes + 1)
        wrong = [str(each + 1) for each in range(pictures) if each != shown]
        question = f"Which picture shows a {shape}?"
    seeds = [random.getrandbits(32) for _ in range(pictures)]
    drawn = [draw(scene, Random(seeds[number % pictures])) for number, scene in enumerate(scenes)]
    return _shown(pictures, question).item(
        f" {answer}",
        twin=_shown(pictures, question),
        twin_answer=f" {other}",
        foils=tuple(f" {each}" for each in wrong),
        pictures=tuple(drawn[:pictures]),
        twin_pictures=tuple(drawn[each] for each in order),
        regions={"target": GRID.region(place, picture=shown)},
        asked=asked,
        pictures_shown=pictures,
        depth=shown / (pictures - 1),
    )


def _text_needle(random: Random, *, pictures: int, sentences: int) -> Item:
    require("pictures", pictures, range(MOST + 1))
    require("sentences", sentences, (1, 2))
    word, wrong, other = random.sample(passwords(), 3)
    asked, beside = random.sample(TOLD, 2)
    needle, distractor = random.randrange(pictures + 1), random.randrange(pictures + 1)
    first = random.random() < 0.5

    def text(told: str) -> Passage:
        passage = Passage()
        for slot in range(pictures + 1):
            for which in (True, False) if first else (False, True):
                if which and slot == needle:
                    passage.add(f"The {asked} is {told}.", "needle").add("\n")
                if not which and slot == distractor and sentences == 2:
                    passage.add(f"The {beside} is {wrong}.", "distractor").add("\n")
            if slot < pictures:
                passage.add(f"Picture {slot + 1}: {PICTURE_MARK}\n")
        return passage.add(f"What is the {asked}?", "question").add("\nAnswer:")

    return text(word).item(
        f" {word}",
        twin=text(other),
        twin_answer=f" {other}",
        foils=(f" {wrong}",),
        pictures=tuple(draw(grid(random), random) for _ in range(pictures)),
        pictures_shown=pictures,
        depth=needle / pictures if pictures else 0.0,
    )


def passwords() -> tuple[str, ...]:
    """Words that a password may be: sixteen animals."""
    return word_list("animals")[:16]


def _shown(pictures: int, question: str) -> Passage:
    passage = Passage()
    for number in range(pictures):
        passage.add(f"Picture {number + 1}: {PICTURE_MARK}\n")
    return passage.add(question, "question").add("\nAnswer:")


PICTURE_NEEDLE = Probe(
    id="picture-needle",
    title="the one of several pictures that shows a shape: its number, or the color of the shape",
    page="visual-organism.md#picture-needle",
    make=_picture_needle,
    metric="logit-difference",
    chance=0.0,
    spans=("question",),
    in_prompt=False,
    grid={"asked": ("color", "picture"), "pictures": (2, 3, 4)},
)

TEXT_NEEDLE = Probe(
    id="text-needle",
    title="a password told in a sentence between pictures",
    page="visual-organism.md#text-needle",
    make=_text_needle,
    metric="logit-difference",
    chance=0.0,
    spans=("needle", "question"),
    grid={"pictures": (2, 3, 4), "sentences": (1,)},
)
