"""Attention that is more than one product: a pattern used twice, z with something added, z that enters two matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import headwise as hw
from headwise import zoo
from headwise.model.attached import AttachedModel

HEADS, DIM, POSITIONS = 4, 4, 7
EXAMPLE = {"x": torch.randn(2, POSITIONS, HEADS * DIM, generator=torch.Generator().manual_seed(0))}


class Attention(nn.Module):
    """Attention written down by hand; `kind` says what else is done with its pattern and its z."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.q, self.k, self.v, self.o, self.g = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(5))
        self.relative = nn.Parameter(torch.randn(HEADS, POSITIONS, DIM))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).view(len(x), -1, HEADS, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        pattern = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        if keep is not None:
            pattern = pattern * keep
        relative = self.relative.expand(len(x), -1, -1, -1)
        if self.kind == "relative first":
            z = pattern @ relative
            z = z + pattern @ v
        elif self.kind == "copied":
            z = pattern @ v + pattern.clone().transpose(2, 3).contiguous().transpose(2, 3) @ relative
        else:
            z = pattern @ v
        if self.kind == "relative":
            z = z + pattern.view(pattern.shape) @ relative
        if self.kind == "summed":
            z = z + nn.functional.pad(pattern, (1, 0)).sum(-1, keepdim=True)
        if self.kind == "values added":
            z = z + v
        if self.kind == "reshaped":
            pattern = pattern.view(-1, *pattern.shape[2:]).detach()
        z = z.transpose(1, 2).reshape(x.shape)
        if self.kind == "gated":
            z = z * self.g(x).sigmoid()
        if self.kind == "two matrices":
            return self.o(z) + self.g(z)
        return self.o(z)


def attach(kind: str) -> AttachedModel:
    return hw.attach(Attention(kind).eval(), example=EXAMPLE)


@pytest.mark.parametrize(
    ("kind", "function"),
    [("relative", "matmul"), ("relative first", "matmul"), ("copied", "contiguous"), ("summed", "pad")],
)
def test_a_pattern_that_is_used_twice_is_not_edited(kind: str, function: str) -> None:
    with torch.no_grad(), attach(kind) as attached:
        rows = attached.site("L0").capabilities["rows"]
        assert rows.reason == (
            f"its pattern is used twice: beside its product with values, {function} takes it in as well"
        )
        edits = (hw.edit.uniform("L0H1"), hw.read.rows("L0"))
        with pytest.raises(hw.Refusal, match="its pattern is used twice"), attached.editing(edits[0]):
            pass
        with pytest.raises(hw.Refusal, match="its pattern is used twice"), attached.reading(edits[1]):
            pass


@pytest.mark.parametrize("kind", ["plain", "reshaped", "values added", "gated", "two matrices"])
def test_a_pattern_that_is_handed_on_and_no_more_is_edited(kind: str) -> None:
    with attach(kind) as attached:
        assert attached.site("L0").capabilities["rows"].ok


@pytest.mark.parametrize("kind", ["relative", "values added", "gated", "plain"])
def test_zeroing_a_head_is_zeroing_its_columns_whatever_was_added(kind: str) -> None:
    def cut(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].index_fill(-1, torch.arange(DIM, 2 * DIM), 0.0),)

    with torch.no_grad(), attach(kind) as attached:
        with attached.editing(hw.edit.zero("L0H1")):
            edited = attached(**EXAMPLE)
        hook = attached.model.o.register_forward_pre_hook(cut)
        torch.testing.assert_close(edited, attached(**EXAMPLE), rtol=0, atol=0)
        hook.remove()
        assert not torch.allclose(edited, attached(**EXAMPLE), atol=1e-3)


@pytest.mark.parametrize("kind", ["relative", "values added"])
def test_z_of_a_product_that_is_a_part_of_the_heads_is_read_and_not_edited(kind: str) -> None:
    with torch.no_grad(), attach(kind) as attached:
        assert attached.site("L0").added
        with attached.reading(hw.read.z(point="pre_gate")):
            attached(**EXAMPLE)
        edit = hw.edit.zero("L0H1", point="pre_gate")
        with pytest.raises(hw.Refusal, match=r"something is added to its z.*point='post_gate'"), attached.editing(edit):
            pass
        read = hw.read.gate("L0", point="pre_gate")
        with pytest.raises(hw.Refusal, match=r"something is added to its z.*point='post_gate'"), attached.reading(read):
            pass


def test_a_gate_is_no_sum() -> None:
    with torch.no_grad(), attach("gated") as attached:
        assert attached.site("L0").gated
        assert not attached.site("L0").added
        with attached.editing(hw.edit.zero("L0H1", point="pre_gate")):
            before = attached(**EXAMPLE)
        with attached.editing(hw.edit.zero("L0H1")):
            torch.testing.assert_close(attached(**EXAMPLE), before)


def vits() -> nn.Module:
    config = transformers.VitsConfig(
        vocab_size=38,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        window_size=4,
        ffn_dim=32,
        flow_size=16,
        spectrogram_bins=9,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1,
        wavenet_kernel_size=3,
        duration_predictor_filter_channels=16,
        depth_separable_num_layers=1,
        duration_predictor_flow_bins=4,
    )
    encoder: nn.Module = transformers.VitsModel(config).eval().text_encoder
    for name, parameter in encoder.named_parameters():
        if "emb_rel" in name:
            nn.init.normal_(parameter)
    return encoder


def test_relative_embeddings_of_values_are_noticed() -> None:
    ids = torch.randint(1, 38, (2, 9), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        hw.attach(vits(), example={"input_ids": ids, "padding_mask": torch.ones(2, 9, 1)}) as attached,
    ):
        for site in attached.sites:
            assert site.capabilities["rows"].reason.startswith("its pattern is used twice")
            assert site.added


def test_z_that_enters_two_matrices_is_not_separable() -> None:
    with torch.no_grad(), attach("two matrices") as attached:
        site = attached.site("L0")
        assert site.capabilities["separable"].reason == "its z enters g as well, not its output projection alone"
        assert site.projection is None
        with pytest.raises(hw.Refusal, match="its z enters g as well"), attached.editing(hw.edit.zero("L0H1")):
            pass


def test_z_of_the_registry_that_enters_two_matrices_is_not_separable() -> None:
    class Twice(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own, self.second = own, nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x) + self.second(x)

    model: Any = zoo.build("tiny-llama").model
    attention = model.model.layers[0].self_attn
    attention.o_proj = Twice(attention.o_proj)
    with hw.attach(model) as attached:
        assert "o_proj.second as well" in attached.site("L0").capabilities["separable"].reason
        assert attached.site("L1").capabilities["separable"].ok


def test_a_pattern_that_misses_its_product_in_a_run_is_said_to() -> None:
    keep = torch.ones(2, 1, 1, POSITIONS).index_fill(3, torch.tensor([2]), 0.0)
    with torch.no_grad(), attach("plain") as attached:
        never = pytest.raises(hw.NotFired, match=r"L0 ran in this run.*no product of it with values was seen")
        with never, attached.reading(hw.read.rows("L0")):
            attached(EXAMPLE["x"], keep)


@pytest.fixture
def in_the_open() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def encoder_of_torch() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_that_torch_may_fuse_are_refused_with_what_to_do(gradients: bool) -> None:
    refused = pytest.raises(hw.Refusal, match=r"layers.0 is a TransformerEncoderLayer.*set_fastpath_enabled\(False\)")
    with torch.set_grad_enabled(gradients), refused:
        hw.attach(encoder_of_torch(), example={"src": torch.randn(2, 6, 16)})


@pytest.mark.usefixtures("in_the_open")
@pytest.mark.parametrize("masked", [False, True])
def test_the_layers_of_torchs_encoder_are_served_where_it_does_not_fuse_them(masked: bool) -> None:
    encoder, x = encoder_of_torch(), torch.randn(2, 6, 16)
    hidden = torch.zeros(2, 6, dtype=torch.bool).index_fill(1, torch.tensor([5]), masked)
    example = {"src": x, "src_key_padding_mask": hidden} if masked else {"src": x}
    with torch.no_grad(), hw.attach(encoder, example=example) as attached:
        plain = attached(**example)
        with attached.reading(hw.read.z()):
            assert torch.equal(attached(**example), plain)
        with attached.editing(hw.edit.zero("L0H1")):
            edited = attached(**example)
        encoder.layers[0].self_attn.out_proj.weight[:, 4:8] = 0
        by_hand = attached(**example)
    torch.testing.assert_close(edited, by_hand)
    assert not torch.allclose(edited, plain, atol=1e-3)


# -- what is said where nothing can be served -------------------------------------------------------------------------


def test_the_doctor_names_what_is_refused_on_a_model_without_a_configuration() -> None:
    with attach("relative") as attached:
        report = attached.doctor()
    assert report.passed
    assert report.summary == (
        "Safe to use; patterns, scores and their edits are refused at every site; "
        "queries, keys and their edits are refused at every site."
    )
    (padding,) = [check for check in report.checks if check.name == "left padding changes nothing"]
    assert padding.status == "n/a"
    assert report.sites[0].capabilities["gated"] == "no: something is added to z"


def test_what_has_no_inputs_to_make_up_is_told_to_pass_them() -> None:
    with pytest.raises(hw.InputError, match=r"Linear .* no model with attention whose inputs .* pass example="):
        hw.attach(nn.Linear(3, 3))


def test_a_tokenizer_is_called() -> None:
    with pytest.raises(hw.InputError, match="tokenizer= is a int"):
        hw.attach(Attention("plain").eval(), 3, example=EXAMPLE)


def test_a_stack_without_sites_is_explained() -> None:
    with attach("plain") as attached:
        with pytest.raises(hw.InputError, match=r"'encoder' names no heads: this model has no stack.*it has main"):
            attached.heads("encoder")
        assert len(attached.heads("main")) == HEADS
