"""Evaluates a checkpoint:

slam-eval --workdir=DIR [--step=N|best|latest] [--out=DIR] [--process_examples=N]
    [--metrics=a,b] [--config.data.field=value]

In a checkout, `python eval.py` is the same command.
For a language model, DIR is the workdir of its run; or a folder of the hub or a GGUF file, and
--config.data.path=TEXTS says on what. It prints loss, bits per byte and perplexity, and for rows
with answers how many are exact.
"""

from pathlib import Path

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli, shared_flags

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The workdir of a training run, a folder with its model, or a published language model.",
    required=True,
)
STEP = flags.DEFINE_string("step", "best", "The checkpoint: a step number, best or latest.")
OUT = flags.DEFINE_string(
    "out", None, "Folder for metrics.json, answers.jsonl, report.html; by default WORKDIR/eval."
)
BASE = shared_flags.define_base()
PROCESS_EXAMPLES = flags.DEFINE_integer(
    "process_examples", 50, "Test examples per view for what each process is worth; 0 = none.", 0
)
METRICS = flags.DEFINE_list(
    "metrics", None, "Scores besides accuracy (docs/evaluation.md); by default those of the run."
)


def main(arguments: list[str]) -> None:
    # Imported here because importing JAX takes seconds, in which Ctrl-C may be pressed.
    from slam_jax.evaluation import print_metrics
    from slam_jax.reporting.checkpoint import evaluate_checkpoint
    from slam_jax.reporting.language import (
        evaluate_language,
        is_language_model,
        print_language_metrics,
        write_language_metrics,
    )
    from slam_jax.reporting.report import write_evaluation
    from slam_jax.trained.folder import find_folder

    if is_language_model(WORKDIR.value, STEP.value):
        if METRICS.value is not None:
            raise InputError(
                "--metrics is for SLAM v3; a language model has its own, so leave it out"
            )
        scored = evaluate_language(WORKDIR.value, STEP.value, arguments, base=BASE.value)
        print_language_metrics(scored.metrics)
        print(f"\nmetrics: {write_language_metrics(scored, OUT.value)}")
        return
    if OUT.value is None and not Path(WORKDIR.value).exists() and find_folder(WORKDIR.value):
        raise InputError(f"--workdir={WORKDIR.value} is part of the package; give --out, too")
    if METRICS.value is not None:
        arguments = [*arguments, f"--config.run.metrics={METRICS.value!r}"]
    evaluation = evaluate_checkpoint(
        WORKDIR.value,
        STEP.value,
        arguments,
        process_examples=PROCESS_EXAMPLES.value,
        base=BASE.value,
    )
    print_metrics(evaluation.metrics)
    folder = write_evaluation(evaluation, OUT.value)
    print(f"\nreport: {folder / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
