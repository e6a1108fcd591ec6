"""LoRA on the slices of heads: what is not theirs keeps its bits, and PEFT computes the same with the folder."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.fit.head_lora import HeadAdapter, fit_head_lora, random_heads_like
from headwise.fit.objective import Preference
from headwise.fit.slices import head_slices
from headwise.fit.training import Schedule, batch_of
from headwise.metrics import metric
from headwise.probes.item import Item
from headwise.probes.outcome import observe
from headwise.use.sharing.saved import load, save

DECAYED = Schedule(steps=5, learning_rate=1e-2, weight_decay=0.5)


def attached(name: str) -> hw.AttachedModel:
    built = zoo.build(name)
    return hw.attach(built.model, built.tokenizer, example=built.example)


def items_of(model: hw.AttachedModel, n: int = 6, seed: int = 0) -> Any:
    return hw.encode(hw.probe("text"), model.tokenizer, n=n, seed=seed)


@pytest.fixture(params=["tiny-gpt2", "tiny-llama", "tiny-qwen3_next", "tiny-falcon"])
def model(request: pytest.FixtureRequest) -> Iterator[hw.AttachedModel]:
    with attached(request.param) as made:
        yield made


def outside(model: hw.AttachedModel, heads: str, variables: str = "qkvo") -> dict[str, Tensor]:
    """Every weight, with the slices of the heads put to 0."""
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    for part in head_slices(model, model.heads(heads), variables):
        name = f"{part.module}.weight"
        state[name] = state[name].index_fill(part.axis, part.indices, 0.0)
    return state


def test_all_but_the_slices_keeps_its_bits_under_weight_decay(model: hw.AttachedModel) -> None:
    heads = ",".join(f"{site.label}H{index}" for index, site in enumerate(model.sites[-2:]))
    before, bits = outside(model, heads), copy.deepcopy(model.model.state_dict())
    fitted = fit_head_lora(model, heads, items_of(model), rank=2, schedule=DECAYED, batch_size=2)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.model.parameters())
    merged = fitted.adapter.merged(model).state_dict()
    for part in head_slices(model, model.heads(heads)):
        name = f"{part.module}.weight"
        assert not torch.equal(merged[name], bits[name])
        merged[name] = merged[name].index_fill(part.axis, part.indices, 0.0)
    for name, tensor in merged.items():
        assert torch.equal(tensor, before[name]), name


def test_a_masked_gradient_freezes_nothing() -> None:
    """The common way, against which the one here is made: the gradient of other rows is put to 0, and they decay."""
    with attached("tiny-llama") as model:
        (part,) = head_slices(model, model.heads("L1H0"), "q")
        weight = model.model.get_submodule(part.module).weight
        before, mask = weight.detach().clone(), torch.zeros(len(weight), 1)
        mask[part.indices] = 1
        handle = weight.register_hook(lambda gradient: gradient * mask)
        optimiser = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.5)
        outcome = observe(model, batch_of(items_of(model), (0, 1)), wants={"logits"}, gradients=True)
        metric("cross-entropy")(outcome).mean().backward()
        optimiser.step()
        handle.remove()
        frozen = mask[:, 0] == 0
        assert not torch.equal(weight.detach()[frozen], before[frozen])


def test_a_fresh_adapter_changes_no_bit_and_training_lowers_the_loss() -> None:
    with attached("tiny-llama") as model:
        items = items_of(model, 4)
        fresh = fit_head_lora(model, "L1H0", items, schedule=Schedule(steps=1, learning_rate=1e-30)).adapter
        still = HeadAdapter(fresh.heads, fresh.down, {name: 0 * b for name, b in fresh.up.items()})
        plain = model(**model.example).logits
        with still(model):
            assert torch.equal(model(**model.example).logits, plain)
        fitted = fit_head_lora(model, "L1,L2", items, schedule=Schedule(steps=40, learning_rate=2e-2), batch_size=4)
        assert fitted.trained.losses[-1] < fitted.trained.losses[0] - 0.3
        before = hw.measure(model, items, "cross-entropy")
        after = hw.measure(model, items, "cross-entropy", under=fitted.adapter)
        assert float(after.mean()) < float(before.mean()) - 0.3
        assert float(before.mean()) == pytest.approx(fitted.trained.losses[0], abs=1e-5)
        assert torch.equal(model(**model.example).logits, plain)


def test_the_gradient_is_that_of_the_product_of_the_matrices(model: hw.AttachedModel) -> None:
    """One step of plain descent written out: B <- -lr * s * dL/dW[rows] A^T."""
    site = model.sites[-1]
    items, rows = items_of(model, 3), (0, 1, 2)
    fitted = fit_head_lora(
        model,
        f"{site.label}H0",
        items,
        rank=2,
        alpha=6.0,
        variables="qo",
        schedule=Schedule(steps=1, learning_rate=1.0),
        batch_size=3,
    )
    losses = metric("cross-entropy")(observe(model, batch_of(items, rows), wants={"logits"}, gradients=True))
    losses.mean().backward()
    for part in head_slices(model, model.heads(f"{site.label}H0"), "qo"):
        weight = model.model.get_submodule(part.module).weight
        gradient = weight.grad.T if part.transposed else weight.grad
        a, b = fitted.adapter.down[part.module], fitted.adapter.up[part.module]
        whole = 3.0 * gradient @ a.T if part.variables == "o" else 3.0 * gradient[part.indices] @ a.T
        got = b if part.variables == "o" else b[part.indices]
        assert torch.equal(got.sign(), -whole.sign())  # Adam's first step has the size of the rate
        assert not bool(a[:, [c for c in range(a.shape[1]) if part.variables == "o" and c not in part.indices]].any())
    model.model.zero_grad(set_to_none=True)


def trained_by_hand(model: hw.AttachedModel, heads: str, variables: str = "qkvo") -> HeadAdapter:
    adapter = fit_head_lora(
        model, heads, items_of(model), rank=3, variables=variables, schedule=Schedule(steps=1)
    ).adapter
    generator = torch.Generator().manual_seed(1)
    up = {name: torch.randn(b.shape, generator=generator) * b.any(1, keepdim=True) for name, b in adapter.up.items()}
    return HeadAdapter(adapter.heads, adapter.down, up, adapter.alpha, variables)


def test_the_weights_are_those_of_the_formula(model: hw.AttachedModel) -> None:
    adapter = trained_by_hand(model, f"{model.sites[-1].label}H1")  # rank 3, alpha 16
    changed = adapter.weights(model)
    assert changed.keys() == {f"{name}.weight" for name in adapter.down}
    for part in head_slices(model, adapter.heads):
        weight = model.model.get_submodule(part.module).weight.detach()
        change = 16 / 3 * adapter.up[part.module] @ adapter.down[part.module]
        torch.testing.assert_close(changed[f"{part.module}.weight"], weight + (change.T if part.transposed else change))


def test_merged_weights_are_what_the_adapter_computes(model: hw.AttachedModel) -> None:
    adapter = trained_by_hand(model, f"{model.sites[-1].label}H1")
    with torch.no_grad():
        with adapter(model):
            run_time = model(**model.example).logits
        assert float((run_time - model(**model.example).logits).abs().max()) > 1e-3
        assert torch.equal(adapter.merged(model)(**model.example).logits, run_time)


def test_baked_with_edits_of_the_same_heads_it_computes_what_a_run_does(
    model: hw.AttachedModel, tmp_path: Path
) -> None:
    head = f"{model.sites[-1].label}H1"
    both = [trained_by_hand(model, head), hw.use.HeadScaling(head, -2.0)]
    with torch.no_grad(), hw.use.Together(both)(model):
        together = model(**model.example).logits
    with torch.no_grad(), both[1](model), both[0](model):
        nested = model(**model.example).logits
    assert torch.equal(together, nested)
    report = hw.bake(model, both).save_pretrained(tmp_path / "baked")
    assert report.check is not None
    assert report.check.difference < 1e-5 < report.check.effect
    assert [line.result for line in report.lines] == ["exact", "exact"]
    assert set(report.lines[0].tensors) == set(both[0].weights(model))


def test_two_changes_of_one_weight_are_refused(model: hw.AttachedModel) -> None:
    head = f"{model.sites[-1].label}H1"
    one, other = trained_by_hand(model, head), trained_by_hand(model, head)
    with pytest.raises(Refusal, match="both change"):
        hw.use.Together((one, other))(model).__enter__()
    with pytest.raises(Refusal, match=r"another one puts .* in place as well"):
        hw.bake(model, [one, other])


def test_peft_computes_the_same_with_the_folder(model: hw.AttachedModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = trained_by_hand(model, f"{model.sites[-1].label}H1")
    with torch.no_grad(), adapter(model):
        expected = model(**model.example).logits
    saved = adapter.save_pretrained(tmp_path / "adapter", model)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model.model), str(saved.folder)).eval()
    with torch.no_grad():
        got = loaded(**model.example).logits
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        merged = loaded.merge_and_unload()(**model.example).logits
    torch.testing.assert_close(merged, expected, atol=2e-4, rtol=1e-4)


def test_the_folder_is_shared_with_its_heads(tmp_path: Path) -> None:
    with attached("tiny-llama") as model:
        adapter = trained_by_hand(model, "L1H0")
        save(adapter.save_pretrained(tmp_path / "adapter", model), tmp_path / "shared", model=model)
        assert load(tmp_path / "shared", model).heads == model.heads("L1H0")
        with pytest.raises(InputError, match="is there already"):
            adapter.save_pretrained(tmp_path / "adapter", model)


def test_gradient_checkpointing_gives_the_same_adapter() -> None:
    found = []
    for checkpointing in (False, True):
        with attached("tiny-llama") as model:
            model.model.train()
            if checkpointing:
                model.model.gradient_checkpointing_enable({"use_reentrant": False})
            fitted = fit_head_lora(model, "L0H0,L2H1", items_of(model), schedule=Schedule(steps=3, learning_rate=1e-2))
            found.append(fitted.adapter.up)
    for name, b in found[0].items():
        assert torch.equal(b, found[1][name])


def test_preference_begins_at_the_model_as_it_is() -> None:
    with attached("tiny-llama") as model:
        made = [
            Item(id=w, prompt=f"the {w} is a", answer=f" {w}", foils=(" thing", " word")) for w in ("cat", "dog", "ox")
        ]
        items = hw.encode(made, model.tokenizer, name="animals")
        fitted = fit_head_lora(
            model, "L2", items, objective=Preference(0.5), schedule=Schedule(steps=20, learning_rate=2e-2), batch_size=3
        )
        assert fitted.trained.losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert fitted.trained.losses[-1] < 0.9 * math.log(2)


def test_a_padded_batch_trains_as_its_items_alone_do() -> None:
    with attached("tiny-llama") as model:
        items = items_of(model, 3)
        assert len({len(each.prompt) for each in items}) > 1
        together = fit_head_lora(model, "L1H0", items, batch_size=3, schedule=Schedule(steps=1, learning_rate=1e-3))
        alone = [
            float(metric("cross-entropy")(observe(model, batch_of(items, (row,)), wants={"logits"})))
            for row in range(3)
        ]
        assert together.trained.losses[0] == pytest.approx(sum(alone) / 3, abs=1e-5)


def test_the_control_has_other_heads_in_the_same_layers_and_as_many_parameters() -> None:
    with hw.load("zoo:organism") as model:
        heads = model.heads("L2H1,L2H4,L4H0")
        control = random_heads_like(model, heads, seed=3)
        assert not set(control) & set(heads)
        assert [head.site for head in control] == [head.site for head in heads]
        groups = {(head.site, head.index // 2) for head in heads}
        assert not groups & {(head.site, head.index // 2) for head in control}
        assert control == random_heads_like(model, heads, seed=3)
        assert len({random_heads_like(model, heads, seed=seed) for seed in range(6)}) > 3
        items = hw.encode(hw.probe("conflict"), model.tokenizer, n=2)
        own, other = (
            fit_head_lora(model, heads, items, rank=1, schedule=Schedule(steps=1), control=each, seed=3)
            for each in (None, "random-heads")
        )
        assert (own.adapter.heads, other.adapter.heads) == (heads, control)
        assert own.trained.n_parameters == other.trained.n_parameters
        with pytest.raises(Refusal, match="no other heads in the layers"):
            random_heads_like(model, model.heads("L2"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with attached("tiny-llama") as model:
        adapter = trained_by_hand(model, "L1H0")
        with attached("tiny-gpt2") as other, pytest.raises(Refusal, match="does not fit"), adapter(other):
            pass
        wide = HeadAdapter(model.heads("L1H1"), adapter.down, adapter.up)
        with pytest.raises(Refusal, match="outside of L1H1"), wide(model):
            pass
        with pytest.raises(Refusal, match="trained for its own heads"):
            adapter.on("L1H1")
        with pytest.raises(InputError, match="rank=0 must be"):
            fit_head_lora(model, "L1H0", items_of(model), rank=0)
        items = items_of(model)
        with pytest.raises(InputError, match="validation= holds items that are trained on"):
            fit_head_lora(model, "L1H0", items, validation=items)
        with pytest.raises(InputError, match="there is no L1H9"):
            fit_head_lora(model, "L1H9", items)
    wrapped = peft.get_peft_model(zoo.build("tiny-llama").model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with hw.attach(wrapped, model.tokenizer) as model, pytest.raises(Refusal, match="merge its adapter"):
        fit_head_lora(model, "L1H0", items_of(model))
    assert isinstance(wrapped, nn.Module)
