"""Measures language models, each in a process of its own, and writes a leaderboard.

    python -m slam_jax.rocket --workdir=DIR [--protocol=seed|heldout|ablation|processes]
        [--models=a,b] [--config=NAME] [--config.field=value]

Writes leaderboard.json (described by leaderboard.schema.json), .md and .html to the workdir. The
same command resumes a run that was stopped.
"""

from absl import flags

from slam_jax.runtime import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the leaderboard.", required=True)
PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "seed",
    ["seed", "heldout", "ablation", "processes"],
    "seed: the published comparison, learning one random batch. heldout: real text, held-out "
    "documents, equal budgets. ablation: variants of SLAM v3, listed in a --config. processes: "
    "the same with learning rates tried, scored on fresh scenes.",
)
MODELS = flags.DEFINE_list(
    "models",
    None,
    "Systems of the registry, by default the published nine and SLAM v3 with its text stream "
    "alone; or variants of a --config, by default all.",
)
CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A Python file whose get_config() returns settings of the protocol, or the name of a recipe, "
    "such as ablations/sort_of_clevr.",
)
MEMORY_GIB = flags.DEFINE_float("memory_gib", 16.0, "Memory limit of each process.", 0.0)
JOBS = flags.DEFINE_integer("jobs", 1, "Processes at a time, for tasks that are not timed.", 1)
SECONDS = flags.DEFINE_float("seconds", 3_600.0, "Time limit of each process.", 0.0)


def main(arguments: list[str]) -> None:
    # Imported here, because importing JAX takes seconds in which Ctrl-C can come.
    from slam_jax.rocket.engine import run
    from slam_jax.rocket.page import print_page
    from slam_jax.rocket.protocols import make_comparison

    workdir = WORKDIR.value
    comparison = make_comparison(PROTOCOL.value, CONFIG.value, arguments, MODELS.value, workdir)
    limits = {"memory_gib": MEMORY_GIB.value, "seconds": SECONDS.value}
    board = run(comparison, workdir, **limits, jobs=JOBS.value)
    print_page(comparison.page(board))
    print(f"{workdir}/leaderboard.html")


if __name__ == "__main__":
    cli.run(main)
