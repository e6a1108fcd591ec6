"""Important-head training: the importance against autograd by a factor, the switch, and the comparison."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.fit.important_heads import importance, important_heads, specialisation, train_important_heads
from headwise.fit.tasks import Task, classifying
from headwise.fit.training import Schedule
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item


@pytest.fixture(scope="module")
def organism() -> Iterator[hw.AttachedModel]:
    with hw.load("zoo:organism") as model:
        yield model


def task_of(model: hw.AttachedModel, name: str, n: int = 12) -> Task:
    items = hw.encode(hw.probe(name), model.tokenizer, n=2 * n)
    return Task(
        name, items.only([i < n for i in range(2 * n)], "other half"), items.only([i >= n for i in range(2 * n)], "x")
    )


def test_importance_is_the_derivative_at_every_token() -> None:
    built = zoo.build("tiny-llama")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model:
        words = ("cat", "dog", "owl", "ant")
        made = [Item(id=w, prompt=f"the {w} ran {'far ' * n}off", answer=f" {w}") for n, w in enumerate(words)]
        other = [Item(id=f"x{w}", prompt=f"a {w}", answer=f" {w}") for w in words]
        task = Task("t", hw.encode(made, model.tokenizer), hw.encode(other, model.tokenizer))
        found = importance(model, task)
        tokens, expected = 0, 0.0
        for batch in task.items.batches(1):  # one by one, and by a factor on z at each position alone
            (item,) = batch.items
            length = len(item.prompt) + len(item.answer) - 1
            factor = torch.ones(length, requires_grad=True)

            def scaled(z: torch.Tensor, here: object, factor: torch.Tensor = factor) -> torch.Tensor:
                return z * factor[None, :, None, None]

            with model.editing(hw.edit.set("L1H2", scaled)):
                task.losses(model, batch).sum().backward()
            expected += float(factor.grad.abs().sum())
            tokens += length
        assert found[model.heads("L1H2").heads[0]] == pytest.approx(expected / tokens, rel=1e-4)
        assert len(found) == len(model.heads())


def test_the_heads_of_a_task_are_its_top_share(organism: hw.AttachedModel) -> None:
    tasks = [task_of(organism, name) for name in ("facts", "ioi")]
    shared = important_heads(organism, tasks, share=0.3)
    for task in tasks:
        scores = importance(organism, task)
        inside = min(scores[head] for head in shared[task.name])
        assert len(shared[task.name]) == 21  # 30 percent of 72, rounded down as in the released code
        assert all(scores[head] <= inside for head in scores if head not in set(shared[task.name]))
    both = set(shared["facts"]) & set(shared["ioi"])
    assert both
    own = important_heads(organism, tasks, share=0.3, shared=False)
    for name in own:
        assert set(own[name]) == set(shared[name]) - both


def test_both_ways_go_on_from_one_start(organism: hw.AttachedModel) -> None:
    tasks = [task_of(organism, name) for name in ("facts", "ioi")]
    before = {name: tensor.clone() for name, tensor in organism.model.state_dict().items()}
    found = train_important_heads(
        organism, tasks, Schedule(steps=4, learning_rate=1e-4), start=0.5, batch_size=4, seed=1
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in organism.model.state_dict().items())
    assert found.heads == important_heads(found.before.copy.model, tasks, share=0.3)
    counts = [len(each.copy.trained.losses) for each in (found.before, found.important, found.plain)]
    assert counts == [2, 2, 2]
    # The same weights and the same batch: the first loss behind the switch is one number.
    assert found.important.copy.trained.losses[0] == pytest.approx(found.plain.copy.trained.losses[0], abs=1e-5)
    assert found.important.copy.trained.losses[0] != pytest.approx(found.before.copy.trained.losses[0], abs=1e-5)
    free = set(organism.heads()) - set(found.heads["facts"]) - set(found.heads["ioi"])
    assert free
    state, was = found.important.copy.model.model.state_dict(), found.before.copy.model.model.state_dict()
    head = sorted(free)[0]
    rows = slice(head.index * 24, head.index * 24 + 24)
    key = f"model.layers.{head.site.layer}.self_attn.q_proj.weight"
    assert torch.equal(state[key][rows], was[key][rows])
    assert not torch.equal(found.plain.copy.model.model.state_dict()[key][rows], was[key][rows])
    assert found.before.dissociation.performance.shape == (2, 2)
    assert found.plain.accuracy.keys() == {"facts", "ioi"}
    for each in (found.before, found.important, found.plain):
        each.copy.model.detach()


def test_specialisation_is_that_of_the_heads_taken_out(organism: hw.AttachedModel) -> None:
    tasks = [task_of(organism, name) for name in ("facts", "ioi")]
    found = specialisation(organism, tasks, share=0.3, seed=2)
    heads = important_heads(organism, tasks, share=0.3)
    for row, of in enumerate(tasks):
        for column, on in enumerate(tasks):
            value = hw.measure(organism, on.held_out, "exact-match", edits=[hw.edit.zero(heads[of.name])]).mean()
            assert found.performance[row, column] == pytest.approx(float(value))
    d = 100 * (found.performance[0, 1] - found.performance[0, 0]) / found.base[0]
    assert found.original[0] == pytest.approx(d)
    assert found.random_performance.shape == (3, 2)


def test_an_encoder_takes_part_by_its_embedding() -> None:
    built = zoo.build("tiny-bert")
    with hw.attach(built.model, built.tokenizer, example=built.example) as model:

        def made(name: str, words: tuple[str, str], start: int) -> ItemSet:
            items = [
                Item(
                    id=f"{name}/{start + n}", prompt=f"{words[n % 2]} {'so ' * (1 + n % 4)}", answer=f" {words[n % 2]}"
                )
                for n in range(8)
            ]
            return hw.encode(items, model.tokenizer, name=name)

        tasks = [
            classifying(model, name, made(name, words, 0), made(name, words, 100))
            for name, words in (("animals", ("cat", "dog")), ("colours", ("red", "blue")))
        ]
        found = train_important_heads(model, tasks, Schedule(steps=20, learning_rate=3e-3), start=0.8, share=0.25)
        assert {name: len(heads) for name, heads in found.heads.items()} == {"animals": 3, "colours": 3}
        for each in (found.before, found.important, found.plain):
            assert set(each.accuracy) == {"animals", "colours"}
            each.copy.model.detach()


def test_bad_calls_are_refused(organism: hw.AttachedModel) -> None:
    tasks = [task_of(organism, name, 2) for name in ("facts", "ioi")]
    with pytest.raises(InputError, match="give two or more"):
        train_important_heads(organism, tasks[:1], Schedule(steps=2))
    with pytest.raises(InputError, match="leaves none for important heads"):
        train_important_heads(organism, tasks, Schedule(steps=2), start=1.0)
    with pytest.raises(InputError, match="all important heads of facts are shared"):
        important_heads(organism, [tasks[0], Task("again", tasks[0].items, tasks[0].held_out)], shared=False)
