"""What each encoder process is worth to a trained model:

python -m slam_jax.reporting.processes --workdir=DIR [--step=N|best|latest] [--scenes=N]
    [--base=FOLDER] [--config.data.field=value]

Prints for each view of the test split the accuracy without a process, without all of them, and with
each output replaced by their mean; how similar the outputs are; and which stream each process
attends to. Nothing is retrained.
"""

from absl import flags

from slam_jax.runtime import cli, shared_flags

WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
STEP = flags.DEFINE_string("step", "best", "The checkpoint: a step number, best or latest.")
BASE = shared_flags.define_base()
SCENES = flags.DEFINE_integer("scenes", 200, "Test examples per view.", 1)


def main(arguments: list[str]) -> None:
    from slam_jax.reporting.checkpoint import evaluate_processes, open_checkpoint
    from slam_jax.reporting.processes.table import print_processes

    opened = open_checkpoint(WORKDIR.value, STEP.value, arguments, BASE.value)
    print_processes(evaluate_processes(opened, SCENES.value))


if __name__ == "__main__":
    cli.run(main)
