"""Models with attention code of their own: patterns, z, edits and gradients against ways that do not know headwise.

Patterns are held against what the model itself returns on eager attention (`output_attentions`), pattern edits against
a softmax of torch replaced by one that edits its own result, z against plain hooks on the output projection.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import _get_current_function_mode_stack as modes_on
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel
from headwise.zoo import Organism

ALL = [row.name for row in zoo.outside_registry()]
FUSED = {"tiny-falcon", "tiny-falcon-mqa", "tiny-wavlm"}
DECODERS = [row.name for row in zoo.outside_registry() if "decoder" in row.tags]
WITH_CACHE = [name for name in DECODERS if name != "tiny-openai-gpt"]
every = pytest.mark.parametrize("name", ALL)


@cache
def organism(name: str) -> Organism:
    return zoo.build(name)


@pytest.fixture
def attached(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    built = organism(request.getfixturevalue("name"))
    with torch.no_grad(), hw.attach(built.model, built.tokenizer, example=built.example) as model:
        yield model


def output_of(model: Any) -> Tensor:
    output = model(**model.example)
    return next(output[key] for key in ("logits", "last_hidden_state") if key in output)


def hooks_on(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return found + [module for module in model.modules() if "forward" in module.__dict__]


# -- sites -----------------------------------------------------------------------------------------------------------


@every
def test_sites_are_found_with_their_geometry(name: str, attached: AttachedModel) -> None:
    row = next(row for row in zoo.outside_registry() if row.name == name)
    watched = [site for site in attached.sites if site.route == "watched"]
    assert watched
    if name == "tiny-bigbird_pegasus":  # the encoder has code of its own
        assert [site.label for site in watched] == ["encoder.L0", "encoder.L1"]
        assert {site.route for site in attached.sites} == {"registry", "watched"}
    elif name == "tiny-led":  # the encoder's windows are out of reach
        assert attached.table.stacks == ("main", "cross")
    else:
        assert watched == list(attached.sites)
    n_kv_heads = 1 if "mqa" in row.tags else 2 if "gqa" in row.tags else 4
    for site in watched:
        assert (site.n_heads, site.n_kv_heads, site.head_dim) == (4, n_kv_heads, 12)
        assert bool(site.capabilities["qk"]) == (name in FUSED)
        assert site.qk_dim == (12 if name in FUSED else 0)
        assert site.capabilities["rows"].ok
        assert site.capabilities["separable"].ok
        assert (site.kind == "cross") == site.label.startswith("cross")
        assert site.causal == (site.id.stack == "main" and "encoder" not in row.tags and name != "tiny-fsmt")
        assert (site.projection is None) == (name == "tiny-wavlm")
        if site.projection is not None:
            assert attached.model.get_submodule(site.projection).weight.shape == (48, 48)
    if name in WITH_CACHE:
        assert all(site.capabilities["cache"] for site in attached.sites)


def test_a_softmax_without_a_product_is_named() -> None:
    built = organism("tiny-led")
    with hw.attach(built.model, example=built.example) as attached:
        assert [each.module for each in attached.unserved] == [
            f"led.encoder.layers.{layer}.self_attn.longformer_self_attn" for layer in range(2)
        ]
        assert "2 modules attend out of reach" in repr(attached)
        with pytest.raises(hw.InputError, match=r"no stack 'encoder'.*longformer_self_attn attends out of reach"):
            attached.site("encoder.L0")
        assert "longformer_self_attn attends out of reach" in attached.doctor().summary


def test_a_model_without_attention_is_refused() -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    with pytest.raises(hw.Refusal, match=r"no attention was found in MambaForCausalLM.*softmax") as caught:
        hw.attach(transformers.MambaForCausalLM(config).eval())
    assert "\n" not in str(caught.value)


class Attention(nn.Module):
    """Two heads of four dimensions, written down by hand, with something out of the ordinary behind the scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.projection = nn.Linear(8, 8)
        self.convolution = nn.Conv2d(2, 2, (3, 1), padding=(1, 0), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(len(x), -1, 2, 4).transpose(1, 2)
        pattern = (h @ h.transpose(-1, -2)).softmax(-1)
        z = (2 * pattern if self.kind == "doubled" else pattern) @ h
        if self.kind == "added to in place":
            z += self.convolution(h)
        joined = z.transpose(1, 2).reshape(x.shape)
        if self.kind == "projected twice":
            return self.projection(joined) + self.projection(x)
        return self.projection(joined)


class Picking(nn.Module):
    """Every head picks queries in an order of its own, and puts what they found back in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)
        self.inner = Attention("plain")

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(len(x), -1, 2, 4).transpose(1, 2)
        order = h.sum(-1).argsort(-1)[..., None].expand_as(h)
        z = (h.gather(2, order) @ h.transpose(-1, -2)).softmax(-1) @ h
        z = torch.zeros_like(h).scatter(2, order, z)
        return self.inner(self.projection(z.transpose(1, 2).reshape(x.shape)))


EXAMPLE = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}


def test_a_pattern_that_is_changed_before_its_product_is_refused_by_name() -> None:
    with pytest.raises(hw.Refusal, match=r"the model: it takes a softmax, and no product of it"):
        hw.attach(Attention("doubled").eval(), example=EXAMPLE)


def test_what_is_written_into_z_behind_the_product_is_a_gate() -> None:
    model, h = Attention("added to in place").eval(), EXAMPLE["x"].view(2, 5, 2, 4).transpose(1, 2)
    with torch.no_grad(), hw.attach(model, example=EXAMPLE) as attached:
        site = attached.site("L0")
        assert site.gated
        assert site.projection == "projection"
        reads = (hw.read.z(name="after"), hw.read.z(point="pre_gate", name="before"), hw.read.rows("L0"))
        with attached.reading(*reads) as got:
            attached(**EXAMPLE)
        before = (got.rows["L0"] @ h).transpose(1, 2)
        torch.testing.assert_close(got.before["L0"], before)
        torch.testing.assert_close(got.after["L0"], before + model.convolution(h).transpose(1, 2))


def test_queries_out_of_order_are_out_of_reach_and_said_to_be() -> None:
    with torch.no_grad(), hw.attach(Picking().eval(), example=EXAMPLE) as attached:
        assert [site.module for site in attached.sites] == ["inner"]
        assert [each.module for each in attached.unserved] == [""]
        assert "picks the queries" in attached.unserved[0].reason


def test_a_projection_that_takes_in_other_tensors_is_not_hooked_and_z_is_served_at_its_product() -> None:
    model = Attention("projected twice").eval()
    with torch.no_grad(), hw.attach(model, example=EXAMPLE) as attached:
        site = attached.site("L0")
        assert site.projection is None
        assert site.capabilities["projection"].reason == "its output projection runs 2 times for 1 calls of attention"
        with attached.reading(hw.read.z()) as got:
            plain = attached(**EXAMPLE)
        cut = got.z["L0"].flatten(2).clone()
        cut[..., 4:] = 0
        with attached.editing(hw.edit.zero("L0H1")):
            edited = attached(**EXAMPLE)
        torch.testing.assert_close(edited, model.projection(cut) + model.projection(EXAMPLE["x"]))
        assert not torch.equal(edited, plain)


class SharedKeys(nn.Module):
    """A fused call whose values have more heads than its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(len(x), -1, 4, 2).transpose(1, 2)
        z = functional.scaled_dot_product_attention(h, h[:, :2], h, enable_gqa=True)
        return self.projection(z.transpose(1, 2).reshape(x.shape))


def test_values_that_go_by_other_groups_than_keys_are_refused() -> None:
    with torch.no_grad(), hw.attach(SharedKeys().eval(), example=EXAMPLE) as attached:
        refused = pytest.raises(
            hw.Refusal, match=r"read.v cannot be served at L0: its values have 4 heads and its keys 2"
        )
        with refused, attached.reading(hw.read.v()):
            pass
        with attached.reading(hw.read.z(), hw.read.rows("L0")) as got:
            attached(**EXAMPLE)
    values = EXAMPLE["x"].view(2, 5, 4, 2).transpose(1, 2)
    torch.testing.assert_close(got.z["L0"], (got.rows["L0"] @ values).transpose(1, 2))


class Inner(nn.Module):
    """Attention by the registry."""

    def forward(self, h: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        z: Tensor = attend(self, h, h, h, None, is_causal=False)[0].transpose(1, 2)
        return z


class Outer(nn.Module):
    """Attention of its own, around a module that asks the registry."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(len(x), -1, 2, 4).transpose(1, 2)
        x = self.first(self.inner(h).transpose(1, 2).reshape(x.shape))
        h = x.view(len(x), -1, 2, 4).transpose(1, 2)
        return self.second(((h @ h.transpose(-1, -2)).softmax(-1) @ h).transpose(1, 2).reshape(x.shape))


def test_both_routes_in_one_module_are_told_apart() -> None:
    model = Outer().eval()
    with torch.no_grad(), hw.attach(model, example=EXAMPLE) as attached:
        routes = {site.module: (site.route, site.projection) for site in attached.sites}
        assert routes == {"": ("watched", "second"), "inner": ("registry", "first")}
        watched = next(site.label for site in attached.sites if site.route == "watched")
        with attached.reading(hw.read.rows(watched)) as got:
            attached(**EXAMPLE)
        h = model.first(model.inner(EXAMPLE["x"].view(2, 5, 2, 4).transpose(1, 2)).transpose(1, 2).reshape(2, 5, 8))
        h = h.view(2, 5, 2, 4).transpose(1, 2)
        torch.testing.assert_close(got.rows[watched], (h @ h.transpose(-1, -2)).softmax(-1))


# -- what costs nothing and changes nothing --------------------------------------------------------------------------


@every
def test_an_idle_model_has_no_hooks_and_reads_change_no_bit(name: str) -> None:
    built = organism(name)
    with torch.no_grad():
        plain = output_of(unattached(built))
        with hw.attach(built.model, example=built.example) as attached:
            assert hooks_on(built.model) == []
            assert torch.equal(output_of(attached), plain)
            labels = [site.label for site in attached.sites]
            with attached.reading(hw.read.rows(labels), hw.read.v(labels), hw.read.z(labels)):
                assert torch.equal(output_of(attached), plain)
            assert hooks_on(built.model) == []
    assert modes_on() == []


def unattached(built: Organism) -> Any:
    class Plain:
        example = built.example

        def __call__(self, **inputs: Any) -> Any:
            return built.model(**inputs)

    return Plain()


@pytest.mark.parametrize("name", [name for name in ALL if name != "tiny-wavlm"])
def test_z_and_its_edits_are_served_by_the_projection_alone(name: str, attached: AttachedModel) -> None:
    heads = [site.label for site in attached.sites if site.route == "watched"]
    with attached.reading(hw.read.z(heads), hw.read.write(heads)), attached.editing(hw.edit.scale(heads, 0.5)):
        assert not any("forward" in module.__dict__ for module in attached.model.modules())
        output_of(attached)
    with attached.reading(hw.read.rows(heads[:1])):  # patterns: that one module is watched, and no other
        site = attached.site(heads[0])
        own = [path for path, module in attached.model.named_modules() if "forward" in module.__dict__]
        assert own == [site.module]
        output_of(attached)


# -- known answers ---------------------------------------------------------------------------------------------------

# How each type calls what it returns with output_attentions.
RETURNED = {
    "main": ("attentions", "decoder_attentions"),
    "cross": ("cross_attentions",),
    "encoder": ("encoder_attentions",),
}


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("tiny-wavlm", "tiny-led")])
def test_rows_are_the_patterns_that_the_model_returns(name: str) -> None:
    built, eager = organism(name), zoo.build(name, attn="eager")
    with torch.no_grad():
        returned = eager.model(**eager.example, output_attentions=True)
        with hw.attach(built.model, example=built.example) as attached:
            labels = [site.label for site in attached.sites]
            with attached.reading(hw.read.rows(labels)) as got:
                output_of(attached)
            real = attached.example["attention_mask"].bool()
            for site in attached.sites:
                expected = next(
                    returned[key][site.id.layer] for key in RETURNED[site.id.stack] if returned.get(key) is not None
                )
                rows = got.rows[site.label]
                if site.id.stack == "encoder" or rows.shape[2] == real.shape[1]:  # what padding looks at is nobody's
                    rows, expected = (x.transpose(1, 2)[real] for x in (rows, expected))
                torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
                assert rows.std() > 0.01


@pytest.mark.parametrize("name", [name for name in ALL if name != "tiny-wavlm"])
def test_zeroing_is_zeroing_the_slice_by_hand(name: str, attached: AttachedModel) -> None:
    site = attached.sites[-1]
    projection = attached.model.get_submodule(str(site.projection))

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., 24:36] = 0
        return (z, *args[1:])

    with attached.editing(hw.edit.zero(f"{site.label}H2")):
        edited = output_of(attached)
    hook = projection.register_forward_pre_hook(cut)
    expected = output_of(attached)
    hook.remove()
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, output_of(attached))


def test_zeroing_inside_torchs_fused_attention_is_cutting_the_projections_weights() -> None:
    built = zoo.build("tiny-wavlm")
    with torch.no_grad(), hw.attach(built.model, example=built.example) as attached:
        with attached.editing(hw.edit.zero("L1H2")):
            edited = output_of(attached)
        plain = output_of(attached)
        site = attached.site("L1")
        built.model.get_submodule(site.module).out_proj.weight[:, 24:36] = 0
        torch.testing.assert_close(edited, output_of(attached), atol=1e-5, rtol=1e-4)
        assert (edited - plain).abs().max() > 1e-2
        refused = pytest.raises(hw.Refusal, match=r"read.write cannot be served at L1.*one fused call of torch")
        with refused, attached.reading(hw.read.write("L1")):
            pass


@contextmanager
def softmax_edited(turn: int, edit: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """`edit(scores, pattern)` of head 1 in place of what the softmax of that turn returns."""
    own, calls = functional.softmax, []

    def softmax(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        pattern = own(scores, *args, **options)
        calls.append(1)
        if len(calls) - 1 != turn:
            return pattern
        heads = pattern.reshape(-1, 4, *pattern.shape[-2:]).clone()
        heads[:, 1] = edit(scores.reshape(heads.shape)[:, 1], heads[:, 1]).to(heads.dtype)
        return heads.reshape(pattern.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "softmax", softmax)
        yield


def uniform_by_hand(scores: Tensor, pattern: Tensor) -> Tensor:
    seen = (scores > -9e3).float()
    return seen / seen.sum(-1, keepdim=True).clamp(min=1)


def doubled_first_by_hand(scores: Tensor, pattern: Tensor) -> Tensor:
    pattern = pattern.clone()
    pattern[..., 3] *= 2
    return pattern / pattern.sum(-1, keepdim=True)


ONE_SOFTMAX_A_LAYER = [name for name in ALL if name not in FUSED and "bigbird" not in name and "led" not in name]


@pytest.mark.parametrize("name", [*ONE_SOFTMAX_A_LAYER, "tiny-falcon", "tiny-falcon-mqa"])
@pytest.mark.parametrize(
    ("edit", "by_hand"),
    [
        (hw.edit.uniform, uniform_by_hand),
        (partial(hw.edit.reweight, factor=2.0, keys=[3]), doubled_first_by_hand),
        (partial(hw.edit.bias, amount=float(torch.tensor(2.0).log()), keys=[3]), doubled_first_by_hand),
    ],
    ids=["uniform", "reweight", "bias"],
)
def test_pattern_and_score_edits_are_those_of_an_edited_softmax(
    name: str, edit: Callable[..., hw.model.edit.Edit], by_hand: Callable[[Tensor, Tensor], Tensor]
) -> None:
    built = zoo.build(name, attn="eager" if name in FUSED else None)
    n_encoder = built.model.config.encoder_layers if built.model.config.is_encoder_decoder else 0
    with torch.no_grad():
        plain = output_of(unattached(built))
        with softmax_edited(n_encoder, by_hand):  # encoder layers attend first
            expected = output_of(unattached(built))
        if name in FUSED:
            built = organism(name)
        with hw.attach(built.model, example=built.example) as attached, attached.editing(edit("L0H1")):
            edited = output_of(attached)
    mask = built.example["attention_mask"].bool()
    real = mask if edited.shape[1] == mask.shape[1] else torch.ones(edited.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(edited[real], expected[real], atol=2e-5, rtol=1e-4)
    assert (edited - plain)[real].abs().max() > 1e-3


@every
def test_statistics_are_those_of_the_rows(name: str, attached: AttachedModel) -> None:
    label = attached.sites[0].label
    with attached.reading(hw.read.statistics([label], wanted=["entropy", "max"]), hw.read.rows([label])) as got:
        output_of(attached)
    rows, found = got.rows[label], got.statistics[label]
    known = ~found.max.isnan()
    torch.testing.assert_close(found.max[known], rows.max(-1).values[known])
    torch.testing.assert_close(found.entropy[known], -(rows * rows.clamp(min=1e-30).log()).sum(-1)[known])


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-falcon-mqa"])
def test_values_of_a_group_reach_its_query_heads_and_no_other(name: str, attached: AttachedModel) -> None:
    site = attached.site("L1")
    with attached.reading(hw.read.z("L1")) as plain:
        output_of(attached)
    with attached.reading(hw.read.z("L1")) as got, attached.editing(hw.edit.zero("L1G0", variable="v")):
        output_of(attached)
    before, after = plain.z["L1"], got.z["L1"]
    own = range(site.group_size)
    assert not after[:, :, list(own)].any()
    assert torch.equal(after[:, :, site.group_size :], before[:, :, site.group_size :])


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-falcon-mqa"])
def test_queries_of_a_fused_call_are_read_and_edited(name: str, attached: AttachedModel) -> None:
    """Equal queries of 0 see every visible key alike: the pattern is uniform."""
    with attached.editing(hw.edit.zero("L0H1", variable="q")), attached.reading(hw.read.rows("L0H1")) as got:
        by_query = output_of(attached)
    rows = got.rows["L0H1"]
    torch.testing.assert_close(rows[0, -1], torch.full((32,), 1 / 32))
    with attached.editing(hw.edit.uniform("L0H1")):
        torch.testing.assert_close(output_of(attached)[0], by_query[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-bloom", "tiny-deberta-v2"])
@pytest.mark.parametrize("variable", ["q", "k"])
def test_queries_and_keys_of_scores_of_the_models_own_are_refused(
    name: str, variable: str, attached: AttachedModel
) -> None:
    heads = "L0H0" if variable == "q" else "L0G0"
    read = getattr(hw.read, variable)(heads)
    refused = pytest.raises(hw.Refusal, match=f"read.{variable} cannot be served at L0: the model makes its scores")
    with refused, attached.reading(read):
        pass
    refused = pytest.raises(hw.Refusal, match=f"edit.zero on {variable} cannot be served at L0.*still work")
    with refused, attached.editing(hw.edit.zero(heads, variable=variable)):
        pass


# -- positions before rows -------------------------------------------------------------------------------------------


def test_a_model_that_lays_positions_before_rows_is_read_and_edited_at_the_right_places() -> None:
    built = organism("tiny-fsmt")
    with torch.no_grad(), hw.attach(built.model, example=built.example) as attached:
        site = attached.site("encoder.L1")
        assert site.entering == "positions"
        entered: list[Tensor] = []
        projection = attached.model.get_submodule(str(site.projection))
        hook = projection.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        reads = (hw.read.z("encoder.L1"), hw.read.write("encoder.L1"), hw.read.residual("encoder.L1", where="pre"))
        with attached.reading(*reads) as got:
            output_of(attached)
        assert entered[0].shape == (32, 2, 48)
        assert torch.equal(got.z["encoder.L1"].flatten(2), entered[0].transpose(0, 1))
        assert got.write["encoder.L1"].shape == (2, 32, 4, 48)
        hook.remove()

        # Head 1 in row 0 at column 5, and nothing else.
        def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[5, 0, 12:24] = 0
            return (z,)

        with attached.editing(hw.edit.zero("encoder.L1H1", queries=[5], rows=[0])):
            edited = output_of(attached)
        hook = projection.register_forward_pre_hook(cut)
        assert torch.equal(output_of(attached), edited)
        hook.remove()
        stream = got.residual_pre["encoder.L1"]
        block = attached.model.model.encoder.layers[1]
        seen: list[Tensor] = []
        hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        output_of(attached)
        hook.remove()
        assert torch.equal(stream, seen[0].transpose(0, 1))


# -- generation, gradients, threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_CACHE)
def test_edits_in_generate_act_at_every_step_with_beams_and_padding(name: str, attached: AttachedModel) -> None:
    site = attached.site("L1")
    projection = attached.model.get_submodule(str(site.projection))

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_fill(-1, torch.arange(12, 24), 0.0), *args[1:])

    for beams in (1, 2):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        with attached.editing(hw.edit.zero("L1H1")) as opened:
            edited = attached.generate(**attached.example, **options, output_logits=True, return_dict_in_generate=True)
        assert [fired.calls for fired in opened.fired] == [4]
        hook = projection.register_forward_pre_hook(cut)
        by_hand = attached.generate(**attached.example, **options, output_logits=True, return_dict_in_generate=True)
        hook.remove()
        assert torch.equal(edited.sequences, by_hand.sequences)
        assert all(torch.equal(a, b) for a, b in zip(edited.logits, by_hand.logits, strict=True))


@pytest.mark.parametrize("name", ["tiny-bloom", "tiny-falcon-mqa", "tiny-xglm"])
def test_rows_of_a_generation_are_those_of_one_forward_over_its_text(name: str, attached: AttachedModel) -> None:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    one = {key: value[:1] for key, value in attached.example.items()}
    with attached.reading(hw.read.rows("L1"), hw.read.z("L1")) as got:
        text = attached.generate(**one, **options)
        cached, z = got.rows["L1"], got.z["L1"]
        attached(input_ids=text[:, :-1])
        torch.testing.assert_close(cached, got.rows["L1"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(z, got.z["L1"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-gptj", "tiny-falcon", "tiny-mvp"])
def test_two_streams_in_one_batch_are_two_runs(name: str, attached: AttachedModel) -> None:
    with attached.editing(hw.edit.uniform("L0H1")):
        second = output_of(attached)
    first = output_of(attached)
    with attached.dual(hw.edit.uniform("L0H1")) as dual:
        output_of(attached)
    torch.testing.assert_close(dual.first, first, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dual.second, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-bloom", "tiny-gptj", "tiny-falcon"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(name: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        built = zoo.build(name)
        for module in built.model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        built.model.train()
        if checkpointing:
            built.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        factor = torch.ones(4, requires_grad=True)
        with hw.attach(built.model, example=built.example) as attached:
            reads = (hw.read.gate("L1"), hw.read.rows("L2", grad=True))
            edits = (hw.edit.scale("L1", factor), hw.edit.uniform("L0H1"))
            with attached.editing(*edits), attached.reading(*reads) as got:
                built.model(**built.example, labels=built.example["input_ids"]).loss.backward()
            found.append((got.gate.grad["L1"], got.rows.grad["L2"], factor.grad))
        assert modes_on() == []
    for plain, repeated in zip(*found, strict=True):
        torch.testing.assert_close(plain, repeated)
        assert plain.abs().max() > 0
    torch.testing.assert_close(found[0][0].sum(dim=(0, 1)), found[0][2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-bloom"])
def test_an_error_in_the_forward_leaves_nothing_on(name: str, attached: AttachedModel) -> None:
    def fails(pattern: Tensor, here: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attached.editing(hw.edit.rewrite("L1H0", fails)):
        output_of(attached)
    assert modes_on() == []
    assert hooks_on(attached.model) == []
    with attached.reading(hw.read.rows("L1")) as got:
        output_of(attached)
    assert len(got.rows) == 1
    gc.collect()
