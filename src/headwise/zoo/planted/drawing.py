"""From plans and a seed to the matrices of a whole model: codes, embedding, heads, feed-forward parts, unembedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.zoo.planted.checkpoint import GATE_OPEN, INNER, POSITIONS, BlockMatrices, Geometry, ModelMatrices
from headwise.zoo.planted.circuits import HeadPlan, Maps
from headwise.zoo.planted.heads import (
    CONTENT_NORM,
    HeadMatrices,
    planned_head,
    random_head,
    random_reader,
    random_writer,
)
from headwise.zoo.planted.lexicon import Lexicon
from headwise.zoo.planted.placement import Placed
from headwise.zoo.planted.stream import CODE, FREQUENCIES, Stream, sharpest_peak, token_codes

LOGIT_GAIN = 12.0
"""Logits of the answer that a full effect writes, before the final norm."""

UNREAD = 16
EMBEDDED_BACKGROUND = 2.0
BACKGROUND_NORM = 3.5
"""Length of the sum of all random writes of a model, roughly."""

RELAY = CODE
"""Linear pairs of neurons that a null model has in its last block."""


@dataclass(frozen=True)
class Codes:
    """What a seed draws first: the codes of tokens, and the maps that plans refer to."""

    tokens: Float[Tensor, "vocabulary code"]
    maps: Maps


def draw_codes(lexicon: Lexicon, generator: torch.Generator) -> Codes:
    """The bos token has the code zero. The look-up of a relation is the least-squares map from the codes of all
    subjects to those of their objects (to zero where the relation has none); up to `CODE` subjects it is exact.
    """
    tokens = token_codes(lexicon.size, generator)
    tokens[lexicon.bos] = 0.0
    subjects = tokens[list(lexicon.subjects)].T
    look_ups = []
    for relation in lexicon.relations:
        object_of = {fact.subject: fact.object for fact in lexicon.facts if fact.relation == relation}
        blank = torch.zeros(CODE, dtype=torch.float64)
        objects = [tokens[object_of[s]] if s in object_of else blank for s in lexicon.subjects]
        look_ups.append(torch.stack(objects, dim=1) @ torch.linalg.pinv(subjects))
    half = torch.arange(CODE) < CODE // 2
    unread = torch.randn(CODE, UNREAD, generator=generator, dtype=torch.float64)
    return Codes(
        tokens,
        Maps(
            key_first=2**0.5 * torch.diag(half.double()),
            key_second=2**0.5 * torch.diag((~half).double()),
            memory=tuple(look_ups),
            # As long as what a head with an effect writes, so that norms of weights do not tell decoys apart.
            unread=torch.linalg.qr(unread).Q.T * (CODE / UNREAD) ** 0.5,
        ),
    )


FLAGS = (
    *("bos", "ask", "give", "content", "name", "subject", "object", "relation"),
    *("prev_name", "prev_subject", "prev_object", "twice", "done"),
)
CODE_SPACES = ("tok", "prev", "key", "key_shift", "inhibit", "out")
SUBSTITUTES = ("relay", "key_late")


def subspaces(plans: Sequence[HeadPlan], lexicon: Lexicon, *, learned_positions: bool) -> dict[str, int]:
    """Name and size of every subspace that these plans, the embedding and the output need."""
    used = {name for plan in plans for name in (*plan.keys, *plan.values, *(write.into for write in plan.writes))}
    relations = len(lexicon.relations)
    return {
        "constant": 1,
        "filler": 1,
        **dict.fromkeys(FLAGS, 1),
        "relations": relations,
        "asked_relation": relations,
        **dict.fromkeys(CODE_SPACES, CODE),
        **{name: CODE for name in SUBSTITUTES if name in used},
        "unread": UNREAD,
        **({"position": 2 * len(FREQUENCIES)} if learned_positions else {}),
    }


def draw_model(
    geometry: Geometry,
    stream: Stream,
    lexicon: Lexicon,
    codes: Codes,
    placed: Sequence[Placed],
    strengths: Mapping[str, float],
    logit_noise: float,
    generator: torch.Generator,
) -> ModelMatrices:
    """All matrices. `strengths` are by the role of a plan's dial. `logit_noise`: the standard deviation, in logits, of
    what all random heads and feed-forward parts together add to a token, roughly.
    """
    peak = sharpest_peak()
    planned = {
        (each.head.layer, each.head.index): planned_head(
            each.plan, stream, peak, geometry.head_dim, strengths.get(each.plan.dial or "", 1.0)
        )
        for each in placed
    }
    # Each block adds heads and one feed-forward part.
    parts = geometry.layers * (geometry.heads + 1)
    write_norm, logit_feature = BACKGROUND_NORM / parts**0.5, logit_noise / LOGIT_GAIN / parts**0.5
    blocks = []
    for layer in range(geometry.layers):
        heads = [
            planned.get((layer, index)) or random_head(stream, geometry.head_dim, write_norm, logit_feature, generator)
            for index in range(geometry.heads)
        ]
        by_hand = [(layer, index) in planned for index in range(geometry.heads)]
        heads = _with_shared_keys(heads, by_hand, geometry.group_size)
        relays = "relay" in stream.bases and layer == geometry.layers - 1
        blocks.append(_feed_forward(tuple(heads), stream, geometry, relays, write_norm, logit_feature, generator))
    norms = 0.7 + 0.6 * torch.rand(2 * geometry.layers + 1, geometry.width, generator=generator, dtype=torch.float64)
    unembedding = LOGIT_GAIN * codes.tokens @ stream.read("out")
    positions = _positions(stream) if "position" in stream.bases else None
    return ModelMatrices(_embedding(stream, lexicon, codes, generator), positions, tuple(blocks), unembedding, norms)


def _with_shared_keys(heads: list[HeadMatrices], planned: list[bool], group_size: int) -> list[HeadMatrices]:
    """All heads of a KV group with the keys and values of its planned heads; a random head there keeps q and output."""
    shared = []
    for start in range(0, len(heads), group_size):
        members = range(start, start + group_size)
        source = heads[next((index for index in members if planned[index]), start)]
        shared += [HeadMatrices(heads[i].query, source.key, source.value, heads[i].output) for i in members]
    return shared


def _feed_forward(
    heads: tuple[HeadMatrices, ...],
    stream: Stream,
    geometry: Geometry,
    relays: bool,
    write_norm: float,
    logit_feature: float,
    generator: torch.Generator,
) -> BlockMatrices:
    """Random neurons; where the block relays, the first ones take `relay` to the output, linearly."""
    up, gate = (random_reader(stream, INNER, 1 / CONTENT_NORM, generator) for _ in range(2))
    # gelu of a unit normal has a root mean square of 0.65, silu times another one of 0.6.
    size = 0.6 * INNER**0.5
    down = random_writer(stream, INNER, write_norm / size, logit_feature / size, generator)
    if relays:
        relayed, out = stream.read("relay"), stream.write("out")
        if geometry.architecture == "gpt2":
            # gelu(x) - gelu(-x) = x
            up[: 2 * RELAY] = torch.cat([relayed, -relayed])
            down[:, : 2 * RELAY] = torch.cat([out, -out], dim=1)
        else:
            up[:RELAY] = relayed
            gate[:RELAY] = GATE_OPEN * stream.read("constant")
            down[:, :RELAY] = out / torch.nn.functional.silu(torch.tensor(GATE_OPEN, dtype=torch.float64))
    return BlockMatrices(heads, up, gate, down)


def _embedding(
    stream: Stream, lexicon: Lexicon, codes: Codes, generator: torch.Generator
) -> Float[Tensor, "vocabulary width"]:
    flags = {
        "bos": (lexicon.bos,),
        "ask": lexicon.asks,
        "give": lexicon.givers,
        "content": lexicon.content,
        "name": lexicon.names,
        "subject": lexicon.subjects,
        "object": lexicon.objects,
        "relation": lexicon.relations,
    }
    rows = codes.tokens @ stream.write("tok").T
    for name, tokens in flags.items():
        rows[list(tokens)] += stream.write(name)[:, 0]
    for index, relation in enumerate(lexicon.relations):
        rows[relation] += stream.write("relations")[:, index]
    n = stream.size("background")
    background = torch.randn(len(rows), n, generator=generator, dtype=torch.float64) * (EMBEDDED_BACKGROUND / n**0.5)
    rows = rows + background @ stream.bases["background"].T + stream.write("constant")[:, 0]
    # Every row as long as sqrt(width), with what learned positions add: norms leave the first layer's input alone.
    taken = rows.square().sum(dim=1)
    if "position" in stream.bases:
        taken = taken + _positions(stream)[1].square().sum()
    filled: Tensor = rows + (stream.width - taken).clamp(min=0).sqrt()[:, None] * stream.bases["filler"][:, 0]
    return filled


def _positions(stream: Stream) -> Float[Tensor, "position width"]:
    """Cosines and sines. The first position is zero: the bos token stands there, and no distance leads to it."""
    angles = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * torch.from_numpy(FREQUENCIES)
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    features[0] = 0.0
    positions: Tensor = features @ stream.write("position").T
    return positions
