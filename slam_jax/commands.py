"""The console commands. Each is another name of a package that `python -m` runs."""

import runpy


def train() -> None:
    """`slam-train`, and `train.py` of a checkout."""
    _run("slam_jax.training")


def evaluate() -> None:
    """`slam-eval`, and `eval.py` of a checkout."""
    _run("slam_jax.reporting")


def generate() -> None:
    """`slam-generate`."""
    _run("slam_jax.generation")


def serve() -> None:
    """`slam-serve`."""
    _run("slam_jax.serving")


def chat() -> None:
    """`slam-chat`."""
    _run("slam_jax.serving.chat")


def _run(package: str) -> None:
    # As `__main__`, so that its flags are those that --help lists, and clash with no others.
    runpy.run_module(package, run_name="__main__", alter_sys=True)
