"""Logistic regressions against another solver, probes on a planted direction, their null, and ITI's offset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import headwise as hw
from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.use.directions.inference_time import ITI
from headwise.use.directions.linear_probes import HeadProbes, head_probes, last_z, statements
from headwise.use.directions.logistic import accuracy, fitted

HEAD = "L1H2"


@pytest.fixture(params=["llama", "gpt2"], ids=["gqa", "mha"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def items(n: int, seed: int = 0) -> ItemSet:
    """Prompts of random ids and lengths, without answers."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(n):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(8, 90, (length,), generator=generator).tolist()
        rows.append(EncodedItem(Item(prompt="", answer="", id=f"i{place}"), (1, *ids), (), (), (), {}, None))
    return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0)


def planted_direction(model: AttachedModel, given: ItemSet) -> tuple[Tensor, list[bool]]:
    """A direction u in one head, and the sign of u.z there as labels; u in the space in which z varies alike."""
    z = last_z(model, given, HeadSet.parse(HEAD))[HEAD]
    u = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(5)).double()
    centred = (z - z.mean(0)) @ (u / u.norm())
    return u / u.norm(), (centred > centred.median()).tolist()


def by_scipy(x: Tensor, labels: Tensor, c: float) -> tuple[np.ndarray, float]:
    y = labels.double().numpy() * 2 - 1
    inputs = x.double().numpy()

    def loss(wb: np.ndarray) -> float:
        margin = y * (inputs @ wb[:-1] + wb[-1])
        return 0.5 * float(wb[:-1] @ wb[:-1]) + c * float(np.logaddexp(0, -margin).sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), method="BFGS", options={"gtol": 1e-8, "maxiter": 2000})
    return found.x[:-1], float(found.x[-1])


@pytest.mark.parametrize("c", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_a_regression_is_that_of_another_solver(c: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = scale * (torch.randn(3, 40, 4, generator=generator).double() + 1)
    labels = torch.stack(
        [(x[0, :, 0] + torch.randn(40, generator=generator)) > 1, torch.rand(40, generator=generator) > 0.3]
    )
    w, b = fitted(x, labels, c)
    for fit in range(2):
        for head in range(3):
            expected, intercept = by_scipy(x[head], labels[fit], c)
            assert torch.allclose(w[fit, head], torch.tensor(expected), atol=2e-4)
            assert float(b[fit, head]) == pytest.approx(intercept, abs=1e-3)
    side = (x[1] @ w[0, 1] + b[0, 1] > 0) == labels[0]
    assert float(accuracy(x, labels, w, b)[0, 1]) == pytest.approx(float(side.double().mean()))


def test_what_is_told_apart_with_ease_stays_finite() -> None:
    x = torch.cat([torch.full((20, 2), -50.0), torch.full((20, 2), 50.0)]).double()[None]
    w, b = fitted(x, (torch.arange(40) >= 20)[None], 1.0)
    assert bool(w.isfinite().all())
    assert bool(b.isfinite().all())
    assert float(accuracy(x, (torch.arange(40) >= 20)[None], w, b)) == 1.0


def test_a_planted_direction_is_found_first_and_pointed_at(model: AttachedModel) -> None:
    """Labels by the sign of u.z in one head: that head is the most accurate, and the direction is u."""
    given = items(400)
    u, labels = planted_direction(model, given)
    probed = head_probes(model, given, labels, permutations=19, c=1e4)  # hardly any penalty, so that w is u's own
    assert probed.top(1).labels == (HEAD,)
    theta = probed.iti(1).directions[HEAD]
    z = last_z(model, given, HeadSet.parse(HEAD))[HEAD]
    # Along directions in which z does not vary nothing can be told, and nothing depends on it.
    spread = torch.linalg.eigh(torch.cov(z.T))
    seen = spread.eigenvectors[:, spread.eigenvalues > 1e-3 * spread.eigenvalues.max()]
    assert torch.cosine_similarity(seen.T @ theta.double(), seen.T @ u, dim=0) > 0.95
    assert probed.p(HEAD) == pytest.approx(1 / 20)
    assert probed.p_of_best == pytest.approx(1 / 20)
    assert probed.to_pandas()["head"][0] == HEAD


def test_directions_and_spread_are_those_of_z(model: AttachedModel) -> None:
    given = items(60)
    _, labels = planted_direction(model, given)
    probed = head_probes(model, given, labels, permutations=2)
    held = torch.tensor(probed.validation)
    assert int(held.sum()) == 12
    z, truth = last_z(model, given, HeadSet.parse(HEAD))[HEAD], torch.tensor(labels)
    means = probed.iti(direction="mean-difference", heads=HeadSet.parse(HEAD))
    difference = z[~held & truth].mean(0) - z[~held & ~truth].mean(0)
    assert torch.allclose(means.directions[HEAD], (difference / difference.norm()).float(), atol=1e-5)
    for made in (means, probed.iti(heads=HeadSet.parse(HEAD))):
        along = z @ made.directions[HEAD].double()
        assert made.sigma[HEAD] == pytest.approx(float(along.std(correction=0)), rel=1e-4)
    w, b = fitted(z[None, ~held], truth[None, ~held], 1.0)
    assert torch.allclose(probed.weights[HEAD], w[0, 0])
    right = ((z[held] @ w[0, 0] + b[0, 0]) > 0) == truth[held]
    assert float(probed.accuracy[probed.heads.labels.index(HEAD)]) == pytest.approx(float(right.double().mean()))


def test_z_is_that_of_the_last_token_whatever_stands_beside_it(model: AttachedModel) -> None:
    given = items(5)
    together = last_z(model, given, model.heads(None), batch_size=5)
    for place, each in enumerate(given):
        with torch.no_grad(), model.reading(hw.read.z()) as got:
            model(input_ids=torch.tensor([each.prompt]))
        for label in ("L0H0", HEAD):
            assert torch.allclose(together[label][place].float(), got.z[label][0, -1], atol=2e-5)


def test_the_two_controls_are_apart(model: AttachedModel) -> None:
    given = items(60)
    _, labels = planted_direction(model, given)
    probed = head_probes(model, given, labels, permutations=0)
    own = probed.iti(3)
    random = probed.iti(3, direction="random", seed=4)
    assert random.acts_on == own.acts_on
    assert all(abs(float(own.directions[h] @ random.directions[h])) < 0.95 for h in own.acts_on.labels)
    again, other = probed.iti(3, direction="random", seed=4), probed.iti(3, direction="random", seed=5)
    for label in own.acts_on.labels:
        assert torch.equal(random.directions[label], again.directions[label])
        assert not torch.equal(random.directions[label], other.directions[label])
    elsewhere = probed.iti(heads=HeadSet.parse("L0H0, L2H1"))
    assert elsewhere.acts_on == HeadSet.parse("L0H0, L2H1")
    assert torch.allclose(elsewhere.directions["L0H0"].double(), probed.weights["L0H0"] / probed.weights["L0H0"].norm())


def test_under_permuted_labels_no_head_stands_out() -> None:
    """Labels without any relation: the best of 12 heads is often accurate by luck, and its p says so."""
    with hw.load("zoo:tiny-llama") as model:
        given = items(40, seed=3)
        labels = (torch.rand(40, generator=torch.Generator().manual_seed(8)) > 0.5).tolist()
        probed = head_probes(model, given, labels, permutations=60)
        assert probed.p_of_best > 0.05
        assert float(probed.null.mean()) == pytest.approx(0.5, abs=0.08)
        assert probed.null.shape == (60, 12)


def test_statements_of_one_item_stay_together() -> None:
    with hw.load("zoo:organism") as model:
        facts = hw.encode(hw.probe("facts"), model.tokenizer, n=20)
        made, labels = statements(facts)
        assert labels == [True, False] * 20
        assert made.items[0].prompt == facts.items[0].prompt + facts.items[0].answer
        assert made.items[1].prompt == facts.items[0].prompt + facts.items[0].foils[0]
        probed = head_probes(model, made, labels, permutations=3, heads="L3", seed=2)
        for first, second in zip(probed.validation[::2], probed.validation[1::2], strict=True):
            assert first == second
        assert probed.heads == model.heads("L3")


def test_the_null_changes_labels_within_an_id() -> None:
    from headwise.use.directions.linear_probes import _permuted

    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([True, False] * 50)
    drawn = _permuted(truth, [f"i{place // 2}" for place in range(100)], generator)
    assert bool((drawn.view(50, 2).sum(1) == 1).all())
    assert 10 < int((drawn != truth).sum()) / 2 < 40
    free = _permuted(truth, [f"i{place}" for place in range(100)], generator)
    assert int(free.sum()) == 50
    assert not bool((free.view(50, 2).sum(1) == 1).all())


def test_the_offset_stands_at_the_last_position_and_at_every_token_after(model: AttachedModel) -> None:
    width = model.sites[0].head_dim
    theta = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(0)), dim=0)
    used = ITI({"L0H1": theta}, {"L0H1": 0.5}, alpha=4.0)
    ids = torch.tensor([[1, 20, 21, 22, 23], [0, 1, 30, 31, 32]])
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with used(model), model.reading(hw.read.z("L0")) as got:
        model.generate(input_ids=ids, **options)
    offset = got.z["L0H1"]
    whole = model.generate(input_ids=ids, **options)
    assert whole.shape == (2, 8)
    with used(model):
        text = model.generate(input_ids=ids, **options)[:, :7]
    longer = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
    with torch.no_grad(), model.reading(hw.read.z("L0")) as clean:
        model(input_ids=text, attention_mask=longer, position_ids=(longer.cumsum(1) - 1).clamp(min=0))
    moved = (offset - clean.z["L0H1"])[longer.bool()].view(-1, width)
    expected = torch.zeros_like(offset)
    expected[:, 4:] = 4.0 * 0.5 * theta
    assert torch.allclose(moved, expected[longer.bool()], atol=1e-5)


def test_what_cannot_be_fitted_is_refused(model: AttachedModel) -> None:
    given = items(20)
    with pytest.raises(InputError, match="of both classes"):
        head_probes(model, given, [True] * 20)
    with pytest.raises(InputError, match="3 for 20"):
        head_probes(model, given, [True, False, True])
    with pytest.raises(InputError, match="one class only"):
        head_probes(model, given, [True] + [False] * 19, permutations=0)
    with pytest.raises(InputError, match="above 0"):
        head_probes(model, given, [True, False] * 10, c=0.0)
    probed: HeadProbes = head_probes(model, given, [True, False] * 10, permutations=0)
    for k in (0, 13):
        with pytest.raises(InputError, match="cannot be chosen"):
            probed.top(k)
    with pytest.raises(InputError, match="not one of"):
        probed.iti(1, direction="up")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="was not probed"):
        probed.iti(heads=HeadSet.parse("L9H0"))
    with pytest.raises(InputError, match="no wrong one"):
        statements(given)
    assert replace(probed, null=probed.null[:0]).p(HEAD) == 1.0


def test_without_permutations_the_table_has_no_null(model: AttachedModel) -> None:
    probed = head_probes(model, items(20), [True, False] * 10, permutations=0)
    table = probed.to_pandas()
    assert len(table) == len(probed.heads)
    assert table[["null_mean", "null_95"]].isna().all(axis=None)
    assert (table["p"] == 1.0).all()
    assert probed.p_of_best == 1.0
