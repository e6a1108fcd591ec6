"""In-context linear regression: the exact losses against simulation, and trained heads against the prediction."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from headwise.errors import InputError
from headwise.zoo.theory import (
    RegressionAttention,
    RegressionTask,
    debiased_descent,
    debiased_descent_loss,
    large_context_loss,
    simulated_loss,
    train_regression,
)

TASK = RegressionTask()


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def opposed(omega: float, eta: float) -> tuple[list[float], list[float]]:
    """Two heads that do the step eta with the attention of omega and -omega."""
    return [omega, -omega], [eta / 2 / omega, -eta / 2 / omega]


@pytest.mark.parametrize(
    ("task", "eta"),
    [(TASK, TASK.prediction.eta), (TASK, 0.5), (RegressionTask(d=3, length=10, noise=0.5), 0.8)],
)
def test_debiased_descent_has_the_loss_of_the_formula(task: RegressionTask, eta: float) -> None:
    items = task.draw(40_000, seed=1)
    errors = (debiased_descent(items, eta) - items.target).square()
    assert abs(float(errors.mean()) - debiased_descent_loss(task, eta)) < 4 * standard_error(errors)


@pytest.mark.parametrize("task", [TASK, RegressionTask(d=3, length=10, noise=0.5)])
def test_plain_descent_and_least_squares_have_the_losses_of_their_formulas(task: RegressionTask) -> None:
    items = task.draw(40_000, seed=2)
    x, y, x_q = items.examples[..., :-1], items.examples[..., -1:], items.query[:, :-1]
    gradient = (x * y).mean(1)
    rate = task.length / (task.length + task.d + 1 + task.noise * task.d)
    plain = ((rate * gradient * x_q).sum(1) - items.target).square()
    assert abs(float(plain.mean()) - task.prediction.plain_descent_loss) < 4 * standard_error(plain)

    beta = torch.linalg.lstsq(x.double(), y.double()).solution[..., 0]
    squares = ((beta * x_q).sum(1) - items.target).square()
    assert abs(float(squares.mean()) - task.prediction.least_squares_loss) < 4 * standard_error(squares)


def test_the_numbers_of_the_papers_setting() -> None:
    prediction = TASK.prediction
    assert prediction.eta == pytest.approx(40 / 45.5)
    assert prediction.debiased_loss == pytest.approx(1.1 - 39 / 45.5)
    assert prediction.plain_descent_loss == pytest.approx(1.1 - 40 / 46.5)
    assert prediction.least_squares_loss == pytest.approx(0.1 * 39 / 34)
    assert prediction.single_omega**2 == pytest.approx(1 / 5)
    assert prediction.single_mu * prediction.single_omega == pytest.approx(1 / (1 + 1.1 * math.e / 8))


@pytest.mark.parametrize("shift", [-0.02, 0.02])
def test_eta_and_the_single_head_are_minima(shift: float) -> None:
    best = TASK.prediction
    assert debiased_descent_loss(TASK, best.eta + shift) > best.debiased_loss
    assert large_context_loss(TASK, [best.single_omega + shift], [best.single_mu]) > best.single_loss
    assert large_context_loss(TASK, [best.single_omega], [best.single_mu + shift]) > best.single_loss


def test_the_large_context_loss_is_the_limit_of_the_simulated_one() -> None:
    """At L = 40 the single head's loss is a tenth above the approximation, at L = 2,000 within a hundredth."""
    best = TASK.prediction
    short = simulated_loss(TASK, [best.single_omega], [best.single_mu])
    assert 1.06 < short / best.single_loss < 1.14
    long = RegressionTask(length=2000)
    heads = [0.4, -0.3], [1.0, -0.8]
    assert simulated_loss(long, *heads, items=4000) == pytest.approx(large_context_loss(long, *heads), rel=0.01)


def test_the_simulated_loss_is_that_of_the_written_layer() -> None:
    """Integrating beta and the noise out changes the spread and not the mean."""
    omega, mu = [0.4, -0.3], [1.5, -1.0]
    items = TASK.draw(40_000, seed=3)
    errors = (RegressionAttention.written(omega, mu, d=TASK.d)(items) - items.target).square()
    assert abs(float(errors.mean()) - simulated_loss(TASK, omega, mu)) < 5 * standard_error(errors)


def test_two_small_opposed_heads_are_debiased_descent() -> None:
    eta = TASK.prediction.eta
    items = TASK.draw(500, seed=4)
    wanted = debiased_descent(items, eta)
    apart = [
        float((RegressionAttention.written(*opposed(omega, eta), d=TASK.d)(items) - wanted).abs().mean())
        for omega in (0.02, 0.04, 0.08)
    ]
    assert apart[0] < 0.002
    # What is left over is even in omega: it quarters when omega is halved.
    assert apart[1] / apart[0] == pytest.approx(4, rel=0.1)
    assert apart[2] / apart[1] == pytest.approx(4, rel=0.1)


def test_two_opposed_heads_reach_the_predicted_loss_and_break_without_the_zero_sum() -> None:
    eta = TASK.prediction.eta
    omega, mu = opposed(0.05, eta)
    assert simulated_loss(TASK, omega, mu) == pytest.approx(TASK.prediction.debiased_loss, rel=0.01)
    # What sum mu lacks to zero adds the mean of y that often: its square times (1 + s2) / L.
    omega, mu = opposed(0.01, eta)
    added = simulated_loss(TASK, omega, [mu[0] + 1, mu[1]]) - simulated_loss(TASK, omega, mu)
    assert added == pytest.approx(1.1 / 40, rel=0.05)
    assert (
        simulated_loss(TASK, [0.13, -0.13], [3.45, -3.0]) > simulated_loss(TASK, [0.13, -0.13], [3.45, -3.45]) + 0.004
    )


def test_the_parts_of_a_layer_make_the_whole() -> None:
    layer = RegressionAttention(4, 3, seed=5)
    items = RegressionTask(d=4, length=12).draw(6, seed=5)
    pattern = layer.pattern(items)
    assert torch.allclose(pattern.sum(-1), torch.ones(6, 3))

    # The long way: query, key and value of each head, as a layer of a transformer has them.
    for head in range(3):
        q = items.query @ layer.w_q[head].T
        k, v = items.examples @ layer.w_k[head].T, items.examples @ layer.w_v[head].T
        attention = ((k @ q[..., None])[..., 0] / math.sqrt(5)).softmax(-1)
        assert torch.allclose(attention, pattern[:, head], atol=1e-6)
        z = (attention[..., None] * v).sum(1)
        assert torch.allclose(z @ layer.w_o[head], layer.writes(items)[:, head], atol=1e-6)
    assert torch.allclose(layer.writes(items).sum(1), layer(items))


def test_written_heads_are_read_back() -> None:
    layer = RegressionAttention.written([0.3, -0.7], [2.0, -1.0], d=3)
    assert layer.omega.tolist() == pytest.approx([0.3, -0.7])
    assert layer.mu.tolist() == [2.0, -1.0]
    assert torch.allclose(layer.kq[1], -0.7 * torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])))
    assert layer.ov[:, :-1].abs().max() == 0


def test_draws_are_those_of_the_task_and_of_the_seed() -> None:
    items = RegressionTask(noise=0.5).draw(20_000, seed=6)
    assert torch.equal(items.target, RegressionTask(noise=0.5).draw(20_000, seed=6).target)
    assert not torch.equal(items.target, RegressionTask(noise=0.5).draw(20_000, seed=7).target)
    assert items.query[:, -1].abs().max() == 0
    assert float(items.target.square().mean()) == pytest.approx(1.5, rel=0.05)


def test_training_is_deterministic_and_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, other = (train_regression(TASK, heads=2, steps=5, seed=3) for _ in range(2))
    assert torch.equal(one.kq, other.kq)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.kq, train_regression(TASK, heads=2, steps=5, seed=4).kq)


@cache
def trained(heads: int, seed: int = 0) -> RegressionAttention:
    return train_regression(TASK, heads=heads, seed=seed)


@pytest.mark.slow
def test_two_trained_heads_have_the_predicted_form() -> None:
    layer, d = trained(2), TASK.d
    block = layer.kq[:, :d, :d]
    diagonal = block.diagonal(dim1=1, dim2=2)
    assert float((block - torch.diag_embed(diagonal)).abs().max() / diagonal.abs().mean()) < 0.1
    assert float((diagonal.std(1) / layer.omega.abs()).max()) < 0.1
    assert layer.kq[:, d, :d].abs().max() < 0.02  # the examples' y does not say where to look
    assert layer.ov[:, :d].abs().max() < 0.02  # nor does their x enter what is said
    assert float(layer.mu.sum().abs() / layer.mu.abs().sum()) < 0.05
    assert float(layer.omega.sum().abs() / layer.omega.abs().sum()) < 0.05
    assert float((layer.omega * layer.mu).sum()) == pytest.approx(TASK.prediction.eta, rel=0.02)


@pytest.mark.slow
def test_two_trained_heads_have_the_predicted_loss_also_at_other_lengths() -> None:
    layer = trained(2)
    step = float((layer.omega * layer.mu).sum())
    for length in (20, 40, 100):
        task = RegressionTask(length=length)
        items = task.draw(20_000, seed=8)
        # Beside debiased descent on the same items, so that what the draw does to both cancels.
        more = (layer(items) - items.target).square() - (debiased_descent(items, step) - items.target).square()
        assert abs(float(more.mean())) < 0.03 * debiased_descent_loss(task, step)
    assert debiased_descent_loss(TASK, step) == pytest.approx(TASK.prediction.debiased_loss, rel=0.001)


@pytest.mark.slow
def test_a_trained_layer_is_its_two_numbers_per_head() -> None:
    layer = trained(2)
    items = TASK.draw(40_000, seed=9)
    copy = RegressionAttention.written(layer.omega.tolist(), layer.mu.tolist(), d=TASK.d)
    loss, copied = ((one(items) - items.target).square().mean().item() for one in (layer, copy))
    assert copied == pytest.approx(loss, rel=0.01)


@pytest.mark.slow
def test_one_trained_head_stays_at_the_loss_of_one_head() -> None:
    layer, prediction = trained(1), TASK.prediction
    items = TASK.draw(40_000, seed=10)
    loss = float((layer(items) - items.target).square().mean())
    assert prediction.single_loss < loss < 1.12 * prediction.single_loss
    assert float(layer.omega.abs()) == pytest.approx(prediction.single_omega, rel=0.2)
    assert float(layer.mu.abs()) == pytest.approx(prediction.single_mu, rel=0.15)
    assert float(layer.omega * layer.mu) > 0


@pytest.mark.parametrize("sizes", [{"d": 0}, {"length": 6}, {"noise": -0.1}])
def test_an_impossible_task_is_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(InputError, match="choose length"):
        RegressionTask(**sizes)  # type: ignore[arg-type]


def test_an_impossible_layer_is_refused() -> None:
    with pytest.raises(InputError, match="give equal numbers"):
        RegressionAttention.written([1.0, 2.0], [1.0], d=3)
    with pytest.raises(InputError, match="choose both at least 1"):
        RegressionAttention(3, 0)
    with pytest.raises(InputError, match="choose both at least 1"):
        train_regression(TASK, heads=1, steps=0)
