"""Signals that ask a run to stop: it saves and ends, or ends with what was saved before.

This module imports nothing heavy: commands call `Stop.listen` before they import JAX.
"""

import contextlib
import os
import signal
import threading
import time
from typing import NoReturn

SAVED, INTACT = 75, 76
"""Exit codes: every step taken is in a checkpoint; the steps since the last checkpoint are lost."""
RESUME_ALL = "the same command on all processes resumes from the last checkpoint"
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_SAME_EVENT_S = 1.0  # a closing terminal sends SIGHUP twice: once each by the shell and the kernel


class Stopped(Exception):
    """The run ended early on request; its last step is saved."""


class PeerLost(Exception):
    """Another process of the run is gone, and with it the steps since the last checkpoint."""


class Stop:
    """A request to stop. `train` checks it after every step and every batch of an evaluation.

    grace_seconds: how long a save may take after a signal, once `listen` was called.
    """

    def __init__(self, grace_seconds: float = 10.0):
        self._grace_seconds = grace_seconds
        self._requested = self._can_save = False
        self._listening = self._several_processes = False

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Asks to stop, from any thread."""
        self._requested = True
        if self._listening:
            late = f"not saved within {self._grace_seconds:g} s"
            timer = threading.Timer(self._grace_seconds, _end, [late])
            timer.daemon = True
            timer.start()

    def expect_save(self) -> None:
        """Says that from now on there is something to save. Until then a signal ends the process
        at once, even during an import or the compilation of the first step."""
        self._can_save = True

    def listen(self, *, several_processes: bool = False) -> None:
        """Takes SIGTERM, SIGINT and SIGHUP as requests from now on. Ignored signals stay ignored.

        Call it in the main thread before other threads start, since they must inherit the signal
        mask. After the grace period, or at a second signal, the process ends with exit code INTACT
        even during a compilation: the signals are blocked, and a thread waits for them.

        several_processes: all processes of the run stop after the same step. They agree on it by
        JAX's preemption notice, which listens for SIGTERM; other signals are turned into SIGTERM.
        """
        numbers = {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        if several_processes:
            numbers -= {signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        self._listening, self._several_processes = True, several_processes
        threading.Thread(target=self._wait, args=(numbers,), name="stop", daemon=True).start()

    def _wait(self, numbers: set[signal.Signals]) -> None:
        first = None
        while True:
            number = signal.sigwait(numbers)
            now = time.monotonic()
            if not self._can_save:
                _end("no step was taken")
            if first is None:
                first = now
                name = signal.Signals(number).name
                print_line(f"{name}: saving; send it again to end without saving")
                if self._several_processes:
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    self.request()
            elif now - first > _SAME_EVENT_S:
                _end("not saved")


def _end(reason: str) -> NoReturn:
    print_line(
        f"stopped: {reason}; the same command continues, from the last checkpoint if there is one"
    )
    os._exit(INTACT)


def print_line(text: str) -> None:
    """Writes a line to standard error without buffering, and shows a terminal's cursor again."""
    clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{clear}{text}\n".encode(errors="surrogateescape"))
