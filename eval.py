"""Evaluates: python eval.py --workdir=DIR [--step=N|best|latest] [--config.field=value]"""

from absl import app, flags, logging

from slam_jax.errors import clear_errors
from slam_jax.evaluation import print_metrics
from slam_jax.evaluation.checkpoint import evaluate_checkpoint

WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
STEP = flags.DEFINE_string("step", "best", "A step, or best, or latest.")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with clear_errors():
        results = evaluate_checkpoint(WORKDIR.value, STEP.value, overrides=argv[1:])
        print_metrics(results.metrics)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
