"""How the GPT-2 shape begins: with positions and heads that look back, and with one head that finds by content.

With learned positions and weights from noise, no head that looks back forms in millions of tokens, nor one that uses
what such a head writes; `docs/decisions.md` says what was tried. So the weights are noise but for these:

- Positions are sines and cosines (Vaswani et al. 2017) of wave lengths from 4 tokens to the context, in columns that
  words leave free.
- The first four heads of the first layer look one to four places back: their queries are turned by so many places on
  the shortest waves, and so meet the key of that token. Each writes that token's word, in a subspace of its own.
- The first head of the second layer looks for the present word in the subspace of the first, and writes the word it
  attends to. What the other three write is read by nothing yet: keys of several tokens can be learnt with it.
- Feed-forward parts begin small, and no bias but the last norm's is trained.

All of it is trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

WAVES = 16
"""That positions are made of; each takes two columns."""
HEIGHT = 3.0
"""Of the waves, in standard deviations of the embeddings."""
PLACES = 4
"""That heads look back, at most: as many tokens as the longest keys of the probes have."""
SHARPNESS = 3.0
"""Of the queries and keys of the heads that look back."""
SOUGHT = 1.5
"""Of the queries and keys of the head that finds."""
WRITTEN = 0.2
"""Of what these heads write."""
SMALL = 0.004
"""Standard deviation of what feed-forward parts write with; with that of other weights they write twice as much as the
words that it is added to, and it says nothing yet."""


def begin_finding(model: GPT2LMHeadModel, embedded: float) -> None:
    """Set the weights named above; `embedded` is the standard deviation of the embeddings."""
    blocks = model.transformer.h
    width = model.config.n_embd
    dim = width // model.config.n_head
    for block in blocks:
        nn.init.normal_(block.mlp.c_proj.weight, std=SMALL)
    for name, parameter in model.named_parameters():
        # A constant that is added in every layer soon drowns the words: after a million tokens thirty times over.
        parameter.requires_grad_(not name.endswith("bias") or name == "transformer.ln_f.bias")
    waves = torch.pi / 2 * (model.config.n_positions / 4) ** -torch.linspace(0, 1, WAVES)
    with torch.no_grad():
        model.transformer.wte.weight[:, : 2 * WAVES] = 0.0
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, : 2 * WAVES] = positions(model.config.n_positions, waves) * HEIGHT * embedded
        words = _subspace(width, dim)
        before = [_subspace(width, dim) for _ in range(PLACES)]
        for places, written in enumerate(before, 1):
            _look_back(blocks[0].attn, places, waves, words, written)
        _find(blocks[1].attn, words, before[0])


def positions(length: int, waves: Tensor) -> Tensor:
    """`[position, 2 * wave]`: sines, then cosines."""
    turns = torch.arange(length)[:, None] * waves
    return torch.cat([turns.sin(), turns.cos()], dim=1)


def _subspace(width: int, dim: int) -> Tensor:
    """`[width, dim]`: orthonormal directions, in the columns of words."""
    directions = torch.zeros(width, dim)
    directions[2 * WAVES :] = torch.linalg.qr(torch.randn(width - 2 * WAVES, dim))[0]
    return directions


def _look_back(attention: nn.Module, places: int, waves: Tensor, words: Tensor, written: Tensor) -> None:
    """The head of number `places - 1`."""
    width, dim = words.shape
    own = torch.arange((places - 1) * dim, places * dim)
    query, key, value = attention.c_attn.weight.split(width, dim=1)
    query[:, own] = 0.0
    key[:, own] = 0.0
    for wave in range(dim // 2):
        rows, columns = torch.tensor([wave, WAVES + wave]), own[2 * wave : 2 * wave + 2]
        cosine, sine = (places * waves[wave]).cos(), (places * waves[wave]).sin()
        key[rows, columns] = SHARPNESS
        query[rows[:, None], columns] = SHARPNESS * torch.tensor([[cosine, sine], [-sine, cosine]])
    value[:, own] = words
    attention.c_proj.weight[own] = written.T * WRITTEN


def _find(attention: nn.Module, words: Tensor, before: Tensor) -> None:
    width, dim = words.shape
    query, key, value = attention.c_attn.weight.split(width, dim=1)
    query[:, :dim] = words * SOUGHT
    key[:, :dim] = before * SOUGHT
    value[:, :dim] = words
    attention.c_proj.weight[:dim] = words.T * WRITTEN
