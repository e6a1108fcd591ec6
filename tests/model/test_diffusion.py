"""Denoisers of diffusers attach like any other model; what is said of their heads is held against plain hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from torch import Tensor, nn

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.heads import Head

IMAGE, TEXT = 16, 7  # tokens of the examples; a U-Net has 64 and 16 of the image

# By label: attention module, kind, kinds of tokens of queries and keys, and the projection of each kind.
BLOCK = "transformer_blocks"
UNET = (
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)
SITES: dict[str, dict[str, tuple[str, str, str, dict[str, str | None]]]] = {
    "sd3": {
        "L0": (f"{BLOCK}.0.attn", "joint", "image text", {"image": "to_out.0", "text": "to_add_out"}),
        "L0@1": (f"{BLOCK}.0.attn2", "self", "image", {"image": "to_out.0"}),
        "L1": (f"{BLOCK}.1.attn", "joint", "image text", {"image": "to_out.0", "text": "to_add_out"}),
        "L2": (f"{BLOCK}.2.attn", "joint", "image text", {"image": "to_out.0", "text": None}),
    },
    "flux": {
        **{
            f"L{i}": (f"{BLOCK}.{i}.attn", "joint", "text image", {"text": "to_add_out", "image": "to_out.0"})
            for i in range(2)
        },
        **{
            f"single.L{i}": (
                f"single_{BLOCK}.{i}.attn",
                "joint",
                "text image",
                {"text": f"single_{BLOCK}.{i}.proj_out", "image": f"single_{BLOCK}.{i}.proj_out"},
            )
            for i in range(2)
        },
    },
    "dit": {f"L{i}": (f"{BLOCK}.{i}.attn1", "self", "image", {"image": "to_out.0"}) for i in range(2)},
    "pixart": {
        **{f"L{i}": (f"{BLOCK}.{i}.attn1", "self", "image", {"image": "to_out.0"}) for i in range(2)},
        **{f"cross.L{i}": (f"{BLOCK}.{i}.attn2", "cross", "text", {"image": "to_out.0"}) for i in range(2)},
    },
    "unet": {
        **{f"L{i}": (f"{p}.{BLOCK}.0.attn1", "self", "image", {"image": "to_out.0"}) for i, p in enumerate(UNET)},
        **{f"cross.L{i}": (f"{p}.{BLOCK}.0.attn2", "cross", "text", {"image": "to_out.0"}) for i, p in enumerate(UNET)},
    },
}
EVERY_SITE = [(name, label) for name, sites in SITES.items() for label in sites]


@cache
def attached(name: str) -> hw.AttachedModel:
    return hw.load(f"zoo:tiny-{name}")


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**attached_example(model)).sample


def attached_example(model: Any) -> Mapping[str, Any]:
    example: Mapping[str, Any] = model.example
    return example


def projections(name: str, label: str) -> dict[str, str | None]:
    """Qualified name of the projection of each kind of tokens, as written above."""
    module, _, _, own = SITES[name][label]
    return {
        kind: path if path is None or path.startswith("single_") else f"{module}.{path}" for kind, path in own.items()
    }


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Plain pre-hooks on modules by name, which see (and may replace) the first argument."""
    with ExitStack() as undo:
        for path, act in hooks.items():

            def hook(module: nn.Module, args: Any, act: Callable[[Tensor], Tensor | None] = act) -> Any:
                changed = act(args[0])
                return None if changed is None else (changed, *args[1:])

            undo.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        yield


def without_head(head: int, width: int, rows: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    def cut(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, rows, head * width : (head + 1) * width] = 0
        return x

    return cut


# -- sites ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_every_attention_module_is_a_site_with_its_kind_and_its_projections(name: str) -> None:
    model = attached(name)
    assert {site.label for site in model.sites} == set(SITES[name])
    for label, (module, kind, keys, _) in SITES[name].items():
        site = model.site(label)
        assert (site.module, site.kind, " ".join(site.key_spans)) == (module, kind, keys)
        assert {span.name: span.projection for span in site.spans} == projections(name, label)
        assert site.route == "watched"
        assert not site.gated
        own = model.model.get_submodule(module)
        assert site.n_heads == site.n_kv_heads == own.heads
        assert site.head_dim * site.n_heads == own.to_q.out_features
        assert all(site.capabilities[each] for each in ("z", "qk", "rows", "separable", "projection"))


def test_the_order_of_the_two_kinds_is_measured_also_where_both_are_as_many() -> None:
    """16 image tokens and a text of 16: lengths say nothing, and what is cross-attention is not told by them either."""
    for name, order in (("sd3", ["image", "text"]), ("flux", ["text", "image"]), ("pixart", ["image"])):
        organism = zoo.build(f"tiny-{name}")
        example = dict(organism.example)
        generator = torch.Generator().manual_seed(1)
        example["encoder_hidden_states"] = torch.randn(2, IMAGE, 12, generator=generator)
        example.pop("encoder_attention_mask", None)
        if name == "flux":
            example["txt_ids"] = torch.zeros(IMAGE, 3)
            example["hidden_states"] = example["hidden_states"][:, :IMAGE]
            example["img_ids"] = example["img_ids"][:IMAGE]
        with hw.attach(organism.model, example=example) as model:
            assert [span.name for span in model.sites[0].spans] == order
            kinds = {site.label: site.kind for site in model.sites}
        if name == "pixart":
            assert kinds == {"L0": "self", "L1": "self", "cross.L0": "cross", "cross.L1": "cross"}


@pytest.mark.parametrize("name", SITES)
def test_attached_read_and_detached_the_model_computes_the_same_bits(name: str) -> None:
    organism = zoo.build(f"tiny-{name}")
    with torch.no_grad():
        plain = organism.model(**organism.example).sample
    processors = [module.processor for module in organism.model.modules() if hasattr(module, "processor")]
    model = hw.attach(organism.model, example=organism.example)
    assert torch.equal(run(model), plain)
    reads = (hw.read.z(), hw.read.q(), hw.read.k(), hw.read.v(), hw.read.rows(None), hw.read.write())
    with model.reading(*reads):
        assert torch.equal(run(model), plain)
    with model.editing(hw.edit.zero(model.heads())):
        assert not torch.equal(run(model), plain)
    model.detach()
    assert torch.equal(organism.model(**organism.example).sample, plain)
    now = [module.processor for module in organism.model.modules() if hasattr(module, "processor")]
    assert all(one is other for one, other in zip(processors, now, strict=True))
    for module in organism.model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_error_in_the_middle_leaves_nothing_on() -> None:
    model = attached("sd3")
    plain = run(model)

    def stumble(current: Tensor, here: Any) -> Tensor:
        raise KeyError("a user's mistake")

    with pytest.raises(KeyError), model.editing(hw.edit.set("L1H0", stumble)):
        run(model)
    assert torch.equal(run(model), plain)
    assert all("forward" not in vars(module) for module in model.model.modules())


def test_two_models_attached_at_once_do_not_notice_one_another() -> None:
    one, other = (hw.load("zoo:tiny-unet") for _ in range(2))
    with one, other:
        plain = run(one)
        with one.editing(hw.edit.zero("cross.L1")), other.reading(hw.read.z("L0")) as got:
            assert torch.equal(run(other), plain)
            assert not torch.equal(run(one), plain)
        assert got.z["L0"].shape == (2, 64, 4, 4)


# -- z -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "label"), EVERY_SITE)
def test_z_is_what_enters_the_projections(name: str, label: str) -> None:
    model = attached(name)
    entered: dict[str, Tensor] = {}
    paths = {path for path in projections(name, label).values() if path is not None}
    hooks = {path: (lambda x, path=path: entered.update({path: x})) for path in paths}
    with model.reading(hw.read.z(label)) as got, hooked(model.model, hooks):
        run(model)
    z = got.z[label].flatten(2)
    start = 0
    for kind, path in projections(name, label).items():
        length = TEXT if kind == "text" else z.shape[1] - (TEXT if "text" in projections(name, label) else 0)
        rows = slice(start, start + length)
        start += length
        if path is None:
            continue
        x = entered[path]
        x = x[:, rows, : z.shape[2]] if x.shape[1] > length else x
        assert torch.equal(z[:, rows], x)
    assert start == z.shape[1]


@pytest.mark.parametrize(("name", "label"), EVERY_SITE)
def test_a_zeroed_head_is_its_slice_zeroed_at_every_projection(name: str, label: str) -> None:
    model = attached(name)
    site = model.site(label)
    for head in (0, site.n_heads - 1):
        paths = {path for path in projections(name, label).values() if path is not None}
        with hooked(model.model, {path: without_head(head, site.head_dim) for path in paths}):
            expected = run(model)
        with model.editing(hw.edit.zero(Head(site.id, head))):
            edited = run(model)
        assert torch.equal(edited, expected)
        assert not torch.equal(edited, run(model))


@pytest.mark.parametrize(("name", "label"), [(n, s) for n, s in EVERY_SITE if SITES[n][s][1] == "joint"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_span_of_joint_attention_is_one_projections_rows(name: str, label: str, kind: str) -> None:
    model = attached(name)
    site = model.site(label)
    own = projections(name, label)
    rows = {path: slice(None) for path in own.values()}
    if label.startswith("single."):  # both kinds in one projection, the text first
        rows = {own[kind]: slice(0, TEXT) if kind == "text" else slice(TEXT, None)}
    else:
        rows = {own[kind]: slice(None)}
    hooks = {path: without_head(2, site.head_dim, where) for path, where in rows.items() if path is not None}
    with hooked(model.model, hooks):
        expected = run(model)
    with model.editing(hw.edit.zero(Head(site.id, 2), scope=f"span:{kind}")) as opened:
        edited = run(model)
    assert torch.equal(edited, expected)
    assert opened.fired[0].positions == 2 * (TEXT if kind == "text" else 64 if name == "flux" else IMAGE)
    # The last block of SD3 does not project its text, and that of Flux drops it afterwards.
    unused = kind == "text" and label in ("L2", "single.L1")
    assert torch.equal(edited, run(model)) is unused


@pytest.mark.parametrize(("name", "label"), EVERY_SITE)
def test_writes_are_z_through_the_weights_of_its_own_projection(name: str, label: str) -> None:
    model = attached(name)
    site = model.site(label)
    with model.reading(hw.read.z(label), hw.read.write(label)) as got:
        run(model)
    z, write = got.z[label], got.write[label]
    expected = torch.zeros_like(write)
    start = 0
    for kind, path in projections(name, label).items():
        has_text = "text" in projections(name, label)
        length = TEXT if kind == "text" else z.shape[1] - (TEXT if has_text else 0)
        if path is not None:
            weight = model.model.get_submodule(path).weight
            for head in range(site.n_heads):
                columns = slice(head * site.head_dim, (head + 1) * site.head_dim)
                expected[:, start : start + length, head] = z[:, start : start + length, head] @ weight[:, columns].T
        start += length
    torch.testing.assert_close(write, expected)
    if site.kind == "joint":  # a choice of positions keeps each position with its own projection
        with model.reading(hw.read.write(label, queries="span:text")) as got:
            run(model)
        text = slice(0, TEXT) if name == "flux" else slice(IMAGE, None)
        torch.testing.assert_close(got.write[label], expected[:, text])


def test_gradients_reach_z_of_both_kinds_of_tokens() -> None:
    model = attached("sd3")
    site = model.site("L1")
    factor = torch.ones(1, requires_grad=True)
    own = [path for path in projections("sd3", "L1").values() if path is not None]

    def scaled(x: Tensor) -> Tensor:
        return torch.cat([x[..., : site.head_dim] * factor, x[..., site.head_dim :]], dim=-1)

    weights = torch.linspace(-1, 1, 8)
    with hooked(model.model, dict.fromkeys(own, scaled)):
        (expected,) = torch.autograd.grad((model(**model.example).sample * weights).sum(), factor)
    with model.reading(hw.read.gate("L1")) as got:
        (model(**model.example).sample * weights).sum().backward()
    model.model.zero_grad()
    torch.testing.assert_close(got.gate.grad["L1H0"].sum(), expected[0])
    with (
        pytest.raises(Refusal, match="image and text are projected apart"),
        model.reading(hw.read.write("L1", grad=True)),
    ):
        pass


# -- patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "label"), EVERY_SITE)
def test_rows_times_values_are_z(name: str, label: str) -> None:
    model = attached(name)
    with model.reading(hw.read.rows(label), hw.read.v(label), hw.read.z(label)) as got:
        run(model)
    rebuilt = torch.einsum("bhqk,bkhd->bqhd", got.rows[label], got.v[label])
    torch.testing.assert_close(rebuilt, got.z[label], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(got.rows[label].sum(-1), torch.ones(()).expand(got.rows[label].shape[:-1]))


def by_hand(module: nn.Module, states: Tensor, text: Tensor | None, *, joint: bool = False) -> tuple[Tensor, Tensor]:
    """Scores `[batch, head, query, key]` and values `[batch, head, key, dim]` from a module's own weights."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    if joint:  # the order of SD3
        q = torch.cat(
            [module.norm_q(heads(module.to_q(states))), module.norm_added_q(heads(module.add_q_proj(text)))], dim=2
        )
        k = torch.cat(
            [module.norm_k(heads(module.to_k(states))), module.norm_added_k(heads(module.add_k_proj(text)))], dim=2
        )
        v = torch.cat([heads(module.to_v(states)), heads(module.add_v_proj(text))], dim=2)
    else:
        source = states if text is None else text
        q, k, v = heads(module.to_q(states)), heads(module.to_k(source)), heads(module.to_v(source))
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), v


def given_to(model: Any, path: str) -> dict[str, Any]:
    """What a module is given in a plain run."""
    given: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.update(kwargs)
        if args:
            given["hidden_states"] = args[0]

    handle = model.model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    run(model)
    handle.remove()
    return given


@pytest.mark.parametrize(
    ("name", "label"), [("sd3", "L1"), ("dit", "L1"), ("pixart", "cross.L1"), ("unet", "L2"), ("unet", "cross.L0")]
)
def test_patterns_and_pattern_edits_are_a_softmax_written_out(name: str, label: str) -> None:
    model = attached(name)
    site = model.site(label)
    module = model.model.get_submodule(site.module)
    given = given_to(model, site.module)
    with torch.no_grad():
        scores, values = by_hand(
            module, given["hidden_states"], given.get("encoder_hidden_states"), joint=site.kind == "joint"
        )
    if site.kind == "cross":
        padding = model.example["encoder_attention_mask"][:, None, None] == 0
        assert padding.any()
        scores = scores.masked_fill(padding, float("-inf"))
    kind = site.key_spans[-1]
    n_keys = scores.shape[-1]
    last = slice(n_keys - 3, n_keys)  # three keys of that kind, which stand last in all of these
    start = IMAGE if site.kind == "joint" else 0
    spans = {f"{kind}.end": [n_keys - 3 - start, n_keys - 2 - start, n_keys - 1 - start]}
    with model.reading(hw.read.rows(label)) as got:
        run(model)
    torch.testing.assert_close(got.rows[label], scores.softmax(-1), atol=2e-6, rtol=1e-4)

    biased = scores.clone()
    biased[:, 1, :, last] += 2.0
    doubled = scores.softmax(-1)
    doubled[:, 2, :, last] *= 2.0
    expected = (biased.softmax(-1) @ values).transpose(1, 2), (doubled @ values).transpose(1, 2)
    edits = (
        hw.edit.bias(Head(site.id, 1), 2.0, keys=f"span:{kind}.end"),
        hw.edit.scale(Head(site.id, 2), 2.0, variable="pattern", keys=f"span:{kind}.end"),
    )
    plain = (scores.softmax(-1) @ values).transpose(1, 2)
    with model.reading(hw.read.z(label)) as got:
        run(model)
    before = got.z[label]
    with model.editing(*edits, spans=spans), model.reading(hw.read.z(label)) as got:
        run(model)
    z = got.z[label]
    torch.testing.assert_close(z[:, :, 1], expected[0][:, :, 1], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(z[:, :, 2], expected[1][:, :, 2], atol=2e-6, rtol=1e-4)
    assert not torch.allclose(plain[:, :, 1], z[:, :, 1], atol=1e-4)
    assert torch.equal(z[:, :, [0, 3]], before[:, :, [0, 3]])  # untouched heads keep their bits


@pytest.mark.parametrize(("name", "label"), [("sd3", "L0"), ("flux", "L1"), ("flux", "single.L0")])
def test_text_hidden_from_the_image_has_no_mass_left_there(name: str, label: str) -> None:
    """Isolation of the two kinds in joint attention: keys by span, queries by span, in either order of tokens."""
    model = attached(name)
    hidden = hw.edit.block(label, keys="span:text", queries="span:image")
    with model.editing(hidden), model.reading(hw.read.rows(label)) as got:
        run(model)
    text = slice(0, TEXT) if name == "flux" else slice(IMAGE, None)
    of_image = torch.ones(got.rows[label].shape[-1], dtype=torch.bool)
    of_image[text] = False
    rows = got.rows[label]
    assert rows[:, :, of_image][..., ~of_image].eq(0).all()
    assert rows[:, :, ~of_image][..., ~of_image].gt(0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones(()).expand(rows.shape[:-1]))


def test_statistics_give_the_mass_of_the_image_on_the_text() -> None:
    model = attached("flux")
    mass = hw.read.statistics("L0", wanted=["entropy"], spans=["text"])
    with model.reading(mass, hw.read.rows("L0")) as got:
        run(model)
    torch.testing.assert_close(got.statistics["L0"].span_mass["text"], got.rows["L0"][..., :TEXT].sum(-1))


def test_negative_keys_count_from_each_rows_last_word() -> None:
    """The example's second text is padded by two."""
    model = attached("pixart")
    with model.editing(hw.edit.block("cross.L0", keys=[-1])), model.reading(hw.read.rows("cross.L0")) as got:
        run(model)
    hidden = got.rows["cross.L0"].eq(0).all(dim=1).all(dim=1)
    assert hidden[0].nonzero()[:, 0].tolist() == [6]
    assert hidden[1].nonzero()[:, 0].tolist() == [4, 5, 6]


def test_values_of_the_text_can_be_edited_alone() -> None:
    model = attached("unet")
    with model.editing(hw.edit.zero("cross.L1G2", variable="v", scope="span:text")), model.reading(hw.read.z()) as got:
        run(model)
    assert got.z["cross.L1H2"].eq(0).all()
    model = attached("sd3")
    with (
        model.editing(hw.edit.zero("L0G2", variable="v", scope="span:text")),
        model.reading(hw.read.v("L0"), hw.read.rows("L0"), hw.read.z("L0")) as got,
    ):
        run(model)
    assert got.v["L0"][:, IMAGE:, 2].eq(0).all()
    assert not got.v["L0"][:, :IMAGE, 2].eq(0).any()


# -- what cannot be meant ------------------------------------------------------------------------------------


REFUSED: Sequence[tuple[str, Callable[[], Any], str]] = (
    (
        "dit",
        lambda: hw.edit.zero("L0H0", scope="span:text"),
        "'span:text': no such span was given (spans given: image)",
    ),
    ("unet", lambda: hw.edit.zero("L0H0", scope="span:text"), "the queries of L0 are of image, not of text"),
    ("unet", lambda: hw.edit.block("L0H0", keys="span:text"), "the keys of L0 are of image, not of text"),
    ("unet", lambda: hw.edit.zero("cross.L0H0", scope="span:text"), "queries of cross.L0 are of image, not of text"),
    ("sd3", lambda: hw.edit.zero("L0@1", scope="span:text"), "the queries of L0@1 are of image, not of text"),
    ("sd3", lambda: hw.edit.zero("L0", scope="decode"), "scope='decode' has no meaning at L0"),
    ("sd3", lambda: hw.edit.scale("L1", 0.5, variable="residual_post"), "L1 has no residual stream to act on"),
    ("sd3", lambda: hw.edit.zero("L0", scope="steps:0-3"), "open one around this block, with model.denoising()"),
)


@pytest.mark.parametrize(("name", "make", "line"), REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(name: str, make: Callable[[], Any], line: str) -> None:
    with pytest.raises((InputError, Refusal)) as error, attached(name).editing(make()):
        pass
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_spans_within_the_text_and_their_mistakes() -> None:
    model = attached("flux")
    zeroed = hw.edit.zero("L0H0", scope="span:text.cat")
    with model.editing(zeroed, spans={"text.cat": [2, 3]}), model.reading(hw.read.z("L0H0")) as got:
        run(model)
    assert got.z["L0H0"].eq(0).all(-1).all(0).nonzero()[:, 0].tolist() == [2, 3]
    with (
        model.editing(hw.edit.zero("L0H0", scope="span:image.corner"), spans={"image.corner": [[0], [63]]}),
        model.reading(hw.read.z("L0H0")) as got,
    ):
        run(model)
    assert got.z["L0H0"].eq(0).all(-1).nonzero().tolist() == [[0, TEXT], [1, TEXT + 63]]
    with (
        pytest.raises(InputError, match=r"'text.cat' names position 7, and the text has 7 tokens"),
        model.editing(zeroed, spans={"text.cat": [7]}),
    ):
        run(model)
    with pytest.raises(InputError, match=r"a span cannot be named 'text'"), model.editing(zeroed, spans={"text": [1]}):
        pass


# -- processors ----------------------------------------------------------------------------------------------


def test_a_processor_that_takes_a_softmax_is_served_but_for_its_queries() -> None:
    organism = zoo.build("tiny-unet")
    with torch.no_grad():
        fused = organism.model(**organism.example).sample
    organism.model.set_attn_processor(AttnProcessor())
    with hw.attach(organism.model, example=organism.example) as model:
        assert {site.label for site in model.sites} == set(SITES["unet"])
        with model.reading(hw.read.rows("cross.L0"), hw.read.z("cross.L0"), hw.read.v("cross.L0")) as got:
            torch.testing.assert_close(run(model), fused, atol=1e-5, rtol=1e-4)
        rebuilt = torch.einsum("bhqk,bkhd->bqhd", got.rows["cross.L0"], got.v["cross.L0"])
        torch.testing.assert_close(rebuilt, got.z["cross.L0"], atol=2e-6, rtol=1e-4)
        assert [span.name for span in model.site("cross.L0").spans] == ["image"]
        assert model.site("cross.L0").key_spans == ("text",)
        with pytest.raises(Refusal, match=r"read.q cannot be served at L0"), model.reading(hw.read.q("L0")):
            pass


def test_a_processor_set_after_attach_is_the_users_own_and_is_served() -> None:
    organism = zoo.build("tiny-pixart")
    with hw.attach(organism.model, example=organism.example) as model:
        with model.reading(hw.read.rows("cross.L0")) as got:
            run(model)
        before = got.rows["cross.L0"]
        mine = AttnProcessor()
        for module in model.model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(mine)
        with model.reading(hw.read.rows("cross.L0")) as got:
            run(model)
        torch.testing.assert_close(got.rows["cross.L0"], before, atol=2e-6, rtol=1e-4)
        assert all(module.processor is mine for module in model.model.modules() if hasattr(module, "processor"))


def test_sliced_attention_is_refused_with_what_to_do() -> None:
    """Its slices hold heads of several rows side by side, so that no head could be told from another."""
    organism = zoo.build("tiny-unet")
    organism.model.set_attn_processor(SlicedAttnProcessor(2))
    with pytest.raises(Refusal, match="switch attention slicing off and attach again"):
        hw.attach(organism.model, example=organism.example)


def test_a_u_net_of_the_image_alone_has_one_stack() -> None:
    torch.manual_seed(0)
    unconditional = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    with hw.attach(unconditional) as model:
        assert [site.label for site in model.sites] == ["L0", "L1", "L2", "L3"]
        assert {site.kinds for site in model.sites} == {("image",)}
        with pytest.raises(Refusal, match="L1 has no residual stream"), model.reading(hw.read.residual("L1")):
            pass


# -- what else goes with it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_no_gradient(training: bool) -> None:
    organism = zoo.build("tiny-sd3")
    edit = hw.edit.zero("L1H0", scope="span:text")

    def gates(model: Any) -> Tensor:
        with model.editing(edit), model.reading(hw.read.gate("L0")) as got:
            model(**organism.example).sample.square().sum().backward()
        gradient: Tensor = got.gate.grad["L0"]
        return gradient

    with hw.attach(organism.model, example=organism.example) as model:
        plain = gates(model)
        organism.model.enable_gradient_checkpointing()
        organism.model.train(training)
        torch.testing.assert_close(gates(model), plain)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_two_streams_and_reference_sets_work_here_too(name: str) -> None:
    model = attached(name)
    with model.editing(hw.edit.zero("L0H1")):
        expected = run(model)
    with model.dual(hw.edit.zero("L0H1")), model.editing(hw.edit.patch("L0", hw.edit.OTHER)):
        torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    reference = hw.reference(model, [model.example])
    with model.reading(hw.read.z("L0")) as got:
        run(model)
    mean = got.z["L0H1"].mean(dim=(0, 1))
    with model.editing(hw.edit.mean("L0H1", reference)), model.reading(hw.read.z("L0")) as got:
        run(model)
    torch.testing.assert_close(got.z["L0H1"], mean.expand_as(got.z["L0H1"]))


def test_blocks_of_a_denoiser_with_one_stream_are_read_and_edited() -> None:
    model = attached("unet")
    block = model.model.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with model.reading(hw.read.residual("L1"), hw.read.residual("L1", where="pre"), hw.read.mlp("L1")) as got:
        run(model)
    handle.remove()
    before, after = seen[-2:]
    assert torch.equal(got.residual_pre["L1"], before)
    assert torch.equal(got.residual_post["L1"], after)
    with model.reading(hw.read.write("L1"), hw.read.write("cross.L1", name="crossing")) as writes:
        run(model)
    added = writes.write["L1"].sum(2) + writes.crossing["cross.L1"].sum(2) + got.mlp["L1"]
    biases = block.attn1.to_out[0].bias + block.attn2.to_out[0].bias
    torch.testing.assert_close(before + added + biases, after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in SITES), ("sd3", "bfloat16")])
def test_the_doctor_passes(name: str, dtype: str) -> None:
    """In bfloat16, too, where another layout of the same numbers already gives other bits."""
    if dtype == "float32":
        report = attached(name).doctor()
    else:
        with hw.load(f"zoo:tiny-{name}", dtype=dtype) as model:
            report = model.doctor()
    failed = [(check.name, check.detail) for check in report.checks if check.status == "fail"]
    assert not failed
    aside = {check.name: check.detail for check in report.checks if check.status == "n/a"}
    assert set(aside) <= {"left padding changes nothing", "a cache changes nothing"}
    assert all(aside.values())
