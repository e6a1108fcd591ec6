"""Train a model organism: `python training/train.py main`.

Everything comes from the seed: weights, items, order. A run that was stopped goes on from its last checkpoint when the
same command is given again. The result is an ordinary checkpoint in `runs/NAME/model`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from mixture import COURSES, Batch, pool
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizer import build_tokenizer
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

CONTEXT = 1024
EVERY_SECONDS = 60
"""Time between checkpoints."""
CURVE_STEPS = 100
"""Steps between points of the loss curve."""
TYPICAL_WEIGHT = 100.0
"""Of a batch, for the scale of the loss."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained, and for how long. `kv_heads` 0: learned positions and one key per head, as in GPT-2."""

    seed: int
    layers: int = 6
    heads: int = 12
    kv_heads: int = 6
    head_dim: int = 24
    width: int = 192
    feed_forward: int = 512
    tokens: int = 13_000_000
    matrix_rate: float = 0.006
    other_rate: float = 2e-3


SHAPES = {
    "main": Shape(seed=0),
    "sibling-1": Shape(seed=1),
    "sibling-2": Shape(seed=2),
    "sibling-3": Shape(seed=3),
    "sibling-gpt2": Shape(seed=4, kv_heads=0, head_dim=16),
}


def new_model(shape: Shape, vocabulary: int) -> PreTrainedModel:
    """Random weights from the seed; matrices in the blocks begin larger than usual, which is faster at this width."""
    torch.manual_seed(shape.seed)
    model = _shaped(shape, vocabulary)
    for matrix in inner_matrices(model):
        torch.nn.init.normal_(matrix, std=shape.width**-0.5)
    return model


def inner_matrices(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The weight matrices of the blocks; embeddings, norms and biases are the others."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    return [each for each in model.parameters() if each.ndim == 2 and id(each) not in embeddings]


def _shaped(shape: Shape, vocabulary: int) -> PreTrainedModel:
    if shape.kv_heads:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=shape.width,
                intermediate_size=shape.feed_forward,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=shape.width,
            n_inner=shape.feed_forward,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_positions=CONTEXT,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


class Trainer:
    """The model, its optimizers, and how far it has come."""

    def __init__(self, name: str, shape: Shape, folder: Path) -> None:
        self.name, self.shape, self.folder = name, shape, folder
        self.tokenizer = build_tokenizer(CONTEXT)
        self.model = new_model(shape, len(self.tokenizer))
        inside = inner_matrices(self.model)
        taken = {id(each) for each in inside}
        others = [each for each in self.model.parameters() if id(each) not in taken]
        self.muon = Muon(inside, lr=shape.matrix_rate, decay=0.05)
        self.adam = torch.optim.AdamW(others, lr=shape.other_rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True)
        self.tokens, self.pools, self.steps = 0, 0, 0
        self.right = [0.0] * len(COURSES)
        """Share of answers that are wholly right, averaged over the latest rows of each course."""
        self.curve: list[dict[str, float]] = []

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
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.tokens, self.pools, self.steps = state["tokens"], state["pools"], state["steps"]
        self.right, self.curve = state["right"], state["curve"]
        return True

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "shape": asdict(self.shape),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "tokens": self.tokens,
            "pools": self.pools,
            "steps": self.steps,
            "right": self.right,
            "curve": self.curve,
        }
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state_file)  # a kill leaves the old checkpoint or the new one

    def train_pool(self) -> None:
        """One pool of batches; checkpoints lie between pools, so a run that is resumed repeats nothing."""
        # What is not mastered yet comes more often.
        come = self.tokens / self.shape.tokens
        shares = [
            course.share * (1.1 - right) if come >= course.begins else 0.0
            for course, right in zip(COURSES, self.right, strict=True)
        ]
        for batch in pool(self.tokenizer, self.shape.seed, self.pools, shares):
            self._step(batch)
        self.pools += 1

    def _step(self, batch: Batch) -> None:
        pace = min(1.0, self.steps / 100) * (1.02 - self.tokens / self.shape.tokens)
        for optimizer, rate in ((self.muon, self.shape.matrix_rate), (self.adam, self.shape.other_rate)):
            optimizer.param_groups[0]["lr"] = rate * max(pace, 0.02)
        hidden = self.model.base_model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
        learnt = batch.labels[:, 1:] != -100
        wanted = batch.labels[:, 1:][learnt]
        logits = self.model.lm_head(hidden[learnt])
        losses = cross_entropy(logits, wanted, reduction="none")
        # Every item counts for the root of the number of its learnt tokens: long answers do not drown short ones.
        rows = learnt.nonzero()[:, 0]
        weight = learnt.sum(1).clamp(min=1).float().rsqrt()[rows]
        # Between the mean over items and their sum: many short items count for more than few long ones, but not by all.
        ((losses * weight).sum() / (weight.sum() * TYPICAL_WEIGHT) ** 0.5).backward()
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        self._note(batch, rows, logits.detach().argmax(-1) == wanted, float(losses.detach().mean()))

    def _note(self, batch: Batch, rows: torch.Tensor, hits: torch.Tensor, loss: float) -> None:
        whole = torch.ones(len(batch.ids)).scatter_reduce_(0, rows, hits.float(), "amin")
        for kind in batch.kinds.unique().tolist():
            of_kind = whole[batch.kinds == kind]
            keep = 0.99 ** len(of_kind)
            self.right[kind] = keep * self.right[kind] + (1 - keep) * float(of_kind.mean())
        self.tokens += batch.ids.numel()
        self.steps += 1
        if self.steps % CURVE_STEPS == 0:
            self.curve.append({"tokens": self.tokens, "loss": round(loss, 4)})

    def export(self) -> Path:
        """The model in bf16 with its tokenizer and the loss curve."""
        folder = self.folder / "model"
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        training = {"name": self.name, **asdict(self.shape), "steps": self.steps, "curve": self.curve}
        (folder / "training.json").write_text(json.dumps(training) + "\n", encoding="utf-8")
        return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model organism on the procedural mixture.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--tokens", type=int, default=None, help="train for so many tokens instead of the recipe's")
    asked = parser.parse_args()
    shape = SHAPES[asked.name] if asked.tokens is None else replace(SHAPES[asked.name], tokens=asked.tokens)
    trainer = Trainer(asked.name, shape, asked.out or Path("runs") / asked.name)
    console = Console(stderr=True)
    if trainer.resume():
        console.print(f"going on at {trainer.tokens:,} of {shape.tokens:,} tokens")
    saved = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(asked.name, total=shape.tokens, completed=trainer.tokens)
        while trainer.tokens < shape.tokens:
            trainer.train_pool()
            progress.update(bar, completed=trainer.tokens)
            if time.monotonic() - saved > EVERY_SECONDS:
                trainer.save()
                saved = time.monotonic()
                console.print(_summary(trainer))
    trainer.save()
    console.print(_summary(trainer))
    print(trainer.export())


def _summary(trainer: Trainer) -> str:
    parts = [f"{course.probe} {right:.2f}" for course, right in zip(COURSES, trainer.right, strict=True)]
    return f"{trainer.tokens / 1e6:.1f}M tokens, wholly right: {', '.join(parts)}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
