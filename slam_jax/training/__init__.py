"""Training: configuration, state, loss, loop, checkpoints."""

from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.experiment import (
    Experiment,
    RunConfig,
    default_config,
    override,
    read_config,
)
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

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Experiment",
    "Loaded",
    "LossConfig",
    "OptimizerConfig",
    "Profile",
    "RunConfig",
    "TrainState",
    "default_config",
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
