"""Planted models: `planted()`, `null()`, `random_net()`.

model = planted(seed=3)
model.truth.heads("induction")              # the heads, by role
model.truth.with_effect("ioi", "total")     # those whose knock-out changes the behaviour
model.save("folder")                        # an ordinary checkpoint, with truth.json beside it
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headwise.errors import InputError
from headwise.heads import Head
from headwise.zoo.planted.checkpoint import ARCHITECTURES, GQA_GROUP, Architecture, Geometry, assemble
from headwise.zoo.planted.circuits import (
    BEHAVIOURS,
    CIRCUITS,
    DEFAULT_STRENGTH,
    DIALS,
    Behaviour,
    HeadPlan,
    circuits_named,
)
from headwise.zoo.planted.drawing import LOGIT_GAIN, Codes, draw_codes, draw_model, subspaces
from headwise.zoo.planted.examples import Example, examples
from headwise.zoo.planted.heads import HEAD_DIM
from headwise.zoo.planted.labels import label
from headwise.zoo.planted.lexicon import Lexicon, own_tokenizer
from headwise.zoo.planted.otherwise import Way, null_plans
from headwise.zoo.planted.placement import Placed, scatter
from headwise.zoo.planted.stream import Stream
from headwise.zoo.planted.truth import Truth
from headwise.zoo.tiny import Organism

LOGIT_NOISE = 0.6
RANDOM_LOGIT_NOISE = 4.0
"""Of a net in which nothing is planted: all its logits."""

BACKGROUND = 1.0
"""Logits: what no head without an effect exceeds when it is knocked out, on the mean of several items."""

LEAST_BACKGROUND = 48
MAX_STRENGTH = 3.0
"""Beyond it the output would outgrow the constant direction, and effects would no longer be in proportion."""

Kind = Literal["planted", "null", "random"]


@dataclass(frozen=True)
class Planted(Organism):
    """A model with planted heads, what is known about them, and what its circuits know of its tokenizer.

    `codes` are the unit codes of the tokens, `[vocabulary, code]`; the unembedding is made of them.
    """

    truth: Truth
    lexicon: Lexicon
    codes: Tensor

    def examples(self, behaviour: Behaviour, count: int, *, seed: int = 0) -> list[Example]:
        """`count` token sequences that call for a behaviour. Raises InputError for an unknown one."""
        return examples(self.lexicon, behaviour, count, seed)

    def expected_direct(self, head: Head | str, behaviour: Behaviour, example: Example) -> float:
        """What the head writes into the answer's logit minus the foil's, in logits before the scale of the final norm.

        `size * (1 - <code of answer, code of foil>)`; 0 where the truth has no direct effect, and for a memory head on
        an item of another relation.
        """
        effect = self.truth.effect(head, behaviour)
        serves = self._relation_of(head)
        if effect.size is None or (serves is not None and serves not in example.ids):
            return 0.0
        return effect.size * (1 - float(self.codes[example.answer] @ self.codes[example.foil]))

    def _relation_of(self, head: Head | str) -> int | None:
        """The token of the relation that a memory head looks up; None for any other head."""
        label = Head.parse(head).label
        names = [known.name for known in self.truth.heads_known if known.head == label]
        numbers = [name.rpartition("memory-")[2] for name in names if "memory-" in name]
        return self.lexicon.relations[int(numbers[0])] if numbers and numbers[0].isdigit() else None

    def save(self, folder: str | Path) -> None:
        """Write an ordinary checkpoint (model and tokenizer, `save_pretrained`), and `truth.json` beside it."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        self.truth.save(folder)


def planted(
    architecture: Architecture = "llama",
    *,
    layers: int = 4,
    heads: int = 8,
    seed: int = 0,
    circuits: Sequence[str] | None = None,
    strength: float | Mapping[str, float] = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lexicon: Lexicon | None = None,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
) -> Planted:
    """A model whose planted heads do known things; every other head is random.

    Args:
        architecture: `llama` (rotary), `llama-gqa` (two query heads share keys and values), `gpt2` (learned positions).
        layers, heads: at least 4 layers for all circuits; heads per layer.
        seed: decides codes, places and every random weight.
        circuits: some of `patterns`, `induction`, `indirect-object`, `memory`, `context`, `key`; None is all.
        strength: factor on what the writing roles (`induction`, `mover`, `memory`, `context`, `key-copy`) add to the
            logits: one for all, which multiplies the defaults (memory 0.7, the others 1), or the value of each role
            named. At 0 a head is a decoy.
        tokenizer: any fast tokenizer with at most 2,000 tokens, most of them whole words; None is the package's own.
        lexicon: which tokens the circuits know; None is `Lexicon.of(tokenizer)`.
        dtype: that of the weights, rounded from float64.
        attn: attention implementation; None leaves it to transformers.

    Raises InputError for an unknown option, a tokenizer that does not fit, or a shape the circuits do not fit into.
    """
    if isinstance(circuits, str):
        raise InputError(f"circuits takes a list of names, such as ({circuits!r},), not a text")
    names = CIRCUITS if circuits is None else tuple(circuits)
    base = _Base.of(architecture, layers, heads, seed, tokenizer, lexicon)
    return base.build("planted", circuits_named(names, base.codes.maps), _strengths(strength), LOGIT_NOISE, dtype, attn)


def null(
    behaviour: Behaviour,
    way: Way = "heads",
    architecture: Architecture = "llama",
    *,
    layers: int = 4,
    heads: int = 8,
    seed: int = 0,
    circuits: Sequence[str] | None = None,
    strength: float | Mapping[str, float] = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lexicon: Lexicon | None = None,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
) -> Planted:
    """A model that solves `behaviour` without the heads that should do it: those are there, as decoys.

    Args:
        behaviour: `repeat`, `ioi`, `facts`, `conflict` or `keys`.
        way: `heads`, other heads with other patterns write the answer; `mlp`, the last block's feed-forward part does.
        circuits: the circuits that are there beside that of the behaviour; None is none.

    The other arguments and errors are those of `planted`. Without `patterns` there are fewer heads to place.
    """
    base = _Base.of(architecture, layers, heads, seed, tokenizer, lexicon)
    plans = null_plans(tuple(circuits or ()), behaviour, way, base.codes.maps)
    return base.build("null", plans, _strengths(strength), LOGIT_NOISE, dtype, attn)


def random_net(
    architecture: Architecture = "llama",
    *,
    layers: int = 4,
    heads: int = 8,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lexicon: Lexicon | None = None,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
) -> Planted:
    """Nothing is planted, and no head is without effect: uneven patterns, random writes into the logits.

    Arguments and errors as `planted`. The truth is empty.
    """
    base = _Base.of(architecture, layers, heads, seed, tokenizer, lexicon)
    return base.build("random", (), _strengths(1.0), RANDOM_LOGIT_NOISE, dtype, attn)


PLANTED_NAMES: Mapping[str, Architecture] = {
    "planted": "llama",
    "planted-gqa": "llama-gqa",
    "planted-gpt2": "gpt2",
}
"""Names of the zoo, all with 4 layers of 8 heads and every circuit."""


def planted_named(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str | None = None) -> Planted:
    """The planted model of the zoo with this name, a key of `PLANTED_NAMES`. Raises InputError for another name."""
    if name not in PLANTED_NAMES:
        raise InputError(f"no planted model {name!r}; choose from {', '.join(PLANTED_NAMES)}")
    return replace(planted(PLANTED_NAMES[name], seed=seed, dtype=dtype, attn=attn), name=name)


@dataclass(frozen=True)
class _Base:
    """What every kind of model starts from."""

    architecture: Architecture
    layers: int
    heads: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    lexicon: Lexicon
    codes: Codes
    generator: torch.Generator

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        layers: int,
        heads: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
        lexicon: Lexicon | None,
    ) -> _Base:
        if architecture not in ARCHITECTURES:
            raise InputError(f"no planted architecture {architecture!r}; choose from {', '.join(ARCHITECTURES)}")
        if layers < 1 or heads < 2 or heads % GQA_GROUP:
            raise InputError(
                f"{layers} layers of {heads} heads cannot be built; give layers >= 1 and an even number of heads"
            )
        tokenizer = own_tokenizer() if tokenizer is None else tokenizer
        lexicon = Lexicon.of(tokenizer) if lexicon is None else lexicon
        generator = torch.Generator().manual_seed(seed)
        return cls(architecture, layers, heads, seed, tokenizer, lexicon, draw_codes(lexicon, generator), generator)

    def build(
        self,
        kind: Kind,
        plans: tuple[HeadPlan, ...],
        strengths: Mapping[str, float],
        logit_noise: float,
        dtype: torch.dtype,
        attn: str | None,
    ) -> Planted:
        sizes = subspaces(plans, self.lexicon, learned_positions=self.architecture == "gpt2")
        geometry = self._geometry(sum(sizes.values()))
        stream = Stream.drawn(geometry.width, sizes, self.generator, centred=self.architecture == "gpt2")
        placed: tuple[Placed, ...] = ()
        if plans:
            placed = scatter(
                plans, layers=self.layers, heads=self.heads, group_size=geometry.group_size, seed=self.seed
            )
        matrices = draw_model(
            geometry, stream, self.lexicon, self.codes, placed, strengths, logit_noise, self.generator
        )
        pad = self.tokenizer.pad_token_id
        model = assemble(geometry, matrices, bos=self.lexicon.bos, pad=pad, dtype=dtype, attn=attn)
        title = f"{kind} {self.architecture}, {self.layers} x {self.heads} heads, seed {self.seed}"
        background = BACKGROUND if kind != "random" else math.inf
        # Every behaviour one after the other, so that every planted head has something to write.
        asked = [examples(self.lexicon, behaviour, 2, self.seed) for behaviour in BEHAVIOURS]
        rows = [[self.lexicon.bos, *(id for each in asked for id in each[row].ids[1:])] for row in range(2)]
        length = min(len(row) for row in rows)
        ids = torch.tensor([row[:length] for row in rows])
        return Planted(
            name=kind,
            model=model,
            tokenizer=self.tokenizer,
            example={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            title=title,
            truth=label(kind, title, placed, strengths, LOGIT_GAIN, background),
            lexicon=self.lexicon,
            codes=self.codes.tokens,
        )

    def _geometry(self, needed: int) -> Geometry:
        room = -(-(needed + LEAST_BACKGROUND) // 64) * 64
        head_dim = HEAD_DIM
        if self.architecture == "gpt2":
            # Here the width is that of all heads together.
            head_dim = max(HEAD_DIM, -(-room // self.heads))
            room = self.heads * head_dim
        room += -room % self.heads  # transformers takes no Llama whose width is not a multiple of its heads
        return Geometry(self.architecture, self.layers, self.heads, head_dim, room, self.lexicon.size)


def _strengths(strength: float | Mapping[str, float]) -> dict[str, float]:
    """By role; checked."""
    given = list(strength.values()) if isinstance(strength, Mapping) else [strength]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"strength takes a number, or one for each role named; {value!r} is none")
    if isinstance(strength, Mapping):
        unknown = sorted(set(strength) - set(DIALS))
        if unknown:
            raise InputError(f"no strength can be set for {', '.join(unknown)}; choose from {', '.join(DIALS)}")
        found = {role: strength.get(role, DEFAULT_STRENGTH.get(role, 1.0)) for role in DIALS}
    else:
        found = {role: strength * DEFAULT_STRENGTH.get(role, 1.0) for role in DIALS}
    wrong = [f"{role}={value}" for role, value in found.items() if not 0 <= value <= MAX_STRENGTH]
    if wrong:
        raise InputError(f"strength {', '.join(wrong)} is out of range; give numbers from 0 to {MAX_STRENGTH:g}")
    return found
