"""Trains: python train.py --config=configs/NAME.py --workdir=DIR [--config.field=value]

The same command again goes on where the run was.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from slam_jax.errors import clear_errors
from slam_jax.training import train

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}; use --config.field=value")
    logging.set_verbosity(logging.WARNING)
    with clear_errors():
        train(CONFIG.value, str(WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    sys.exit(app.run(main))
