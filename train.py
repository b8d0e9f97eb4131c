"""Trains: python train.py --config=configs/NAME.py --workdir=DIR [--config.field=value]

The same command again goes on where the run was. SIGTERM, SIGINT (Ctrl-C) and SIGHUP end it early:
with exit code 75 the last step is saved, with 76 the run goes on from the checkpoint before.

One process of several is told where the others are by --coordinator=HOST:PORT --num_processes=N
--process_id=I, or finds them in the environment with --distributed; docs/distributed.md has the
commands.

    python train.py --config=configs/NAME.py --plan --devices=256 [--config.mesh.process=4]

says what such a run would take of each of 256 devices, what they would send each other, and how
long a step is at stated speeds; with --search=4 on which mesh it is shortest. docs/planning.md has
two such plans.
"""

import os
import sys

from absl import flags

from slam_jax import command_line
from slam_jax.stop import Stop
from slam_jax.watch import watch, watched

CONFIG = flags.DEFINE_string("config", None, "A file of configs/; it is run.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")
GRACE = flags.DEFINE_float(
    "grace_seconds", 10.0, "How long the save may take when the run is asked to stop.", 0.0
)
PLAN = flags.DEFINE_bool("plan", False, "Only tells what the run would take of each device.")
DEVICES = flags.DEFINE_integer("devices", 1, "Of how many devices the plan is.", 1, 4_096)
SEARCH = flags.DEFINE_integer(
    "search", 0, "Plans the best mesh; so many, the fastest by a formula, are compiled.", 0, 1_000
)
MEMORY = flags.DEFINE_float("device_memory_gib", 80.0, "Of one device, in GiB (2**30 bytes).")
TFLOPS = flags.DEFINE_float("device_tflops", 989.0, "1e12 operations a second, of one device.")
LINK = flags.DEFINE_float("link_gb_s", 450.0, "1e9 bytes a second, a device to others of its host.")
NETWORK = flags.DEFINE_float("network_gb_s", 50.0, "The same, a device to other hosts.")
PER_HOST = flags.DEFINE_integer("devices_per_host", 8, "Devices of one host.")
for only in (DEVICES, SEARCH, MEMORY, TFLOPS, LINK, NETWORK, PER_HOST):
    flags.register_multi_flags_validator(
        [only.name, "plan"],
        lambda given, only=only: given["plan"] or given[only.name] == only.default,
        message="give --plan too: it says what a plan is of",
    )
flags.register_multi_flags_validator(
    ["workdir", "plan"],
    lambda given: given["workdir"] or given["plan"],
    message="give flag --workdir, or --plan",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Be one process of several, as Slurm, Kubernetes or a TPU slice says."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", 1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0 on.", 0)
flags.register_multi_flags_validator(
    ["num_processes", "process_id", "coordinator", "distributed"],
    lambda given: (
        given["distributed"]
        or given["coordinator"] is not None
        or given["num_processes"] is given["process_id"] is None
    ),
    message="give --coordinator too, or --distributed where $JAX_COORDINATOR_ADDRESS has it",
)


def main(arguments: list[str]) -> None:
    if PLAN.value:
        # Read when JAX is imported. The CPU stands for as many devices of any kind.
        count = f"--xla_force_host_platform_device_count={DEVICES.value}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA tells of what it moves in a roundabout way, which the plan has, and of its own pace.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from slam_jax.training import override, planning, read_config

        machine = planning.Machine(
            MEMORY.value, TFLOPS.value, LINK.value, NETWORK.value, PER_HOST.value
        )
        config = override(read_config(CONFIG.value), arguments)
        if SEARCH.value:
            subject = planning.subject_of(config)
            found = planning.search(subject, machine, SEARCH.value)
            print(planning.describe_search(found))
        else:
            print(planning.describe(planning.plan(config, machine)))
        return
    together = DISTRIBUTED.value or COORDINATOR.value is not None
    if together and not watched():
        sys.exit(watch())
    stop = Stop(GRACE.value)
    stop.listen(together=together)
    # Not before: importing JAX takes seconds, in which a signal can come, and starts threads, which
    # would be sent it.
    from slam_jax import hosts
    from slam_jax.training import override, read_config, train

    if together:
        hosts.connect(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    train(override(read_config(CONFIG.value), arguments), str(WORKDIR.value), stop)


if __name__ == "__main__":
    command_line.run(main)
