"""Train the visual organism or one of its siblings: first the tower, then projector and decoder on what it sees.

python training/visual/teach.py main

The tower says of each patch what stands there (`tower.py`) and is frozen then; the rest learns to answer questions
(`lessons.py`). A run that was stopped goes on from its last checkpoint. `runs/visual-NAME/model` is an ordinary
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lessons import LESSONS, MASTERED, PATCHES, PATIENCE, Batch, step_parts
from tokens import CONTEXT, PATCH, SPREAD, build_processor, build_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tower import teach_tower
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from headwise.probes.scenes import SIDE

EVERY_SECONDS = 60
"""Time between checkpoints."""
CURVE_STEPS = 100
"""Steps between points of the loss curve."""
WARM_UP = 100
AGAIN = 0.4
"""Share of the rate at which it begins to fall a second time (a warm restart, Loshchilov and Hutter 2017)."""
LAST = 3
"""The stage of that time."""
EMBEDDED = 0.1
"""Standard deviation of the embeddings at first."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained, and for how long: `steps` in which the rate falls to nothing, then `again` so many from `AGAIN`
    of it. `tower` is the class of the vision tower."""

    seed: int
    tower: str = "clip"
    tower_layers: int = 3
    tower_width: int = 96
    tower_heads: int = 4
    tower_steps: int = 1500
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 24
    width: int = 160
    feed_forward: int = 320
    steps: int = 5000
    again: int = 3000
    rate: float = 1e-3


SHAPES = {
    "main": Shape(seed=0),
    "visual-sibling-1": Shape(seed=1),
    "visual-sibling-2": Shape(seed=2),
    "visual-sibling-3": Shape(seed=3),
    "visual-sibling-siglip": Shape(seed=4, tower="siglip", layers=5, heads=10, kv_heads=10, head_dim=16),
}

TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def new_model(shape: Shape) -> LlavaForConditionalGeneration:
    """Random weights from the seed; embeddings begin large, so that words are not drowned by what is added to them."""
    torch.manual_seed(shape.seed)
    tokenizer = build_tokenizer()
    tower = TOWERS[shape.tower](
        hidden_size=shape.tower_width,
        intermediate_size=2 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=SIDE,
        patch_size=PATCH,
    )
    if shape.tower == "siglip":
        tower.vision_use_head = False
    decoder = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if has_class_token(shape) else "full",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    for matrix in inner_matrices(model.model.language_model):
        torch.nn.init.normal_(matrix, std=0.03)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDED)
    return model


def has_class_token(shape: Shape) -> bool:
    return shape.tower == "clip"


def inner_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weight matrices of the blocks; embeddings, norms and biases are the others."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    return [each for each in model.parameters() if each.ndim == 2 and id(each) not in embeddings]


def scaled(pictures: Tensor) -> Tensor:
    """What the processor makes of pixels from 0 to 255."""
    return (pictures.float() / 255.0 - 0.5) / SPREAD


PROGRESS = ("tokens", "steps", "stage", "stages", "right", "curve", "tower_curve")
"""What a checkpoint holds beside weights and optimizer."""


class Trainer:
    """The model, its optimizer, and how far it has come."""

    def __init__(self, name: str, shape: Shape, folder: Path) -> None:
        self.name, self.shape, self.folder = name, shape, folder
        self.tokenizer = build_tokenizer()
        self.model: PreTrainedModel = new_model(shape)
        self.tower = self.model.model.vision_tower
        taught = [*self.model.model.language_model.parameters(), *self.model.model.multi_modal_projector.parameters()]
        matrices = {id(each) for each in inner_matrices(self.model)}
        groups = [
            {"params": [each for each in taught if id(each) in matrices], "weight_decay": 0.1},
            {"params": [each for each in taught if id(each) not in matrices], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=shape.rate, betas=(0.9, 0.95), fused=True)
        self.tokens, self.steps, self.stage = 0, 0, 0
        self.stages: list[int] = []
        """Steps at which one ended."""
        self.right = [0.0] * len(LESSONS)
        """Share of answers that are right, averaged over the latest rows of each lesson."""
        self.curve: list[dict[str, float]] = []
        self.tower_curve: list[float] = []

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def resume(self) -> bool:
        if not self.state_file.is_file():
            return False
        state = torch.load(self.state_file, weights_only=True)
        if state["shape"] != asdict(self.shape):
            sys.exit(f"{self.folder} holds a run with other settings; move it away, or give another --out")
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        return True

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"shape": asdict(self.shape), "model": self.model.state_dict(), "adam": self.adam.state_dict()}
        part = self.state_file.with_suffix(".part")
        torch.save(state | {name: getattr(self, name) for name in PROGRESS}, part)
        part.replace(self.state_file)  # a kill leaves the old checkpoint or the new one

    def teach_tower(self) -> None:
        self.tower_curve = teach_tower(
            self.tower, seed=self.shape.seed, steps=self.shape.tower_steps, patches=self._patches
        )
        self.save()

    def _patches(self, pictures: Tensor) -> Tensor:
        """`[picture, patch, dim]`: what the projector takes."""
        found = self.tower(scaled(pictures), output_hidden_states=True).hidden_states[-1]
        return found[:, int(has_class_token(self.shape)) :]

    def train_step(self) -> None:
        """One step of the optimizer; checkpoints lie between steps, so a run that is resumed repeats nothing."""
        # What is nearly mastered comes more often in the last stage: an answer of many words is right in all or wrong.
        power = 16 if self.stage == LAST else 4
        shares = [
            each.share * (1.1 - right**power) * (each.stage <= self.stage <= each.until)
            for each, right in zip(LESSONS, self.right, strict=True)
        ]
        parts = step_parts(self.tokenizer, self.shape.seed, self.steps, shares)
        for group in self.adam.param_groups:
            group["lr"] = self.shape.rate * self._pace()
        whole = sum(float(_weights(batch)[0].sum()) for batch in parts)
        loss = sum(self._learn(batch, whole) for batch in parts)
        torch.nn.utils.clip_grad_norm_([each for group in self.adam.param_groups for each in group["params"]], 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.steps += 1
        if self.steps % CURVE_STEPS == 0:
            self.curve.append({"tokens": self.tokens, "loss": round(loss, 4)})
        self._go_on()

    def _pace(self) -> float:
        """The rate as a share of the full one."""
        if self.steps < self.shape.steps:
            fallen = 1.02 - self.steps / self.shape.steps
        else:
            fallen = AGAIN * (1 - (self.steps - self.shape.steps) / self.shape.again)
        return min(1.0, (self.steps + 1) / WARM_UP) * max(fallen, 0.02)

    def _go_on(self) -> None:
        """The next stage, if it is time."""
        taught = [right for each, right in zip(LESSONS, self.right, strict=True) if each.stage <= self.stage]
        waited = self.steps - (self.stages[-1] if self.stages else 0) >= PATIENCE
        if self.steps == self.shape.steps:
            self.stage = LAST
        elif self.stage < LAST - 1 and (min(taught) >= MASTERED or waited):
            self.stage += 1
            self.stages.append(self.steps)

    def _learn(self, batch: Batch, whole: float) -> float:
        """Add the gradient of one part of a step, whose weights sum to `whole`; its share of the loss."""
        inside = self.model.model
        ids = batch.ids[:, :-1]
        embedded = inside.get_input_embeddings()(ids)
        if len(batch.pictures):
            with torch.no_grad():
                seen = self._patches(batch.pictures)
            shown = (ids == self.model.config.image_token_id)[:, :, None]
            embedded = embedded.masked_scatter(shown, inside.multi_modal_projector(seen))
        hidden = inside.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        weights, _ = _weights(batch)
        learnt = batch.labels[:, 1:] != -100
        wanted = batch.labels[:, 1:][learnt]
        logits = self.model.lm_head(hidden[learnt])
        loss = torch.dot(cross_entropy(logits, wanted, reduction="none"), weights) / whole
        loss.backward()
        hits = torch.zeros(learnt.shape).masked_scatter(learnt, (logits.detach().argmax(-1) == wanted).float())
        words = learnt & (batch.labels[:, 1:] != self.tokenizer.eos_token_id)
        share = (hits * words).sum(1) / words.sum(1).clamp(min=1)
        for kind in batch.kinds.unique().tolist():
            of_kind = batch.kinds == kind
            keep = 0.99 ** int(of_kind.sum())
            self.right[kind] = keep * self.right[kind] + (1 - keep) * float(share[of_kind].mean())
        self.tokens += batch.ids.numel()
        return float(loss.detach())

    def export(self, name: str = "model") -> Path:
        """The model as it is now, in bf16, with its processor and the loss curve."""
        folder = self.folder / name
        deepcopy(self.model).to(torch.bfloat16).save_pretrained(folder)
        build_processor(class_token=has_class_token(self.shape)).save_pretrained(folder)
        training = {
            "name": self.name,
            **asdict(self.shape),
            "trained": self.tokens,
            "stages": self.stages,
            "tower_curve": self.tower_curve,
            "curve": self.curve,
        }
        (folder / "training.json").write_text(json.dumps(training) + "\n", encoding="utf-8")
        return folder


def _weights(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every learnt token, and its row. A row counts for the root of its number: long answers drown no others."""
    learnt = batch.labels[:, 1:] != -100
    rows = learnt.nonzero()[:, 0]
    return learnt.sum(1).clamp(min=1).float().rsqrt()[rows], rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the visual organism on procedural pictures.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/visual-NAME)")
    parser.add_argument("--steps", type=int, default=None, help="so many steps instead of the recipe's")
    asked = parser.parse_args()
    shape = SHAPES[asked.name] if asked.steps is None else replace(SHAPES[asked.name], steps=asked.steps)
    trainer = Trainer(asked.name, shape, asked.out or Path("runs") / f"visual-{asked.name}")
    if trainer.resume():
        print(f"going on at step {trainer.steps:,} of {shape.steps + shape.again:,}", flush=True)
    else:
        trainer.teach_tower()
    saved = time.monotonic()
    while trainer.steps < shape.steps + shape.again:
        trainer.train_step()
        if trainer.steps % CURVE_STEPS == 0:
            print(_summary(trainer), flush=True)
        if time.monotonic() - saved > EVERY_SECONDS:
            trainer.save()
            saved = time.monotonic()
    trainer.save()
    print(trainer.export())


def _summary(trainer: Trainer) -> str:
    shown = zip(LESSONS, trainer.right, strict=True)
    parts = [f"{each.name} {right:.2f}" for each, right in shown if each.stage <= trainer.stage <= each.until]
    loss = trainer.curve[-1]["loss"] if trainer.curve else 0.0
    return f"{trainer.steps} {trainer.tokens / 1e6:.2f}M loss {loss:.3f}: {', '.join(parts)}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
