"""The command `slam-eval` in a checkout; `python eval.py --help` explains it."""

from slam_jax.commands import evaluate

if __name__ == "__main__":
    evaluate()
