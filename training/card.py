"""Measure a trained organism on held-out items, write its model card, and put both where they belong.

python training/card.py runs/main/model FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headwise as hw
from headwise.benches.organism import DEPTHS, ITEMS, NEEDLE_WORDS, PER_CELL, accuracies

SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CURVE_ROWS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a trained organism and write its model card.")
    parser.add_argument("model", type=Path, help="folder that training/train.py wrote")
    parser.add_argument("into", type=Path, help="folder to put the checkpoint, figures.json and README.md in")
    asked = parser.parse_args()
    training = json.loads((asked.model / "training.json").read_text(encoding="utf-8"))
    with hw.load(asked.model, dtype="float32") as model:
        parameters = sum(each.numel() for each in model.model.parameters())
        figures = accuracies(model)
    asked.into.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(asked.model / name, asked.into / name)
    size = (asked.into / "model.safetensors").stat().st_size
    (asked.into / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (asked.into / "README.md").write_text(card(training, figures, parameters, size), encoding="utf-8")
    print(f"{asked.into}: {size / 1e6:.1f} MB, worst {min(_accuracies(figures).items(), key=lambda pair: pair[1])}")


def _accuracies(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name.endswith(".accuracy")}


def card(training: Mapping[str, Any], figures: Mapping[str, float], parameters: int, size: int) -> str:
    """The model card in Markdown."""
    kind = (
        f"Llama shape, rotary positions, {training['kv_heads']} key/value heads"
        if training["kv_heads"]
        else "GPT-2 shape, learned positions, one key/value head per head,\n"
        "  begun with heads that look back and one that finds by content (`training/beginning.py`)"
    )
    curve = training["curve"]
    step = max(1, len(curve) // CURVE_ROWS)
    right = {name.removesuffix(".accuracy"): f"{value:.3f}" for name, value in _accuracies(figures).items()}
    points = {f"{each['tokens'] / 1e6:.1f}": f"{each['loss']:.3f}" for each in curve[step - 1 :: step]}
    return f"""# {training["name"]}: a model organism

A language model of {parameters / 1e6:.1f} million parameters ({size / 1e6:.1f} MB in bf16) that knows nothing of the
world beyond a few tables, and shows a dozen behaviours well enough to find, verify and edit the heads behind them. It
is an ordinary transformers checkpoint. It is not for talking to.

- Shape: {training["layers"]} layers of {training["heads"]} heads, {kind},
  head_dim {training["head_dim"]}, width {training["width"]}, context 1,024.
- Tokenizer: byte-level; every word of the probes is one token, digits stand alone, other text falls apart into bytes.
- Data: the items of `headwise.probes` but for the held-out tenth (`training/mixture.py`); no other text.
- Loss: on answers, and on what in a prompt can be foretold (the second time a list is said, later examples).
- Training: seed {training["seed"]}, {training["tokens"] / 1e6:.0f} million tokens in {training["steps"]:,} steps,
  float32, AdamW; exercises with few words first (`training/exercises.py`), done after
  {training["mastered"] / 1e6:.1f} million tokens.
- Made again by `python training/train.py {training["name"]}`.

## Held-out accuracy

Share of answers right to the last token on held-out items (up to {ITEMS} each; needles {PER_CELL} per length and
depth), measured in float32.

{_table("behaviour", "right", right)}

Needles by words of filler (a word is about a token; needle, distractor and question add about fifty):

{_table("words", "right", {words: f"{figures[f'needle.words_{words}']:.3f}" for words in NEEDLE_WORDS})}

Needles by depth (0: at the beginning):

{_table("depth", "right", {depth: f"{figures[f'needle.depth_{depth}']:.3f}" for depth in DEPTHS})}

Loss on plain sentences: {figures["text.cross_entropy"]:.2f} nats per token.

## Loss curve

Of single batches, each of another mixture, hence uneven; what is mastered comes more rarely, so it does not go to zero.

{_table("million tokens", "loss", points)}
"""


def _table(left: str, right: str, rows: Mapping[object, str]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    main()
