"""Compares the outputs of the arms of a comparison, then times them in turns, round by round."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.comparison import Arm, Comparison
from benchmarks.worker import ArmFailed, Worker
from slam_jax.rocket.machine import spread

Json = dict[str, Any]
_PAUSE = 0.05  # seconds for the threads of the arm before to fall asleep


class Disagreement(Exception):
    """Arms that should return the same do not."""


class Skipped(Exception):
    """This machine lacks something that a comparison needs."""


def measure(
    comparison: Comparison,
    rounds: int,
    ceilings: Json | None = None,
    start: Callable[..., Any] = Worker,
) -> Json:
    """A row of the results.

    start: called as `Worker` is, and returns an object with its methods.

    Raises:
      Disagreement: the outputs of an arm are not ours.
      Skipped: no arm is left to compare with.
      ArmFailed: ours failed. Another arm that fails is left out, and the row says why.
    """
    arms, left_out = _present(comparison)
    if comparison.fresh:
        figures, failed, difference = _fresh_rounds(comparison, arms, rounds)
    else:
        figures, failed, difference = _rounds(comparison, arms, rounds, start)
    row: Json = {
        "title": comparison.title,
        "unit": comparison.unit,
        "rounds": rounds,
        "tolerance": comparison.tolerance,
        "unchecked": comparison.unchecked,
        "difference": difference,
        "left_out": left_out | failed,
        "arms": {},
    }
    ours = figures[comparison.arms[0].name]
    for arm in arms:
        if arm.name not in figures:
            continue
        entry = row["arms"][arm.name] = spread(figures[arm.name])
        entry["shares"] = _shares(comparison, entry["median"], ceilings)
        if arm is not comparison.arms[0]:
            pairs = zip(figures[arm.name], ours, strict=True)
            entry["ratio"] = {"aim": arm.aim, **spread([theirs / mine for theirs, mine in pairs])}
    return row


def _present(comparison: Comparison) -> tuple[list[Arm], dict[str, str]]:
    arms, left_out = [], {}
    for arm in comparison.arms:
        if missing := arm.missing():
            left_out[arm.name] = f"needs {', '.join(missing)}"
        else:
            arms.append(arm)
    if len(arms) < len(comparison.arms) and (len(arms) < 2 or comparison.arms[0] not in arms):
        raise Skipped("; ".join(f"{name} {reason}" for name, reason in left_out.items()))
    return arms, left_out


def _rounds(
    comparison: Comparison, arms: Sequence[Arm], rounds: int, start: Callable[..., Any]
) -> Any:
    """Figures by arm, arms that failed, and the largest difference from ours."""
    figures, failed, workers = {}, {}, {}
    outputs: dict[str, list[np.ndarray]] = {}

    def leave_out(name: str, error: ArmFailed) -> None:
        if name == comparison.arms[0].name:
            raise error
        workers.pop(name).end()
        failed[name] = str(error)

    try:
        # Not at the same time: on a GPU, XLA chooses kernels by timing them.
        for arm in arms:
            worker = workers[arm.name] = start(arm, checked=comparison.checked)
            try:
                outputs[arm.name] = worker.receive()
            except ArmFailed as error:
                leave_out(arm.name, error)
        difference = _difference(comparison, outputs)
        outputs.clear()
        for i in range(rounds):
            for name in _turned(list(workers), i):
                time.sleep(_PAUSE)
                try:
                    seconds = workers[name].seconds(comparison.repeats)
                except ArmFailed as error:
                    leave_out(name, error)
                    continue
                figures.setdefault(name, []).append(statistics.median(seconds))
    finally:
        for worker in workers.values():
            worker.end()
    figures = {name: values for name, values in figures.items() if name not in failed}
    return figures, failed, difference


def _fresh_rounds(comparison: Comparison, arms: Sequence[Arm], rounds: int) -> Any:
    """The same for arms that start a new process in every round."""
    figures, failed, differences = {}, {}, []
    for i in range(rounds):
        outputs = {}
        for arm in _turned(arms, i):
            if arm.name in failed:
                continue
            worker = Worker(arm, checked=None)
            try:
                output, value = worker.receive()
            except ArmFailed as error:
                if arm is comparison.arms[0]:
                    raise
                failed[arm.name] = str(error)
                continue
            finally:
                worker.end()
            outputs[arm.name] = [output]
            figures.setdefault(arm.name, []).append(value)
        differences.append(_difference(comparison, outputs))
    figures = {name: values for name, values in figures.items() if name not in failed}
    found = [difference for difference in differences if difference is not None]
    return figures, failed, max(found, default=None)


def _turned(items: Sequence[Any], by: int) -> list[Any]:
    """The items in another order each round, so that each goes first in turn."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def _difference(comparison: Comparison, outputs: dict[str, list[np.ndarray]]) -> float | None:
    """The largest absolute difference of any arm from ours; raises Disagreement above tolerance."""
    if comparison.tolerance is None or len(outputs) < 2:
        return None
    ours, largest = outputs[comparison.arms[0].name], 0.0
    for name, theirs in outputs.items():
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine.shape != other.shape:
                raise Disagreement(f"{name} returns {other.shape}, ours {mine.shape}")
            worst = float(np.abs(mine - other).max(initial=0.0))
            if comparison.relative:
                worst /= float(np.abs(other).max(initial=1e-30))
            if not worst <= comparison.tolerance:  # also if it is NaN
                raise Disagreement(
                    f"{name}: output {i + 1} differs by up to {worst:.3g}, tolerance "
                    f"{comparison.tolerance:g}"
                )
            largest = max(largest, worst)
    return largest


def _shares(comparison: Comparison, seconds: float, ceilings: Json | None) -> Json:
    """Shares of the ceilings, which were measured in the same run."""
    shares = {}
    if ceilings and comparison.unit == "s":
        if comparison.flops:
            shares["matmul"] = comparison.flops / seconds / ceilings["matmul_flops"]
        if comparison.bytes_moved:
            shares["copy"] = comparison.bytes_moved / seconds / ceilings["copy_bytes"]
    return {name: share for name, share in shares.items() if math.isfinite(share)}
