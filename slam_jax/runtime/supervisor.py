"""A process above each one of a run of several, to say how it ended.

Nothing heavy is imported here: entry points are watched before they import JAX.
"""

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

from slam_jax.runtime.signals import INTACT, SIGNALS, say

_SUPERVISED = "SLAM_JAX_SUPERVISED"
_PR_SET_PDEATHSIG = 1  # of Linux' prctl: a signal for the child when its parent dies


def is_supervised() -> bool:
    """Whether `supervise` has started this process; then it ends with the one that did."""
    if os.environ.get(_SUPERVISED) != str(os.getppid()):
        return False
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if os.name == "posix" else None
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def supervise() -> int:
    """Runs this program once more, beneath, and returns its exit code.

    JAX's runtime ends a process whose peers are gone by aborting it, which no code in it can turn
    into a message; its parent can. Signals are handed on.
    """
    environment = {**os.environ, _SUPERVISED: str(os.getpid())}
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, hand_on)
    code = child.wait()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    aborted = "the runtime ended this process: another one of the run, or its host, is gone"
    why = aborted if -code == signal.SIGABRT else f"this process was ended by {name}"
    say(f"stopped: {why}; the same command on all of them goes on from the last checkpoint")
    return INTACT
