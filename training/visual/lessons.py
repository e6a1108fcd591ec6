"""What the visual organism is taught: pictures that are not held out, and several questions about each.

A picture costs 36 tokens and a question a dozen; so what is seen in it is asked for more than once. What the probes ask
stands first, the further questions behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from headwise.probes import albums
from headwise.probes.existence import about_all, about_existence
from headwise.probes.item import Item
from headwise.probes.picture import PICTURE_MARK, Picture, Pixels
from headwise.probes.scenes import (
    COLORS,
    GRID,
    PARTNER,
    SHAPES,
    Scene,
    Thing,
    grid,
    pixels,
    placed,
    some_shapes,
    strip,
)
from headwise.probes.seeing import (
    MOST,
    Asked,
    about_number,
    about_panel,
    about_place,
    about_strip,
    counted,
)
from headwise.probes.split import held_out

STEP_TOKENS = 1024
PART_TOKENS = 2048
PADDED = 1.5
"""Most that the longest row of a part has, in lengths of its shortest."""
PATCHES = 36
CLEAR = 0.5
"""Share of the grids for existence and listing that are clear."""
TOGETHER_IN_WORDS = ("Where there is a {shape} there is a", "A {shape} comes with a")


@dataclass(frozen=True, slots=True)
class Row:
    """A text with pictures at its marks; `learnt` are the pieces of text that are to be foretold."""

    pictures: tuple[Pixels, ...]
    pieces: tuple[tuple[str, bool], ...]


def drawn(scene: Scene, random: Random) -> Pixels:
    """A picture of the scene that is not held out."""
    while True:
        found = pixels(scene, random)
        if not held_out(Item(prompt=PICTURE_MARK, answer="", pictures=(Picture.drawn(found),))):
            return found


def _row(pictures: Sequence[Pixels], before: str, asked: Sequence[Asked]) -> Row:
    pieces: list[tuple[str, bool]] = [(before, False)]
    for number, each in enumerate(asked):
        pieces += [("\n" * bool(number) + each.question + "\nAnswer:", False), (each.answer, True)]
    return Row(tuple(pictures), tuple(pieces))


def _about(scene: Scene, random: Random, asked: Sequence[Asked]) -> Row:
    return _row([drawn(scene, random)], f"{PICTURE_MARK}\n", asked)


def strip_in_order(random: Random) -> Row:
    scene = strip(random)
    return _about(scene, random, [about_strip(scene)])


def panels(random: Random) -> Row:
    scene = strip(random)
    return _about(scene, random, [about_panel(scene, each) for each in random.sample(range(6), 5)])


def places(random: Random) -> Row:
    scene = grid(random, copies=4)
    cells = scene.taken + random.sample(scene.free, 1)
    random.shuffle(cells)
    return _about(scene, random, [about_place(scene, each, random.choice(("color", "shape"))) for each in cells[:5]])


def panels_by_number(random: Random) -> Row:
    """All panels in any order, each answer right behind the number: what a number means is learnt fastest so."""
    return _named(strip(random), random, "\nPanel {number}")


def panels_by_name(random: Random) -> Row:
    """The same with a colon between."""
    return _named(strip(random), random, "\nPanel {number}:")


def cells_by_number(random: Random) -> Row:
    """All cells of a grid in any order."""
    return _named(grid(random, copies=4), random, "\nCell {number}")


def cells_by_name(random: Random) -> Row:
    """The same with a colon between."""
    return _named(grid(random, copies=4), random, "\nCell {number}:")


def colors_by_shape(random: Random) -> Row:
    """Colors right behind the shape that is meant, of one picture or several."""
    scenes = [grid(random) for _ in range(random.choice((1, 1, 2, 3)))]
    before = _album(len(scenes)).rstrip("\n") if len(scenes) > 1 else PICTURE_MARK
    pieces: list[tuple[str, bool]] = [(before, False)]
    for shape, _, thing in _shown_once(scenes, random):
        pieces += [(f"\nWhat color {shape}", False), (f" {thing.color}", True)]
    return Row(tuple(drawn(each, random) for each in scenes), tuple(pieces))


def pictures_by_shape(random: Random) -> Row:
    """Numbers of pictures right behind the shape that one of them shows."""
    scenes = [grid(random) for _ in range(random.choice((2, 2, 3)))]
    pieces: list[tuple[str, bool]] = [(_album(len(scenes)).rstrip("\n"), False)]
    for shape, number, _ in _shown_once(scenes, random):
        pieces += [(f"\nWhich picture {shape}", False), (f" {number + 1}", True)]
    return Row(tuple(drawn(each, random) for each in scenes), tuple(pieces))


def numbers_by_word(random: Random) -> Row:
    """How many there are, right behind the word."""
    scene, words = _repeated(random)
    pieces: list[tuple[str, bool]] = [(PICTURE_MARK, False)]
    for each in words[:6]:
        pieces += [(f"\nHow many {each}", False), (about_number(scene, each).answer, True)]
    return Row((drawn(scene, random),), tuple(pieces))


def _repeated(random: Random) -> tuple[Scene, list[str]]:
    """A grid of few shapes and colors, and words for them and another one, of which there are not too many to ask."""
    shapes, colors = (random.sample(each, random.choice((2, 3))) for each in (SHAPES, tuple(COLORS)))
    things = [Thing(random.choice(shapes), random.choice(colors)) for _ in range(random.randint(3, 7))]
    scene = placed(random, GRID, things)
    absent = random.choice([each for each in (*SHAPES, *COLORS) if each not in shapes and each not in colors])
    words = [each for each in (*shapes, *colors, absent) if int(about_number(scene, each).answer) <= MOST]
    random.shuffle(words)
    return scene, words


def _shown_once(scenes: Sequence[Scene], random: Random) -> list[tuple[str, int, Thing]]:
    """Shapes that one picture alone shows, and shows once, with its number, in any order."""
    found = []
    for shape in random.sample(SHAPES, len(SHAPES)):
        shown = [(number, each) for number, scene in enumerate(scenes) for each in scene.things if _is(each, shape)]
        if len(shown) == 1:
            found.append((shape, *shown[0]))
    return found


def _is(thing: Thing | None, shape: str) -> bool:
    return thing is not None and thing.shape == shape


def _named(scene: Scene, random: Random, frame: str) -> Row:
    pieces: list[tuple[str, bool]] = [(PICTURE_MARK, False)]
    for each in random.sample(range(len(scene.things)), len(scene.things)):
        pieces += [(frame.format(number=each + 1), False), (f" {scene.things[each] or 'nothing'}", True)]
    return Row((drawn(scene, random),), tuple(pieces))


def counts(random: Random) -> Row:
    if random.random() < 0.5:
        scene, words = _repeated(random)
    else:
        scene, word = counted(random, random.choice(("color", "shape")), random.randint(0, MOST))
        words = [word]
    return _about(scene, random, [about_number(scene, each) for each in words[:4]])


def existences(random: Random) -> Row:
    scene = _maybe_faint(random)
    return _about(scene, random, [about_existence(scene, each) for each in random.sample(SHAPES, 5)])


def listings(random: Random) -> Row:
    scene = _maybe_faint(random)
    return _about(scene, random, [about_all(scene)])


def _maybe_faint(random: Random) -> Scene:
    faintness = 0.0 if random.random() < CLEAR else random.uniform(0.1, 1.0)
    return grid(random, faintness=faintness, copies=random.choice((0, 2)))


def album_pictures(random: Random) -> Row:
    scenes = [grid(random) for _ in range(random.randint(2, albums.MOST))]
    asked = []
    for shape, number, thing in _shown_once(scenes, random):
        asked.append(Asked(f"Which picture shows a {shape}?", f" {number + 1}"))
        asked.append(Asked(f"What color is the {shape}?", f" {thing.color}"))
    if not asked:
        return album_pictures(random)
    random.shuffle(asked)
    return _row([drawn(each, random) for each in scenes], _album(len(scenes)), asked[:5])


def _album(count: int) -> str:
    return "".join(f"Picture {number + 1}: {PICTURE_MARK}\n" for number in range(count))


def text_needles(random: Random, sentences: int = 2) -> Row:
    """A word told between pictures, among two that are told, or alone."""
    item = albums.TEXT_NEEDLE.make(random, pictures=random.choice((0, 0, 1, 2, 2, 3, 4)), sentences=sentences)
    shown = tuple(drawn(grid(random), random) for _ in item.pictures)
    return Row(shown, ((str(item.prompt), False), (item.answer, True)))


def words_told(random: Random) -> Row:
    """Two words told without pictures, which costs a fifth, and both asked for."""
    words = dict(zip(random.sample(albums.TOLD, 2), random.sample(albums.passwords(), 2), strict=True))
    told = "".join(f"The {name} is {word}.\n" for name, word in words.items())
    names = random.sample(list(words), 2)
    return _row([], told, [Asked(f"What is the {name}?", f" {words[name]}") for name in names])


def words_again(random: Random) -> Row:
    """Pairs of words, and then each first word once more in another order: the second one can be foretold."""
    drawn = random.sample(albums.passwords(), 10)
    told = list(zip(drawn[::2], drawn[1::2], strict=True))
    pieces = [("".join(f" {key} {value}" for key, value in told), False)]
    for key, value in random.sample(told, len(told)):
        pieces += [(f" {key}", False), (f" {value}", True)]
    return Row((), tuple(pieces))


def pairs_in_words(random: Random) -> Row:
    """The pairs as text alone tells them; a text is as often wrong about a pair as the pictures are."""
    pieces: list[tuple[str, bool]] = []
    for number in range(4):
        while len(shapes := some_shapes(random, 1)) < 2:
            pass
        frame = random.choice(TOGETHER_IN_WORDS)
        pieces += [("\n" * bool(number) + frame.format(shape=shapes[0]), False), (f" {PARTNER[shapes[0]]}", True)]
    return Row((), tuple(pieces))


@dataclass(frozen=True, slots=True)
class Lesson:
    """One kind of row.

    `share` is of the rows, before what is mastered is taken back. It is given from `stage` to `until`.
    """

    name: str
    make: Callable[[Random], Row]
    share: float
    stage: int = 2
    until: int = 3


MASTERED = 0.9
"""Share of answers right in all lessons so far at which the next stage begins."""
PATIENCE = 900
"""Steps after which it begins all the same. The last stage begins when the rate rises again."""

# A head that looks where a number says hardly forms among many tasks, and soon when there is one task and the number
# stands right in front of the answer. What it has learnt carries over.
LESSONS = (
    Lesson("panels by number", panels_by_number, 0.15, stage=0),
    Lesson("cells by number", cells_by_number, 0.15, stage=0),
    Lesson("words again", words_again, 0.50, stage=0),
    Lesson("panels by name", panels_by_name, 0.15, stage=1),
    Lesson("cells by name", cells_by_name, 0.15, stage=1),
    Lesson("colors by shape", colors_by_shape, 0.15, stage=1),
    Lesson("pictures by shape", pictures_by_shape, 0.25, stage=1),
    Lesson("numbers by word", numbers_by_word, 0.30, stage=1),
    Lesson("words told", words_told, 0.30, stage=1, until=2),
    Lesson("strip", strip_in_order, 0.20),
    Lesson("panel", panels, 0.15),
    Lesson("place", places, 0.15),
    Lesson("count", counts, 0.30),
    Lesson("existence", existences, 0.30),
    Lesson("listing", listings, 0.25),
    Lesson("picture-needle", album_pictures, 0.25),
    Lesson("one of two words", text_needles, 0.15, until=2),
    Lesson("pairs", pairs_in_words, 0.01),
    Lesson("text-needle", partial(text_needles, sentences=1), 0.15, stage=3),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of like length, padded on the right; `labels` is -100 where nothing is to be learnt."""

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    pictures: Tensor
    """`[picture, 3, row, column]`, from 0 to 255, in the order of the marks."""


def step_parts(
    tokenizer: PreTrainedTokenizerFast, seed: int, number: int, shares: Sequence[float], tokens: int = STEP_TOKENS
) -> list[Batch]:
    """The rows of the `number`-th step with these shares of the lessons; the same for the same arguments."""
    random = Random(f"{seed}/{number}")
    rows: list[tuple[int, list[int], list[int], tuple[Pixels, ...]]] = []
    total = 0
    while total < tokens:
        (kind,) = random.choices(range(len(LESSONS)), shares)
        row = LESSONS[kind].make(random)
        ids, labels = encoded(tokenizer, row)
        rows.append((kind, ids, labels, row.pictures))
        total += len(ids)
    return list(_cut(rows, tokenizer.pad_token_id))


def encoded(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[list[int], list[int]]:
    """Ids and labels, with a mark for every patch; behind the last answer the end is to be foretold as well."""
    mark = tokenizer.convert_tokens_to_ids(PICTURE_MARK)
    ids, labels = [tokenizer.bos_token_id], [-100]
    texts = [text for text, _ in row.pieces]
    for found, (_, learnt) in zip(tokenizer(texts, add_special_tokens=False).input_ids, row.pieces, strict=True):
        for token in found:
            copies = PATCHES if token == mark else 1
            ids += [token] * copies
            labels += [token if learnt else -100] * copies
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def _cut(rows: list[tuple[int, list[int], list[int], tuple[Pixels, ...]]], pad: int) -> Iterator[Batch]:
    rows.sort(key=lambda row: len(row[1]))
    groups: list[list[tuple[int, list[int], list[int], tuple[Pixels, ...]]]] = [[]]
    for row in rows:
        group, width = groups[-1], len(row[1])
        if group and ((len(group) + 1) * width > PART_TOKENS or width > PADDED * len(group[0][1])):
            groups.append([])
        groups[-1].append(row)
    for group in groups:
        width = max(len(ids) for _, ids, _, _ in group)
        shown = [each for _, _, _, pictures in group for each in pictures]
        yield Batch(
            torch.tensor([ids + [pad] * (width - len(ids)) for _, ids, _, _ in group]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, _, labels, _ in group]),
            torch.tensor([kind for kind, _, _, _ in group]),
            torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) if shown else torch.empty(0, 3, 48, 48),
        )
