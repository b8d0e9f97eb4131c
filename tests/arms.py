"""Arms for test_benchmarks.py, each run in a process of its own."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.comparison import Measured


def numbers(values: list[float]) -> Callable[[], Any]:
    return lambda: np.array(values)


def counting(start: int) -> Callable[[], Any]:
    """A call that differs from the one before, as a training step does."""
    count = start - 1

    def call():
        nonlocal count
        count += 1
        return np.array(float(count))

    return call


def failing_at(call: int) -> Callable[[], Any]:
    """Of all calls of its process that one fails."""
    count = counting(1)

    def failing():
        if count() == call:
            raise RuntimeError("no memory")
        return np.array([1.0])

    return failing


def figure(value: float, output: float = 0.0) -> Measured:
    return Measured(np.array(output), value)


def failing(**given: Any) -> Any:
    raise RuntimeError("no compiler\nand much more")


def dying() -> Any:
    os._exit(3)


def surroundings() -> Measured:
    return Measured(np.array(float(os.environ["MEANT_FOR_ONE_ARM"])), float(os.getpid()))
