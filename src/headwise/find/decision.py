"""Decision heads: whose write alone, put into the stream, lets the lens say the deciding step of a chain of thought.

After Dutta et al. (2024), "How to think step-by-step: A mechanistic understanding of chain-of-thought reasoning". As
for `chain-of-thought`, the chains of an item and its twin say the same up to one token, and that token, the answer, is
what is looked at, at the token t before it. The lens (final norm, then unembedding) reads three streams of block l:

    p_pre = softmax(lens(r))[answer]                r the stream before the block, at t
    p_h   = softmax(lens(r + W_O^h z_h))[answer]    with what head h alone adds
    p_mid = softmax(lens(r + all that attention adds))[answer]

The paper's code gives a head the loss (p_mid - p_h) / p_mid: 0 where the head alone does all that the block's
attention does for the answer. Within a block that orders heads. Across blocks it does not: where attention does
nothing, all three are alike and every head has a loss of 0. So by default a score is the share of p_mid that the head
brings itself,

    s_h = (p_h - p_pre) / p_mid                     of="share"
    s_h = -(p_mid - p_h) / p_mid                    of="loss"

which within a block and item is the same up to a constant, and 0 for a head that writes nothing. s_h < 0: the head
speaks against the answer. Shares need not sum to 1, since softmax is no sum.

After a card of the paper's code; what is ours: the step that twins differ in, not each of the paper's ten subtasks; the
lens has the final norm; and the share. A number is small in early blocks, where the lens says little of anything.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.find.method import Method, Scored, scored_sites
from headwise.find.parting import at_parting
from headwise.find.patterns import require_choice
from headwise.find.search import over_batches
from headwise.model import read
from headwise.model.attached import AttachedModel
from headwise.model.lens import Lens, lens
from headwise.model.stream import stream_writes
from headwise.probes.batch import Batch
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe

Of = Literal["share", "loss"]


def decision_heads(model: AttachedModel, items: ItemSet, *, of: Of = "share") -> Scored:
    """`decision-heads`: as a share of the probability behind the block's attention.

    Raises:
        InputError: a setting that is none; as `at_parting`.
        Refusal: the model has no lens (`model.lens`), or no stream that is a sum over parts (`model.stream`).
    """
    require_choice("of", of, get_args(Of))
    steps = at_parting(items)
    eye, writes = lens(model), stream_writes(model)
    blocks = {site.id: label for label, site in writes.sites.items() if site.id in scored_sites(model)}
    wanted = (
        read.residual([*blocks.values()], where="pre", queries=[-1]),
        read.residual([*blocks.values()], queries=[-1]),
        read.mlp([*blocks.values()], queries=[-1]),
        read.z([id.label for id in blocks], queries=[-1]),
    )

    def score(batch: Batch) -> Scored:
        answers = batch.answers[:, 0].to(model.device)
        with torch.no_grad(), writes.recording() as run, model.reading(*wanted) as got:
            observe(model, batch, wants={"logits"})
        run, scored = run.at_last(), {}
        for id, block in blocks.items():
            before = got.residual_pre[block]
            behind = got.residual_post[block] - run.of_feed_forward(block, got.mlp[block])
            alone = before[:, :, None] + run.of_heads(id, got.z[id.label])
            p_pre, p_mid = (_said(eye, stream, answers) for stream in (before[:, 0, None], behind[:, 0, None]))
            p_h = _said(eye, alone[:, 0], answers)
            scored[id] = (p_h - (p_pre if of == "share" else p_mid)) / p_mid
        return scored

    return over_batches(steps, score)


def _said(eye: Lens, streams: Float[Tensor, "item stream d_model"], answers: Tensor) -> Float[Tensor, "item stream"]:
    """The probability of each item's answer, by the lens."""
    logits = eye.logits(streams)
    said = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return said.gather(-1, answers[:, None, None].expand(-1, said.shape[1], 1))[..., 0]


METHODS = (
    Method(
        id="decision-heads",
        title="How much of the deciding step the lens can say from a head's write alone",
        page="methods/decision-heads.md",
        paper="Dutta et al., How to think step-by-step",
        year=2024,
        tier="B",
        status="reconstruction",
        needs=("z", "projection", "logits", "answer", "twin"),
        cost="1 forward per item, and an unembedding per head",
        probe="ontology",
        probes=("ontology",),
        score=decision_heads,
    ),
)
