"""Scan and Snap: the first two steps against the closed form, conserved sums, the scan and the snap of training."""

from __future__ import annotations

from functools import cache
from itertools import islice, repeat

import pytest
import torch

from headwise.errors import InputError
from headwise.zoo.theory import ScanSnapHead, ScanSnapTask, common_mass, train_scan_snap

TASK = ScanSnapTask()


def fresh(task: ScanSnapTask = TASK) -> ScanSnapHead:
    return ScanSnapHead(task.tokens, task.last, task.classes)


@pytest.mark.parametrize(
    ("task", "decoder_rate", "attention_rate"),
    [
        (TASK, 10.0, 1.0),
        (TASK, 1.0, 3.0),
        (ScanSnapTask(last=3, next_per_last=1), 5.0, 1.0),
        (ScanSnapTask(last=1, next_per_last=4, shared=3, per_last=2, distinct=6), 5.0, 1.0),
        (ScanSnapTask(last=2, next_per_last=3, shared=1, per_last=9, distinct=4), 20.0, 1.0),
    ],
    ids=str,
)
def test_two_steps_on_populations_are_those_of_the_closed_form(
    task: ScanSnapTask, decoder_rate: float, attention_rate: float
) -> None:
    head, wanted = fresh(task), task.predict(decoder_rate, attention_rate)
    assert common_mass(task, head) == pytest.approx(wanted.common_mass_at_start, abs=1e-12)

    population = task.population()
    train_scan_snap(head, repeat(population, 1), decoder_rate=decoder_rate, attention_rate=attention_rate)
    assert head.kq.abs().max() == 0, "the decoder goes first"
    train_scan_snap(head, repeat(population, 1), decoder_rate=decoder_rate, attention_rate=attention_rate)

    for class_ in range(task.classes):
        last = class_ // task.next_per_last
        row = head.kq[last].detach()
        assert row[task.distinct_of(class_)].tolist() == pytest.approx(wanted.distinct_logits, abs=1e-14)
        assert row[: task.shared].tolist() == pytest.approx([wanted.shared_logit] * task.shared, abs=1e-14)
        assert row[task.common_of(last)].tolist() == pytest.approx([wanted.last_logit] * task.per_last, abs=1e-14)
        for other in range(task.classes):
            if other // task.next_per_last != last:
                assert row[task.distinct_of(other)].abs().max() == 0, "what never stands there gets no gradient"


def test_the_default_prediction_has_its_numbers_and_signs() -> None:
    prediction = TASK.predict()
    assert prediction.common_mass_at_start == pytest.approx(15 / 20.5)
    weakest, *_, strongest = prediction.distinct_logits
    assert strongest / weakest == pytest.approx(100), "frequencies 1 and 0.1"
    assert weakest > 0 > prediction.shared_logit


def test_the_attention_gradient_is_the_one_of_the_paper() -> None:
    """diag(f) (I - f f^T) Y (e - alpha) against autograd, at random weights."""
    head = fresh()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in head.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator, dtype=torch.float64))
    items = TASK.population()
    loss = torch.nn.functional.cross_entropy(head(items), items.target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, [head.kq])

    unnormalised = items.frequencies * head.kq[items.last].exp()
    f = unnormalised / unnormalised.norm(dim=1, keepdim=True)
    lacking = torch.eye(TASK.classes, dtype=torch.float64) - (f @ head.ov).softmax(1)
    back = lacking @ head.ov.T
    rows = f * (back - f * (f * back).sum(1, keepdim=True))
    by_hand = torch.zeros_like(head.kq).index_add(0, items.last, rows)
    assert torch.allclose(-gradient, by_hand, atol=1e-12)


@cache
def sampled(decoder_rate: float) -> tuple[ScanSnapHead, tuple[float, ...]]:
    """A head after 3,000 sampled steps, and its attention on common tokens at each quarter."""
    head, batches = fresh(), TASK.batches(3000)
    masses = [common_mass(TASK, head)]
    for _ in range(4):
        train_scan_snap(head, islice(batches, 750), decoder_rate=decoder_rate)
        masses.append(common_mass(TASK, head))
    return head, tuple(masses)


def falls_then_stands(masses: tuple[float, ...]) -> bool:
    """The first quarter takes more than three times what the last half does, and nothing comes back."""
    return masses[0] - masses[1] > 3 * (masses[2] - masses[4]) > 0


@pytest.mark.slow
def test_sampled_training_scans_and_snaps() -> None:
    head, masses = sampled(10.0)
    assert falls_then_stands(masses)
    assert masses[4] < 0.6 < 0.73 < masses[0]
    for class_ in range(TASK.classes):
        logits = head.kq[class_ // TASK.next_per_last, TASK.distinct_of(class_)]
        assert bool((logits[5:].diff() > 0).all())
        assert logits[-1] > 0.5 > 0 > head.kq[:, : TASK.shared].max()
        ranks = logits.argsort().argsort().double()
        assert float(torch.corrcoef(torch.stack([ranks, torch.arange(10.0).double()]))[0, 1]) > 0.95


@pytest.mark.slow
def test_a_faster_decoder_snaps_earlier() -> None:
    assert sampled(10.0)[1][4] > sampled(1.0)[1][4] + 0.1


def test_population_training_scans_in_strict_order_and_snaps() -> None:
    head, population = fresh(), TASK.population()
    masses = [common_mass(TASK, head)]
    for _ in range(4):
        train_scan_snap(head, repeat(population, 750))
        masses.append(common_mass(TASK, head))
    assert falls_then_stands(tuple(masses))
    assert all(
        bool((head.kq[class_ // 2, TASK.distinct_of(class_)].diff() > 0).all()) for class_ in range(TASK.classes)
    )


def test_sums_are_conserved_also_on_sampled_batches() -> None:
    head = fresh()
    train_scan_snap(head, TASK.batches(30, size=32, seed=1))
    assert head.kq.abs().max() > 0.01
    assert head.kq.sum(1).abs().max() < 1e-12
    assert head.ov.sum(1).abs().max() < 1e-12


def test_items_are_those_of_the_task_and_of_the_seed() -> None:
    items = TASK.draw(4000, seed=2)
    assert torch.equal(items.frequencies, TASK.draw(4000, seed=2).frequencies)
    assert torch.equal(items.last, items.target // 2)
    assert torch.allclose(items.frequencies.sum(1), torch.ones(4000, dtype=torch.float64))
    population = TASK.population()
    for class_ in range(TASK.classes):
        rows = items.frequencies[items.target == class_]
        assert torch.allclose(rows.mean(0), population.frequencies[class_], atol=0.004)
        assert rows[:, population.frequencies[class_] == 0].abs().max() == 0
        share = population.frequencies[class_, TASK.distinct_of(class_)] * 20.5
        assert share.tolist() == pytest.approx(TASK.weights)


def test_the_pattern_is_a_softmax_over_positions() -> None:
    """Attention on a token is that of all positions where it stands."""
    task = ScanSnapTask(last=1, next_per_last=2, shared=2, per_last=1, distinct=2, length=8)
    head, items = fresh(task), task.draw(1, seed=3)
    with torch.no_grad():
        head.kq.copy_(torch.linspace(-1, 1, task.tokens, dtype=torch.float64))
    tokens = torch.arange(task.tokens).repeat_interleave((items.frequencies[0] * 8).round().long())
    by_position = head.kq[0, tokens].softmax(0)
    assert torch.allclose(
        torch.zeros(task.tokens, dtype=torch.float64).index_add(0, tokens, by_position), head.pattern(items)[0]
    )


def test_a_task_without_anything_to_tell_is_refused() -> None:
    with pytest.raises(InputError, match="choose at least one"):
        ScanSnapTask(distinct=0)
    with pytest.raises(InputError, match="nothing to tell apart"):
        ScanSnapTask(last=1, next_per_last=1)
