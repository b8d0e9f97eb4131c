"""Runs `python -m benchmarks --device`: every row in this process, as long as there is time."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import DEVICE, results
from benchmarks.ceilings import measure_ceilings
from benchmarks.comparison import Arm, Comparison
from benchmarks.device_rows import comparisons
from benchmarks.harness import Disagreement, measure
from benchmarks.results import format_figure, format_shares
from benchmarks.worker import ArmFailed, as_numpy
from slam_jax.errors import InputError, first_line
from slam_jax.rocket.machine import timed

Json = dict[str, Any]
LIMIT = 540.0  # seconds, of the whole process
# A row is started while this many seconds are left: it compiles two or three arms.
LEAST_LEFT = 90.0
ROUNDS = 5
SETTINGS = ("jax_enable_compilation_cache", "jax_disable_most_optimizations")
COLUMNS = ("what", "ours", "of the ceiling", "tokens/s", "compile", "others, theirs / ours")
_WIDTHS = (62, 26, 15, 11, 8)


class Here:
    """An arm in this process, with the methods of a `benchmarks.worker.Worker`."""

    def __init__(self, arm: Arm, *, checked: int):
        self._arm, self._checked = arm, checked
        self._call: Callable[[], Any] = lambda: None
        self.first = 0.0  # seconds of the first call, which compiles

    def receive(self) -> list[np.ndarray]:
        """The arrays that the first calls return."""
        with _in_one_line():
            self._call = self._arm.build(**self._arm.given)
            start = time.perf_counter()
            outputs = jax.block_until_ready(self._call())
            self.first = time.perf_counter() - start
            found = [as_numpy(x) for x in jax.tree.leaves(outputs)]
            for _ in range(self._checked - 1):
                found += [as_numpy(x) for x in jax.tree.leaves(self._call())]
            if not all(np.isfinite(x).all() for x in found):
                raise ArmFailed("not all numbers that it returns are finite")
        return found

    def seconds(self, repeats: int) -> list[float]:
        """The seconds of each of `repeats` calls, after one warm-up call."""
        with _in_one_line():
            return timed(self._call, repeats)

    def end(self) -> None:
        self._call = lambda: None  # and what it holds is freed


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Raises ArmFailed with the first line of an error in its body."""
    try:
        yield
    except ArmFailed:
        raise
    except Exception as error:
        raise ArmFailed(f"{type(error).__name__}: {first_line(error)}") from None


def measure_all(quick: bool, deadline: float) -> list[str]:
    """Prints the table, stores it unless `quick`, and returns the titles of rows that failed.

    deadline: of `time.monotonic`. Raises InputError without a GPU, unless `quick`.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" and not quick:
        raise InputError(
            f"--device measures a GPU, and JAX sees {device.device_kind!r}; install JAX for this "
            "GPU, or add --quick to try it at tiny sizes"
        )
    # Seconds of compiling are told, and a cache would shorten them.
    for name, value in zip(SETTINGS, (False, quick), strict=True):
        jax.config.update(name, value)
    planned = comparisons(quick)
    ceilings = measure_ceilings(quick, libraries=("xla",), start=Here)
    entry = results.make_entry("One GPU in one process", [], ceilings, None)
    entry["machine"]["platform"] = " ".join(device.client.platform_version.split())
    machine = entry["machine"]
    print(
        f"{results.place(machine)}, jax {machine['jax']}, {entry['date']}: "
        f"{ceilings['matmul_flops'] / 1e12:,.3g} TFLOP/s, "
        f"{ceilings['copy_bytes'] / 1e9:,.3g} GB/s\n{_line(COLUMNS)}",
        flush=True,
    )
    entry["rows"] = [_without_figures(comparison) for comparison in planned]
    rounds, last_start = 1 if quick else ROUNDS, deadline - LEAST_LEFT
    for i, row in enumerate(measure_rows(planned, rounds, ceilings, last_start)):
        print(_line(make_cells(row)), flush=True)
        entry["rows"][i] = row
        if not quick:  # after every row, for the machine may be taken away
            results.keep(results.machine_file(), DEVICE, entry)
    print("not stored, for --quick" if quick else f"stored in {results.machine_file()}")
    return [row["title"] for row in entry["rows"] if row.get("reason", "").startswith("failed")]


def measure_rows(
    planned: Sequence[Comparison], rounds: int, ceilings: Json, last_start: float
) -> Iterator[Json]:
    """A row for each comparison: its figures, or why it failed, or that there was no time left."""
    for comparison in planned:
        if time.monotonic() > last_start:
            yield _without_figures(comparison)
            continue
        started: dict[str, Here] = {}

        def start(arm: Arm, *, checked: int, started: dict[str, Here] = started) -> Here:
            started[arm.name] = here = Here(arm, checked=checked)
            return here

        try:
            row = measure(comparison, rounds, ceilings, start)
        except (Disagreement, ArmFailed) as error:
            row = _without_figures(comparison, f"failed: {error}")
        for name, arm in row["arms"].items():
            arm["compile"] = max(started[name].first - arm["median"], 0.0)
        gc.collect()  # what was cyclic; the next row has the whole memory
        yield {**row, "relative": comparison.relative, "tokens": comparison.tokens}


def _without_figures(comparison: Comparison, reason: str = "left out: no time was left") -> Json:
    return {"title": comparison.title, "arms": {}, "reason": reason}


def make_cells(row: Json) -> list[str]:
    """The cells of a row, one for each of `COLUMNS`."""
    if not row["arms"]:
        return [row["title"], row["reason"], "", "", "", ""]
    (name, ours), *others = row["arms"].items()
    rate = f"{row['tokens'] / ours['median']:,.0f}" if row.get("tokens") else ""
    against = [f"{other} {arm['ratio']['median']:.2f}x" for other, arm in others]
    against += [f"{other} left out: {reason}" for other, reason in row["left_out"].items()]
    return [
        row["title"],
        f"{format_figure(row, ours)} ({name})",
        format_shares(ours),
        rate,
        f"{ours['compile']:.1f} s",
        "; ".join(against),
    ]


def _line(cells: Sequence[str]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, (*_WIDTHS, 0), strict=True)]
    return "  ".join(padded).rstrip()
