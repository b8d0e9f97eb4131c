"""Evaluates: python eval.py --workdir=DIR [--step=N|best|latest] [--config.data.field=value]"""

from absl import flags

from slam_jax.runtime import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
STEP = flags.DEFINE_string("step", "best", "A step, or best, or latest.")


def main(arguments: list[str]) -> None:
    # Not before: importing JAX takes seconds, in which Ctrl-C can come.
    from slam_jax.evaluation import print_metrics
    from slam_jax.reporting.checkpoint import evaluate_checkpoint

    results = evaluate_checkpoint(WORKDIR.value, STEP.value, overrides=arguments)
    print_metrics(results.metrics)
    print(f"\nreport: {WORKDIR.value}/eval/report.html")


if __name__ == "__main__":
    cli.run(main)
