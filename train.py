"""Trains: python train.py --config=configs/NAME.py --workdir=DIR [--config.field=value]

The same command again goes on where the run was.
"""

from absl import flags

from slam_jax import command_line
from slam_jax.training import override, read_config, train

CONFIG = flags.DEFINE_string("config", None, "A file of configs/; it is run.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)


def main(arguments: list[str]) -> None:
    train(override(read_config(CONFIG.value), arguments), WORKDIR.value)


if __name__ == "__main__":
    command_line.run(main)
