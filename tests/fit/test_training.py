"""The trainer: closed forms, what stays frozen, early stopping, checkpoints, interruption."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.fit import Bar, Moment, Order, Schedule, Trained, batch_of, generator, train
from headwise.fit.checkpoint import Folder
from headwise.probes import encode, probe
from headwise.zoo.planted.lexicon import own_tokenizer


def parameter(values: Any = (2.0, -3.0)) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def noisy(learned: nn.Parameter) -> Callable[[int], Tensor]:
    """Squares around a target that is drawn anew in every step."""
    return lambda step: ((learned - torch.randn(learned.shape, generator=generator("target", 0, step))) ** 2).sum()


# -- the descent itself -----------------------------------------------------------------------------------------------


def test_the_first_step_of_adam_is_the_learning_rate_against_the_sign_of_the_gradient() -> None:
    learned = parameter([2.0, -3.0, 0.5])
    train({"x": learned}, lambda step: (learned**2).sum(), Schedule(steps=1, learning_rate=0.1))
    assert torch.allclose(learned, torch.tensor([1.9, -2.9, 0.4]), atol=1e-6)


def test_it_equals_a_loop_written_by_hand() -> None:
    learned, by_hand = parameter(), parameter()
    loss, other = noisy(learned), noisy(by_hand)
    schedule = Schedule(steps=7, learning_rate=0.3, decay="linear", weight_decay=0.1, clip=0.5)
    trained = train({"x": learned}, loss, schedule)
    optimiser = torch.optim.AdamW([by_hand], lr=0.3, weight_decay=0.1)
    for step in range(7):
        optimiser.param_groups[0]["lr"] = 0.3 * (7 - step) / 7
        optimiser.zero_grad()
        value = other(step)
        value.backward()
        assert trained.losses[step] == pytest.approx(value.item(), rel=1e-6)
        nn.utils.clip_grad_norm_([by_hand], 0.5)
        optimiser.step()
    assert torch.allclose(learned, by_hand, atol=1e-6)
    assert trained.n_parameters == 2
    assert trained.best_step == 7


def test_each_parameter_has_its_own_rate() -> None:
    slow, fast = parameter([1.0]), parameter([1.0])
    rates = {"slow": 0.01, "fast": 0.1}
    train({"slow": slow, "fast": fast}, lambda step: slow + fast, Schedule(steps=1, learning_rate=rates))
    assert slow.item() == pytest.approx(0.99)
    assert fast.item() == pytest.approx(0.9)


def test_what_has_no_gradient_in_a_step_does_not_decay() -> None:
    used, early = parameter([1.0]), parameter([1.0])
    after: list[float] = []

    def loss(step: int) -> Tensor:
        after.append(early.item())
        return used.sum() + (early.sum() if step == 0 else 0.0)

    train({"used": used, "early": early}, loss, Schedule(steps=3, weight_decay=0.5))
    assert after[0] == 1.0
    assert after[1] != 1.0
    assert after[2] == after[1] == early.item()


# -- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_at_rest_is_as_before_also_after_an_exception(fails: bool) -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    module.weight.grad = torch.ones(2, 2)
    before = module.weight.detach().clone()
    learned = parameter()

    def loss(step: int) -> Tensor:
        if fails:
            raise RuntimeError("no")
        assert not module.weight.requires_grad
        return module(learned).sum()

    def run() -> None:
        train({"x": learned}, loss, Schedule(steps=2, weight_decay=0.3), at_rest=module)

    if fails:
        with pytest.raises(RuntimeError, match="no"):
            run()
    else:
        run()
    assert module.weight.requires_grad
    assert not module.bias.requires_grad
    assert torch.equal(module.weight.grad, torch.ones(2, 2))
    assert torch.equal(module.weight, before)
    assert learned.grad is None


def test_a_parameter_of_the_module_at_rest_can_be_the_one_that_is_learned() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    train({"bias": module.bias}, lambda step: module(torch.ones(2)).sum(), Schedule(steps=1), at_rest=module)
    assert torch.equal(module.weight, weight)
    assert torch.allclose(module.bias, bias - 0.01)
    assert not module.bias.requires_grad
    assert module.weight.requires_grad


# -- validation -------------------------------------------------------------------------------------------------------


def test_the_best_parameters_are_restored_not_the_last() -> None:
    learned = parameter([0.0])
    # Descends by 0.1 a step past the optimum at 0.35; validations after 0, 2, 4 ... steps.
    trained = train(
        {"x": learned},
        lambda step: -learned.sum(),
        Schedule(steps=10, learning_rate=0.1, validate_every=2),
        validate=lambda: abs(learned.item() - 0.35),
    )
    assert trained.best_step == 4
    assert learned.item() == pytest.approx(0.4, abs=1e-5)
    assert list(trained.validations) == [0, 2, 4, 6, 8, 10]
    assert not trained.stopped_early
    assert len(trained.losses) == 10


def test_a_training_that_only_harms_gives_back_what_it_began_with() -> None:
    learned = parameter([0.0])
    train({"x": learned}, lambda step: -learned.sum(), Schedule(steps=3), validate=lambda: learned.item())
    assert learned.item() == 0.0


def test_patience_stops_and_the_steps_behind_are_not_made() -> None:
    learned = parameter([0.0])
    trained = train(
        {"x": learned},
        lambda step: -learned.sum(),
        Schedule(steps=100, learning_rate=0.1, validate_every=1, patience=3),
        validate=lambda: abs(learned.item() - 0.2),
    )
    assert trained.stopped_early
    assert trained.best_step == 2
    assert len(trained.losses) == 5
    assert learned.item() == pytest.approx(0.2, abs=1e-5)


def test_the_last_step_is_validated_where_it_is_no_multiple() -> None:
    learned = parameter([0.0])
    trained = train(
        {"x": learned}, lambda step: learned.sum(), Schedule(steps=5, validate_every=3), validate=learned.item
    )
    assert list(trained.validations) == [0, 3, 5]


# -- checkpoints ------------------------------------------------------------------------------------------------------

SCHEDULE = Schedule(steps=9, learning_rate=0.1, validate_every=2, weight_decay=0.1)


def trained_in(
    folder: Path | None, stop_at: int | None = None, *, learned: nn.Parameter | None = None, save_every: float = 0.0
) -> tuple[Trained, Tensor]:
    learned = parameter([2.0, -3.0]) if learned is None else learned
    loss = noisy(learned)

    def interrupted(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        return loss(step)

    trained = train(
        {"x": learned},
        interrupted,
        SCHEDULE,
        validate=lambda: float((learned.detach() - 1).abs().sum()),
        folder=folder,
        settings={"seed": 0},
        save_every=save_every,
    )
    return trained, learned.detach().clone()


@pytest.mark.parametrize("stop_at", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_gone_on_from_is_bit_for_bit_the_same_as_not_stopped(tmp_path: Path, stop_at: int, save_every: float) -> None:
    whole, values = trained_in(None)
    with pytest.raises(KeyboardInterrupt):
        trained_in(tmp_path / "run", stop_at, save_every=save_every)
    found = Folder(tmp_path / "run", json.loads((tmp_path / "run/training.json").read_text())).read()
    assert found is not None
    assert len(found.losses) == stop_at
    # Another start shows that it is the folder that counts.
    again, resumed = trained_in(tmp_path / "run", learned=parameter([9.0, 9.0]))
    assert again == whole
    assert torch.equal(resumed, values)


def test_a_kill_in_the_middle_of_a_step_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, values = trained_in(None)
    step = torch.optim.AdamW.step
    done = []

    def half(self: Any, *args: Any) -> Any:
        done.append(step(self, *args))
        if len(done) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(KeyboardInterrupt):
            trained_in(tmp_path / "run")
    again, resumed = trained_in(tmp_path / "run")
    assert again == whole
    assert torch.equal(resumed, values)


def test_a_finished_training_is_read_and_not_run_again(tmp_path: Path) -> None:
    whole, values = trained_in(tmp_path)
    again, same = trained_in(tmp_path, stop_at=0, learned=parameter([9.0, 9.0]))
    assert again == whole
    assert torch.equal(same, values)


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    learned = parameter()
    settings = {"seed": 0}
    train({"x": learned}, noisy(learned), Schedule(steps=1), folder=tmp_path / "run", settings=settings)
    with pytest.raises(InputError, match=r"another steps \(1, not 2\)"):
        train({"x": learned}, noisy(learned), Schedule(steps=2), folder=tmp_path / "run", settings=settings)
    with pytest.raises(InputError, match="another seed"):
        train({"x": learned}, noisy(learned), Schedule(steps=1), folder=tmp_path / "run", settings={"seed": 1})
    other = parameter([1.0])
    with pytest.raises(InputError, match="another x"):
        train({"x": other}, noisy(other), Schedule(steps=1), folder=tmp_path / "run", settings=settings)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no training"):
        train({"x": learned}, noisy(learned), Schedule(steps=1), folder=tmp_path / "notes")
    with pytest.raises(InputError, match="JSON"):
        train({"x": learned}, noisy(learned), Schedule(steps=1), folder=tmp_path / "new", settings={"a": object()})


def test_a_checkpoint_that_is_no_such_file_is_said(tmp_path: Path) -> None:
    learned = parameter()
    train({"x": learned}, noisy(learned), Schedule(steps=1), folder=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        train({"x": learned}, noisy(learned), Schedule(steps=1), folder=tmp_path)


# -- order and draws --------------------------------------------------------------------------------------------------


def test_each_pass_holds_every_example_once_in_an_order_of_its_own() -> None:
    order = Order(10, batch_size=4, seed=3)
    rows = [row for step in range(order.steps(2)) for row in order.rows(step)]
    assert len(rows) == 20
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert order.rows(3) == Order(10, batch_size=4, seed=3).rows(3)
    assert [Order(10, seed=4).rows(step) for step in range(3)] != [Order(10, seed=3).rows(step) for step in range(3)]


def test_draws_hang_on_their_parts_alone() -> None:
    first = torch.rand(4, generator=generator("masks", 0, 7))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, generator=generator("masks", 0, 7)))
    assert not torch.equal(first, torch.rand(4, generator=generator("masks", 0, 8)))


def test_a_batch_has_its_rows_in_the_order_asked_for() -> None:
    items = encode(probe("ioi"), own_tokenizer(), n=6)
    batch = batch_of(items, (4, 1, 1))
    assert [each.id for each in batch.items] == [items.ids[4], items.ids[1], items.ids[1]]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 1, "validate_every": 0}, "validate_every=0"),
        ({"steps": 1, "patience": 0}, "patience=0"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate=0.0"),
        ({"steps": 1, "learning_rate": {"a": -1.0}}, "learning_rate"),
        ({"steps": 1, "decay": "cosine"}, "decay='cosine'"),
        ({"steps": 1, "weight_decay": -1.0}, "weight_decay"),
        ({"steps": 1, "clip": 0.0}, "clip"),
    ],
)
def test_schedules_that_cannot_be_meant(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Schedule(**given)


def test_what_cannot_be_trained_is_said_with_the_step() -> None:
    learned, one = parameter(), Schedule(steps=5)
    with pytest.raises(Refusal, match="loss of step 3 is nan"):
        train({"x": learned}, lambda step: learned.sum() * (float("nan") if step == 3 else 1.0), one)
    assert bool(learned.isfinite().all())
    with pytest.raises(Refusal, match="validation after 0 steps is inf"):
        train({"x": learned}, lambda step: learned.sum(), one, validate=lambda: float("inf"))
    with pytest.raises(InputError, match="not a scalar"):
        train({"x": learned}, lambda step: learned, one)
    with pytest.raises(InputError, match="does not depend"):
        train({"x": learned}, lambda step: torch.ones(()), one)
    with pytest.raises(InputError, match="no parameters"):
        train({}, lambda step: torch.ones(()), one)
    with pytest.raises(InputError, match="'x' is a Tensor"):
        train({"x": torch.ones(2)}, lambda step: learned.sum(), one)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="no entry for 'x'"):
        train({"x": learned}, lambda step: learned.sum(), Schedule(steps=1, learning_rate={"y": 0.1}))
    with pytest.raises(InputError, match="cannot be drawn"):
        Order(0)


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_a_training_is_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    learned = parameter()
    train({"x": learned}, noisy(learned), Schedule(steps=2))
    assert capfd.readouterr() == ("", "")


def test_the_bar_tells_the_step_and_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.fit.progress.EVERY", 0.0)
    learned, told = parameter(), io.StringIO()
    with Bar("fitting", Console(file=told, width=200)) as bar:
        train({"x": learned}, noisy(learned), Schedule(steps=3), validate=lambda: 2.5, shown=bar)
    lines = told.getvalue().splitlines()
    assert len(lines) == 3
    assert "fitting: step 3 of 3" in lines[-1]
    assert "best validation 2.5" in lines[-1]
    terminal = io.StringIO()
    with Bar("fitting", Console(file=terminal, width=200, force_terminal=True)) as bar:
        bar(Moment(1, 2, 0.5, None))
    assert "step 1 of 2, loss 0.5" in terminal.getvalue()
