"""Direct logit attribution: sums to the model's own logits, agrees with real edits, and finds what was planted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find import find
from headwise.find.direct_logit import METHODS, contrast, direct_logit, direct_logit_by_source, direct_logit_source
from headwise.heads import HeadSet
from headwise.metrics import metric
from headwise.model.attached import AttachedModel
from headwise.model.direct import direct_paths
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.probes.outcome import observe
from headwise.scores import HeadScores
from headwise.zoo.planted import Example, Planted

Spec = tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]

SPECS: tuple[Spec, ...] = (
    ([1, 9, 10, 11, 12], [20], [[21]]),
    ([1, 30, 31], [22, 23, 24], [[22, 25], [26]]),  # one foil parts at the second token, one at the first
    ([1, 9, 40, 41, 42, 43, 44, 9], [27, 28], []),  # none: against the mean logit
)


def item_set(specs: Sequence[Spec], spans: Sequence[dict[str, Any]] | None = None) -> ItemSet:
    rows = [
        EncodedItem(
            item=Item(prompt="", answer="", id=f"item-{index}"),
            prompt=tuple(prompt),
            answer=tuple(answer),
            also=(),
            foils=tuple(map(tuple, foils)),
            spans=spans[index] if spans else {},
            twin=None,
        )
        for index, (prompt, answer, foils) in enumerate(specs)
    ]
    return ItemSet("made", tuple(rows), {}, "logit-difference", pad=0)


def of_examples(examples: Sequence[Example]) -> ItemSet:
    return item_set([(each.ids, [each.answer], [[each.foil]]) for each in examples])


def joined(scored: Any) -> Tensor:
    return torch.cat([scored[site].double() for site in sorted(scored)], dim=1)


def post_norm_opt() -> AttachedModel:
    """A decoder whose norms stand in the stream itself, and which has no final norm."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=99, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
            if "layer_norm.bias" in name:
                parameter.zero_()  # what norms in the stream add whatever comes in belongs to no head
    return hw.attach(model, name="opt-post-norm")


NAMES = ["llama", "gpt2", "gemma2", "granite", "gpt_neox", "olmo2", "cohere2", "opt"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with post_norm_opt() if request.param == "opt-post-norm" else hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def logits_of(model: AttachedModel, batch: Any) -> Tensor:
    """As the model returns them, a soft cap undone."""
    found = observe(model, batch, wants={"logits"}).logits
    assert found is not None
    cap = getattr(model.model.config, "final_logit_softcapping", None)
    return cap * torch.atanh(found / cap) if cap else found


@pytest.mark.parametrize("model", [*NAMES, "opt-post-norm"], indirect=True)
def test_all_that_is_written_sums_to_the_logits(model: AttachedModel) -> None:
    """Heads, feed-forward parts, the stream at the start and all biases: the model's own logit difference."""
    items = item_set(SPECS)
    (batch,) = items.batches(8)
    network: Any = model.model
    paths = direct_paths(model)
    blocks, first = paths.blocks, paths.blocks[0].label
    reads = hw.read.mlp([block.label for block in blocks]), hw.read.residual([first], where="pre")
    with torch.no_grad(), paths.recording(3) as run, model.reading(*reads) as got:
        returned = observe(model, batch, wants={"logits"}).logits
    score = contrast(batch)
    directions = run.directions(score, returned)
    total = joined(direct_logit(model, items)).sum(1)
    for block in blocks:
        mlp = got.mlp[block.label][:, -3:] / block.mlp_scale
        total += (mlp * directions[f"mlp.{block.label}"]).sum((1, 2))
        projection = network.get_submodule(model.site(block.label).projection)
        if projection.bias is not None:
            total += (projection.bias * directions[block.label]).sum((1, 2))
    total += (got.residual_pre[first][:, -3:] * directions[f"stream.{first}"]).sum((1, 2))
    with torch.no_grad():
        unembedding = network.get_output_embeddings()
        added = torch.zeros(3, 3, unembedding.weight.shape[1])
        if paths.norm is not None:
            added += paths.norm.affine(network).bias
        factor = 1 / getattr(network.config, "logits_scaling", 1.0) * (getattr(network.config, "logit_scale", 1.0) or 1)
        total += factor * score(unembedding(added))
    expected = score(logits_of(model, batch))
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(total.float(), expected.float(), rtol=1e-3, atol=1e-4)


def test_contrast_is_the_metric_where_there_are_foils_and_against_the_mean_where_not() -> None:
    (batch,) = item_set(SPECS).batches(8)
    logits = torch.randn(3, 3, 50, generator=torch.Generator().manual_seed(0))
    first = logits[0, 0, 20] - logits[0, 0, 21]
    second = ((logits[1, 1, 23] - logits[1, 1, 25]) + (logits[1, 0, 22] - logits[1, 0, 26])) / 2
    third = logits[2, 0, 27] - logits[2, 0].mean()
    torch.testing.assert_close(contrast(batch)(logits), torch.stack([first, second, third]))


@pytest.mark.parametrize("model", ["gpt_neox", "phi", "cohere2"], indirect=True)
def test_it_is_what_zeroing_takes_from_the_logits_with_the_final_norm_held(model: AttachedModel) -> None:
    """In the last block of a parallel model nothing else reads what the head wrote, so the edit shows it alone."""
    items = item_set(SPECS[:2])
    (batch,) = items.batches(8)
    network: Any = model.model
    norm = model.table.sublayers.final_norms["main"]
    last = f"L{len(model.sites) - 1}"
    affine = norm.affine(network)

    def held(*edits: Any) -> Tensor:
        with torch.no_grad(), model.reading(hw.read.residual([last])) as got:
            if edits:
                with model.editing(*edits):
                    observe(model, batch, wants={"logits"})
            else:
                observe(model, batch, wants={"logits"})
            stream = got.residual_post[last][:, -3:]
            centred = stream - stream.mean(-1, keepdim=True) if norm.kind == "layer" else stream
            return network.get_output_embeddings()(affine.gain * centred * scale[..., None])

    with torch.no_grad(), model.reading(hw.read.residual([last])) as clean:
        observe(model, batch, wants={"logits"})
    scale = norm.scale(clean.residual_post[last][:, -3:])
    score, factor = contrast(batch), getattr(network.config, "logit_scale", 1.0) or 1.0
    scored = direct_logit(model, items)[model.site(last).id]
    for head in range(model.site(last).n_heads):
        exact = factor * score(held() - held(hw.edit.zero(f"{last}H{head}")))
        torch.testing.assert_close(scored[:, head], exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_sources_sum_to_the_head(model: AttachedModel) -> None:
    items = item_set(SPECS)
    parts = direct_logit_by_source(model, items)
    torch.testing.assert_close(parts.sum(-1).double(), joined(direct_logit(model, items)), rtol=1e-3, atol=1e-5)
    for row, (prompt, answer, _) in enumerate(SPECS):
        assert (parts[row, :, len(prompt) + len(answer) - 1 :] == 0).all()
    assert (parts[0, :, : len(SPECS[0][0])] != 0).any(1).all()


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2"], indirect=True)
def test_a_source_is_what_the_logits_lose_without_it(model: AttachedModel) -> None:
    """Rows, values and W_O of one item by itself, put together by hand."""
    items = item_set(SPECS[:1])
    (batch,) = items.batches(1)
    paths = direct_paths(model)
    with torch.no_grad(), paths.recording(1) as run, model.reading(hw.read.rows("L1"), hw.read.v("L1")) as got:
        returned = observe(model, batch, wants={"logits"}).logits
    direction = run.directions(contrast(batch), returned)["L1"][0, 0]
    site, projection = model.site("L1"), model.model.get_submodule(str(model.site("L1").projection))
    parts = direct_logit_by_source(model, items, ["L1H3", "L1H0"])
    for place, head in enumerate((0, 3)):
        columns = slice(head * site.head_dim, (head + 1) * site.head_dim)
        w_o = projection.weight[columns] if hasattr(projection, "nf") else projection.weight[:, columns].T
        for token in range(5):
            value = got.v["L1"][0, token, head // site.group_size]
            expected = (got.rows["L1"][0, head, -1, token] * (value @ w_o) @ direction).detach()
            assert float(parts[0, place, token]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2", "t5"], indirect=True)
def test_batches_do_not_matter(model: AttachedModel) -> None:
    items = item_set(SPECS)
    together = joined(direct_logit(model, items))
    alone = [joined(direct_logit(model, replace(items, items=(each,)))) for each in items]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-5)
    if not model.model.config.is_encoder_decoder:
        one_by_one = direct_logit_by_source(model, items, "L2", batch_size=1)
        torch.testing.assert_close(direct_logit_by_source(model, items, "L2"), one_by_one, rtol=1e-3, atol=1e-5)


def means(scores: HeadScores) -> dict[str, float]:
    return {
        f"{site.label}H{head}": float(scores.values["main"][:, layer, head].mean())
        for layer, site in enumerate(scores.sites["main"])
        for head in range(scores.values["main"].shape[2])
    }


@pytest.mark.parametrize("behaviour", ["repeat", "ioi", "facts", "conflict", "keys"])
def test_finds_what_writes_and_nothing_else(organism: Planted, attached: AttachedModel, behaviour: Any) -> None:
    examples = organism.examples(behaviour, 12, seed=5)
    scores = find(METHODS[0], attached, of_examples(examples))
    truth = organism.truth
    wanted = set(truth.with_effect(behaviour, "direct").labels)
    found = means(scores)
    for label, value in found.items():
        expected = float(np.mean([organism.expected_direct(label, behaviour, each) for each in examples]))
        if label in wanted:
            assert abs(value) > 0.5, (label, value)
            # Before the scale of the final norm, which is near 1.
            assert value == pytest.approx(expected, rel=0.4, abs=0.5), label
        else:
            assert abs(value) < truth.background, (label, value)
    assert all(abs(found[label]) < 0.1 for label in truth.decoys().labels)


def test_a_head_that_writes_the_foil_is_negative(organism: Planted, attached: AttachedModel) -> None:
    """Where the text contradicts memory, memory heads write the foil and the context head the answer."""
    found = means(find(METHODS[0], attached, of_examples(organism.examples("conflict", 12, seed=5))))
    truth = organism.truth
    for label in truth.with_effect("conflict", "direct").labels:
        assert np.sign(found[label]) == np.sign(truth.effect(label, "conflict").size), label
    assert min(found.values()) < -1 < 1 < max(found.values())


def test_what_was_read_from_the_told_object_is_the_context_heads(organism: Planted, attached: AttachedModel) -> None:
    examples = organism.examples("conflict", 6, seed=5)
    specs = [(each.ids, [each.answer], [[each.foil]]) for each in examples]
    told = [{"told": ((each.ids.index(each.answer),),), "end": ((len(each.ids) - 1,),)} for each in examples]
    items = item_set(specs, told)
    from_told = means(find(METHODS[1], attached, items, span="told"))
    from_end = means(find(METHODS[1], attached, items, span="end"))
    whole = means(find(METHODS[0], attached, items))
    for label in organism.truth.heads("context").labels:
        assert from_told[label] == pytest.approx(whole[label], rel=0.05, abs=0.05)
        assert abs(from_end[label]) < 0.1
    with pytest.raises(Refusal, match=r"has no span 'subject'; it has told, end"):
        find(METHODS[1], attached, items)
    assert METHODS[1].spans() == ("subject",)
    assert METHODS[1].missing(attached, items)
    assert not METHODS[1].missing(attached, items, {"span": "told"})


def test_what_cannot_be_served_is_refused() -> None:
    items = item_set(SPECS, [{"subject": ((1,),)}] * 3)
    with hw.load("zoo:tiny-jamba") as hybrid, pytest.raises(Refusal, match="the stream cannot be followed"):
        direct_logit(hybrid, items)
    with hw.load("zoo:tiny-t5") as two, pytest.raises(Refusal, match="prompt and answer as one text"):
        direct_logit_source(two, items)
    with hw.load("zoo:tiny-bert") as encoder, pytest.raises(Refusal):
        direct_logit(encoder, items)
    with hw.load("zoo:tiny-t5") as two, pytest.raises(InputError, match="main stack"):
        direct_logit_by_source(two, items, "encoder.L0H0")


def test_heads_come_in_the_order_of_the_set() -> None:
    items = item_set(SPECS)
    with hw.load("zoo:tiny-llama") as model:
        whole = direct_logit_by_source(model, items)
        some = direct_logit_by_source(model, items, HeadSet.parse("L2H1, L0H3"))
    torch.testing.assert_close(some, whole[:, [3, 9]])


def test_the_metric_of_the_planted_model_is_the_sum_of_its_writers(organism: Planted, attached: AttachedModel) -> None:
    """On induction the two heads make up most of the logit difference."""
    items = of_examples(organism.examples("repeat", 6, seed=5))
    found = means(find(METHODS[0], attached, items))
    whole = float(hw.measure(attached, items, metric("logit-difference")).mean())
    assert sum(found[label] for label in organism.truth.heads("induction").labels) == pytest.approx(whole, rel=0.2)
