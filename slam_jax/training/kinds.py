"""The kinds of runs: which one a configuration is of."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from slam_jax.training.experiment import Experiment, is_language
from slam_jax.training.language_experiment import LanguageExperiment
from slam_jax.training.language_task import LanguageTask
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.task import Task


def task_of(config: ConfigDict | Mapping[str, Any]) -> Task:
    """The task of a configuration. Raises ConfigError, naming a field that is wrong."""
    if is_language(config):
        return LanguageTask(LanguageExperiment.from_config(config))
    return SlamV3Task(Experiment.from_config(config))
