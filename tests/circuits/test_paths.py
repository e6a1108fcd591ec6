"""Path patching: against the same by hand, against what was planted, and in closed form where norms are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise.circuits.patching import patch_map
from headwise.circuits.paths import path_patch
from headwise.errors import InputError, Refusal
from headwise.heads import Head
from headwise.probes import ItemSet, encode, probe
from headwise.probes.encoded import EncodedItem
from headwise.probes.item import Item, Quote, Twin
from headwise.zoo.planted import Planted, planted
from headwise.zoo.tiny import build_tiny, tiny_types

PROMPTS = (("the cat sat", "the dog sat"), ("one red hen ran", "one wet hen ran"), ("my old bat", "my old hat"))
NAMES = ("llama", "gpt2", "gpt_neox", "olmo2", "gemma2")
"""Grouped queries; fused weights; attention and feed-forward side by side; norms behind the sublayers, twice."""
ROUNDING = {"gemma2": 2e-5}  # its norms round to fp32, so it is run in that


@cache
def tiny(name: str) -> hw.AttachedModel:
    row = next(row for row in tiny_types() if row.name == f"tiny-{name}")
    built = build_tiny(row, dtype=torch.float32 if name == "gemma2" else torch.float64)
    return hw.attach(built.model, built.tokenizer, example=built.example, name=row.name)


@cache
def pairs(prompts: tuple[tuple[str, str], ...] = PROMPTS) -> ItemSet:
    items = [
        Item(
            prompt=own,
            answer="x",
            foils=("y",),
            twin=Twin(prompt=other),
            id=own,
            spans={"last": (Quote(own.split()[-1]),), "first": (Quote(own.split()[0]),)},
        )
        for own, other in prompts
    ]
    return replace(encode(items, tiny("llama").tokenizer, name="pairs"), metric="logit-difference")


# -- by hand: the modules of each model, and nothing of headwise ------------------------------------------------------


@dataclass(frozen=True)
class Hand:
    """A model taken apart by the names of its modules."""

    name: str
    network: Any

    @property
    def layers(self) -> Any:
        at = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(self.name, "model.layers")
        return self.network.get_submodule(at)

    @property
    def n_heads(self) -> int:
        return int(self.network.config.num_attention_heads)

    def projection(self, layer: int) -> nn.Module:
        at = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}.get(self.name, "self_attn.o_proj")
        found: nn.Module = self.layers[layer].get_submodule(at)
        return found

    def added(self, layer: int, attention: Tensor) -> Tensor:
        """What attention adds to the stream."""
        post = self.name in ("gemma2", "olmo2")
        found: Tensor = self.layers[layer].post_attention_layernorm(attention) if post else attention
        return found

    def fed(self, layer: int, stream: Tensor) -> Tensor:
        """What the feed-forward part adds for a stream."""
        block = self.layers[layer]
        if self.name == "gemma2":
            return block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(stream)))  # type: ignore[no-any-return]
        if self.name == "olmo2":
            return block.post_feedforward_layernorm(block.mlp(stream))  # type: ignore[no-any-return]
        norm = block.ln_2 if self.name == "gpt2" else block.post_attention_layernorm
        return block.mlp(norm(stream))  # type: ignore[no-any-return]

    def asked(self, layer: int, port: str, index: int, stream: Tensor) -> tuple[nn.Module, slice, Tensor]:
        """The module whose output holds q of a head (k, v of a group), where in it, and what it gives for a stream."""
        block = self.layers[layer]
        if self.name == "gpt2":
            width = self.network.config.n_embd // self.n_heads
            start = "qkv".index(port) * self.network.config.n_embd + index * width
            return block.attn.c_attn, slice(start, start + width), block.attn.c_attn(block.ln_1(stream))
        if self.name == "gpt_neox":
            width = self.network.config.hidden_size // self.n_heads
            start = index * 3 * width + "qkv".index(port) * width
            fused = block.attention.query_key_value
            return fused, slice(start, start + width), fused(block.input_layernorm(stream))
        module = block.self_attn.get_submodule(f"{port}_proj")
        given = module(stream if self.name == "olmo2" else block.input_layernorm(stream))
        if self.name == "olmo2" and port in "qk":
            module = block.self_attn.get_submodule(f"{port}_norm")
            given = module(given)
        width = block.self_attn.head_dim
        return module, slice(index * width, (index + 1) * width), given

    @property
    def norm(self) -> Any:
        at = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(self.name, "model.norm")
        return self.network.get_submodule(at)

    def ended(self, stream: Tensor) -> Tensor:
        """The logits of a stream."""
        logits: Tensor = self.network.get_output_embeddings()(self.norm(stream))
        cap = getattr(self.network.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def ended_as(self, stream: Tensor, step: Tensor, item: EncodedItem) -> float:
        """What a step adds to the logit difference if the norm scales as for the stream."""
        centred = isinstance(self.norm, nn.LayerNorm)
        eps = self.norm.eps if centred else self.norm.variance_epsilon
        from_centre = stream - stream.mean(-1, keepdim=True) if centred else stream
        scale = (from_centre.square().mean(-1, keepdim=True) + eps).rsqrt()
        step = step - step.mean(-1, keepdim=True) if centred else step
        answer, foil = self.network.get_output_embeddings().weight[[item.answer[0], item.foils[0][0]]]
        behind = 1 / getattr(self.network.config, "logits_scaling", 1)
        return behind * float((step * scale * self.norm.weight)[0, -1] @ (answer - foil))

    def run(self, ids: Sequence[int], layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream before and behind a layer, z of all its heads, and the stream behind the last one."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            seen[name] = value.clone()

        def before(module: Any, args: Any, kwargs: Any) -> None:
            keep("before", args[0] if args else kwargs["hidden_states"])

        def behind(name: str) -> Any:
            return lambda module, args, output: keep(name, output[0] if isinstance(output, tuple) else output)

        with ExitStack() as undo:
            undo.callback(self.layers[layer].register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(self.layers[layer].register_forward_hook(behind("behind")).remove)
            undo.callback(self.layers[-1].register_forward_hook(behind("end")).remove)
            undo.callback(
                self.projection(layer).register_forward_pre_hook(lambda module, args: keep("z", args[0])).remove
            )
            self.network(input_ids=torch.tensor([ids]))
        return seen["before"], seen["behind"], seen["z"], seen["end"]

    def changed(self, item: EncodedItem, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """The stream behind a layer with one head as it is on the twin: feed-forward part held, and recomputed; and
        what the change of the head adds."""
        assert item.twin is not None
        before, behind, z, _ = self.run(item.prompt, layer)
        _, _, other, _ = self.run(item.twin.prompt, layer)
        width = z.shape[-1] // self.n_heads
        mixed = z.clone()
        mixed[..., head * width : (head + 1) * width] = other[..., head * width : (head + 1) * width]
        own, new = (self.added(layer, self.projection(layer)(each)) for each in (z, mixed))
        held = behind + new - own
        if self.name == "gpt_neox":
            return held, held, new - own
        return held, before + new + self.fed(layer, before + new), new - own


@contextmanager
def answering(changes: Sequence[tuple[nn.Module, slice, Tensor]]) -> Iterator[None]:
    """Inside, a part of what each module returns is another."""

    def hook(part: slice, value: Tensor) -> Any:
        def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[..., part] = value[..., part]
            return output

        return put

    with ExitStack() as undo:
        for module, part, value in changes:
            undo.callback(module.register_forward_hook(hook(part, value)).remove)
        yield


def difference(item: EncodedItem, logits: Tensor) -> float:
    return float(logits[0, -1, item.answer[0]] - logits[0, -1, item.foils[0][0]])


@pytest.mark.parametrize("feed_forward", ["frozen", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_to_q_k_and_v_is_that_by_hand(name: str, feed_forward: Any) -> None:
    """W norm(x + dw), put in place of what the receiver has in the clean run; items padded in the one, alone in the
    other. Grouped queries: the last group, which two heads share."""
    model = tiny(name)
    hand = Hand(name, model.model)
    last = model.table.site("L1").n_kv_heads - 1
    for receivers in (["L1H2.q"], [f"L1G{last}.k"], [f"L1G{last}.k", f"L1G{last}.v", "L1H0.q"]):
        found = path_patch(model, pairs(), receivers, ["L0H1", "L0H3"], feed_forward=feed_forward)
        for row, item in enumerate(pairs()):
            for cell, head in enumerate((1, 3)):
                with torch.no_grad():
                    held, recomputed, _ = hand.changed(item, 0, head)
                    stream = held if feed_forward == "frozen" else recomputed
                    asked = [hand.asked(1, each[-1], int(each[3]), stream) for each in receivers]
                    with answering(asked):
                        logits = model(input_ids=torch.tensor([item.prompt])).logits
                assert float(found.values[cell, row]) == pytest.approx(
                    difference(item, logits), abs=ROUNDING.get(name, 1e-10)
                )
    assert (found.values - found.clean).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_path_to_the_logits_is_that_by_hand(name: str) -> None:
    model = tiny(name)
    hand = Hand(name, model.model)
    held = path_patch(model, pairs(), ["logits"], ["L0H1", "L2H3"], feed_forward="frozen")
    through = path_patch(model, pairs(), ["logits"], ["L2H3"])
    for row, item in enumerate(pairs()):
        with torch.no_grad():
            end = hand.run(item.prompt, 2)[3]
            for cell, (layer, head) in enumerate(((0, 1), (2, 3))):
                expected = difference(item, hand.ended(end + hand.changed(item, layer, head)[2]))
                assert float(held.values[cell, row]) == pytest.approx(expected, abs=ROUNDING.get(name, 1e-10))
            expected = difference(item, hand.ended(hand.changed(item, 2, 3)[1]))
            assert float(through.values[0, row]) == pytest.approx(expected, abs=ROUNDING.get(name, 1e-10))


@pytest.mark.parametrize("feed_forward", ["frozen", "recomputed"])
def test_a_path_to_a_feed_forward_part_is_that_by_hand(feed_forward: Any) -> None:
    """A sequential block: its feed-forward part reads the stream with the block's own heads, held, added."""
    model = tiny("llama")
    hand = Hand("llama", model.model)
    found = path_patch(model, pairs(), ["mlp.L1"], ["L0H1", "L1H2"], feed_forward=feed_forward)
    for row, item in enumerate(pairs()):
        with torch.no_grad():
            before, _, z, _ = hand.run(item.prompt, 1)
            own = before + hand.projection(1)(z)
            held, recomputed, _ = hand.changed(item, 0, 1)
            streams = [
                own + (held if feed_forward == "frozen" else recomputed) - before,
                own + hand.changed(item, 1, 2)[2],
            ]
            for cell, stream in enumerate(streams):
                with answering([(hand.layers[1].mlp, slice(None), hand.fed(1, stream))]):
                    logits = model(input_ids=torch.tensor([item.prompt])).logits
                assert float(found.values[cell, row]) == pytest.approx(difference(item, logits), abs=1e-10)


def test_a_held_feed_forward_part_hands_nothing_on_to_another_receiver() -> None:
    """Two receivers, one behind the other: what the second gets is the direct write, not what the first makes of it."""
    model = tiny("llama")
    hand = Hand("llama", model.model)
    found = path_patch(model, pairs(), ["mlp.L1", "L2H0.q"], ["L0H1"], feed_forward="frozen")
    for row, item in enumerate(pairs()):
        with torch.no_grad():
            write = hand.changed(item, 0, 1)[2]
            before, behind, z, _ = hand.run(item.prompt, 1)
            fed = hand.fed(1, before + hand.projection(1)(z) + write)
            with answering([(hand.layers[1].mlp, slice(None), fed), hand.asked(2, "q", 0, behind + write)]):
                logits = model(input_ids=torch.tensor([item.prompt])).logits
        assert float(found.values[0, row]) == pytest.approx(difference(item, logits), abs=1e-10)


# -- in closed form ---------------------------------------------------------------------------------------------------


def frozen(model: hw.AttachedModel, items: ItemSet, senders: Any = None, **options: Any) -> Any:
    return path_patch(model, items, ["logits"], senders, feed_forward="frozen", norms="frozen", **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_with_norms_held_it_is_the_write_through_the_unembedding(name: str) -> None:
    """sigma * gamma * (W_U[answer] - W_U[foil]) . (w_corrupted - w_clean) at the last token."""
    model = tiny(name)
    hand = Hand(name, model.model)
    found = frozen(model, pairs(), ["L0H1", "L2H3"])
    for row, item in enumerate(pairs()):
        with torch.no_grad():
            end = hand.run(item.prompt, 2)[3]
            for cell, (layer, head) in enumerate(((0, 1), (2, 3))):
                expected = hand.ended_as(end, hand.changed(item, layer, head)[2], item)
                change = float(found.values[cell, row] - found.clean[row])
                assert change == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "olmo2", "granite"])
def test_with_norms_held_the_senders_sum_to_all_that_differs(name: str) -> None:
    """Heads, feed-forward parts and input together are the stream, so their effects are that of the corrupted stream
    through the clean run's norm. (With a norm behind attention, heads count at that norm's clean scale.)"""
    model = tiny(name)
    hand = Hand(name, model.model)
    parts = ["input", "mlp.L0", "mlp.L1", "mlp.L2"]
    parts += [] if name == "olmo2" else [head.label for head in model.heads()]
    found = frozen(model, pairs(), parts)
    total = (found.values - found.clean).sum(0)
    for row, item in enumerate(pairs()):
        assert item.twin is not None
        with torch.no_grad():
            clean, other = (hand.run(ids, 2)[3] for ids in (item.prompt, item.twin.prompt))
            step = other - clean
            if name == "olmo2":
                for layer in range(3):
                    here = [hand.projection(layer)(hand.run(ids, layer)[2]) for ids in (item.prompt, item.twin.prompt)]
                    step = step - (hand.added(layer, here[1]) - hand.added(layer, here[0]))
            assert float(total[row]) == pytest.approx(hand.ended_as(clean, step, item), abs=1e-10)


def test_with_norms_held_a_head_passes_the_norm_behind_its_sublayer_at_the_clean_scale() -> None:
    model = tiny("olmo2")
    hand = Hand("olmo2", model.model)
    found = frozen(model, pairs(), ["L1H2"])
    for row, item in enumerate(pairs()):
        assert item.twin is not None
        with torch.no_grad():
            z, other = (hand.run(ids, 1)[2] for ids in (item.prompt, item.twin.prompt))
            width = z.shape[-1] // hand.n_heads
            part = torch.zeros_like(z)
            part[..., 2 * width : 3 * width] = (other - z)[..., 2 * width : 3 * width]
            norm, attention = hand.layers[1].post_attention_layernorm, hand.projection(1)(z)
            scale = (attention.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            write = norm.weight * hand.projection(1)(part) * scale
            expected = hand.ended_as(hand.run(item.prompt, 2)[3], write, item)
        assert float(found.values[0, row] - found.clean[row]) == pytest.approx(expected, abs=1e-10)


def test_logits_under_a_soft_cap_are_taken_apart_before_it() -> None:
    model = tiny("gemma2")
    found = frozen(model, pairs(), ["L2H3"])
    for row, item in enumerate(pairs()):
        with torch.no_grad():
            end = Hand("gemma2", model.model).run(item.prompt, 2)[3]
            raw = model.model.lm_head(model.model.model.norm(end))
        assert float(found.clean[row]) == pytest.approx(difference(item, raw), abs=1e-5)


def test_norms_held_and_recomputed_differ_by_the_scale_alone() -> None:
    model = tiny("llama")
    run = path_patch(model, pairs(), ["logits"], feed_forward="frozen")
    held = frozen(model, pairs())
    assert run.labels == held.labels
    correlation = torch.corrcoef(torch.stack([(run.values - run.clean).mean(1), (held.values - held.clean).mean(1)]))
    assert correlation[0, 1] > 0.9
    torch.testing.assert_close(run.clean, held.clean, rtol=0, atol=1e-10)
    torch.testing.assert_close(run.corrupted, held.corrupted, rtol=0, atol=1e-10)


# -- what follows from the definition ---------------------------------------------------------------------------------


def test_the_input_is_all_that_the_first_block_reads() -> None:
    """What a receiver of the first block gets from the input is what the corrupted run gives it."""
    model = tiny("llama")
    for receiver, variable, part in (("L0H1.q", "q", "L0H1"), ("L0G1.k", "k", "L0G1"), ("L0G0.v", "v", "L0G0")):
        path = path_patch(model, pairs(), [receiver], ["input"])
        whole = patch_map(model, pairs(), variable, part)  # type: ignore[arg-type]
        torch.testing.assert_close(path.values, whole.values, rtol=0, atol=1e-10)
    parallel = tiny("gpt_neox")
    path = path_patch(parallel, pairs(), ["mlp.L0"], ["input"])
    torch.testing.assert_close(path.values, patch_map(parallel, pairs(), "mlp", "L0").values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("receivers", [["logits"], ["L1H1.q", "L2G1.v", "mlp.L2"]])
def test_batches_change_nothing(receivers: list[str]) -> None:
    """All senders of a block in one forward, or each in its own; all items, or each alone without padding."""
    model = tiny("llama")
    for feed_forward in ("recomputed", "frozen"):
        together = path_patch(model, pairs(), receivers, feed_forward=feed_forward)  # type: ignore[arg-type]
        apart = path_patch(model, pairs(), receivers, feed_forward=feed_forward, tokens=17)  # type: ignore[arg-type]
        torch.testing.assert_close(together.values, apart.values, rtol=0, atol=1e-10)
        single = replace(pairs(), items=pairs().items[:1])
        alone = path_patch(model, single, receivers, feed_forward=feed_forward)  # type: ignore[arg-type]
        torch.testing.assert_close(together.values[:, :1], alone.values, rtol=0, atol=1e-10)
    one = path_patch(model, pairs(), receivers, together.labels[2:3], feed_forward="frozen")
    torch.testing.assert_close(together.values[2:3], one.values, rtol=0, atol=1e-10)


def test_a_plan_of_the_user_s_own_makes_runs_whole() -> None:
    """Runs that begin at a block are runs from the start."""
    model = tiny("llama")
    begun = path_patch(model, pairs(), ["L1H1.q", "L2G1.v"])
    with model.editing(hw.edit.scale("L0H0", 1.0)):
        whole = path_patch(model, pairs(), ["L1H1.q", "L2G1.v"])
        patched = patch_map(model, pairs(), "mlp")
    torch.testing.assert_close(begun.values, whole.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(patched.values, patch_map(model, pairs(), "mlp").values, rtol=0, atol=1e-10)


def test_nothing_moves_between_positions() -> None:
    """To the logits only the last token counts; to k and v of a later head every token."""
    model = tiny("llama")
    for options in ({"feed_forward": "recomputed"}, {"feed_forward": "frozen", "norms": "frozen"}):
        everywhere, last, first = (
            path_patch(model, pairs(), ["logits"], ["L0H1"], scope=scope, **options)  # type: ignore[arg-type]
            for scope in ("all", "last", "span:first")
        )
        torch.testing.assert_close(everywhere.values, last.values, rtol=0, atol=1e-10)
        torch.testing.assert_close(first.values, first.clean[None], rtol=0, atol=1e-10)
    keys = [path_patch(model, pairs(), ["L1G0.v"], ["L0H1"], scope=scope).values for scope in ("all", "last")]
    assert (keys[0] - keys[1]).abs().max() > 1e-4


def test_senders_are_those_in_front_of_a_receiver() -> None:
    model, parallel = tiny("llama"), tiny("gpt_neox")
    heads = [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    assert set(path_patch(model, pairs(), ["L1H2.q"]).labels) == {*heads[:4], "mlp.L0"}
    assert set(path_patch(model, pairs(), ["mlp.L1"]).labels) == {*heads[:8], "mlp.L0"}
    assert set(path_patch(parallel, pairs(), ["mlp.L1"]).labels) == {*heads[:4], "mlp.L0"}
    several = path_patch(model, pairs(), ["L1H2.q", "L2G0.k"])
    assert set(several.labels) == {*heads[:8], "mlp.L0", "mlp.L1"}
    # A sender that only one of the receivers reads acts through that one.
    through = path_patch(model, pairs(), ["L2G0.k"], ["L1H3"]).values[0]
    torch.testing.assert_close(several.values[several.labels.index("L1H3")], through, rtol=0, atol=1e-10)
    assert set(path_patch(model, pairs(), ["logits"]).labels) == {*heads, "mlp.L0", "mlp.L1", "mlp.L2"}
    assert path_patch(model, pairs(), "logits", [Head.parse("L1H0")]).labels == ("L1H0",)


def test_where_the_metric_is_flat_paths_are_undefined() -> None:
    items = pairs()
    flat = replace(items, items=tuple(replace(e, twin=replace(e.twin, prompt=e.prompt)) for e in items))  # type: ignore[type-var]
    for options in ({}, {"feed_forward": "frozen", "norms": "frozen"}):
        found = path_patch(tiny("llama"), flat, ["logits"], ["L0H1"], **options)  # type: ignore[arg-type]
        assert found.n_undefined == 3
        assert found.effects.isnan().all()
        assert found.normalised.isnan().all()


# -- what was planted -------------------------------------------------------------------------------------------------


def planted_with(architecture: str, circuit: str, layers: int) -> tuple[Planted, hw.AttachedModel]:
    organism = planted(architecture, layers=layers, heads=4, circuits=(circuit,), seed=0)  # type: ignore[arg-type]
    return organism, hw.attach(organism.model.double(), organism.tokenizer, example=organism.example)


def edges(model: hw.AttachedModel, items: ItemSet) -> dict[tuple[str, str], float]:
    """The size of the effect of every edge from head to head."""
    receivers = [f"{head.label}.q" for head in model.heads() if head.layer]
    receivers += [f"{group.label}.{port}" for group in model.groups() if group.layer for port in "kv"]
    found = {}
    for receiver in receivers:
        senders = [head.label for head in model.heads() if head.layer < int(receiver[1])]
        effects = path_patch(model, items, [receiver], senders).normalised
        found |= {(sender, receiver): abs(float(effect)) for sender, effect in zip(senders, effects, strict=True)}
    return found


def require_exactly(found: dict[tuple[str, str], float], true: set[tuple[str, str]]) -> None:
    """The true edges are in front of all others (AUC 1), by far."""
    assert true <= found.keys()
    others = [effect for edge, effect in found.items() if edge not in true]
    assert min(found[edge] for edge in true) > 20 * max(others)


def group_of(model: hw.AttachedModel, head: Head) -> str:
    return f"L{head.layer}G{head.index // model.table.site(head.site).group_size}"


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "gpt2"])
def test_induction_is_the_previous_token_head_to_the_keys_of_the_induction_heads(architecture: str) -> None:
    """The twin has another word where the repeated one stood first, so that what follows it is not found again."""
    organism, model = planted_with(architecture, "induction", 2)
    encoded = encode(probe("repeat").over(words=(6,)), model.tokenizer, n=3)

    def without_match(each: EncodedItem) -> EncodedItem:
        assert each.twin is not None
        ((place,),), ((other,),) = each.spans["match"], each.spans["source"]
        prompt = (*each.prompt[:place], each.twin.prompt[other], *each.prompt[place + 1 :])
        return replace(each, twin=replace(each.twin, prompt=prompt))

    items = replace(encoded, items=tuple(without_match(each) for each in encoded))
    previous = organism.truth.named("previous-token").label
    keys = {f"{group_of(model, head)}.k" for head in organism.truth.heads("induction").heads}
    require_exactly(edges(model, items), {(previous, key) for key in keys})
    model.detach()


@pytest.mark.parametrize(
    "architecture", ["llama-gqa", *(pytest.param(each, marks=pytest.mark.slow) for each in ("llama", "gpt2"))]
)
def test_a_head_through_a_head_and_an_inhibitor_to_a_mover(architecture: str) -> None:
    """Same-token head -> keys of the inhibitor -> query of the mover -> logits."""
    organism, model = planted_with(architecture, "indirect-object", 3)
    items = encode(probe("ioi"), model.tokenizer, n=3)
    same, inhibitor, mover = (organism.truth.named(name) for name in ("same-token", "inhibitor", "mover"))
    true = {(same.label, f"{group_of(model, inhibitor)}.k"), (inhibitor.label, f"{mover.label}.q")}
    require_exactly(edges(model, items), true)
    for held in ("recomputed", "frozen"):
        to_logits = path_patch(model, items, ["logits"], feed_forward="frozen", norms=held)  # type: ignore[arg-type]
        assert to_logits.head_scores(model).top(1).labels == (mover.label,)
        assert to_logits.effect(mover.label) == pytest.approx(1, abs=0.1)
    model.detach()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("receivers", "senders", "message"),
    [
        (["L1H2.q"], ["L1H0"], "there is no path L1H0 -> L1H2.q"),
        (["L1H2.q"], ["L2H0"], "there is no path L2H0 -> L1H2.q"),
        (["L1H2.q"], ["mlp.L1"], "there is no path mlp.L1 -> L1H2.q"),
        (["mlp.L1"], ["mlp.L1"], "there is no path mlp.L1 -> mlp.L1"),
        (["L1G1.q"], None, "L1G1"),
        (["L1H1.k"], None, "L1H1"),
        (["L7H0.q"], None, "no receiver L7H0.q"),
        (["L1G3.k"], None, "no receiver L1G3.k"),
        (["logits"], ["L7H0"], "no sender L7H0"),
        (["logits", "L1H0.q"], None, "logits stand alone"),
        ([], None, "receivers= is empty"),
        (["logits"], [], "senders= is empty"),
        (["L0H0.q"], None, r"name senders=\['input'\]"),
        (["L1H2"], None, "write L4H2.q, L4G1.k"),
        (["logits"], 5, "senders=5 is no list of parts"),
        (None, None, "receivers=None is no list of parts"),
    ],
)
def test_paths_that_do_not_exist_are_said_in_one_line(receivers: list[str], senders: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        path_patch(tiny("llama"), pairs(), receivers, senders)
    assert "\n" not in str(caught.value)


def test_a_head_and_the_feed_forward_part_beside_it_have_no_path() -> None:
    with pytest.raises(InputError, match=r"there is no path L1H0 -> mlp\.L1.*beside it"):
        path_patch(tiny("gpt_neox"), pairs(), ["mlp.L1"], ["L1H0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward": "held"}, "neither 'recomputed' nor 'frozen'"),
        ({"norms": "folded"}, "neither 'recomputed' nor 'frozen'"),
        ({"norms": "frozen"}, r"norms='frozen' is for receivers=\['logits'\]"),
        ({"norms": "frozen", "feed_forward": "frozen", "metric": "answer-log-probability"}, "not linear in the logits"),
        ({"metric": "exact-match-generated"}, "use a metric of the logits"),
    ],
)
def test_choices_that_cannot_be_served_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        path_patch(tiny("llama"), pairs(), ["logits"], **options)


def test_twins_and_scopes_are_asked_for_first() -> None:
    model, items = tiny("llama"), pairs()
    longer = replace(items.items[0], twin=replace(items.items[0].twin, prompt=(*items.items[0].prompt, 5)))  # type: ignore[type-var]
    with pytest.raises(InputError, match=r"item the cat sat of pairs has .* tokens and its twin"):
        path_patch(model, replace(items, items=(longer,)), ["logits"])
    for options in ({}, {"feed_forward": "frozen", "norms": "frozen"}):
        with pytest.raises(Refusal, match="scope 'decode' has no position"):
            path_patch(model, items, ["logits"], scope="decode", **options)  # type: ignore[arg-type]
