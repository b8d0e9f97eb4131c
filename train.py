"""Trains: python train.py --config=configs/NAME.py --workdir=DIR [--config.field=value]

The same command again goes on where the run was. SIGTERM, SIGINT (Ctrl-C) and SIGHUP end it early:
with exit code 75 the last step is saved, with 76 the run goes on from the checkpoint before.
"""

from absl import flags

from slam_jax import command_line
from slam_jax.stop import Stop

CONFIG = flags.DEFINE_string("config", None, "A file of configs/; it is run.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
GRACE = flags.DEFINE_float(
    "grace_seconds", 10.0, "How long the save may take when the run is asked to stop.", 0.0
)


def main(arguments: list[str]) -> None:
    stop = Stop(GRACE.value)
    stop.listen()
    # Not before: importing JAX takes seconds, in which a signal can come.
    from slam_jax.training import override, read_config, train

    train(override(read_config(CONFIG.value), arguments), WORKDIR.value, stop)


if __name__ == "__main__":
    command_line.run(main)
