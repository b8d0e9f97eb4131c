"""Compares two models on the same questions:

python -m slam_jax.reporting.compare A B [--out=DIR] [--metrics=a,b] [--step_a=N] [--step_b=N]
    [--base=FOLDER] [--config.data.field=value]

A and B are workdirs, folders that `save_pretrained` wrote, or folders with the answers.jsonl that
eval.py wrote. Prints the differences of their scores, and with --out also writes a page.
"""

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli, shared_flags

OUT = flags.DEFINE_string("out", None, "Folder for compare.html and compare.json.")
METRICS = flags.DEFINE_list("metrics", ["exact_match"], "Scores (docs/evaluation.md).")
STEP_A = flags.DEFINE_string("step_a", "best", "The checkpoint of A: a step, best or latest.")
STEP_B = flags.DEFINE_string("step_b", "best", "The checkpoint of B: a step, best or latest.")
BASE = shared_flags.define_base()


def main(arguments: list[str]) -> None:
    paths = [argument for argument in arguments if not argument.startswith("-")]
    overrides = [argument for argument in arguments if argument.startswith("-")]
    if len(paths) != 2:
        raise InputError(
            f"{len(paths)} paths; give two: python -m slam_jax.reporting.compare A B [--out=DIR]"
        )
    from slam_jax.evaluation.scores import check_metrics
    from slam_jax.reporting.compare.output import print_comparison, write_comparison
    from slam_jax.reporting.compare.paired import compare_answers, pair_answers
    from slam_jax.reporting.compare.sides import read_sides

    check_metrics(METRICS.value)
    sides = read_sides(paths, (STEP_A.value, STEP_B.value), overrides, BASE.value)
    pairs = pair_answers(*(side.answers for side in sides))
    found = compare_answers(pairs, METRICS.value)
    print_comparison(found, sides)
    if OUT.value is None:
        print("\n--out=DIR writes a page with these figures and the questions")
    else:
        print(f"\npage: {write_comparison(OUT.value, found, sides)}")


if __name__ == "__main__":
    cli.run(main)
