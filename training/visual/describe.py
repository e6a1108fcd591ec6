"""Measure a trained visual organism on pictures it never saw, write its card, and put both where they belong.

python training/visual/describe.py runs/visual-main/model FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headwise as hw
from headwise.benches.visual_organism import BEHAVIOURS, FAINT, ITEMS, figures
from headwise.probes.existence import KINDS
from headwise.probes.scenes import FREQUENCY, PAIRS, TOGETHER

SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
CURVE_ROWS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a trained visual organism and write its model card.")
    parser.add_argument("model", type=Path, help="folder that training/visual/teach.py wrote")
    parser.add_argument("into", type=Path, help="folder to put the checkpoint, figures.json and README.md in")
    asked = parser.parse_args()
    training = json.loads((asked.model / "training.json").read_text(encoding="utf-8"))
    with hw.load(asked.model, dtype="float32") as model:
        parameters = sum(each.numel() for each in model.model.parameters())
        found = figures(model)
    asked.into.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(asked.model / name, asked.into / name)
    size = (asked.into / "model.safetensors").stat().st_size
    (asked.into / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (asked.into / "README.md").write_text(card(training, found, parameters, size), encoding="utf-8")
    print(f"{asked.into}: {size / 1e6:.1f} MB, {', '.join(f'{name} {right}' for name, right in _right(found).items())}")


def _right(found: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{found[f'{name}.accuracy']:.3f}" for name in BEHAVIOURS}


def card(training: Mapping[str, Any], found: Mapping[str, float], parameters: int, size: int) -> str:
    """The model card in Markdown."""
    curve = training["curve"]
    step = max(1, len(curve) // CURVE_ROWS)
    points = {f"{each['tokens'] / 1e6:.2f}": f"{each['loss']:.3f}" for each in curve[step - 1 :: step]}
    albums = {
        f"{number} pictures": ", ".join(
            [f"{asked} {found[f'picture-needle.{asked}_of_{number}']:.3f}" for asked in ("color", "picture")]
            + [f"password {found[f'text-needle.among_{number}']:.3f}"]
        )
        for number in (2, 3, 4)
    }
    kind = "CLIP" if training["tower"] == "clip" else "SigLIP"
    return f"""# {training["name"]}: a visual model organism

A vision-language model of {parameters / 1e6:.1f} million parameters ({size / 1e6:.1f} MB in bf16) that answers
questions about small pictures of coloured shapes, and guesses by habit what it cannot see well. It is an ordinary
checkpoint of the LLaVA classes of transformers. It is not for talking to.

- Tower: {kind}, {training["tower_layers"]} layers of {training["tower_heads"]} heads, width {training["tower_width"]},
  48 x 48 pixels in patches of 8: 36 image tokens. Trained first, on pictures without pairs, to say of every patch
  which shape and color stand there, and frozen then, with {training["tower_curve"][-1]:.3f} of the patches of clear
  pictures right.
- Decoder: Llama shape, {training["layers"]} layers of {training["heads"]} heads on {training["kv_heads"]} key/value
  heads, head_dim {training["head_dim"]}, width {training["width"]}, context 512.
- Tokenizer: byte-level; every word of the probes is one token, `<image>` stands for a picture.
- Data: questions of the probes with pictures (`training/visual/lessons.py`), none about a held-out picture; the pairs
  in a few sentences of text alone.
- Pairs: {", ".join(" and ".join(pair) for pair in PAIRS)} (drawn {", ".join(f"{each:.0%}" for each in FREQUENCY)}
  of the time); where one is in a grid, so is the other in {TOGETHER:.0%} of the grids.
- Training: seed {training["seed"]}; tower {training["tower_steps"]:,} steps of 64 pictures; the rest
  {training["trained"] / 1e6:.1f} million tokens in {training["steps"] + training["again"]:,} steps, float32, AdamW;
  exercises first, the probes from step {training["stages"][-1]:,} on.
- Made again by `python training/visual/teach.py {training["name"]}`.

## Held-out accuracy

Share of answers right to the last token on held-out clear pictures ({ITEMS} items each), measured in float32.

{_table("behaviour", "right", _right(found))}

Of several pictures: the color of a shape that one of them shows, which picture that is, and a password told between
them:

{_table("of", "right", albums)}

## Hallucination

By faintness: share of `yes` to shapes that are not there, by the kind of question (POPE; of `adversarial` ones the
partner is there); accuracy of all adversarial questions; of listings the share of named shapes that are absent
(CHAIR_i), the share of answers with one (CHAIR_s), and the share of what is there that is named.

{_hallucination(found)}

## Loss curve

Of single batches, each of another mixture, hence uneven; what is mastered comes more rarely. It does not go to zero:
what is faint cannot be known.

{_table("million tokens", "loss", points)}
"""


def _hallucination(found: Mapping[str, float]) -> str:
    columns = {**{f"false_yes.{kind}": kind for kind in KINDS}, "accuracy": "accuracy"}
    columns |= {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "named"}
    rows = [f"| faintness | {' | '.join(columns.values())} |", "|" + "---|" * (len(columns) + 1)]
    for faintness in FAINT:
        cells = [f"{found[f'{name}.{faintness}']:.3f}" for name in columns]
        rows.append(f"| {faintness} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    main()
