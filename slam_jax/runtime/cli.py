"""What the entry points share: flags are read, and what ends a program is told in one line."""

import contextlib
import logging as python_logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

from slam_jax.errors import UserError, first_line
from slam_jax.runtime.signals import INTACT, SAVED, PeerLost, Stopped, say


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags that are defined and calls `main` with the other arguments."""

    prepare_process()

    def parse(argv: list[str]) -> list[str]:
        with clear_ends():
            try:
                return flags.FLAGS(argv, known_only=True)
            except flags.Error as error:
                message = str(error).replace("\n", "; ")
                raise UserError(f"{message}; --help shows what may be given") from None

    def guarded(argv: list[str]) -> None:
        with clear_ends():
            main(argv[1:])

    app.run(guarded, flags_parser=parse)


def prepare_process() -> None:
    """Makes up for how the process was started, and has warnings told plainly; called first.

    Without one of the standard streams, the next file that is opened would take its place, and be
    written to by whoever means a terminal. In a locale that is not UTF-8, Python and the libraries
    beneath it spell the name of a file in different bytes; the program starts over in UTF-8, with
    its streams as they were.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().setFormatter(python_logging.Formatter("warning: %(message)s"))
    # Over a write or a read that fails Orbax leaves tasks behind, each with a trace of its own.
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    sys.unraisablehook = _show_unless_left_behind
    if sys.getfilesystemencoding() != "utf-8":
        streams = f"{getattr(sys.stdout, 'encoding', 'ascii')}:replace"
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": streams}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _show_unless_left_behind(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def clear_ends() -> Iterator[None]:
    """Ends the program without a traceback where somebody can do something about it: exit code 2
    and one line for a UserError or a file that the system refuses, SAVED for a run that stopped as
    it was asked to, and the shell's own code for Ctrl-C and for a pipe that nobody reads."""
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except Stopped as stopped:
        say(f"stopped: {stopped}")
        # All is on disk; threads that still read ahead are not waited for.
        os._exit(SAVED)
    except PeerLost as lost:
        say(f"stopped: {lost}; the same command on all of them goes on from the last checkpoint")
        # The runtime would wait for whom it lost.
        os._exit(INTACT)
    except KeyboardInterrupt:
        say("interrupted")
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os._exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as error:
        what = error.filename or "a file"
        say(f"error: {what}: {first_line(error)}; check the path, permissions and free space")
        sys.exit(2)
