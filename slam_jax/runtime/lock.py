"""One run at a time in a workdir."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from slam_jax.errors import UserError, first_line


class WorkdirError(UserError):
    """A workdir is in use, or cannot be written to: in one line."""


@contextlib.contextmanager
def only_run_in(workdir: str | Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`, which is created if needed.

    The system lets go of the lock with the process, however that ends: a killed run keeps nobody
    out. Evaluations read without it.

    Raises:
      WorkdirError: another run is in the workdir, or it cannot be written to.
    """
    if not str(workdir):
        raise WorkdirError("workdir is empty; name a folder")
    workdir = Path(workdir)
    lock = filelock.FileLock(workdir / "lock", timeout=0)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise WorkdirError(
            f"{workdir}: another run is going on in it; wait for its end, or use another workdir"
        ) from None
    except OSError as error:
        reason = first_line(error)
        raise WorkdirError(
            f"{workdir}: cannot be written to ({reason}); use another workdir, or correct this"
        ) from error
    try:
        yield
    finally:
        lock.release()
