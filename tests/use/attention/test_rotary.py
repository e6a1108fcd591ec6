"""Rotary dimensions against the scores that the pairs make up, and on heads that are known to need them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet, SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.rotary import rotary_of
from headwise.use.attention.rotary import RotaryDimensions, measure_from_twins

OPEN = ExitStack()


@functools.cache
def attached(name: str) -> AttachedModel:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example, name=name))


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    attached.cache_clear()


def scores(model: AttachedModel, intervention: RotaryDimensions | None) -> Tensor:
    """`[batch, head, query, key]` of layer 0 before softmax."""
    with torch.no_grad(), model.reading(hw.read.scores("L0")) as got:
        if intervention is None:
            model(**model.example)
        else:
            with intervention(model):
                model(**model.example)
    return got.scores["L0"]


def lost(model: AttachedModel, dims: list[int]) -> Tensor:
    """What these dimensions add to the scores of layer 0."""
    with torch.no_grad(), model.reading(hw.read.q("L0"), hw.read.k(model.groups("L0"))) as got:
        model(**model.example)
    q, k = got.q["L0"][..., dims], got.k["L0"][..., dims]
    share = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(share, dim=2)
    return torch.einsum("bqhd,bkhd->bhqk", q, k) * model.sites[0].qk_dim ** -0.5


@pytest.mark.parametrize("name", ["llama", "phi", "gpt_neox"])
@pytest.mark.parametrize("side", ["q", "k", "both"])
def test_a_pair_taken_out_takes_its_part_of_the_scores(name: str, side: str) -> None:
    model = attached(name)
    clean, edited = scores(model, None), scores(model, RotaryDimensions("L0H0", (0,), side=side))  # type: ignore[arg-type]
    dims = rotary_of(model)[SiteId.parse("L0")].pairs[0].tolist()
    part, seen = lost(model, dims), clean > -torch.inf
    group = model.sites[0].group_size
    concerned = [0] if side == "q" else list(range(group))
    for head in range(clean.shape[1]):
        wanted = clean[:, head] - (part[:, head] if head in concerned else 0)
        assert (edited[:, head] - wanted)[seen[:, head]].abs().max() < 1e-4
    assert part[:, 0][seen[:, 0]].abs().max() > 1e-2


def test_an_eighth_of_the_dimensions_goes_in_whole_pairs_where_no_number_is_given() -> None:
    model = hw.load("zoo:organism")  # 24 dimensions, of which an eighth holds one pair
    pairs = rotary_of(model)[SiteId.parse("L2")].pairs
    for which, expected in (("lowest", pairs[-1]), ("highest", pairs[0])):
        (found,) = RotaryDimensions("L2H1", which).dimensions(model).values()
        assert found.tolist() == expected.tolist()


def test_scaling_both_sides_scales_the_part_by_the_square() -> None:
    model = attached("llama")
    dims = rotary_of(model)[SiteId.parse("L0")].pairs[[1, 2]].flatten().tolist()
    clean, edited = scores(model, None), scores(model, RotaryDimensions("L0H2", (1, 2), factor=0.5))
    seen = clean[:, 2] > -torch.inf
    wanted = clean[:, 2] + (0.25 - 1) * lost(model, dims)[:, 2]
    assert (edited[:, 2] - wanted)[seen].abs().max() < 1e-4


def test_words_name_pairs_by_frequency() -> None:
    model = attached("llama")
    frequency = rotary_of(model)[SiteId.parse("L0")].frequency
    assert bool((frequency.diff() < 0).all())
    n, pairs = len(frequency), rotary_of(model)[SiteId.parse("L0")].pairs

    def dims(*given: object, **settings: object) -> list[int]:
        return RotaryDimensions("L0H0", *given, **settings).dimensions(model)[SiteId.parse("L0")].tolist()  # type: ignore[arg-type]

    assert dims("highest", 2) == pairs[[0, 1]].flatten().tolist()
    assert dims("lowest", 2) == pairs[[n - 2, n - 1]].flatten().tolist()
    assert dims("lowest") == pairs[[n - 1]].flatten().tolist()  # an eighth of 12 dimensions is less than a pair
    assert dims((3, 1)) == pairs[[3, 1]].flatten().tolist()
    assert len(dims("random", 3)) == 6
    assert dims("random", 3) == dims("random", 3)
    assert len({tuple(dims("random", 3, seed=seed)) for seed in range(5)}) > 1


def test_what_a_model_does_not_have_is_refused_before_anything_runs() -> None:
    with pytest.raises(Refusal, match="no rotary embedding"):
        RotaryDimensions("L0H0").edits(attached("gpt2"))
    with pytest.raises(InputError, match="no pair 6"):
        RotaryDimensions("L0H0", (6,)).edits(attached("llama"))
    with pytest.raises(InputError, match="6 pairs, and not 7"):
        RotaryDimensions("L0H0", "lowest", 7).edits(attached("llama"))


def test_position_and_content_are_in_the_pairs_in_which_they_were_planted() -> None:
    """The planted model's heads tell positions apart by their 16 fastest pairs, and contents by the others. The head
    that finds an earlier copy of a word needs the others to find it, and the fast ones to tell it from the word itself.
    """
    position, content = tuple(range(16)), tuple(range(16, 48))
    with hw.load("zoo:planted") as model:
        items = hw.encode(hw.probe("repeat"), model.tokenizer, n=2)

        def score(method: str, out: tuple[int, ...] | None) -> float:
            head = hw.find(method, model, items).top(1) if out is None else heads[method]
            heads[method] = head
            with ExitStack() as blocks:
                if out is not None:
                    blocks.enter_context(RotaryDimensions(head, out)(model))
                return float(hw.find(method, model, items).of(head.labels[0]).mean())

        heads: dict[str, HeadSet] = {}
        found = {
            (method, name): score(method, out)
            for method in ("previous-token", "duplicate-token")
            for name, out in {"clean": None, "position": position, "content": content}.items()
        }
    assert found["previous-token", "clean"] > 0.9
    assert found["previous-token", "content"] > 0.9
    assert found["previous-token", "position"] < 0.2
    assert found["duplicate-token", "clean"] > 0.9
    assert found["duplicate-token", "position"] == pytest.approx(0.5, abs=0.01)
    assert found["duplicate-token", "content"] < 0.4  # one position before the word or another


def test_the_organism_needs_high_frequencies_to_look_back_and_low_ones_to_look_up() -> None:
    with hw.load("zoo:organism") as model:
        items = hw.encode(hw.probe("needle"), model.tokenizer, n=6)
        back = hw.find("previous-token", model, items).top(12)
        up = hw.find("retrieval-proxy", model, items, proxy="mass").top(12)
        right = {
            (name, pairs): float(
                hw.measure(
                    model,
                    items,
                    "exact-match",
                    edits=RotaryDimensions(heads, pairs, count=6, side="q").edits(model),
                ).mean()
            )
            for name, heads in {"back": back, "up": up}.items()
            for pairs in ("highest", "lowest")
        }
    assert right[("back", "highest")] <= 0.2
    assert right[("back", "lowest")] >= 0.8
    assert right[("up", "highest")] >= 0.8
    assert right[("up", "lowest")] <= 0.2


def test_from_twins_every_dimension_of_every_head_is_the_twins_pattern() -> None:
    """With all of q and k from the twin, patterns are the twin's; in a model's last layer v and z stay the item's."""
    with hw.load("zoo:organism") as model:
        items = hw.encode(hw.probe("ioi"), model.tokenizer, n=5)
        last = HeadSet(model.sites[-1].heads.heads)
        everything = RotaryDimensions(last, tuple(range(len(rotary_of(model)[model.sites[-1].id].frequency))))
        found = measure_from_twins(model, items, everything, "logit-difference", batch_size=2)
        alone = measure_from_twins(model, items, everything, "logit-difference", batch_size=1)
        assert torch.allclose(found, alone, atol=1e-3)
        by_patch = []
        for item, twin in zip(items.batches(1), items.twins().batches(1), strict=True):
            with torch.no_grad(), model.reading(hw.read.rows(last)) as donor:
                model(input_ids=twin.input_ids[:, : twin.prompt_length])
            edit = hw.edit.rewrite(last, lambda pattern, here, donor=donor: donor.rows[here.label])
            with torch.no_grad(), model.editing(edit):
                logits = model(input_ids=item.input_ids[:, : item.prompt_length]).logits[0, -1]
            each = item.items[0]
            foils = torch.stack([logits[foil[0]] for foil in each.foils]).mean()
            by_patch.append(float(logits[each.answer[0]] - foils))
        assert torch.allclose(found, torch.tensor(by_patch), atol=1e-3)
        nothing = RotaryDimensions(last, (0,))
        assert (measure_from_twins(model, items, nothing) - found).abs().max() > 1e-3
        with pytest.raises(InputError, match="logits alone"):
            measure_from_twins(model, items, nothing, "kl-to-clean")
