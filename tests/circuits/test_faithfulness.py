"""A model as a circuit: all of it, nothing of it, less one edge by hand, planted circuits, and the fast way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise.circuits import circuit_run
from headwise.circuits.circuit import Circuit
from headwise.circuits.criteria import completeness, cross_task, minimality
from headwise.circuits.faithfulness import OUTSIDE, Faithfulness, Outside, faithfulness, run_circuits
from headwise.circuits.graph import Graph, Receiver, Sender
from headwise.circuits.node_faithfulness import node_faithfulness
from headwise.circuits.smallest import smallest
from headwise.circuits.tracing import graph_of
from headwise.errors import InputError, Refusal
from headwise.metrics import METRICS
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.scores import Provenance
from headwise.zoo import build
from headwise.zoo.planted import Planted, planted
from headwise.zoo.planted.circuits import NEAR_TIE

# In fp64 the ways of Gemma 2's norms, which compute in fp32, are not found.
DTYPES = {"tiny-gemma2": torch.float32}
MODELS = ("tiny-gpt2", "tiny-llama", "tiny-gemma2", "tiny-gpt_neox")
"""Every head its own keys; KV groups; norms behind the sublayers; parallel blocks."""


@cache
def tiny(name: str) -> hw.AttachedModel:
    built = build(name, dtype=DTYPES.get(name, torch.float64))
    return hw.attach(built.model, built.tokenizer, example=built.example, name=name)


@cache
def graph(name: str) -> Graph:
    return graph_of(tiny(name))


def rounding(name: str) -> float:
    return 1e-10 if DTYPES.get(name, torch.float64) == torch.float64 else 3e-4


def drawn(lengths: tuple[int, ...] = (6, 6, 4), seed: int = 0) -> ItemSet:
    """Random tokens with random twins; of several lengths, so that some rows are padded on the left."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 90, (n,), generator=generator).tolist())

    items = []
    for number, length in enumerate(lengths):
        clean, twin, answers = ids(length), ids(length), ids(2)
        item = Item(prompt="", answer="", id=f"drawn-{number}")
        items.append(EncodedItem(item, clean, answers[:1], (), (answers[1:],), {}, EncodedTwin(twin, answers[1:], {})))
    return ItemSet("drawn", tuple(items), {}, "logit-difference", 0)


# -- all and nothing


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_all_edges_are_the_model_and_none_is_what_is_outside(name: str, outside: Outside) -> None:
    model, items = tiny(name), drawn()
    full, empty = run_circuits(model, [Circuit.full(graph(name)), Circuit.empty(graph(name))], items, outside)
    torch.testing.assert_close(full.values, full.clean, rtol=0, atol=rounding(name))
    torch.testing.assert_close(full.clean, hw.measure(model, items).double(), rtol=0, atol=rounding(name))
    assert full.value == pytest.approx(1, abs=1e-3)
    assert empty.value == 0
    if outside == "resample":
        corrupted = tuple(replace(each, prompt=each.twin.prompt) for each in items)  # type: ignore[union-attr]
        expected = hw.measure(model, replace(items, items=corrupted)).double()
        torch.testing.assert_close(empty.values, expected, rtol=0, atol=rounding(name))


# -- one edge less, by hand


@dataclass(frozen=True)
class Names:
    """Where the parts of a block are, for the reference: `x` stands for the number of the block."""

    norm: str
    query: str
    projection: str
    mlp_norm: str
    mlp: str
    final: str
    query_of: Callable[[Tensor, int, int], slice]
    post: str | None = None


def plain(heads: int, width: int, head: int) -> slice:
    return slice(head * width, (head + 1) * width)


def of_neox(heads: int, width: int, head: int) -> slice:
    return slice(3 * head * width, (3 * head + 1) * width)


NAMES = {
    "tiny-gpt2": Names(
        *("transformer.h.x.ln_1", "transformer.h.x.attn.c_attn", "transformer.h.x.attn.c_proj"),
        *("transformer.h.x.ln_2", "transformer.h.x.mlp", "transformer.ln_f", plain),
    ),
    "tiny-llama": Names(
        *("model.layers.x.input_layernorm", "model.layers.x.self_attn.q_proj", "model.layers.x.self_attn.o_proj"),
        *("model.layers.x.post_attention_layernorm", "model.layers.x.mlp", "model.norm", plain),
    ),
    "tiny-gemma2": Names(
        *("model.layers.x.input_layernorm", "model.layers.x.self_attn.q_proj", "model.layers.x.self_attn.o_proj"),
        *("model.layers.x.pre_feedforward_layernorm", "model.layers.x.mlp", "model.norm", plain),
        post="model.layers.x.post_attention_layernorm",
    ),
    "tiny-gpt_neox": Names(
        *("gpt_neox.layers.x.input_layernorm", "gpt_neox.layers.x.attention.query_key_value"),
        *("gpt_neox.layers.x.attention.dense", "gpt_neox.layers.x.post_attention_layernorm", "gpt_neox.layers.x.mlp"),
        *("gpt_neox.final_layer_norm", of_neox),
    ),
}


class ByHand:
    """A model of transformers less one edge, by hooks of its own; one item, nothing of headwise."""

    def __init__(self, name: str, items: ItemSet) -> None:
        self.model, self.names = tiny(name).model, NAMES[name]
        self.item = items.items[0]
        assert self.item.twin is not None
        self.clean, self.twin = (torch.tensor([ids]) for ids in (self.item.prompt, self.item.twin.prompt))
        self.heads = self.model.config.num_attention_heads
        self.width = self.model.config.hidden_size // self.heads
        self.width = getattr(self.model.config, "head_dim", None) or self.width

    def module(self, name: str, block: int) -> nn.Module:
        return self.model.get_submodule(name.replace(".x.", f".{block}."))

    def logit_difference(self, hooks: list[tuple[nn.Module, Callable[..., object], bool]]) -> float:
        with ExitStack() as undo, torch.no_grad():
            for module, hook, before in hooks:
                put = module.register_forward_pre_hook if before else module.register_forward_hook
                undo.callback(put(hook).remove)
            logits = self.model(self.clean, use_cache=False).logits[0, -1].double()
        logits = logits.log_softmax(-1)
        return float(logits[self.item.answer[0]] - logits[self.item.foils[0][0]])

    def difference(self, head: tuple[int, int] | None) -> Tensor:
        """What a head (or the input) adds to the stream in the corrupted run, less what it adds in the clean one; norms
        behind the sublayer recomputed with the other heads as they are."""
        given: list[Tensor] = []
        with ExitStack() as undo, torch.no_grad():
            block, index = head or (0, 0)
            at = self.module(self.names.norm if head is None else self.names.projection, block)
            undo.callback(at.register_forward_pre_hook(lambda m, args: given.append(args[0])).remove)
            for ids in (self.clean, self.twin):
                self.model(ids, use_cache=False)
        if head is None:
            return given[1] - given[0]
        mixed = given[0].clone()
        part = slice(index * self.width, (index + 1) * self.width)
        mixed[..., part] = given[1][..., part]
        with torch.no_grad():
            wrote = [self.module(self.names.projection, block)(z) for z in (given[0], mixed)]
            if self.names.post is not None:
                wrote = [self.module(self.names.post, block)(each) for each in wrote]
        return wrote[1] - wrote[0]

    def without(self, head: tuple[int, int] | None, receiver: tuple[str, int, int]) -> float:
        """The metric where one receiver reads the sender's corrupted write: `("q", block, head)`, `("mlp", block, 0)`,
        `("logits", 0, 0)`."""
        delta, (kind, block, index) = self.difference(head), receiver
        if kind == "logits":
            final = self.model.get_submodule(self.names.final)
            return self.logit_difference([(final, lambda m, args: (args[0] + delta, *args[1:]), True)])
        if kind == "mlp":
            norm, mlp = self.module(self.names.mlp_norm, block), self.module(self.names.mlp, block)
            seen: list[Tensor] = []
            return self.logit_difference(
                [
                    (norm, lambda m, args: seen.append(args[0]), True),
                    (mlp, lambda m, args: (norm.forward(seen[-1] + delta),), True),
                ]
            )
        norm, query = self.module(self.names.norm, block), self.module(self.names.query, block)
        taken: list[Tensor] = []
        part = self.names.query_of(self.heads, self.width, index)  # type: ignore[arg-type]

        def other_query(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., part] = query.forward(norm.forward(taken[-1] + delta))[..., part]
            return changed

        return self.logit_difference([(norm, lambda m, args: taken.append(args[0]), True), (query, other_query, False)])


EDGES = {
    "input -> L1H2.q": (None, ("q", 1, 2)),
    "L0H1 -> L1H2.q": ((0, 1), ("q", 1, 2)),
    "L0H1 -> mlp.L1": ((0, 1), ("mlp", 1, 0)),
    "L1H3 -> mlp.L1": ((1, 3), ("mlp", 1, 0)),
    "L0H1 -> logits": ((0, 1), ("logits", 0, 0)),
    "input -> logits": (None, ("logits", 0, 0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_circuit_less_one_edge_is_a_path_patch_by_hand(name: str) -> None:
    model, items = tiny(name), drawn((6,))
    by_hand = ByHand(name, items)
    edges = {label: places for label, places in EDGES.items() if not (name == "tiny-gpt_neox" and "L1H3" in label)}
    full = Circuit.full(graph(name))
    runs = run_circuits(model, [full.without(edge) for edge in edges], items)
    assert by_hand.logit_difference([]) == pytest.approx(float(runs[0].clean), abs=rounding(name))
    for run, (edge, places) in zip(runs, edges.items(), strict=True):
        expected = by_hand.without(*places)
        assert float(run.values) == pytest.approx(expected, abs=rounding(name)), edge
        assert abs(expected - float(run.clean)) > 10 * rounding(name), f"{edge} changes nothing, so nothing is shown"


@pytest.mark.parametrize("name", MODELS)
def test_in_a_parallel_block_the_feed_forward_part_does_not_read_its_heads(name: str) -> None:
    beside = not any(edge.label == "L1H3 -> mlp.L1" for edge in graph(name).edges())
    assert beside == (name == "tiny-gpt_neox")


# -- the fast way, too


NODES = ("input", "L0H0", "L0H2", "mlp.L0", "L1H1", "mlp.L1")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_nodes_by_patches_are_all_edges_between_them(name: str, outside: Outside) -> None:
    model, items = tiny(name), drawn()
    for nodes in (NODES, NODES[1:]):
        fast = node_faithfulness(model, nodes, items, outside)
        whole = faithfulness(model, Circuit.between(graph(name), nodes), items, outside)
        torch.testing.assert_close(fast.values, whole.values, rtol=0, atol=rounding(name))
        torch.testing.assert_close(fast.empty, whole.empty, rtol=0, atol=rounding(name))
        assert float((whole.values - whole.clean).abs().min()) > 10 * rounding(name)


# -- two ways to a number


def random_circuits(name: str, n: int = 2) -> list[Circuit]:
    generator = torch.Generator().manual_seed(0)
    reaches = graph(name).reaches
    return [
        Circuit(graph(name), reaches & (torch.rand(reaches.shape, generator=generator) < share))
        for share in torch.linspace(0.3, 0.9, n).tolist()
    ]


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_together_is_one_by_one_and_padded_is_alone(name: str) -> None:
    model, items, circuits = tiny(name), drawn(), random_circuits(name)
    together = torch.stack([run.values for run in run_circuits(model, circuits, items)])
    apart = torch.stack([faithfulness(model, each, items, tokens=6 + 1).values for each in circuits])
    torch.testing.assert_close(together, apart, rtol=0, atol=rounding(name))
    for number, item in enumerate(items):
        alone = run_circuits(model, circuits, replace(items, items=(item,)))
        torch.testing.assert_close(
            together[:, number], torch.stack([run.values[0] for run in alone]), rtol=0, atol=rounding(name)
        )


def test_whole_runs_give_what_runs_from_a_block_give(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items, circuits = tiny("tiny-llama"), drawn(), random_circuits("tiny-llama")
    begun = [run.values for run in run_circuits(model, circuits, items)]
    with model.editing(hw.edit.scale("L0H0", 1.0)):  # where a plan is open, runs are whole
        whole = [run.values for run in run_circuits(model, circuits, items)]
    torch.testing.assert_close(torch.stack(begun), torch.stack(whole), rtol=0, atol=1e-10)


def test_parts_that_nobody_reads_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny("tiny-llama"), drawn()
    runs: list[int] = []
    run = circuit_run.Stage.run
    monkeypatch.setattr(
        circuit_run.Stage, "run", lambda *args, **named: runs.append(named["block"]) or run(*args, **named)
    )
    faithfulness(model, Circuit.of(graph("tiny-llama"), ["input -> L1H0.q", "L1H0 -> logits"]), items)
    end = len(model.table.sublayers.blocks)
    assert runs == [1, 1, end], "the heads' inputs, what they write, the logits"


def test_a_mean_is_over_the_positions_of_all_items() -> None:
    name, last = "tiny-llama", "L2"
    model, items = tiny(name), drawn((6, 4, 5))
    pooled, streams = [], []
    with torch.no_grad(), model.reading(hw.read.write(f"{last}H0"), hw.read.residual(last)) as got:
        for batch in items.batches(1):
            model(batch.input_ids)
            pooled.append(got.write[last][0, :, 0])
            streams.append(got.residual_post[last])
    mean = torch.cat(pooled).mean(0)
    circuit = Circuit.full(graph(name)).without(f"{last}H0 -> logits")
    found = faithfulness(model, circuit, items, "mean")
    for number, item in enumerate(items):
        with torch.no_grad():
            end = model.model.model.norm(streams[number][:, -1] - pooled[number][-1] + mean)
            logits = model.model.lm_head(end)[0]
        expected = logits[item.answer[0]] - logits[item.foils[0][0]]
        assert float(found.values[number]) == pytest.approx(float(expected), abs=1e-10)


# -- what it is shared of


def made(values: list[float], clean: list[float], empty: list[float]) -> Faithfulness:
    ids = tuple(map(str, range(len(values))))
    return Faithfulness(*(torch.tensor(each).double() for each in (values, clean, empty)), "resample", ids, "m")


def test_it_is_a_ratio_of_means_and_undefined_where_nothing_differs() -> None:
    found = made([2.0, 1.0, 5.0], [4.0, 3.0, 7.0], [0.0, 1.0, 7.0])
    assert found.of_items[:2].tolist() == [0.5, 0.0]
    assert found.of_items[2].isnan()
    assert found.n_undefined == 1
    assert found.value == pytest.approx((2 + 0) / (4 + 2))
    assert torch.tensor(made([1.0], [2.0], [2.0]).value).isnan()
    assert torch.tensor(made([1.0, 1.0], [2.0, -2.0], [1.0, -1.0]).value).isnan(), "differences that cancel"


def test_items_below_a_margin_are_left_out() -> None:
    found = made([1.0, 3.0], [0.1, 4.0], [0.0, 0.0])
    assert found.value == pytest.approx(4 / 4.1)
    assert found.above(1.0).value == 0.75
    assert found.above(1.0).item_ids == ("1",)
    with pytest.raises(InputError, match="no item has a difference"):
        found.above(10.0)


def test_identical_twins_are_undefined() -> None:
    items = drawn((5,))
    same = replace(items.items[0], twin=EncodedTwin(items.items[0].prompt, (), {}))
    found = faithfulness(tiny("tiny-llama"), Circuit.full(graph("tiny-llama")), replace(items, items=(same,)))
    assert found.n_undefined == 1
    assert torch.tensor(found.value).isnan()
    assert "1 undefined" in repr(found)


def test_what_cannot_be_run_is_said() -> None:
    model, items, full = tiny("tiny-llama"), drawn(), Circuit.full(graph("tiny-llama"))
    alone = replace(items, items=tuple(replace(each, twin=None) for each in items))
    longer = replace(items.items[0], twin=EncodedTwin((*items.items[0].prompt, 7), (), {}))
    with pytest.raises(InputError, match="no corrupted twin"):
        faithfulness(model, full, alone)
    assert faithfulness(model, full, alone, "zero").value == pytest.approx(1)
    with pytest.raises(InputError, match="tokens and its twin"):
        faithfulness(model, full, replace(items, items=(longer,)))
    with pytest.raises(InputError, match="different shape"):
        faithfulness(model, Circuit.full(graph("tiny-gpt_neox")), items)
    with pytest.raises(InputError, match="outside="):
        faithfulness(model, full, items, "nothing")  # type: ignore[arg-type]
    of_text = next(each.id for each in METRICS if "generation" in each.needs)
    with pytest.raises(InputError, match=of_text):
        faithfulness(model, full, items, metric=of_text)
    with pytest.raises(InputError, match="no node L9H9"):
        node_faithfulness(model, ["L9H9"], items)
    with pytest.raises(InputError, match="no items"):
        faithfulness(model, full, replace(items, items=()), "mean")


# -- planted circuits


@cache
def induction(architecture: str) -> tuple[Planted, hw.AttachedModel]:
    organism = planted(architecture, layers=2, heads=4, circuits=("induction",), seed=0)  # type: ignore[arg-type]
    return organism, hw.attach(organism.model.double(), organism.tokenizer, example=organism.example)


def exchanged(organism: Planted, before: int) -> ItemSet:
    """Lists of words that begin again; the twin has another word in the place `before` the answer's first one. So what
    differs goes by the induction heads' values (0), or by the previous-token head into their keys (1)."""
    items = []
    for number, example in enumerate(organism.examples("repeat", 3)):
        place = example.ids.index(example.answer) - before
        other = [word for word in organism.lexicon.content if word not in example.ids][number]
        twin = (*example.ids[:place], other, *example.ids[place + 1 :])
        item = Item(prompt="", answer="", id=f"{before}-{number}")
        foils = ((example.foil,),)
        items.append(EncodedItem(item, example.ids, (example.answer,), (), foils, {}, EncodedTwin(twin, (), {})))
    return ItemSet(f"exchanged-{before}", tuple(items), {}, "logit-difference", 0)


def planted_circuit(architecture: str, before: int) -> Circuit:
    organism, model = induction(architecture)
    copying = [organism.truth.named(f"induction-{each}").label for each in "ab"]
    first = organism.truth.named("previous-token").label
    group = {head: hw.HeadSet.parse(head).to_groups(model.table.group_sizes).labels[0] for head in (first, *copying)}
    edges = {f"{head} -> logits" for head in copying}
    if before:
        edges |= {f"input -> {group[first]}.v"} | {f"{first} -> {group[head]}.k" for head in copying}
    else:
        edges |= {f"input -> {group[head]}.v" for head in copying}
    return Circuit.of(graph_of(model), edges)


ARCHITECTURES = ("llama", "llama-gqa", "gpt2")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_circuit_does_all_of_its_task_and_nothing_of_the_other(architecture: str) -> None:
    organism, model = induction(architecture)
    circuits = {f"{before}": planted_circuit(architecture, before) for before in (0, 1)}
    tasks = {f"{before}": exchanged(organism, before) for before in (0, 1)}
    found = cross_task(model, circuits, tasks)
    for (task, circuit), run in found.items():
        assert run.value == pytest.approx(float(task == circuit), abs=0.02), (task, circuit)
    assert circuits["1"].pruned() == circuits["1"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_planted_edge_is_needed_and_no_other(architecture: str) -> None:
    organism, model = induction(architecture)
    circuit, items = planted_circuit(architecture, 1), exchanged(organism, 1)
    wider = circuit | Circuit.of(circuit.graph, ["input -> L1H0.q", "input -> mlp.L1", "mlp.L1 -> logits"])
    losses = minimality(model, wider, items).losses
    for edge in wider:
        if edge not in circuit:
            assert losses[edge.label] == pytest.approx(0, abs=0.02)
        elif edge.label == f"{organism.truth.named('induction-b')} -> logits":
            assert losses[edge.label] == pytest.approx(NEAR_TIE[1], abs=0.1)
        else:
            assert losses[edge.label] > 0.4, edge
    of_node = minimality(model, circuit, items, [Sender(organism.truth.named("previous-token"))])
    assert list(of_node.losses.values()) == [pytest.approx(of_node.circuit.value, abs=1e-9)]
    with pytest.raises(InputError, match="not in the circuit"):
        minimality(model, circuit, items, ["input -> logits"])


def test_a_circuit_that_lacks_a_near_tie_is_incomplete() -> None:
    organism, model = induction("llama-gqa")
    items, whole = exchanged(organism, 1), planted_circuit("llama-gqa", 1)
    assert float(completeness(model, whole, items).incompleteness.max()) < 0.02
    other = whole.without(organism.truth.named("induction-b").label)
    taken = organism.truth.named("induction-a").label
    found = completeness(model, other, items, [[taken]])
    assert found.circuit[0].value == pytest.approx(0, abs=0.02)
    assert float(found.incompleteness) == pytest.approx(found.model[0].value, abs=0.02)
    assert found.model[0].value == pytest.approx(NEAR_TIE[1], abs=0.1)


@dataclass(frozen=True)
class Scores:
    graph: Graph
    values: Tensor
    provenance: Provenance


def test_the_smallest_faithful_circuit_is_the_planted_one() -> None:
    organism, model = induction("llama-gqa")
    circuit, items = planted_circuit("llama-gqa", 1), exchanged(organism, 1)
    generator = torch.Generator().manual_seed(0)
    values = 1e-3 * torch.rand(circuit.kept.shape, generator=generator, dtype=torch.float64) - circuit.kept.double()
    found = smallest(model, Scores(circuit.graph, values, Provenance("by hand")), items)
    assert found.circuit == circuit
    assert found.faithfulness.value == pytest.approx(1, abs=0.02)
    assert found.tried[circuit.n_edges] is found.faithfulness
    assert found.tried[circuit.n_edges - 1].value < 0.85
    with pytest.raises(Refusal, match="no circuit of up to"):
        smallest(model, Scores(circuit.graph, values, Provenance("by hand")), items, threshold=5.0)
    with pytest.raises(InputError, match="no item has a difference"):
        smallest(model, Scores(circuit.graph, values, Provenance("by hand")), items, margin=1e6)


def test_no_circuit_is_the_smallest_where_nothing_differs() -> None:
    name = "tiny-llama"
    items = drawn((5,))
    same = replace(items, items=(replace(items.items[0], twin=EncodedTwin(items.items[0].prompt, (), {})),))
    scores = Scores(graph(name), torch.rand(graph(name).reaches.shape, dtype=torch.float64), Provenance("by hand"))
    with pytest.raises(Refusal, match="undefined"):
        smallest(tiny(name), scores, same)


def test_blocks_whose_heads_read_the_feed_forward_part_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tiny-llama"
    turned = replace(graph(name), reaches=graph(name).reaches.clone())
    turned.reaches[turned.row[Sender.parse("mlp.L0")], turned.column[Receiver.parse("L0H0.q")]] = True
    monkeypatch.setattr("headwise.circuits.faithfulness.graph_of", lambda model: turned)
    with pytest.raises(Refusal, match="run heads first"):
        faithfulness(tiny(name), Circuit.full(turned), drawn((5,)))


def test_what_something_else_adds_to_the_stream_is_in_no_circuit() -> None:
    """A hook that adds the same everywhere is a constant to the graph, and still no sender."""
    model = tiny("tiny-llama")
    block = model.model.get_submodule(model.table.block("L1").module)
    handle = block.register_forward_hook(lambda module, args, output: output + 0.5)
    try:
        with pytest.raises(Refusal, match="is not its stream"):
            faithfulness(model, Circuit.full(graph_of(model)), drawn())
    finally:
        handle.remove()
    full = Circuit.full(graph_of(model))
    with (
        model.editing(hw.edit.add("L1", 2.0, "residual_post")),
        pytest.raises(Refusal, match="an open plan"),
    ):
        faithfulness(model, full, drawn())
    assert faithfulness(model, full, drawn()).value == pytest.approx(1)


def test_one_circuit_is_no_list_of_circuits() -> None:
    model = tiny("tiny-llama")
    with pytest.raises(InputError, match="no list of circuits"):
        run_circuits(model, Circuit.full(graph_of(model)), drawn())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no list of circuits"):
        faithfulness(model, "L0H0 -> logits", drawn())  # type: ignore[arg-type]


def test_one_part_or_node_need_not_be_in_a_list() -> None:
    model, items = tiny("tiny-llama"), drawn()
    full = Circuit.full(graph("tiny-llama"))
    one = minimality(model, full, items, "L0H0 -> logits")
    assert one.losses == minimality(model, full, items, ["L0H0 -> logits"]).losses
    assert completeness(model, full, items, ["L0H0"]).sets == ((Sender.parse("L0H0"),),)
    named = Circuit.between(full.graph, "L0H0")
    assert named == Circuit.between(full.graph, ["L0H0"])
    assert node_faithfulness(model, "L0H0", items).value == node_faithfulness(model, ["L0H0"], items).value
