"""The arithmetic of contrasts, on distributions that can be written down."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.errors import InputError
from headwise.use.decoding.contrast import checked_share, contrasted, entropy, log_probabilities, plausible

P = torch.tensor([0.5, 0.25, 0.25])
Q = torch.tensor([0.25, 0.5, 0.25])


def test_a_contrast_is_the_formula_whatever_constant_the_logits_have() -> None:
    found = contrasted(P.log() + 3.0, Q.log() - 2.0, 0.5)
    torch.testing.assert_close(found, 1.5 * P.log() - 0.5 * Q.log())
    by_row = contrasted(P.log().expand(2, -1), Q.log().expand(2, -1), torch.tensor([[0.0], [2.0]]))
    torch.testing.assert_close(by_row, torch.stack([P.log(), 3 * P.log() - 2 * Q.log()]))


def test_where_both_agree_it_is_log_p_to_the_last_bit() -> None:
    logits = 5 * torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(contrasted(logits, logits, 7.3), logits.log_softmax(-1))


def test_what_p_rules_out_stays_out_and_q_may_rule_out() -> None:
    p, q = torch.tensor([0.0, 1.0, -math.inf]), torch.tensor([0.0, 1.0, -math.inf])
    assert contrasted(p, q, 2.0)[2] == -math.inf
    assert contrasted(p, torch.tensor([0.0, -math.inf, 1.0]), 2.0).tolist()[1:] == [math.inf, -math.inf]
    assert not bool(entropy(p).isnan().any())


def test_half_precision_is_subtracted_in_fp32() -> None:
    assert log_probabilities(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32
    assert log_probabilities(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


def test_entropy_is_in_nats() -> None:
    assert float(entropy(torch.zeros(8))) == pytest.approx(math.log(8))
    assert float(entropy(P.log())) == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.zeros(2, 3, 8)).shape == (2, 3, 1)


def test_the_filter_keeps_what_has_its_share_of_the_likeliest() -> None:
    logits, scores = torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), torch.arange(4.0)
    assert plausible(scores, logits, 0.0) is scores
    assert plausible(scores, logits, 0.09).tolist() == [0.0, 1.0, 2.0, -math.inf]
    assert plausible(scores, logits, 0.1001, -1000.0).tolist() == [0.0, 1.0, -1000.0, -1000.0]
    assert plausible(scores, logits, 1.0).tolist() == [0.0, *[-math.inf] * 3]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="from 0 to 1"):
            checked_share(wrong, "relative_top")
