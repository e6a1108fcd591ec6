"""Cross-attention against occlusion, on a Whisper of which all but one head are silent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import headwise as hw
from headwise.errors import InputError, Refusal
from headwise.find.towers import cross_saliency, interval
from headwise.find.towers.correlation import pearson, spearman
from headwise.find.towers.cross_saliency import _Occlusion
from headwise.model.attached import AttachedModel


@pytest.fixture(scope="module")
def whisper() -> Iterator[AttachedModel]:
    """One layer each side; only head 2 of four cross-attention heads writes."""
    torch.manual_seed(3)
    config = WhisperConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.3,
    )
    model = WhisperForConditionalGeneration(config).eval()
    projection = model.model.decoder.layers[0].encoder_attn.out_proj
    with torch.no_grad():
        silent = torch.ones(32, dtype=torch.bool)
        silent[16:24] = False
        projection.weight[:, silent] = 0
    with hw.attach(model, example=sound(8, 24)) as attached:
        yield attached


def sound(bins: int, frames: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 40, (2, 7), generator=generator)
    return {"input_features": torch.randn(2, bins, frames, generator=generator), "decoder_input_ids": tokens}


def run(model: AttachedModel, **given: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**given).logits
    return logits.log_softmax(-1)


def test_saliency_is_told_by_the_one_head_that_writes(whisper: AttachedModel) -> None:
    found = cross_saliency(whisper, whisper.example)
    heads = found.weighted.heads.mean()["cross"][0]
    assert np.isnan(heads[[0, 1, 3]]).all()  # they move nothing
    assert heads[2] > 0.6
    assert found.weighted_ranks.heads.mean()["cross"][0][2] > 0.6
    weights = found.pattern.heads.mean()["cross"][0]
    assert weights[2] == weights.max()
    assert weights[2] > np.delete(weights, 2).max() + 0.2
    # With one head, means over heads are that head.
    assert found.weighted.overall == pytest.approx(found.weighted.heads.of("cross.L0H2"), abs=1e-6)
    assert found.weighted.layers[:, 0] == pytest.approx(found.weighted.overall, abs=1e-6)


def test_occlusion_of_the_encoders_states(whisper: AttachedModel) -> None:
    given = whisper.example
    found = cross_saliency(whisper, given, rows=5)
    with torch.no_grad():
        states = whisper(**given).encoder_last_hidden_state
    clean = run(whisper, **given)
    without = states.clone()
    without[:, 4] = 0
    hidden = BaseModelOutput(last_hidden_state=without)
    lost = run(whisper, encoder_outputs=hidden, decoder_input_ids=given["decoder_input_ids"])
    wanted = (clean.exp() * (clean - lost)).sum(-1)
    assert torch.allclose(found.saliency[..., 4], wanted, atol=1e-5)
    assert float(wanted.max()) > 1e-3


def test_occlusion_of_the_sound(whisper: AttachedModel) -> None:
    """Two frames of a spectrogram make one of the encoder's; windows of 2 that overlap, averaged."""
    given = whisper.example
    found = cross_saliency(whisper, given, by="input", window=2)
    clean = run(whisper, **given)
    wanted = []
    for start in (4, 5):
        features = given["input_features"].clone()
        features[..., 2 * start : 2 * start + 4] = given["input_features"].mean(-1, keepdim=True)
        lost = run(whisper, input_features=features, decoder_input_ids=given["decoder_input_ids"])
        wanted.append((clean.exp() * (clean - lost)).sum(-1))
    assert torch.allclose(found.saliency[..., 5], (wanted[0] + wanted[1]) / 2, atol=1e-5)
    assert found.pattern.heads.provenance.settings == {"by": "input", "window": 2, "stride": 1}


def test_scores_are_correlations_over_frames(whisper: AttachedModel) -> None:
    given = whisper.example
    found = cross_saliency(whisper, given)
    with (
        torch.no_grad(),
        whisper.reading(hw.read.rows("cross.L0"), hw.read.z("cross.L0"), hw.read.v("cross.L0")) as got,
    ):
        whisper(**given)
    token = found.pattern.heads.item_ids.index("item-1:token-3")
    weights, saliency = got.rows["cross.L0"][1, :, 3], found.saliency[1, 3]
    for head in range(4):
        wanted = stats.pearsonr(weights[head], saliency).statistic
        assert found.pattern.heads.of(f"cross.L0H{head}")[token] == pytest.approx(wanted, abs=1e-5)
        ranks = stats.spearmanr(weights[head], saliency).statistic
        assert found.pattern_ranks.heads.of(f"cross.L0H{head}")[token] == pytest.approx(ranks, abs=1e-5)
    mean = stats.pearsonr(weights.mean(0), saliency).statistic
    assert found.pattern.overall[token] == pytest.approx(mean, abs=1e-5)
    matrix = whisper.model.get_submodule("model.decoder.layers.0.encoder_attn.out_proj").weight
    moved = (got.v["cross.L0"][1, :, 2] @ matrix[:, 16:24].T).norm(dim=-1) * weights[2]  # type: ignore[index]
    wanted = stats.pearsonr(moved.detach(), saliency).statistic
    assert found.weighted.heads.of("cross.L0H2")[token] == pytest.approx(wanted, abs=1e-5)


def test_padding_is_left_out_and_changes_nothing() -> None:
    """A Speech2Text: the second sound is shorter, and so is what was said."""
    torch.manual_seed(0)
    config = Speech2TextConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=64,
        max_target_positions=32,
        input_feat_per_channel=8,
        conv_channels=16,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        init_std=0.3,
    )
    generator = torch.Generator().manual_seed(1)
    given = {
        "input_features": torch.randn(2, 40, 8, generator=generator),
        "attention_mask": torch.ones(2, 40, dtype=torch.long),
        "decoder_input_ids": torch.tensor([[2, 5, 6, 7], [2, 8, 9, 1]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    given["attention_mask"][1, 24:] = 0
    given["input_features"][1, 24:] = 0
    with hw.attach(Speech2TextForConditionalGeneration(config).eval(), example=given) as model:
        for by in ("states", "input"):
            whole = cross_saliency(model, given, by=by, window=2)
            one = {name: value[1:] for name, value in given.items()}
            one |= {name: one[name][:, :3] for name in ("decoder_input_ids", "decoder_attention_mask")}
            alone = cross_saliency(model, one, by=by, window=2, rows=1)
            ids = whole.pattern.heads.item_ids
            assert [id for id in ids if id.startswith("item-1")] == [f"item-1:token-{token}" for token in range(3)]
            assert torch.allclose(whole.saliency[1, :3], alone.saliency[0], atol=1e-5)
            # Of 10 frames 6 are of sound; the window of the last one reaches into the seventh.
            assert whole.saliency[1, :3, 7:].abs().max() < 1e-6
            for kind in ("pattern", "weighted", "weighted_ranks"):
                one_of, alone_of = getattr(whole, kind), getattr(alone, kind)
                assert one_of.heads.of("cross.L1H3")[-3:] == pytest.approx(alone_of.heads.of("cross.L1H3"), abs=1e-3)
                assert one_of.layers[-3:] == pytest.approx(alone_of.layers, abs=1e-3)
            with torch.no_grad(), model.reading(hw.read.rows("cross.L1H3")) as got:
                model(**given)
            wanted = stats.pearsonr(got.rows["cross.L1"][1, 0, 2, :6], whole.saliency[1, 2, :6]).statistic
            assert whole.pattern.heads.of("cross.L1H3")[-1] == pytest.approx(wanted, abs=1e-4)


def test_a_sound_has_the_same_windows_with_padding_behind_it() -> None:
    occlusion = _Occlusion("states", 3, 2, 8)
    assert occlusion.windows(4) == [(0, 1), (0, 3), (2, 5)]
    assert occlusion.windows(8)[:3] == occlusion.windows(4)


def test_windows_reach_over_both_ends_alike(whisper: AttachedModel) -> None:
    wide = cross_saliency(whisper, whisper.example, window=12, stride=12)
    assert bool((wide.saliency > 0).all())
    # One window of all frames, and one that begins before the first.
    assert len(set(wide.saliency[0, 0].tolist())) <= 2


def test_correlations() -> None:
    x, y = torch.tensor([[1.0, 2, 4, 8], [1, 1, 1, 1]]), torch.tensor([1.0, 3, 2, 9])
    assert float(pearson(x, y)[0]) == pytest.approx(stats.pearsonr(x[0], y).statistic)
    assert float(spearman(x, y)[0]) == pytest.approx(stats.spearmanr(x[0], y).statistic)
    assert bool(pearson(x, y)[1].isnan())
    almost = torch.full((1, 50), 1 / 3) + 1e-8 * torch.arange(50)
    assert bool(pearson(almost, torch.arange(50.0)).isnan())


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(0.5, 1.0, 400)
    found = interval(np.append(values, np.nan), seed=1)
    error = values.std(ddof=1) / 20
    assert found.n == 400
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.02)
    with pytest.raises(InputError, match="0 values"):
        interval(np.array([np.nan]))


def test_what_cannot_be_is_one_line(whisper: AttachedModel) -> None:
    given = whisper.example
    with pytest.raises(InputError, match=r"give the sound .* and decoder_input_ids"):
        cross_saliency(whisper, {"input_features": given["input_features"]})
    with pytest.raises(InputError, match="give a mapping"):
        cross_saliency(whisper, given["input_features"])
    with pytest.raises(InputError, match="no stride beyond the window"):
        cross_saliency(whisper, given, window=1, stride=2)
    with pytest.raises(InputError, match="choose one of states, input"):
        cross_saliency(whisper, given, by="sound")  # type: ignore[arg-type]
    with hw.load("zoo:tiny-vit") as vit, pytest.raises(Refusal, match="has no cross-attention"):
        cross_saliency(vit, given)
