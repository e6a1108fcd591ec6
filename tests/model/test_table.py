"""Names of heads, groups and blocks resolved against a model, and the lines for names that are not there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise import zoo
from headwise.errors import InputError
from headwise.heads import Head, HeadSet, KVGroup, SiteId
from headwise.model.finding.sublayers import Sublayers
from headwise.model.site import Site
from headwise.model.table import SiteTable


def site(label: str, n_heads: int, n_kv_heads: int) -> Site:
    return Site(
        id=SiteId.parse(label),
        module=label,
        kind="self",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        qk_dim=8,
        head_dim=8,
        d_model=16,
        kernel="sdpa_attention_forward",
        tower="",
        projection=None,
        gated=False,
        columns=None,
        chunked=False,
        causal=True,
    )


def no_sublayers() -> Sublayers:
    raise AssertionError("heads were named, and blocks were looked for")


SITES = (site("L4", 6, 2), site("L7", 4, 4), site("L7@1", 4, 4), site("encoder.L0", 3, 3), site("vision.L0", 2, 1))
OPEN = ExitStack()
TABLE = SiteTable(SITES, no_sublayers)


@functools.cache
def blocks_of(name: str) -> SiteTable:
    organism = zoo.build(f"tiny-{name}")
    return OPEN.enter_context(hw.attach(organism.model, organism.tokenizer, example=organism.example)).table


@pytest.fixture(autouse=True, scope="module")
def detached_at_the_end() -> Iterator[None]:
    yield
    OPEN.close()
    blocks_of.cache_clear()


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        ("L4H0", ["L4H0"]),
        ("L4H5, 7.1 encoder.L0H2", ["L4H5", "L7H1", "encoder.L0H2"]),
        ((4, 3), ["L4H3"]),
        ([(4, 3), "L7H0@1"], ["L4H3", "L7H0@1"]),
        ({4: [1, 2], "encoder.L0": [0]}, ["L4H1", "L4H2", "encoder.L0H0"]),
        (Head.of(4, 1), ["L4H1"]),
        (HeadSet.parse("L4H1, L4H0"), ["L4H0", "L4H1"]),
        ("L7", ["L7H0", "L7H1", "L7H2", "L7H3"]),
        ("encoder", ["encoder.L0H0", "encoder.L0H1", "encoder.L0H2"]),
        ("vision, L4H0", ["L4H0", "vision.L0H0", "vision.L0H1"]),
        (SiteId.parse("encoder.L0"), ["encoder.L0H0", "encoder.L0H1", "encoder.L0H2"]),
        ("L4G1", ["L4H3", "L4H4", "L4H5"]),
        (KVGroup.of(4, 0), ["L4H0", "L4H1", "L4H2"]),
        (["L4H0", "L4H0"], ["L4H0"]),
    ],
)
def test_heads_by_every_name(form: Any, labels: list[str]) -> None:
    assert list(TABLE.select(form).labels) == labels


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        ("L4G1", ["L4G1"]),
        ({4: [1], 7: [3]}, ["L4G1", "L7G3"]),
        ("L4", ["L4G0", "L4G1"]),
        ("vision", ["vision.L0G0"]),
        ("L7H3", ["L7G3"]),
        (HeadSet.parse("encoder.L0H1"), ["encoder.L0G1"]),
    ],
)
def test_groups_by_every_name(form: Any, labels: list[str]) -> None:
    assert list(TABLE.select(form, "group").labels) == labels


def test_none_is_every_one_of_them() -> None:
    assert len(TABLE.select(None)) == sum(s.n_heads for s in SITES)
    assert len(TABLE.select(None, "group")) == sum(s.n_kv_heads for s in SITES)
    assert TABLE.stacks == ("main", "encoder", "vision")


@given(st.lists(st.sampled_from([head.label for s in SITES for head in s.heads]), min_size=1))
def test_any_list_of_heads_is_the_set_of_them(labels: list[str]) -> None:
    forms: list[Any] = [labels, ", ".join(labels), " ".join(labels), [Head.parse(label) for label in labels]]
    assert all(TABLE.select(form) == HeadSet.parse(labels) for form in forms)


@pytest.mark.parametrize(
    ("form", "want", "line"),
    [
        ("L4H6", "head", "there is no L4H6: L4 has 6 heads, counted from 0"),
        ("L4G2", "group", "there is no L4G2: L4 has 2 KV groups, counted from 0"),
        ("L4G2", "head", "there is no L4G2: L4 has 2 KV groups, counted from 0"),
        ({4: [2]}, "group", "there is no L4G2: L4 has 2 KV groups, counted from 0"),
        ("L5H0", "head", "there is no attention at L5: the stack has 3 sites, L4 to L7@1"),
        ("audio.L0H0", "head", "audio.L0: this model has no stack 'audio' (it has main, encoder, vision)"),
        ("L4H3", "group", "L4 shares keys and values between query heads: name KV groups here, for example L4G1"),
        ("L4H0, L4H1, L4H2", "group", "name KV groups here, for example L4G0, not heads"),
        ([], "head", "no heads were given"),
        ("", "head", "no heads were given"),
        ("nonsense", "head", "nonsense"),
        (4.5, "head", "4.5 does not name heads; write 'L4H0'"),
        (["L4H0", "L4G0"], "head", "heads or KV groups, never both"),
    ],
)
def test_a_name_that_is_not_there_gets_one_clear_line(form: Any, want: Any, line: str) -> None:
    with pytest.raises(InputError) as error:
        TABLE.select(form, want)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_site_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"nearest: .*L7"):
        TABLE.site("L70")
    assert TABLE.site("L7@1").id.call == 1


def test_layers_without_attention_are_blocks_and_not_sites() -> None:
    table = blocks_of("qwen3_next")
    assert [s.label for s in table.sites] == ["L1", "L2"]
    assert [block.label for block in table.blocks(None)] == ["L0", "L1", "L2"]
    with pytest.raises(InputError, match="there is no attention at L0: the stack has 2 sites, L1 to L2"):
        table.select("L0H0")


@pytest.mark.parametrize("form", ["L1", 1, SiteId.parse("L1"), ["L1", "L1"], "L1, L1", ["L1", 1]], ids=str)
def test_a_block_is_named_once_however_often_it_is_said(form: Any) -> None:
    assert [block.label for block in blocks_of("llama").blocks(form)] == ["L1"]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("L9", "this model has no block L9; it has L0, L1, L2"),
        ("encoder.L0", "this model has no block encoder.L0"),
        ([], "no blocks were given"),
        ("L1H0", "'L1H0' is not a site label"),
        (1.5, "1.5 is not a site label"),
    ],
)
def test_a_block_that_is_not_there_gets_one_clear_line(form: Any, line: str) -> None:
    with pytest.raises(InputError) as error:
        blocks_of("llama").blocks(form)
    assert line in str(error.value)
