"""Data: tokenizer, data sets, batches."""

from slam_jax.batch import Batch
from slam_jax.data.config import ColumnsConfig, DataConfig
from slam_jax.data.datasets import Dataset, dataset_from_rows, prepare
from slam_jax.data.describe import describe
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
from slam_jax.data.rows import Row
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import HALF_VIEWS, TRAINING_VIEWS

__all__ = [
    "HALF_VIEWS",
    "TRAINING_VIEWS",
    "AnyTokenizer",
    "AuxFormat",
    "Batch",
    "ColumnsConfig",
    "DataConfig",
    "Dataset",
    "EvaluationBatch",
    "Example",
    "HubTokenizer",
    "Row",
    "Source",
    "Tokenizer",
    "as_tokenizer",
    "dataset_from_rows",
    "describe",
    "evaluation_batches",
    "load_tokenizer",
    "prepare",
    "tokenizer_from_json",
    "training_batches",
]
