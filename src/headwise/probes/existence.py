"""Whether a shape is there, and which are: pictures against what usually goes together.

Grids show shapes in pairs. The questions are those of POPE (Li et al. 2023, "Evaluating Object Hallucination in Large
Vision-Language Models"): half are about shapes that are there; the others about any that is not (`random`), one that
most grids show (`popular`), or the partner of one that is there (`adversarial`). Listings are for CHAIR (Rohrbach et
al. 2018, "Object Hallucination in Image Captioning"): which of the named shapes are there.
"""

from __future__ import annotations

from random import Random

from headwise.probes.item import Item
from headwise.probes.scenes import GRID, PARTNER, POPULAR, SHAPES, Scene, Thing, draw, grid, some_color
from headwise.probes.seeing import Asked, asks
from headwise.probes.stream import Probe, require

KINDS = ("random", "popular", "adversarial")
FAINTNESS = 0.5
"""Of pictures in which what is there can be overlooked, and what is not there guessed; 0 is clear."""
STEPS = 100


def about_existence(scene: Scene, shape: str) -> Asked:
    """Whether a shape is there."""
    return Asked(f"Is there a {shape}?", " yes" if shape in scene.shapes else " no")


def about_all(scene: Scene) -> Asked:
    """All shapes that are there, each once, in the order of the alphabet."""
    return Asked("Name the shapes.", " " + ", ".join(scene.shapes) + ".")


def _existence(random: Random, *, kind: str, answer: str, faintness: float) -> Item:
    require("kind", kind, KINDS)
    require("answer", answer, ("yes", "no"))
    _require_faintness(faintness)
    scene, shape = _asked(random, kind, answer, faintness)
    if answer == "yes":
        place = scene.where(shape)
        twin = scene.put(place, None)
    else:
        place = random.choice(scene.free)
        twin = scene.put(place, Thing(shape, some_color(random)))
    regions = GRID.regions() | {"target": GRID.region(place)}
    if PARTNER[shape] in scene.shapes:
        regions["partner"] = GRID.region(scene.where(PARTNER[shape]))
    asked, other = about_existence(scene, shape), about_existence(twin, shape)
    seed = random.getrandbits(32)
    return asks(asked).item(
        asked.answer,
        twin=asks(other),
        twin_answer=other.answer,
        foils=(other.answer,),
        pictures=(draw(scene, Random(seed)),),
        twin_pictures=(draw(twin, Random(seed)),),
        regions=regions,
        kind=kind,
        faintness=faintness,
        shape=shape,
        partner="there" if PARTNER[shape] in scene.shapes else "absent",
    )


def _asked(random: Random, kind: str, answer: str, faintness: float) -> tuple[Scene, str]:
    """A grid and a shape to ask for; of a question of one kind, those with either answer ask for like shapes."""
    while True:
        scene = grid(random, faintness=faintness)
        there = set(scene.shapes)
        asked = {
            "random": set(SHAPES),
            "popular": set(POPULAR),
            "adversarial": {PARTNER[each] for each in there},
        }[kind]
        found = sorted(asked & there if answer == "yes" else asked - there)
        if found:
            return scene, random.choice(found)


def _listing(random: Random, *, faintness: float) -> Item:
    _require_faintness(faintness)
    scene = grid(random, faintness=faintness)
    gone = random.choice(scene.taken)
    twin = scene.put(gone, _new_shape(random, scene))
    seed = random.getrandbits(32)
    partners = {shape: PARTNER[shape] for shape in scene.shapes}
    return asks(about_all(scene)).item(
        about_all(scene).answer,
        twin=asks(about_all(twin)),
        twin_answer=about_all(twin).answer,
        pictures=(draw(scene, Random(seed)),),
        twin_pictures=(draw(twin, Random(seed)),),
        regions=GRID.regions() | {"target": GRID.region(gone)},
        faintness=faintness,
        alone=sum(partner not in partners for partner in partners.values()),
    )


def _new_shape(random: Random, scene: Scene) -> Thing:
    return Thing(random.choice([each for each in SHAPES if each not in scene.shapes]), some_color(random))


def _require_faintness(value: float) -> None:
    require("faintness", round(value * STEPS) if isinstance(value, int | float) else value, range(STEPS + 1))


EXISTENCE = Probe(
    id="existence",
    title="whether a shape is in a picture, where its partner is there or not",
    page="visual-organism.md#existence",
    make=_existence,
    metric="logit-difference",
    chance=0.0,
    spans=("question",),
    in_prompt=False,
    grid={"kind": KINDS, "answer": ("yes", "no"), "faintness": (FAINTNESS,)},
)

LISTING = Probe(
    id="listing",
    title="all shapes of a picture by name",
    page="visual-organism.md#listing",
    make=_listing,
    metric="answer-log-probability",
    chance=None,
    spans=("question",),
    in_prompt=False,
    grid={"faintness": (FAINTNESS,)},
)
