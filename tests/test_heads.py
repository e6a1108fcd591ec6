"""Labels of sites, heads and KV groups, and sets of them: every written form, canonical order, the laws of sets."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.heads import Head, HeadSet, KVGroup, SiteId

stacks = st.one_of(
    st.sampled_from(["main", "encoder", "cross", "vision", "audio"]), st.from_regex(r"\A[a-z][a-z0-9_-]*\Z")
)
sites = st.builds(SiteId, stack=stacks, layer=st.integers(0, 200), call=st.integers(0, 3))
heads = st.builds(Head, sites, st.integers(0, 200))
groups = st.builds(KVGroup, sites, st.integers(0, 200))
near = st.builds(Head.of, st.integers(0, 2), st.integers(0, 3), st.sampled_from(["main", "encoder"]), st.integers(0, 1))
head_sets = st.frozensets(near, max_size=12).map(lambda members: HeadSet(tuple(members)))


# --- one label --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "head"),
    [
        ("L10H7", Head(SiteId(layer=10), 7)),
        ("main.L10H7", Head(SiteId(layer=10), 7)),
        ("10.7", Head(SiteId(layer=10), 7)),
        ("a10.h7", Head(SiteId(layer=10), 7)),
        (" L10H7 ", Head(SiteId(layer=10), 7)),
        ((10, 7), Head(SiteId(layer=10), 7)),
        ([10, np.int64(7)], Head(SiteId(layer=10), 7)),
        ("encoder.L2H0", Head(SiteId(stack="encoder", layer=2), 0)),
        ("encoder.2.0", Head(SiteId(stack="encoder", layer=2), 0)),
        ("encoder.a2.h0", Head(SiteId(stack="encoder", layer=2), 0)),
        (("encoder.L2", 0), Head(SiteId(stack="encoder", layer=2), 0)),
        ((SiteId(stack="encoder", layer=2), 0), Head(SiteId(stack="encoder", layer=2), 0)),
        ("L3H5@1", Head(SiteId(layer=3, call=1), 5)),
        ("cross.L3H5@2", Head(SiteId(stack="cross", layer=3, call=2), 5)),
    ],
)
def test_every_form_of_a_head_is_read(label, head):
    assert Head.parse(label) == head
    assert HeadSet.parse(label) == HeadSet((head,))


@pytest.mark.parametrize(
    ("head", "label"),
    [
        (Head.of(10, 7), "L10H7"),
        (Head.of(2, 0, "encoder"), "encoder.L2H0"),
        (Head.of(3, 5, call=1), "L3H5@1"),
        (KVGroup.of(4, 2), "L4G2"),
        (KVGroup.of(4, 2, "vision", 1), "vision.L4G2@1"),
        (SiteId(layer=4), "L4"),
        (SiteId(stack="encoder", layer=2), "encoder.L2"),
        (SiteId(layer=3, call=1), "L3@1"),
    ],
)
def test_printed_form(head, label):
    assert head.label == str(head) == repr(head) == label


@given(sites, heads, groups)
def test_what_is_printed_is_read_back(site, head, group):
    assert SiteId.parse(site.label) == site
    assert Head.parse(head.label) == head
    assert KVGroup.parse(group.label) == group
    assert pickle.loads(pickle.dumps(head)) == head


def test_a_site_is_read_from_a_label_or_a_bare_layer():
    assert [SiteId.parse(form) for form in ("L4", "main.L4", "4", 4, np.int32(4), SiteId(layer=4))] == [
        SiteId(layer=4)
    ] * 6
    assert SiteId.parse("encoder.L2@1") == SiteId(stack="encoder", layer=2, call=1)


def test_main_sorts_first_then_stacks_by_name_then_layer_call_and_index():
    ordered = ["L0H1", "L2H0", "L2H10", "L2H0@1", "L10H0", "audio.L9H9", "encoder.L0H0", "encoder.L1H0"]
    assert [head.label for head in sorted(map(Head.parse, reversed(ordered)))] == ordered


def test_a_head_is_never_equal_to_a_group():
    assert Head.of(4, 2) != KVGroup.of(4, 2)
    assert {Head.of(4, 2), KVGroup.of(4, 2), Head.parse("4.2")} == {Head.of(4, 2), KVGroup.of(4, 2)}
    with pytest.raises(TypeError):
        Head.of(4, 2) < KVGroup.of(4, 3)  # noqa: B015


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: Head.parse("L1X2"), "'L1X2' is not a head label; write L1H2, encoder.L1H2 or 1.2"),
        (lambda: Head.parse(10.7), "10.7 is not a head label"),
        (lambda: Head.parse("L1H2 L3H4"), "is not a head label"),
        (lambda: Head.parse("L4G2"), "L4G2 names a KV group, a head was expected"),
        (lambda: KVGroup.parse("L4H2"), "L4H2 names a head, a KV group was expected"),
        (lambda: KVGroup.parse("L4"), "'L4' is not a KV group label; write L1G2"),
        (lambda: Head.parse(("L1H2", 3)), "'L1H2' is not a site label; write L4"),
        (lambda: Head.parse((1, -2)), "head index -2 is negative"),
        (lambda: Head.of(-1, 2), "layer -1 is negative"),
        (lambda: Head.of(1, 2.0), "head index 2.0 is not a whole number"),
        (lambda: Head.of(1, True), "head index True is not a whole number"),
        (lambda: Head.of(1, np.array([1, 2])), "is not a whole number"),
        (lambda: Head("L4", 2), "site='L4' is not a SiteId"),
        (lambda: SiteId(stack="L3", layer=0), "stack='L3' is not a stack name"),
        (lambda: SiteId.parse("L4H2"), "'L4H2' is not a site label"),
        (lambda: HeadSet.parse("L1H2, L1X2"), "'L1X2' is not a head label"),
        (lambda: HeadSet.parse("L1H2 L4G2"), "L4G2 cannot be in a set of heads"),
        (lambda: HeadSet.parse("L1H2", kind="group"), "L1H2 cannot be in a set of KV groups"),
        (lambda: HeadSet.parse({4: 2}), r"\{4: 2\} lists no heads; write \{4: \[0, 1\]\}"),
        (lambda: HeadSet.parse({"L4H2": [0]}), "'L4H2' is not a site label"),
        (lambda: HeadSet.parse([10, 11, 12]), "10 is not a head label"),
        (lambda: HeadSet.parse(None), "None is not a head label"),
        (lambda: HeadSet.parse("", kind="heads"), "kind='heads' is not a kind of set"),
        (lambda: HeadSet.from_dict({"L1": [2]}), "is not a stored HeadSet"),
        (lambda: HeadSet.from_dict({"kind": "both", "sites": {}}), "kind='both'"),
    ],
)
def test_a_mistake_is_named_in_one_line(read, message):
    with pytest.raises(InputError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


# --- sets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "L1H2,L3H4",
        "L3H4 L1H2",
        "L1H2, a3.h4\n3.4",
        ["L1H2", (3, 4)],
        ("L1H2", "L3H4"),
        [[1, 2], [3, 4]],
        {1: [2], "L3": (4, 4)},
        {"1": [2], SiteId(layer=3): np.array([4])},
        [{1: [2]}, Head.of(3, 4), "1.2"],
        np.array([[3, 4], [1, 2]]),
        (label for label in ("L1H2", "L3H4")),
        HeadSet((Head.of(3, 4), Head.of(1, 2), Head.of(1, 2))),
    ],
)
def test_every_form_of_a_set_is_read(form):
    parsed = HeadSet.parse(form)
    assert parsed.labels == ("L1H2", "L3H4")
    assert parsed.kind == "head"
    assert len(parsed) == 2


def test_groups_are_read_from_labels_and_with_kind_from_unmarked_forms():
    expected = HeadSet((KVGroup.of(4, 0), KVGroup.of(4, 2)), "group")
    assert HeadSet.parse("L4G2 L4G0") == expected
    assert HeadSet.parse({4: [0, 2]}, kind="group") == expected
    assert HeadSet.parse([(4, 0), "4.2"], kind="group") == expected
    assert HeadSet.parse({4: [0, 2]}) != expected
    assert HeadSet.parse("", kind="group") == HeadSet((), "group") != HeadSet()
    assert HeadSet.parse(HeadSet((), "group")).kind == "group"


@given(head_sets, head_sets, head_sets)
def test_the_algebra_is_that_of_sets(a, b, c):
    x, y = frozenset(a), frozenset(b)
    assert (frozenset(a | b), frozenset(a & b), frozenset(a - b), frozenset(a ^ b)) == (x | y, x & y, x - y, x ^ y)
    assert (a <= b, a < b, a >= b, a > b, a == b, bool(a)) == (x <= y, x < y, x >= y, x > y, x == y, bool(x))
    assert a & (b | c) == (a & b) | (a & c)
    assert (a | b) - c == (a - c) | (b - c)
    assert list(a | b) == sorted(x | y)
    assert hash(a | b) == hash(b | a)
    assert all((head in a) == (head in x) == (head.label in a) for head in y)


@given(head_sets)
def test_a_set_is_read_back_from_each_of_its_forms(a):
    assert HeadSet.parse(",".join(a.labels)) == a
    assert HeadSet.parse(list(a)) == a
    assert HeadSet.parse({site: a.at(site) for site in a.sites}) == a
    assert HeadSet.from_dict(json.loads(json.dumps(a.to_dict()))) == a
    assert sum(len(a.at(site)) for site in a.sites) == len(a)


def test_sites_stacks_and_indices():
    some = HeadSet.parse("encoder.L0H3 L2H5 L2H1 L2H0@1 L0H0")
    assert [site.label for site in some.sites] == ["L0", "L2", "L2@1", "encoder.L0"]
    assert some.stacks == ("main", "encoder")
    assert some.at(SiteId(layer=2)) == (1, 5)
    assert some.at(SiteId(layer=9)) == ()
    assert some.filter(lambda head: head.layer == 2).labels == ("L2H1", "L2H5", "L2H0@1")
    assert some.to_dict() == {"kind": "head", "sites": {"L0": [0], "L2": [1, 5], "L2@1": [0], "encoder.L0": [3]}}


def test_heads_and_groups_translate():
    share = {SiteId(layer=0): 2, SiteId(layer=1): 4}
    chosen = HeadSet.parse("L0H0 L0H1 L0H3 L1H0 L1H1 L1H2 L1H4 L1H5 L1H6 L1H7")
    assert chosen.to_groups(share).labels == ("L0G0", "L0G1", "L1G0", "L1G1")
    assert chosen.complete_groups(share).labels == ("L0G0", "L1G1")
    assert HeadSet.parse("L0G1 L1G1").to_heads(share).labels == ("L0H2", "L0H3", "L1H4", "L1H5", "L1H6", "L1H7")
    with pytest.raises(InputError, match="L2H0 sits at L2, for which heads_per_group has no entry"):
        HeadSet.parse("L2H0").to_groups(share)
    with pytest.raises(InputError, match="at least 1"):
        HeadSet.parse("L2H0").to_groups({SiteId(layer=2): 0})


@given(st.frozensets(st.builds(Head.of, st.integers(0, 1), st.integers(0, 11))), st.sampled_from([1, 2, 3, 4, 6]))
def test_complete_groups_lie_inside_and_touched_groups_cover(members, share):
    chosen = HeadSet(tuple(members))
    shares = dict.fromkeys(chosen.sites, share)
    assert chosen.complete_groups(shares).to_heads(shares) <= chosen <= chosen.to_groups(shares).to_heads(shares)
    touched = chosen.to_groups(shares)
    assert touched.to_heads(shares).complete_groups(shares) == touched


def test_heads_and_groups_never_mix():
    a, b = HeadSet.parse("L1H2"), HeadSet.parse("L1G2")
    for operation in (lambda: a | b, lambda: a & b, lambda: a - b, lambda: a ^ b, lambda: a <= b):
        with pytest.raises(InputError, match="cannot be combined"):
            operation()
    assert a != b
    assert KVGroup.of(1, 2) not in a
    assert a.heads == (Head.of(1, 2),)
    assert b.groups == (KVGroup.of(1, 2),)
    with pytest.raises(InputError, match=r"HeadSet\(L1G2\) holds KV groups where heads are needed; use to_heads"):
        _ = b.heads
    with pytest.raises(InputError, match="use to_groups"):
        _ = a.groups
    with pytest.raises(TypeError):
        a | {Head.of(1, 2)}


def test_repr_is_short():
    assert repr(HeadSet.parse("L3H4 L1H2")) == "HeadSet(L1H2, L3H4)"
    assert repr(HeadSet()) == "HeadSet()"
    assert repr(HeadSet((), "group")) == "HeadSet(kind='group')"
    assert repr(HeadSet.parse({0: range(40)})).endswith("L0H9, ... 40 heads)")
