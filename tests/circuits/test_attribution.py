"""Attribution against exhaustive patches, linear models where first order is exact, and planted circuits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw
from headwise.circuits.attribution import attribute_edges, attribute_nodes, attribute_ports
from headwise.circuits.gradients import Ends, differentiable_metric, ends_of
from headwise.circuits.graph import Edge, Receiver, Sender
from headwise.circuits.patching import patch_map
from headwise.circuits.taps import Place, Taps
from headwise.circuits.tracing import Traced, traced
from headwise.errors import InputError, Refusal
from headwise.metrics import metric
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item, Twin
from headwise.probes.outcome import observe
from headwise.zoo.planted import Planted, planted
from headwise.zoo.tiny import build_tiny, tiny_types

DIFFERENCE = "logit-difference"


def tiny(name: str, dtype: torch.dtype = torch.float64) -> hw.AttachedModel:
    row = next(row for row in tiny_types() if row.name == f"tiny-{name}")
    built = build_tiny(row, dtype=dtype)
    return hw.attach(built.model, built.tokenizer, example=built.example, name=row.name)


def pairs(model: hw.AttachedModel, *prompts: tuple[str, str]) -> ItemSet:
    items = [
        Item(prompt=own, answer="x", foils=("y",), twin=Twin(prompt=other), id=f"{i}")
        for i, (own, other) in enumerate(prompts or [("the cat", "the dog")])
    ]
    return encode(items, model.tokenizer, name="twins")


def brought_near(model: hw.AttachedModel, items: ItemSet, share: float) -> None:
    """Move the embeddings of what only twins hold to within `share` of those that they stand in for."""
    table = model.model.get_input_embeddings().weight  # type: ignore[operator]
    with torch.no_grad():
        for each in items:
            assert each.twin is not None
            for own, other in zip(each.prompt, each.twin.prompt, strict=True):
                if own != other:
                    table[other] = table[own] + share * (table[other] - table[own])


# -- every edge by itself, by forward runs ----------------------------------------------------------------------------


def run(found: Traced, ends: Ends, put: dict[Place, Tensor], also: tuple[Place, ...] = ()) -> tuple[Tensor, Taps]:
    """The metric of the clean run with something put in place, and what stood at `also`."""
    taps = Taps(list(dict.fromkeys([*put, *also])), put)
    with torch.no_grad(), taps.open(found.model):
        outcome = observe(found.model, ends.clean.batch, wants=ends.chosen.wants)
    return ends.value(outcome).double(), taps


def exhaustive(model: hw.AttachedModel, items: ItemSet, senders: tuple[str, ...] | None = None) -> Tensor:
    """M_patched - M_clean of every edge of some senders, the mean over items; NaN elsewhere.

    The receiver alone reads the stream with the sender's part exchanged; what it then makes is put into the clean run.
    """
    found = traced(model)
    ends = ends_of(found, items, differentiable_metric(items, DIFFERENCE), items.items, besides=found.places)
    effects = torch.full(found.graph.reaches.shape, torch.nan, dtype=torch.float64)
    clean = {place: ends.clean.taps.value(place) for place in found.places}
    for origin in found.origins:
        written = ends.written(origin)
        for index, row in enumerate(origin.rows):
            if senders is not None and found.graph.senders[row].label not in senders:
                continue
            for reading in found.readings:
                if not found.graph.reaches[row, reading.columns.start]:
                    continue
                moved = clean[reading.stream] + written[:, :, index].to(clean[reading.stream])
                if reading.place == reading.stream:
                    value, _ = run(found, ends, {reading.place: moved})
                    effects[row, reading.columns.start] = (value - ends.clean.metric).mean()
                    continue
                held = {place: clean[place] for place in reading.cut}
                read = run(found, ends, {reading.stream: moved, **held}, (reading.place,))[1].taken[reading.place]
                for part, column in enumerate(reading.columns):
                    put = clean[reading.place].reshape(read.shape).clone()
                    put[:, :, part] = read[:, :, part]
                    value, _ = run(found, ends, {reading.place: put})
                    effects[row, column] = (value - ends.clean.metric).mean()
    return effects


@pytest.mark.parametrize(
    ("name", "share", "room"),
    [("gpt2", 1e-3, 5e-3), ("llama", 1e-3, 5e-3), ("gpt_neox", 1e-3, 5e-3), ("gemma2", 1e-2, 3e-2)],
)
def test_close_to_the_clean_run_every_edge_is_what_patching_it_does(name: str, share: float, room: float) -> None:
    """MHA, grouped queries, a parallel block, and norms behind attention and feed-forward part."""
    # Gemma 2 is measured in fp32, where finite differences cannot be as small.
    with tiny(name, torch.float32 if name == "gemma2" else torch.float64) as model:
        items = pairs(model)
        brought_near(model, items, share)
        effects = exhaustive(model, items, ("input", "L0H1", "mlp.L0", "L1H3", "mlp.L1", "L2H0"))
        for method in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"):
            scores = attribute_edges(model, items, method, steps=2, metric=DIFFERENCE).values  # type: ignore[arg-type]
            there = ~effects.isnan()
            assert not scores[there].isnan().any()
            apart = (scores - effects)[there].abs().max() / effects[there].abs().max()
            assert apart < room, method


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_close_to_the_clean_run_nodes_and_ports_are_what_patching_them_does(name: str) -> None:
    with tiny(name) as model:
        items = pairs(model)
        brought_near(model, items, 1e-3)
        nodes = attribute_nodes(model, items, "eap", metric=DIFFERENCE)
        for variable in ("z", "mlp"):
            exact = patch_map(model, items, variable, metric=DIFFERENCE)  # type: ignore[arg-type]
            require_close(torch.stack([nodes.of(cell.member) for cell in exact.cells]), exact.values - exact.clean)
        for method in ("atp", "atp-qk"):
            ports = attribute_ports(model, items, method, metric=DIFFERENCE)  # type: ignore[arg-type]
            for port in ("q", "k", "v"):
                exact = patch_map(model, items, port, metric=DIFFERENCE)  # type: ignore[arg-type]
                found = torch.stack([ports.of(f"{cell.member}.{port}") for cell in exact.cells])
                require_close(found, exact.values - exact.clean)


def require_close(scores: Tensor, effects: Tensor) -> None:
    assert float((scores - effects).abs().max()) < 2e-2 * float(effects.abs().max())


# -- linear models ----------------------------------------------------------------------------------------------------


def linear(layers: int, *, attends: bool = False) -> hw.AttachedModel:
    """A GPT-2 without norms and with linear feed-forward parts. Its queries are 0, so that every pattern is even and
    the metric is linear in the input; where it `attends` they are not."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=400,
        n_embd=24,
        n_layer=layers,
        n_head=3,
        n_positions=32,
        activation_function="linear",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    network = GPT2LMHeadModel(config).double().eval()
    network.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
        for block in network.transformer.h:
            block.ln_1 = block.ln_2 = nn.Identity()
            if not attends:
                block.attn.c_attn.weight[:, :24] = 0
                block.attn.c_attn.bias[:24] = 0
    row = next(row for row in tiny_types() if row.name == "tiny-gpt2")
    return hw.attach(network, build_tiny(row).tokenizer, name="linear")


def test_on_a_linear_model_attribution_is_patching_to_rounding() -> None:
    with linear(2) as model:
        items = pairs(model, ("the cat", "the dog"), ("one by one", "two by two"))
        exact = exhaustive(model, replace(items, items=items.items[:1]))
        there = ~exact.isnan()
        for method in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"):
            edges = attribute_edges(model, items, method, steps=1, metric=DIFFERENCE, per_item=True)  # type: ignore[arg-type]
            assert edges.per_item is not None
            assert (edges.per_item[0] - exact)[there].abs().max() < 1e-12 * exact[there].abs().max()
            assert edges.completeness.error < 1e-12
            nodes = attribute_nodes(model, items, method, steps=1, metric=DIFFERENCE)  # type: ignore[arg-type]
            patched = patch_map(model, items, "z", metric=DIFFERENCE)
            for cell, values in zip(patched.cells, patched.values, strict=True):
                apart = nodes.of(cell.member) - (values - patched.clean)
                assert apart.abs().max() < 1e-12 * patched.clean.abs().max()
            assert nodes.completeness.error < 1e-12


def test_scores_of_a_head_are_those_of_its_edges() -> None:
    """Each method's gradient at a head is the sum of those that its edges take."""
    with tiny("llama") as model:
        items = pairs(model, ("the cat", "the dog"), ("one by one", "two by two"))
        for method in ("eap", "eap-ig-activations"):
            edges = attribute_edges(model, items, method, steps=2, metric=DIFFERENCE)  # type: ignore[arg-type]
            nodes = attribute_nodes(model, items, method, steps=2, metric=DIFFERENCE)  # type: ignore[arg-type]
            torch.testing.assert_close(edges.values.nansum(1), nodes.mean(), rtol=1e-5, atol=1e-6)


def test_one_step_is_the_clean_end_for_nodes_and_the_corrupted_one_for_edges() -> None:
    with tiny("llama") as model:
        items = pairs(model, ("the cat", "the dog"), ("one by one", "two by two"))
        nodes = [attribute_nodes(model, items, each, steps=1, metric=DIFFERENCE) for each in ("eap-ig-inputs", "eap")]  # type: ignore[arg-type]
        torch.testing.assert_close(nodes[0].values, nodes[1].values, rtol=1e-5, atol=1e-6)
        ig, eap, both = (
            attribute_edges(model, items, each, steps=1, metric=DIFFERENCE).values  # type: ignore[arg-type]
            for each in ("eap-ig-inputs", "eap", "clean-corrupted")
        )
        torch.testing.assert_close((ig + eap) / 2, both, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert (ig - eap).nan_to_num().abs().max() > 0.01


def test_grad_drop_leaves_out_one_block_at_a_time() -> None:
    """In two blocks, without the second a feed-forward part of the first has its direct effect alone; one of the second
    has that in the pass without the first, and none in its own."""
    with linear(2) as model:
        items = pairs(model, ("the cat", "the dog"), ("one by one", "two by two"))
        dropped = attribute_nodes(model, items, "grad-drop", metric=DIFFERENCE)
        edges = attribute_edges(model, items, "eap", metric=DIFFERENCE, per_item=True)
        assert edges.per_item is not None
        for sender in ("mlp.L0", "mlp.L1"):
            direct = edges.per_item[:, edges.graph.row[Sender.parse(sender)], edges.graph.column[Receiver()]]
            torch.testing.assert_close(dropped.of(sender), direct.abs())
        assert dropped.completeness.explained.isnan().all()


def test_the_qk_fix_is_exact_where_all_behind_the_softmax_is_linear() -> None:
    with linear(1, attends=True) as model:
        items = pairs(model, ("the cat", "the dog"), ("one by one", "two by two"))
        fixed, plain = (attribute_ports(model, items, each, metric=DIFFERENCE) for each in ("atp-qk", "atp"))  # type: ignore[arg-type]
        for port in ("q", "k", "v"):
            exact = patch_map(model, items, port, metric=DIFFERENCE)  # type: ignore[arg-type]
            for cell, values in zip(exact.cells, exact.values, strict=True):
                effect = values - exact.clean
                torch.testing.assert_close(fixed.of(f"{cell.member}.{port}"), effect, rtol=1e-10, atol=1e-12)
                apart = (plain.of(f"{cell.member}.{port}") - effect).abs().max() / effect.abs().max()
                assert apart < 1e-9 if port == "v" else apart > 1e-2


# -- completeness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_scores_of_the_input_go_to_the_whole_effect_as_steps_grow(name: str) -> None:
    with tiny(name) as model:
        items = pairs(model, ("the cat", "the dog"), ("one", "two"))
        errors = []
        for steps in (2, 8, 32):
            nodes = attribute_nodes(model, items, "eap-ig-inputs", steps=steps, metric=DIFFERENCE)
            errors.append(float((nodes.completeness.explained - nodes.measured.effect).abs().sum()))
        assert errors[2] < errors[1] / 2 < errors[0] / 4
        few, many = (
            attribute_edges(model, items, "eap-ig-inputs", steps=steps, metric=DIFFERENCE).completeness.explained
            for steps in (2, 16)
        )
        effect = nodes.measured.effect
        assert (many - effect).abs().sum() < (few - effect).abs().sum() / 3
        assert nodes.completeness.error == pytest.approx(
            float((nodes.of("input").sum() - effect.sum()).abs() / effect.sum().abs())
        )


def test_interpolated_activations_of_one_site_add_up_to_patching_it() -> None:
    with tiny("llama") as model:
        items = pairs(model, ("the cat", "the dog"), ("one", "two"))
        whole = hw.sweep.measure_sets(model, items, [hw.HeadSet(), model.heads("L1")], hw.sweep.Patch(), DIFFERENCE)
        errors = []
        for steps in (3, 12):
            nodes = attribute_nodes(model, items, "eap-ig-activations", steps=steps, metric=DIFFERENCE)
            explained = torch.stack([nodes.of(f"L1H{index}") for index in range(4)]).sum(0)
            errors.append(float((explained - (whole[1] - whole[0])).abs().sum()))
        assert errors[1] < errors[0] / 3
        assert errors[1] < 0.3 * float((whole[1] - whole[0]).abs().sum())


# -- planted circuits -------------------------------------------------------------------------------------------------


@cache
def induction(architecture: Any) -> Planted:
    return planted(architecture, layers=2, heads=4, circuits=("induction",), seed=0)


def exchanged(organism: Planted, before: int) -> ItemSet:
    """Lists of words that begin again; the twin has another word in the place `before` the answer's first one."""
    items = []
    for i, example in enumerate(organism.examples("repeat", 2)):
        place = example.ids.index(example.answer) - before
        other = [word for word in organism.lexicon.content if word not in example.ids][i]
        twin = (*example.ids[:place], other, *example.ids[place + 1 :])
        item = Item(prompt=f"{i}", answer="a", foils=("b",), twin=Twin(prompt="c"), id=f"{i}")
        foils = ((example.foil,),)
        items.append(EncodedItem(item, example.ids, (example.answer,), (), foils, {}, EncodedTwin(twin, (), {})))
    return ItemSet("repeat", tuple(items), {}, DIFFERENCE, 0)


def circuit_of(organism: Planted, model: hw.AttachedModel, before: int) -> set[Edge]:
    """What is planted: the word before goes by the previous-token head into the induction heads' keys, what they copy
    by their values to the logits."""
    copying = [organism.truth.named(name) for name in ("induction-a", "induction-b")]
    first = organism.truth.named("previous-token")
    group = {head: hw.HeadSet((head,)).to_groups(model.table.group_sizes).labels[0] for head in (first, *copying)}
    edges = {f"{head} -> logits" for head in copying}
    if before:
        edges |= {f"input -> {group[first]}.v"} | {f"{first} -> {group[head]}.k" for head in copying}
    else:
        edges |= {f"input -> {group[head]}.v" for head in copying}
    return {Edge.parse(edge) for edge in edges}


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("before", [0, 1])
def test_planted_edges_come_first(architecture: str, before: int) -> None:
    organism = induction(architecture)
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        edges = attribute_edges(model, exchanged(organism, before), steps=16)
        wanted = circuit_of(organism, model, before)
        ranked = edges.ranked()
        assert {edge for edge, _ in ranked[: len(wanted)]} == wanted
        assert abs(ranked[len(wanted)][1]) < 0.2 * abs(ranked[len(wanted) - 1][1])
        assert edges.completeness.error < 0.1


def test_saturated_attention_hides_keys_from_the_gradient_and_the_qk_fix_shows_them() -> None:
    organism = induction("llama-gqa")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as model:
        items = exchanged(organism, 1)
        keys = {edge.receiver for edge in circuit_of(organism, model, 1) if edge.receiver.port == "k"}
        fixed, plain = (attribute_ports(model, items, each) for each in ("atp-qk", "atp"))  # type: ignore[arg-type]
        exact = patch_map(model, items, "k")
        assert {receiver for receiver, _ in fixed.ranked()[:2]} == keys
        for receiver in keys:
            effect = float((exact.values[exact.labels.index(str(receiver.member))] - exact.clean).mean())
            assert float(fixed.of(receiver).mean()) == pytest.approx(effect, rel=0.15)
            assert abs(float(plain.of(receiver).mean())) < 0.05 * abs(effect)
        heads = attribute_nodes(model, items).head_scores()
        assert heads.top(3) == organism.truth.with_effect("repeat", "total")


# -- how items are run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_item_has_the_scores_that_it_has_alone(name: str) -> None:
    """Rows of one batch are padded on the left; alone there is none."""
    with tiny(name) as model:
        items = pairs(model, ("the cat sat", "the dog ran"), ("one", "two"))
        for method in ("eap-ig-inputs", "clean-corrupted"):
            together = attribute_edges(model, items, method, steps=2, metric=DIFFERENCE, per_item=True)  # type: ignore[arg-type]
            nodes = attribute_nodes(model, items, method, steps=2, metric=DIFFERENCE)  # type: ignore[arg-type]
            assert together.per_item is not None
            assert torch.allclose(together.per_item.mean(0), together.values, equal_nan=True)
            spread = together.per_item.std(0) / 2**0.5
            assert torch.allclose(spread, together.standard_error, atol=1e-7, equal_nan=True)
            for row in range(2):
                one = replace(items, items=items.items[row : row + 1])
                alone = attribute_edges(model, one, method, steps=2, metric=DIFFERENCE)  # type: ignore[arg-type]
                torch.testing.assert_close(together.per_item[row], alone.values, rtol=1e-4, atol=1e-6, equal_nan=True)
                apart = attribute_nodes(model, one, method, steps=2, metric=DIFFERENCE).values[0]  # type: ignore[arg-type]
                torch.testing.assert_close(nodes.values[row], apart, rtol=1e-4, atol=1e-6)
        ports = attribute_ports(model, items, metric=DIFFERENCE)
        alone_ports = attribute_ports(model, replace(items, items=items.items[1:]), metric=DIFFERENCE)
        torch.testing.assert_close(ports.values[1], alone_ports.values[0], rtol=1e-4, atol=1e-6)


def test_a_model_and_its_weights_are_left_as_they_were() -> None:
    with tiny("gpt2") as model:
        weight = next(model.model.parameters())
        attribute_edges(model, pairs(model), "eap", metric=DIFFERENCE)
        assert weight.requires_grad
        assert weight.grad is None
        assert not model.planned


def test_scores_are_a_loss_of_the_metric_where_heads_are_told() -> None:
    with tiny("llama") as model:
        items = pairs(model, ("the cat sat", "the dog ran"), ("one", "two"))
        gain = attribute_nodes(model, items, "eap", metric=DIFFERENCE)
        loss = attribute_nodes(model, items, "eap", metric="cross-entropy")
        assert gain.head_scores().of("L1H2") == pytest.approx((-gain.of("L1H2")).numpy())
        assert loss.head_scores().of("L1H2") == pytest.approx(loss.of("L1H2").numpy())
        assert gain.provenance.method == "eap"
        assert gain.provenance.probe == "twins"


def test_a_metric_that_compares_with_the_clean_run() -> None:
    """Its gradient is 0 at the clean run, and not on the way to it."""
    with tiny("llama") as model:
        items = pairs(model)
        assert attribute_nodes(model, items, "eap", metric="kl-to-clean").values.abs().max() < 1e-6
        many = attribute_nodes(model, items, "eap-ig-inputs", steps=32, metric="kl-to-clean")
        assert many.completeness.error < 0.15
        assert float(many.measured.clean) == pytest.approx(0, abs=1e-9)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_where_clean_and_corrupted_do_not_differ_shares_are_undefined() -> None:
    with tiny("llama") as model:
        items = pairs(model, ("the cat", "the dog"), ("one", "two"))
        same = replace(items.items[1], twin=EncodedTwin(items.items[1].prompt, (), {}))
        mixed = attribute_edges(model, replace(items, items=(items.items[0], same)), "eap", metric=DIFFERENCE)
        alone = attribute_edges(model, replace(items, items=items.items[:1]), "eap", metric=DIFFERENCE)
        assert mixed.measured.undefined.tolist() == [False, True]
        torch.testing.assert_close(mixed.normalised, alone.normalised, rtol=1e-4, atol=1e-5, equal_nan=True)
        nothing = attribute_edges(model, replace(items, items=(same,)), "eap", metric=DIFFERENCE)
        assert nothing.normalised.isnan().all()
        nodes = attribute_nodes(model, replace(items, items=(same,)), "eap", metric=DIFFERENCE)
        assert nodes.normalised.isnan().all()
        assert (nodes.values == 0).all()


def test_what_is_refused() -> None:
    with tiny("llama") as model:
        items = pairs(model)
        item = items.items[0]
        assert item.twin is not None
        short = replace(item, twin=replace(item.twin, prompt=item.twin.prompt[1:]))
        for wrong, words in ((replace(item, twin=None), "no corrupted twin"), (short, "tokens and its twin")):
            with pytest.raises(InputError, match=words):
                attribute_edges(model, replace(items, items=(wrong,)), metric=DIFFERENCE)
        with pytest.raises(InputError, match="choose from eap, "):
            attribute_nodes(model, items, "eap-ig")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="choose from atp, atp-qk"):
            attribute_ports(model, items, "eap")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="whole number from 1"):
            attribute_edges(model, items, steps=0, metric=DIFFERENCE)
        with pytest.raises(InputError, match="exact-match-generated"):
            attribute_edges(model, items, metric="exact-match-generated")
        with pytest.raises(InputError, match="not of the logits"):
            attribute_edges(model, items, metric="cosine-to-clean")
        step = replace(metric("answer-rank"), id="rank")
        with pytest.raises(InputError, match="metric rank has no gradient"):
            attribute_nodes(model, items, metric=step)
        scores = attribute_edges(model, items, "eap", metric=DIFFERENCE)
        with pytest.raises(InputError, match="is no edge of this model"):
            scores.of("L1H0 -> L0H1.q")
        with pytest.raises(InputError, match="this model has no L9H0"):
            attribute_nodes(model, items, "eap", metric=DIFFERENCE).of("L9H0")


def test_no_items_an_open_plan_and_inference_mode_are_one_line_each() -> None:
    model = tiny("llama")
    items = pairs(model, ("a b c", "a d c"))
    nothing = replace(items, items=())
    for attribute in (attribute_nodes, attribute_edges, attribute_ports):
        with pytest.raises(InputError, match="no items"):
            attribute(model, nothing)
    with model.editing(hw.edit.zero("L0H0")):
        model(**model.example)
        with pytest.raises(Refusal, match="a plan of reads or edits is open"):
            attribute_edges(model, items)
    with torch.inference_mode(), pytest.raises(InputError, match="inference mode"):
        attribute_edges(model, items)
    with pytest.raises(InputError, match="tokens=0"):
        attribute_edges(model, items, tokens=0)
    with pytest.raises(InputError, match="attached model"):
        attribute_edges(model.model, items)  # type: ignore[arg-type]
