"""Letter heads: on a model of which every weight is known, under every place of the right letter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.find import find
from headwise.find.correct_letter import _classed, correct_letter, letter_classes
from headwise.heads import Head, SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet

BOS, ASK, LETTERS, MARKED = 1, 2, (8, 9, 10, 11), (12, 13, 14, 15)
"""Each letter has two tokens; the marked one stands where the right option does."""

VOCAB, HEAD_DIM = 20, 20
FIRST, SECOND = SiteId(layer=0), SiteId(layer=1)
STRENGTH = {"correct": 0.5, "single": 0.02, "uniform": 0.06, "amplification": 0.1}


def made() -> Any:
    """A GPT-2 without feed-forward parts or positions. Tokens are one-hot in one part of the stream, the logits read
    another. In the first layer, after the question, L0H0 attends to the marked letter, L0H1 to the first letter of the
    list's four, L0H2 to all, L0H3 to the bos token; L1H0 attends to where it stands and writes what is there for the
    logits once more. A letter is written as itself; a marked one a little more, but by the first head, which sees no
    other."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=4 * HEAD_DIM, n_layer=2, n_head=4, n_positions=64, n_inner=8, tie_word_embeddings=False
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, :VOCAB] = torch.eye(VOCAB)
        model.lm_head.weight[:, VOCAB : 2 * VOCAB] = torch.eye(VOCAB)
        as_letter = torch.eye(VOCAB)
        for letter, marked in zip(LETTERS, MARKED, strict=True):
            as_letter[marked] = torch.eye(VOCAB)[letter]
        more = as_letter.clone()
        more[list(MARKED)] *= 2
        first, second = (block.attn for block in model.transformer.h)
        looks: list[Mapping[int, float]] = [
            dict.fromkeys(MARKED, 9.0),
            {LETTERS[0]: 9.0, MARKED[0]: 9.0},
            dict.fromkeys((*LETTERS, *MARKED), 9.0),
            {BOS: 9.0},
        ]
        for head, look in enumerate(looks):
            attend(first, head, look)
        for head, (kind, turn) in enumerate({"correct": as_letter, "single": more, "uniform": more}.items()):
            write(first, head, slice(0, VOCAB), STRENGTH[kind] * turn)
        attend(second, 0, {ASK: 9.0})
        write(second, 0, slice(VOCAB, 2 * VOCAB), STRENGTH["amplification"] * torch.eye(VOCAB))
    return model


def attend(attention: Any, head: int, look: Mapping[int, float]) -> None:
    """After the question, to these tokens."""
    columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    wanted = torch.zeros(VOCAB)
    for token, score in look.items():
        wanted[token] = score
    attention.c_attn.weight[ASK, columns] = wanted.double()
    keys = slice(4 * HEAD_DIM + columns.start, 4 * HEAD_DIM + columns.stop)
    attention.c_attn.weight[:VOCAB, keys] = torch.eye(VOCAB).double()


def write(attention: Any, head: int, part: slice, turn: Tensor) -> None:
    """What is read of a part of the stream, turned, into the part that the logits read."""
    start = head * HEAD_DIM
    attention.c_attn.weight[part, 8 * HEAD_DIM + start : 8 * HEAD_DIM + start + VOCAB] = turn.double()
    attention.c_proj.weight[start : start + VOCAB, VOCAB : 2 * VOCAB] = torch.eye(VOCAB).double()


@pytest.fixture(scope="module")
def model() -> Iterator[AttachedModel]:
    with hw.attach(made(), name="letters") as attached:
        yield attached


@pytest.fixture(scope="module")
def choices(twinned: Callable[..., ItemSet]) -> ItemSet:
    """The right letter in every place, and in the twin in every other; prompts of three lengths."""
    rows, spans = [], []
    for right, other in permutations(range(4), 2):
        filler = (3,) * (right % 3)

        def text(which: int, filler: tuple[int, ...] = filler) -> tuple[int, ...]:
            options = [token for place in range(4) for token in ((MARKED if place == which else LETTERS)[place], 5)]
            return (BOS, *filler, *options, ASK)

        places = tuple((1 + len(filler) + 2 * place,) for place in range(4))
        rows.append((text(right), text(other), (LETTERS[right],), [(LETTERS[p],) for p in range(4) if p != right]))
        spans.append({"letters": places, "letter": (places[right],)})
    return twinned(*rows, spans=spans)


def by_hand(network: Any, item: EncodedItem) -> tuple[Tensor, float]:
    """What each head itself adds to the logit difference at the last token, by the weights, in the order of `sites`,
    less what it adds in the twin's run, the final norm as in the clean run; and the whole difference of the two."""
    weights = network.lm_head.weight.detach()
    wrong = torch.stack([weights[foil[0]] for foil in item.foils]).mean(0)
    direction = weights[item.answer[0]] - wrong
    written, scales, values = [], [], []
    assert item.twin is not None
    for prompt in (item.prompt, item.twin.prompt):
        z: list[Tensor] = []
        handles = [
            block.attn.c_proj.register_forward_pre_hook(lambda module, args, z=z: z.append(args[0][0, -1]))
            for block in network.transformer.h
        ]
        with torch.no_grad():
            output = network(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        for handle in handles:
            handle.remove()
        stream = output.hidden_states[0][0, -1]
        parts = []
        for block, every in zip(network.transformer.h, z, strict=True):
            for head in range(4):
                part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                parts.append(every[part] @ block.attn.c_proj.weight[part].detach())
                stream = stream + parts[-1]
        written.append(torch.stack(parts))
        scales.append(float((stream.var(unbiased=False) + network.transformer.ln_f.eps).rsqrt()))
        values.append(float(output.logits[0, -1] @ direction_of(item)))
    change = (written[0] - written[1]) * scales[0]
    return (change - change.mean(-1, keepdim=True)) @ direction, values[0] - values[1]


def direction_of(item: EncodedItem) -> Tensor:
    found = torch.zeros(VOCAB, dtype=torch.float64)
    found[item.answer[0]] = 1
    found[[foil[0] for foil in item.foils]] = -1 / len(item.foils)
    return found


def test_the_effect_is_the_one_by_the_weights(model: AttachedModel, choices: ItemSet) -> None:
    found = correct_letter(model, choices)
    joined = torch.cat([found[FIRST], found[SECOND]], dim=1)
    parts, wholes = zip(*(by_hand(model.model, item) for item in choices), strict=True)
    expected = torch.stack(parts) / torch.tensor(wholes, dtype=torch.float64).mean()
    torch.testing.assert_close(joined, expected, rtol=1e-6, atol=1e-9)
    assert expected[:, 0].min() > 0.3
    assert expected[:, [3, 5, 6, 7]].abs().max() < 1e-9
    # Without a feed-forward part heads have all of it, and the two runs are scaled alike but for who is marked.
    torch.testing.assert_close(joined.mean(0).sum(), torch.tensor(1.0).double(), rtol=0.02, atol=0)


def test_attention_goes_to_the_right_letter(model: AttachedModel, choices: ItemSet) -> None:
    found = correct_letter(model, choices, of="attention")[FIRST]
    first = torch.tensor([float(each.spans["letter"] == each.spans["letters"][:1]) for each in choices]).double()
    torch.testing.assert_close(found[:, 0], torch.ones(12).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 1], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 2], torch.full((12,), 0.25).double(), rtol=0, atol=1e-6)
    assert found[:, 3].max() < 1e-6
    alone = torch.cat(
        [correct_letter(model, replace(choices, items=(each,)), of="attention")[FIRST] for each in choices]
    )
    torch.testing.assert_close(found, alone)


def test_classes_are_those_that_the_heads_were_made_for(model: AttachedModel, choices: ItemSet) -> None:
    found = letter_classes(model, choices, share=0.9999)
    kinds = {each.head.label: each.kind for each in found}
    assert kinds == {"L0H0": "correct-letter", "L0H1": "single-letter", "L0H2": "uniform", "L1H0": "amplification"}
    assert found[0].head.label == "L0H0"
    assert [each.effect for each in found] == sorted((each.effect for each in found), reverse=True)
    assert found[0].places == pytest.approx([0.25] * 4)
    assert found[0].right == pytest.approx(1)
    by_label = {each.head.label: each for each in found}
    assert by_label["L0H1"].places == pytest.approx([1, 0, 0, 0], abs=1e-6)
    assert by_label["L0H1"].right == pytest.approx(0.25)
    assert by_label["L1H0"].itself > 0.95


def test_the_criteria_decide(model: AttachedModel, choices: ItemSet) -> None:
    (first,) = letter_classes(model, choices, share=0.3)
    assert (first.head.label, first.kind) == ("L0H0", "correct-letter")
    two = letter_classes(model, choices, share=first.effect + 0.01)
    assert len(two) == 2
    strict = {each.head.label: each.kind for each in letter_classes(model, choices, share=0.9999, most=1.0)}
    assert strict["L0H2"] == "uniform"
    assert strict["L0H1"] == "uniform"  # nothing is more than all of it


@pytest.mark.parametrize(
    ("right", "itself", "places", "kind"),
    [
        (0.36, 0.0, (0.36, 0.1, 0.07, 0.07), "correct-letter"),
        (0.1, 0.0, (0.4, 0.1, 0.05, 0.05), "single-letter"),
        (0.15, 0.4, (0.15, 0.15, 0.15, 0.15), "uniform"),
        (0.05, 0.7, (0.05, 0.05, 0.05, 0.05), "amplification"),
        (0.4, 0.3, (0.4, 0.0, 0.0, 0.05), "other"),
    ],
)
def test_most_is_of_what_letters_get(right: float, itself: float, places: tuple[float, ...], kind: str) -> None:
    found = _classed(0.1, Head(FIRST, 0), torch.tensor([right, itself, *places]), 0.5, 0.5)
    assert found.kind == kind
    assert found.places == pytest.approx(places)


def test_the_best_head_is_found(model: AttachedModel, choices: ItemSet) -> None:
    scores = find("correct-letter", model, choices)
    assert scores.top(1).labels == ("L0H0",)
    assert scores.provenance.settings == {"of": "effect"}


def test_what_cannot_be_asked_for(model: AttachedModel, choices: ItemSet) -> None:
    with pytest.raises(InputError, match="choose from effect, attention"):
        find("correct-letter", model, choices, of="letter")
    for settings, said in (({"share": 0.0}, "share=0.0"), ({"attends": 1.5}, "attends=1.5"), ({"most": -1}, "most=-1")):
        with pytest.raises(InputError, match=said):
            letter_classes(model, choices, **settings)
    bare = replace(choices, items=tuple(replace(each, spans={"letter": each.spans["letter"]}) for each in choices))
    with pytest.raises(InputError, match="has not the spans letters"):
        letter_classes(model, bare)
    one = choices.items[0]
    shorter = replace(one, spans={**one.spans, "letters": one.spans["letters"][:3]})
    with pytest.raises(InputError, match="3 to 4 letters"):
        letter_classes(model, replace(choices, items=(shorter, *choices.items[1:])))
