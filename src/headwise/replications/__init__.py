"""Published results on heads: the papers behind the methods, and what anyone who has the model can run again."""

from __future__ import annotations

from headwise.replications.papers import Paper, papers
from headwise.replications.published import (
    Expectation,
    Replication,
    Shape,
    register,
    replication,
    replications,
)
from headwise.replications.retrieval import REPLICATIONS
from headwise.replications.run import Found, Outcome, replicate

for _each in REPLICATIONS:
    register(_each)

__all__ = [
    "REPLICATIONS",
    "Expectation",
    "Found",
    "Outcome",
    "Paper",
    "Replication",
    "Shape",
    "papers",
    "register",
    "replicate",
    "replication",
    "replications",
]
