"""Training: configuration, state, loss, loop, checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slam_jax.training.checkpoint import CheckpointError, Checkpoints
    from slam_jax.training.experiment import (
        Experiment,
        RunConfig,
        default_config,
        override,
        read_config,
    )
    from slam_jax.training.language_experiment import LanguageExperiment, default_language_config
    from slam_jax.training.loading import Loaded, load
    from slam_jax.training.loop import train
    from slam_jax.training.losses import LossConfig, language_model_loss, slam_v3_loss
    from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
    from slam_jax.training.profiling import Profile
    from slam_jax.training.state import (
        TrainState,
        init_state,
        make_train_step,
        merge_model,
        split_model,
    )

# Imported on first use, so that a loss or a step does not import data sets and checkpoints.
_MODULES = {
    "checkpoint": ("CheckpointError", "Checkpoints"),
    "experiment": ("Experiment", "RunConfig", "default_config", "override", "read_config"),
    "language_experiment": ("LanguageExperiment", "default_language_config"),
    "loading": ("Loaded", "load"),
    "loop": ("train",),
    "losses": ("LossConfig", "language_model_loss", "slam_v3_loss"),
    "optimizer": ("OptimizerConfig", "make_optimizer"),
    "profiling": ("Profile",),
    "state": ("TrainState", "init_state", "make_train_step", "merge_model", "split_model"),
}

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Experiment",
    "LanguageExperiment",
    "Loaded",
    "LossConfig",
    "OptimizerConfig",
    "Profile",
    "RunConfig",
    "TrainState",
    "default_config",
    "default_language_config",
    "init_state",
    "language_model_loss",
    "load",
    "make_optimizer",
    "make_train_step",
    "merge_model",
    "override",
    "read_config",
    "slam_v3_loss",
    "split_model",
    "train",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"slam_jax.training.{module}"), name)
    raise AttributeError(f"module 'slam_jax.training' has no attribute {name!r}")
