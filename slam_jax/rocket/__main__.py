"""The Rocket Engine: language models measured against each other, each in a process of its own.

    python -m slam_jax.rocket --workdir=DIR [--protocol=seed|heldout] [--models=a,b]
        [--config=FILE] [--config.field=value]

Writes leaderboard.json (leaderboard.schema.json says what is in it), .md and .html to the workdir.
The same command goes on where an earlier one was stopped.
"""

from absl import flags

from slam_jax import command_line

WORKDIR = flags.DEFINE_string("workdir", None, "Where the leaderboard goes.", required=True)
PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "seed",
    ["seed", "heldout"],
    "seed: the published comparison, learning one random batch. heldout: real text, documents held "
    "out, equal budgets.",
)
MODELS = flags.DEFINE_list(
    "models",
    None,
    "Systems of the registry; by default the published nine "
    "and SLAM v3 with its text stream alone.",
)
CONFIG = flags.DEFINE_string(
    "config", None, "A Python file whose get_config() gives some of the protocol's settings."
)
MEMORY_GIB = flags.DEFINE_float("memory_gib", 16.0, "A process that takes more is ended.", 0.0)
SECONDS = flags.DEFINE_float("seconds", 3_600.0, "One that takes longer is ended.", 0.0)


def main(arguments: list[str]) -> None:
    # Not before: importing JAX takes seconds, in which Ctrl-C can come.
    from slam_jax.rocket.engine import DEFAULT_MODELS, run
    from slam_jax.rocket.page import print_page
    from slam_jax.rocket.protocols import make_comparison

    models = DEFAULT_MODELS if MODELS.value is None else tuple(dict.fromkeys(MODELS.value))
    comparison = make_comparison(PROTOCOL.value, CONFIG.value, arguments, models, WORKDIR.value)
    board = run(
        comparison,
        WORKDIR.value,
        models=models,
        memory_gib=MEMORY_GIB.value,
        seconds=SECONDS.value,
    )
    print_page(comparison.page(board))
    print(f"{WORKDIR.value}/leaderboard.html")


if __name__ == "__main__":
    command_line.run(main)
