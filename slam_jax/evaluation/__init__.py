"""From a model and held-out scenes to figures with intervals."""

from slam_jax.evaluation.answers import Answer, Results, evaluate
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
    "print_metrics",
    "recall_at_k",
    "retrieval_metrics",
    "write_metrics",
]
