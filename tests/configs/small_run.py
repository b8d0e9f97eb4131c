"""A run of seconds in which everything happens: dropout, an average, evaluations, extra saves."""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("tiny")
    config.model.aux_dim = 10
    config.model.dropout = 0.1
    config.data.name = "sort_of_clevr/tiny"
    config.data.batch_size = 4
    config.data.vocab_size = 300
    config.data.stages = ((0, {"aux": 1.0}),)
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 2e-2
    config.optimizer.ema_decay = 0.3
    config.run.num_steps = 24
    config.run.log_every = 1
    config.run.evaluate_every = 8
    config.run.evaluate_batches = 2
    config.run.save_every = 3
    return config
