"""Trains: slam-train --config=NAME --workdir=DIR [--config.field=value]

In a checkout, `python train.py` is the same command. NAME is that of a recipe, such as quickstart,
digits, folder or language_model, or the path of a Python file; a wrong name lists all recipes.
The same command resumes the run; with --change it may have more steps, another learning rate, batch
size or evaluation, or other data. SIGTERM, SIGINT (Ctrl-C) and SIGHUP end it early. Exit code 75
means that the last step is saved, 76 that the run will resume from an earlier checkpoint.

On several hosts, start each process with --coordinator=HOST:PORT --num_processes=N --process_id=I,
or with --distributed where the environment has them; see docs/distributed.md.
--profile=STEP:COUNT writes a trace of COUNT steps from STEP on to WORKDIR/profile, for xprof.
`python -m slam_jax.planning` estimates beforehand what a run needs of each device.
"""

import sys

from absl import flags

from slam_jax.runtime import cli, shared_flags
from slam_jax.runtime.signals import Stop
from slam_jax.runtime.supervisor import is_supervised, supervise

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "The name of a recipe, such as quickstart, or the path of a Python file; it is executed.",
    required=True,
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints and metrics of the run.", required=True
)
GRACE = flags.DEFINE_float(
    "grace_seconds", 10.0, "Seconds that a save may take after a signal.", 0.0
)
PROFILE = flags.DEFINE_string(
    "profile", None, "STEP:COUNT: write a trace of these steps to WORKDIR/profile."
)
BASE = shared_flags.define_base()
CHANGE = flags.DEFINE_bool(
    "change",
    False,
    "Resume with more steps, another learning rate, batch size or evaluation, or other data.",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Read --coordinator, --num_processes and --process_id from the environment of Slurm, "
    "Kubernetes or a TPU slice.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first process of a run of several."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", 1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, counted from 0.", 0)
flags.register_multi_flags_validator(
    ["num_processes", "process_id", "coordinator", "distributed"],
    lambda values: (
        values["distributed"]
        or values["coordinator"] is not None
        or values["num_processes"] is values["process_id"] is None
    ),
    message="give --coordinator too, or --distributed where $JAX_COORDINATOR_ADDRESS has it",
)


def main(arguments: list[str]) -> None:
    several = DISTRIBUTED.value or COORDINATOR.value is not None
    if several and not is_supervised():
        sys.exit(supervise())
    stop = Stop(GRACE.value)
    stop.listen(several_processes=several)
    # Imported here: importing JAX takes seconds, in which a signal can come, and starts threads,
    # which must inherit the signal mask.
    from slam_jax.runtime import distributed
    from slam_jax.training import Profile, override, read_config, train

    profile = None if PROFILE.value is None else Profile.parse(PROFILE.value)
    if several:
        distributed.connect(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    config = override(read_config(CONFIG.value), arguments)
    train(config, WORKDIR.value, stop, profile, BASE.value, change=CHANGE.value)


if __name__ == "__main__":
    cli.run(main)
