"""The Rocket Engine: language models measured against each other, each in a process of its own.

    python -m slam_jax.rocket --workdir=DIR [--protocol=seed|heldout|ablation] [--models=a,b]
        [--config=FILE] [--config.field=value]

Writes leaderboard.json (leaderboard.schema.json says what is in it), .md and .html to the workdir.
The same command goes on where an earlier one was stopped.
"""

from absl import flags

from slam_jax.runtime import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Where the leaderboard goes.", required=True)
PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "seed",
    ["seed", "heldout", "ablation"],
    "seed: the published comparison, learning one random batch. heldout: real text, documents held "
    "out, equal budgets. ablation: SLAM v3 with parts changed, as a --config says.",
)
MODELS = flags.DEFINE_list(
    "models",
    None,
    "Systems of the registry, by default the published nine and SLAM v3 with its text stream "
    "alone; or variants of an ablation, by default all.",
)
CONFIG = flags.DEFINE_string(
    "config", None, "A Python file whose get_config() gives some of the protocol's settings."
)
MEMORY_GIB = flags.DEFINE_float("memory_gib", 16.0, "A process that takes more is ended.", 0.0)
JOBS = flags.DEFINE_integer("jobs", 1, "Processes at once, where nothing is timed.", 1)
SECONDS = flags.DEFINE_float("seconds", 3_600.0, "One that takes longer is ended.", 0.0)


def main(arguments: list[str]) -> None:
    # Not before: importing JAX takes seconds, in which Ctrl-C can come.
    from slam_jax.rocket.engine import run
    from slam_jax.rocket.page import print_page
    from slam_jax.rocket.protocols import make_comparison

    comparison = make_comparison(
        PROTOCOL.value, CONFIG.value, arguments, MODELS.value, WORKDIR.value
    )
    board = run(
        comparison,
        WORKDIR.value,
        memory_gib=MEMORY_GIB.value,
        seconds=SECONDS.value,
        jobs=JOBS.value,
    )
    print_page(comparison.page(board))
    print(f"{WORKDIR.value}/leaderboard.html")


if __name__ == "__main__":
    cli.run(main)
