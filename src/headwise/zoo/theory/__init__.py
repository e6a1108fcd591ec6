"""Closed-form fixtures from theory: small models of heads with a predicted answer that they are held against.

Each file is one paper: a task that draws items and predicts, a model with its weights per head, and where there is
training, its trainer. Which numbers are exact, which approximate and which measured stands with each prediction.
"""

from __future__ import annotations

from headwise.zoo.theory.association import (
    AssociationItems,
    AssociationTask,
    HebbianHeads,
    SoftmaxHeads,
    hebbian_capacity,
    retrieval_error,
    softmax_error_bound,
)
from headwise.zoo.theory.low_rank import bottleneck_error, head_for_pattern
from headwise.zoo.theory.memorisation import (
    MemorisationAttention,
    MemorisationItems,
    MemorisationTask,
    measured_rank,
)
from headwise.zoo.theory.regression import (
    RegressionAttention,
    RegressionItems,
    RegressionPrediction,
    RegressionTask,
    debiased_descent,
    debiased_descent_loss,
    large_context_loss,
    simulated_loss,
    train_regression,
)
from headwise.zoo.theory.scan_snap import (
    ScanSnapHead,
    ScanSnapItems,
    ScanSnapPrediction,
    ScanSnapTask,
    common_mass,
    train_scan_snap,
)
from headwise.zoo.theory.spectrum import gaussian_edge, kq_edge

__all__ = [
    "AssociationItems",
    "AssociationTask",
    "HebbianHeads",
    "MemorisationAttention",
    "MemorisationItems",
    "MemorisationTask",
    "RegressionAttention",
    "RegressionItems",
    "RegressionPrediction",
    "RegressionTask",
    "ScanSnapHead",
    "ScanSnapItems",
    "ScanSnapPrediction",
    "ScanSnapTask",
    "SoftmaxHeads",
    "bottleneck_error",
    "common_mass",
    "debiased_descent",
    "debiased_descent_loss",
    "gaussian_edge",
    "head_for_pattern",
    "hebbian_capacity",
    "kq_edge",
    "large_context_loss",
    "measured_rank",
    "retrieval_error",
    "simulated_loss",
    "softmax_error_bound",
    "train_regression",
    "train_scan_snap",
]
