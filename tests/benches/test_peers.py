"""Every way gives the same effect of a knock-out and the same gradients; those of peers where they are installed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from headwise.benches import peers
from headwise.benches.peers import ALL_LOGITS, LAST_LOGIT, PACKAGES, Hooks, Work, installed, require
from headwise.errors import Refusal
from headwise.heads import Head, HeadSet, SiteId
from headwise.model import edit
from headwise.model.attached import attach
from headwise.model.operations import Here

HEAD = Head(SiteId(layer=1), 2)


def edited(work: Work, *edits: Any) -> torch.Tensor:
    example = {"input_ids": work.ids}
    with attach(work.model(), example=example) as model, torch.no_grad(), ExitStack() as stack:
        if edits:
            stack.enter_context(model.editing(*edits))
        return work.score(model(**example).logits)


def test_hooks_take_out_what_an_edit_takes_out(work: Work) -> None:
    hooks = Hooks(work)
    clean = edited(work)
    for heads in (HeadSet((HEAD,)), HeadSet.parse("L0H1, L1H0, L1H3")):
        expected = edited(work, edit.zero(heads))
        assert (expected - clean).abs().max() > 1e-4
        for given in (ALL_LOGITS, LAST_LOGIT):
            torch.testing.assert_close(hooks.knock_out_set(heads, given), expected, rtol=1e-4, atol=1e-7)


def test_hooks_at_one_position_are_an_edit_there(work: Work) -> None:
    heads = HeadSet((HEAD,))
    found = Hooks(work).knock_out_set(heads, positions=slice(-1, None))
    torch.testing.assert_close(found, edited(work, edit.zero(heads, scope="last")), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, edited(work, edit.zero(heads)), atol=1e-6)


def test_gradients_of_hooks_are_those_of_a_gate(work: Work) -> None:
    gates = torch.ones(2, 3, 4, requires_grad=True)

    def factor(z: torch.Tensor, here: Here) -> torch.Tensor:
        return gates[:, here.site.layer, None, :, None].expand_as(z)

    example = {"input_ids": work.ids}
    with attach(work.model(), example=example) as model, model.editing(edit.scale(model.heads(), factor)):
        work.score(model(**example).logits).sum().backward()
    assert gates.grad is not None
    hooks = Hooks(work)
    for given in (ALL_LOGITS, LAST_LOGIT):
        torch.testing.assert_close(hooks.importance(given), gates.grad.abs(), rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in hooks.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_peer_gives_the_numbers_of_plain_hooks(work: Work, name: str) -> None:
    if name not in installed():
        pytest.skip("peers are not installed: pip install 'headwise[peers]'")
    hooks, peer = Hooks(work), installed()[name](work)
    clean = edited(work)
    for head in (HEAD, Head(SiteId(layer=2), 3)):
        expected = hooks.knock_out(head)
        assert (expected - clean).abs().max() > 1e-4
        for given in (ALL_LOGITS, LAST_LOGIT):
            torch.testing.assert_close(peer.knock_out(head, given), expected, rtol=1e-4, atol=1e-6)
    if hasattr(peer, "importance"):
        for given in (ALL_LOGITS, LAST_LOGIT):
            torch.testing.assert_close(peer.importance(given), hooks.importance(given), rtol=1e-3, atol=1e-7)


def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert installed() == {}
    with pytest.raises(Refusal, match=r"nnsight is not installed.*pip install 'headwise\[peers\]'"):
        require("nnsight")
    with pytest.raises(Refusal, match="pyvene is not installed"):
        peers.Interventions(work)
