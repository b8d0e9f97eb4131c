"""Asked to stop, a run saves and ends; where it cannot in time, it ends with what it saved before.

Nothing heavy is imported here: entry points listen before they import JAX.
"""

import contextlib
import os
import signal
import threading
import time
from typing import NoReturn

SAVED, INTACT = 75, 76
"""Exit codes: all steps taken are in a checkpoint; or the steps since the last one are lost."""

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
_SAME_EVENT_S = 1.0  # a closing terminal sends SIGHUP twice: by the shell and by the kernel


class Stopped(Exception):
    """The run ended early, because it was asked to, with its last step saved."""


class PeerLost(Exception):
    """Another process of the run is gone, and with it what was done since the last checkpoint."""


class Stop:
    """A request to stop, which `train` looks for after every step and batch of an evaluation.

    Args:
        grace_seconds: while `listen` is in force, how long the save may take.
    """

    def __init__(self, grace_seconds: float = 10.0):
        self._grace = grace_seconds
        self._asked = threading.Event()
        self._saves = False
        self._listens = self._together = False

    @property
    def requested(self) -> bool:
        return self._asked.is_set()

    def request(self) -> None:
        """Asks to stop, from any thread."""
        self._asked.set()
        if self._listens:
            late = threading.Timer(self._grace, _end, [f"not saved within {self._grace:g} s"])
            late.daemon = True
            late.start()

    def expect_save(self) -> None:
        """Says that from now on there is something to save. Until then a signal ends the process at
        once, even in an import or in the compilation of the first step."""
        self._saves = True

    def listen(self, *, together: bool = False) -> None:
        """Takes SIGTERM, SIGINT and SIGHUP as requests until the end of the process.

        together: this is one process of several, which have to stop after the same step. They
        agree on it by JAX's notice of preemption, which listens for SIGTERM itself, so that this is
        left to it, and the other signals are turned into it.

        Once the grace is over, or at a second signal, the process ends with exit code INTACT,
        whatever it is doing. Handlers would not do: Python runs them between two of its own
        instructions alone, and a compilation can be one that takes minutes; and the descriptor it
        offers to be woken by is one that event loops set, too. So the signals are blocked, and a
        thread waits for them. To be called in the main thread before others are started, which
        inherit that. Signals that are ignored, as by nohup, stay so.
        """
        heard = {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        if together:
            heard -= {signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        self._listens, self._together = True, together
        threading.Thread(target=self._watch, args=(heard,), name="stop", daemon=True).start()

    def _watch(self, heard: set[signal.Signals]) -> None:
        first = None
        while True:
            number = signal.sigwait(heard)
            now = time.monotonic()
            if not self._saves:
                _end("no step was taken")
            if first is None:
                first = now
                say(f"{signal.Signals(number).name}: saving; once more to end without")
                if self._together:
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    self.request()
            elif now - first > _SAME_EVENT_S:
                _end("not saved")


def _end(why: str) -> NoReturn:
    say(f"stopped: {why}; the same command goes on from the last checkpoint")
    os._exit(INTACT)


def say(text: str) -> None:
    """Writes a line to standard error past all buffers, and gives a terminal its cursor back."""
    clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{clear}{text}\n".encode(errors="surrogateescape"))
