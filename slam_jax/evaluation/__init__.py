"""Scoring: from a model and held-out examples to accuracies with confidence intervals."""

from slam_jax.evaluation.answers import Answer, Results, evaluate, most_frequent_answer
from slam_jax.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    recall_at_k,
    retrieval_metrics,
)
from slam_jax.evaluation.table import print_metrics, write_metrics

__all__ = [
    "Answer",
    "Interval",
    "Results",
    "bootstrap_interval",
    "evaluate",
    "most_frequent_answer",
    "print_metrics",
    "recall_at_k",
    "retrieval_metrics",
    "write_metrics",
]
