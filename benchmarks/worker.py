"""The process of one arm: it builds the call, then times it when it is told to."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.comparison import Arm, Measured

# A new interpreter: nothing of the other arms' libraries, threads and memory settings is in it.
_SPAWN = multiprocessing.get_context("spawn")
_PATIENCE = 10.0  # seconds that a process has to end by itself


class ArmFailed(Exception):
    """What an arm raised, in one line."""


class Worker:
    """An arm's process, driven from here.

    checked: the number of first calls whose outputs it sends before it is timed; None = it is a
    fresh arm, which sends what it measured and ends.
    """

    def __init__(self, arm: Arm, *, checked: int | None):
        self._here, there = _SPAWN.Pipe()
        with _with_environment(arm.environment), _importing_from(arm.checkout):
            started = time.time()
            if checked is None:
                self._process = _SPAWN.Process(target=_serve_once, args=(there, arm, started))
            else:
                self._process = _SPAWN.Process(target=_serve, args=(there, arm, checked))
            self._process.start()
        there.close()

    def receive(self) -> Any:
        """The next message of the process; raises ArmFailed if it failed or has ended."""
        try:
            ok, value = self._here.recv()
        except EOFError:
            self._process.join(_PATIENCE)
            raise ArmFailed(f"its process ended, exit code {self._process.exitcode}") from None
        if not ok:
            raise ArmFailed(value)
        return value

    def seconds(self, repeats: int) -> list[float]:
        """The seconds of each of `repeats` calls, after one warm-up call."""
        self._here.send(repeats)
        return self.receive()

    def end(self) -> None:
        self._here.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def in_process(function: Callable[..., Any], **given: Any) -> Any:
    """Runs a function in a process of its own and returns its result."""
    worker = Worker(Arm("", _Returning(function), given), checked=None)
    try:
        _, value = worker.receive()
        return value
    finally:
        worker.end()


class _Returning:
    """A function as the builder of a fresh arm."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, **given: Any) -> Measured:
        return Measured(None, self._function(**given))


def as_numpy(output: Any) -> np.ndarray:
    """An array of any library as NumPy, in float32."""
    if hasattr(output, "detach"):
        output = output.detach().float().cpu().numpy()
    return np.asarray(output, np.float32)


def _wait(output: Any) -> Any:
    if getattr(output, "is_cuda", False):
        sys.modules["torch"].cuda.synchronize()
    return output.block_until_ready() if hasattr(output, "block_until_ready") else output


def _serve(pipe: Connection, arm: Arm, checked: int) -> None:
    with _sending_errors(pipe):
        call = arm.build(**arm.given)
        pipe.send((True, [as_numpy(_wait(call())) for _ in range(checked)]))
        while True:
            try:
                repeats = pipe.recv()
            except EOFError:
                return
            pipe.send((True, _timed(call, repeats)))


def _serve_once(pipe: Connection, arm: Arm, started: float) -> None:
    with _sending_errors(pipe):
        measured = arm.build(**arm.given)
        value = time.time() - started if measured.value is None else measured.value
        output = None if measured.output is None else as_numpy(measured.output)
        pipe.send((True, (output, value)))


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    _wait(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        _wait(call())
        seconds.append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def _sending_errors(pipe: Connection) -> Iterator[None]:
    """Sends what the arm raises to the parent, in one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        with contextlib.suppress(BrokenPipeError):  # the parent has ended
            pipe.send((False, f"{type(error).__name__}: {reason[:300]}"))


@contextlib.contextmanager
def _with_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started in its body have these environment variables."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _importing_from(checkout: str) -> Iterator[None]:
    """Processes that are started in its body import this folder's modules first."""
    if not checkout:
        yield
        return
    sys.path.insert(0, checkout)
    try:
        yield
    finally:
        sys.path.remove(checkout)
