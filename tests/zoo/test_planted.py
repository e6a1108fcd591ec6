"""Planted models: every claim of the truth against knock-out of every head, closed form and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.zoo.planted import (
    BEHAVIOURS,
    PLANTED_NAMES,
    Example,
    Planted,
    Truth,
    null,
    planted,
    planted_named,
    random_net,
)

# One seed for each architecture, so that places, codes and random weights differ as well.
SEEDS = {"llama": 0, "llama-gqa": 1, "gpt2": 2}
SIZE = 12.0
"""Logits of a full effect."""


@cache
def built(architecture: str) -> tuple[Planted, hw.AttachedModel]:
    organism = planted(architecture, seed=SEEDS[architecture])  # type: ignore[arg-type]
    return organism, attached(organism)


def attached(organism: Planted) -> hw.AttachedModel:
    return hw.attach(organism.model, tokenizer=organism.tokenizer, example=organism.example)


def padded(items: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Ids filled up on the right, where a causal model cannot see it, and the last position of each row."""
    length = max(len(item.ids) for item in items)
    ids = torch.tensor([[*item.ids, *[item.ids[-1]] * (length - len(item.ids))] for item in items])
    return ids, torch.tensor([len(item.ids) - 1 for item in items])


def last_logits(model: Any, items: Sequence[Example]) -> Tensor:
    ids, last = padded(items)
    with torch.no_grad():
        return model(input_ids=ids).logits[torch.arange(len(items)), last]


def differences(model: Any, items: Sequence[Example]) -> Tensor:
    """Answer minus foil, one for each item."""
    logits, rows = last_logits(model, items), torch.arange(len(items))
    return logits[rows, [item.answer for item in items]] - logits[rows, [item.foil for item in items]]


def unembedding_of(organism: Planted) -> Tensor:
    """With the weights of the final norm, `[vocabulary, d_model]`."""
    inner: Any = organism.model
    norm = inner.transformer.ln_f if organism.model.config.model_type == "gpt2" else inner.model.norm
    return inner.lm_head.weight.detach() * norm.weight.detach()


def solved(model: Any, items: Sequence[Example]) -> bool:
    return last_logits(model, items).argmax(dim=1).tolist() == [item.answer for item in items]


def of_each_relation(organism: Planted, behaviour: Any) -> list[Example]:
    """Items of every relation: a memory head has an effect on its own relation only."""
    found = {}
    for item in organism.examples(behaviour, 40):
        (relation,) = set(item.ids) & set(organism.lexicon.relations)
        found.setdefault(relation, item)
    assert len(found) == len(organism.lexicon.relations) == 3
    return list(found.values())


def items_of(organism: Planted, behaviour: Any) -> list[Example]:
    if behaviour in ("facts", "conflict"):
        return of_each_relation(organism, behaviour)
    return organism.examples(behaviour, 2, seed=5)


@pytest.mark.parametrize("architecture", SEEDS)
def test_solves_every_behaviour(architecture: str) -> None:
    organism, model = built(architecture)
    for behaviour in BEHAVIOURS:
        assert solved(model, items_of(organism, behaviour)), behaviour


def check_every_knock_out(organism: Planted, model: Any, heads: Sequence[Any]) -> None:
    """Where the truth has a total effect some item loses most of it; elsewhere the mean stays within the background."""
    items = {behaviour: items_of(organism, behaviour) for behaviour in BEHAVIOURS}
    batch = [item for each in items.values() for item in each]
    clean = differences(model, batch)
    for head in heads:
        with model.editing(hw.edit.zero(head.label)):
            drops = (clean - differences(model, batch)).split([len(each) for each in items.values()])
        for behaviour, drop in zip(items, drops, strict=True):
            effect = organism.truth.effect(head, behaviour)
            where = f"{head} {sorted(organism.truth.roles(head))} {behaviour} {drop.tolist()}"
            if not effect.total:
                assert drop.mean().abs() < organism.truth.background, where
                assert drop.abs().max() < 2 * organism.truth.background, where
            elif effect.size is None:
                assert drop.abs().max() > 4, where
            else:
                largest = drop[drop.abs().argmax()]
                assert largest * effect.size > 0, where  # a memory head works against what the text says
                assert largest.abs() > 0.4 * abs(effect.size), where


@pytest.mark.parametrize("architecture", SEEDS)
def test_knocking_out_each_head_does_what_the_truth_says(architecture: str) -> None:
    organism, model = built(architecture)
    check_every_knock_out(organism, model, list(model.heads()))


@pytest.mark.parametrize("architecture", SEEDS)
def test_direct_effects_are_the_closed_form(architecture: str) -> None:
    """<z W_O, gamma * (W_U[answer] - W_U[foil])> = share * strength * 12 * (1 - cosine of the two codes)."""
    organism, model = built(architecture)
    unembedding = unembedding_of(organism)
    heads = model.heads()
    seen = set()
    for behaviour in BEHAVIOURS:
        for item in items_of(organism, behaviour):
            with model.reading(hw.read.write(queries=[-1])) as got, torch.no_grad():
                model(input_ids=torch.tensor([item.ids]))
            direction = unembedding[item.answer] - unembedding[item.foil]
            answering = [fact.relation for fact in organism.lexicon.facts if fact.relation in item.ids]
            for head in heads:
                measured = float(got.write[head.label].reshape(-1) @ direction)
                expected = organism.expected_direct(head, behaviour, item)
                name = next((known.name for known in organism.truth.heads_known if known.head == head.label), "")
                if name.startswith("memory-") and organism.truth.roles(head) == {"memory"}:
                    relation = organism.lexicon.relations[int(name.removeprefix("memory-"))]
                    expected = expected if relation in answering else 0.0
                if expected:
                    # The value is read through a norm, whose factor is 1 for the embedding and a little less later.
                    assert measured == pytest.approx(expected, rel=0.1), (head, name, behaviour)
                    seen.add((head.label, behaviour))
                elif organism.truth.roles(head):
                    assert abs(measured) < 0.05, (head, name, behaviour)
                else:
                    assert abs(measured) < 1.0, (head, behaviour)
    assert seen == {(each.head, each.behaviour) for each in organism.truth.effects if each.direct}


@pytest.mark.parametrize("architecture", SEEDS)
def test_patterns_are_what_the_roles_say(architecture: str) -> None:
    organism, model = built(architecture)
    truth = organism.truth

    def attended(role: str, item: Example) -> Tensor:
        """Pattern of each head of the role: `[head, query, key]`."""
        with model.reading(hw.read.rows(truth.heads(role))) as got, torch.no_grad():
            model(input_ids=torch.tensor([item.ids]))
        return torch.stack([got.rows[head.label].reshape(len(item.ids), -1) for head in truth.heads(role)])

    (repeat,) = organism.examples("repeat", 1)
    n = len(repeat.ids)
    for role, back in (("previous-token", 1), ("offset-2", 2), ("offset-3", 3), ("offset-4", 4)):
        rows = attended(role, repeat)
        assert rows[:, range(back, n), range(n - back)].min() > 0.99, role
        assert rows[:, :back, 0].min() > 0.99, role
    assert attended("sink", repeat)[:, :, 0].min() > 0.99
    even = attended("uniform", repeat)
    assert torch.allclose(even, torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None], atol=1e-4)
    again = range(11, n)  # a first token, ten words, then the words again
    for heads, offset in (("induction", 9), ("same-token", 10)):
        assert attended(heads, repeat)[:, again, [q - offset for q in again]].min() > 0.99, heads
    assert attended("same-token", repeat)[:, :11, 0].min() > 0.99
    assert attended("induction", repeat)[:, :11, 0].min() > 0.99

    (ioi,) = organism.examples("ioi", 1)
    assert attended("mover", ioi)[:, -1, ioi.ids.index(ioi.answer)].min() > 0.98
    assert attended("name-inhibitor", ioi)[:, -1, 8].min() > 0.98
    for item in of_each_relation(organism, "conflict"):
        assert attended("context", item)[:, -1, item.ids.index(item.answer)].min() > 0.99
        (subject,) = set(item.ids) & set(organism.lexicon.subjects)
        at = [place for place, token in enumerate(item.ids) if token == subject]
        assert attended("memory", item)[:, -1, at].sum(dim=-1).max() > 0.99
    (keys,) = organism.examples("keys", 1)
    found = attended("key-copy", keys)[:, -1, keys.ids.index(keys.answer)]
    assert sorted(found.round(decimals=1).tolist()) == [0.0, 1.0]  # the back-up rests


@pytest.mark.parametrize("architecture", SEEDS)
def test_decoys_have_the_pattern_and_no_effect(architecture: str) -> None:
    organism, model = built(architecture)
    truth = organism.truth
    assert {known.decoy_of for known in truth.heads_known if known.decoy_of} == {
        *("induction", "mover", "memory", "context", "key-copy")
    }
    unembedding = unembedding_of(organism)
    for role, behaviour in (("induction", "repeat"), ("mover", "ioi"), ("key-copy", "keys")):
        (item,) = organism.examples(behaviour, 1)  # type: ignore[arg-type]
        (decoy,) = truth.decoys(role)
        writer = next(head for head in truth.heads(role) if truth.effect(head, behaviour).direct)
        with (
            model.reading(
                hw.read.rows([decoy, writer], queries=[-1]), hw.read.write([decoy, writer], queries=[-1])
            ) as got,
            torch.no_grad(),
        ):
            model(input_ids=torch.tensor([item.ids]))
        assert torch.allclose(got.rows[decoy.label], got.rows[writer.label], atol=0.02)
        lengths = [float(got.write[head.label].norm()) for head in (decoy, writer)]
        assert 0.3 < lengths[0] / lengths[1] < 3.5
        assert (unembedding @ got.write[decoy.label].reshape(-1)).abs().max() < 1e-3 * SIZE


@pytest.mark.parametrize("architecture", SEEDS)
def test_back_ups_hide_one_another(architecture: str) -> None:
    organism, model = built(architecture)
    items = organism.examples("keys", 4)
    clean = differences(model, items)
    (group,) = organism.truth.backups
    for head in group:
        with model.editing(hw.edit.zero(head)):
            assert (clean - differences(model, items)).abs().max() < 0.1 * SIZE
    with model.editing(hw.edit.zero(group)):
        assert differences(model, items).abs().max() < 0.15 * SIZE
    assert clean.min() > 0.5 * SIZE


def test_near_ties_share_one_effect() -> None:
    truth = built("llama")[0].truth
    (pair,) = truth.near_ties
    assert set(pair) == set(truth.heads("induction").labels)
    sizes = sorted(truth.effect(head, "repeat").size or 0.0 for head in pair)
    assert sizes == pytest.approx([0.48 * SIZE, 0.52 * SIZE])


def test_labels_are_several_and_find_their_heads() -> None:
    truth = built("llama")[0].truth
    assert len(truth.heads("previous-token")) == 2
    assert truth.roles(truth.named("key-shift")) == {"previous-token", "key-shift"}
    assert truth.heads("key-shift") <= truth.heads("previous-token")
    assert truth.with_effect("ioi", "direct") == truth.heads("mover")
    later = truth.heads("same-token") | truth.heads("name-inhibitor")
    assert truth.with_effect("ioi", "total") == truth.heads("mover") | later
    assert truth.with_effect("keys", "direct") == hw.HeadSet.parse(truth.named("key-copy").label)
    frame = truth.to_pandas()
    assert len(frame) == len(truth.table())
    assert set(frame["head"]) == {known.head for known in truth.heads_known}
    with pytest.raises(InputError, match=r"no head of .* has the role 'inductor'; it has .*induction"):
        truth.heads("inductor")
    with pytest.raises(InputError, match=r"no planted head 'x'; it has .*mover"):
        truth.named("x")


@pytest.mark.parametrize(
    ("strength", "sizes"), [(0.0, ()), ({"induction": 0.5}, (0.24, 0.26)), ({"induction": 2.0}, (0.96, 1.04))]
)
def test_the_dial_is_to_scale(strength: Any, sizes: tuple[float, ...]) -> None:
    organism = planted("llama", layers=2, heads=4, circuits=("induction",), strength=strength)
    truth, items = organism.truth, organism.examples("repeat", 3)
    assert sorted(each.size for each in truth.effects if each.direct) == pytest.approx([SIZE * each for each in sizes])
    with attached(organism) as model:
        measured = differences(model, items)
    expected = [sum(organism.expected_direct(e.head, "repeat", item) for e in truth.effects) + 0.0 for item in items]
    # What is left of the factor of the final norm, and the random heads.
    assert torch.allclose(measured, torch.tensor(expected), rtol=0.1, atol=1.0)
    assert solved(organism.model, items) == bool(sizes)
    if not sizes:
        assert len(truth.decoys("induction")) == 3
        assert not truth.with_effect("repeat", "total")


def test_the_dials_decide_between_context_and_memory() -> None:
    def winner(memory: float) -> list[bool]:
        organism = planted("llama", layers=2, heads=8, circuits=("memory", "context"), strength={"memory": memory})
        return [bool(each > 0) for each in differences(organism.model, of_each_relation(organism, "conflict"))]

    assert winner(0.6) == [True] * 3
    assert winner(1.4) == [False] * 3


def test_works_at_the_end_of_a_long_text() -> None:
    organism, model = built("llama")
    (short,) = organism.examples("keys", 1)
    used = {*short.ids, *organism.lexicon.names, *organism.lexicon.subjects, *organism.lexicon.objects}
    rest = [word for word in organism.lexicon.content if word not in used]
    filler = [rest[(7 * place) % len(rest)] for place in range(490)]
    item = Example((*short.ids[:-3], *filler, *short.ids[-3:]), short.answer, short.foil)
    assert solved(model, [item])
    with model.reading(hw.read.rows(organism.truth.heads("previous-token"), queries=[-1])) as got, torch.no_grad():
        model(input_ids=torch.tensor([item.ids]))
    for head in organism.truth.heads("previous-token"):
        assert got.rows[head.label].reshape(-1)[-2] > 0.99


def check_null(behaviour: Any, way: Any, architecture: Any = "llama") -> None:
    organism = null(behaviour, way, architecture, seed=7)
    items = items_of(organism, behaviour)
    truth, tag = organism.truth, {"repeat": "induction", "ioi": "mover", "facts": "memory", "keys": "key-copy"}
    role = tag.get(behaviour, "context")
    with attached(organism) as model:
        clean = differences(model, items)
        assert solved(model, items)
        decoys = truth.decoys(role)
        assert len(decoys) >= 2
        with model.editing(hw.edit.zero(decoys)):
            assert (clean - differences(model, items)).abs().max() < truth.background
        late = truth.heads(f"late-{role}")
        assert bool(set(truth.with_effect(behaviour, "direct")) & set(late)) == (way == "heads")
        assert late <= truth.with_effect(behaviour, "total")
        with model.editing(hw.edit.zero(late)):
            assert not solved(model, items)
        if way == "mlp":
            with model.editing(hw.edit.zero(f"L{organism.model.config.num_hidden_layers - 1}", variable="mlp")):
                assert not solved(model, items)
    with pytest.raises(InputError, match=f"has the role '{role}'"):
        truth.heads(role)


QUICK_NULLS = (("repeat", "heads"), ("ioi", "heads"), ("facts", "mlp"))


@pytest.mark.parametrize(("behaviour", "way"), QUICK_NULLS)
def test_a_null_solves_it_without_the_heads_in_question(behaviour: str, way: str) -> None:
    check_null(behaviour, way)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SEEDS)
@pytest.mark.parametrize("way", ["heads", "mlp"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_null_on_every_architecture(behaviour: str, way: str, architecture: str) -> None:
    check_null(behaviour, way, architecture)


def test_in_a_random_net_every_head_has_some_effect() -> None:
    organism = random_net("llama", layers=2, heads=4, seed=3)
    items = organism.examples("repeat", 4)
    assert organism.truth.kind == "random"
    assert not organism.truth.table()
    with attached(organism) as model:
        clean = differences(model, items)
        for head in model.heads():
            with model.editing(hw.edit.zero(head.label)):
                assert (clean - differences(model, items)).abs().mean() > 0.05, head


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SEEDS)
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_other_seeds(architecture: Any, seed: int) -> None:
    organism = planted(architecture, seed=seed)
    with attached(organism) as model:
        for behaviour in BEHAVIOURS:
            assert solved(model, items_of(organism, behaviour)), behaviour
        check_every_knock_out(organism, model, list(model.heads()))


@pytest.mark.slow
def test_a_large_one_is_solved_and_its_truth_holds() -> None:
    organism = planted("llama", layers=24, heads=16, seed=1)
    with attached(organism) as model:
        for behaviour in BEHAVIOURS:
            assert solved(model, items_of(organism, behaviour)), behaviour
        known = {each.head for each in organism.truth.heads_known}
        others = [head for head in model.heads() if head.label not in known]
        check_every_knock_out(organism, model, [*hw.HeadSet.parse(list(known)), *others[::40]])


def test_the_seed_decides_weights_and_places_and_nothing_else_is_drawn() -> None:
    before = torch.get_rng_state()
    small = {"layers": 2, "heads": 4, "circuits": ("induction",)}
    first, again, other = (planted("llama", seed=seed, **small) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    assert first.truth == again.truth
    assert first.truth.heads_known != other.truth.heads_known
    weights, same, changed = (each.model.state_dict() for each in (first, again, other))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not any(torch.equal(weights[name], changed[name]) for name in weights)


def test_saves_as_an_ordinary_checkpoint_with_its_truth(tmp_path: Path) -> None:
    organism, model = built("llama-gqa")
    organism.save(tmp_path)
    assert Truth.load(tmp_path) == organism.truth
    loaded = hw.load(tmp_path)
    assert isinstance(loaded.model, transformers.LlamaForCausalLM)
    items = organism.examples("ioi", 1)
    assert torch.equal(last_logits(loaded, items), last_logits(model, items))
    assert loaded.tokenizer("When").input_ids[0] == organism.lexicon.bos
    loaded.detach()
    (tmp_path / "truth.json").write_text("{}")
    with pytest.raises(InputError, match="no stored truth"):
        Truth.load(tmp_path)


def test_ordinary_text_reaches_the_circuits() -> None:
    organism, _ = built("llama")
    tokenizer = organism.tokenizer
    assert tokenizer is not None
    for text, answer in (
        ("When Mary and John went to the store, John gave a bottle to", " Mary"),
        ("The capital of France is", " Paris"),
        ("Question: What is the capital of France?\nAnswer:", " Paris"),
        ("Text: The capital of France is Rome.\nQuestion: What is the capital of France?\nAnswer:", " Rome"),
        (
            "The password of the park is horse.\nThe password of the store is copper.\nThe password of the park is",
            " horse",
        ),
        ("3a: horse\n4b: copper\n3b: goat\n4b:", " copper"),
        ("Words: horse copper goat ball stone horse copper goat", " ball"),
    ):
        with torch.no_grad():
            logits = organism.model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        assert tokenizer.decode(int(logits.argmax())) == answer, text


def test_bfloat16_solves_it_as_well() -> None:
    organism = planted_named("planted", dtype=torch.bfloat16)
    assert organism.model.dtype == torch.bfloat16
    for behaviour in BEHAVIOURS:
        assert solved(organism.model, items_of(organism, behaviour)), behaviour


def test_grouped_heads_share_keys_and_values() -> None:
    config = built("llama-gqa")[0].model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert set(PLANTED_NAMES.values()) == set(SEEDS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "bert"}, "no planted architecture 'bert'; choose from llama, "),
        ({"circuits": ("iduction",)}, "no planted circuit 'iduction'; choose from patterns, "),
        ({"circuits": ()}, "no planted circuit was named"),
        ({"layers": 2}, "4 layers deep and the model has 2; use layers=4"),
        ({"heads": 7}, "an even number of heads"),
        ({"heads": 2}, "do not fit into 4 layers of 2 heads"),
        ({"strength": {"previous-token": 2.0}}, "no strength can be set for previous-token; choose from induction"),
        ({"strength": -1.0}, "strength induction=-1.0.* is out of range; give numbers from 0 to 3"),
    ],
)
def test_bad_input_is_one_clear_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        planted(**options)
    assert "\n" not in str(caught.value)


def test_bad_names_are_one_clear_line() -> None:
    with pytest.raises(InputError, match="no planted behaviour 'copy'; choose from repeat, "):
        null("copy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="way='heads' or way='mlp', not 'luck'"):
        null("repeat", "luck")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no planted model 'plant'; choose from planted, "):
        planted_named("plant")


@pytest.mark.parametrize("name", PLANTED_NAMES)
def test_the_doctor_finds_nothing_wrong_with_those_of_the_zoo(name: str) -> None:
    with hw.load(f"zoo:{name}") as model:
        assert model.name == f"zoo:{name}"
        report = model.doctor()
    assert report.passed, report


@pytest.mark.parametrize("name", PLANTED_NAMES)
@pytest.mark.parametrize(
    ("id", "settings"), [("repeat", {}), ("ioi", {}), ("facts", {}), ("conflict", {"trust": "context"})]
)
def test_the_probes_are_solved_as_text(name: str, id: str, settings: dict[str, str]) -> None:
    with hw.load(f"zoo:{name}") as model:
        items = hw.encode(hw.probe(id).over(**settings), model.tokenizer, n=16)
        assert hw.measure(model, items, "exact-match").mean() == 1


@pytest.mark.parametrize("strength", ["high", True, {"mover": "2"}, None])
def test_a_strength_is_a_number(strength: Any) -> None:
    with pytest.raises(InputError, match="strength takes a number"):
        planted(strength=strength)


def test_the_truth_does_not_answer_a_typo_with_nothing() -> None:
    truth = built("llama")[0].truth
    for ask, said in (
        (lambda: truth.with_effect("induction", "total"), "no planted behaviour 'induction'"),
        (lambda: truth.with_effect("ioi", "indirect"), "an effect is direct or total"),
        (lambda: truth.effect("L0H0", "iio"), "no planted behaviour 'iio'"),
        (lambda: truth.decoys("inductoin"), "has no decoy of 'inductoin'"),
        (lambda: planted(circuits="induction"), "circuits takes a list of names"),
    ):
        with pytest.raises(InputError, match=said):
            ask()


def test_a_memory_head_writes_on_items_of_its_relation_only() -> None:
    organism, _ = built("llama")
    for item in of_each_relation(organism, "facts"):
        expected = [organism.expected_direct(head, "facts", item) for head in organism.truth.heads("memory")]
        assert sum(value != 0 for value in expected) == 1
