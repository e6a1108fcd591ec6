"""Gradient checkpointing: layers are recomputed in backward, and must meet there the very edits they met before.

The second way is the same model without checkpointing and, for the gates, a parameter that a plain torch hook
multiplies into the input of the projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

import headwise as hw
from headwise import zoo
from headwise.zoo import Organism

MODELS = ("tiny-llama", "tiny-gpt2", "tiny-qwen3_next")
EDITS = (hw.edit.scale("L1H1", 0.5), hw.edit.uniform("L2H2"), hw.edit.zero("L1", variable="mlp"))


@pytest.fixture
def trainee(request: pytest.FixtureRequest) -> Organism:
    organism = zoo.build(request.param)
    for module in organism.model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    organism.model.train()
    return organism


def use_checkpointing(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture(params=[False, True], ids=["not reentrant", "reentrant"])
def reentrant(request: pytest.FixtureRequest) -> Iterator[bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield request.param


def loss_of(organism: Organism) -> Tensor:
    return organism.model(**organism.example, labels=organism.example["input_ids"]).loss


@dataclass(frozen=True)
class Result:
    logits: Tensor
    gates: dict[str, Tensor]
    z: dict[str, Tensor]
    weights: dict[str, Tensor]


def train_step(organism: Organism) -> Result:
    """One forward and backward under `EDITS`, with everything that has a gradient."""
    organism.model.zero_grad()
    with hw.attach(organism.model) as attached:
        labels = [site.label for site in attached.sites]
        with attached.editing(*EDITS), attached.reading(hw.read.gate(), hw.read.z(grad=True)) as got:
            output = organism.model(**organism.example, labels=organism.example["input_ids"])
            output.loss.backward()
            assert {len(got.z.pieces(label)) for label in labels} == {1}  # recomputed, not appended
        gates, z = ({label: read.grad[label] for label in labels} for read in (got.gate, got.z))
    weights = {name: p.grad for name, p in organism.model.named_parameters() if p.grad is not None}
    return Result(output.logits.detach(), gates, z, weights)


@pytest.mark.parametrize("trainee", MODELS, indirect=True)
def test_checkpointing_changes_no_number(trainee: Organism, reentrant: bool) -> None:
    expected = train_step(trainee)
    use_checkpointing(trainee.model, reentrant)
    found = train_step(trainee)
    assert torch.equal(found.logits, expected.logits)
    for name in ("gates", "z", "weights"):
        assert getattr(found, name).keys() == getattr(expected, name).keys()
        for label, value in getattr(expected, name).items():
            torch.testing.assert_close(getattr(found, name)[label], value, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("trainee", ["tiny-llama", "tiny-gpt2"], indirect=True)
def test_gate_gradients_under_checkpointing_are_those_of_a_parameter(trainee: Organism, reentrant: bool) -> None:
    shape = (*trainee.example["input_ids"].shape, 4, 1)
    with hw.attach(trainee.model) as attached:
        projections = {site.label: trainee.model.get_submodule(str(site.projection)) for site in attached.sites}
    gates = {label: torch.ones(shape, requires_grad=True) for label in projections}

    def multiplied(gate: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return ((args[0].unflatten(-1, (4, -1)) * gate).flatten(-2),)

        return hook

    hooks = [projections[label].register_forward_pre_hook(multiplied(gates[label])) for label in projections]
    loss_of(trainee).backward()
    for hook in hooks:
        hook.remove()
    use_checkpointing(trainee.model, reentrant)
    with hw.attach(trainee.model) as attached, attached.reading(hw.read.gate()) as got:
        loss_of(trainee).backward()
    for label, gate in gates.items():
        assert gate.grad is not None
        torch.testing.assert_close(got.gate.grad[label], gate.grad[..., 0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("trainee", ["tiny-llama"], indirect=True)
def test_backward_outside_the_block_is_a_conflict(trainee: Organism, reentrant: bool) -> None:
    use_checkpointing(trainee.model, reentrant)
    with hw.attach(trainee.model) as attached:
        with attached.editing(*EDITS):
            loss = loss_of(trainee)
        with pytest.raises(hw.PlanConflict, match="call backward inside the block"):
            loss.backward()


@pytest.mark.parametrize("trainee", ["tiny-llama"], indirect=True)
def test_backward_under_another_plan_is_a_conflict(trainee: Organism, reentrant: bool) -> None:
    use_checkpointing(trainee.model, reentrant)
    with hw.attach(trainee.model) as attached:
        with attached.editing(*EDITS):
            loss_of(trainee).backward()
        plain = loss_of(trainee)

        def backward_of_a_plain_forward() -> None:
            with attached.editing(*EDITS):
                plain.backward()

        with pytest.raises(hw.PlanConflict, match="under another plan"):
            backward_of_a_plain_forward()


@pytest.mark.parametrize("trainee", ["tiny-llama"], indirect=True)
def test_a_checkpoint_around_the_whole_model_is_a_conflict(trainee: Organism) -> None:
    """A forward that is made anew in backward is no run of its own: it would wipe what the first one left."""
    with hw.attach(trainee.model) as attached, attached.editing(*EDITS) as opened:
        loss = checkpoint(loss_of, trainee, use_reentrant=False)
        with pytest.raises(hw.PlanConflict):
            loss.backward()
        assert [fired.calls for fired in opened.fired] == [1, 1, 1]


@pytest.mark.parametrize("trainee", ["tiny-llama"], indirect=True)
def test_several_forwards_and_then_backward_is_a_conflict(trainee: Organism, reentrant: bool) -> None:
    use_checkpointing(trainee.model, reentrant)
    with hw.attach(trainee.model) as attached, attached.editing(*EDITS):
        first, second = loss_of(trainee), loss_of(trainee)
        with pytest.raises(hw.PlanConflict, match="several forwards"):
            (first + second).backward()


@pytest.mark.parametrize("trainee", ["tiny-llama"], indirect=True)
def test_training_goes_on_with_and_without_a_plan(trainee: Organism, reentrant: bool) -> None:
    """Steps in turn, forwards without gradients between them, and plain steps after the block."""

    def gradients(loss: Tensor) -> list[Tensor]:
        trainee.model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in trainee.model.parameters() if p.grad is not None]

    plain = gradients(loss_of(trainee))
    use_checkpointing(trainee.model, reentrant)
    with hw.attach(trainee.model) as attached:
        with attached.editing(*EDITS):
            edited = gradients(loss_of(trainee))
            with torch.no_grad():
                loss_of(trainee)
            again = gradients(loss_of(trainee))
        assert all(torch.equal(a, b) for a, b in zip(edited, again, strict=True))
        assert not all(torch.allclose(a, b) for a, b in zip(edited, plain, strict=True))
        for _ in range(2):
            after = gradients(loss_of(trainee))
            for a, b in zip(after, plain, strict=True):
                torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
