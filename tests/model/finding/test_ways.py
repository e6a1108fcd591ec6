"""How writes reach the stream: what is measured on tiny models, shown again by taking the write away; and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import headwise as hw
from headwise.model.attached import AttachedModel
from headwise.model.finding.norms import FinalNorm, NormAffine, measure_norm
from headwise.model.finding.sublayers import first_tensor
from headwise.model.finding.ways import Passed, Step, Way, depends, find_way, multiple_of_identity, norm_back


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as attached:
        yield attached


def ways_of(model: AttachedModel, label: str) -> Any:
    return model.table.block(label).ways


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox", "qwen3", "mixtral", "deepseek_v3", "t5"], indirect=True)
def test_plain_models_add_writes_as_they_are(model: AttachedModel) -> None:
    for block in model.table.sublayers.blocks.values():
        assert set(block.ways.values()) == {Way((), 1.0)}, block.ways


@pytest.mark.parametrize("model", ["granite"], indirect=True)
def test_a_residual_multiplier_is_a_factor(model: AttachedModel) -> None:
    ways = ways_of(model, "L1")
    assert ways["L1"].steps == ways["mlp"].steps == ()
    assert ways["L1"].factor == ways["mlp"].factor == pytest.approx(0.7)
    assert ways["stream"] == Way((), 1.0)


@pytest.mark.parametrize("model", ["gemma2", "gemma3_text", "olmo2"], indirect=True)
def test_a_norm_behind_the_attention_is_a_step(model: AttachedModel) -> None:
    for label in ("L0", "L2"):
        way = ways_of(model, label)[label]
        (step,) = way.steps
        assert (step.factor, way.factor, step.norm.kind) == (1.0, 1.0, "rms")
        assert step.norm.module == f"model.layers.{label[1:]}.post_attention_layernorm"
        assert ways_of(model, label)["stream"] == Way((), 1.0)


@pytest.mark.parametrize("model", ["bert", "roberta"], indirect=True)
def test_norms_in_the_stream_itself_are_steps_of_all_that_passes_them(model: AttachedModel) -> None:
    ways = ways_of(model, "L1")
    names = [step.norm.module.rpartition("layer.1.")[2] for step in ways["L1"].steps]
    assert names == ["attention.output.LayerNorm", "output.LayerNorm"]
    assert [step.norm.module for step in ways["stream"].steps] == [step.norm.module for step in ways["L1"].steps]
    assert [step.norm.module for step in ways["mlp"].steps] == [ways["L1"].steps[1].norm.module]
    assert {step.norm.kind for step in ways["L1"].steps} == {"layer"}


@pytest.mark.parametrize("model", ["bart", "t5"], indirect=True)
def test_decoders_have_a_way_for_each_attention(model: AttachedModel) -> None:
    ways = ways_of(model, "L0")
    cross = [label for label in ways if label.startswith("cross")]
    assert len(cross) == 1
    assert isinstance(ways["L0"], Way)
    assert isinstance(ways[cross[0]], Way)
    assert len(ways["L0"].steps) >= len(ways[cross[0]].steps)


@pytest.mark.parametrize("model", ["jamba", "albert"], indirect=True)
def test_what_cannot_be_followed_has_a_reason(model: AttachedModel) -> None:
    """A block whose mixer is no attention; a block that is several layers."""
    assert isinstance(ways_of(model, "L0")["stream"], str)


@pytest.mark.parametrize("model", ["llama", "granite", "gemma2", "gpt_neox", "bert"], indirect=True)
def test_the_way_is_how_the_stream_moves_with_the_write(model: AttachedModel) -> None:
    """The block run with the feed-forward switched off and the scales of the norms on the way held."""
    block, width = model.table.block("L1"), model.site("L1").d_model
    way = block.ways["L1"]
    assert isinstance(way, Way)
    module_of = model.model.get_submodule
    shift, towards = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    affines = {step.norm.module: step.norm.affine(model.model) for step in way.steps}
    scales: dict[str, Tensor] = {}

    def keep(step: Step) -> Any:
        def kept(module: nn.Module, args: Any, output: Tensor) -> None:
            scales[step.norm.module] = step.norm.scale(args[0])

        return kept

    def hold(step: Step) -> Any:
        def held(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x, affine = args[0], affines[step.norm.module]
            centred = x - x.mean(-1, keepdim=True) if step.norm.kind == "layer" else x
            return affine.gain * centred * scales[step.norm.module][..., None] + affine.bias

        return held

    def stream(norms: Any, by: float) -> Tensor:
        out: list[Tensor] = []
        with ExitStack() as undo, torch.no_grad():
            hooks = [(step.norm.module, norms(step)) for step in way.steps]
            hooks.append((str(block.mlp), lambda module, args, output: torch.zeros_like(first_tensor(output))))
            hooks.append((str(model.site("L1").projection), lambda module, args, output: output + by * shift))
            hooks.append((block.module, lambda module, args, output: out.append(first_tensor(output))))
            for name, hook in hooks:
                undo.callback(module_of(name).register_forward_hook(hook).remove)
            model.model(**model.example)
        return out[0]

    still = stream(keep, 0.0)
    moved = stream(hold, 1.0) - still
    back = way.back(towards.expand(moved.shape), scales, affines)
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(moved @ towards, back @ shift, rtol=1e-3, atol=1e-3)


# -- by hand -----------------------------------------------------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def passed(norm: nn.Module, x: Tensor) -> tuple[Tensor, Passed]:
    y = norm(x)
    return y, Passed("norm", norm, x, x.detach().clone(), y, y.detach().clone())


def start(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_factors_norms_and_factors_are_found_in_order() -> None:
    o, x = start(), start(1)
    taken = 2.0 * o + x
    y, each = passed(Rms(8), taken)
    way = find_way(o, 3.0 * y + torch.tanh(x), [each], [])
    assert way is not None
    assert (way.factor, way.steps[0].factor, way.steps[0].norm.kind) == (3.0, 2.0, "rms")


def test_a_write_that_also_goes_past_the_norm_has_no_way() -> None:
    o = start()
    y, each = passed(Rms(8), 1.0 * o)
    assert find_way(o, y + o, [each], []) is None
    assert find_way(o, y, [each], []) is not None


def test_what_is_cut_does_not_count() -> None:
    o = start()
    through = torch.tanh(o)
    assert find_way(o, o + through, [], []) is None
    assert find_way(o, o + through, [], [through]) == Way((), 1.0)


@pytest.mark.parametrize(
    "function", [torch.tanh, lambda o: o * torch.arange(8.0), lambda o: 0 * o, lambda o: o.flip(1)]
)
def test_other_functions_are_no_ways(function: Any) -> None:
    o = start()
    assert find_way(o, function(o), [], []) is None


def test_small_things() -> None:
    o, x = start(), start(1)
    assert multiple_of_identity(-0.25 * o + x, o) == -0.25
    assert multiple_of_identity(o, o) == 1.0
    assert multiple_of_identity(x * 2, o) is None
    assert depends(o * x, o, [])
    assert not depends(x * 2, o, [])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_back_is_the_transpose_of_the_map_with_the_scale_held(kind: str) -> None:
    module = nn.LayerNorm(8) if kind == "layer" else Rms(8)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    x, d, u = (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    norm = measure_norm("n", module, x, module(x))
    assert isinstance(norm, FinalNorm)
    assert norm.kind == kind
    gain = module.weight.detach()
    scale = norm.scale(x)
    forward = gain * (d - d.mean(-1, keepdim=True) if kind == "layer" else d) * scale[..., None]
    back = norm_back(norm, u, scale, NormAffine(gain, torch.zeros(8)))
    torch.testing.assert_close((back * d).sum(-1), (forward * u).sum(-1), rtol=1e-4, atol=1e-5)
    way = Way((Step(2.0, norm),), 3.0)
    twice = way.back(u, {"n": scale}, {"n": NormAffine(gain, torch.zeros(8))})
    torch.testing.assert_close(twice, 6.0 * back)


def test_a_stream_that_is_changed_between_blocks_has_no_way() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    network = transformers.LlamaForCausalLM(config).eval()
    first = network.model.layers[0]
    first.register_forward_hook(lambda module, args, output: output)
    network.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with hw.attach(network, name="between") as model:
        assert model.table.block("L0").ways["stream"] == Way((), 1.0)
        assert "changed between" in ways_of(model, "L1")["stream"]
