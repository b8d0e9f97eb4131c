"""quickstart draft"""

from ml_collections import ConfigDict

from slam_jax.training import default_config


def get_config() -> ConfigDict:
    config = default_config("small")
    config.data.stages = ((0, {"aux": 1.0}),)
    config.run.num_steps = 40
    config.run.evaluate_every = 20
    config.run.evaluate_batches = 2
    return config
