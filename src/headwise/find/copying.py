r"""Copying heads, from the weights alone: does what a head reads of a token raise that token's own logit?

Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; used beside the matching score by Ji-An, Zhou,
Benna and Mattar, "Linking In-context Learning in Transformers to Human Episodic Memory", 2024.

The circuit from value to logits of head h is a matrix over the vocabulary, whose eigenvalues say whether it copies:

    C_h     = W_U W_O^h W_V^h W_E
    score_h = sum_i lambda_i / sum_i |lambda_i|            from -1 to 1; 1: every token raises itself

C_h has at most d_head eigenvalues that are not 0. They are those of the small matrix with the factors in another order,
W_V^h W_E W_U W_O^h of d_head x d_head, which is what is computed. Factors that are the same for all tokens, such as a
scale of the embedding or of the logits, drop out of the quotient.

How the factors are found, without the name of any module:
- W_V^h: unit vectors are put in place of the stream before each block, and the values of the attention are read; those
  of a zero vector (the biases) are subtracted. So the norm in front is in it: its gain, and its centring if it centres.
  Query heads of one group share W_V. Random vectors must then give what the matrix says, times one factor each.
- W_O^h: the head's part of the output projection, and behind it the gains of norms through which a write goes.
- W_E, W_U: the tables of input and output embeddings, W_U with the gain (and centring) of the final norm. The stream
  before the first block must move as the one does, and the logits must rise as the other says (a soft cap may lie on
  them).
What fails such a check is refused: values that hang on several positions or are normalised once more, gates between
values and projection, norms on the stream itself.

Exact: the eigenvalues, and all these matrices. Linear part only: a norm also divides each position by a size of its
own. As in the papers these divisions are left out, in front of the head, behind its write and at the end; so are
position embeddings and biases. Reconstruction: the norms' gains are folded in, and the mean of W_U over the vocabulary
is not taken out; neither is settled by the second paper's text as we have it.

The quotient tells a sign, not a size: a head that hardly writes can have the full score, and a circuit of rank one
always has 1 or -1. A circuit that is 0 within rounding has no score. No item is looked at; the score is one row,
"weights".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import Refusal
from headwise.find.method import Method, Scored, scored_sites
from headwise.heads import SiteId
from headwise.model import edit, read
from headwise.model.attached import AttachedModel
from headwise.model.finding.example import can_generate
from headwise.model.finding.norms import FinalNorm, NormAffine, float_dtype
from headwise.model.finding.sublayers import Block
from headwise.model.finding.ways import Way, norm_back
from headwise.model.running.projection import head_weights
from headwise.model.site import Site
from headwise.probes.encoding import ItemSet

POSITIONS = 64
"""Made-up positions in one row of the run that measures values."""

CHECKS = 6
"""Random vectors that each measured map is tried on."""

VOCABULARY_PART = 8192
"""Tokens whose embeddings are held in at least fp32 at a time."""


def score(model: AttachedModel, items: ItemSet) -> Scored:
    """The copying score of every head, one row; NaN for a head whose circuit is 0 within rounding.

    Raises:
        Refusal: the model has no one table of input or output embeddings, or a map on the way is not linear but for a
            factor of norms.
    """
    circuits = _Circuits(model)
    circuits.check_ends()
    values = circuits.values
    scored = {}
    for site in circuits.sites:
        projection = model.model.get_submodule(str(site.projection))
        outputs = head_weights(projection, site).detach().cpu().double()
        of_heads = values[site.id].repeat_interleave(site.group_size, dim=1)
        eps = float(torch.finfo(model.dtype).eps)
        scored[site.id] = copying_score(of_heads, outputs, circuits.ends_for(site), eps)[None]
    return scored


def copying_score(
    values: Float[Tensor, "d_model head head_dim"],
    outputs: Float[Tensor, "head head_dim d_model"],
    ends: Float[Tensor, "d_model d_model"],
    eps: float = 0.0,
) -> Float[Tensor, " head"]:
    """sum(lambda) / sum(|lambda|) of `values @ outputs` between embedding and unembedding; NaN where all are 0.

    Args:
        values, outputs: W_V and W_O as they act on rows, `write = x @ values[:, h] @ outputs[h]`.
        ends: W_U^T W_E, `[written, read]`: the sum over tokens of unembedding times embedding.
        eps: relative rounding of the factors; eigenvalues that are no larger than it can make them are 0.
    """
    small = torch.einsum("hvo,oi,ihw->hvw", outputs, ends, values)
    eigenvalues = torch.linalg.eigvals(small)
    total = eigenvalues.abs().sum(dim=1)
    d_model, _, head_dim = values.shape
    # Of factors that have nothing to do with one another the sum is about sqrt(head_dim) / d_model of the lengths.
    lengths = outputs.flatten(1).norm(dim=1) * ends.norm() * values.norm(dim=(0, 2))
    nothing = total <= 8 * eps * head_dim**0.5 / d_model * lengths
    quotient: Tensor = eigenvalues.sum(dim=1).real / total
    return quotient.masked_fill(nothing, torch.nan)


@dataclass(frozen=True)
class _Circuits:
    """What stands before and behind the heads of one model."""

    model: AttachedModel

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The scored sites. Raises Refusal for a gate between values and projection, and where there is an encoder."""
        sites = tuple(self.model.table.site(id) for id in scored_sites(self.model))
        gated = next((site for site in sites if site.gated), None)
        if gated is not None:
            raise self.refusal(f"{gated.label} has a gate between its values and its projection")
        one_stream = "input_ids" in self.model.example and "decoder_input_ids" not in self.model.example
        if not one_stream or not can_generate(self.model.model):
            raise self.refusal("it does not continue a text in one stream of tokens")
        return sites

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every block of the main stack, in order. Raises Refusal where one normalises the stream itself."""
        stack = self.sites[0].id.stack
        every = self.model.table.sublayers.blocks.items()
        blocks = tuple(block for label, block in every if SiteId.parse(label).stack == stack)
        closed = next((block for block in blocks if block.closing_norm is not None), None)
        if closed is not None:
            raise self.refusal(f"{closed.label} normalises the stream itself, so no write reaches the end as it is")
        return blocks

    @cached_property
    def embedding(self) -> Float[Tensor, "vocab d_model"]:
        return self._table("get_input_embeddings", "input")

    @cached_property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        table = self._table("get_output_embeddings", "output")
        if len(table) != len(self.embedding):
            raise self.refusal(f"it reads {len(self.embedding)} tokens and writes {len(table)}")
        return table

    @cached_property
    def ends(self) -> Float[Tensor, "written read"]:
        """W_U^T W_E with the final norm's gain and centring in it."""
        total = torch.zeros(1, dtype=float_dtype(self.embedding), device=self.embedding.device)
        for start in range(0, len(self.embedding), VOCABULARY_PART):
            part = slice(start, start + VOCABULARY_PART)
            total = total + self.unembedding[part].to(total).T @ self.embedding[part].to(total)
        return self._through_final_norm(total.cpu().double().T).T

    def ends_for(self, site: Site) -> Float[Tensor, "written read"]:
        """`ends` as this site's writes meet it: through the factors and norms on their way to the stream.

        Raises Refusal where that way is none.
        """
        block = self.model.table.block(_block_label(site))
        way = block.ways.get(site.label, "it was not measured")
        if not isinstance(way, Way):
            raise self.refusal(f"how the writes of {site.label} reach the stream is not known: {way}")
        affines = {step.norm.module: self._affine(step.norm) for step in way.steps}
        return way.back(self.ends.T, dict.fromkeys(affines, torch.ones(())), affines).T

    @cached_property
    def values(self) -> Mapping[SiteId, Float[Tensor, "d_model group head_dim"]]:
        """W_V of every site with the norm in front, times one factor. Raises Refusal where there is no such matrix."""
        width = self.embedding.shape[1]
        checks = torch.randn(CHECKS, width, generator=torch.Generator().manual_seed(0))
        # Units of rms 1, which every norm centres and scales alike; then the zero vector.
        vectors = torch.cat([torch.eye(width) * width**0.5, torch.zeros(1, width), checks])
        n_rows = -(-len(vectors) // POSITIONS)
        stream = torch.nn.functional.pad(vectors, (0, 0, 0, n_rows * POSITIONS - len(vectors)))
        stream = stream.view(n_rows, POSITIONS, 1, width)
        labels = list(dict.fromkeys(_block_label(site) for site in self.sites))
        put = edit.set(labels, lambda current, here: stream.to(current), "residual_pre")
        with (
            torch.no_grad(),
            self.model.editing(put),
            self.model.reading(read.v([site.label for site in self.sites])) as got,
        ):
            self._run(self._tokens[:1].expand(n_rows, POSITIONS))
        found = {}
        for site in self.sites:
            measured = got.v[site.label].detach().cpu().double().flatten(0, 1)[: len(vectors)]
            moved = measured - measured[width]
            if not self._agree(checks.double() @ moved[:width].flatten(1), moved[width + 1 :].flatten(1)):
                raise self.refusal(
                    f"the values of {site.label} are not a matrix times the stream of their position, up to one factor"
                )
            found[site.id] = moved[:width]
        return found

    def check_ends(self) -> None:
        """Raises Refusal where the stream does not begin with the embedding, or does not end in the unembedding."""
        width = self.embedding.shape[1]
        first, last = self.blocks[0].label, self.blocks[-1].label
        tokens = self._tokens
        checks = torch.randn(len(tokens), width, generator=torch.Generator().manual_seed(1))
        checks[-1] = 0
        put = edit.set(last, lambda current, here: checks.to(current)[:, None, None], "residual_post")
        with torch.no_grad(), self.model.editing(put), self.model.reading(read.residual(first, where="pre")) as got:
            output = self._run(tokens[:, None])
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise self.refusal("it returns no logits")
        begun = got.residual_pre[first].detach().cpu().double()[:, 0]
        embedded = self.embedding[tokens].detach().cpu().double()
        starts = (embedded[1:] - embedded[0], begun[1:] - begun[0])
        if not self._agree(starts[0].flatten()[None], starts[1].flatten()[None]):
            raise self.refusal("its stream does not begin with the table of embeddings times a number")
        logits = logits.detach().cpu().double()[:, -1]
        table = self.unembedding.detach().cpu()
        expected = self._through_final_norm_forward(checks[:-1].double()) @ table.double().T
        if not self._rises(expected, logits[:-1] - logits[-1]):
            raise self.refusal("its logits do not rise as the table of output embeddings behind the final norm says")

    def refusal(self, reason: str) -> Refusal:
        return Refusal(
            f"copying cannot be told from the weights of {self.model.name}: {reason}; use direct-logit or retrieval"
        )

    def _run(self, ids: Tensor) -> Any:
        inputs = {"input_ids": ids.contiguous(), "attention_mask": torch.ones_like(ids)}
        return self.model(**{name: value for name, value in inputs.items() if name in self.model.example})

    @cached_property
    def _tokens(self) -> Tensor:
        """Some different tokens that the model takes. Raises Refusal if its example has only one."""
        tokens: Tensor = self.model.example["input_ids"].unique()[: CHECKS + 1]
        if len(tokens) < 3:
            raise self.refusal("its example has fewer than 3 different tokens")
        return tokens.to(self.model.device)

    def _table(self, getter: str, end: str) -> Float[Tensor, "vocab d_model"]:
        try:
            module = getattr(self.model.model, getter)()
        except (AttributeError, NotImplementedError):
            module = None
        weight = getattr(module, "weight", None)
        width = self.sites[0].d_model
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != width or weight.is_meta:
            raise self.refusal(f"it has no table of {end} embeddings as wide as its stream of {width}")
        return weight.detach()

    @cached_property
    def _final_norm(self) -> FinalNorm:
        stack = self.sites[0].id.stack
        found = self.model.table.sublayers.final_norms.get(stack)
        if found is None:
            reason = self.model.table.sublayers.reasons.get(stack, "none was looked for")
            raise self.refusal(f"its final norm was not found: {reason}")
        return found

    def _affine(self, norm: FinalNorm) -> NormAffine:
        affine = norm.affine(self.model.model)
        return NormAffine(affine.gain.detach().cpu().double(), affine.bias.detach().cpu().double())

    def _through_final_norm(self, directions: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Directions of the unembedding as the stream meets them."""
        return norm_back(self._final_norm, directions, torch.ones(()), self._affine(self._final_norm))

    def _through_final_norm_forward(self, streams: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The linear part of the final norm."""
        centred = streams - streams.mean(-1, keepdim=True) if self._final_norm.kind == "layer" else streams
        return centred * self._affine(self._final_norm).gain

    @property
    def _tolerance(self) -> float:
        return math.sqrt(torch.finfo(self.model.dtype).eps)

    def _agree(self, expected: Float[Tensor, "row value"], measured: Float[Tensor, "row value"]) -> bool:
        """Whether each measured row is the expected one times a factor above 0."""
        size = expected.square().sum(dim=1, keepdim=True)
        factor = (expected * measured).sum(dim=1, keepdim=True) / size.clamp(min=1e-300)
        apart = (measured - factor * expected).norm(dim=1) > self._tolerance * measured.norm(dim=1)
        return not bool(apart.any()) and bool((factor[size > 0] > 0).all())

    def _rises(self, expected: Float[Tensor, "row vocab"], measured: Float[Tensor, "row vocab"]) -> bool:
        """Whether each measured row rises where the expected one does."""
        ordered = measured.gather(1, expected.argsort(dim=1))
        falls = (ordered.cummax(dim=1).values - ordered).max(dim=1).values
        return bool((falls <= self._tolerance * (ordered.amax(dim=1) - ordered.amin(dim=1))).all())


def _block_label(site: Site) -> str:
    return SiteId(stack=site.id.stack, layer=site.id.layer).label


METHODS = (
    Method(
        id="copying",
        title="copying score: eigenvalues of the circuit from value to logits",
        page="methods/copying.md",
        paper="Elhage et al.: A Mathematical Framework for Transformer Circuits",
        year=2021,
        tier="B",
        status="reconstruction",
        needs=("weights", "projection"),
        cost="no item: a forward over as many made-up positions as the stream is wide, an eigenvalue problem per head",
        probe="repeat",
        probes=("repeat",),
        score=score,
    ),
)
