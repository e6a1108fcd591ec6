"""The weight matrices of one head: of a planned one from its features, of any other one at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.zoo.planted.circuits import HeadPlan
from headwise.zoo.planted.stream import CODE, FREQUENCIES, Peak, Stream

HEAD_DIM = 96
PAIRS = HEAD_DIM // 2
THETA = 1e12
"""Base of the rotary frequencies: pair f turns by THETA ** (-f / PAIRS) = 10 ** (-f / 4) per position. The first 16
pairs tell positions apart; the rest turn by less than 0.06 within 512 positions and carry content."""

COSINES = tuple(range(len(FREQUENCIES)))
SINES = tuple(PAIRS + pair for pair in COSINES)
CONTENT = tuple(dim for dim in range(HEAD_DIM) if dim not in (*COSINES, *SINES))

SCORE_SPREAD = 1.5
"""Standard deviation of a random head's scores, roughly."""

CONTENT_NORM = 4.0
"""Length of what random weights read of a normalised stream, roughly."""

VALUE_GAIN = 0.2
UNSEEN = ("constant", "filler", "unread")
"""Subspaces that random weights do not read."""


@dataclass(frozen=True)
class HeadMatrices:
    """q, k, v take the normalised stream (without the norm's own weights), `output` is the head's slice of W_O."""

    query: Float[Tensor, "head_dim width"]
    key: Float[Tensor, "head_dim width"]
    value: Float[Tensor, "head_dim width"]
    output: Float[Tensor, "width head_dim"]


def planned_head(plan: HeadPlan, stream: Stream, peak: Peak, head_dim: int, strength: float) -> HeadMatrices:
    """The matrices of a plan; `strength` scales what it writes into the output or leaves for it."""
    query, key, value = (torch.zeros(head_dim, stream.width, dtype=torch.float64) for _ in range(3))
    output = torch.zeros(stream.width, head_dim, dtype=torch.float64)
    places = _slots(plan.keys, stream, CONTENT)
    for name, dims in places.items():
        key[dims] = stream.read(name)
    for ask in plan.asks:
        feature = stream.read(ask.query)
        query[places[ask.key]] += ask.weight * (feature if ask.turn is None else ask.turn @ feature)
    if plan.positional:
        _look_back(query, key, plan, stream, peak)
    query *= head_dim**0.5
    places = _slots(plan.values, stream, tuple(range(head_dim)))
    for name, dims in places.items():
        value[dims] = stream.read(name)
    for write in plan.writes:
        into = stream.write(write.into)
        scale = write.weight * (strength if write.into in ("out", "relay") else 1.0)
        output[:, places[write.value]] += scale * (into if write.turn is None else into @ write.turn)
    return HeadMatrices(query, key, value, output)


def random_head(
    stream: Stream, head_dim: int, write_norm: float, logit_feature: float, generator: torch.Generator
) -> HeadMatrices:
    """Uneven attention over whatever is there. It writes about `write_norm` into the background, and features of about
    `logit_feature` into the output.
    """
    spread = (SCORE_SPREAD**0.5) / CONTENT_NORM
    query, key = (random_reader(stream, head_dim, spread, generator) for _ in range(2))
    value = random_reader(stream, head_dim, VALUE_GAIN, generator)
    z_norm = VALUE_GAIN * CONTENT_NORM * head_dim**0.5
    output = random_writer(stream, head_dim, write_norm / z_norm, logit_feature / z_norm, generator)
    return HeadMatrices(query, key, value, output)


def random_reader(stream: Stream, rows: int, spread: float, generator: torch.Generator) -> Float[Tensor, "rows width"]:
    """Random rows of about `spread` times a unit input, blind to the subspaces of `UNSEEN`."""
    unseen = torch.cat([stream.bases[name] for name in UNSEEN], dim=1)
    drawn = spread * torch.randn(rows, stream.width, generator=generator, dtype=torch.float64)
    return drawn - drawn @ unseen @ unseen.T


def random_writer(
    stream: Stream, columns: int, gain: float, logit_gain: float, generator: torch.Generator
) -> Float[Tensor, "width columns"]:
    """Into the background with length `gain` for a unit input, and features of `logit_gain` into the output."""
    noise = torch.randn(stream.size("background") + CODE, columns, generator=generator, dtype=torch.float64)
    background, out = torch.split(noise, [stream.size("background"), CODE])
    background = background * (gain / stream.size("background") ** 0.5)
    written: Tensor = stream.bases["background"] @ background + stream.write("out") @ (out * logit_gain)
    return written


def _look_back(query: Tensor, key: Tensor, plan: HeadPlan, stream: Stream, peak: Peak) -> None:
    """The position term `plan.peak * K(distance - plan.offset)`, zero towards the bos token; into q and k in place."""
    cosines, sines = list(COSINES), list(SINES)
    learned = "position" in stream.bases
    if learned:
        positions = stream.read("position")
        key[cosines + sines] = positions
    else:
        key[cosines] = stream.read("constant") - stream.read("bos")
    if plan.offset is None:
        return
    weights = plan.peak * torch.tensor(peak.weights, dtype=torch.float64)[:, None]
    angle = plan.offset * torch.from_numpy(FREQUENCIES)[:, None]
    if learned:
        cosine, sine = torch.split(positions, len(cosines))
        query[cosines] = weights * (cosine * angle.cos() + sine * angle.sin())
        query[sines] = weights * (sine * angle.cos() - cosine * angle.sin())
    else:
        # The rotary embedding turns q and k by their own positions, so a constant turned by the offset is enough.
        query[cosines] = weights * angle.cos() * stream.read("constant")
        query[sines] = -weights * angle.sin() * stream.read("constant")


def _slots(names: tuple[str, ...], stream: Stream, dims: tuple[int, ...]) -> dict[str, list[int]]:
    """The dimensions of a head that each subspace takes, one after the other."""
    found, start = {}, 0
    for name in names:
        found[name] = list(dims[start : start + stream.size(name)])
        start += stream.size(name)
    if start > len(dims):
        raise AssertionError(f"{names} need {start} dimensions of a head that has {len(dims)}")
    return found
