"""The lock that keeps a second run out of a workdir."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from slam_jax.errors import UserError, first_line

_NAME = "lock"


class WorkdirError(UserError):
    """A workdir is in use or cannot be written to."""


@contextlib.contextmanager
def lock_workdir(workdir: str | Path) -> Iterator[None]:
    """Locks `workdir`, which is created if needed, against other runs while the body runs.

    The operating system releases the lock where the process dies. A new folder in which a body
    that fails has written nothing is removed again.

    Raises WorkdirError where another run is in the workdir, or it cannot be written to.
    """
    if not str(workdir):
        raise WorkdirError("workdir is empty; name a folder")
    workdir = Path(workdir)
    is_new = not workdir.exists()
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(workdir / _NAME, timeout=0))
        except filelock.Timeout:
            advice = "another run is in progress; wait for its end, or use another workdir"
            raise WorkdirError(f"{workdir}: {advice}") from None
        except OSError as error:
            reason = f"cannot be written to ({first_line(error)})"
            raise WorkdirError(
                f"{workdir}: {reason}; correct this, or use another workdir"
            ) from error
        try:
            yield
        except BaseException:
            if is_new and [path.name for path in workdir.iterdir()] == [_NAME]:
                (workdir / _NAME).unlink()
                workdir.rmdir()
            raise
