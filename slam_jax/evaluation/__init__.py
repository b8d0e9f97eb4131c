"""Scoring: from a model and held-out examples to scores with confidence intervals."""

from slam_jax.evaluation.answered import Answer, group_by_slice, read_answers, write_answers
from slam_jax.evaluation.answers import Results, evaluate, most_frequent_answer
from slam_jax.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    recall_at_k,
    retrieval_metrics,
)
from slam_jax.evaluation.scores import METRICS, Metric, Score, check_metrics, score_answers
from slam_jax.evaluation.table import print_metrics, write_metrics

__all__ = [
    "METRICS",
    "Answer",
    "Interval",
    "Metric",
    "Results",
    "Score",
    "bootstrap_interval",
    "check_metrics",
    "evaluate",
    "group_by_slice",
    "most_frequent_answer",
    "print_metrics",
    "read_answers",
    "recall_at_k",
    "retrieval_metrics",
    "score_answers",
    "write_answers",
    "write_metrics",
]
