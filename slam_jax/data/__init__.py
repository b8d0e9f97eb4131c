"""Data: tokenizer, data sets, batches."""

from slam_jax.batch import Batch
from slam_jax.data.config import DataConfig
from slam_jax.data.datasets import Dataset, prepare
from slam_jax.data.hub_tokenizer import (
    AnyTokenizer,
    HubTokenizer,
    as_tokenizer,
    load_tokenizer,
    tokenizer_from_json,
)
from slam_jax.data.numbers import AuxFormat
from slam_jax.data.pipeline import (
    EvaluationBatch,
    Example,
    Source,
    evaluation_batches,
    training_batches,
)
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import HALF_VIEWS, TRAINING_VIEWS

__all__ = [
    "HALF_VIEWS",
    "TRAINING_VIEWS",
    "AnyTokenizer",
    "AuxFormat",
    "Batch",
    "DataConfig",
    "Dataset",
    "EvaluationBatch",
    "Example",
    "HubTokenizer",
    "Source",
    "Tokenizer",
    "as_tokenizer",
    "evaluation_batches",
    "load_tokenizer",
    "prepare",
    "tokenizer_from_json",
    "training_batches",
]
