"""A parent process for each process of a run of several: it reports how its child ended.

This module imports nothing heavy: commands call `supervise` before they import JAX.
"""

import ctypes
import os
import signal
import subprocess
import sys

from slam_jax.runtime.signals import INTACT, RESUME_ALL, SIGNALS, print_line

_SUPERVISED = "SLAM_JAX_SUPERVISED"
_PR_SET_PDEATHSIG = 1  # Linux prctl: the signal that a child gets when its parent dies


def is_supervised() -> bool:
    """Whether `supervise` started this process; if so, it will end together with its parent."""
    if os.environ.get(_SUPERVISED) != str(os.getppid()):
        return False
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if os.name == "posix" else None
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def supervise() -> int:
    """Runs this command again as a child, forwards signals to it, and returns its exit code.
    JAX aborts a process whose peers are gone; only the parent can turn this into a message."""
    environment = {**os.environ, _SUPERVISED: str(os.getpid())}
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: child.send_signal(number))
    code = child.wait()
    if code >= 0:
        return code
    reason = f"this process was ended by {signal.Signals(-code).name}"
    if -code == signal.SIGABRT:
        reason = "JAX ended this process: another process of the run, or its host, is gone"
    print_line(f"stopped: {reason}; {RESUME_ALL}")
    return INTACT
