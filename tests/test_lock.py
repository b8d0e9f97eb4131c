"""A workdir belongs to one run at a time, and to none that is dead."""

import os
import signal
import subprocess
import sys

import pytest

from slam_jax.runtime.lock import WorkdirError, lock_workdir

HOLD = """
import sys
from slam_jax.runtime.lock import lock_workdir
with lock_workdir(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    workdir = tmp_path / "a" / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        refused = pytest.raises(WorkdirError, match="a/run: another run is in progress; wait")
        with refused, lock_workdir(workdir):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    for _ in range(2):
        with lock_workdir(workdir):
            pass


def test_a_workdir_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(WorkdirError, match=r"file/run: cannot be written to \(Not a dir")
    with refused, lock_workdir(tmp_path / "file" / "run"):
        pass


def test_a_new_folder_in_which_nothing_was_written_is_removed(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError), lock_workdir(workdir):
        raise ValueError
    assert not workdir.exists()
    with pytest.raises(ValueError), lock_workdir(workdir):
        (workdir / "metrics").touch()
        raise ValueError
    assert (workdir / "metrics").exists()
    (workdir / "metrics").unlink()
    with pytest.raises(ValueError), lock_workdir(workdir):
        raise ValueError
    assert workdir.exists(), "it was there before"
