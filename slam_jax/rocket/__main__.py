"""The Rocket Engine: python -m slam_jax.rocket --workdir=DIR [--models=a,b] [--config.field=value]

Measures the language models against each other, each in a process of its own, and writes
leaderboard.json, leaderboard.md and leaderboard.html to the workdir. The same command goes on where
an earlier one was stopped.
"""

import dataclasses

from absl import flags

from slam_jax import command_line

WORKDIR = flags.DEFINE_string("workdir", None, "Where the leaderboard goes.", required=True)
PROTOCOL = flags.DEFINE_enum(
    "protocol", "seed", ["seed"], "seed: the published comparison, learning one random batch."
)
MODELS = flags.DEFINE_list(
    "models",
    None,
    "Systems of the registry; by default the published nine "
    "and SLAM v3 with its text stream alone.",
)
MEMORY_GIB = flags.DEFINE_float("memory_gib", 16.0, "A process that takes more is ended.", 0.0)
SECONDS = flags.DEFINE_float("seconds", 1_200.0, "One that takes longer is ended.", 0.0)


def main(arguments: list[str]) -> None:
    # Not before: importing JAX takes seconds, in which Ctrl-C can come.
    from slam_jax.rocket.engine import DEFAULT_MODELS, run_seed
    from slam_jax.rocket.report import print_board
    from slam_jax.rocket.seed import SeedSettings
    from slam_jax.training.experiment import build, override

    settings = build(SeedSettings, override(dataclasses.asdict(SeedSettings()), arguments))
    models = DEFAULT_MODELS if MODELS.value is None else tuple(dict.fromkeys(MODELS.value))
    board = run_seed(
        WORKDIR.value,
        models=models,
        settings=settings,
        memory_gib=MEMORY_GIB.value,
        seconds=SECONDS.value,
    )
    print_board(board)
    print(f"{WORKDIR.value}/leaderboard.html")


if __name__ == "__main__":
    command_line.run(main)
