"""Tasks: losses and accuracy against what they are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.fit.tasks import Task, classifying
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.probes.outcome import observe


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def sentences(model: hw.AttachedModel, words: str, start: int = 0) -> ItemSet:
    items = [
        Item(id=f"{words}/{start + n}", prompt=f"the {word} ran {'very ' * (n % 3)}far", answer=f" {word}")
        for n, word in enumerate(words.split() * 4)
    ]
    return hw.encode(items, model.tokenizer, name=words)


def test_a_written_answer_has_the_loss_and_the_match_of_the_metrics() -> None:
    with attached("tiny-llama") as model:
        items, held_out = sentences(model, "cat dog"), sentences(model, "cat dog", 100)
        task = Task("animals", items, held_out)
        (batch,) = items.batches(8)
        assert torch.equal(task.losses(model, batch), hw.measure(model, items, "cross-entropy"))
        assert task.accuracy(model) == float(hw.measure(model, held_out, "exact-match").mean())


def test_a_class_is_read_off_the_embedding() -> None:
    with attached("tiny-bert") as model:
        items = sentences(model, "cat dog owl")
        task = classifying(model, "animals", items, sentences(model, "cat dog", 100))
        assert task.classes == (" cat", " dog", " owl")
        (batch,) = items.batches(12)
        embedding = observe(model, batch, wants={"embedding"}).embedding
        logits = embedding @ task.readout.weight.T + task.readout.bias
        wanted = torch.tensor([0, 1, 2] * 4)
        expected = -logits.log_softmax(-1)[torch.arange(12), wanted]
        torch.testing.assert_close(task.losses(model, batch), expected)
        assert torch.equal(task.right(model, batch), (logits.argmax(-1) == wanted).float())
        one_by_one = torch.cat([task.losses(model, each) for each in items.batches(1)])
        torch.testing.assert_close(one_by_one, expected, atol=1e-5, rtol=0)
        again = classifying(model, "animals", items, sentences(model, "cat dog", 100))
        assert torch.equal(task.readout.weight, again.readout.weight)


def test_bad_tasks_are_refused() -> None:
    with attached("tiny-bert") as model:
        items = sentences(model, "cat dog")
        with pytest.raises(InputError, match="trained on and held out"):
            Task("animals", items, items)
        with pytest.raises(InputError, match="needs a name without '/'"):
            Task("a/b", items, sentences(model, "cat dog", 100))
        with pytest.raises(InputError, match="needs a name without '/', items"):
            Task("animals", replace(items, items=()), items)
        with pytest.raises(InputError, match="classes and a readout go together"):
            Task("animals", items, sentences(model, "cat dog", 100), classes=("a", "b"))
        with pytest.raises(InputError, match="a class that is not trained on"):
            classifying(model, "animals", items, sentences(model, "cat owl", 100))
        with pytest.raises(InputError, match="the classes"):
            classifying(model, "animals", sentences(model, "cat"), sentences(model, "cat", 100))
