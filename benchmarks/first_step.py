"""From the start of a new process to the end of its first training step, against torch.compile.

`standard` at the seed size, 8 x 128 tokens; with empty compilation caches, and with caches that an
earlier process has filled.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import ours, theirs
from benchmarks.comparison import Arm, Comparison, Measured
from benchmarks.sizes import weights
from benchmarks.worker import ArmFailed, in_process


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    _, saved = weights(folder, "standard", "tiny" if quick else "seed")
    given = {"folder": saved, "rows": 8, "length": 16 if quick else 128}
    for what, aim in (("cold", 2.0), ("warm", 5.0)):
        arms = []
        for name, build, needs in (
            ("slam_jax", first_of_ours, ()),
            ("torch.compile", first_of_theirs, theirs.COMPILED_NEEDS),
        ):
            cache = "" if what == "cold" else str(Path(folder) / name)
            arm = Arm(name, build, {**given, "cache": cache}, needs=needs)
            arms.append(arm)
            if cache and not arm.missing():
                _fill(arm)
        arms[1] = Arm(**{**vars(arms[1]), "aim": aim})
        yield Comparison(
            f"standard, start to the end of the first step, {what} cache",
            arms,
            tolerance=1e-3,
            fresh=True,
        )


def _fill(arm: Arm) -> None:
    try:
        in_process(arm.build, **arm.given)
    except ArmFailed:
        return  # it fails again when it is measured


def first_of_ours(folder: str, rows: int, length: int, cache: str) -> Measured:
    with _folder(cache) as place:
        os.environ["SLAM_JAX_CACHE_DIR"] = place
        return Measured(float(ours.training_step(folder, rows, length)()))


def first_of_theirs(folder: str, rows: int, length: int, cache: str) -> Measured:
    with _folder(cache) as place:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
        return Measured(float(theirs.training_step(folder, rows, length, compiled=True)()))


def _folder(cache: str) -> Any:
    """The given folder, or a temporary one."""
    return contextlib.nullcontext(cache) if cache else tempfile.TemporaryDirectory()
